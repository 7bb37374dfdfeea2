"""The script that judges a checkpoint, on answers whose marks are known."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import evaluate

from vlm.detection import Detection
from vlm.mask_tokens import MaskDecoder, MaskVQVAE
from vlm.sampling import Generation, generate
from vlm.scenes import (
    VALIDATION_SEEDS,
    all_kinds,
    detect_question,
    make_scene,
    segment_question,
)
from vlm.weights import EMBEDDED, load_hf_model, make_processor

SCENES = [make_scene(seed, 64) for seed in VALIDATION_SEEDS[:6]]
EVERY_KIND = "detect, every kind asked"


@pytest.fixture(scope="module")
def decoder():
    return MaskDecoder.from_pretrained(EMBEDDED)


def perfect_boxes(score=1.0):
    return [
        [Detection(thing.kind, thing.box, score) for thing in scene.objects]
        for scene in SCENES
    ]


def test_exam_is_the_same_every_time_and_asks_for_absent_things():
    for seed, scene in zip(VALIDATION_SEEDS, SCENES, strict=False):
        questions = evaluate.exam(scene, seed)
        assert questions == evaluate.exam(scene, seed)
        empty = [q for q in questions if q.task == "detect" and q.answer == ""]
        assert len(empty) == evaluate.ABSENT_PER_SCENE
        asked = sum(q.task == "detect" for q in questions)
        assert asked == len(scene.counts) + evaluate.ABSENT_PER_SCENE


def said(write):
    """(scene, question, answer) for the whole exam; `write` makes the answers."""
    for index, (seed, scene) in enumerate(zip(VALIDATION_SEEDS, SCENES, strict=False)):
        for question in evaluate.exam(scene, seed):
            yield index, question, Generation([0], [1.0], [write(scene, question)])


def test_one_who_knows_everything_gets_full_marks(decoder):
    vqvae = MaskVQVAE.from_pretrained(EMBEDDED)

    def write(scene, question):
        if question.task == "segment":
            kinds = [question.prompt.removeprefix("segment ")]
            return segment_question(scene, kinds, vqvae.encode_mask).answer
        return question.answer

    numbers = evaluate.score(SCENES, 64, said(write), perfect_boxes(), decoder)
    assert 0.85 < numbers.pop("segment: mean IoU") < 1  # sixteen tokens lose a little
    assert numbers.pop("scenes") == len(SCENES)
    for name, value in numbers.items():
        assert value == (0 if "invalid" in name or "false" in name else 1), name


def test_one_who_says_nothing_is_right_about_absent_things_alone(decoder):
    nothing = [[] for _ in SCENES]
    numbers = evaluate.score(SCENES, 64, said(lambda *_: ""), nothing, decoder)
    right = {name for name, value in numbers.items() if value and name != "scenes"}
    assert right == {"detect absent: nothing", "segment absent: nothing"}
    assert all(numbers[name] == 1 for name in right)


def test_half_an_object_is_counted_as_invalid(decoder):
    half = said(lambda *_: "<loc0001> owl")
    numbers = evaluate.score(SCENES, 64, half, [[] for _ in SCENES], decoder)
    tasks = [question.task for _, question, _ in said(lambda *_: "")]
    for task in ("detect", "segment"):
        assert numbers[f"{task}: invalid objects"] == tasks.count(task)


def test_perfect_boxes_have_perfect_precision():
    assert evaluate.average_precision(SCENES, perfect_boxes(), 64) == (1.0, 1.0)
    nothing = [[] for _ in SCENES]
    assert evaluate.average_precision(SCENES, nothing, 64) == (0.0, 0.0)


def test_false_alarms_are_counted_and_cost_precision_where_they_are_sure():
    (thing, *_) = SCENES[0].objects
    sure = Detection(thing.kind, thing.box, 0.9)
    without = [i for i, scene in enumerate(SCENES) if thing.kind not in scene.counts]
    found = perfect_boxes(score=0.5)
    assert evaluate.false_alarms(SCENES, found) == 0
    for index in without:
        found[index].append(sure)
    assert evaluate.false_alarms(SCENES, found) == len(without) / len(SCENES) > 0
    assert evaluate.average_precision(SCENES, found, 64)[0] < 1
    # A name of nothing at all is a false alarm, too, and no class that has a precision.
    found = perfect_boxes()
    found[0].append(Detection("unicycle", thing.box))
    assert evaluate.false_alarms(SCENES, found) == 1 / len(SCENES)
    assert evaluate.average_precision(SCENES, found, 64) == (1.0, 1.0)


def test_every_kind_is_asked_for_and_all_that_is_found_is_kept(monkeypatch):
    asked = []

    def ask(model, processor, scene, prompts):
        asked.extend(prompts)
        kinds = [prompt.removeprefix("detect ") for prompt in prompts]
        return [detect_question(scene, [kind]).answer for kind in kinds]

    monkeypatch.setattr(evaluate, "ask", ask)
    found = evaluate.detect_every_kind(None, None, SCENES)
    assert asked == [f"detect {kind}" for kind in all_kinds()] * len(SCENES)
    assert list(map(len, found)) == [len(scene.objects) for scene in SCENES]
    numbers = evaluate.average_precision(SCENES, found, 64)
    assert numbers[0] == 1.0


def test_a_picture_is_encoded_once_for_all_its_prompts():
    model, tokenizer = load_hf_model(device="cpu")
    processor = make_processor(model, tokenizer)
    encoded = []
    model.vision_tower.register_forward_hook(lambda _, given, __: encoded.append(given))
    prompts = ["detect owl", "caption en", "segment owl"]
    scene = make_scene(VALIDATION_SEEDS[0], processor.image_size)
    rows = evaluate.ask(model, processor, scene, prompts)
    ((pixels,),) = encoded
    assert len(pixels) == 1
    each = processor(prompts, [scene.image] * 3)
    texts = generate(model, tokenizer, each, max_new_tokens=evaluate.LONGEST_ANSWER)
    assert [row.text for row in rows] == texts


def test_card_keeps_everything_but_the_table(tmp_path):
    card = tmp_path / "README.md"
    card.write_text(f"before\n{evaluate.START}\nold\n{evaluate.END}\nafter\n")
    text = evaluate.table(
        {"a": {"scenes": 5, "F1": 0.5}, "b": {"scenes": 5, "F1": 1.0}}
    )
    evaluate.update_card(card, text)
    lines = card.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert "| F1 | 0.500 | 1.000 |" in lines
