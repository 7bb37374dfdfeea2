"""Prompts and answers about a scene, in PaliGemma's formats, and how to sample them.

Built in notebooks/17_scenes.ipynb: edit it there, then run `make export`.
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
from .scenes import Scene, all_kinds, find_kind

__all__ = [
    "EMPTY_CAPTION", "EncodeMask", "parse_caption", "Question", "caption_question",
    "count_question", "presence_question", "relation_questions", "absent_kind",
    "sample_question",
]  # fmt: skip

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")
EMPTY_CAPTION = "nothing I know"


def caption(scene: Scene) -> str:
    """What the scene shows, from left to right: `two owls, a pizza and an apple`.

    `EMPTY_CAPTION` for a scene without objects.
    """
    if not scene.objects:
        return EMPTY_CAPTION
    phrases = []
    for name, count in scene.counts.items():
        kind = find_kind(name)
        number = NUMBER_WORDS[count] if count < len(NUMBER_WORDS) else str(count)
        phrases.append(kind.with_article if count == 1 else f"{number} {kind.plural}")
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last


def parse_caption(text: str) -> Counter[str]:
    """The kinds that a caption names, with their counts; unknown words are ignored."""
    numbers = {word: n for n, word in enumerate(NUMBER_WORDS)} | {"a": 1, "an": 1}
    names = {kind.plural: kind.name for kind in all_kinds().values()}
    names |= {name: name for name in all_kinds()}
    counts: Counter[str] = Counter()
    for phrase in re.split(r",| and ", text):
        number, _, name = phrase.strip().partition(" ")
        if name in names and (number in numbers or number.isdecimal()):
            counts[names[name]] += int(numbers.get(number, number))
    return counts


EncodeMask = Callable[[Bool[np.ndarray, "h w"]], Sequence[int]]


def object_strings(
    scene: Scene, kinds: Iterable[str], encode_mask: EncodeMask | None = None
) -> str:
    """The answer to `detect a ; b`: each object's four loc tokens and label.

    From left to right; empty if the scene shows none of these kinds. With `encode_mask`
    (mask crop → 16 codes) it is the answer to `segment`. Raises ValueError for one name
    that isn't in a list.
    """
    if isinstance(kinds, str):
        raise ValueError(f"kinds must be a list of names: write [{kinds!r}]")
    kinds, size = set(kinds), scene.image.width
    answers = []
    for item in scene.objects:
        if item.kind in kinds:
            tokens = box_to_locs(item.box, size, size)
            if encode_mask is not None:
                tokens += codes_to_segs(encode_mask(item.cropped_mask))
            answers.append(f"{tokens} {item.kind}")
    return " ; ".join(answers)


RELATIONS = {  # relation → (axis of the box center, sign of the difference)
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}


def neighbor(
    scene: Scene, kind: str, relation: str, margin: float = 10.0
) -> str | None:
    """The answer to "what is `relation` the `kind`?", or None if it is ambiguous.

    The plane around the object is cut along its diagonals into four quadrants. The
    answer is the one kind whose center lies in the quadrant, or "nothing". Ambiguous:
    the scene doesn't show the kind exactly once, two objects share the quadrant, or one
    lies within `margin` degrees of its border. Raises ValueError for a relation that
    isn't in `RELATIONS`.
    """
    if relation not in RELATIONS:
        raise ValueError(f"unknown relation {relation!r}; expected {[*RELATIONS]}")
    if scene.counts.get(kind) != 1:
        return None
    anchor = next(item for item in scene.objects if item.kind == kind)
    axis, sign = RELATIONS[relation]
    found = []
    for item in scene.objects:
        if item is anchor:
            continue
        along = (item.center[axis] - anchor.center[axis]) * sign
        across = abs(item.center[1 - axis] - anchor.center[1 - axis])
        angle = math.degrees(math.atan2(across, along))  # 0: ahead, 180: behind
        if abs(angle - 45) < margin:
            return None
        if angle < 45:
            found.append(item.kind)
    if len(found) > 1:
        return None
    return found[0] if found else "nothing"


@dataclass(frozen=True)
class Question:
    """A prompt and its answer.

    `task` is caption, detect, segment, count, presence or relation.
    """

    task: str
    prompt: str
    answer: str


def caption_question(scene: Scene) -> Question:
    """`caption en`."""
    return Question("caption", "caption en", caption(scene))


def detect_question(scene: Scene, kinds: Sequence[str]) -> Question:
    """`detect owl ; pizza`; the scene needn't show them."""
    prompt = f"detect {' ; '.join(kinds)}"
    return Question("detect", prompt, object_strings(scene, kinds))


def segment_question(
    scene: Scene, kinds: Sequence[str], encode_mask: EncodeMask
) -> Question:
    """`segment owl`: boxes and masks."""
    prompt = f"segment {' ; '.join(kinds)}"
    return Question("segment", prompt, object_strings(scene, kinds, encode_mask))


def count_question(scene: Scene, kind: str) -> Question:
    """`answer en how many owls are there?`; ValueError for an unknown kind."""
    prompt = f"answer en how many {find_kind(kind).plural} are there?"
    return Question("count", prompt, str(scene.counts.get(kind, 0)))


def presence_question(scene: Scene, kind: str) -> Question:
    """`answer en is there an owl?`; ValueError for an unknown kind."""
    prompt = f"answer en is there {find_kind(kind).with_article}?"
    return Question("presence", prompt, "yes" if kind in scene.counts else "no")


def relation_questions(scene: Scene) -> list[Question]:
    """`answer en what is left of the owl?`: all that aren't ambiguous."""
    return [
        Question("relation", f"answer en what is {relation} the {kind}?", answer)
        for kind in scene.counts
        for relation in RELATIONS
        if (answer := neighbor(scene, kind, relation)) is not None
    ]


def _maybe_absent(scene: Scene, absent_prob: float, rng: random.Random) -> str:
    """A kind of the scene or, with `absent_prob`, one that it doesn't show."""
    if rng.random() < absent_prob or not scene.objects:
        return absent_kind(scene, rng)
    return rng.choice(list(scene.counts))


def _kinds_to_find(scene: Scene, most: int, rng: random.Random) -> list[str]:
    """One to `most` kinds of the scene; sometimes an absent one too, or alone."""
    if rng.random() < 0.1 or not scene.objects:
        return [absent_kind(scene, rng)]
    present = list(scene.counts)
    kinds = rng.sample(present, min(len(present), rng.randint(1, most)))
    if rng.random() < 0.1:
        kinds.append(absent_kind(scene, rng))
        rng.shuffle(kinds)
    return kinds


def absent_kind(scene: Scene, rng: random.Random) -> str:
    """A kind that the scene doesn't show."""
    names = list(all_kinds())
    while (name := rng.choice(names)) in scene.counts:
        pass
    return name


def sample_question(
    scene: Scene,
    task: str,
    rng: random.Random,
    encode_mask: EncodeMask | None = None,
) -> Question:
    """A question of `task` about a scene; `segment` needs `encode_mask`.

    Absent kinds are asked for too: in a fifth of `count`, in half of `presence`, and in
    `detect` and `segment` one time in ten alone and one in ten beside others. A scene
    without an unambiguous relation gets a presence question instead.

    Raises ValueError for an unknown task, and for `segment` without `encode_mask`.
    """
    if task == "caption":
        return caption_question(scene)
    if task == "detect":
        return detect_question(scene, _kinds_to_find(scene, 3, rng))
    if task == "segment" and encode_mask is not None:
        return segment_question(scene, _kinds_to_find(scene, 2, rng), encode_mask)
    if task == "count":
        return count_question(scene, _maybe_absent(scene, 0.2, rng))
    if task == "relation" and (questions := relation_questions(scene)):
        informative = [q for q in questions if q.answer != "nothing"]
        prefer = informative and rng.random() < 0.8
        return rng.choice(informative if prefer else questions)
    if task in ("relation", "presence"):
        return presence_question(scene, _maybe_absent(scene, 0.5, rng))
    raise ValueError(
        f"no question for task {task!r}: expected caption, detect, segment (with "
        "encode_mask), count, relation or presence"
    )
