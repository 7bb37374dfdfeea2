"""Instance masks out of text: loc tokens, seg tokens and a label become a Segmentation.

Built in notebooks/29_segmentation.ipynb: edit it there, then run `make export`.
"""

import os
from dataclasses import dataclass, field
from math import floor
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from .detection import ParsedObjects, parse_detections
from .hub import ADAPTER_CONFIG, adapter_base, find_checkpoint
from .mask_tokens import DECODER_FILE, MaskDecoder
from .processing import Box
from .sampling import Generation

# The decoder of Google's checkpoints: its name, size and fingerprint.
GOOGLE_DECODER = "vae-oid.npz"
GOOGLE_BYTES = 8_479_556
GOOGLE_SHA256 = "5586010257b8536dddefab65e7755077f21d5672d5674dacf911f73ae95a4447"


@dataclass(frozen=True, eq=False)  # two masks have no single yes or no as their ==
class Segmentation:
    """An object: label, box (x0, y0, x1, y1) and mask in the image's pixels, score."""

    label: str
    box: Box
    mask: Bool[np.ndarray, "H W"] = field(repr=False)
    score: float = 1.0


def pixel_span(start: float, end: float) -> tuple[int, int]:
    """The pixels between two edges: (first, one past the last); at least one.

    A pixel belongs to them where its center does, which is rounding each edge to the
    nearest border between pixels. Without a center between: the pixel of the middle.
    """
    first, past = floor(start + 0.5), floor(end + 0.5)
    if first == past:
        first = floor((start + end) / 2)
        past = first + 1
    return first, past


def paste_mask(
    values: Float[Tensor, "64 64"], box: Box, width: int, height: int
) -> Bool[np.ndarray, "H W"]:
    """The decoder's values, stretched onto the box: the mask [height, width].

    Bilinear; where the box is smaller than 64 pixels, values are averaged, as Pillow
    does. Over 0 is inside. `box`: (x0, y0, x1, y1) in pixels, of any fractions; its
    edges are rounded as `pixel_span` says. Raises ValueError for a box without area
    or not inside the image.
    """
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"box {box} isn't inside an image of {width} × {height}")
    left, right = pixel_span(x0, x1)
    top, bottom = pixel_span(y0, y1)
    size = (bottom - top, right - left)
    stretched = F.interpolate(
        values[None, None].float(), size, mode="bilinear", antialias=True
    )  # [1, 1, box height, box width]
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = (stretched[0, 0] > 0).cpu().numpy()
    return mask


@torch.no_grad()
def parse_segmentations(
    text: str | Generation, width: int, height: int, decoder: MaskDecoder
) -> ParsedObjects:
    """The answer to `segment …` → Segmentations, masks in pixels of the image.

    Arguments, scores, counts and errors are those of `parse_detections`, but an object
    isn't valid without exactly sixteen seg tokens, all in range. `decoder`: the one
    that belongs to the checkpoint; it is called once, for all objects. Raises TypeError
    for another type of decoder.
    """
    if not (isinstance(width, Integral) and isinstance(height, Integral)):
        raise ValueError(f"width and height are whole numbers, not {width}, {height}")
    if not isinstance(decoder, nn.Module):
        raise TypeError(f"decoder={decoder!r}: give what load_mask_decoder returns")
    found = parse_detections(text, width, height, needs_codes=True)
    valid = [*found]
    found.clear()
    if valid:
        codes = torch.tensor([one.codes for one in valid])  # [n, 16]
        device = next(decoder.parameters()).device
        values = decoder(codes.to(device))[:, 0]  # [n, 64, 64]
        for one, square in zip(valid, values):
            mask = paste_mask(square, one.box, width, height)
            found.append(Segmentation(one.label, one.box, mask, one.score))
    return found


def load_mask_decoder(
    model_path: str | os.PathLike | None = None, path: str | os.PathLike | None = None
) -> MaskDecoder:
    """The mask decoder that belongs to a checkpoint, on the CPU.

    `path`: an .npz with the names of Google's `vae-oid.npz`, or a folder that holds
    one or was written by `save_pretrained`. Without it: what lies beside the checkpoint
    `model_path` (a folder, a hub id; None is the embedded one, which ships its own), or
    beside the base of an adapter that is there. Another checkpoint's is never taken:
    codes mean nothing to it. Raises FileNotFoundError where `path` holds none, and
    ValueError for a checkpoint without one: it says which file to give.
    """
    if path is None:
        # Of a checkpoint on the hub nothing else is fetched: it may hold gigabytes.
        files = (DECODER_FILE, GOOGLE_DECODER, ADAPTER_CONFIG)
        folder = find_checkpoint(model_path, only=files)
    else:
        path = Path(os.path.expanduser(path))
        if path.suffix == ".npz":
            return MaskDecoder.from_npz(path)
        folder = path.parent if path.name == DECODER_FILE else path
    if (folder / DECODER_FILE).is_file():
        return MaskDecoder.from_pretrained(folder)
    if (folder / GOOGLE_DECODER).is_file():
        return MaskDecoder.from_npz(folder / GOOGLE_DECODER, GOOGLE_SHA256)
    if path is not None:
        files = f"neither {DECODER_FILE} nor {GOOGLE_DECODER}"
        raise FileNotFoundError(f"{files} is in {folder}")
    if (base := adapter_base(folder)) is not None:
        return load_mask_decoder(base)
    raise ValueError(
        f"the checkpoint {model_path or folder} has no mask decoder beside it: give "
        f"its file. For Google's checkpoints that is {GOOGLE_DECODER} "
        f"({GOOGLE_BYTES:,} bytes, SHA-256 {GOOGLE_SHA256}), published at "
        f"gs://big_vision/paligemma/{GOOGLE_DECODER} and in PaliGemma's Space on "
        "Hugging Face; for one that you trained, the folder of its mask tokens"
    )
