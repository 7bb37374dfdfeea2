"""Four tokens become a box, drawn where the thing is.

Built in notebooks/22_detection.ipynb: edit it there, then run `make export`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

from PIL import Image, ImageDraw, ImageFont

from .processing import Box, ImageLike, load_image, locs_to_box, segs_to_codes
from .sampling import Generation

__all__ = [
    "COLORS",
    "PALE_COLORS",
    "Detection",
    "ParsedObjects",
    "ObjectText",
    "split_objects",
    "parse_detections",
    "draw_detections",
]

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
    """The valid objects of an answer; `invalid` counts those that were left out."""

    def __init__(self, objects: Sequence = (), invalid: int = 0):
        super().__init__(objects)
        self.invalid = invalid


_OBJECT = re.compile(r"\s*((?:<loc\d{4}>)*)((?:<seg\d{3}>)*)\s*(.*?)\s*$", re.DOTALL)


@dataclass(frozen=True)
class ObjectText:
    """One object as it was written: its tokens, label and the score of its tokens."""

    locs: str
    segs: str
    label: str
    score: float


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
    """The parts of an answer between the semicolons; an empty answer has none."""
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
    `.invalid`, never guessed. Answers to `segment …` parse too: their boxes count here.
    """
    found = split_objects(text)
    detections = []
    for thing in found:
        box = locs_to_box(thing.locs, width, height)
        segs_valid = not thing.segs or segs_to_codes(thing.segs) is not None
        label_valid = thing.label and not re.search(r"<(loc|seg)\d+>", thing.label)
        if box is not None and segs_valid and label_valid:
            detections.append(Detection(thing.label, box, thing.score))
    return ParsedObjects(detections, invalid=len(found) - len(detections))


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
