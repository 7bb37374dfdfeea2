"""Where the model looked while it wrote: step through the answer's tokens."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from IPython.display import HTML
from PIL import Image
from torch.nn import functional as F

from vlm.figures.page import data_uri, style_and_script, unique_id
from vlm.images import ImageLike, load_image
from vlm.processing import NUM_LOCS

if TYPE_CHECKING:
    from vlm.captioning import AttentionMaps

SIDE = 360  # the picture's longest side on the page, in CSS pixels
MOST_CELLS = 32  # a finer grid is averaged down to this, to keep the page light
MOST_CHARACTERS = 40_000  # of the picture, as text
STRIP = 6  # tokens shown where scripts don't run
VEIL = (16, 21, 27)  # what isn't looked at goes dark


@dataclass(frozen=True)
class Marks:
    """What a token draws over the picture; coordinates in marks of 0…1023."""

    lines: list[tuple[str, int]]  # ("y", 300): the last one is the token's own
    boxes: list[tuple[int, int, int, int]]  # y0, x0, y1, x1; finished ones
    own: bool  # whether the last line is this token's, not an earlier one's


def _picture(image: Image.Image) -> str:
    """The picture as a small JPEG in the page itself."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    for quality in (88, 75, 60, 40):
        picture = data_uri(small, "jpeg", quality=quality)
        if len(picture) <= MOST_CHARACTERS:
            break
    return picture


def _veil(weights: np.ndarray) -> str:
    """A picture of one pixel a patch: clear at the largest weight, dark at none."""
    shown = weights / max(float(weights.max()), 1e-12)
    pixels = np.empty((*weights.shape, 4), np.uint8)
    pixels[..., :3] = VEIL
    pixels[..., 3] = np.round(215 * (1 - shown**0.6) / 5) * 5
    return data_uri(Image.fromarray(pixels))


def loc_marks(pieces: list[str]) -> list[Marks]:
    """What each token draws: its own line, those before it, and the finished boxes.

    Within an object the order is y0 x0 y1 x1; any other token ends the object. A box
    that is turned inside out isn't drawn.
    """
    marks, lines, boxes = [], [], []
    for piece in pieces:
        match = re.fullmatch(r"\s*<loc(\d{4})>\s*", piece)
        own = bool(match) and int(match[1]) < NUM_LOCS
        if own:
            if len(lines) == 4:
                lines = []
            lines = [*lines, ("yx"[len(lines) % 2], int(match[1]))]
            if len(lines) == 4:
                y0, x0, y1, x1 = (value for _, value in lines)
                if y1 > y0 and x1 > x0:
                    boxes = [*boxes, (y0, x0, y1, x1)]
        else:
            lines = []
        marks.append(Marks(lines, boxes, own))
    return marks


def _drawn(marks: Marks, width: float, height: float) -> dict[str, list]:
    """Lines [x0, y0, x1, y1] and boxes [x, y, width, height] in the drawing's units."""
    last = NUM_LOCS - 1
    lines = []
    for axis, value in marks.lines:
        at = round(value / last * (height if axis == "y" else width), 1)
        line = [0, at, width, at] if axis == "y" else [at, 0, at, height]
        lines.append(line)
    boxes = []
    for y0, x0, y1, x1 in marks.boxes:
        box = (x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height)
        boxes.append([round(value / last, 1) for value in box])
    return {"lines": lines, "boxes": boxes}


def _svg_marks(drawn: dict) -> str:
    style = 'fill="none" vector-effect="non-scaling-stroke"'
    lines = "".join(
        f'<line x1="{a}" y1="{b}" x2="{c}" y2="{d}" stroke="#fff" '
        f'stroke-width="1.5" {style}/>'
        for a, b, c, d in drawn["lines"]
    )
    boxes = "".join(
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" stroke="#fff" '
        f'stroke-width="2" {style}/>'
        for x, y, w, h in drawn["boxes"]
    )
    return lines + boxes


def visible(piece: str) -> str:
    """A token's text as a button shows it: spaces and line ends can be seen."""
    return piece.strip(" ").replace("\n", "⏎") or "␣" * len(piece)


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def attention_over_picture(image: ImageLike, maps: AttentionMaps) -> HTML:
    """The picture, dark where the model didn't look, for each token that it wrote.

    Hover over a token, click it, or use the arrow keys. A loc token also draws its
    coordinate as a line, and the fourth closes the box. The clearest patch is the one
    with the token's largest weight, whatever that weight is; the share of attention
    that goes to the picture at all stands below. Needs no kernel and no network; where
    scripts don't run, the first tokens stand side by side.
    """
    image = load_image(image)
    weights = maps.attention.float()  # [T, side, side]
    if weights.shape[-1] > MOST_CELLS:
        weights = F.adaptive_avg_pool2d(weights, MOST_CELLS)
    weights = weights.cpu().numpy()
    shares = maps.attention.float().sum(dim=(1, 2)).tolist()  # [T]
    mean_share = sum(shares) / len(shares)
    unit = 1000 / max(image.size)
    width, height = (round(side * unit, 1) for side in image.size)
    everything = {"lines": [], "boxes": []}
    steps = [
        {
            "name": "all tokens",
            "veil": _veil(weights.mean(axis=0)),
            "note": f"All {len(maps.pieces)} tokens together: {_share(mean_share)} of "
            "their attention is on the picture.",
            "own": False,
            **everything,
        }
    ]
    for i, (piece, marks) in enumerate(zip(maps.pieces, loc_marks(maps.pieces))):
        name = visible(piece)
        steps.append(
            {
                "name": name,
                "veil": _veil(weights[i]),
                "note": f"“{name}”, token {i + 1} of {len(maps.pieces)}: probability "
                f"{maps.probabilities[i]:.2f}; {_share(shares[i])} of its attention "
                "is on the picture.",
                "own": marks.own,
                **_drawn(marks, width, height),
            }
        )
    data = json.dumps(steps, ensure_ascii=False).replace("<", "\\u003c")
    picture = _picture(image)
    name = unique_id("vlm-look", data + picture)

    def stage(step: dict) -> str:
        return (
            f'<image class="vlm-look-veil" href="{step["veil"]}" width="{width}" '
            f'height="{height}" preserveAspectRatio="none" '
            'style="image-rendering:pixelated"/>'
            f'<g class="vlm-look-marks">{_svg_marks(step)}</g>'
        )

    wide = round(SIDE * image.width / max(image.size))
    box = f'viewBox="0 0 {width} {height}"'
    answer = "".join(maps.pieces)
    label = f"Where the model looked. Prompt: {maps.prompt}. Answer: {answer}"
    main = (
        f'<svg class="vlm-look-stage" {box} role="img" aria-label="{escape(label)}" '
        f'style="flex:0 1 {wide}px;width:100%;max-width:{wide}px">'
        f'<image id="{name}-picture" href="{picture}" width="{width}" '
        f'height="{height}" preserveAspectRatio="none"/>{stage(steps[0])}</svg>'
    )
    buttons = "".join(
        f'<button type="button" aria-pressed="{str(i == 0).lower()}" '
        f'tabindex="{0 if i == 0 else -1}">{escape(step["name"])}</button>'
        for i, step in enumerate(steps)
    )
    strip = "".join(
        f'<div><svg {box} width="84" aria-hidden="true"><use href="#{name}-picture"/>'
        f"{stage(step)}</svg><br>{escape(step['name'])}</div>"
        for step in steps[1 : STRIP + 1]
    )
    style, script = style_and_script("attention", name)
    return HTML(
        f'{style}<figure id="{name}" class="vlm-look"><div>{main}'
        '<div class="vlm-look-side"><div class="vlm-look-prompt">Prompt: '
        f"<code>{escape(maps.prompt)}</code></div>"
        '<div class="vlm-look-tokens" role="toolbar" aria-label="Tokens of the answer">'
        f'{buttons}</div><div class="vlm-look-note" aria-live="polite">'
        f'{escape(steps[0]["note"])}</div><div class="vlm-look-strip">{strip}</div>'
        f'</div></div><script type="application/json">{data}</script>{script}</figure>'
    )
