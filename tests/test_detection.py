"""Boxes out of answers: what is valid, where it lies, how sure the model was, how good.

Average precision is compared with COCO's own program, pycocotools.
"""

import contextlib
import io
import random
from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vlm.detection import (
    Detection,
    ParsedObjects,
    average_precision,
    box_iou,
    draw_detections,
    parse_detections,
    rank_boxes,
    split_objects,
)
from vlm.processing import box_to_locs, loc_token, seg_token
from vlm.questions import detect_question
from vlm.sampling import Generation
from vlm.scenes import VALIDATION_SEEDS, make_scene

BOX = "<loc0100><loc0200><loc0300><loc0400>"
SEGS = "".join(seg_token(code) for code in range(16))


def answer(*pairs: tuple[str, float]) -> Generation:
    """A Generation from (piece, probability) pairs."""
    pieces, probabilities = map(list, zip(*pairs))
    return Generation(list(range(len(pairs))), probabilities, pieces)


def test_the_order_is_y_x_y_x():
    text = "<loc0000><loc0341><loc0682><loc1023> owl"
    (owl,) = parse_detections(text, 300, 600)
    assert owl == Detection("owl", (100.0, 0.0, 300.0, 400.0), 1.0)


def test_the_last_mark_is_the_very_edge():
    (owl,) = parse_detections("<loc0000><loc0000><loc1023><loc1023> owl", 640, 480)
    assert owl.box == (0, 0, 640, 480)


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (4032, 3024), (1, 1000)])
def test_reading_undoes_writing_to_half_a_step(size):
    rng = random.Random(0)
    width, height = size
    for _ in range(200):
        x0, y0 = rng.uniform(0, 0.9), rng.uniform(0, 0.9)
        x1, y1 = rng.uniform(x0 + 0.01, 1), rng.uniform(y0 + 0.01, 1)
        box = (x0 * width, y0 * height, x1 * width, y1 * height)
        (found,) = parse_detections(f"{box_to_locs(box, *size)} owl", *size)
        errors = [abs(a - b) for a, b in zip(box, found.box)]
        assert max(errors[::2]) <= width / 2046 + 1e-9
        assert max(errors[1::2]) <= height / 2046 + 1e-9


def test_labels_of_several_words_and_several_things():
    text = f"{BOX} hot dog ; {BOX} owl;{BOX}  a <b> c "
    found = parse_detections(text, 10, 10)
    assert [d.label for d in found] == ["hot dog", "owl", "a <b> c"]
    assert found.invalid == 0


@pytest.mark.parametrize("text", ["", " ", " ; ", "\n"])
def test_an_answer_without_things_is_empty_and_valid(text):
    found = parse_detections(text, 10, 10)
    assert isinstance(found, ParsedObjects)
    assert found == [] and found.invalid == 0


@pytest.mark.parametrize(
    "bad",
    [
        "owl",
        BOX,
        f"{BOX[:-9]} owl",
        f"{BOX}<loc0500> owl",
        f"owl {BOX}",
        f"{BOX} owl <loc0001>",
        f"{BOX} <seg001>",
        "<loc0100><loc0200><loc0300><loc1024> owl",
        "<loc0300><loc0200><loc0100><loc0400> owl",
        "<loc0100><loc0400><loc0300><loc0200> owl",
        "<loc0100><loc0200><loc0100><loc0400> owl",
        "<loc0100><loc0200><loc0300><loc0200> owl",
        f"{BOX}{SEGS[:-8]} owl",
        f"{BOX}{SEGS}<seg000> owl",
        f"{BOX}{SEGS[:-8]}<seg128> owl",
        f"{SEGS}{BOX} owl",
        f"{BOX[:9]} {BOX[9:]} owl",
    ],
)
def test_what_is_no_thing_is_left_out_and_counted(bad):
    found = parse_detections(f"{BOX} bat ; {bad} ; {BOX} cow", 100, 100)
    assert [d.label for d in found] == ["bat", "cow"]
    assert found.invalid == 1


def test_an_exact_repeat_is_left_out_and_counted():
    other = BOX.replace("0400", "0401")
    text = f"{BOX} owl ; {BOX} bat ; {other} owl" + f" ; {BOX} owl" * 7 + f" ; {BOX}"
    found = parse_detections(text, 100, 100)
    assert [d.label for d in found] == ["owl", "bat", "owl"]
    assert (found.repeated, found.invalid) == (7, 1)  # the last was cut off
    assert parse_detections(f"{BOX} owl", 100, 100).repeated == 0


def test_the_first_of_equal_objects_keeps_its_score():
    locs = [loc_token(n) for n in (100, 200, 300, 400)]
    text = answer(
        *((p, 0.5) for p in locs), (" owl ; ", 0.5), *((p, 0.9) for p in locs)
    )
    text.pieces.append(" owl")
    text.probabilities.append(0.9)
    (owl,) = found = parse_detections(text, 100, 100)
    assert owl.score == pytest.approx(0.5) and found.repeated == 1


@pytest.mark.parametrize("not_an_answer", [None, [f"{BOX} owl"], b"owl", 7])
def test_what_is_no_answer_is_refused_by_type(not_an_answer):
    unchecked = split_objects.__wrapped__  # without the tests' own type checks
    with pytest.raises(TypeError, match="one answer"):
        unchecked(not_an_answer)


@pytest.mark.parametrize("side", [None, 0, -640, float("nan"), float("inf"), "640"])
def test_what_is_no_size_is_refused_even_where_nothing_was_found(side):
    unchecked = parse_detections.__wrapped__
    for text in ("", f"{BOX} owl"):
        with pytest.raises((ValueError, TypeError), match="width"):
            unchecked(text, side, 100)
        with pytest.raises((ValueError, TypeError), match="height"):
            unchecked(text, 100, side)


def test_answers_to_segment_parse_too():
    (owl,) = parse_detections(f"{BOX}{SEGS} owl", 1023, 1023)
    assert owl == Detection("owl", (200.0, 100.0, 400.0, 300.0))
    (thing,) = split_objects(f"{BOX}{SEGS} owl")
    assert (thing.locs, thing.segs, thing.label) == (BOX, SEGS, "owl")


def test_the_score_is_the_geometric_mean_of_the_things_own_tokens():
    locs = [(loc_token(n), 0.5) for n in (100, 200, 300, 400)]
    text = answer(
        *locs, (" hot", 0.8), (" dog", 0.9), (" ;", 0.001), (" ", 0.002),
        *((piece, 0.25) for piece, _ in locs), (" owl", 0.25), ("", 0.003),
    )  # fmt: skip
    hot_dog, owl = parse_detections(text, 100, 100)
    assert hot_dog.label == "hot dog"
    expected = exp((4 * log(0.5) + log(0.8) + log(0.9)) / 6)
    assert hot_dog.score == pytest.approx(expected)
    assert owl.score == pytest.approx(0.25)


def test_a_probability_of_zero_is_a_low_score_and_no_error():
    locs = [(loc_token(n), 0.0) for n in (100, 200, 300, 400)]
    (owl,) = parse_detections(answer(*locs, (" owl", 0.0)), 100, 100)
    assert 0 < owl.score < 1e-9


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    """Which pixels differ, bool [H, W]."""
    return (np.asarray(before) != np.asarray(after)).any(axis=-1)


def test_drawing_frames_the_box_and_leaves_the_picture_alone():
    picture = Image.new("RGB", (200, 100), "white")
    drawn = draw_detections(picture, [Detection("owl", (50, 40, 150, 90))])
    assert picture.getextrema() == ((255, 255),) * 3
    touched = changed(picture, drawn)
    rows, columns = touched.nonzero()
    assert rows.max() == 89 and columns.max() == 149  # a box ends before its end
    assert columns.min() == 50
    assert touched[40:90, 50].all() and touched[40, 50:150].all()
    assert touched[40:90, 149].all() and touched[89, 50:150].all()
    assert not touched[50:80, 60:140].any()  # what is in the box stays visible


def test_drawing_nothing_changes_nothing():
    picture = Image.new("RGB", (20, 10), "green")
    assert not changed(picture, draw_detections(picture, [])).any()


def test_same_label_same_color_other_label_other_color():
    picture = Image.new("RGB", (400, 100), "white")
    boxes = [("owl", 10), ("pig", 110), ("owl", 210)]
    things = [Detection(label, (x, 40, x + 80, 90)) for label, x in boxes]
    drawn = draw_detections(picture, things)
    left, middle, right = (drawn.getpixel((x, 70)) for _, x in boxes)
    assert left == right != middle


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_any_picture_can_be_drawn_on(mode):
    picture = Image.new(mode, (40, 30))
    drawn = draw_detections(picture, [Detection("owl", (1, 1, 30, 20))])
    assert (drawn.mode, drawn.size) == ("RGB", (40, 30))


@pytest.mark.parametrize(
    "box", [(0, 0, 8, 6), (7.9, 5.9, 8, 6), (0, 0, 0.01, 0.01), (3, 3, 3.5, 6)]
)
def test_tiny_pictures_and_boxes_can_be_drawn(box):
    picture = Image.new("RGB", (8, 6))
    things = [Detection(f"long label {n}", box) for n in range(9)]
    assert draw_detections(picture, things).size == (8, 6)


# The judge: IoU and average precision


def thing(label="owl", box=(0.0, 0.0, 4.0, 4.0), score=1.0) -> Detection:
    return Detection(label, tuple(map(float, box)), score)


def coco_data(pictures, labels) -> COCO:
    """Detections in pycocotools' form: ids, and boxes as x, y, width, height."""
    rows = []
    for index, things in enumerate(pictures):
        for found in things:
            x0, y0, x1, y1 = found.box
            rows.append(
                {
                    "id": len(rows) + 1,
                    "image_id": index,
                    "category_id": labels.index(found.label),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "score": found.score,
                }
            )
    data = COCO()
    data.dataset = {
        "images": [{"id": index} for index in range(len(pictures))],
        "categories": [{"id": index} for index in range(len(labels))],
        "annotations": rows,
    }
    data.createIndex()
    return data


def coco_precision(found, truth) -> np.ndarray:
    """Average precision at COCO's ten limits, by pycocotools."""
    labels = sorted({d.label for things in [*found, *truth] for d in things})
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(coco_data(truth, labels), coco_data(found, labels), "bbox")
        judge.params.areaRng = [[0, 1e10]]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][:, :, :, 0, -1]
    return precision[:, :, precision[0, 0] > -1].mean(axis=(1, 2))


def assert_as_coco(found, truth):
    ours = average_precision(found, truth)
    np.testing.assert_allclose(ours, coco_precision(found, truth), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 5), (2, 2), (4,), (1, 1, 4)])
def test_boxes_are_four_numbers_each(shape):
    unchecked = box_iou.__wrapped__
    for pair in ((np.ones(shape), []), ([], np.ones(shape))):
        with pytest.raises(ValueError, match="four numbers"):
            unchecked(*pair)
    assert box_iou([], np.zeros((2, 4))).shape == (0, 2)


# On a coarse grid, with few labels and scores: ties, equal boxes, boxes without area.
corner = st.integers(0, 5)
boxes = st.tuples(corner, corner, corner, corner).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
)
scores = st.sampled_from([0.25, 0.5, 0.75])
true_things = st.lists(st.builds(thing, st.sampled_from("ab"), boxes), max_size=5)
found_things = st.lists(
    st.builds(thing, st.sampled_from("abc"), boxes, scores), max_size=8
)
pictures = st.lists(st.tuples(found_things, true_things), min_size=1, max_size=5)
quickly = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@quickly
@given(pictures.filter(lambda pairs: any(true for _, true in pairs)))
def test_average_precision_is_pycocotools_on_a_coarse_grid(pairs):
    found, truth = map(list, zip(*pairs))
    assert_as_coco(found, truth)


def jittered(rng, truth, many, labels):
    """Boxes near the true ones, with random labels and scores of one decimal."""
    near = [truth[i] for i in rng.integers(len(truth), size=many)]
    moved = np.array([d.box for d in near]).reshape(-1, 2, 2)
    moved = moved + rng.normal(scale=0.05, size=moved.shape)
    moved = np.sort(moved, axis=1).reshape(-1, 4)
    marks = rng.random(many).round(1).tolist()
    return [thing(str(rng.choice(labels)), b, s) for b, s in zip(moved, marks)]


@pytest.mark.parametrize("seed", range(10))
def test_average_precision_is_pycocotools_on_boxes_that_are_nearly_right(seed):
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(10):
        corners = np.sort(rng.random((4, 2, 2)), axis=1).reshape(-1, 4)
        truth.append([thing(str(rng.choice(list("ab"))), box) for box in corners])
        found.append(jittered(rng, truth[-1], int(rng.integers(9)), list("abc")))
    assert_as_coco(found, truth)
    forgotten = [[replace(d, score=1.0) for d in things] for things in found]
    wrong = abs(average_precision(forgotten, truth) - coco_precision(found, truth))
    assert wrong.max() > 1e-3  # the comparison can fail


def test_only_the_hundred_surest_boxes_of_a_kind_count():
    sure = [thing(box=(0, 0, n, 1), score=0.9) for n in range(5, 105)]
    late = [thing(score=0.5), thing("bat", score=0.1)]
    truth = [[thing(), thing("bat")]]
    assert_as_coco([sure + late], truth)
    assert average_precision([sure + late], truth)[0] == pytest.approx(0.5)
    assert average_precision([sure[1:] + late], truth)[0] > 0.5


def test_marks_of_recall_are_cocos_to_the_last_digit():
    """7 of 20 is 0.35, and the mark 35 is 0.35000000000000003: it isn't reached."""
    truth = [[thing()] for _ in range(20)]
    found = [[thing()] for _ in range(7)] + [[]] * 13
    assert_as_coco(found, truth)
    assert average_precision(found, truth)[0] == pytest.approx(35 / 101)


def test_of_equally_good_true_boxes_the_last_is_taken_as_in_pycocotools():
    left, right = (0, 0, 2, 2), (2, 0, 4, 2)  # both have an IoU of 0.5 with the first
    found = [[thing(box=(0, 0, 4, 2), score=0.9), thing(box=left, score=0.5)]]
    truth = [[thing(box=left), thing(box=right)]]
    assert_as_coco(found, truth)
    assert average_precision(found, truth)[0] == pytest.approx(1)
    assert_as_coco(found, [truth[0][::-1]])
    assert average_precision(found, [truth[0][::-1]])[0] < 0.6


def test_average_precision_by_hand():
    """The chapter's five boxes: 51 marks at 1, 25 at 3/4, 25 at 0."""
    away = (90, 90, 99, 99)
    places = [(0, 0, 4, 4), (10, 0, 14, 4), away, (20, 0, 24, 4), (70, 0, 74, 4)]
    scores = [0.95, 0.9, 0.8, 0.7, 0.6]
    found = [thing(box=box, score=score) for box, score in zip(places, scores)]
    truth = [thing(box=(x, 0, x + 4, 4)) for x in (0, 10, 20, 30)]
    expected = (51 + 25 * 0.75) / 101
    assert average_precision([found], [truth]) == pytest.approx([expected] * 10)
    right, num_true = rank_boxes([found], [truth], "owl", [0.5])
    assert right.tolist() == [[True, True, False, True, False]] and num_true == 4


def test_perfect_answers_have_one_and_no_answers_none():
    truth = [[thing(), thing("bat", (9, 9, 12, 12))], [], [thing()]]
    assert (average_precision(truth, truth) == 1).all()
    assert (average_precision([[], [], []], truth) == 0).all()


def test_only_the_order_of_the_scores_counts():
    rng = np.random.default_rng(0)
    truth = [[thing(box=box) for box in ((0, 0, 1, 1), (0.5, 0, 1, 1))]] * 5
    found = [jittered(rng, things, 6, ["owl"]) for things in truth]
    squared = [[replace(d, score=d.score**2) for d in things] for things in found]
    before = average_precision(found, truth)
    assert 0 < before[0] < 1
    assert (average_precision(squared, truth) == before).all()
    assert (average_precision(found, [[replace(d, score=0.1) for d in truth[0]]] * 5)
            == before).all()  # fmt: skip


def test_a_true_box_is_claimed_once():
    three = [thing(score=0.9), thing(score=0.8), thing(score=0.7)]
    right, num_true = rank_boxes([three], [[thing()]], "owl")
    assert right[0].tolist() == [True, False, False] and num_true == 1
    # The next picture's owl comes after two wrong boxes.
    found, truth = [three, [thing(score=0.1)]], [[thing()], [thing()]]
    assert average_precision(found, truth)[0] == pytest.approx((51 + 50 / 2) / 101)


def test_kinds_without_truth_are_left_out():
    found = [[thing(score=0.2), thing("unicorn", score=0.9)]]
    assert (average_precision(found, [[thing()]]) == 1).all()


def test_average_precision_takes_other_limits():
    found, truth = [[thing(box=(0, 0, 4, 2))]], [[thing()]]  # an IoU of exactly 0.5
    assert average_precision(found, truth, [0.1, 0.5, 0.51]).tolist() == [1, 1, 0]


def test_average_precision_says_what_is_wrong():
    with pytest.raises(ValueError, match="2 pictures, truth for 1"):
        average_precision([[], []], [[thing()]])
    for nothing in ([], [[]]):
        with pytest.raises(ValueError, match="no picture has a true box"):
            average_precision(nothing, nothing)


@quickly
@given(st.lists(boxes, max_size=5), st.lists(boxes, max_size=5))
def test_iou_of_all_pairs(some, others):
    some, others = ([tuple(map(float, b)) for b in boxes] for boxes in (some, others))
    iou = box_iou(some, others)
    assert iou.shape == (len(some), len(others))
    assert ((0 <= iou) & (iou <= 1)).all()
    assert (iou == box_iou(others, some).T).all()
    for a, row in zip(some, iou):
        for b, value in zip(others, row):
            cells = [
                {(x, y) for x in range(int(c[0]), int(c[2]))
                 for y in range(int(c[1]), int(c[3]))} for c in (a, b)
            ]  # fmt: skip
            union = len(cells[0] | cells[1])
            assert value == (len(cells[0] & cells[1]) / union if union else 0)


def test_iou_takes_lists_arrays_and_tensors_in_any_unit():
    a = [(0.0, 0.0, 6.0, 4.0), (1.0, 1.0, 1.0, 3.0)]
    b = [(2.0, 0.0, 8.0, 4.0)]
    for form in (list, np.array, torch.tensor):
        assert box_iou(form(a), form(b)).tolist() == [[0.5], [0.0]]
    assert box_iou(np.array([[0, 0, 6, 4]]), np.array([[2, 0, 8, 4]])) == [[0.5]]
    assert box_iou(np.array(a) / 7, np.array(b) / 7)[0, 0] == pytest.approx(0.5)
    assert box_iou([], b).shape == (0, 1) and box_iou(a, []).shape == (2, 0)


def test_what_the_world_says_of_its_scenes_is_a_perfect_answer():
    scenes = [make_scene(seed, 64) for seed in VALIDATION_SEEDS[:20]]
    answers = [detect_question(s, list(s.counts)).answer for s in scenes]
    found = [parse_detections(answer, 64, 64) for answer in answers]
    truth = [[Detection(o.label, o.box) for o in s.objects] for s in scenes]
    assert (average_precision(found, truth) == 1).all()
