"""Make the embedded model again and again, each time without one part of the recipe.

    python tools/ablate.py --seeds 0 1 --only packing -- --mixed_precision bf16

A row is a twentieth of the recipe's steps with one thing changed. Its numbers go to
benchmarks/ablations.json at once; a row that is there isn't made again, and one that
was interrupted goes on.
"""

import argparse
import itertools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

from vlm.captioning import exact_share, kinds_f1
from vlm.detection import Detection, average_precision, parse_detections
from vlm.pretraining import PretrainingConfig
from vlm.questions import count_question
from vlm.runs import STATE_FILE, run_folder
from vlm.sampling import generate_tokens
from vlm.scenes import VALIDATION_SEEDS, make_scene
from vlm.segmentation import load_mask_decoder, mean_iou, parse_segmentations
from vlm.weights import load_hf_model, make_processor

ROOT = Path(__file__).resolve().parent.parent
SHORT = "--steps 1200 --vision_steps 200 --evaluation_scenes 0"
ROWS = {
    "the recipe": "",
    "no auxiliary losses": "--auxiliary_weight 0 --vision_steps 0",
    "no auxiliary mask loss": "--mask_weight 0",
    "no vision phase": "--vision_steps 0",
    "random loc embeddings": "--loc_init random",
    "random position embeddings": "--position_init random",
    "one question an image (no packing)": "--questions_per_image 1",
    "hard targets for seg tokens": "--seg_targets hard",
    "seg tokens weigh 1, as all do": "--seg_weight 1",
    "batches of 64": "--batch_size 64 --steps 300 --vision_steps 50",
    "two key/value heads": "--num_key_value_heads 2",
    "four key/value heads": "--num_key_value_heads 4",
}


def measure(folder: Path, num_scenes: int) -> dict[str, float]:
    """Validation numbers of a checkpoint: loss, captions, boxes, masks, counts."""
    model, tokenizer = load_hf_model(folder)
    decoder, processor = load_mask_decoder(folder), make_processor(model, tokenizer)
    scenes = [make_scene(seed) for seed in VALIDATION_SEEDS[:num_scenes]]
    captions, boxes, masks, counts = [], [], [], []
    answer = partial(generate_tokens, model, tokenizer, max_new_tokens=160)
    for scene in scenes:
        names, size = list(scene.counts), scene.image.size
        captions += [row.text for row in answer(processor("caption en", scene.image))]
        rows = answer(processor([f"detect {name}" for name in names], scene.image))
        boxes.append(sum((parse_detections(row, *size) for row in rows), []))
        rows = answer(processor([f"segment {name}" for name in names], scene.image))
        masks.append(sum((parse_segmentations(r, *size, decoder) for r in rows), []))
        asked = [count_question(scene, name) for name in names]
        rows = answer(processor([question.prompt for question in asked], scene.image))
        counts += [(row.text, q.answer) for row, q in zip(rows, asked)]
    truth = [[Detection(o.label, o.box) for o in scene.objects] for scene in scenes]
    last_line = (folder / "log.jsonl").read_text().splitlines()[-1]
    return {
        "validation loss": json.loads(last_line)["validation_loss"],
        "caption F1": kinds_f1(captions, scenes),
        "detection AP50": float(average_precision(boxes, truth)[0]),
        "mask IoU": mean_iou(masks, [scene.objects for scene in scenes]),
        "count accuracy": exact_share(*zip(*counts)),
    }


def read(table: Path) -> list[dict]:
    """The rows that are there."""
    return json.loads(table.read_text()) if table.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0])
    add("--only", default="", metavar="WORD", help="in a row's name")
    add("--scenes", type=int, default=150, help="validation scenes to measure on")
    add("--runs", type=Path, default=ROOT / "runs" / "ablations")
    add("--table", type=Path, default=ROOT / "benchmarks" / "ablations.json")
    add("flags", nargs="*", help="after --: for every row")
    options = parser.parse_args()
    for seed, (number, row) in itertools.product(options.seeds, enumerate(ROWS)):
        is_done = any((e["row"], e["seed"]) == (row, seed) for e in read(options.table))
        if options.only not in row or is_done:
            continue
        flags = f"{SHORT} --seed {seed} {' '.join(options.flags)} {ROWS[row]}".split()
        command = ["-m", "vlm.pretraining", *flags]
        output = options.runs / f"{number}-{seed}"
        if not output.exists():
            more = ["--resume"] if (run_folder(output) / STATE_FILE).exists() else []
            more += ["--output", str(output)]
            subprocess.run([sys.executable, *command, *more], check=True)
        entry = {"row": row, "seed": seed, "command": " ".join(["python", *command])}
        given = {"--batch_size": PretrainingConfig.batch_size}
        given |= dict(zip(flags[::2], flags[1::2]))
        entry["pictures"] = int(given["--steps"]) * int(given["--batch_size"])
        entry |= measure(output, options.scenes)
        table = [*read(options.table), entry]  # others may have written meanwhile
        table.sort(key=lambda e: (list(ROWS).index(e["row"]), e["seed"]))
        options.table.write_text(json.dumps(table, indent=1) + "\n")
        print(entry)


if __name__ == "__main__":
    main()
