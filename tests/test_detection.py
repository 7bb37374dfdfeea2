"""Boxes out of answers: what is valid, where it lies, how sure the model was."""

import random
from math import exp, log

import numpy as np
import pytest
from PIL import Image

from vlm.detection import (
    Detection,
    ParsedObjects,
    draw_objects,
    parse_detections,
)
from vlm.processing import box_to_locs, codes_to_segs
from vlm.sampling import Generation

BOX = "<loc0100><loc0200><loc0300><loc0400>"
SEGS = codes_to_segs(range(16))


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
    locs = [f"<loc{n:04d}>" for n in (100, 200, 300, 400)]
    text = answer(
        *((p, 0.5) for p in locs), (" owl ; ", 0.5), *((p, 0.9) for p in locs)
    )
    text.pieces.append(" owl")
    text.probabilities.append(0.9)
    (owl,) = found = parse_detections(text, 100, 100)
    assert owl.score == pytest.approx(0.5) and found.repeated == 1


@pytest.mark.parametrize("not_an_answer", [None, [f"{BOX} owl"], b"owl", 7])
def test_what_is_no_answer_is_refused_by_type(not_an_answer):
    unchecked = parse_detections.__wrapped__  # without the tests' own type checks
    with pytest.raises(TypeError, match="one answer"):
        unchecked(not_an_answer, 100, 100)


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
    assert owl.codes == list(range(16))


def test_the_score_is_the_geometric_mean_of_the_things_own_tokens():
    locs = [(f"<loc{n:04d}>", 0.5) for n in (100, 200, 300, 400)]
    text = answer(
        *locs, (" hot", 0.8), (" dog", 0.9), (" ;", 0.001), (" ", 0.002),
        *((piece, 0.25) for piece, _ in locs), (" owl", 0.25), ("", 0.003),
    )  # fmt: skip
    hot_dog, owl = parse_detections(text, 100, 100)
    assert hot_dog.label == "hot dog"
    expected = exp((4 * log(0.5) + log(0.8) + log(0.9)) / 6)
    assert hot_dog.score == pytest.approx(expected)
    assert owl.score == pytest.approx(0.25)


def test_tokens_of_a_character_that_is_not_complete_count():
    """Their text comes with the last of them; their probabilities are their own."""
    locs = [(f"<loc{n:04d}>", 0.5) for n in (100, 200, 300, 400)]
    text = answer(*locs, (" ", 0.5), ("", 0.001), ("é", 0.9))
    (found,) = parse_detections(text, 100, 100)
    expected = exp((5 * log(0.5) + log(0.001) + log(0.9)) / 7)
    assert found.label == "é" and found.score == pytest.approx(expected)


def test_a_probability_of_zero_is_a_low_score_and_no_error():
    locs = [(f"<loc{n:04d}>", 0.0) for n in (100, 200, 300, 400)]
    (owl,) = parse_detections(answer(*locs, (" owl", 0.0)), 100, 100)
    assert 0 < owl.score < 1e-9


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    """Which pixels differ, bool [H, W]."""
    return (np.asarray(before) != np.asarray(after)).any(axis=-1)


def test_drawing_frames_the_box_and_leaves_the_picture_alone():
    picture = Image.new("RGB", (200, 100), "white")
    drawn = draw_objects(picture, [Detection("owl", (50, 40, 150, 90))])
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
    assert not changed(picture, draw_objects(picture, [])).any()


def test_same_label_same_color_other_label_other_color():
    picture = Image.new("RGB", (400, 100), "white")
    boxes = [("owl", 10), ("pig", 110), ("owl", 210)]
    things = [Detection(label, (x, 40, x + 80, 90)) for label, x in boxes]
    drawn = draw_objects(picture, things)
    left, middle, right = (drawn.getpixel((x, 70)) for _, x in boxes)
    assert left == right != middle


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_any_picture_can_be_drawn_on(mode):
    picture = Image.new(mode, (40, 30))
    drawn = draw_objects(picture, [Detection("owl", (1, 1, 30, 20))])
    assert (drawn.mode, drawn.size) == ("RGB", (40, 30))


@pytest.mark.parametrize(
    "box", [(0, 0, 8, 6), (7.9, 5.9, 8, 6), (0, 0, 0.01, 0.01), (3, 3, 3.5, 6)]
)
def test_tiny_pictures_and_boxes_can_be_drawn(box):
    picture = Image.new("RGB", (8, 6))
    things = [Detection(f"long label {n}", box) for n in range(9)]
    assert draw_objects(picture, things).size == (8, 6)
