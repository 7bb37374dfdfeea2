"""Boxes out of text: four loc tokens and a label become a Detection, or are refused.

Built in notebooks/27_detection.ipynb: edit it there, then run `make export`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .images import ImageLike, load_image
from .processing import Box, check_size, locs_to_box, segs_to_codes
from .sampling import Generation

# Okabe and Ito's palette: told apart by color-blind eyes too.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
PALE_COLORS = ("#E69F00", "#56B4E9", "#F0E442")  # black letters on these


@dataclass(frozen=True)
class Detection:
    """An object: label, box (x0, y0, x1, y1) in the image's pixels, score in 0…1.

    `codes`: the sixteen of its mask, where there are seg tokens; pixels in chapter 29.
    """

    label: str
    box: Box
    score: float = 1.0
    codes: list | None = field(default=None, repr=False, compare=False)


class ParsedObjects(list):
    """The valid objects of an answer, each once; what was left out is counted."""

    invalid = 0  # objects that aren't valid
    repeated = 0  # the same tokens and the same label once more


# Loc tokens, seg tokens, label: no space around them, and a semicolon ends them.
_OBJECT = re.compile(
    r"(?=[^;\s])((?:<loc\d{4}>)*)((?:<seg\d{3}>)*)\s*([^;]*?)\s*(?=;|\Z)"
)


def _score(answer: str | Generation, start: int, end: int) -> float:
    "Geometric mean probability of the tokens that wrote characters start…end - 1."
    if isinstance(answer, str):
        return 1.0
    logs, place = [], 0
    for piece, probability in zip(answer.pieces, answer.probabilities, strict=True):
        if place < end and place + (len(piece) or 1) > start:  # "": part of a character
            logs.append(log(max(probability, 1e-12)))
        place += len(piece)
    return exp(sum(logs) / len(logs))


def parse_detections(
    text: str | Generation, width: float, height: float, needs_codes: bool = False
) -> ParsedObjects:
    """The answer to `detect …` → Detections with boxes in pixels of the image.

    `text`: the answer, or the Generation that holds it: then `score` is the geometric
    mean probability of the object's tokens, else 1. `width` and `height` are the
    original image's, upright.
    A valid object has exactly four loc tokens that make a box (end past start), sixteen
    seg tokens (or none, unless it `needs_codes`), and a label. What isn't valid is left
    out and counted in `.invalid`, never guessed; what is written again, token by token,
    is left out and counted in `.repeated`. Answers to `segment …` parse too.
    Raises TypeError for a wrong type of answer, ValueError for a size that isn't one.
    """
    if not isinstance(text, str | Generation):
        kind = type(text).__name__
        raise TypeError(f"give one answer, a string or a Generation, not {kind}")
    check_size(width, height)
    found, seen = ParsedObjects(), set()
    for match in _OBJECT.finditer(text if isinstance(text, str) else text.text):
        locs, segs, label = tokens = match.groups()
        box, codes = locs_to_box(locs, width, height), segs_to_codes(segs)
        has_valid_segs = codes is not None or not (segs or needs_codes)
        has_label = label and not re.search(r"<(loc|seg)\d+>", label)
        if box is None or not has_valid_segs or not has_label:
            found.invalid += 1
        elif tokens in seen:
            found.repeated += 1
        else:
            seen.add(tokens)
            score = _score(text, match.start(), match.end(3))
            found.append(Detection(label, box, score, codes))
    return found


def _paint_mask(image: Image.Image, one: Any, color: str, unit: int) -> None:
    "Tint the mask's pixels of the image, and draw its outline, `unit` pixels wide."
    if one.mask.shape != (image.height, image.width):
        wide, high = one.mask.shape[::-1]
        raise ValueError(
            f"the mask of {one.label!r} is {wide} × {high}, the image {image.width} × "
            f"{image.height}: parse the answer with its own width and height"
        )
    inside = Image.fromarray(one.mask.astype(np.uint8) * 255)  # [H, W]
    # Blurred, a mask is full only where nothing but mask is near.
    near = np.asarray(inside.filter(ImageFilter.BoxBlur(unit)))
    edge = Image.fromarray((one.mask & (near < 255)).astype(np.uint8) * 255)
    image.paste(color, mask=inside.point(lambda value: value * 2 // 5))
    image.paste(color, mask=edge)


def draw_objects(image: ImageLike, objects: Sequence[Any]) -> Image.Image:
    """A copy of the image, upright and in RGB: boxes with labels, and masks, if any.

    Objects with the same label get the same color. Raises ValueError for a mask of
    another size than the image's.
    """
    image = load_image(image)
    unit = max(1, round(min(image.size) / 160))
    font = ImageFont.load_default(size=max(10, 7 * unit))
    labels = list(dict.fromkeys(one.label for one in objects))
    colors = [COLORS[labels.index(one.label) % len(COLORS)] for one in objects]
    for one, color in zip(objects, colors):
        if hasattr(one, "mask"):
            _paint_mask(image, one, color, unit)
    draw = ImageDraw.Draw(image)
    for one, color in zip(objects, colors):
        x0, y0, x1, y1 = one.box
        # A box ends where the next pixel begins; its last pixel is the one before.
        corner = (max(x1 - 1, x0), max(y1 - 1, y0))
        draw.rectangle((x0, y0, *corner), outline=color, width=2 * unit)
        left, top, right, bottom = draw.textbbox((0, 0), one.label, font=font)
        wide, tall = right - left + 4 * unit, bottom - top + 4 * unit
        x = min(max(x0, 0), max(image.width - wide, 0))
        y = y0 - tall if y0 >= tall else min(y0, max(image.height - tall, 0))
        draw.rectangle((x, y, x + wide, y + tall), fill=color)
        ink = "black" if color in PALE_COLORS else "white"
        place = (x + 2 * unit - left, y + 2 * unit - top)
        draw.text(place, one.label, fill=ink, font=font)
    return image
