"""Metrics of captions, boxes and masks.

Average precision, which pycocotools computes, is compared with its rules by hand.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.detection import Detection, parse_detections
from vlm.metrics import (
    average_precision,
    class_f1,
    exact_match,
    false_alarms,
    mean_iou,
    object_ious,
)
from vlm.questions import caption, make_question
from vlm.sampling import Generation
from vlm.scenes import VALIDATION_SEEDS, make_scene
from vlm.segmentation import Segmentation

# Captions

SCENES = [make_scene(seed, 64) for seed in VALIDATION_SEEDS[:20]]
TRUTHS = [caption(scene) for scene in SCENES]


def test_the_truth_is_perfect():
    assert class_f1(TRUTHS, SCENES) == exact_match(TRUTHS, TRUTHS) == 1


def test_one_class_missed_and_one_made_up():
    scene = SCENES[0]
    *rest, _ = scene.counts
    absent = next(k for s in SCENES for k in s.counts if k not in scene.counts)
    answer = ", ".join(f"a {kind}" for kind in [*rest, absent])
    expected = len(rest) / len(scene.counts)  # precision, and recall
    assert class_f1([answer], [scene]) == pytest.approx(expected)


def test_order_number_and_repetition_do_not_count():
    scene = next(scene for scene in SCENES if len(scene.counts) > 2)
    kinds = ", ".join(f"a {kind}" for kind in reversed(scene.counts))
    assert class_f1([f"{kinds}, {kinds}"], [scene]) == 1
    assert exact_match([kinds], [caption(scene)]) == 0


def test_zero_of_a_class_is_not_named():
    scene = next(scene for scene in SCENES if len(scene.counts) == 1)
    (kind,) = scene.counts
    assert class_f1([f"0 {kind}"], [scene]) == 0


def test_the_average_is_micro():
    few = next(scene for scene in SCENES if len(scene.counts) == 1)
    many = max(SCENES, key=lambda scene: len(scene.counts))
    scenes, answers = [few, many], [caption(few), ""]
    right, missed = 1, len(many.counts)
    assert class_f1(answers, scenes) == pytest.approx(2 * right / (2 * right + missed))


def test_silence_is_worth_nothing_and_divides_by_nothing():
    assert class_f1(["", "a view of nothing in particular"], SCENES[:2]) == 0
    empty = make_scene(0, 32, empty_prob=1.0)
    assert class_f1([""], [empty]) == 0


@pytest.mark.parametrize("answers", [[], ["a"], ["a"] * 3])
def test_pairs_must_match(answers):
    with pytest.raises(ValueError):
        class_f1(answers, SCENES[:2])
    with pytest.raises(ValueError):
        exact_match(answers, ["a", "b"] if answers else [])


@pytest.mark.parametrize("answers", [[Generation(), Generation()], [None, "a"]])
def test_answers_are_strings(answers):
    with pytest.raises(TypeError, match="answers"):
        exact_match.__wrapped__(answers, ["a", "b"])


# Average precision


def thing(label="owl", box=(0.0, 0.0, 4.0, 4.0), score=1.0) -> Detection:
    return Detection(label, tuple(map(float, box)), score)


def iou_by_hand(a, b) -> float:
    wide, high = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    shared = max(wide, 0) * max(high, 0)
    areas = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    return shared / (areas - shared) if shared else 0.0


def ranked_by_hand(found, truth, label, threshold) -> tuple[list[bool], int]:
    """Is each box of a class, in descending order of score, a true positive?

    With it comes how many are there. At most 100 a picture; of equally good true boxes
    the last is taken, as COCO does.
    """
    ranked, num_true = [], 0
    for boxes, things in zip(found, truth):
        free = [d.box for d in things if d.label == label]
        num_true += len(free)
        mine = [d for d in boxes if d.label == label]
        for one in sorted(mine, key=lambda d: -d.score)[:100]:
            ious = [iou_by_hand(one.box, box) for box in free]
            best = max(ious, default=0)
            ranked.append((one.score, best >= threshold))
            if best >= threshold:
                del free[len(ious) - 1 - ious[::-1].index(best)]
    return [right for _, right in sorted(ranked, key=lambda r: -r[0])], num_true


def average_precision_by_hand(found, truth) -> np.ndarray:
    """The rules, one by one, with none of pycocotools' code."""
    values = []
    for label in sorted({d.label for things in truth for d in things}):
        for threshold in np.linspace(0.5, 0.95, 10):
            right, num_true = ranked_by_hand(found, truth, label, threshold)
            hits = np.cumsum(right)
            precision = hits / (np.arange(len(hits)) + 1)
            recall = hits / num_true
            values += [np.mean([precision[recall >= r].max(initial=0) for r in LEVELS])]
    return np.reshape(values, (-1, 10)).mean(axis=0)


LEVELS = np.linspace(0, 1, 101)


def assert_as_by_hand(found, truth):
    ours = average_precision(found, truth)
    expected = average_precision_by_hand(found, truth)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


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
def test_average_precision_follows_the_rules_on_a_coarse_grid(pairs):
    found, truth = map(list, zip(*pairs))
    assert_as_by_hand(found, truth)


def jittered(rng, truth, many, labels):
    """Boxes near the true ones, with random labels and scores of one decimal."""
    near = [truth[i] for i in rng.integers(len(truth), size=many)]
    moved = np.array([d.box for d in near]).reshape(-1, 2, 2)
    moved = moved + rng.normal(scale=0.05, size=moved.shape)
    moved = np.sort(moved, axis=1).reshape(-1, 4)
    scores = rng.random(many).round(1).tolist()
    return [thing(str(rng.choice(labels)), b, s) for b, s in zip(moved, scores)]


@pytest.mark.parametrize("seed", range(10))
def test_average_precision_follows_the_rules_on_boxes_that_are_nearly_right(seed):
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(10):
        corners = np.sort(rng.random((4, 2, 2)), axis=1).reshape(-1, 4)
        truth.append([thing(str(rng.choice(list("ab"))), box) for box in corners])
        found.append(jittered(rng, truth[-1], int(rng.integers(9)), list("abc")))
    assert_as_by_hand(found, truth)
    forgotten = [[replace(d, score=1.0) for d in things] for things in found]
    wrong = abs(
        average_precision(forgotten, truth) - average_precision_by_hand(found, truth)
    )
    assert wrong.max() > 1e-3  # the comparison can fail


def test_only_the_hundred_most_confident_boxes_of_a_class_count():
    sure = [thing(box=(0, 0, n, 1), score=0.9) for n in range(5, 105)]
    late = [thing(score=0.5), thing("bat", score=0.1)]
    truth = [[thing(), thing("bat")]]
    assert_as_by_hand([sure + late], truth)
    assert average_precision([sure + late], truth)[0] == pytest.approx(0.5)
    assert average_precision([sure[1:] + late], truth)[0] > 0.5


def test_recall_levels_are_cocos_to_the_last_digit():
    """7 of 20 is 0.35, and the level 35 is 0.35000000000000003: it isn't reached."""
    truth = [[thing()] for _ in range(20)]
    found = [[thing()] for _ in range(7)] + [[]] * 13
    assert_as_by_hand(found, truth)
    assert average_precision(found, truth)[0] == pytest.approx(35 / 101)


def test_of_equally_good_true_boxes_the_last_is_taken_as_in_pycocotools():
    left, right = (0, 0, 2, 2), (2, 0, 4, 2)  # both have an IoU of 0.5 with the first
    found = [[thing(box=(0, 0, 4, 2), score=0.9), thing(box=left, score=0.5)]]
    truth = [[thing(box=left), thing(box=right)]]
    assert_as_by_hand(found, truth)
    assert average_precision(found, truth)[0] == pytest.approx(1)
    assert_as_by_hand(found, [truth[0][::-1]])
    assert average_precision(found, [truth[0][::-1]])[0] < 0.6


def test_average_precision_by_hand():
    """The chapter's five boxes: 51 levels at 1, 25 at 3/4, 25 at 0."""
    away = (90, 90, 99, 99)
    places = [(0, 0, 4, 4), (10, 0, 14, 4), away, (20, 0, 24, 4), (70, 0, 74, 4)]
    scores = [0.95, 0.9, 0.8, 0.7, 0.6]
    found = [thing(box=box, score=score) for box, score in zip(places, scores)]
    truth = [thing(box=(x, 0, x + 4, 4)) for x in (0, 10, 20, 30)]
    expected = (51 + 25 * 0.75) / 101
    assert average_precision([found], [truth]) == pytest.approx([expected] * 10)


def test_perfect_answers_have_one_and_no_answers_none():
    truth = [[thing(), thing("bat", (9, 9, 12, 12))], [], [thing()]]
    assert average_precision(truth, truth) == pytest.approx(np.ones(10))
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
    # The next picture's owl comes after two wrong boxes.
    found, truth = [three, [thing(score=0.1)]], [[thing()], [thing()]]
    assert average_precision(found, truth)[0] == pytest.approx((51 + 50 / 2) / 101)


def test_classes_without_truth_are_left_out():
    found = [[thing(score=0.2), thing("unicorn", score=0.9)]]
    assert average_precision(found, [[thing()]]) == pytest.approx(np.ones(10))


def test_average_precision_says_what_is_wrong():
    with pytest.raises(ValueError, match="2 images, truth for 1"):
        average_precision([[], []], [[thing()]])
    for nothing in ([], [[]]):
        with pytest.raises(ValueError, match="no image has a true object"):
            average_precision(nothing, nothing)


def test_what_the_world_says_of_its_scenes_is_a_perfect_answer():
    scenes = [make_scene(seed, 64) for seed in VALIDATION_SEEDS[:20]]
    answers = [make_question(s, "detect", *s.counts).answer for s in scenes]
    found = [parse_detections(answer, 64, 64) for answer in answers]
    truth = [s.objects for s in scenes]
    assert average_precision(found, truth) == pytest.approx(np.ones(10))


# Masks


def block(label, x0, y0, x1, y1, score=1.0):
    """A full rectangle in a picture of 30 × 30, found or true."""
    mask = np.zeros((30, 30), bool)
    mask[y0:y1, x0:x1] = True
    return Segmentation(
        label, (float(x0), float(y0), float(x1), float(y1)), mask, score
    )


def test_iou_by_hand():
    things = [block("owl", 0, 0, 4, 4)]
    assert object_ious([block("owl", 0, 0, 4, 4)], things) == [1.0]
    assert object_ious([block("owl", 0, 0, 4, 2)], things) == [0.5]
    assert object_ious([block("owl", 2, 0, 6, 4)], things) == [pytest.approx(8 / 24)]
    assert object_ious([block("owl", 9, 9, 12, 12)], things) == [0.0]
    assert object_ious([block("bat", 0, 0, 4, 4)], things) == [0.0]
    assert object_ious([], things) == [0.0]
    assert object_ious([block("owl", 0, 0, 4, 4)], []) == []


def test_a_true_thing_and_a_found_one_are_matched_once():
    things = [block("owl", 0, 0, 4, 4), block("owl", 4, 0, 8, 4)]
    both = block("owl", 0, 0, 8, 4)
    assert object_ious([both], things) == [0.5, 0.0]
    assert object_ious([block("owl", 0, 0, 4, 4)] * 2, things) == [1.0, 0.0]
    assert object_ious([both, block("owl", 4, 0, 8, 4)], things) == [0.5, 1.0]


def test_the_best_pair_goes_first():
    things = [block("owl", 0, 0, 10, 4), block("owl", 0, 0, 10, 8)]
    better, worse = block("owl", 0, 0, 10, 7), block("owl", 0, 0, 10, 6)
    ious = object_ious([worse, better], things)
    assert ious == [pytest.approx(4 / 6), pytest.approx(7 / 8)]


def test_order_changes_nothing_and_neither_does_what_is_too_much():
    rng = random.Random(0)
    matched = 0
    for _ in range(60):
        things, found = [], []
        for _ in range(5):
            x, y, label = rng.randrange(18), rng.randrange(18), rng.choice("ab")
            things.append(block(label, x, y, x + rng.randint(3, 12), y + 9))
            x, y = max(x + rng.randint(-2, 2), 0), max(y + rng.randint(-2, 2), 0)
            found.append(block(label, x, y, x + rng.randint(3, 12), y + 9))
        singles = [object_ious([f], [t])[0] for f in found for t in things]
        touching = [iou for iou in singles if iou]
        if len(set(touching)) < len(touching):
            continue  # among equal IoUs the first wins, whichever that is
        ious = object_ious(found, things)
        order = rng.sample(range(5), 5)
        shuffled = object_ious(rng.sample(found, 5), [things[i] for i in order])
        assert shuffled == [ious[i] for i in order]
        extra = [block("c", 0, 0, 30, 30), block("a", 29, 29, 30, 30)]
        assert object_ious([*extra, *found], things) == ious
        matched += sum(iou > 0 for iou in ious)
    assert matched > 50


def test_masks_of_different_sizes_are_refused():
    small = Segmentation("owl", (0.0, 0.0, 2.0, 2.0), np.ones((2, 2), bool))
    with pytest.raises(ValueError, match="different sizes"):
        object_ious([small], [block("owl", 0, 0, 4, 4)])


def test_the_mean_is_over_things_not_over_pictures():
    one = [block("owl", 0, 0, 4, 4)]
    three = [
        block("owl", 0, 0, 4, 4),
        block("bat", 8, 0, 12, 4),
        block("cow", 0, 9, 4, 12),
    ]
    found = [[block("owl", 0, 0, 4, 4)], [block("owl", 0, 0, 4, 2)]]
    assert mean_iou(found, [one, three]) == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert mean_iou([[], []], [one, three]) == 0
    assert mean_iou([[], found[1]], [[], three]) == pytest.approx(0.5 / 3)


def test_masks_for_fewer_pictures_are_refused():
    with pytest.raises(ValueError):
        mean_iou([[]], [[], []])


@pytest.mark.parametrize("found", [[[block("owl", 0, 0, 4, 4)]], [[]], []])
def test_a_mean_of_nothing_is_refused(found):
    with pytest.raises(ValueError):
        mean_iou(found, [[] for _ in found])


def test_a_mask_may_be_a_view():
    """Mirrored arrays have negative strides, which PyTorch doesn't take."""
    whole = block("owl", 0, 0, 4, 4)
    mirrored = Segmentation("owl", whole.box, whole.mask[:, ::-1], 1.0)
    assert mean_iou([[mirrored]], [[whole]]) == 0
    assert mean_iou([[mirrored]], [[mirrored]]) == 1


# False alarms, silence


def test_false_alarms_are_objects_whose_class_is_not_in_the_image():
    found = [[thing("owl"), thing("bat"), thing("bat")], [thing("owl")], []]
    assert false_alarms(found, [[thing("owl")] * 2, [thing("bat")], []]) == 1
    assert false_alarms([[]], [[thing()]]) == 0


def test_pycocotools_reports_nothing(capsys):
    average_precision([[thing()]], [[thing()]])
    assert capsys.readouterr() == ("", "")
