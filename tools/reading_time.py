"""Count each chapter's reading time and write it into its card.

    python tools/reading_time.py            write the minutes into the cards
    python tools/reading_time.py --check    write nothing, fail if a card says otherwise

Prose is read at 200 words a minute, shown code at 30 lines a minute; code that is
folded or hidden costs nothing.
"""

import argparse
import json
import re
import sys
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
WORDS, LINES = 200, 30  # a minute
UNREAD = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
CARD = re.compile(r"(?<=\*\*Reading\*\* )\d+(?= minutes)")


def reading_time(cells: list[dict]) -> float:
    """Minutes for the cells of a notebook."""
    words = lines = 0
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += len(re.sub(r"[^\w\s]", " ", source).split())
        elif not UNREAD & {*cell["metadata"].get("tags", ())}:
            shown = (line for line in source.splitlines() if line.strip())
            lines += sum(not line.startswith("#|") for line in shown)
    return words / WORDS + lines / LINES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if one is wrong")
    options, status = parser.parse_args(), 0
    for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        text = path.read_text(encoding="utf-8")
        minutes = round(reading_time(json.loads(text)["cells"]))
        found = CARD.search(text)
        if found is None or found[0] != str(minutes):
            status = 1
            card = "none" if found is None else f"{found[0]} minutes"
            print(f"{path.name}: {minutes} minutes, the card says {card}")
            if not options.check:
                path.write_text(
                    CARD.sub(str(minutes), text, 1), encoding="utf-8", newline="\n"
                )
    return status if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
