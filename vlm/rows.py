"""Rows to fine-tune on: read, check, and split into training and validation.

Built in notebooks/25_finetuning.ipynb: edit it there, then run `make export`.
"""

import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .detection import split_objects
from .processing import (
    PaliGemmaProcessor,
    check_tokens,
    load_image,
    locs_to_box,
    segs_to_codes,
)

__all__ = ["Row", "read_rows", "train_validation_split", "read_splits", "check_lengths"]

_KEYS = ("image", "prefix", "suffix")
_SPLITS = ("train", "valid", "test")  # as annotation tools name them; "val…" is valid


@dataclass(frozen=True)
class Row:
    """An image, its prompt and answer, and where it stands: "labels.jsonl line 3"."""

    image: Path
    prefix: str
    suffix: str
    where: str = ""


def _check_objects(prefix: str, suffix: str) -> None:
    """Raise ValueError for an answer to `detect` or `segment` that can't be parsed."""
    task = prefix.split()[0]
    for thing in split_objects(suffix) if task in ("detect", "segment") else ():
        has_codes = task == "detect" and not thing.segs or segs_to_codes(thing.segs)
        if not (locs_to_box(thing.locs, 1, 1) and has_codes and thing.is_named):
            text = f"{thing.locs}{thing.segs} {thing.label}".strip()
            raise ValueError(
                f"{text!r:.60} is not a valid object: four loc tokens y0 x0 y1 x1 that "
                "end past their start, sixteen seg tokens (detect: or none), a label, "
                "and ' ; ' between objects"
            )


def _parse_row(line: str, folder: Path, where: str = "") -> Row:
    """One line of JSON → its row; ValueError for what is wrong with it."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"it must be an object: {{...}}, not {line.strip():.40}")
    if unknown := [key for key in values if key not in _KEYS]:
        raise ValueError(f"unknown key {unknown[0]!r}; there are {', '.join(_KEYS)}")
    for key in _KEYS:
        if not isinstance(values.get(key), str):
            value = values.get(key, "missing")
            raise ValueError(f"{key!r} must be text, and is {value!r:.40}")
        if key != "suffix" and not values[key].strip():
            raise ValueError(f"{key!r} is empty")
    row = Row(folder / values["image"], values["prefix"], values["suffix"], where)
    check_tokens(row.prefix)
    check_tokens(row.suffix)
    _check_objects(row.prefix, row.suffix)
    return row


def read_rows(labels: Path) -> list[Row]:
    """The rows of a .jsonl file, each image opened once; paths from its folder.

    Raises ValueError and OSError that name file and line.
    """
    try:
        lines = labels.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{labels} is not text in UTF-8: {error}") from None
    rows, seen = [], set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{Path(*labels.parts[-2:])} line {number}"
        try:
            rows.append(_parse_row(line, labels.parent, where))
            if rows[-1].image not in seen:
                load_image(rows[-1].image)
        except (OSError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None
        seen.add(rows[-1].image)
    if not rows:
        raise ValueError(f"{labels} holds no rows")
    return rows


def _find_splits(data: str | os.PathLike) -> dict[str, Path]:
    """The .jsonl files of `data`: "train", maybe "valid" and "test".

    A file, or a folder with one, is "train". An annotation tool's export has several,
    with the split in their names or in those of the subfolders that hold one each.
    Raises FileNotFoundError for none to train on, ValueError for one too many.
    """
    data = Path(data).expanduser()
    direct = [data] if data.is_file() else sorted(data.glob("*.jsonl"))
    if len(direct) == 1:
        return {"train": direct[0]}
    found: dict[str, Path] = {}
    for file in direct or sorted(data.glob("*/*.jsonl")):
        name = (file.stem if direct else file.parent.name).lower()
        words = re.sub(r"\bval(idation)?\b", "valid", name.replace("_", " "))
        split = next((s for s in _SPLITS if s in re.findall(r"\w+", words)), "")
        if split in found or direct and not split:
            names = ", ".join(str(f.relative_to(data)) for f in (*found.values(), file))
            raise ValueError(f"{data} holds {names}: give the one to use as --data")
        if split:
            found[split] = file
    if "train" not in found:
        raise FileNotFoundError(
            f"no .jsonl file in {data} or {data / 'train'}: write one, with a line for "
            'each example, like {"image": "a.png", "prefix": "caption en", "suffix": '
            '"an owl"}'
        )
    return found


def _file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def train_validation_split(
    rows: Sequence[Row], fraction: float, seed: int, validation: Sequence[Row] = ()
) -> tuple[list[Row], list[Row]]:
    """(training rows, validation rows): `fraction` of the images, chosen by `seed`.

    All rows of an image stay on one side, those of a copy under another name too. Given
    rows for `validation`, training loses those about their images. ValueError where
    nothing is left to train on.
    """
    hashes = {row.image: _file_hash(row.image) for row in [*rows, *validation]}
    images = sorted({hashes[row.image] for row in rows})
    count = min(max(1, round(fraction * len(images))), len(images))
    apart = {hashes[row.image] for row in validation}
    apart = apart or {*random.Random(seed).sample(images, count)}
    training = [row for row in rows if hashes[row.image] not in apart]
    if not training:
        raise ValueError(
            f"{len(rows)} rows about {len(images)} different images are too few: all "
            "are for validation, and none is left to train on"
        )
    return training, list(validation) or [r for r in rows if hashes[r.image] in apart]


def read_splits(
    data: str | os.PathLike, validation: str, fraction: float, seed: int
) -> tuple[list[Row], list[Row], dict[str, str]]:
    """(training rows, validation rows, their files' names and hashes) of a folder.

    `validation`: a file or folder of its own for it; "" takes the data's, or else
    `fraction` of the images. Says which rows and files aren't used.
    """
    files = _find_splits(data)
    if validation:
        files["valid"] = _find_splits(validation)["train"]
    test = files.pop("test", None)
    rows = {split: read_rows(file) for split, file in files.items()}
    sides = train_validation_split(rows["train"], fraction, seed, rows.get("valid", ()))
    unused = sum(map(len, rows.values())) - sum(map(len, sides))
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        if unused:
            print(f"{unused} rows are about validation images: unused", file=sys.stderr)
        if test:
            print(f"{test} isn't read: keep it for the end", file=sys.stderr)
    hashes = {s: f"{f.name}, SHA-256 {_file_hash(f)}" for s, f in files.items()}
    return *sides, hashes


def check_lengths(
    rows: Sequence[Row], processor: PaliGemmaProcessor, positions: int
) -> None:
    """Raise ValueError for the first row that needs more than `positions` tokens."""
    for row in rows:
        ids = processor.encode_prefix(row.prefix) + processor.encode_suffix(row.suffix)
        if len(ids) > positions:
            raise ValueError(
                f"{row.where}: {len(ids)} tokens, {processor.num_image_tokens} of them "
                f"the image's, but the model has {positions} positions: shorten it"
            )
