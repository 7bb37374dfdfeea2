"""Evaluation on the validation or the test split: captions, boxes, masks, silence.

Built in notebooks/29_segmentation.ipynb: edit it there, then run `make export`.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mode
from typing import Any

from PIL import Image
from tqdm import tqdm

from .backgrounds import photo_crops
from .detection import parse_detections
from .hub import EMBEDDED
from .mask_tokens import MaskDecoder
from .metrics import average_precision, class_f1, exact_match, false_alarms, mean_iou
from .paligemma import PaliGemmaForConditionalGeneration
from .processing import PaliGemmaProcessor
from .questions import (
    EMPTY_CAPTION,
    Question,
    absent_class,
    make_question,
    relation_questions,
)
from .results import table, write_results
from .sampling import Generation, generate_tokens
from .scenes import (
    TEST_SEEDS,
    TEST_STYLE,
    VALIDATION_SEEDS,
    VALIDATION_STYLE,
    Scene,
    all_classes,
    make_scene,
    style_classes,
)
from .segmentation import load_mask_decoder, parse_segmentations
from .weights import load_hf_model, make_processor

# The seeds of a split's scenes, and its style, which training never draws.
SPLITS = {
    "validation": (VALIDATION_SEEDS, VALIDATION_STYLE),
    "test": (TEST_SEEDS, TEST_STYLE),
}
_NUM_EMPTY = 100  # images of each sort without a sticker: a fraction to about ± 0.05

# An image and questions about it → an answer each.
_Answerer = Callable[[Image.Image, Sequence[Question]], list[Generation]]


def _scene_questions(scene: Scene, seed: int, classes: Sequence[str]) -> list[Question]:
    """All that a scene is asked, about `classes` alone; the same every time."""
    rng = random.Random(seed)
    present, absent = list(scene.counts), []
    while len(absent) < 2:
        absent += [kind for kind in [absent_class(scene, rng)] if kind in classes]
    relations = relation_questions(scene)
    rng.shuffle(relations)
    return [
        make_question(scene, "caption"),
        # Boxes and masks are compared by their pixels: no right answer in words.
        *(Question("detect", f"detect {kind}", "") for kind in [*present, *absent]),
        *(Question("segment", f"segment {k}", "") for k in [*present, absent[0]]),
        *(make_question(scene, "count", kind) for kind in [*present, absent[0]]),
        make_question(scene, "presence", rng.choice(present)),
        make_question(scene, "presence", absent[0]),
        *[q for q in relations if q.answer != "nothing"][:2],
        *[q for q in relations if q.answer == "nothing"][:1],
        *(Question("detect every", f"detect {kind}", "") for kind in classes),
    ]


def _ask_model(
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    image: Image.Image,
    questions: Sequence[Question],
) -> list[Generation]:
    """A model's greedy answers, fifty at a time: it encodes the image once for each."""
    rows = []
    for start in range(0, len(questions), 50):
        inputs = processor([q.prompt for q in questions[start : start + 50]], [image])
        # 160 tokens: seven objects with their masks.
        rows += generate_tokens(model, processor.tokenizer, inputs, max_new_tokens=160)
    return rows


def _majority_baseline(questions: Sequence[Question]) -> _Answerer:
    """One that never looks: each task's most common right answer, always."""
    tasks = {question.task for question in questions}
    common = {t: mode(q.answer for q in questions if q.task == t) for t in tasks}
    return lambda _, asked: [Generation([0], [1.0], [common[q.task]]) for q in asked]


def _evaluate_scenes(
    answer: _Answerer,
    scenes: Sequence[Scene],
    seeds: Sequence[int],
    classes: Sequence[str],
    decoder: MaskDecoder,
) -> dict[str, float]:
    """The rows about scenes with stickers; none for a task that nobody asked about."""
    parse = {"detect": parse_detections, "detect every": parse_detections}
    parse["segment"] = partial(parse_segmentations, decoder=decoder)
    found = {task: [[] for _ in scenes] for task in parse}
    silent = {task: [] for task in parse}  # for absent classes: is nothing found?
    invalid = Counter()
    said = defaultdict(list)  # task → (answer, right answer)
    for index, (scene, seed) in enumerate(zip(tqdm(scenes, unit="scene"), seeds)):
        questions = _scene_questions(scene, seed, classes)
        rows = answer(scene.image, questions)
        for question, row in zip(questions, rows, strict=True):
            task, name = question.task, question.prompt.partition(" ")[2]
            if task not in parse:
                said[task].append((row.text, question.answer))
                continue
            objects = parse[task](row, *scene.image.size)
            found[task][index] += objects
            invalid[task] += objects.invalid
            if name not in scene.counts:
                silent[task].append(not objects)
    truth = [scene.objects for scene in scenes]
    ap = average_precision(found["detect"], truth)  # at ten IoU thresholds
    every_ap = average_precision(found["detect every"], truth)
    alarms = false_alarms(found["detect every"], truth)
    exact = {task: exact_match(*zip(*pairs)) for task, pairs in said.items()}
    short = [task for task in ("count", "relation", "presence") if task in said]
    answers = [pair for task in short for pair in said[task]]
    return {
        "scenes": len(scenes),
        "caption: class F1": class_f1([text for text, _ in said["caption"]], scenes),
        "caption: exact match": exact["caption"],
        "detect, present classes asked: AP50": float(ap[0]),
        "detect, present classes asked: AP50:95": float(ap.mean()),
        "detect, every class asked: AP50": float(every_ap[0]),
        "detect, every class asked: AP50:95": float(every_ap.mean()),
        "detect, every class asked: false alarms per image": alarms,
        "detect absent: nothing": sum(silent["detect"]) / len(silent["detect"]),
        "detect: invalid objects": invalid["detect"],
        "segment: mean IoU": mean_iou(found["segment"], truth),
        "segment absent: nothing": sum(silent["segment"]) / len(silent["segment"]),
        "segment: invalid objects": invalid["segment"],
        "answers: exact match": exact_match(*zip(*answers)),
        **{f"answers: {task}": exact[task] for task in short},
    }


def silent_fraction(answer: _Answerer, images: Sequence[Image.Image]) -> float:
    """The fraction of images without a sticker on which every answer says so.

    The caption is `EMPTY_CAPTION`; `detect` and `segment` of three classes, drawn at
    random for each image, get empty answers.
    """
    rng, silent = random.Random(0), 0
    for image in images:
        questions = [Question("caption", "caption en", EMPTY_CAPTION)]
        for kind in rng.sample(list(all_classes()), 3):
            questions += [Question(t, f"{t} {kind}", "") for t in ("detect", "segment")]
        rows = answer(image, questions)
        silent += all(r.text == q.answer for r, q in zip(rows, questions, strict=True))
    return silent / len(images)


def evaluate(
    model: PaliGemmaForConditionalGeneration,
    tokenizer: Any,
    decoder: MaskDecoder,
    split: str = "validation",
    num_scenes: int = 500,
) -> dict[str, dict[str, float]]:
    """Every number, by column and row, on the first `num_scenes` scenes of a split.

    Columns: scenes in styles that were trained on; the same seeds in the split's style,
    which wasn't, with the classes that it has; the baseline that never looks.
    Raises ValueError for another split, and for fewer than one scene.
    """
    if split not in SPLITS or num_scenes < 1:
        known = " or ".join(SPLITS)
        raise ValueError(f"{num_scenes} scenes of {split!r}: at least 1, of {known}")
    all_seeds, style = SPLITS[split]
    seeds, classes = all_seeds[:num_scenes], list(all_classes())
    processor = make_processor(model, tokenizer)
    side = processor.image_size
    scenes = [make_scene(seed, side) for seed in seeds]
    styled = [make_scene(seed, side, [style]) for seed in seeds]
    asked = [_scene_questions(*pair, classes) for pair in zip(scenes, seeds)]
    model_answer = partial(_ask_model, model, processor)
    blind_answer = _majority_baseline([question for each in asked for question in each])
    few = seeds[:_NUM_EMPTY]
    empty = [make_scene(seed, side, empty_prob=1.0).image for seed in few]
    photos = photo_crops(split, len(few), side)
    silence = {"empty scenes: silent": empty, "photographs: silent": photos}
    columns = {
        "styles trained on": (model_answer, scenes, classes),
        f"{split} style": (model_answer, styled, style_classes(style)),
        "without looking": (blind_answer, scenes, classes),
    }
    return {
        column: _evaluate_scenes(answer, drawn, seeds, asked_for, decoder)
        | {row: silent_fraction(answer, images) for row, images in silence.items()}
        for column, (answer, drawn, asked_for) in columns.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, as `run_main`."""
    from .cli import OneLineParser, run_main

    def run() -> None:
        about = "Evaluate a model on scenes that training never draws."
        parser = OneLineParser(prog="python -m vlm.evaluation", description=about)
        add = parser.add_argument
        add("--model_path", type="path", help="default: the embedded model")
        add("--mask_decoder", type="path", help="default: the one beside the model")
        add("--split", choices=SPLITS, default="validation", help="default: validation")
        add("--scenes", type=int, default=500, help="how many; default: %(default)s")
        parser.add_switch("--write", "into the model's folder: JSON and card")
        options = parser.parse_args(argv)
        folder = Path(options.model_path or EMBEDDED)
        if options.write and not folder.is_dir():  # a hub's cache isn't to be changed
            raise ValueError(f"--write needs a folder, and {folder} is none")
        model, tokenizer = load_hf_model(options.model_path)
        decoder = load_mask_decoder(options.model_path, options.mask_decoder)
        numbers = evaluate(model, tokenizer, decoder, options.split, options.scenes)
        print(table(numbers))
        if options.write:
            write_results(folder, numbers)

    return run_main(run, "--model_path takes a smaller model")


if __name__ == "__main__":
    raise SystemExit(main())
