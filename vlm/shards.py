"""Names, shapes and dtypes in safetensors files: a single one, or indexed shards.

Built in notebooks/16_weights.ipynb: edit it there, then run `make export`.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from .hub import EXAMPLE, INDEX_FILE, SHARDS, SINGLE_FILE

__all__ = ["missing_file", "StoredTensor", "read_header", "read_index", "find_tensors"]


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
    """Where a tensor lies, and what the file's header, not an index, says of it."""

    file: Path
    shape: list[int] | None = None
    dtype: str | None = None


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by name; ValueError where it's damaged."""
    try:
        with safe_open(file, "pt") as opened:
            parts = [(name, opened.get_slice(name)) for name in opened.keys()]
            return {
                n: StoredTensor(file, p.get_shape(), p.get_dtype()) for n, p in parts
            }
    except (SafetensorError, OSError) as error:
        why = f"delete it and fetch it again ({error!r:.100})"
        raise ValueError(f"{file.resolve()} can't be read (cut off?): {why}") from error


def read_index(index: Path) -> dict[str, StoredTensor]:
    """The tensors that an index of shards names; ValueError where it isn't one."""
    try:
        shards = json.loads(index.read_text("utf-8"))["weight_map"]
        return {n: StoredTensor(index.parent / Path(s).name) for n, s in shards.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"fetch it again ({error!r:.100})"
        raise ValueError(f"{index} is not an index of shards: {why}") from error


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in the safetensors files of `folder`, by its name there.

    One file, or shards with an index. Raises FileNotFoundError where a file is missing,
    ValueError where one can't be read or the index and the shards disagree.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise missing_file(SINGLE_FILE, folder)
    promised = {(name, stored.file) for name, stored in read_index(index).items()}
    shards = {file for _, file in promised} | set(folder.glob(SHARDS))
    if lost := sorted(shard.name for shard in shards if not shard.is_file()):
        raise FileNotFoundError(f"{index} names {lost[0]}, which is missing: fetch it")
    found = [item for shard in sorted(shards) for item in read_header(shard).items()]
    if odd := {(name, stored.file) for name, stored in found} ^ promised:
        name, file = min(odd)
        which = f"{index} and {file.name} disagree about {name[:80]}"
        raise ValueError(f"{which}: fetch both again")
    return dict(found)
