"""Forget the book's cached outputs when what the notebooks import has changed.

The book executes a notebook again only when the notebook's own code changes. Its output
depends on the package and the plot style too, so a different hash of those clears the
cache. Called by `make book`.
"""

import hashlib
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
STAMP = BUILD / "vlm.sha256"


def digest() -> str:
    """One hash over every file that a notebook's output may depend on."""
    files = [p for p in (ROOT / "vlm").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    files += [ROOT / "constraints.txt", ROOT / "notebooks" / "matplotlibrc"]
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def main() -> None:
    now = digest()
    before = STAMP.read_text() if STAMP.exists() else ""
    cache = BUILD / ".jupyter_cache"
    if now != before and cache.exists():
        print("vlm/ has changed: every notebook runs again")
        shutil.rmtree(cache)
        # Sphinx would skip pages whose own source is as it was.
        shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)
    BUILD.mkdir(exist_ok=True)
    STAMP.write_text(now)


if __name__ == "__main__":
    main()
