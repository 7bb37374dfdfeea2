"""Backgrounds of synthetic scenes: flat colors, gradients, textures, photographs.

Built in notebooks/17_scenes.ipynb: edit it there, then run `make export`.
"""

import math
import random
from functools import cache
from importlib.resources import files

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageFilter

from .processing import Box

PHOTOS = tuple("astronaut brick camera china coffee flower grass gravel".split())
TRAINING_PHOTO_FRACTION = 2 / 3  # of the width; the rest is for evaluation


@cache
def load_photo(name: str) -> Image.Image:
    """A photograph of `vlm/assets/photos` in RGB; FileNotFoundError for another."""
    return Image.open(files("vlm") / "assets/photos" / f"{name}.jpg").convert("RGB")


def _random_color(rng: random.Random) -> tuple[int, int, int]:
    return (rng.randrange(256), rng.randrange(256), rng.randrange(256))


def _blend(start, end, weight: Float[np.ndarray, "S S"]) -> Image.Image:
    """The first color where `weight` is 0, the second where it is 1."""
    pixels = start + np.subtract(end, start) * weight[..., None]  # [S, S, 3]
    return Image.fromarray(pixels.astype(np.uint8))


@cache
def _photo_region(name: str, region: Box) -> Image.Image:
    """A region of a photograph, given in fractions of its width and height."""
    photo = load_photo(name)
    return photo.crop([round(p * s) for p, s in zip(region, photo.size * 2)])


def _random_crop(
    photo: Image.Image, smallest: float, rng: random.Random, image_size: int
) -> Image.Image:
    """A square crop, at least `smallest` of the shorter side, resized."""
    side = rng.uniform(smallest, 1.0) * min(photo.size)
    left = rng.uniform(0, photo.width - side)
    top = rng.uniform(0, photo.height - side)
    window = (left, top, left + side, top + side)
    size = (image_size, image_size)
    return photo.resize(size, Image.Resampling.BILINEAR, box=window)


def draw_background(
    seed: int, image_size: int, photo_fraction: float = 1.0
) -> Image.Image:
    """A flat color, a gradient, a texture or, twice as often, a crop of a photograph.

    Crops are of the left `photo_fraction` of it; half are flipped, half blurred.
    """
    rng, size = random.Random(seed), (image_size, image_size)
    style = rng.choice(("flat", "gradient", "texture", "photo", "photo"))
    if style == "flat":
        return Image.new("RGB", size, _random_color(rng))
    if style == "gradient":  # one color fades into another, in any direction
        start, end = _random_color(rng), _random_color(rng)
        angle = rng.uniform(0, 2 * math.pi)
        axis = np.linspace(-0.5, 0.5, image_size)  # [S]
        weight = axis * math.cos(angle) + axis[:, None] * math.sin(angle)  # [S, S]
        return _blend(start, end, (weight + 0.5).clip(0, 1))
    if style == "texture":  # blotches of two colors: a few random cells, enlarged
        cells = rng.choice((4, 8, 16, 32))  # from blotches as large as objects to grain
        noise = np.frombuffer(rng.randbytes(cells * cells), np.uint8)
        blotches = Image.fromarray(noise.reshape(cells, cells))
        weight = np.asarray(blotches.resize(size, Image.Resampling.BICUBIC)) / 255
        return _blend(_random_color(rng), _random_color(rng), weight)
    photo = _photo_region(rng.choice(PHOTOS), (0.0, 0.0, photo_fraction, 1.0))
    crop = _random_crop(photo, 0.25, rng, image_size)  # smaller ones show nothing
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        radius = rng.uniform(0, image_size / 40)  # up to 3 of 128 pixels: out of focus
        crop = crop.filter(ImageFilter.BoxBlur(radius))
    return crop


def photo_crops(split: str, num_crops: int, image_size: int = 128) -> list[Image.Image]:
    """Square crops of photographs that no training background shows.

    They come from beyond `TRAINING_PHOTO_FRACTION`: the upper half for the split
    "validation", the lower half for "test". Raises KeyError for another split.
    """
    top = {"validation": 0.0, "test": 0.5}[split]
    region = (TRAINING_PHOTO_FRACTION, top, 1.0, top + 0.5)
    # Not the astronaut: a rocket, an object class, stands behind her.
    photos = [_photo_region(name, region) for name in PHOTOS if name != "astronaut"]
    rng = random.Random(0)
    turns = (photos[index % len(photos)] for index in range(num_crops))
    return [_random_crop(photo, 0.5, rng, image_size) for photo in turns]
