"""Rows to fine-tune on: read, check, and split into training and validation.

Built in notebooks/25_finetuning.ipynb: edit it there, then run `make export`.
"""

import hashlib
import json
import os
import random
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .images import load_image
from .processing import PaliGemmaProcessor, check_tokens, locs_to_box, segs_to_codes

__all__ = ["Row", "read_splits", "check_lengths"]

_KEYS = ("image", "prefix", "suffix")
_OBJECT = re.compile(r"((?:<loc\d+>)*)((?:<seg\d+>)*)\s*(.*)", re.DOTALL)
_SPLITS = ("train", "valid", "test")  # annotation tools' names; "val…" is valid, too


@dataclass(frozen=True)
class Row:
    """An image, its prompt and answer, and where it stands: "labels.jsonl line 3"."""

    image: Path
    prefix: str
    suffix: str
    where: str = ""


def _check_objects(prefix: str, suffix: str) -> None:
    "Raise ValueError for an answer to `detect` or `segment` that can't be parsed."
    task = prefix.split()[0]
    parts = suffix.split(";") if task in ("detect", "segment") else ()
    for text in filter(None, map(str.strip, parts)):
        locs, segs, label = _OBJECT.fullmatch(text).groups()
        has_codes = task == "detect" and not segs or segs_to_codes(segs)
        is_named = label and "<loc" not in label and "<seg" not in label
        if not (locs_to_box(locs, 1, 1) and has_codes and is_named):
            raise ValueError(
                f"{text!r:.60} is not a valid object: four loc tokens y0 x0 y1 x1 that "
                "end past their start, sixteen seg tokens (detect: or none), a label, "
                "and ' ; ' between objects"
            )


def _parse_row(line: str, folder: Path, where: str) -> Row:
    "One line of JSON → its row; ValueError for what is wrong with it."
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"it must be an object: {{...}}, not {line.strip():.40}")
    if unknown := [key for key in values if key not in _KEYS]:
        raise ValueError(f"unknown key {unknown[0]!r}; there are {', '.join(_KEYS)}")
    for key in _KEYS:
        if key not in values:
            raise ValueError(f"{key!r} is missing")
        if not isinstance(values[key], str):
            raise ValueError(f"{key!r} must be text, not {values[key]!r:.40}")
        if key != "suffix" and not values[key].strip():
            raise ValueError(f"{key!r} is empty")
    for key in ("prefix", "suffix"):
        check_tokens(values[key])
    _check_objects(values["prefix"], values["suffix"])
    return Row(folder / values["image"], values["prefix"], values["suffix"], where)


def read_rows(labels: Path) -> list[Row]:
    """The rows of a .jsonl file; an image's path counts from the file's folder.

    Raises ValueError and OSError, of each image too, that name file and line.
    """
    rows, seen = [], set()
    try:
        lines = labels.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{labels} is not text in UTF-8: {error}") from None
    for number, line in enumerate(lines, start=1):
        where = f"{Path(*labels.parts[-2:])} line {number}"
        try:
            if line.strip():
                rows.append(_parse_row(line, labels.parent, where))
                if rows[-1].image not in seen:
                    load_image(rows[-1].image)
                seen.add(rows[-1].image)
        except (OSError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None
    if not rows:
        raise ValueError(f"{labels} holds no rows")
    return rows


def _find_splits(data: str | os.PathLike) -> dict[str, Path]:
    "The .jsonl files of a folder, or the one given: `train`, maybe `valid` and `test`."
    data = Path(data).expanduser()
    files = [data] if data.is_file() else sorted(data.glob("*.jsonl"))
    if len(files) == 1:
        return {"train": files[0]}
    in_names = len(files) > 1  # or else in those of their folders
    found: dict[str, Path] = {}
    files = files or sorted(data.glob("*/*.jsonl"))
    for file in files:
        name = (file.stem if in_names else file.parent.name).lower()
        words = re.split(r"[\W_]+", re.sub(r"val[a-z]*", "valid", name))
        split = next((split for split in _SPLITS if split in words), None)
        if split in found or in_names and split is None:
            names = ", ".join(str(file.relative_to(data)) for file in files)
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
    chosen = {hashes[row.image] for row in validation}
    chosen = chosen or {*random.Random(seed).sample(images, count)}
    training = [row for row in rows if hashes[row.image] not in chosen]
    if not training:
        raise ValueError(
            f"{len(rows)} rows about {len(images)} different images are too few: all "
            "are for validation, and none is left to train on"
        )
    return training, list(validation) or [r for r in rows if hashes[r.image] in chosen]


def read_splits(
    data: str | os.PathLike, validation: str, fraction: float, seed: int
) -> tuple[list[Row], list[Row], dict[str, str]]:
    """(training rows, validation rows, names and hashes of their files).

    `data`: a .jsonl file, or a folder with one or with one for each split, as tools for
    annotation write them. `validation`: a file of its own, or "". FileNotFoundError for
    nothing to train on, ValueError for files that can't be told apart.
    """
    files = _find_splits(data)
    if validation:
        files["valid"] = _find_splits(validation)["train"]
    unread = files.pop("test", None)
    rows = {split: read_rows(file) for split, file in files.items()}
    sides = train_validation_split(rows["train"], fraction, seed, rows.get("valid", ()))
    unused = sum(map(len, rows.values())) - sum(map(len, sides))
    if unused:
        warnings.warn(
            f"{unused} rows are about validation images: unused", stacklevel=2
        )
    if unread:
        warnings.warn(f"{unread} isn't read: keep it for the end", stacklevel=2)
    hashes = {s: f"{f.name}, SHA-256 {_file_hash(f)[:16]}…" for s, f in files.items()}
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
