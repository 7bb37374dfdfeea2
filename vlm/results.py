"""Results: an evaluation's numbers as a table, in JSON and in the model card.

Built in notebooks/28_metrics.ipynb: edit it there, then run `make export`.
"""

import json
import re
from pathlib import Path

_START, _END = "<!-- numbers -->", "<!-- /numbers -->"  # in a model card


def table(numbers: dict[str, dict[str, float]]) -> str:
    """The numbers as a Markdown table; a dash where a column has no such row."""
    lines = [f"| | {' | '.join(numbers)} |", f"|---|{'---|' * len(numbers)}"]
    for name in dict.fromkeys(name for rows in numbers.values() for name in rows):
        values = [rows.get(name, "–") for rows in numbers.values()]
        cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in values)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_results(folder: str | Path, numbers: dict[str, dict[str, float]]) -> None:
    """Write evaluation.json, and the table between two markers in the model card.

    A card without them gets them at its end; where there is none, one is begun.
    """
    folder = Path(folder).resolve()
    text = json.dumps(numbers, indent=2) + "\n"
    (folder / "evaluation.json").write_text(text, encoding="utf-8")
    card = folder / "README.md"
    old = card.read_text(encoding="utf-8") if card.is_file() else f"# {folder.name}\n"
    block = f"{_START}\n{table(numbers)}\n{_END}"
    new, found = re.subn(f"{_START}.*?{_END}", lambda _: block, old, flags=re.DOTALL)
    if not found:
        new = f"{old.rstrip()}\n\n## Evaluation\n\n{block}\n"
    card.write_text(new, encoding="utf-8")
