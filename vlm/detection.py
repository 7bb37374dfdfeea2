"""Boxes out of text: four loc tokens and a label become a Detection, or are refused.

Built in notebooks/27_detection.ipynb: edit it there, then run `make export`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log

from PIL import Image, ImageDraw, ImageFont

from .images import ImageLike, load_image
from .processing import Box, check_size, locs_to_box, segs_to_codes
from .sampling import Generation

__all__ = [
    "COLORS", "Detection", "ParsedObjects", "parse_objects", "parse_detections",
    "draw_detections",
]  # fmt: skip

# Okabe and Ito's palette: told apart by color-blind eyes too.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
PALE_COLORS = ("#E69F00", "#56B4E9", "#F0E442")  # black letters on these


@dataclass(frozen=True)
class Detection:
    """An object: label, box (x0, y0, x1, y1) in the image's pixels, score in 0…1."""

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
    """One object as it was written: its tokens, its label, and their score."""

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
    """The parts of an answer between the semicolons; an empty answer has none.

    Raises TypeError for anything but one answer, a string or a Generation.
    """
    if not isinstance(answer, (str, Generation)):
        raise TypeError(
            f"give one answer, a string or a Generation, not {type(answer).__name__}"
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


def parse_objects(
    answer: str | Generation, width: float, height: float, needs_mask: bool = False
) -> ParsedObjects:
    """The valid objects: (ObjectText, box in pixels, mask codes or None) each.

    `needs_mask`: an object without seg tokens isn't valid. Errors: `parse_detections`.
    """
    check_size(width, height)
    objects, valid, invalid = split_objects(answer), {}, 0
    for one in objects:
        box, codes = locs_to_box(one.locs, width, height), segs_to_codes(one.segs)
        has_valid_segs = codes is not None or not (one.segs or needs_mask)
        has_label = one.label and not re.search(r"<(loc|seg)\d+>", one.label)
        if box is not None and has_valid_segs and has_label:
            tokens = one.locs, one.segs, one.label  # the same for an exact repeat
            valid.setdefault(tokens, (one, box, codes))
        else:
            invalid += 1
    return ParsedObjects(valid.values(), invalid, len(objects) - invalid - len(valid))


def parse_detections(
    text: str | Generation, width: float, height: float
) -> ParsedObjects:
    """The answer to `detect …` → Detections with boxes in pixels of the image.

    `text`: the answer, or the Generation that holds it: then `score` is the geometric
    mean probability of the object's tokens, else 1. `width` and `height` are the
    original image's, upright.
    A valid object has exactly four loc tokens that make a box (end past start), none or
    sixteen seg tokens, and a label. What isn't valid is left out and counted in
    `.invalid`, never guessed; what is written again, token by token, is left out and
    counted in `.repeated`. Answers to `segment …` parse too: their boxes count here.
    Raises TypeError for a wrong type of answer, ValueError for a size that isn't one.
    """
    valid = parse_objects(text, width, height)
    detections = [Detection(one.label, box, one.score) for one, box, _ in valid]
    return ParsedObjects(detections, valid.invalid, valid.repeated)


def draw_detections(image: ImageLike, detections: Sequence[Detection]) -> Image.Image:
    """A copy of the image, upright and in RGB, with a box and a label for each object.

    Objects with the same label get the same color.
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
