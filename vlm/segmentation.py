"""Twenty tokens say which pixels are the thing, in a picture of any size.

Built in notebooks/29_segmentation.ipynb: edit it there, then run `make export`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import floor
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn import functional as F

from .detection import COLORS, Detection, ParsedObjects, draw_detections, split_objects
from .hub import ADAPTER_CONFIG, adapter_base, find_checkpoint
from .images import ImageLike, load_image
from .mask_tokens import DECODER_FILE, MaskDecoder, mask_iou
from .processing import Box, check_size, locs_to_box, segs_to_codes
from .sampling import Generation

if TYPE_CHECKING:  # running a model needs no renderer
    from .scenes import SceneObject

__all__ = ["parse_segmentations", "draw_segmentations", "mean_iou", "load_mask_decoder"]

# The decoder of Google's checkpoints: its name, size and fingerprint.
GOOGLE_DECODER = "vae-oid.npz"
GOOGLE_BYTES = 8_479_556
GOOGLE_SHA256 = "5586010257b8536dddefab65e7755077f21d5672d5674dacf911f73ae95a4447"


@dataclass(frozen=True, eq=False)  # two masks have no single yes or no as their ==
class Segmentation:
    """A thing: label, box (x0, y0, x1, y1) and mask in the picture's pixels, score."""

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
    or not inside the picture.
    """
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"{box} is no box inside a picture of {width} × {height}")
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
    """The answer to `segment …` → Segmentations, masks in pixels of the picture.

    `text`: the answer, or the Generation that holds it: then `score` is the geometric
    mean probability of the object's tokens, else 1. `width` and `height` are the
    original picture's, upright. `decoder`: the one that belongs to the checkpoint; it
    is called once, for all objects.
    A valid object has exactly four loc tokens that make a box (end past start), then
    exactly sixteen seg tokens, all in range, then a label. What isn't valid is left out
    and counted in `.invalid`, never guessed; a box without a mask isn't valid here.
    What is written again, token by token, is left out and counted in `.repeated`.
    Raises TypeError for what is no answer or no decoder, ValueError for what is no
    picture's size.
    """
    check_size(width, height)
    if not (isinstance(width, Integral) and isinstance(height, Integral)):
        raise ValueError(f"width and height are whole numbers, not {width}, {height}")
    if not isinstance(decoder, nn.Module):
        raise TypeError(f"decoder={decoder!r}: give what load_mask_decoder returns")
    found = split_objects(text)
    valid, invalid = {}, 0
    for thing in found:
        box = locs_to_box(thing.locs, width, height)
        codes = segs_to_codes(thing.segs)
        if box is not None and codes is not None and thing.is_named:
            valid.setdefault(thing.tokens, (thing, box, codes))
        else:
            invalid += 1
    repeated = len(found) - invalid - len(valid)
    if not valid:
        return ParsedObjects(invalid=invalid)
    device = next(decoder.parameters()).device
    all_codes = [codes for _, _, codes in valid.values()]
    codes = torch.tensor(all_codes, device=device)  # [n, 16]
    squares = decoder(codes)[:, 0]  # [n, 64, 64]
    segmentations = [
        Segmentation(
            thing.label, box, paste_mask(square, box, width, height), thing.score
        )
        for (thing, box, _), square in zip(valid.values(), squares)
    ]
    return ParsedObjects(segmentations, invalid, repeated)


def draw_segmentations(
    image: ImageLike, segmentations: Sequence[Segmentation]
) -> Image.Image:
    """A copy of the picture, upright and in RGB, with masks, boxes and labels on it.

    A mask is a tint with a solid outline. Things with the same label get the same
    color, the one that `draw_detections` gives them. Raises ValueError for a mask of
    another size than the picture's.
    """
    image = load_image(image)
    unit = max(1, round(min(image.size) / 160))
    labels = list(dict.fromkeys(s.label for s in segmentations))
    for thing in segmentations:
        if thing.mask.shape != (image.height, image.width):
            wide, high = thing.mask.shape[::-1]
            raise ValueError(
                f"the mask of {thing.label!r} is {wide} × {high}, the picture "
                f"{image.width} × {image.height}: parse the answer with the picture's "
                "own width and height"
            )
        color = COLORS[labels.index(thing.label) % len(COLORS)]
        inside = Image.fromarray(thing.mask.astype(np.uint8) * 255)  # [H, W]
        # Blurred, a mask is full only where nothing but mask is near.
        near = np.asarray(inside.filter(ImageFilter.BoxBlur(unit)))
        edge = Image.fromarray((thing.mask & (near < 255)).astype(np.uint8) * 255)
        image.paste(color, mask=inside.point(lambda value: value * 2 // 5))
        image.paste(color, mask=edge)
    boxes = [Detection(s.label, s.box, s.score) for s in segmentations]
    return draw_detections(image, boxes)


def object_ious(
    found: Sequence[Segmentation], things: "Sequence[SceneObject]"
) -> list[float]:
    """The mask IoU of each true thing with the found one that it is matched with.

    Pairs have the same label. They are matched greedily, the best IoU of all first,
    and each thing once, found or true. A true thing without a partner, or without a
    shared pixel, counts 0. Found things that are left over change nothing.
    Raises ValueError where masks are of different sizes.
    """
    sizes = {thing.mask.shape for thing in [*found, *things]}
    if len(sizes) > 1:
        raise ValueError(f"masks of different sizes: {sorted(sizes)}")
    pairs = []  # (IoU, index of the true thing, index of the found one)
    for i, thing in enumerate(things):
        for j, guess in enumerate(found):
            if guess.label == thing.label:
                masks = torch.from_numpy(guess.mask), torch.from_numpy(thing.mask)
                pairs.append((mask_iou(*masks).item(), i, j))
    ious, taken = [0.0] * len(things), set()
    waiting = set(range(len(things)))
    for iou, i, j in sorted(pairs, key=lambda pair: -pair[0]):
        if i in waiting and j not in taken:
            ious[i] = iou
            waiting.remove(i)
            taken.add(j)
    return ious


def mean_iou(
    found: Sequence[Sequence[Segmentation]], things: "Sequence[Sequence[SceneObject]]"
) -> float:
    """The mean of `object_ious` over all true things of all pictures together.

    One entry a picture in both. Raises ValueError where there is no true thing, or
    the two differ in length.
    """
    if len(found) != len(things):
        raise ValueError(
            f"masks for {len(found)} pictures, truth for {len(things)}: give a list of "
            "masks for each picture, an empty one where there are none"
        )
    ious = [
        iou
        for ours, theirs in zip(found, things, strict=True)
        for iou in object_ious(ours, theirs)
    ]
    if not ious:
        raise ValueError("there is no true thing to find: no mean IoU")
    return sum(ious) / len(ious)


def _decoder_in(folder: Path) -> MaskDecoder | None:
    "The decoder that lies in a folder, ours or Google's; None where there is none."
    if (folder / DECODER_FILE).is_file():
        return MaskDecoder.from_pretrained(folder)
    if (folder / GOOGLE_DECODER).is_file():
        return MaskDecoder.from_npz(folder / GOOGLE_DECODER, GOOGLE_SHA256)
    return None


def load_mask_decoder(
    model_path: str | os.PathLike | None = None, path: str | os.PathLike | None = None
) -> MaskDecoder:
    """The mask decoder that belongs to a checkpoint, on the CPU.

    `path`: an .npz with the names of Google's `vae-oid.npz`, or a folder that holds
    one or was written by `save_pretrained`. Without it: what lies beside the checkpoint
    `model_path` (a folder, a hub id; None is the embedded one, which ships its own), or
    beside the base of an adapter that is there.
    Codes mean something only to the decoder that they were learned with, so another
    checkpoint's is never taken. Raises FileNotFoundError where `path` holds none, and
    ValueError for a checkpoint without one: it says which file to give.
    """
    if path is not None:
        path = Path(path).expanduser()
        if path.suffix == ".npz":
            return MaskDecoder.from_npz(path)
        folder = path.parent if path.name == DECODER_FILE else path
        decoder = _decoder_in(folder)
        if decoder is None:
            raise FileNotFoundError(
                f"no {DECODER_FILE} and no {GOOGLE_DECODER} in {folder}: give such a "
                "folder, or an .npz file"
            )
        return decoder
    # Of a checkpoint on the hub nothing else is fetched: it may hold gigabytes.
    files = (DECODER_FILE, GOOGLE_DECODER, ADAPTER_CONFIG)
    folder = find_checkpoint(model_path, only=files)
    decoder = _decoder_in(folder)
    if decoder is None and (base := adapter_base(folder)) is not None:
        return load_mask_decoder(base)
    if decoder is None:
        raise ValueError(
            f"the checkpoint {model_path or folder} has no mask decoder beside it: "
            f"give its file. For Google's checkpoints that is {GOOGLE_DECODER} "
            f"({GOOGLE_BYTES:,} bytes, SHA-256 {GOOGLE_SHA256}), published at "
            f"gs://big_vision/paligemma/{GOOGLE_DECODER} and in PaliGemma's Space on "
            "Hugging Face; for one that you trained, the folder of its mask tokens"
        )
    return decoder
