"""Forget the book's cached pages when what they depend on has changed.

The book executes a notebook again only when the notebook's own code changes. Its output
depends on the package, the plot style, measured tables and the chosen model too, so a
different hash of those clears the cache of outputs. A change of the book's extension
only clears the parsed pages. Called by `make test` and `make book`.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
OUTPUTS_DEPEND_ON = (
    "vlm",
    "constraints.txt",
    "notebooks/matplotlibrc",
    "benchmarks/ablations.json",
    "benchmarks/ablations_two_phases.json",
    "benchmarks/auxiliary.json",
)
CHOICES = ("VLM_MODEL", "VLM_MASK_DECODER")  # variables: who answers on some pages
PAGES_DEPEND_ON = ("book/extension",)


def digest(names: Iterable[str]) -> str:
    """One hash over files, and over all files in folders."""
    total = hashlib.sha256()
    for path in (ROOT / name for name in names):
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in found:
            if file.is_file() and "__pycache__" not in file.parts:
                total.update(file.relative_to(ROOT).as_posix().encode() + b"\0")
                total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def has_changed(stamp: str, now: str) -> bool:
    """Compare with the last time, and write down what it is now."""
    path = BUILD / stamp
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(now, encoding="utf-8")
    return now != before


def main() -> None:
    BUILD.mkdir(exist_ok=True)
    chosen = [os.environ.get(variable, "") for variable in CHOICES]
    outputs = has_changed("outputs", " ".join([digest(OUTPUTS_DEPEND_ON), *chosen]))
    pages = has_changed("pages.sha256", digest(PAGES_DEPEND_ON))
    if outputs and (BUILD / ".jupyter_cache").exists():
        print("what pages show has changed: every notebook runs again")
        shutil.rmtree(BUILD / ".jupyter_cache")
    if outputs or pages:
        shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)


if __name__ == "__main__":
    main()
