"""Keep notebooks as plain source: no outputs, no counts, no stray metadata.

    python tools/clean_notebooks.py            clean them in place
    python tools/clean_notebooks.py --check    change nothing, fail if one isn't clean

Cell ids stay as they are, and so do the tags that the book reads. What cleaning can't
repair (a line over 88 characters, a cell over 90 lines) is reported and fails too.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"

MAX_LINE = 88
MAX_CELL = 90
KEPT_IN_CELL = {"tags", "mystnb", "nbmake", "jupyter"}
KEPT_IN_NOTEBOOK = {"mystnb", "execution"}
KERNEL = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}


def text(source: list[str] | str) -> str:
    return source if isinstance(source, str) else "".join(source)


def clean_cell(cell: dict, taken: set[str]) -> dict:
    """One cell with what is source in it, and nothing else. Adds its id to `taken`."""
    source = text(cell["source"]).strip("\n")
    identity = cell.get("id", "")
    while not identity or identity in taken:
        seed = f"{identity} {len(taken)} {source}"
        identity = hashlib.sha256(seed.encode()).hexdigest()[:8]
    taken.add(identity)
    metadata = cell.get("metadata", {})
    kept = {key: metadata[key] for key in KEPT_IN_CELL if metadata.get(key)}
    cleaned = {
        "cell_type": cell["cell_type"],
        "id": identity,
        "metadata": dict(sorted(kept.items())),
        "source": source.splitlines(keepends=True),
    }
    if cell["cell_type"] == "code":
        cleaned |= {"execution_count": None, "outputs": []}
    if cell.get("attachments"):  # pictures pasted into the text
        cleaned["attachments"] = cell["attachments"]
    return dict(sorted(cleaned.items()))


def clean(notebook: dict) -> dict:
    """The notebook as git should hold it, in format 4.5."""
    kept = {k: v for k, v in notebook["metadata"].items() if k in KEPT_IN_NOTEBOOK}
    taken: set[str] = set()
    return {
        "cells": [clean_cell(cell, taken) for cell in notebook["cells"]],
        "metadata": dict(sorted((KERNEL | kept).items())),
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def dump(notebook: dict) -> str:
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def limits(notebook: dict) -> list[str]:
    """What only an author can put right: lines and cells that are too long."""
    found = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        lines = text(cell["source"]).splitlines()
        if len(lines) > MAX_CELL:
            found.append(
                f"cell {cell['id']}: {len(lines)} lines, at most {MAX_CELL}: split it"
            )
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_LINE:
                found.append(
                    f"cell {cell['id']}, line {number}: {len(line)} characters, at "
                    f"most {MAX_LINE}: {line.strip()[:40]}…"
                )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of them")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1")
    options = parser.parse_args()
    failed = False
    for path in options.notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
        found = path.read_text(encoding="utf-8")
        try:
            notebook = clean(json.loads(found))
        except (ValueError, KeyError, TypeError) as error:
            print(f"{path.name} isn't a notebook I can read: {error}", file=sys.stderr)
            failed = True
            continue
        wanted = dump(notebook)
        if found != wanted and options.check:
            print(
                f"{path.name} isn't clean (outputs, counts or metadata): run "
                "`make clean-notebooks`",
                file=sys.stderr,
            )
            failed = True
        elif found != wanted:
            path.write_text(wanted, encoding="utf-8", newline="\n")
            print(f"cleaned {path.name}")
        for problem in limits(notebook):
            print(f"{path.name}, {problem}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
