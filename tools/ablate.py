"""Make the embedded model again and again, each time without one part of the recipe.

    python tools/ablate.py                            every row, seed 0
    python tools/ablate.py --only vision --seeds 0 1  rows whose name has this word
    python tools/ablate.py -- --mixed_precision bf16  with more flags of vlm.pretraining

A row is `python -m vlm.pretraining` with a twentieth of the recipe's steps and one
thing changed. Its numbers go to benchmarks/ablations.json as soon as it is done; a row
that is there is not made again, and one that was interrupted goes on.
"""

import argparse
import itertools
import json
import subprocess
import sys
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
TABLE = ROOT / "benchmarks" / "ablations.json"
SHORT = "--steps 900 --vision_steps 100 --evaluation_scenes 0"
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
    "two key/value heads": "--num_key_value_heads 2",
    "four key/value heads": "--num_key_value_heads 4",
}


def measure(folder: Path, num_scenes: int) -> dict[str, float]:
    """Validation numbers of a checkpoint: loss, captions, boxes, masks, counts."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    model, tokenizer = load_hf_model(folder)
    decoder, processor = load_mask_decoder(folder), make_processor(model, tokenizer)
    scenes = [make_scene(seed) for seed in VALIDATION_SEEDS[:num_scenes]]
    captions, boxes, masks, counts = [], [], [], []
    for scene in scenes:
        size, names = scene.image.size, list(scene.counts)
        counting = [count_question(scene, name) for name in names]
        prompts = ["caption en", *(f"detect {name}" for name in names)]
        prompts += [f"segment {name}" for name in names] + [q.prompt for q in counting]
        inputs = processor(prompts, [scene.image])
        rows = generate_tokens(model, tokenizer, inputs, max_new_tokens=160)
        n, (caption, *rows) = len(names), rows
        captions.append(caption.text)
        boxes.append([b for row in rows[:n] for b in parse_detections(row, *size)])
        found = (parse_segmentations(row, *size, decoder) for row in rows[n : 2 * n])
        masks.append([mask for row in found for mask in row])
        counts += zip([r.text for r in rows[2 * n :]], [q.answer for q in counting])
    things = [scene.objects for scene in scenes]
    truth = [[Detection(one.kind, one.box) for one in each] for each in things]
    return {
        "validation loss": json.loads(lines[-1])["validation_loss"],
        "caption F1": kinds_f1(captions, scenes),
        "detection AP50": float(average_precision(boxes, truth)[0]),
        "mask IoU": mean_iou(masks, things),
        "count accuracy": exact_share(*zip(*counts)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="", metavar="WORD", help="in a row's name")
    parser.add_argument("--scenes", type=int, default=150, help="to measure on")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablations")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("flags", nargs="*", help="after --: for every row")
    options = parser.parse_args()
    table = json.loads(options.table.read_text()) if options.table.exists() else []
    done = {(entry["row"], entry["seed"]) for entry in table}
    for seed, (number, row) in itertools.product(options.seeds, enumerate(ROWS)):
        if options.only not in row or (row, seed) in done:
            continue
        flags = [*SHORT.split(), "--seed", str(seed), *options.flags]
        flags += ROWS[row].split()  # last, so that it wins
        command = ["-m", "vlm.pretraining", *flags]
        output = options.runs / f"{number}-{seed}"
        if not output.exists():
            begun = (run_folder(output) / STATE_FILE).exists()
            more = ["--output", str(output), *["--resume"] * begun]
            subprocess.run([sys.executable, *command, *more], check=True)
        given = dict(zip(flags[::2], flags[1::2]))
        batch_size = int(given.get("--batch_size", PretrainingConfig.batch_size))
        entry = {"row": row, "seed": seed, "command": " ".join(["python", *command])}
        entry |= {"pictures": int(given["--steps"]) * batch_size}
        table.append(entry | measure(output, options.scenes))
        options.table.write_text(json.dumps(table, indent=1) + "\n")
        print(table[-1])


if __name__ == "__main__":
    main()
