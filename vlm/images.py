"""Images: any file or array to an upright RGB image, and to the model's pixels.

Built in notebooks/12_processing.ipynb: edit it there, then run `make export`.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

__all__ = ["ImageLike", "load_image", "image_to_pixels"]

ImageLike = Image.Image | str | os.PathLike | np.ndarray | Tensor


def array_to_image(array: np.ndarray) -> Image.Image:
    """[H, W], [H, W, 1], [H, W, 3] or [H, W, 4] → a PIL image.

    Values: uint8 0…255, uint16 0…65535, float 0…1 or bool; anything else a ValueError.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(
            "an image array must be [H, W], [H, W, 3] or [H, W, 4], channels last, "
            f"not {list(array.shape)}"
        )
    if array.size == 0:
        raise ValueError(f"the image array {list(array.shape)} has no pixels")
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = (array / 257).round().astype(np.uint8)  # 65535 = 255 * 257
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError("an image of floats must lie in 0…1 (bytes / 255)")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"an image array must be uint8, uint16, bool or float, not {array.dtype}"
        )
    return Image.fromarray(array)


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Modes of more than eight bits a channel, scaled down; others as they are.

    The mode decides, not the content, so that a dark frame of a camera is scaled like a
    bright one: I;16 and I are 0…65535 (16-bit PPM files come as mode I), F is 0…1.
    ValueError for values outside.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode != "F":
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"a picture of mode {image.mode} must lie in 0…65535")
        values = values.astype(np.uint16)
    return array_to_image(values)


def _turn_upright(image: Image.Image) -> Image.Image:
    "A copy, turned as its EXIF orientation tag says, if that can be read."
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the tag is damaged, or can't be written anew; the pixels can
        image = image.copy()
        with suppress(Exception):  # in place, pixels are turned before tags are written
            ImageOps.exif_transpose(image, in_place=True)
        return image


def load_image(image: ImageLike) -> Image.Image:
    """Any picture → PIL image in RGB, upright.

    Takes a PIL image, a path, or an array ([H, W], [H, W, 3], [H, W, 4]; uint8, uint16,
    or float in 0…1). EXIF orientation is applied, 16 bits are scaled to 8, transparency
    is laid on white; of an animation the first frame counts.

    Raises FileNotFoundError for a missing file, ValueError for what is no picture.
    """
    if isinstance(image, (str, os.PathLike)):
        path = Path(os.path.expanduser(image))
        if not os.path.isfile(path):
            if re.match(r"\w{2,}:/|data:", str(image)):
                raise FileNotFoundError(
                    f"{str(image):.80} is a web address: download the picture first"
                )
            raise FileNotFoundError(f"no image file at {path}")
        try:
            with Image.open(path) as opened:
                image = opened.copy()  # reads all of it before the file closes
        except Exception as error:  # for a broken file Pillow raises many kinds
            raise ValueError(
                f"{path} is not a picture that can be read: {str(error) or repr(error)}"
            ) from None
    elif isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float() if image.dtype == torch.bfloat16 else image
        image = array_to_image(image.numpy())
    elif isinstance(image, np.ndarray):
        image = array_to_image(image)
    elif isinstance(image, Image.Image):
        try:
            image.load()  # reads all of it
        except Exception as error:
            raise ValueError(f"the picture can't be read: {error!r}") from None
    else:
        raise ValueError(
            "an image must be a PIL image, a path or an array, "
            f"not {type(image).__name__}"
        )
    if 0 in image.size:
        raise ValueError(f"the picture has no pixels: its size is {image.size}")
    image = to_eight_bits(_turn_upright(image))
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
