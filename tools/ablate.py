"""Make the embedded model again and again, each time without one part of the recipe.

    python tools/ablate.py --seeds 0 1 --only packing -- --mixed_precision bf16

A row is a fortieth of the recipe's pictures with one thing changed. Its validation
losses go to benchmarks/ablations.json at once; a row that is there isn't made again,
and one that was interrupted goes on. Several of these may run side by side, each with
other rows.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

from vlm.runs import STATE_FILE, run_folder

ROOT = Path(__file__).resolve().parent.parent
SHORT = {"steps": 600, "evaluation_scenes": 0}
ROWS = {
    "the recipe": {},
    "AdamW for all parameters": {"optimizer": "adamw"},
    "AdamW, half the learning rate": {"optimizer": "adamw", "learning_rate": 1e-3},
    "AdamW, twice the learning rate": {"optimizer": "adamw", "learning_rate": 4e-3},
    "no auxiliary losses": {"auxiliary_weight": 0},
    "random loc embeddings": {"loc_init": "random"},
    "one question an image (no packing)": {"questions_per_image": 1},
    "hard targets for seg tokens": {"seg_targets": "hard"},
    "seg tokens weigh 1, as all do": {"seg_weight": 1},
    "two key/value heads": {"num_key_value_heads": 2},
    "four key/value heads": {"num_key_value_heads": 4},
    "batches of 64": {"batch_size": 64, "steps": 150},
}


def read(table: Path) -> list[dict]:
    """The rows that are there."""
    return json.loads(table.read_text()) if table.exists() else []


def make_row(row: str, seed: int, output: Path, more: list[str]) -> dict:
    """Make the model of a row in `output`, or finish it; returns the row's entry."""
    settings = {**SHORT, "seed": seed, **ROWS[row]}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = ["-m", "vlm.pretraining", *flags, *more]
    if not output.exists():
        resume = ["--resume"] if (run_folder(output) / STATE_FILE).exists() else []
        where = ["--output", str(output), *resume]
        subprocess.run([sys.executable, *command, *where], check=True)
    last_line = (output / "log.jsonl").read_text().splitlines()[-1]
    losses = json.loads(last_line)
    return {
        "row": row,
        "seed": seed,
        "command": " ".join(["python", *command]),
        "all tokens": losses["validation_loss"],
        "words": losses["validation_loss_words"],
        "loc tokens": losses["validation_loss_locs"],
        "seg tokens": losses["validation_loss_segs"],
        "mask IoU": losses["validation_mask_iou"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0])
    add("--only", default="", metavar="WORD", help="in a row's name")
    add("--runs", type=Path, default=ROOT / "runs" / "ablations")
    add("--table", type=Path, default=ROOT / "benchmarks" / "ablations.json")
    add("flags", nargs="*", help="after --: for every row")
    options = parser.parse_args()
    for seed, (number, row) in itertools.product(options.seeds, enumerate(ROWS)):
        is_done = any((e["row"], e["seed"]) == (row, seed) for e in read(options.table))
        if options.only not in row or is_done:
            continue
        entry = make_row(row, seed, options.runs / f"{number}-{seed}", options.flags)
        table = [*read(options.table), entry]  # others may have written meanwhile
        # A row that is no longer made comes last.
        table.sort(key=lambda e: ([*ROWS, e["row"]].index(e["row"]), e["seed"]))
        options.table.write_text(json.dumps(table, indent=1) + "\n")
        print(entry)


if __name__ == "__main__":
    main()
