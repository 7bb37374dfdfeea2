"""Prompts and answers about a scene, in PaliGemma's formats, and how to sample them.

Built in notebooks/18_questions.ipynb: edit it there, then run `make export`.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from .processing import box_to_locs, codes_to_segs
from .scenes import Scene, all_classes

__all__ = [
    "EMPTY_CAPTION", "MaskToCodes", "parse_caption", "Question", "caption_question",
    "count_question", "presence_question", "relation_questions", "absent_class",
    "sample_question",
]  # fmt: skip

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")
EMPTY_CAPTION = "nothing I know"  # of a scene without objects


def caption(scene: Scene) -> str:
    """What the scene shows, from left to right: `two owls, a pizza and an apple`."""
    if not scene.objects:
        return EMPTY_CAPTION
    phrases = []
    for name, count in scene.counts.items():
        one = all_classes()[name]
        number = NUMBER_WORDS[count] if count < len(NUMBER_WORDS) else str(count)
        phrases.append(one.with_article if count == 1 else f"{number} {one.plural}")
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last


def parse_caption(text: str) -> Counter[str]:
    """The classes that a caption names, with their counts; other words are ignored."""
    numbers = {word: n for n, word in enumerate(NUMBER_WORDS)} | {"a": 1, "an": 1}
    names = {one.plural: one.name for one in all_classes().values()}
    names |= {name: name for name in all_classes()}
    counts: Counter[str] = Counter()
    for phrase in re.split(r",| and ", text):
        number, _, name = phrase.strip().partition(" ")
        if name in names and (number in numbers or number.isdecimal()):
            counts[names[name]] += int(numbers.get(number, number))
    return counts


MaskToCodes = Callable[[Bool[np.ndarray, "h w"]], Sequence[int]]  # cut out → 16 codes


def object_strings(
    scene: Scene, labels: Iterable[str], encode_mask: MaskToCodes | None = None
) -> str:
    """The answer to `detect a ; b`: each object's four loc tokens and label.

    From left to right; empty if the scene shows none of these classes. With
    `encode_mask` it is the answer to `segment`. Raises ValueError for a lone string.
    """
    if isinstance(labels, str):
        raise ValueError(f"labels must be a list of names: write [{labels!r}]")
    labels, size = set(labels), scene.image.width
    answers = []
    for item in scene.objects:
        if item.label in labels:
            tokens = box_to_locs(item.box, size, size)
            if encode_mask is not None:
                tokens += codes_to_segs(encode_mask(item.cropped_mask))
            answers.append(f"{tokens} {item.label}")
    return " ; ".join(answers)


# Relation → (axis of the box's center, sign of the difference)
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


def neighbor(
    scene: Scene, label: str, relation: str, margin: float = 10.0
) -> str | None:
    """The answer to "what is `relation` the `label`?", or None if it is ambiguous.

    The object whose center lies in that quadrant around it, or "nothing". Ambiguous:
    not exactly one `label` in the scene, two objects in the quadrant, or one within
    `margin` degrees of its border. Raises ValueError for another relation.
    """
    if relation not in RELATIONS:
        raise ValueError(f"unknown relation {relation!r}; expected {[*RELATIONS]}")
    if scene.counts.get(label) != 1:
        return None
    anchor = next(item for item in scene.objects if item.label == label)
    axis, sign = RELATIONS[relation]
    found = []
    for item in scene.objects:
        along = (item.center[axis] - anchor.center[axis]) * sign
        across = abs(item.center[1 - axis] - anchor.center[1 - axis])
        angle = math.degrees(math.atan2(across, along))  # 0: ahead, 180: behind
        if abs(angle - 45) < margin:
            return None
        if angle < 45 and item is not anchor:
            found.append(item.label)
    if len(found) > 1:
        return None
    return found[0] if found else "nothing"


@dataclass(frozen=True)
class Question:
    """A prompt and its answer."""

    task: str  # caption, detect, segment, count, presence or relation
    prompt: str
    answer: str


def caption_question(scene: Scene) -> Question:
    """`caption en`."""
    return Question("caption", "caption en", caption(scene))


def detect_question(scene: Scene, labels: Sequence[str]) -> Question:
    """`detect owl ; pizza`; the scene needn't show them."""
    prompt = f"detect {' ; '.join(labels)}"
    return Question("detect", prompt, object_strings(scene, labels))


def segment_question(
    scene: Scene, labels: Sequence[str], encode_mask: MaskToCodes
) -> Question:
    """`segment owl`: boxes and masks."""
    prompt = f"segment {' ; '.join(labels)}"
    return Question("segment", prompt, object_strings(scene, labels, encode_mask))


def count_question(scene: Scene, label: str) -> Question:
    """`answer en how many owls are there?`"""
    prompt = f"answer en how many {all_classes()[label].plural} are there?"
    return Question("count", prompt, str(scene.counts.get(label, 0)))


def presence_question(scene: Scene, label: str) -> Question:
    """`answer en is there an owl?`"""
    prompt = f"answer en is there {all_classes()[label].with_article}?"
    return Question("presence", prompt, "yes" if label in scene.counts else "no")


def relation_questions(scene: Scene) -> list[Question]:
    """`answer en what is left of the owl?`: all that aren't ambiguous."""
    return [
        Question("relation", f"answer en what is {relation} the {label}?", answer)
        for label in scene.counts
        for relation in RELATIONS
        if (answer := neighbor(scene, label, relation)) is not None
    ]


def absent_class(scene: Scene, rng: random.Random) -> str:
    """The name of a class that the scene doesn't show."""
    names = list(all_classes())
    while (name := rng.choice(names)) in scene.counts:
        pass
    return name


def _maybe_absent(scene: Scene, absent_prob: float, rng: random.Random) -> str:
    """A class of the scene or, with `absent_prob`, one that it doesn't show."""
    if rng.random() < absent_prob or not scene.objects:
        return absent_class(scene, rng)
    return rng.choice(list(scene.counts))


def _classes_to_find(scene: Scene, most: int, rng: random.Random) -> list[str]:
    """One to `most` classes of the scene; sometimes an absent one too, or alone."""
    if rng.random() < 0.1 or not scene.objects:
        return [absent_class(scene, rng)]
    present = list(scene.counts)
    labels = rng.sample(present, min(len(present), rng.randint(1, most)))
    if rng.random() < 0.1:
        labels.append(absent_class(scene, rng))
        rng.shuffle(labels)
    return labels


def sample_question(
    scene: Scene, task: str, rng: random.Random, encode_mask: MaskToCodes | None = None
) -> Question:
    """A question of `task` about a scene; `segment` needs `encode_mask`.

    Absent classes are asked for too: in a fifth of `count`, in half of `presence`, and
    in `detect` and `segment` one time in ten alone and one in ten beside others.
    Without an unambiguous relation, presence is asked for. Raises ValueError for
    another task, and for `segment` without `encode_mask`.
    """
    if task == "caption":
        return caption_question(scene)
    if task == "detect":
        return detect_question(scene, _classes_to_find(scene, 3, rng))
    if task == "segment" and encode_mask is not None:  # longer answers: fewer classes
        return segment_question(scene, _classes_to_find(scene, 2, rng), encode_mask)
    if task == "count":
        return count_question(scene, _maybe_absent(scene, 0.2, rng))
    if task == "relation" and (questions := relation_questions(scene)):
        informative = [q for q in questions if q.answer != "nothing"]
        prefer = informative and rng.random() < 0.8  # else "nothing" is five of six
        return rng.choice(informative if prefer else questions)
    if task in ("relation", "presence"):
        return presence_question(scene, _maybe_absent(scene, 0.5, rng))
    raise ValueError(f"no question for task {task!r}; segment needs encode_mask")
