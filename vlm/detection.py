"""Four tokens become a box, drawn where the thing is.

Built in notebooks/27_detection.ipynb: edit it there, then run `make export`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np
from jaxtyping import Bool, Float, Num
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .images import ImageLike, load_image
from .processing import Box, check_size, locs_to_box, segs_to_codes
from .sampling import Generation

__all__ = [
    "COLORS", "Detection", "ParsedObjects", "split_objects", "parse_detections",
    "draw_detections", "average_precision",
]  # fmt: skip

# Okabe and Ito's palette: told apart by color-blind eyes too.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
PALE_COLORS = ("#E69F00", "#56B4E9", "#F0E442")  # black letters on these


@dataclass(frozen=True)
class Detection:
    """A thing: its label, its box (x0, y0, x1, y1) in the picture's pixels, a score."""

    label: str
    box: Box
    score: float = 1.0


class ParsedObjects(list):
    """The valid objects of an answer, each once.

    What was left out is counted: `invalid` objects, and those that were `repeated`,
    the same tokens and the same label once more.
    """

    def __init__(self, objects: Iterable = (), invalid: int = 0, repeated: int = 0):
        super().__init__(objects)
        self.invalid = invalid
        self.repeated = repeated


_OBJECT = re.compile(r"\s*((?:<loc\d{4}>)*)((?:<seg\d{3}>)*)\s*(.*?)\s*$", re.DOTALL)


@dataclass(frozen=True)
class ObjectText:
    """One object as it was written: its tokens, label and the score of its tokens."""

    locs: str
    segs: str
    label: str
    score: float

    @property
    def tokens(self) -> tuple[str, str, str]:
        """What was written, without its score: the same for an exact repeat."""
        return self.locs, self.segs, self.label

    @property
    def is_named(self) -> bool:
        """Whether there is a label, without stray loc or seg tokens in it."""
        return bool(self.label) and not re.search(r"<(loc|seg)\d+>", self.label)


def _score(answer: str | Generation, start: int, end: int) -> float:
    "Geometric mean probability of the tokens that wrote characters start…end - 1."
    if isinstance(answer, str):
        return 1.0
    logs, place = [], 0
    for piece, probability in zip(answer.pieces, answer.probabilities, strict=True):
        if piece and place < end and place + len(piece) > start:
            logs.append(log(max(probability, 1e-12)))
        place += len(piece)
    return exp(sum(logs) / len(logs)) if logs else 1.0


def split_objects(answer: str | Generation) -> list[ObjectText]:
    """The parts of an answer between the semicolons; an empty answer has none.

    Raises TypeError for anything but one answer, a string or a Generation.
    """
    if not isinstance(answer, (str, Generation)):
        raise TypeError(
            "give one answer, a string or what generate_tokens returns for a row, not "
            f"{type(answer).__name__}"
        )
    text = answer if isinstance(answer, str) else answer.text
    objects = []
    for part in re.finditer(r"[^;]+", text):
        if part.group().strip():
            match = _OBJECT.match(part.group())
            # Separators and spaces around the object don't count for its score.
            start, end = part.start() + match.start(1), part.start() + match.end(3)
            objects.append(ObjectText(*match.groups(), _score(answer, start, end)))
    return objects


def parse_detections(
    text: str | Generation, width: float, height: float
) -> ParsedObjects:
    """The answer to `detect …` → Detections with boxes in pixels of the picture.

    `text`: the answer, or the Generation that holds it: then `score` is the geometric
    mean probability of the object's tokens, else 1. `width` and `height` are the
    original picture's, upright.
    A valid object has exactly four loc tokens that make a box (end past start), none or
    sixteen seg tokens, and a label. What isn't valid is left out and counted in
    `.invalid`, never guessed; what is written again, token by token, is left out and
    counted in `.repeated`. Answers to `segment …` parse too: their boxes count here.
    Raises TypeError for what is no answer, ValueError for what is no picture's size.
    """
    check_size(width, height)
    found = split_objects(text)
    detections, invalid = {}, 0
    for thing in found:
        box = locs_to_box(thing.locs, width, height)
        segs_valid = not thing.segs or segs_to_codes(thing.segs) is not None
        if box is not None and segs_valid and thing.is_named:
            detection = Detection(thing.label, box, thing.score)
            detections.setdefault(thing.tokens, detection)
        else:
            invalid += 1
    repeated = len(found) - invalid - len(detections)
    return ParsedObjects(detections.values(), invalid, repeated)


def draw_detections(image: ImageLike, detections: Sequence[Detection]) -> Image.Image:
    """A copy of the picture, upright and in RGB, with boxes and labels drawn on it.

    Things with the same label get the same color.
    """
    image = load_image(image)
    draw = ImageDraw.Draw(image)
    unit = max(1, round(min(image.size) / 160))
    font = ImageFont.load_default(size=max(10, 7 * unit))
    labels = list(dict.fromkeys(d.label for d in detections))
    for detection in detections:
        color = COLORS[labels.index(detection.label) % len(COLORS)]
        x0, y0, x1, y1 = detection.box
        # A box ends where the next pixel begins; its last pixel is the one before.
        corner = (max(x1 - 1, x0), max(y1 - 1, y0))
        draw.rectangle((x0, y0, *corner), outline=color, width=2 * unit)
        left, top, right, bottom = draw.textbbox((0, 0), detection.label, font=font)
        wide, tall = right - left + 4 * unit, bottom - top + 4 * unit
        x = min(max(x0, 0), max(image.width - wide, 0))
        y = y0 - tall if y0 >= tall else min(y0, max(image.height - tall, 0))
        draw.rectangle((x, y, x + wide, y + tall), fill=color)
        ink = "black" if color in PALE_COLORS else "white"
        place = (x + 2 * unit - left, y + 2 * unit - top)
        draw.text(place, detection.label, fill=ink, font=font)
    return image


Boxes = Sequence[Box] | Num[np.ndarray, "_ 4"] | Num[Tensor, "_ 4"]


def box_iou(a: Boxes, b: Boxes) -> Float[np.ndarray, "M N"]:
    """Intersection over union of each of M boxes with each of N.

    A box is (x0, y0, x1, y1), in any unit; boxes come as a list, an array or a tensor
    (on the CPU). A box without area has an IoU of 0 with every other. Raises ValueError
    for anything but four numbers a box.
    """
    a, b = (np.asarray(boxes, dtype=np.float64) for boxes in (a, b))
    for boxes in (a, b):
        if boxes.size and boxes.shape[1:] != (4,):
            raise ValueError(f"boxes are [M, 4], four numbers each, not {boxes.shape}")
    a, b = a.reshape(-1, 4), b.reshape(-1, 4)  # no boxes: [0, 4]
    start = np.maximum(a[:, None, :2], b[:, :2])  # [M, N, 2]
    end = np.minimum(a[:, None, 2:], b[:, 2:])  # [M, N, 2]
    shared = (end - start).clip(min=0).prod(axis=-1)  # [M, N]
    area_a, area_b = ((c[:, 2:] - c[:, :2]).prod(axis=-1) for c in (a, b))
    union = area_a[:, None] + area_b - shared  # [M, N]
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def match_boxes(iou: Float[np.ndarray, "M N"], limit: float) -> Bool[np.ndarray, "M"]:
    """Which of M boxes, the surest first, are right: get one of N true boxes each.

    A box takes the one that it overlaps most, among those still free, if their IoU
    reaches the limit. (Of equals the last, as in pycocotools.)
    """
    right = np.zeros(len(iou), dtype=bool)
    free = np.ones(iou.shape[1], dtype=bool)
    for rank, overlaps in enumerate(iou):
        options = np.flatnonzero(free & (overlaps >= limit))
        if len(options):
            chosen = max(options, key=lambda column: (overlaps[column], column))
            right[rank], free[chosen] = True, False
    return right


IOU_LIMITS = np.linspace(0.5, 0.95, 10)
# COCO's marks to the last digit: 35 * 0.01 is a hair over 0.35, and 7 / 20 isn't.
RECALLS = np.linspace(0, 1, 101)
MAX_DETECTIONS = 100  # of a kind in a picture; what ranks lower isn't looked at


def interpolated_precision(
    right: Bool[np.ndarray, "R"], num_true: int
) -> Float[np.ndarray, "101"]:
    """The best precision at each recall 0, 0.01 … 1 or more; 0 where none gets there.

    `right`: the boxes of a kind, the surest first; `num_true` ≥ 1 are there to find.
    """
    hits = right.cumsum()  # [R]
    precision = hits / np.arange(1, len(right) + 1)
    recall = hits / num_true
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # best from here on
    return np.append(envelope, 0.0)[recall.searchsorted(RECALLS)]  # [101]


def rank_boxes(
    found: Sequence[Sequence[Detection]],
    truth: Sequence[Sequence[Detection]],
    label: str,
    limits: Sequence[float] | Float[np.ndarray, "L"] = IOU_LIMITS,
) -> tuple[Bool[np.ndarray, "L R"], int]:
    """The R boxes of a label in all pictures, the surest first: right at each limit?

    With it comes the number of true boxes of that label. At most `MAX_DETECTIONS` of a
    picture count. Ties stay in the order of the pictures, then of the answer.
    """
    scores, right, num_true = [], [np.zeros((len(limits), 0), dtype=bool)], 0
    for answers, things in zip(found, truth, strict=True):
        true = [thing.box for thing in things if thing.label == label]
        mine = [d for d in answers if d.label == label]
        mine = sorted(mine, key=lambda d: d.score, reverse=True)[:MAX_DETECTIONS]
        if mine:
            iou = box_iou([d.box for d in mine], true)  # [M, N]
            right.append(np.stack([match_boxes(iou, limit) for limit in limits]))
        scores += [d.score for d in mine]
        num_true += len(true)
    order = np.argsort(-np.array(scores), kind="stable")
    return np.concatenate(right, axis=1)[:, order], num_true


def average_precision(
    found: Sequence[Sequence[Detection]],
    truth: Sequence[Sequence[Detection]],
    limits: Sequence[float] | Float[np.ndarray, "L"] = IOU_LIMITS,
) -> Float[np.ndarray, "L"]:
    """Average precision by COCO's rules at each IoU limit, the mean over the kinds.

    `found` and `truth`: for each picture its boxes; a true box's score plays no part.
    With the default limits the first value is AP50, the mean of all ten AP50:95.
    Kinds without a true box are left out. Source: Lin et al. 2014, and pycocotools.
    Raises ValueError for unequal numbers of pictures, and where no true box is given.
    """
    if len(found) != len(truth):
        raise ValueError(
            f"answers for {len(found)} pictures, truth for {len(truth)}: give a list "
            "of boxes for each picture, an empty one where there are none"
        )
    labels = sorted({thing.label for things in truth for thing in things})
    if not labels:
        raise ValueError("no picture has a true box: there is no recall to measure")
    by_label = []
    for label in labels:
        right, num_true = rank_boxes(found, truth, label, limits)  # [L, R]
        curves = [interpolated_precision(row, num_true) for row in right]
        by_label.append([curve.mean() for curve in curves])
    return np.mean(by_label, axis=0)  # [K, L] → [L]
