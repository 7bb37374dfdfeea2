"""The script that judges a checkpoint, on answers whose marks are known."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import evaluate

from vlm.mask_tokens import MaskDecoder, MaskVQVAE
from vlm.sampling import Generation
from vlm.scenes import HELD_OUT_SEEDS, all_kinds, make_scene, segment_question
from vlm.weights import EMBEDDED

SCENES = [make_scene(seed, 64) for seed in HELD_OUT_SEEDS[:6]]
IDS = {name: i + 1 for i, name in enumerate(all_kinds())}


@pytest.fixture(scope="module")
def decoder():
    return MaskDecoder.from_pretrained(EMBEDDED)


def perfect_boxes():
    return [
        {
            "image_id": index,
            "category_id": IDS[thing.kind],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": 1.0,
        }
        for index, scene in enumerate(SCENES)
        for thing in scene.objects
        for x0, y0, x1, y1 in [thing.box]
    ]


def test_exam_is_the_same_every_time_and_asks_for_absent_things():
    for seed, scene in zip(HELD_OUT_SEEDS, SCENES, strict=False):
        questions = evaluate.exam(scene, seed)
        assert questions == evaluate.exam(scene, seed)
        empty = [q for q in questions if q.task == "detect" and q.answer == ""]
        assert len(empty) == evaluate.ABSENT_PER_SCENE
        asked = sum(q.task == "detect" for q in questions)
        assert asked == len(scene.counts) + evaluate.ABSENT_PER_SCENE


def said(write):
    """(scene, question, answer) for the whole exam; `write` makes the answers."""
    for index, (seed, scene) in enumerate(zip(HELD_OUT_SEEDS, SCENES, strict=False)):
        for question in evaluate.exam(scene, seed):
            yield index, question, Generation([0], [1.0], [write(scene, question)])


def test_one_who_knows_everything_gets_full_marks(decoder):
    vqvae = MaskVQVAE.from_pretrained(EMBEDDED)

    def write(scene, question):
        if question.task == "segment":
            kinds = [question.prompt.removeprefix("segment ")]
            return segment_question(scene, kinds, vqvae.encode_mask).answer
        return question.answer

    numbers = evaluate.score(SCENES, 64, said(write), decoder)
    assert 0.85 < numbers.pop("segment: mean IoU") < 1  # sixteen tokens lose a little
    assert numbers.pop("scenes") == len(SCENES)
    for name, value in numbers.items():
        assert value == (0 if "invalid" in name else 1), name


def test_one_who_says_nothing_is_right_about_absent_things_alone(decoder):
    numbers = evaluate.score(SCENES, 64, said(lambda *_: ""), decoder)
    right = {name for name, value in numbers.items() if value and name != "scenes"}
    assert right == {"detect absent: nothing", "segment absent: nothing"}
    assert all(numbers[name] == 1 for name in right)


def test_half_an_object_is_counted_as_invalid(decoder):
    numbers = evaluate.score(SCENES, 64, said(lambda *_: "<loc0001> owl"), decoder)
    tasks = [question.task for _, question, _ in said(lambda *_: "")]
    for task in ("detect", "segment"):
        assert numbers[f"{task}: invalid objects"] == tasks.count(task)


def test_perfect_boxes_have_perfect_precision():
    assert evaluate.average_precision(SCENES, perfect_boxes(), 64) == (1.0, 1.0)
    assert evaluate.average_precision(SCENES, [], 64) == (0.0, 0.0)


def test_a_sure_box_for_an_absent_thing_costs():
    boxes = perfect_boxes()
    for box in boxes:
        box["score"] = 0.5
    wrong = next(b for b in boxes if b["image_id"] == 0)
    false_alarms = [
        wrong | {"image_id": i, "score": 0.9}
        for i, scene in enumerate(SCENES)
        if wrong["category_id"] not in {IDS[k] for k in scene.counts}
    ]
    assert evaluate.average_precision(SCENES, boxes + false_alarms, 64)[0] < 1


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
