"""A mask of sixteen tokens: change one, and see what the decoder makes of it."""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from itertools import count
from typing import Any

import numpy as np
from IPython.display import HTML
from PIL import Image

from vlm.processing import NUM_SEGS, seg_token

TOKENS = 16
LEVELS = 5  # that a value is rounded to; odd, so that 0 is one of them
REACH = 0.3  # values beyond ± this are as good as 1 or -1: only the border matters
_numbers = count()  # two figures on a page have different ids


def _png(gray: np.ndarray) -> str:
    "A picture as the address that holds it."
    buffer = io.BytesIO()
    Image.fromarray(gray).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"


def _pack(levels: np.ndarray, codes: Sequence[int]) -> str:
    """One picture of all changes: a row for each token, a column for each code.

    The first tile holds the mask itself, all others what they add to it, modulo 256:
    most of that is zero and takes no room.
    """
    side = levels.shape[-1]
    start = levels[0, codes[0]]
    tiles = (levels - start).astype(np.uint8)  # [16, 128, s, s]; wraps around
    tiles[0, codes[0]] = start
    return _png(tiles.transpose(0, 2, 1, 3).reshape(TOKENS * side, NUM_SEGS * side))


def _still(levels: np.ndarray, codes: Sequence[int]) -> str:
    "For readers without scripts: the mask, and the largest change of four tokens."
    start = levels[0, codes[0]]
    shown = [start]
    for token in (0, 5, 10, 15):
        flips = ((levels[token] > LEVELS // 2) != (start > LEVELS // 2)).sum((1, 2))
        shown.append(levels[token, flips.argmax()])
    row = np.concatenate([np.pad(tile, 2) for tile in shown], axis=1)
    picture = _png((row * (255 // (LEVELS - 1))).astype(np.uint8))
    words = escape(" ".join(map(seg_token, codes)))
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
    changes = np.asarray(changes, dtype=np.float32)
    if len(codes) != TOKENS or not all(0 <= code < NUM_SEGS for code in codes):
        raise ValueError(f"codes must be sixteen numbers from 0 to 127, not {codes}")
    shape = changes.shape
    if changes.ndim != 4 or shape[:2] != (TOKENS, NUM_SEGS) or shape[2] != shape[3]:
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
    name = f"vlm-codes-{sha256(data.encode()).hexdigest()[:8]}-{next(_numbers)}"
    here = files("vlm.figures")
    style, script = (
        here.joinpath(f"mask_codes.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    return HTML(
        f'<style>{style}</style><div id="{name}" class="vlm-codes">'
        f"{_still(levels, codes)}"
        f'<script type="application/json">{data}</script>'
        f'<script>({script})(document.getElementById("{name}"));</script></div>'
    )
