import copy as copy_module
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from reference import pair, random_inputs, tiny_config
from safetensors.torch import load_file, save_file

import vlm.weights
from vlm.paligemma import PaliGemmaForConditionalGeneration
from vlm.processing import PaliGemmaProcessor
from vlm.weights import (
    COMPANIONS,
    EMBEDDED,
    EMBEDDING,
    INDEX_FILE,
    SINGLE_FILE,
    SMALL_FILES,
    TIED,
    canonical_name,
    check_tensors,
    choose_device,
    choose_dtype,
    empty_model,
    find_checkpoint,
    find_tensors,
    load_chosen_model,
    load_hf_model,
    make_processor,
    require_space,
    save_hf_model,
)

CONFIGS = {
    "mqa": dict(),
    "gqa": dict(text=dict(num_key_value_heads=2), vision=dict(image_size=42)),
    "image-id-outside-the-table": dict(image_token_index=128),
}
LAYER = "language_model.model.layers.1."


@pytest.fixture(scope="module", params=CONFIGS)
def models(request):
    torch.manual_seed(0)
    return pair(tiny_config(**CONFIGS[request.param]))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return pair()[0]


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    """A good checkpoint in one file; leave it as it is."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_hf_model(model, tokenizer, folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of it to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture
def shards(model, tokenizer, tmp_path):
    save_hf_model(model, tokenizer, tmp_path / "shards", max_shard_size="40KB")
    return tmp_path / "shards"


def assert_same_weights(model, expected):
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    head, embedding = model.language_model.lm_head, model.language_model.model
    assert head.weight is embedding.embed_tokens.weight


def rewrite(folder, change):
    tensors = load_file(folder / SINGLE_FILE)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(change(tensors), folder / SINGLE_FILE, {"format": "pt"})


# --- There and back -----------------------------------------------------------------


def test_round_trip(models, tokenizer, tmp_path):
    save_hf_model(models[0], tokenizer, tmp_path)
    again, their_tokenizer = load_hf_model(tmp_path, "cpu")
    assert_same_weights(again, models[0])
    assert again.config == models[0].config and not again.training
    text = "detect owl ; pizza\n<loc0001><seg127> 🦉"
    assert their_tokenizer.encode(text) == tokenizer.encode(text)
    assert their_tokenizer.get_vocab() == tokenizer.get_vocab()
    inputs = random_inputs(again.config, (5, 2))
    with torch.no_grad():
        expected = models[0](**inputs)["logits"]
        torch.testing.assert_close(again(**inputs)["logits"], expected, atol=0, rtol=0)


def test_round_trip_in_shards(model, shards):
    files = sorted(path.name for path in shards.glob("*.safetensors"))
    assert len(files) > 2 and not (shards / SINGLE_FILE).exists()
    assert_same_weights(load_hf_model(shards, "cpu")[0], model)


def test_transformers_loads_what_we_save(models, tokenizer, tmp_path):
    ours, theirs = models
    save_hf_model(ours, tokenizer, tmp_path)
    loaded, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    inputs = random_inputs(ours.config, (5, 2))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = loaded.eval()(**inputs).logits[real]
        actual = ours(**inputs)["logits"][real]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    settings = loaded.generation_config
    assert (settings.bos_token_id, settings.eos_token_id) == (2, 1)
    assert settings.pad_token_id == 0


@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_transformers_finds_every_tensor_and_no_other(model, tokenizer, tmp_path, size):
    save_hf_model(model, tokenizer, tmp_path, size)
    _, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[kind], (kind, info[kind])


def test_transformers_processor_reads_what_we_save(checkpoint, tokenizer, model):
    sizes = model.config.vision_config
    ours = PaliGemmaProcessor(tokenizer, sizes.num_image_tokens, sizes.image_size)
    picture = torch.randint(0, 256, (50, 30, 3), dtype=torch.uint8).numpy()
    theirs = transformers.AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    expected = theirs(picture, return_tensors="pt")["pixel_values"]
    actual = ours("caption en", picture)["pixel_values"]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", ["1GB", "40KB"])
def test_what_transformers_saves_loads(models, tokenizer, tmp_path, size):
    ours, theirs = models
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / INDEX_FILE).exists() == (size == "40KB")
    names = find_tensors(tmp_path)
    assert not any("vision_model" in name or "lm_head" in name for name in names)
    assert_same_weights(load_hf_model(tmp_path, "cpu")[0], ours)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("layout", ["hub", "memory"])
def test_layouts_with_and_without_head(models, tokenizer, tmp_path, layout, head):
    ours, theirs = models
    save_hf_model(ours, tokenizer, tmp_path)
    state = (ours if layout == "hub" else theirs).state_dict()
    state = {
        name: t.clone() for name, t in state.items() if head or "lm_head" not in name
    }
    assert any("lm_head" in name for name in state) == head
    save_file(state, tmp_path / SINGLE_FILE, {"format": "pt"})
    assert_same_weights(load_hf_model(tmp_path, "cpu")[0], ours)


def test_names_of_all_layouts(models):
    ours, theirs = models
    names = {canonical_name(name) for name in theirs.state_dict()}
    assert names == set(ours.state_dict())
    assert {canonical_name(name) for name in names} == names


# --- What doesn't fit is refused ----------------------------------------------------


def transposed(tensors):
    name = LAYER + "mlp.up_proj.weight"
    return tensors | {name: tensors[name].T.contiguous()}


DAMAGES = {
    "missing": (
        lambda t: {
            n: x for n, x in t.items() if n != LAYER + "self_attn.q_proj.weight"
        },
        f"missing {LAYER}self_attn.q_proj.weight",
    ),
    "missing embedding": (
        lambda t: {n: x for n, x in t.items() if n != EMBEDDING},
        f"missing {EMBEDDING}",
    ),
    "unexpected": (
        lambda t: t | {"model.language_model.layers.9.x": torch.ones(1)},
        "unexpected model.language_model.layers.9.x in model.safetensors",
    ),
    "shape": (
        transposed,
        rf"{LAYER}mlp.up_proj.weight in model.safetensors has shape \[32, 48\], "
        r"not \[48, 32\]",
    ),
    "dtype": (
        lambda t: t | {LAYER + "input_layernorm.weight": torch.ones(32).int()},
        f"{LAYER}input_layernorm.weight in model.safetensors has dtype I32, not one of",
    ),
    "twice": (
        lambda t: t | {"model.language_model.norm.weight": torch.ones(32)},
        r"language_model.(model.)?norm.weight in model.safetensors repeats "
        r"(model.)?language_model.(model.)?norm.weight in model.safetensors",
    ),
    "untied head": (
        lambda t: t | {"lm_head.weight": t[EMBEDDING] + 1},
        f"lm_head.weight in .*safetensors differs from {EMBEDDING}: .* fetch it",
    ),
    "many": (
        lambda t: {n: x for n, x in t.items() if "vision" not in n},
        r"missing vision_tower.*; and \d+ more\. Fetch it again, or give the config",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused(copy, damage):
    change, message = DAMAGES[damage]
    rewrite(copy, change)
    with pytest.raises(ValueError, match=message) as raised:
        load_hf_model(copy, "cpu")
    if damage != "untied head":
        assert str(raised.value).startswith(f"{copy} doesn't fit the model")


def test_every_byte_of_every_shard_is_read_ahead(shards, monkeypatch):
    asked = []
    monkeypatch.setattr(
        vlm.weights.os,
        "posix_fadvise",
        lambda fd, *rest: asked.append((os.fstat(fd).st_size, *rest)),
        raising=False,
    )
    monkeypatch.setattr(vlm.weights.os, "POSIX_FADV_WILLNEED", 3, raising=False)
    monkeypatch.setattr(vlm.weights, "READ_AHEAD", 10_000)
    load_hf_model(shards, "cpu")
    sizes = [path.stat().st_size for path in sorted(shards.glob("*.safetensors"))]
    expected = [
        (size, start, 10_000, 3) for size in sizes for start in range(0, size, 10_000)
    ]
    assert asked == expected and len(asked) > len(sizes)


def test_a_system_that_takes_no_advice(shards, model, monkeypatch):
    monkeypatch.delattr(vlm.weights.os, "posix_fadvise", raising=False)
    assert_same_weights(load_hf_model(shards, "cpu")[0], model)


def test_checked_before_a_weight_is_read(copy, monkeypatch):
    rewrite(copy, transposed)
    monkeypatch.setattr(vlm.weights, "read_weights", pytest.fail)
    with pytest.raises(ValueError, match="has shape"):
        load_hf_model(copy, "cpu")


def test_all_problems_at_once(model, copy):
    rewrite(copy, lambda t: transposed(DAMAGES["missing"][0](t)))
    with pytest.raises(ValueError, match="has shape .*; missing"):
        check_tensors(model, find_tensors(copy))


def test_an_empty_file_is_refused(copy):
    save_file({}, copy / SINGLE_FILE)
    with pytest.raises(ValueError, match="the checkpoint doesn't fit .* missing"):
        load_hf_model(copy, "cpu")


@pytest.mark.parametrize("keep", [0, 5, 10_000])
def test_truncated_file(copy, keep):
    os.truncate(copy / SINGLE_FILE, keep)
    with pytest.raises(ValueError, match=r"model.safetensors can't be read \(trunc"):
        load_hf_model(copy, "cpu")


def test_missing_shard(shards):
    last = sorted(shards.glob("*.safetensors"))[-1]
    last.unlink()
    message = f"{INDEX_FILE} names {last.name}, which is missing in"
    with pytest.raises(FileNotFoundError, match=message):
        load_hf_model(shards, "cpu")


def test_index_and_shards_disagree(shards):
    index = json.loads((shards / INDEX_FILE).read_text())
    files = list(index["weight_map"].values())
    first = max(files, key=files.count)  # moving one tensor away leaves it others
    last = max(file for file in files if file != first)
    name = next(n for n, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = last
    (shards / INDEX_FILE).write_text(json.dumps(index))
    message = f"{INDEX_FILE} promises {name} in {last}, and it isn't there: fetch both"
    with pytest.raises(ValueError, match=message):
        load_hf_model(shards, "cpu")


def test_a_shard_that_the_index_does_not_name(shards):
    first = sorted(shards.glob("*.safetensors"))[0]
    index = json.loads((shards / INDEX_FILE).read_text())
    kept = {n: file for n, file in index["weight_map"].items() if file != first.name}
    (shards / INDEX_FILE).write_text(json.dumps({"weight_map": kept}))
    message = f"{INDEX_FILE} names no tensor of {first.name}, a shard beside it: fetch"
    with pytest.raises(ValueError, match=message):
        load_hf_model(shards, "cpu")


def test_truncated_shard(shards):
    last = sorted(shards.glob("*.safetensors"))[-1]
    os.truncate(last, last.stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"{last.name} can't be read \(truncated"):
        load_hf_model(shards, "cpu")


def test_a_tensor_in_two_shards(shards):
    first, second = sorted(shards.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    with pytest.raises(
        ValueError, match=f"promises {name}|{name} in .* repeats {name}"
    ):
        load_hf_model(shards, "cpu")


BROKEN = ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": null}}']


@pytest.mark.parametrize("text", BROKEN)
def test_broken_index(shards, text):
    (shards / INDEX_FILE).write_text(text)
    with pytest.raises(ValueError, match="index.json is not an index of shards"):
        load_hf_model(shards, "cpu")


def test_pickle_is_not_read(copy, model):
    (copy / SINGLE_FILE).unlink()
    torch.save(model.state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match="has no model.safetensors, only .bin.*save_pretrained"
    ):
        load_hf_model(copy, "cpu")


def test_shards_without_their_index(shards):
    (shards / INDEX_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="shards without their index: fetch"):
        load_hf_model(shards, "cpu")


def test_weights_that_are_not_there(copy):
    (copy / SINGLE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"and no {INDEX_FILE}: fetch"):
        load_hf_model(copy, "cpu")


def test_an_adapter_is_not_a_model(copy):
    (copy / "config.json").rename(copy / "adapter_config.json")
    with pytest.raises(FileNotFoundError, match="an adapter, not a model: merge it"):
        load_hf_model(copy, "cpu")


def test_quantized_weights(copy):
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized: give the checkpoint that they"):
        load_hf_model(copy, "cpu")


def test_another_models_tokenizer(checkpoint, monkeypatch):
    model, tokenizer = load_hf_model(checkpoint, "cpu")
    monkeypatch.setattr(model.config, "image_token_index", 7)
    with pytest.raises(ValueError, match="and 7 in the model's config: give each mod"):
        make_processor(model, tokenizer)


def test_no_config(copy):
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        load_hf_model(copy, "cpu")


def test_another_architecture(copy):
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["model_type"] = "llama"
    (copy / "config.json").write_text(json.dumps(config))
    message = (
        "config.json is not a PaliGemma's in .*llama.* Give the folder or the hub id"
    )
    with pytest.raises(ValueError, match=message):
        load_hf_model(copy, "cpu")


def test_config_and_weights_of_different_picture_sizes(copy, model, tokenizer):
    larger = tiny_config(vision=dict(image_size=42))
    larger.save_pretrained(copy)
    with pytest.raises(
        ValueError,
        match=r"position_embedding.weight in .* has shape \[4, 24\], not \[9, 24\]",
    ):
        load_hf_model(copy, "cpu")


def test_processor_and_model_of_different_picture_sizes(tokenizer):
    words = dict(
        text=dict(vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = PaliGemmaForConditionalGeneration(tiny_config(**words))
    wide = tiny_config(vision=dict(image_size=42), **words)
    larger = PaliGemmaForConditionalGeneration(wide)
    picture = torch.randint(0, 256, (50, 30, 3), dtype=torch.uint8).numpy()
    small, large = (make_processor(m, tokenizer) for m in (model, larger))
    assert (small.num_image_tokens, large.num_image_tokens) == (4, 9)
    with pytest.raises(ValueError, match="use a processor with image_size=42"):
        larger(**small("caption en", picture))
    with pytest.raises(ValueError, match="use a processor with image_size=28"):
        model(**large("caption en", picture))
    finest = PaliGemmaProcessor(tokenizer, 1024, 448)  # as published, 14 px a patch
    with pytest.raises(ValueError, match=r"shape \[1, 3, 448, 448\].*image_size=42"):
        larger(**finest("caption en", picture))
    wrong = PaliGemmaProcessor(tokenizer, 4, 42)  # right pixels, too few seats
    with pytest.raises(ValueError, match=r"9 features each .* \[4\] image tokens"):
        larger(**wrong("caption en", picture))


def test_no_tokenizer(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer that can be read in"):
        load_hf_model(copy, "cpu")


# --- Where it comes from ------------------------------------------------------------


@pytest.mark.parametrize("path", ["no/such/folder", "../nowhere", "nowhere", "a b/c"])
def test_no_folder(path):
    with pytest.raises(FileNotFoundError, match=f"no folder {path}: give a checkpoint"):
        find_checkpoint(path)


def test_a_file_is_no_folder(checkpoint):
    with pytest.raises(FileNotFoundError, match="is a file: give the folder"):
        find_checkpoint(checkpoint / "config.json")


def test_a_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "google" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vlm.weights, "snapshot_download", pytest.fail)
    assert find_checkpoint("google/model") == Path("google/model")


def test_a_revision_needs_a_hub_id(checkpoint):
    for path in (None, checkpoint):
        with pytest.raises(ValueError, match="revision='main' needs a hub id"):
            load_hf_model(path, "cpu", revision="main")
    with pytest.raises(ValueError, match="a/b@one and revision='two' disagree"):
        find_checkpoint("a/b@one", "two")


@pytest.mark.parametrize("name", ["a/b@", "a/b@ ", "@main", "a@b/c", "a/b/c@main"])
def test_what_is_no_hub_id(name, monkeypatch):
    monkeypatch.setattr(vlm.weights, "snapshot_download", pytest.fail)
    with pytest.raises(FileNotFoundError, match="give a checkpoint's folder"):
        find_checkpoint(name)


@pytest.mark.parametrize(
    "error",
    [OSError("no space left"), ValueError("bad id\nlong"), HTTPError("timed out")],
)
def test_other_trouble_with_the_hub_is_passed_on(monkeypatch, error):
    def fetch(*args, **kwargs):
        raise error

    monkeypatch.setattr(vlm.weights, "snapshot_download", fetch)
    reason = str(error).partition("\n")[0]
    with pytest.raises(FileNotFoundError, match=f"can't be fetched .*: {reason}$"):
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


@pytest.mark.parametrize("in_id", [True, False])
def test_a_hub_id_is_fetched_once_and_only_what_is_read(hub, model, monkeypatch, in_id):
    given = ("some/model@half",) if in_id else ("some/model",)
    revision = None if in_id else "half"
    loaded, _ = load_hf_model(*given, "cpu", revision=revision)
    assert_same_weights(loaded, model)
    assert any("/revision/half" in path for path in hub.asked)
    assert not any("/revision/main" in path for path in hub.asked)
    wanted = {name for name in hub.files if name.endswith(("json", "safetensors"))}
    assert hub.fetched == wanted - {"onnx/model.safetensors"}

    hub.fetched.clear()
    load_hf_model(*given, "cpu", revision=revision)
    assert not hub.fetched  # the cache had it all

    hub.asked.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_same_weights(load_hf_model(*given, "cpu", revision=revision)[0], model)
    # A commit names what is there too, without asking which branch it was.
    assert_same_weights(load_hf_model(f"some/model@{COMMIT}", "cpu")[0], model)
    assert not hub.asked


def test_another_architecture_on_the_hub_costs_kilobytes(hub):
    config = json.loads(hub.files["config.json"]) | {"model_type": "llama"}
    hub.files["config.json"] = json.dumps(config).encode()
    with pytest.raises(ValueError, match="not a PaliGemma's in .*llama"):
        load_hf_model("some/model", "cpu")
    assert hub.fetched and SINGLE_FILE not in hub.fetched


def test_a_part_of_a_repository_can_be_had_alone(hub):
    folder = find_checkpoint("some/model", only=("config.json", "mask_decoder.*"))
    assert hub.fetched == {"config.json"} == {path.name for path in folder.iterdir()}
    find_checkpoint("some/model", only=SMALL_FILES)
    assert SINGLE_FILE not in hub.fetched and "tokenizer.json" in hub.fetched


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gated/model", "gated/model is behind a license: accept it on http.*/gated/"),
        ("no/model", "the hub has no no/model, or it is private: look for it at http"),
        ("some/model@none", "some/model has no revision none: http.*/tree/main lists"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(hub, name, message):
    with pytest.raises(
        FileNotFoundError, match=f"no folder {name}, and {message}"
    ) as e:
        load_hf_model(name, "cpu")
    assert ("hf auth login" in str(e.value)) == ("revision" not in message)
    assert ("HF_TOKEN" in str(e.value)) == ("revision" not in message)


def test_a_token_that_may_not_read_gated_repositories(hub):
    said = r"the hub refuses refused/model \(403: Please enable access.*HF_TOKEN.*gated"
    with pytest.raises(FileNotFoundError, match=said):
        load_hf_model("refused/model", "cpu")


def test_a_hub_that_is_busy(hub):
    said = "the hub answered 429 for busy/model: try again later"
    with pytest.raises(FileNotFoundError, match=said):
        load_hf_model("busy/model", "cpu")


def test_an_index_that_does_not_fit_costs_kilobytes(hub, model, tokenizer, tmp_path):
    parts = tmp_path / "parts"
    save_hf_model(model, tokenizer, parts, max_shard_size="100KB")
    hub.files = {path.name: path.read_bytes() for path in parts.iterdir()}
    index = json.loads(hub.files[INDEX_FILE])
    index["weight_map"]["odd.weight"] = index["weight_map"].pop(EMBEDDING)
    hub.files[INDEX_FILE] = json.dumps(index).encode()
    message = f"unexpected odd.weight in {INDEX_FILE}; missing {EMBEDDING}"
    with pytest.raises(ValueError, match=message):
        load_hf_model("some/model", "cpu")
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "fetch the weights too, or choose a repository whose weights are safete"),
        (["pytorch_model.bin.index.json"], "only .bin files, which are pickles"),
    ],
)
def test_a_repository_without_safetensors(hub, more, message):
    del hub.files[SINGLE_FILE]
    hub.files |= dict.fromkeys(more, b"{}")
    with pytest.raises(FileNotFoundError, match=message):
        load_hf_model("some/model", "cpu")


def test_a_truncated_file_in_the_cache_can_be_mended(hub, model):
    load_hf_model("some/model", "cpu")
    place = find_checkpoint("some/model") / SINGLE_FILE
    os.truncate(place, 10_000)
    with pytest.raises(ValueError, match="delete .* and fetch it again") as raised:
        load_hf_model("some/model", "cpu")
    named = re.search("delete (.*) and fetch", str(raised.value))[1]
    Path(named).unlink()
    assert_same_weights(load_hf_model("some/model", "cpu")[0], model)


NOT_IN_CACHE = (
    "is not, or not whole, in the cache .*cache, and the hub can't be reached"
)


def test_offline_without_a_cache(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match=f"some/model {NOT_IN_CACHE}.*HF_HUB_OFF"
    ):
        load_hf_model("some/model", "cpu")
    assert not hub.asked


def test_offline_with_half_of_it_in_the_cache(hub, monkeypatch):
    find_checkpoint("some/model", only=SMALL_FILES)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"{NOT_IN_CACHE}.*incomplete"):
        load_hf_model("some/model", "cpu")


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    def fetch(*args, **kwargs):
        raise LocalEntryNotFoundError("Got: ConnectError: no route\nPlease check it.")

    monkeypatch.setattr(vlm.weights, "snapshot_download", fetch)
    with pytest.raises(FileNotFoundError, match=rf"{NOT_IN_CACHE}.*no route\)$"):
        load_hf_model("some/model", "cpu")


# --- Device, dtype and memory -------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there(checkpoint, device):
    with pytest.raises(ValueError, match=f"no device '{device}' here .*: use 'auto'"):
        load_hf_model(checkpoint, device)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64"])
def test_dtype(checkpoint, dtype):
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    model, _ = load_hf_model(checkpoint, "cpu", dtype)
    assert {p.dtype for p in model.parameters()} == {wanted} and model.dtype == wanted
    floats = {b.dtype for b in model.buffers() if b.is_floating_point()}
    assert floats <= {torch.float32}  # angles keep their precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_dtype_is_the_files(model, tokenizer, tmp_path, dtype):
    halved = copy_module.deepcopy(model).to(dtype)
    save_hf_model(halved, tokenizer, tmp_path)
    assert_same_weights(load_hf_model(tmp_path, "cpu")[0], halved)


def test_one_dtype_though_the_file_has_two(model, tokenizer, tmp_path):
    save_hf_model(copy_module.deepcopy(model).bfloat16(), tokenizer, tmp_path)
    rewrite(
        tmp_path, lambda t: {n: x.float() if "norm" in n else x for n, x in t.items()}
    )
    loaded, _ = load_hf_model(tmp_path, "cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "dtype", ["int8", "float31", "bf16", "float8_e4m3fn", torch.int32, "nn"]
)
def test_bad_dtype_is_refused_before_anything_is_fetched(dtype, monkeypatch):
    monkeypatch.setattr(vlm.weights, "snapshot_download", pytest.fail)
    with pytest.raises(ValueError, match="is not a type that the model computes in"):
        load_hf_model("some/model", "cpu", dtype)


def test_apples_gpus_have_bfloat16_since_macos_14_and_never_float64(monkeypatch):
    apple = torch.device("mps")
    for new, wanted in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(
            torch.backends.mps, "is_macos_or_newer", lambda *version, new=new: new
        )
        assert choose_dtype("auto", torch.bfloat16, apple) == wanted
    assert choose_dtype("auto", torch.float64, apple) == torch.float32
    assert choose_dtype("auto", torch.float16, apple) == torch.float16
    assert choose_dtype("auto", torch.bfloat16, torch.device("cpu")) == torch.bfloat16


def test_bfloat16_where_a_card_only_imitates_it(monkeypatch):
    card = torch.device("cuda")
    for native, wanted in ((True, torch.bfloat16), (False, torch.float16)):
        answer = {True: None, False: native}  # imitating it doesn't count
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, answer=answer: answer[including_emulation],
        )
        assert choose_dtype("auto", torch.bfloat16, card) == wanted
        assert choose_dtype("bfloat16", torch.bfloat16, card) == torch.bfloat16
        assert choose_dtype("16-bit", torch.float32, card) == wanted
        # PaliGemma 2's numbers outgrow float16.
        wide = torch.bfloat16 if native else torch.float32
        assert choose_dtype("auto", torch.bfloat16, card, "gemma2") == wide
        assert choose_dtype("16-bit", torch.float32, card, "gemma2") == wide
        assert choose_dtype("auto", torch.float32, card) == torch.float32


@pytest.mark.parametrize(
    ("cuda", "mps", "wanted"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_device(monkeypatch, cuda, mps, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device() == torch.device(wanted)
    assert choose_device("cpu") == choose_device(torch.device("cpu"))


def test_mapped_weights_can_be_trained_and_the_file_stays(copy):
    before = (copy / SINGLE_FILE).read_bytes()
    model, _ = load_hf_model(copy, "cpu")
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    inputs = random_inputs(model.config, (5, 1), (2, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = model(**inputs)["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
    assert (copy / SINGLE_FILE).read_bytes() == before


def mapped_ranges(file):
    """Where in this process's memory a file is mapped, from Linux's own list."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            start, _, end = line.split()[0].partition("-")
            yield int(start, 16), int(end, 16)


def test_an_empty_model_has_shapes_and_buffers_and_nothing_to_compute(model):
    code = (
        "import sys; from vlm.weights import PaliGemmaConfig, empty_model; "
        "model = empty_model(PaliGemmaConfig()); "
        "assert all(weight.is_meta for weight in model.parameters()); "
        "assert not any(buffer.is_meta for buffer in model.buffers()); "
        "assert 'torch._dynamo' not in sys.modules, 'the compiler was loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shapes = {
        name: t.shape for name, t in empty_model(model.config).state_dict().items()
    }
    assert shapes == {name: t.shape for name, t in model.state_dict().items()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_on_the_cpu_the_file_is_the_model(copy, monkeypatch):
    def no_memory(tensor, *args, **kwargs):
        assert tensor.is_meta, "random numbers were made, only to be overwritten"
        return tensor

    monkeypatch.setattr(torch.Tensor, "normal_", no_memory)
    model, _ = load_hf_model(copy, "cpu")
    ranges = list(mapped_ranges(copy / SINGLE_FILE))
    for name, weight in model.named_parameters():
        place = weight.data_ptr()
        assert any(start <= place < end for start, end in ranges), name
    halves, _ = load_hf_model(copy, "cpu", "bfloat16")
    place = next(halves.parameters()).data_ptr()
    assert not any(start <= place < end for start, end in ranges)


PEAK = """
import sys
from pathlib import Path
from vlm.weights import find_tensors, load_hf_model

def memory(field):
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 1024

tiny, folder, dtype = sys.argv[1:]
load_hf_model(tiny, "cpu", dtype)  # so that all libraries are there before we measure
before = memory("VmRSS")
model, _ = load_hf_model(folder, "cpu", dtype)
for weight in model.parameters():
    weight.sum().item()  # a mapped file takes memory when it is read
size = sum(file.stat().st_size for file in set(find_tensors(Path(folder)).values()))
print((memory("VmHWM") - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_conversion_takes_the_new_model_s_memory_and_no_copy_of_the_file(
    checkpoint, tokenizer, tmp_path
):
    text = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=24)
    model = PaliGemmaForConditionalGeneration(tiny_config(text=text))
    save_hf_model(model, tokenizer, tmp_path)
    command = [sys.executable, "-c", PEAK, checkpoint, tmp_path, "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Half of the file, the tensor that is being converted, and what loading needs.
    assert float(done.stdout) < 0.75


# --- Saving -------------------------------------------------------------------------


def test_a_save_that_breaks_off_leaves_the_old_one(copy, tokenizer, monkeypatch):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    torch.manual_seed(5)
    other = pair()[0]

    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)  # after the weights
    with pytest.raises(OSError, match="disk full"):
        save_hf_model(other, tokenizer, copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_saving_over_leaves_nothing_behind(shards, tokenizer):
    torch.manual_seed(5)
    other = pair()[0]
    save_hf_model(other, tokenizer, shards)  # one file where shards were
    assert [path.name for path in shards.glob("*.safetensors*")] == [SINGLE_FILE]
    assert_same_weights(load_hf_model(shards, "cpu")[0], other)
    save_hf_model(other, tokenizer, shards, max_shard_size="60KB")
    assert not (shards / SINGLE_FILE).exists()
    assert_same_weights(load_hf_model(shards, "cpu")[0], other)


def test_a_loaded_model_can_be_saved_where_it_came_from(copy, tokenizer):
    model, _ = load_hf_model(copy, "cpu")
    with torch.no_grad():
        model.language_model.model.norm.weight.add_(1)
    save_hf_model(model, tokenizer, copy)
    assert_same_weights(load_hf_model(copy, "cpu")[0], model)


def test_files_are_what_the_hub_has(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "preprocessor_config.json", "tokenizer.json"} <= names
    assert {SINGLE_FILE, "generation_config.json"} <= names
    assert TIED not in find_tensors(checkpoint)
    modes = {path.stat().st_mode for path in checkpoint.iterdir()}
    assert len(modes) == 1  # the weights may be read by whoever reads the config


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size", ["5GB", "40KB"])
@pytest.mark.parametrize("before", ["5GB", "40KB"])
def test_a_save_stopped_between_two_files_is_finished_by_the_next_load(
    model, tokenizer, tmp_path, monkeypatch, before, size
):
    """Whichever move is the last one: the new weights come, whole."""
    torch.manual_seed(5)
    wider = PaliGemmaForConditionalGeneration(tiny_config(text=dict(vocab_size=130)))
    save_hf_model(wider, tokenizer, tmp_path / "wanted", size)
    wanted, move = content(tmp_path / "wanted"), os.replace
    for allowed in range(len(wanted) + 1):
        folder, moves = tmp_path / str(allowed), iter(range(allowed + 1))

        def stop(*paths, moves=moves):
            if next(moves, None) is None:
                raise KeyboardInterrupt
            move(*paths)

        save_hf_model(model, tokenizer, folder, before)
        monkeypatch.setattr(os, "replace", stop)
        try:
            save_hf_model(wider, tokenizer, folder, size)
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(os, "replace", move)
        assert_same_weights(load_hf_model(folder, "cpu")[0], wider)
        assert content(folder) == wanted, allowed


# Files that belong to a model's mask tokens


def test_companions_are_known_by_their_names():
    from vlm.mask_tokens import DECODER_FILE, ENCODER_FILE
    from vlm.segmentation import GOOGLE_DECODER

    assert COMPANIONS == (DECODER_FILE, ENCODER_FILE, GOOGLE_DECODER)


@pytest.mark.parametrize("names", [COMPANIONS[:2], COMPANIONS[:1], COMPANIONS[2:]])
def test_what_reads_mask_tokens_comes_along(copy, tokenizer, tmp_path, names):
    for name in names:
        (copy / name).write_bytes(name.encode())
    model, _ = load_hf_model(copy, "cpu")
    assert model.name_or_path == str(copy.resolve())
    save_hf_model(model, tokenizer, tmp_path / "new")
    again, _ = load_hf_model(tmp_path / "new", "cpu")
    save_hf_model(again, tokenizer, tmp_path / "new")  # where it came from
    save_hf_model(again, tokenizer, tmp_path / "newer")
    for folder in ("new", "newer"):
        found = {n: x for n, x in content(tmp_path / folder).items() if n in COMPANIONS}
        assert found == {name: name.encode() for name in names}


def test_a_new_model_s_come_from_a_folder_that_is_named(model, tokenizer, tmp_path):
    save_hf_model(model, tokenizer, tmp_path / "new", companions_from=EMBEDDED)
    again, _ = load_hf_model(tmp_path / "new", "cpu")
    assert again.companions == list(COMPANIONS[:2])
    for name in COMPANIONS[:2]:
        assert (tmp_path / "new" / name).read_bytes() == (EMBEDDED / name).read_bytes()
    with pytest.raises(FileNotFoundError, match="mask_decoder"):
        save_hf_model(model, tokenizer, tmp_path / "no", companions_from=tmp_path)
    assert not (tmp_path / "no").exists()


def test_companions_that_are_gone_are_missed_before_anything_is_replaced(
    copy, checkpoint, tokenizer, tmp_path
):
    (copy / COMPANIONS[0]).write_bytes(b"decoder")
    model, _ = load_hf_model(copy, "cpu")
    (copy / COMPANIONS[0]).unlink()
    place = Path(shutil.copytree(checkpoint, tmp_path / "place"))
    before = content(place)
    for folder in (place, copy):
        with pytest.raises(FileNotFoundError, match="mask_decoder"):
            save_hf_model(model, tokenizer, folder)
    assert content(place) == before


def test_another_model_s_companions_are_not_taken_for_this_one_s(
    model, copy, tokenizer
):
    (copy / COMPANIONS[0]).write_bytes(b"decoder")
    before = content(copy)
    with pytest.raises(ValueError, match="mask_decoder"):
        save_hf_model(model, tokenizer, copy)
    assert content(copy) == before
    save_hf_model(model, tokenizer, copy, companions_from=copy)


def test_space_is_checked_before_anything_is_written(model, copy, monkeypatch):
    before = content(copy)
    usage = shutil.disk_usage(copy)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    monkeypatch.setattr(vlm.weights, "save_torch_state_dict", pytest.fail)
    with pytest.raises(OSError, match=r"needs .* GB, 0\.0001 GB free in") as raised:
        save_hf_model(model, None, copy)
    assert raised.value.errno == errno.ENOSPC and content(copy) == before
    require_space(copy / "not" / "there" / "yet", 100_000)
    with pytest.raises(OSError, match="GB free in"):
        require_space(copy / "not" / "there" / "yet", 100_001)
    assert content(copy) == before


# The model that VLM_MODEL names


def test_chosen_model_is_the_embedded_one_unless_another_is_named(monkeypatch):
    monkeypatch.delenv("VLM_MODEL", raising=False)
    model, tokenizer, about = load_chosen_model()
    assert EMBEDDED.name in about and "nothing else" in about
    assert str(model.dtype) in about and len(tokenizer) > 0


def test_the_weights_page_says_what_the_sizes_say():
    root = Path(__file__).resolve().parent.parent
    tool = root / "tools" / "what_fits.py"
    done = subprocess.run(
        [sys.executable, tool, "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_chosen_model_comes_from_a_folder_and_is_named(checkpoint, monkeypatch):
    monkeypatch.setenv("VLM_MODEL", str(checkpoint))
    loaded, _, about = load_chosen_model()
    assert about.startswith(f"{checkpoint}: ") and "sticker" not in about
    assert_same_weights(loaded.float().cpu(), load_hf_model(checkpoint, "cpu")[0])


@pytest.mark.parametrize("name", ["/no/such/folder", "someone/something@main"])
def test_a_chosen_model_that_cant_be_had_is_explained_and_replaced(
    name, monkeypatch, capsys
):
    monkeypatch.setenv("VLM_MODEL", name)
    _, _, about = load_chosen_model()
    said = capsys.readouterr().out
    assert f"VLM_MODEL={name} can't be used" in said
    assert "goes on with the embedded model" in said and EMBEDDED.name in about
    # What a hub id needs is said before anything is fetched.
    assert ("3 billion weights" in said.partition("can't be used")[0]) == (
        name == "someone/something@main"
    )
