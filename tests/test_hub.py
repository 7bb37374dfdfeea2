import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from checkpoints import adapted, assert_same_weights, edit_adapter, refused
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

import vlm.hub
from vlm.hub import (
    COMPANIONS,
    EMBEDDING,
    INDEX_FILE,
    SINGLE_FILE,
    SMALL_FILES,
    find_checkpoint,
)
from vlm.weights import load_hf_model, save_hf_model


@pytest.mark.parametrize(
    "path", ["no/such/folder", "../nowhere", "nowhere", "a b/c", "https://a.org/b/c"]
)
def test_no_folder(path):
    with refused(FileNotFoundError, f"no folder {path}: ", "hub id"):
        find_checkpoint(path)


@pytest.mark.parametrize("name", ["config.json", "cat.png", "cat.JPG"])
def test_a_file_is_not_a_folder(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with refused(FileNotFoundError, f"{name} is a file", "hub id"):
        load_hf_model(tmp_path / name, "cpu")


def test_a_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "google" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vlm.hub, "snapshot_download", pytest.fail)
    assert find_checkpoint("google/model") == Path("google/model")


@pytest.mark.parametrize("name", ["a/b@", "a/b@ ", "@main", "a@b/c", "a/b/c@main"])
def test_what_is_not_a_hub_id(name, monkeypatch):
    monkeypatch.setattr(vlm.hub, "snapshot_download", pytest.fail)
    with refused(FileNotFoundError, "give a checkpoint's folder"):
        find_checkpoint(name)


@pytest.mark.parametrize(
    "error",
    [
        OSError("no space left"),
        ValueError("bad id\nlong"),
        HTTPError("timed out"),
        LocalEntryNotFoundError("Got: ConnectError: no route\nPlease check it."),
    ],
)
def test_what_the_hub_s_library_says_is_passed_on(monkeypatch, error):
    def fetch(*args, **kwargs):
        raise error

    monkeypatch.setattr(vlm.hub, "snapshot_download", fetch)
    with refused(FileNotFoundError, "some/model; the hub: ", str(error).split()[-1]):
        load_hf_model("some/model", "cpu")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of huggingface.co as fetching a repository needs."""

    def do_GET(self):
        hub = self.server
        hub.asked.append(self.path)
        what = self.path.partition("?")[0].split("/")
        if what[1] == "api":  # api, models, owner, name, …
            name, rest = "/".join(what[3:5]), what[5:]
        else:
            name, rest = "/".join(what[1:3]), what[3:]
        if name == "refused/model":  # what the hub says to some fine-grained tokens
            said = {"X-Error-Message": "Please enable access to gated repositories"}
            return self.answer(403, b"", said)
        if name == "busy/model":
            return self.answer(429, b"")
        if name not in ("some/model", "gated/model"):
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if rest[0] == "revision" and rest[1] not in ("main", "half", COMMIT):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if rest[0] == "revision":
            return self.answer(200, json.dumps({"id": name, "sha": COMMIT}).encode())
        if rest[0] == "tree":
            files = [
                {"type": "file", "path": path, "size": len(data), "oid": path}
                for path, data in hub.files.items()
            ]
            return self.answer(200, json.dumps(files).encode())
        if name == "gated/model":
            return self.answer(401, b"", {"X-Error-Code": "GatedRepo"})
        path = "/".join(rest[2:])
        hub.fetched.add(path)
        headers = {"ETag": f'"{path}"', "X-Repo-Commit": COMMIT}
        return self.answer(200, hub.files[path], headers)

    do_HEAD = do_GET

    def answer(self, status, data, headers=None):
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": len(data)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    """A hub on this machine, and an empty cache; `.files` may be changed."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.fetched = [], set()
    server.files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    for unwanted in ("README.md", "pytorch_model.bin", "onnx/model.safetensors"):
        server.files[unwanted] = b"not wanted"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address
        + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_id_is_fetched_once_and_only_what_is_read(hub, model, monkeypatch):
    loaded, _ = load_hf_model("some/model@half", "cpu")
    assert_same_weights(loaded, model)
    assert any("/revision/half" in path for path in hub.asked)
    assert not any("/revision/main" in path for path in hub.asked)
    wanted = {name for name in hub.files if name.endswith(("json", "safetensors"))}
    assert hub.fetched == wanted - {"onnx/model.safetensors"}

    hub.fetched.clear()
    load_hf_model("some/model@half", "cpu")
    assert not hub.fetched  # the cache had it all

    hub.asked.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_same_weights(load_hf_model("some/model@half", "cpu")[0], model)
    # A commit names what is there too, without asking which branch it was.
    assert_same_weights(load_hf_model(f"some/model@{COMMIT}", "cpu")[0], model)
    assert not hub.asked


def test_another_architecture_on_the_hub_costs_kilobytes(hub):
    config = json.loads(hub.files["config.json"]) | {"model_type": "llama"}
    hub.files["config.json"] = json.dumps(config).encode()
    with pytest.raises(ValueError, match="config.json.*llama"):
        load_hf_model("some/model", "cpu")
    assert hub.fetched and SINGLE_FILE not in hub.fetched


def test_a_part_of_a_repository_can_be_had_alone(hub):
    folder = find_checkpoint("some/model", only=("config.json", "mask_decoder.*"))
    assert hub.fetched == {"config.json"} == {path.name for path in folder.iterdir()}
    find_checkpoint("some/model", only=SMALL_FILES)
    assert SINGLE_FILE not in hub.fetched and "tokenizer.json" in hub.fetched


@pytest.mark.parametrize(
    "address",
    [
        "some/model/",
        "https://huggingface.co/some/model",
        "https://hf.co/some/model/",
        "http://huggingface.co/some/model/tree/half",
        "https://huggingface.co/some/model/blob/half/config.json",
    ],
)
def test_the_address_of_a_page_is_its_hub_id(hub, model, address):
    assert_same_weights(load_hf_model(address, "cpu")[0], model)
    revision = "half" if "half" in address else "main"
    assert any(f"/some/model/revision/{revision}" in path for path in hub.asked)


def test_mask_tokens_come_from_the_hub_too(hub, tokenizer, tmp_path):
    hub.files |= {name: name.encode() for name in COMPANIONS}
    model, _ = load_hf_model("some/model", "cpu")
    assert [file.name for file in model.companions] == list(COMPANIONS)
    save_hf_model(model, tokenizer, tmp_path / "mine")
    for name in COMPANIONS:
        assert (tmp_path / "mine" / name).read_bytes() == name.encode()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gated/model", "accept its license on http.*/gated/model.*hf auth login"),
        ("gated/model", "HF_TOKEN"),
        ("no/model", "Repository Not Found.*authenticated"),
        ("some/model@none", "Revision Not Found.*/none"),
        ("refused/model", "403.*enable access to gated.*token"),
        ("busy/model", "429 Too Many Requests"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(hub, name, words):
    with refused(FileNotFoundError, f"no folder {name}; the hub: ", words):
        load_hf_model(name, "cpu")


def test_an_index_that_does_not_fit_costs_kilobytes(hub, model, tokenizer, tmp_path):
    parts = tmp_path / "parts"
    save_hf_model(model, tokenizer, parts, max_shard_size="100KB")
    hub.files = {path.name: path.read_bytes() for path in parts.iterdir()}
    index = json.loads(hub.files[INDEX_FILE])
    index["weight_map"]["odd.weight"] = index["weight_map"].pop(EMBEDDING)
    hub.files[INDEX_FILE] = json.dumps(index).encode()
    with refused(ValueError, f"unexpected odd.weight in model-.*; missing {EMBEDDING}"):
        load_hf_model("some/model", "cpu")
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


@pytest.mark.parametrize(
    "more", [[], ["pytorch_model.bin.index.json"]], ids=["nothing", "pickles"]
)
def test_a_repository_without_safetensors(hub, more):
    del hub.files[SINGLE_FILE]
    hub.files |= dict.fromkeys(more, b"{}")
    with refused(FileNotFoundError, "no model.safetensors", "pickles"):
        load_hf_model("some/model", "cpu")


def test_a_truncated_file_in_the_cache_can_be_mended(hub, model):
    load_hf_model("some/model", "cpu")
    place = find_checkpoint("some/model") / SINGLE_FILE
    os.truncate(place, 10_000)
    with pytest.raises(ValueError, match="delete it and fetch it again") as raised:
        load_hf_model("some/model", "cpu")
    named = re.search("(.*) can't be read", str(raised.value))[1]
    Path(named).unlink()
    assert_same_weights(load_hf_model("some/model", "cpu")[0], model)


@pytest.mark.parametrize("half", [False, True])
def test_offline_without_all_of_it_in_the_cache(hub, monkeypatch, half):
    if half:
        find_checkpoint("some/model", only=SMALL_FILES)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.asked.clear()
    words = "incomplete.*model.safetensors" if half else "HF_HUB_OFFLINE"
    with refused(FileNotFoundError, words):
        load_hf_model("some/model", "cpu")
    assert not hub.asked


def test_an_adapter_on_the_hub_and_its_base(hub, copy, tmp_path, monkeypatch):
    adapter = tmp_path / "adapter"
    adapted(load_hf_model(copy, "cpu")[0]).save_pretrained(adapter)
    edit_adapter(adapter, base_model_name_or_path="some/model", revision="half")
    local, _ = load_hf_model(adapter, "cpu")
    assert any("/some/model/revision/half" in path for path in hub.asked)
    edit_adapter(adapter, base_model_name_or_path=str(copy), revision=None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(adapter / "new"))
    hub.files = {path.name: path.read_bytes() for path in adapter.glob("*.*")}
    there, _ = load_hf_model("some/model", "cpu")
    assert_same_weights(there, local)
