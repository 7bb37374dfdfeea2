"""Prompts and answers about a scene, in PaliGemma's formats, and how to sample them.

Built in notebooks/18_questions.ipynb: edit it there, then run `make export`.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .processing import box_to_locs, codes_to_segs
from .scenes import Scene, all_classes, with_article

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")
EMPTY_CAPTION = "nothing I know"  # of a scene without objects


def caption(scene: Scene) -> str:
    """What the scene shows, from left to right: `two owls, a pizza and an apple`."""
    if not scene.objects:
        return EMPTY_CAPTION
    phrases = []
    for name, count in scene.counts.items():
        number = NUMBER_WORDS[count] if count < len(NUMBER_WORDS) else count
        several = f"{number} {all_classes()[name]}"
        phrases.append(with_article(name) if count == 1 else several)
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last


def parse_caption(text: str) -> Counter[str]:
    """The classes that a caption names, with their counts; other words are ignored."""
    numbers = {word: n for n, word in enumerate(NUMBER_WORDS)} | {"a": 1, "an": 1}
    names = {plural: name for name, plural in all_classes().items()}
    names |= {name: name for name in all_classes()}
    counts: Counter[str] = Counter()
    for phrase in re.split(r",| and ", text):
        number, _, name = phrase.strip().partition(" ")
        if name in names and (number in numbers or number.isdecimal()):
            counts[names[name]] += int(numbers.get(number, number))
    return counts


# Bool masks, each cut out along its box → sixteen codes for each.
EncodeMasks = Callable[[Sequence[np.ndarray]], Sequence[Sequence[int]]]


def object_strings(
    scene: Scene, *labels: str, encode_masks: EncodeMasks | None = None
) -> str:
    """The answer to `detect a ; b`: each object's four loc tokens and label.

    From left to right; empty if the scene shows none of these classes. With
    `encode_masks` it is the answer to `segment`.
    """
    asked, size = [o for o in scene.objects if o.label in labels], scene.image.width
    tokens = [box_to_locs(item.box, size, size) for item in asked]
    if asked and encode_masks:
        segs = map(codes_to_segs, encode_masks([item.cropped_mask for item in asked]))
        tokens = [loc + seg for loc, seg in zip(tokens, segs, strict=True)]
    return " ; ".join(f"{t} {item.label}" for t, item in zip(tokens, asked))


# Relation → (axis of the box's center, sign of the difference)
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


def neighbor(scene: Scene, label: str, relation: str) -> str | None:
    """The answer to "what is `relation` the `label`?", or None if it is ambiguous.

    The object whose center lies in that quadrant around it, or "nothing". Ambiguous:
    not exactly one `label` in the scene, two objects in the quadrant, or one within
    10 degrees of its border. Raises KeyError for another relation.
    """
    axis, sign = RELATIONS[relation]
    if scene.counts.get(label) != 1:
        return None
    anchor = next(item for item in scene.objects if item.label == label)
    found = []
    for item in scene.objects:
        along = (item.center[axis] - anchor.center[axis]) * sign
        across = abs(item.center[1 - axis] - anchor.center[1 - axis])
        angle = math.degrees(math.atan2(across, along))  # 0: ahead, 180: behind
        if abs(angle - 45) < 10:
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


def make_question(
    scene: Scene, task: str, *labels: str, encode_masks: EncodeMasks | None = None
) -> Question:
    """A question about classes, whether the scene shows them or not.

    `caption en` ignores them, `detect owl ; pizza` and `segment owl` take one or more,
    and `answer en how many owls are there?` ("count") and `answer en is there an owl?`
    ("presence") take one: KeyError for an unknown class, ValueError for another number.
    Raises ValueError for another task, and for `segment` without `encode_masks`.
    """
    prompt = f"{task} {' ; '.join(labels)}"
    if task == "caption":
        return Question(task, "caption en", caption(scene))
    if task == "detect":
        return Question(task, prompt, object_strings(scene, *labels))
    if task == "segment" and encode_masks:
        answer = object_strings(scene, *labels, encode_masks=encode_masks)
        return Question(task, prompt, answer)
    if task not in ("count", "presence"):
        raise ValueError(f"no question for task {task!r}; segment needs encode_masks")
    (label,) = labels
    plural, count = all_classes()[label], scene.counts.get(label, 0)
    if task == "count":
        return Question(task, f"answer en how many {plural} are there?", str(count))
    prompt = f"answer en is there {with_article(label)}?"
    return Question(task, prompt, "yes" if count else "no")


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


def sample_question(
    scene: Scene, task: str, rng: random.Random, encode_masks: EncodeMasks | None = None
) -> Question:
    """A question of `task` about a scene; `segment` needs `encode_masks`.

    Absent classes are asked for too: in a fifth of `count`, in half of `presence`, and
    in `detect` and `segment` one time in ten alone and one in ten beside others.
    Without an unambiguous relation, presence is asked for. Raises as `make_question`.
    """
    if task == "relation" and (questions := relation_questions(scene)):
        informative = [q for q in questions if q.answer != "nothing"]
        prefer = informative and rng.random() < 0.8  # else "nothing" is five of six
        return rng.choice(informative if prefer else questions)
    task = "presence" if task == "relation" else task
    present = list(scene.counts)
    absent_prob = {"count": 0.2, "presence": 0.5}.get(task, 0.1)
    if task == "caption":
        labels = []
    elif rng.random() < absent_prob or not present:
        labels = [absent_class(scene, rng)]
    elif task in ("count", "presence"):
        labels = [rng.choice(present)]
    else:
        most = rng.randint(1, 3 if task == "detect" else 2)  # masks: longer answers
        labels = rng.sample(present, min(len(present), most))
        if rng.random() < 0.1:
            labels.append(absent_class(scene, rng))
            rng.shuffle(labels)
    return make_question(scene, task, *labels, encode_masks=encode_masks)
