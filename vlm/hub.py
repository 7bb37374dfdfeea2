"""Checkpoint folders: find one, here or on the hub, and the tensors in its files.

Built in notebooks/16_weights.ipynb: edit it there, then run `make export`.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files as package_files
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor

# Other layouts' names → ours, which are those of the hub's files.
RENAMES = (
    (r"\b(_orig_mod|module)\.", ""),  # the wrappers of torch.compile, data parallel
    (r"^model\.", ""),  # transformers 5 in memory
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
EMBEDDING = "language_model.model.embed_tokens.weight"
TIED = "language_model.lm_head.weight"  # the embedding again; files may leave it out


def canonical_name(name: str) -> str:
    """A tensor's name in any of the three layouts → its name in our model."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


EMBEDDED = Path(str(package_files("vlm"))) / "checkpoints" / "paligemma-stickers"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
SMALL_FILES = ("*.json", "tokenizer.model")  # config, tokenizer, index: quick to fetch
# The mask tokens' files, which lie beside the weights: chapter 19's, and Google's.
COMPANIONS = ("mask_decoder.safetensors", "mask_encoder.safetensors", "vae-oid.npz")
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
ALL_FILES = (*SMALL_FILES, "*.safetensors", "vae-oid.npz")
EXAMPLE = "give a checkpoint's folder, or a hub id like google/paligemma-3b-mix-224"


def parse_hub_id(model_path: str | os.PathLike) -> tuple[str, str | None] | None:
    """(owner/name, revision or None) of a hub id or its page; None of others."""
    name, page = r"(\w[\w.-]*/[\w.-]+)", r"https?://(?:huggingface\.co|hf\.co)/"
    found = re.fullmatch(
        rf"{name}(?:@(\S+)|/)?|{page}{name}(?:/(?:tree|blob|resolve)/([^/\s]+)\S*|/)?",
        model_path.as_posix() if isinstance(model_path, Path) else str(model_path),
    )
    if found is None or Path(model_path).exists():
        return None
    return found[1] or found[3], found[2] or found[4]


def finish_save(folder: Path, staged: Path | None = None) -> None:
    """Move a complete save, `staged`, into place, its single file or index last.

    After an interruption the next load or save goes on. What is left of the former
    weights is deleted just before that last move.
    """
    waiting = folder / ".complete-save"  # all is written, but not yet in place
    if staged is not None:
        os.replace(staged, waiting)
    shards = {stored.file.name for stored in read_index(waiting)}
    last = INDEX_FILE if shards else SINGLE_FILE
    for file in sorted(waiting.glob("*"), key=lambda file: file.name == last):
        if file.name == last:
            former = {SINGLE_FILE, INDEX_FILE, *(f.name for f in folder.glob(SHARDS))}
            for name in former - shards - {last}:
                (folder / name).unlink(missing_ok=True)
        with suppress(FileNotFoundError):  # another process moved it
            os.replace(file, folder / file.name)
    with suppress(OSError):
        waiting.rmdir()


def find_checkpoint(
    model_path: str | os.PathLike | None, only: Sequence[str] = ALL_FILES
) -> Path:
    """The folder of a checkpoint: None is the embedded one; a hub id is fetched.

    A hub id is `owner/name` or `owner/name@revision`: a branch, tag or commit. Its
    files that match `only` come into the hub's cache. Raises FileNotFoundError.
    """
    model_path = EMBEDDED if model_path is None else model_path
    folder = Path(os.path.expanduser(model_path))
    if folder.is_dir():
        finish_save(folder)
        for file in filter(Path.is_file, folder.glob("*.[jmns]*")):
            with file.open("rb") as opened:
                is_pointer = opened.read(40).startswith(b"version https://git-lfs")
            if is_pointer:
                raise FileNotFoundError(f"{file} is an LFS pointer: run `git lfs pull`")
        return folder
    if (hub_id := parse_hub_id(model_path)) is None:
        what = f"{folder} is a file" if folder.exists() else f"no folder {model_path}"
        raise FileNotFoundError(f"{what}: {EXAMPLE}")
    name, revision = hub_id
    files = {"allow_patterns": list(only), "ignore_patterns": ["*/*"]}
    try:
        return Path(snapshot_download(name, revision=revision, **files))
    except (OSError, ValueError, HTTPError) as error:
        why = shorten(str(error), 330, placeholder=" …")
        if isinstance(error, GatedRepoError):  # the library doesn't say where
            page = f"accept its license on {constants.ENDPOINT}/{name}"
            why = f"{page}, then run `hf auth login` or set HF_TOKEN ({why})"
        raise FileNotFoundError(f"no folder {model_path}; the hub: {why}") from error


def adapter_base(folder: Path) -> str | None:
    """The base model of a LoRA adapter's folder; None where it holds no adapter.

    Raises ValueError where it holds a model, too, or where the adapter names none.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        raise ValueError(f"{folder} holds a model and an adapter: keep only one there")
    try:
        values = json.loads(path.read_text("utf-8"))
        base, revision = values.get("base_model_name_or_path"), values.get("revision")
        base = Path(os.path.expanduser(base or EMBEDDED))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} names no base model: {error}") from error
    if base.name == EMBEDDED.name and not base.is_dir():  # another machine's
        base = EMBEDDED
    if base.resolve() == folder.resolve():
        raise ValueError(f"{path} names itself: an adapter needs another base model")
    name = base.as_posix()  # a hub id's slash, on Windows too
    return f"{name}@{revision}" if revision and not base.exists() else name


def require_space(folder: str | os.PathLike, num_bytes: int) -> None:
    """Raise OSError (ENOSPC) unless the disk of `folder` has so many bytes free."""
    folder = Path(os.path.expanduser(folder)).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        needs = f"needs {num_bytes / 1e9:.3g} GB, {free / 1e9:.3g} GB free in {folder}"
        raise OSError(errno.ENOSPC, needs)


def missing_file(name: str, folder: Path) -> FileNotFoundError:
    """The error for a file that a folder lacks; a trainer's has checkpoints inside."""
    advice = (
        "only safetensors in transformers' format are read, shards with their index; "
        f"no pickles (.bin), GGUF, JAX or Keras files: fetch it, or {EXAMPLE}"
    )
    if inner := [*folder.glob("*/*config.json")]:  # the last has the largest number
        last = max(inner, key=lambda file: [*map(int, re.findall(r"\d+", str(file)))])
        advice = f"its subfolders are checkpoints, give one like {last.parent}"
    return FileNotFoundError(f"no {name} in {folder}: {advice}")


class StoredTensor(NamedTuple):
    """A tensor's name in a file, and the tensor, mapped from there: nothing is read."""

    name: str
    file: Path
    tensor: Tensor | None = None  # where only an index is there, not the file itself


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file; ValueError where it's damaged."""
    try:
        with safe_open(file, "pt") as opened:
            return [StoredTensor(n, file, opened.get_tensor(n)) for n in opened.keys()]
    except (SafetensorError, OSError) as error:
        why = f"delete it and fetch it again ({error!r:.100})"
        raise ValueError(f"{file.resolve()} can't be read (cut off?): {why}") from error


def read_index(folder: Path) -> list[StoredTensor]:
    """The tensors that an index of shards names, where no single file is; else none.

    Their shapes are in the shards, so not here. Raises ValueError for a broken index.
    """
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() or not index.is_file():
        return []
    try:
        shards = json.loads(index.read_text("utf-8"))["weight_map"].items()
        return [StoredTensor(name, folder / Path(shard).name) for name, shard in shards]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"fetch it again ({error!r:.100})"
        raise ValueError(f"{index} is not an index of shards: {why}") from error


def find_tensors(folder: Path) -> list[StoredTensor]:
    """Every tensor in the safetensors files of `folder`: one, or those of an index.

    Raises FileNotFoundError where a file is missing, ValueError where one is damaged.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    shards = sorted({stored.file for stored in read_index(folder)})
    if not shards:
        raise missing_file(SINGLE_FILE, folder)
    if lost := [shard for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(f"{lost[0]}, named in the index, is missing: fetch it")
    return [stored for shard in shards for stored in read_header(shard)]
