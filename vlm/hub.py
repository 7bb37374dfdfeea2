"""Checkpoint folders: on this machine, on the Hugging Face hub, or embedded.

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

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HTTPError

__all__ = [
    "EMBEDDED", "SINGLE_FILE", "INDEX_FILE", "SHARDS", "SMALL_FILES", "COMPANIONS",
    "ADAPTER_CONFIG", "ADAPTER_FILE", "EXAMPLE", "parse_hub_id", "finish_save",
    "find_checkpoint", "adapter_base", "require_space",
]  # fmt: skip

EMBEDDED = Path(str(package_files("vlm"))) / "checkpoints" / "paligemma-stickers"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
SMALL_FILES = ("*.json", "tokenizer.model")  # config, tokenizer, index: quick to fetch
# The mask tokens' files, which lie beside the weights: chapter 19's, and Google's.
COMPANIONS = ("mask_decoder.safetensors", "mask_encoder.safetensors", "vae-oid.npz")
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
ALL_FILES = (*SMALL_FILES, "*.safetensors", "vae-oid.npz")
STAGED = ".complete-save"  # a save between "all written" and "all in place"
EXAMPLE = "give a checkpoint's folder, or a hub id like google/paligemma-3b-mix-224"


def parse_hub_id(model_path: str | os.PathLike) -> tuple[str, str | None] | None:
    """(owner/name, revision or None) of a hub id or its page; None of others."""
    name, page = r"(\w[\w.-]*/[\w.-]+)", r"https?://(?:huggingface\.co|hf\.co)/"
    found = re.fullmatch(
        rf"{name}(?:@(\S+)|/)?|{page}{name}(?:/(?:tree|blob|resolve)/([^/\s]+)\S*|/)?",
        str(model_path),
    )
    if found is None or Path(model_path).exists():
        return None
    return found[1] or found[3], found[2] or found[4]


def finish_save(folder: Path, staged: Path | None = None) -> None:
    """Move a complete save, `staged`, into place, its single file or index last.

    After an interruption the next load or save goes on. What is left of the former
    weights is deleted just before that last move.
    """
    waiting = folder / STAGED
    if staged is not None:
        os.replace(staged, waiting)
    if not waiting.is_dir():
        return
    last, weights = SINGLE_FILE, {SINGLE_FILE}
    if (waiting / INDEX_FILE).is_file():
        index = json.loads((waiting / INDEX_FILE).read_text("utf-8"))
        last, weights = INDEX_FILE, {INDEX_FILE, *index["weight_map"].values()}
    for file in sorted(waiting.iterdir(), key=lambda file: file.name == last):
        if file.name == last:
            former = {SINGLE_FILE, INDEX_FILE, *(f.name for f in folder.glob(SHARDS))}
            for name in former - weights:
                (folder / name).unlink(missing_ok=True)
        with suppress(FileNotFoundError):  # another process moved it
            os.replace(file, folder / file.name)
    with suppress(OSError):
        waiting.rmdir()


def find_checkpoint(
    model_path: str | os.PathLike | None,
    revision: str | None = None,
    only: Sequence[str] = ALL_FILES,
) -> Path:
    """The folder of a checkpoint: None is the embedded one; a hub id is fetched.

    A hub id is `owner/name` or `owner/name@revision`: a branch, tag or commit, which
    `revision` may name instead. Its files that match `only` come into the hub's cache.
    Raises FileNotFoundError for what can't be found, ValueError for a wrong revision.
    """
    model_path = EMBEDDED if model_path is None else model_path
    folder, hub_id = Path(model_path).expanduser(), parse_hub_id(model_path)
    if hub_id is None and revision is not None:
        raise ValueError(f"revision={revision!r} needs a hub id, not {model_path}")
    if folder.is_dir():
        finish_save(folder)
        for file in filter(Path.is_file, folder.glob("*.[jmns]*")):
            with file.open("rb") as opened:
                is_pointer = opened.read(40).startswith(b"version https://git-lfs")
            if is_pointer:
                raise FileNotFoundError(f"{file} is an LFS pointer: run `git lfs pull`")
        return folder
    if hub_id is None:
        what = f"{folder} is a file" if folder.exists() else f"no folder {model_path}"
        raise FileNotFoundError(f"{what}: {EXAMPLE}")
    name, in_id = hub_id
    if None not in (revision, in_id) and revision != in_id:
        raise ValueError(f"{model_path} and revision={revision!r} disagree: name one")
    files = {"allow_patterns": list(only), "ignore_patterns": ["*/*"]}
    try:
        return Path(snapshot_download(name, revision=revision or in_id, **files))
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
        base = Path(base or EMBEDDED).expanduser()
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} names no base model: {error}") from error
    if base.name == EMBEDDED.name and not base.is_dir():  # another machine's
        base = EMBEDDED
    if base.resolve() == folder.resolve():
        raise ValueError(f"{path} names itself: an adapter needs another base model")
    return f"{base}@{revision}" if revision and not base.exists() else str(base)


def require_space(folder: str | os.PathLike, num_bytes: int) -> None:
    """Raise OSError (ENOSPC) unless the disk of `folder` has so many bytes free."""
    folder = Path(folder).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        needs = f"needs {num_bytes / 1e9:.3g} GB, {free / 1e9:.3g} GB free in {folder}"
        raise OSError(errno.ENOSPC, needs)
