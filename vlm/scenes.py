"""Synthetic scenes: emoji stickers on a background, with exact boxes and masks.

Built in notebooks/17_scenes.ipynb: edit it there, then run `make export`.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image, ImageEnhance

from .backgrounds import draw_background
from .processing import Box

STYLES = ("fluent", "noto")  # what scenes show unless another style is asked for
TRAINING_STYLES = (*STYLES, "flat")
VALIDATION_STYLE = "twemoji"  # never trained on, but it influenced decisions
TEST_STYLE = "fxemoji"  # draws three quarters of the classes; for the last evaluation
ALL_STYLES = (*TRAINING_STYLES, VALIDATION_STYLE, TEST_STYLE)
TRAINING_SEEDS = range(10**9)
VALIDATION_SEEDS = range(10**9, 10**9 + 500)  # 500: standard errors under 2.3 %
TEST_SEEDS = range(4 * 10**9, 4 * 10**9 + 500)
ASSETS = files("vlm") / "assets"


@cache
def all_classes() -> dict[str, str]:
    """The hundred object classes, name → plural, in alphabetical order."""
    rows = json.loads((ASSETS / "stickers/kinds.json").read_text(encoding="utf-8"))
    return {row["name"]: row["plural"] for row in rows}


def with_article(name: str) -> str:
    """`a pizza`, `an owl`; by sound: `a unicorn`, `an hourglass`."""
    an = name == "hourglass" or (name[0] in "aeiou" and name != "unicorn")
    return f"{'an' if an else 'a'} {name}"


def _sticker_path(label: str, style: str):
    return ASSETS / "stickers" / style / f"{label.replace(' ', '_')}.webp"


@cache
def style_classes(*styles: str) -> tuple[str, ...]:
    """Names of the classes that all these styles draw; ValueError for another style."""
    if unknown := set(styles) - set(ALL_STYLES):
        raise ValueError(f"unknown style {min(unknown)!r}: not one of {ALL_STYLES}")
    names = all_classes()
    return tuple(n for n in names if all(_sticker_path(n, s).is_file() for s in styles))


@cache
def load_sticker(label: str, style: str, mode: str = "RGBA") -> Image.Image:
    """A sticker, cropped; "RGBa": premultiplied. FileNotFoundError if not drawn."""
    return Image.open(_sticker_path(label, style)).convert("RGBA").convert(mode)


@dataclass(frozen=True)
class Placement:
    """One sticker of a plan; lengths are fractions of the image's side."""

    label: str  # the name of its class
    style: str
    x: float  # center
    y: float
    size: float  # longest side, before rotation
    angle: float  # degrees, counterclockwise
    flip: bool
    stretch: float = 1.0  # of the height relative to the width
    hue: float = 0.0  # color jitter: added, in turns of the color wheel
    saturation: float = 1.0  # factor
    brightness: float = 1.0  # factor


@dataclass(frozen=True)
class ScenePlan:
    """A scene before a pixel is drawn; later placements lie on top."""

    background_seed: int
    placements: tuple[Placement, ...]
    photo_fraction: float = 1.0  # of a photograph's width, from the left


def _drawn_size(place: Placement) -> tuple[float, float]:
    """Width and height of a sticker before rotation, as fractions of the side."""
    width, height = load_sticker(place.label, place.style).size
    height *= place.stretch
    scale = place.size / max(width, height)
    return width * scale, height * scale


def _rotated_box(place: Placement) -> Box:
    """The box around a rotated sticker, as fractions of the side."""
    width, height = _drawn_size(place)
    angle = math.radians(place.angle)
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    dx = (width * cos + height * sin) / 2
    dy = (width * sin + height * cos) / 2
    return place.x - dx, place.y - dy, place.x + dx, place.y + dy


def _intersection(a: Box, b: Box) -> float:
    """The area that lies in both boxes; a box's own area with itself."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _fits(candidate: Box, others: Sequence[Box]) -> bool:
    """Inside the image, and no box shares more than a third of its area."""
    if min(candidate) < 0 or max(candidate) > 1:
        return False
    boxes = [*others, candidate]
    return all(
        sum(_intersection(box, other) for other in boxes if other is not box)
        <= 1 / 3 * _intersection(box, box)  # two thirds are enough to recognize it
        for box in boxes
    )


def _augment(place: Placement, rng: random.Random) -> Placement:
    """The same sticker stretched and recolored."""
    any_hue = rng.random() < 0.3  # so that no class is known by its color alone
    return replace(
        place,
        stretch=math.exp(rng.uniform(-0.2, 0.2)),  # by a fifth, either way
        hue=rng.random() if any_hue else rng.uniform(-0.05, 0.05),
        saturation=rng.uniform(0.5, 1.5),
        brightness=rng.uniform(0.7, 1.3),  # beyond that, much would be black or white
    )


def plan_scene(
    seed: int,
    styles: Sequence[str] = STYLES,
    max_objects: int = 6,  # six find room in three of four scenes
    sizes: tuple[float, float] = (0.15, 0.6),  # from 19 of 128 pixels: over one patch
    augment_prob: float = 0.0,
    empty_prob: float = 0.0,
    photo_fraction: float = 1.0,
) -> ScenePlan:
    """Sample classes, styles, places, sizes and background; the seed decides it all.

    Stickers that find no room are left out. For training: `augment_prob` of them are
    stretched and recolored, `empty_prob` of the scenes lose theirs, and backgrounds
    show the left `photo_fraction` of photographs. ValueError for what can't be drawn.
    """
    if isinstance(styles, str) or not styles or max_objects < 1:
        raise ValueError("a scene needs a tuple of styles and at least one object")
    fractions = (*sizes, augment_prob, empty_prob, photo_fraction)
    if not all(0 <= f <= 1 for f in fractions) or not 0 < sizes[0] <= sizes[1]:
        raise ValueError(f"sizes and probabilities outside 0…1: {fractions}")
    rng, names = random.Random(seed), style_classes(*styles)
    placements: list[Placement] = []
    for _ in range(rng.randint(1, max_objects)):
        repeat = placements and rng.random() < 0.25  # something to count
        label = rng.choice(placements).label if repeat else rng.choice(names)
        style, boxes = rng.choice(styles), [*map(_rotated_box, placements)]
        for _ in range(20):  # tries to find room; then the image is full enough
            x, y = rng.random(), rng.random()
            size = math.exp(rng.uniform(*map(math.log, sizes)))  # log-uniform
            angle, flip = rng.uniform(-15, 15), rng.random() < 0.5  # nearly upright
            place = Placement(label, style, x, y, size, angle, flip)
            if augment_prob and rng.random() >= 1 - augment_prob:
                place = _augment(place, rng)
            if _fits(_rotated_box(place), boxes):
                placements.append(place)
                break
    if not placements:  # nothing fitted: put the last one in the middle
        placements = [Placement(label, style, 0.5, 0.5, sizes[0], 0.0, False)]
    background_seed = rng.getrandbits(32)
    shown = () if rng.random() < empty_prob else tuple(placements)
    return ScenePlan(background_seed, shown, photo_fraction)


@dataclass
class SceneObject:
    """One visible object: its class's name, box in pixels and mask."""

    label: str
    box: Box
    mask: Bool[np.ndarray, "S S"]

    @property
    def center(self) -> tuple[float, float]:
        """The middle of the box, (x, y) in pixels."""
        x0, y0, x1, y1 = self.box
        return ((x0 + x1) / 2, (y0 + y1) / 2)

    @property
    def cropped_mask(self) -> Bool[np.ndarray, "h w"]:
        """The mask inside the box."""
        x0, y0, x1, y1 = map(int, self.box)
        return self.mask[y0:y1, x0:x1]


@dataclass
class Scene:
    """An image and its ground truth; objects from left to right."""

    image: Image.Image
    objects: list[SceneObject]
    owner: Int[np.ndarray, "S S"]  # index of the object that a pixel shows, or -1

    @property
    def counts(self) -> dict[str, int]:
        """How many of each class, in the order of first appearance from the left."""
        return dict(Counter(item.label for item in self.objects))


def _recolor(sticker: Image.Image, place: Placement) -> Image.Image:
    """Another hue, saturation and brightness; alpha stays."""
    if place.hue:
        shift = round(256 * place.hue)
        alpha = sticker.getchannel("A")
        hue, saturation, value = sticker.convert("RGB").convert("HSV").split()
        hue = hue.point(lambda level: (level + shift) % 256)
        sticker = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        sticker.putalpha(alpha)
    sticker = ImageEnhance.Color(sticker).enhance(place.saturation)
    return ImageEnhance.Brightness(sticker).enhance(place.brightness)


def _draw_sticker(place: Placement, image_size: int) -> tuple[Image.Image, int, int]:
    """A sticker resized, recolored, flipped and rotated; its left and top."""
    size = tuple(max(1, round(side * image_size)) for side in _drawn_size(place))
    sticker = load_sticker(place.label, place.style, "RGBa")
    sticker = sticker.resize(size, Image.Resampling.BILINEAR).convert("RGBA")
    sticker = _recolor(sticker, place)
    if place.flip:
        sticker = sticker.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sticker = sticker.rotate(place.angle, Image.Resampling.BILINEAR, expand=True)
    sticker.thumbnail((image_size, image_size))  # rounded up, it may be larger
    left = round(place.x * image_size - sticker.width / 2)
    top = round(place.y * image_size - sticker.height / 2)
    left = min(max(left, 0), image_size - sticker.width)  # rounding can push it out
    top = min(max(top, 0), image_size - sticker.height)
    return sticker, left, top


def draw_scene(plan: ScenePlan, image_size: int = 128) -> Scene:
    """Draw a plan at `image_size` pixels, at least 16, and read off what is visible.

    A pixel belongs to the topmost sticker with alpha over one half there.
    """
    if image_size < 16:  # a small sticker would be two pixels wide
        raise ValueError(f"image_size={image_size} is too small to draw: at least 16")
    image = draw_background(plan.background_seed, image_size, plan.photo_fraction)
    owner = np.full((image_size, image_size), -1)  # [S, S]: all background
    for index, place in enumerate(plan.placements):
        sticker, left, top = _draw_sticker(place, image_size)
        image.paste(sticker, (left, top), sticker)
        opaque = np.asarray(sticker.getchannel("A")) > 127  # [h, w]
        window = owner[top : top + sticker.height, left : left + sticker.width]
        window[opaque] = index  # a later sticker takes the pixel over
    objects = []
    for index, place in enumerate(plan.placements):
        mask = owner == index  # [S, S]
        if box := Image.fromarray(mask).getbbox():  # None: all of it is covered
            objects.append(SceneObject(place.label, tuple(map(float, box)), mask))
    objects.sort(key=lambda item: item.center)
    for index, item in enumerate(objects):
        owner[item.mask] = index  # renumbered from left to right
    return Scene(image, objects, owner)


def make_scene(seed: int, image_size: int = 128, styles=STYLES, **options) -> Scene:
    """The scene of a seed: `draw_scene(plan_scene(seed, …))`, options as there."""
    return draw_scene(plan_scene(seed, styles, **options), image_size)
