"""Images: any file or array to an upright RGB image, and to the model's pixels.

Built in notebooks/11_images.ipynb: edit it there, then run `make export`.
"""

import os
import re
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

ImageLike = Image.Image | str | os.PathLike | np.ndarray | Tensor


def _to_bytes(values: np.ndarray, largest: int) -> np.ndarray:
    "Values in 0…largest → uint8; a ValueError for others, NaN among them."
    if not ((values >= 0) & (values <= largest)).all():
        raise ValueError(f"an image of {values.dtype} must lie in 0…{largest}")
    return (values / largest * 255).round().astype(np.uint8)


def array_to_image(array: np.ndarray) -> Image.Image:
    """[H, W], [H, W, 1], [H, W, 3] or [H, W, 4] → a PIL image.

    Values: uint8 0…255, uint16 0…65535, float 0…1 or bool; anything else a ValueError.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise ValueError(
            "an image array must be [H, W], [H, W, 3] or [H, W, 4], channels last, "
            f"not {list(array.shape)}"
        )
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # in any byte order
        array = _to_bytes(array, 65535)
    elif array.dtype.kind in "bf":  # bool or float
        array = _to_bytes(array, 1)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"an image array must be uint8, uint16, bool or float, not {array.dtype}"
        )
    return Image.fromarray(array)


def _read(image: Any) -> Image.Image:
    "A copy of a file's image, or of one that Pillow opened, with all its pixels."
    if isinstance(image, Image.Image):
        name = "this"
    elif isinstance(image, (str, os.PathLike)):
        name = os.path.expanduser(image)
        if not os.path.isfile(name):
            is_url = re.match(r"\w{2,}:/|data:", name)
            advice = ": download the picture first" if is_url else ""
            raise FileNotFoundError(f"no image file at {name:.200}{advice}")
    else:
        raise ValueError(
            f"an image is a PIL image, a path or an array, not {type(image).__name__}"
        )
    try:
        if isinstance(image, Image.Image):
            return image.copy()  # reads all of it
        with Image.open(name) as opened:
            return opened.copy()
    except Exception as error:  # for a broken file Pillow raises many kinds
        message = f"{name} is not a picture that can be read: {str(error) or error!r}"
        raise ValueError(message) from None


def load_image(image: ImageLike) -> Image.Image:
    """Any picture → PIL image in RGB, upright, on white.

    Takes a PIL image, a path, or an array as `array_to_image` does; of an animation,
    the first frame. Raises FileNotFoundError for a missing file, ValueError for what
    can't be read as a picture.
    """
    if isinstance(image, Tensor):
        image = image.float() if image.dtype == torch.bfloat16 else image
        image = image.numpy(force=True)
    if isinstance(image, np.ndarray):
        image = array_to_image(image)
    image = _read(image)
    if 0 in image.size:
        raise ValueError(f"the picture has no pixels: its size is {image.size}")
    with suppress(Exception):  # a damaged tag; pixels are rotated before it's rewritten
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):  # not the values: a dark frame stays dark
        largest = 1 if image.mode == "F" else 65535  # a 16-bit PGM file has mode I
        image = Image.fromarray(_to_bytes(np.asarray(image), largest))
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def image_to_pixels(image: Image.Image, image_size: int) -> Float[Tensor, "3 S S"]:
    """RGB picture → float32 [3, S, S] in [-1, 1].

    Resized to a square, bicubic as in transformers, ignoring the aspect ratio. A box in
    fractions of the sides fits the square and the original alike.
    """
    square = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square))  # [S, S, 3] uint8
    pixels = pixels.permute(2, 0, 1).float()  # [3, S, S]
    return (pixels / 255 - 0.5) / 0.5
