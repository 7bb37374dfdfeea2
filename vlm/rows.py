"""Rows to fine-tune on: read, check, and split into training and validation.

Built in notebooks/25_finetuning.ipynb: edit it there, then run `make export`.
"""

import hashlib
import json
import random
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .images import load_image
from .processing import check_tokens, locs_to_box

# Four loc tokens, maybe sixteen seg tokens, a label without either.
_OBJECT = re.compile(
    r"((?:<loc\d+>){4})((?:<seg\d+>){16})?\s*(?!.*<(?:loc|seg))\S.*", re.DOTALL
)


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
        found = _OBJECT.fullmatch(text)
        has_codes = found and (found[2] or task == "detect")
        if not has_codes or not locs_to_box(found[1], 1, 1):
            raise ValueError(
                f"{text!r:.60} is not a valid object: four loc tokens y0 x0 y1 x1, "
                "sixteen seg tokens (detect: or none), a label; ' ; ' between objects"
            )


def _make_row(line: str, folder: Path, where: str) -> Row:
    "A line of JSON → its row; ValueError for what is wrong with it."
    values = json.loads(line)
    if not isinstance(values, dict) or {*values} != {"image", "prefix", "suffix"}:
        wanted = '{"image": "a.png", "prefix": "caption en", "suffix": "an owl"}'
        raise ValueError(f"a row is an object like {wanted}, not {values!r:.200}")
    for key, text in values.items():
        if not isinstance(text, str) or key != "suffix" and not text.strip():
            raise ValueError(f"{key!r} can't be {text!r:.40}: give a text")
        check_tokens(text)
    _check_objects(values["prefix"], values["suffix"])
    return Row(folder / values["image"], values["prefix"], values["suffix"], where)


def read_rows(labels: Path) -> list[Row]:
    """The rows of a .jsonl file; an image's path counts from the file's folder.

    Raises ValueError, with file and line, for a row or an image that can't be read.
    """
    rows, readable, where = [], set(), str(labels)
    try:
        for number, line in enumerate(labels.read_text("utf-8-sig").split("\n"), 1):
            if line.strip():
                where = f"{Path(*labels.parts[-2:])} line {number}"
                rows.append(_make_row(line, labels.parent, where))
                if rows[-1].image not in readable:
                    load_image(rows[-1].image)
                    readable.add(rows[-1].image)
    except (OSError, ValueError) as error:
        what = "not valid JSON: " * isinstance(error, json.JSONDecodeError)
        raise ValueError(f"{where}: {what}{error}") from error
    if not rows:
        raise ValueError(f"{labels} holds no rows")
    return rows


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
    hashes = {i: _file_hash(i) for i in {row.image for row in [*rows, *validation]}}
    images = sorted({hashes[row.image] for row in rows})
    count = min(max(1, round(fraction * len(images))), len(images))
    chosen = {hashes[row.image] for row in validation}
    chosen = chosen or {*random.Random(seed).sample(images, count)}
    training = [row for row in rows if hashes[row.image] not in chosen]
    if not training:
        few = f"{len(images)} different images are too few"
        raise ValueError(f"{few}: all are for validation, none is left to train on")
    return training, list(validation) or [r for r in rows if hashes[r.image] in chosen]


def _find_splits(data: Path) -> dict[str, Path]:
    "The .jsonl files to read: `train`, and `val` if there is one."
    train, val = (
        [*data.glob(f"*{split}*.jsonl"), *data.glob(f"*{split}*/*.jsonl")]
        for split in ("train", "val")
    )
    val = [file for file in val if file not in train]  # trainval.jsonl
    if not train:  # one file for both
        train, val = [data] if data.is_file() else [*data.glob("*.jsonl")], []
    if len(train) != 1 or len(val) > 1:
        names = ", ".join(sorted(str(file.relative_to(data)) for file in train + val))
        wanted = "give one, or two with train and valid in their names or folders'"
        raise ValueError(f"{data} holds {names or 'no .jsonl file'}: {wanted}")
    return dict(zip(("train", "val"), train + val))


def read_splits(data: str, fraction: float, seed: int) -> tuple[list, list, dict]:
    """(training rows, validation rows, names and hashes of their files).

    `data`: a .jsonl file, or a folder with one or with one for each split, as tools for
    annotation write them. Raises ValueError for what can't be read or told apart.
    """
    files = _find_splits(Path(data))
    rows = {split: read_rows(file) for split, file in files.items()}
    sides = train_validation_split(rows["train"], fraction, seed, rows.get("val", ()))
    others = {*Path(data).glob("*.jsonl"), *Path(data).glob("*/*.jsonl")}
    for file in sorted(others.difference(files.values())):
        warnings.warn(f"{file} isn't read", stacklevel=2)
    if unused := sum(map(len, rows.values())) - sum(map(len, sides)):
        warnings.warn(f"{unused} rows about validation images: unused", stacklevel=2)
    hashes = {s: f"{f.name}, SHA-256 {_file_hash(f)[:16]}…" for s, f in files.items()}
    return *sides, hashes
