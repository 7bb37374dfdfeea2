"""A mask of sixteen tokens: change one, and see what the decoder makes of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from IPython.display import HTML
from PIL import Image

from vlm.figures.page import data_uri, style_and_script, unique_id
from vlm.mask_tokens import CODES_PER_MASK
from vlm.processing import NUM_SEGS

LEVELS = 5  # that a value is rounded to; odd, so that 0 is one of them
REACH = 0.3  # values beyond ± this are as good as 1 or -1: only the border matters


def _pack(levels: np.ndarray, codes: Sequence[int]) -> str:
    """One picture of all changes: a row for each token, a column for each code.

    The first tile holds the mask itself, all others what they add to it, modulo 256:
    most of that is zero and takes no room.
    """
    side = levels.shape[-1]
    start = levels[0, codes[0]]
    tiles = (levels - start).astype(np.uint8)  # [16, 128, s, s]; wraps around
    tiles[0, codes[0]] = start
    sheet = tiles.transpose(0, 2, 1, 3).reshape(-1, NUM_SEGS * side)  # [16 s, 128 s]
    return data_uri(Image.fromarray(sheet))


def _still(levels: np.ndarray, codes: Sequence[int]) -> str:
    "For readers without scripts: the mask, and the largest change of four tokens."
    start = levels[0, codes[0]]
    shown = [start]
    for token in (0, 5, 10, 15):
        flips = ((levels[token] > LEVELS // 2) != (start > LEVELS // 2)).sum((1, 2))
        shown.append(levels[token, flips.argmax()])
    row = np.concatenate([np.pad(tile, 2) for tile in shown], axis=1)
    gray = (row * (255 // (LEVELS - 1))).astype(np.uint8)
    picture = data_uri(Image.fromarray(gray))
    words = escape(" ".join(f"<seg{code:03d}>" for code in codes))
    return (
        f'<img src="{picture}" width="{row.shape[1] * 3}" alt="Five masks." '
        'style="max-width:100%"><p>On the left the mask of these sixteen tokens, then '
        "four masks with one token changed. With JavaScript you could change each of "
        f"them here.</p><p><code>{words}</code></p>"
    )


def mask_codes(codes: Sequence[int], changes: Any) -> HTML:
    """An interactive figure: pick one of a mask's sixteen tokens and change its code.

    `codes`: the mask's sixteen codes. `changes` [16, 128, s, s]: what the decoder makes
    when token t becomes code c, values from -1 to 1, at any side s; a tensor or array.
    Works without a kernel, in light and dark mode, with mouse and keyboard.
    Raises ValueError for other shapes or codes out of range.
    """
    codes = [int(code) for code in codes]
    changes = torch.as_tensor(changes).float().numpy(force=True)
    if len(codes) != CODES_PER_MASK or not all(0 <= code < NUM_SEGS for code in codes):
        raise ValueError(f"codes must be sixteen numbers from 0 to 127, not {codes}")
    shape = changes.shape
    if (
        changes.ndim != 4
        or shape[:2] != (CODES_PER_MASK, NUM_SEGS)
        or shape[2] != shape[3]
    ):
        raise ValueError(f"changes have shape {shape}, expected (16, 128, s, s)")
    half = LEVELS // 2
    levels = ((changes / REACH).clip(-1, 1) * half).round().astype(np.int16) + half
    data = json.dumps(
        {
            "codes": codes,
            "side": shape[-1],
            "levels": LEVELS,
            "sprite": _pack(levels, codes),
        }
    )
    name = unique_id("vlm-codes", data)
    style, script = style_and_script("codes", name)
    return HTML(
        f'{style}<div id="{name}" class="vlm-codes">{_still(levels, codes)}'
        f'<script type="application/json">{data}</script>{script}</div>'
    )
