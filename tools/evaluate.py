"""Judge a checkpoint on the 500 validation scenes: a table, and JSON for the chapters.

    python tools/evaluate.py [--model_path FOLDER] [--write]

With --write the numbers go into the checkpoint's folder: `evaluation.json`, and the
table of its model card.

Captions: F1 of the kinds named (over all scenes together), and the share that is right
to the letter. Detection, by two protocols: "present kinds asked" asks for each kind
that is in the scene and for two that aren't, so the prompts hold most of the truth;
"every kind asked" asks for all hundred kinds in every scene, as COCO does. Average
precision by pycocotools, objects ranked by their score; a false alarm is a box whose
label names nothing that is in the scene. Segmentation: every kind in a scene is asked
for, and one that isn't there; mean IoU of the visible part over all true things (the
mean over instances), 0 for a missed one. Answers: the share that is right to the
letter. Nothing here is trained on. For comparison, the same marks for one who never
looks and always gives a task's most common answer.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from vlm import (
    MaskDecoder,
    PaliGemmaProcessor,
    load_hf_model,
    parse_detections,
    parse_segmentations,
)
from vlm.captioning import exact_share, kinds_f1
from vlm.detection import Detection
from vlm.processing import Box
from vlm.sampling import Generation, generate_tokens
from vlm.scenes import (
    VALIDATION_SEEDS,
    VALIDATION_STYLE,
    Question,
    Scene,
    absent_kind,
    all_kinds,
    caption_question,
    count_question,
    detect_question,
    make_scene,
    presence_question,
    relation_questions,
)
from vlm.segmentation import Segmentation, load_mask_decoder, mean_iou
from vlm.weights import find_checkpoint, make_processor

ABSENT_PER_SCENE = 2
ROWS = 50  # prompts about one picture that are answered together
LONGEST_ANSWER = 160  # tokens: seven things with their masks
START, END = "<!-- numbers -->", "<!-- /numbers -->"


def exam(scene: Scene, seed: int) -> list[Question]:
    """The questions that a scene is judged by; the same every time."""
    rng = random.Random(seed)
    present = list(scene.counts)
    absent = [absent_kind(scene, rng) for _ in range(ABSENT_PER_SCENE)]
    relations = relation_questions(scene)
    rng.shuffle(relations)
    something = [q for q in relations if q.answer != "nothing"]
    nothing = [q for q in relations if q.answer == "nothing"]
    return [
        caption_question(scene),
        *(detect_question(scene, [kind]) for kind in [*present, *absent]),
        # Masks are judged by their pixels: no answer to compare them with is needed.
        *(Question("segment", f"segment {k}", "") for k in [*present, absent[0]]),
        *(count_question(scene, kind) for kind in [*present, absent[0]]),
        *(presence_question(scene, kind) for kind in [rng.choice(present), absent[0]]),
        *something[:2],
        *nothing[:1],
    ]


def ask(
    model, processor: PaliGemmaProcessor, scene: Scene, prompts: list[str]
) -> list[Generation]:
    """What the model answers to prompts about one picture, which it encodes once."""
    return generate_tokens(
        model,
        processor.tokenizer,
        processor(prompts, [scene.image]),
        max_new_tokens=LONGEST_ANSWER,
    )


def answer_all(
    model, processor: PaliGemmaProcessor, scenes: Sequence[Scene], seeds: Sequence[int]
) -> Iterator[tuple[int, Question, Generation]]:
    """(index of the scene, question, what the model wrote) for all questions."""
    for index, (scene, seed) in enumerate(zip(tqdm(scenes), seeds, strict=True)):
        questions = exam(scene, seed)
        rows = ask(model, processor, scene, [q.prompt for q in questions])
        for question, row in zip(questions, rows, strict=True):
            yield index, question, row


def detect_every_kind(
    model, processor: PaliGemmaProcessor, scenes: Sequence[Scene]
) -> list[list[Detection]]:
    """What the model finds in each scene when it is asked for all hundred kinds."""
    found: list[list[Detection]] = [[] for _ in scenes]
    prompts = [f"detect {kind}" for kind in all_kinds()]
    for scene, things in zip(tqdm(scenes), found, strict=True):
        for start in range(0, len(prompts), ROWS):
            part = prompts[start : start + ROWS]
            for row in ask(model, processor, scene, part):
                things += parse_detections(row, *scene.image.size)
    return found


def as_coco(index: int, kind: str, box: Box, **more: float) -> dict:
    """A true or found box as pycocotools wants it: [x, y, width, height]."""
    x0, y0, x1, y1 = box
    width, height = x1 - x0, y1 - y0
    return {
        "image_id": index,
        "category_id": list(all_kinds()).index(kind) + 1,
        "bbox": [x0, y0, width, height],
        "area": width * height,
        **more,
    }


def average_precision(
    scenes: Sequence[Scene], found: Sequence[Sequence[Detection]], side: int
) -> tuple[float, float]:
    """(AP50, AP50:95) by pycocotools; `found`: each scene's boxes, in pixels."""
    results = [
        as_coco(index, thing.label, thing.box, score=thing.score)
        for index, things in enumerate(found)
        for thing in things
        if thing.label in all_kinds()
    ]
    things = [(i, thing) for i, scene in enumerate(scenes) for thing in scene.objects]
    annotations = [
        as_coco(index, thing.kind, thing.box, id=number, iscrowd=0)
        for number, (index, thing) in enumerate(things, start=1)
    ]
    if not results:
        return 0.0, 0.0
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [
            {"id": i, "width": side, "height": side} for i in range(len(scenes))
        ],
        "annotations": annotations,
        "categories": [
            {"id": i, "name": name} for i, name in enumerate(all_kinds(), start=1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[1]), float(judge.stats[0])


def blind_answers(
    scenes: Sequence[Scene], seeds: Sequence[int]
) -> Iterator[tuple[int, Question, Generation]]:
    """As `answer_all`, by one who never looks: a task's most common answer, always."""
    exams = [exam(scene, seed) for scene, seed in zip(scenes, seeds, strict=True)]
    common: dict[str, Counter] = {}
    for question in (q for questions in exams for q in questions):
        common.setdefault(question.task, Counter())[question.answer] += 1
    for index, questions in enumerate(exams):
        for question in questions:
            ((answer, _),) = common[question.task].most_common(1)
            yield index, question, Generation([0], [1.0], [answer])


def false_alarms(
    scenes: Sequence[Scene], found: Sequence[Sequence[Detection]]
) -> float:
    """Boxes a scene whose label names nothing that is in it."""
    pairs = zip(scenes, found, strict=True)
    wrong = sum(d.label not in scene.counts for scene, things in pairs for d in things)
    return wrong / len(scenes)


def score(
    scenes: Sequence[Scene],
    side: int,
    answers: Iterable[tuple[int, Question, Generation]],
    every_kind: Sequence[Sequence[Detection]],
    decoder: MaskDecoder,
) -> dict[str, float]:
    """All the numbers for (index of the scene, question, answer); boxes in pixels.

    `every_kind`: what was found in each scene when all kinds were asked for.
    """
    said: dict[str, list[tuple[str, str]]] = {}  # task → (answer, truth) pairs
    captions: dict[int, str] = {}
    boxes: list[list[Detection]] = [[] for _ in scenes]
    masks: list[list[Segmentation]] = [[] for _ in scenes]
    nothing: dict[str, list[bool]] = {"detect": [], "segment": []}  # asked for absent
    invalid = Counter()
    for index, question, row in answers:
        task = question.task
        if task in nothing:
            if task == "detect":
                found = parse_detections(row, side, side)
                boxes[index] += found
            else:
                found = parse_segmentations(row, side, side, decoder)
                masks[index] += found
            invalid[task] += found.invalid
            if question.prompt.removeprefix(f"{task} ") not in scenes[index].counts:
                nothing[task].append(not found)
            continue
        said.setdefault(task, []).append((row.text, question.answer))
        if task == "caption":
            captions[index] = row.text
    ap50, ap = average_precision(scenes, boxes, side)
    honest_ap50, honest_ap = average_precision(scenes, every_kind, side)
    right = {task: exact_share(*zip(*pairs)) for task, pairs in said.items()}
    short = [p for task in ("count", "relation", "presence") for p in said[task]]
    return {
        "scenes": len(scenes),
        "caption: kinds F1": kinds_f1(
            [captions[i] for i in range(len(scenes))], scenes
        ),
        "caption: right to the letter": right["caption"],
        "detect, present kinds asked: AP50": ap50,
        "detect, present kinds asked: AP50:95": ap,
        "detect, every kind asked: AP50": honest_ap50,
        "detect, every kind asked: AP50:95": honest_ap,
        "detect, every kind asked: false alarms a picture": false_alarms(
            scenes, every_kind
        ),
        "detect absent: nothing": sum(nothing["detect"]) / len(nothing["detect"]),
        "detect: invalid objects": invalid["detect"],
        "segment: mean IoU": mean_iou(masks, [scene.objects for scene in scenes]),
        "segment absent: nothing": sum(nothing["segment"]) / len(nothing["segment"]),
        "segment: invalid objects": invalid["segment"],
        "answers: right": exact_share(*zip(*short)),
        "answers: count": right["count"],
        "answers: relation": right["relation"],
        "answers: presence": right["presence"],
    }


def table(numbers: dict[str, dict[str, float]]) -> str:
    """The numbers as a Markdown table, one column a set of styles."""
    columns = list(numbers)
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name in numbers[columns[0]]:
        values = (numbers[column][name] for column in columns)
        cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in values)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def update_card(card: Path, text: str) -> None:
    """Put `text` between the two markers of a model card."""
    before, _, rest = card.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    card.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", help="default: the embedded checkpoint")
    parser.add_argument("--mask_decoder", help="default: the one beside the model")
    parser.add_argument("--write", action="store_true", help="keep the numbers there")
    parser.add_argument("--scenes", type=int, default=len(VALIDATION_SEEDS))
    arguments = parser.parse_args()
    model, tokenizer = load_hf_model(arguments.model_path)
    processor = make_processor(model, tokenizer)
    side = processor.image_size
    decoder = load_mask_decoder(arguments.model_path, arguments.mask_decoder)
    seeds = VALIDATION_SEEDS[: arguments.scenes]
    scenes = [make_scene(seed, side) for seed in seeds]
    others = [make_scene(seed, side, [VALIDATION_STYLE]) for seed in seeds]
    nothing = [[] for _ in scenes]  # most kinds are absent: the most common answer
    numbers = {
        name: score(
            drawn,
            side,
            answer_all(model, processor, drawn, seeds),
            detect_every_kind(model, processor, drawn),
            decoder,
        )
        for name, drawn in (
            ("styles trained on", scenes),
            ("a style never trained on", others),
        )
    }
    blind = blind_answers(scenes, seeds)
    numbers["without looking"] = score(scenes, side, blind, nothing, decoder)
    print(table(numbers))
    if arguments.write:
        folder = find_checkpoint(arguments.model_path)
        text = json.dumps(numbers, indent=2) + "\n"
        (folder / "evaluation.json").write_text(text, encoding="utf-8")
        update_card(folder / "README.md", table(numbers))


if __name__ == "__main__":
    main()
