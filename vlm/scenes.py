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

__all__ = [
    "TRAINING_STYLES", "VALIDATION_STYLE", "TEST_STYLE", "TRAINING_SEEDS",
    "VALIDATION_SEEDS", "TEST_SEEDS", "ASSETS", "all_kinds", "find_kind", "style_kinds",
    "Scene", "make_scene",
]  # fmt: skip

STYLES = ("fluent", "noto")  # what scenes show unless another style is asked for
TRAINING_STYLES = (*STYLES, "flat")
VALIDATION_STYLE = "twemoji"  # never trained on, but it influenced decisions
TEST_STYLE = "fxemoji"  # draws three quarters of the kinds; for the last evaluation
ALL_STYLES = (*TRAINING_STYLES, VALIDATION_STYLE, TEST_STYLE)
TRAINING_SEEDS = range(10**9)
VALIDATION_SEEDS = range(10**9, 10**9 + 500)
TEST_SEEDS = range(4 * 10**9, 4 * 10**9 + 500)
ASSETS = files("vlm") / "assets"


@dataclass(frozen=True)
class Kind:
    """An object class: its English name and plural."""

    name: str
    plural: str

    @property
    def with_article(self) -> str:
        """`a pizza`, `an owl`; by sound: `a unicorn`, `an hourglass`."""
        an = self.name == "hourglass" or self.name[0] in "aeiou"
        return f"{'an' if an and self.name != 'unicorn' else 'a'} {self.name}"


@cache
def all_kinds() -> dict[str, Kind]:
    """The hundred object classes by name, in alphabetical order."""
    text = (ASSETS / "stickers" / "kinds.json").read_text(encoding="utf-8")
    return {row["name"]: Kind(row["name"], row["plural"]) for row in json.loads(text)}


def find_kind(name: str) -> Kind:
    """The class of that name; ValueError for an unknown one."""
    if name not in all_kinds():
        raise ValueError(f"unknown kind {name!r}; all_kinds() lists the hundred names")
    return all_kinds()[name]


def _sticker_file(kind: str) -> str:
    """A sticker's file in its style's folder: `hot_dog.webp`."""
    return kind.replace(" ", "_") + ".webp"


@cache
def style_kinds(*styles: str) -> tuple[str, ...]:
    """The kinds that every one of these styles draws, in alphabetical order.

    Raises ValueError for an unknown style.
    """
    if unknown := set(styles) - set(ALL_STYLES):
        known = ", ".join(ALL_STYLES)
        raise ValueError(f"unknown style {min(unknown)!r}; expected one of {known}")
    folders = [ASSETS / "stickers" / style for style in styles]
    drawn = [{file.name for file in folder.iterdir()} for folder in folders]
    return tuple(k for k in all_kinds() if all(_sticker_file(k) in d for d in drawn))


@cache
def load_sticker(kind: str, style: str) -> Image.Image:
    """A sticker as an RGBA image, cropped to its visible pixels.

    Raises FileNotFoundError for a kind that the style doesn't draw.
    """
    with (ASSETS / "stickers" / style / _sticker_file(kind)).open("rb") as file:
        return Image.open(file).convert("RGBA")


@dataclass(frozen=True)
class ColorJitter:
    """How a sticker's colors are changed; the default leaves them as they are."""

    hue: float = 0.0  # added, in turns of the color wheel
    saturation: float = 1.0  # factor
    brightness: float = 1.0  # factor


@dataclass(frozen=True)
class Placement:
    """One sticker of a plan; lengths are fractions of the image's side."""

    kind: str
    style: str
    x: float  # center
    y: float
    size: float  # longest side, before rotation
    angle: float  # degrees, counterclockwise
    flip: bool
    stretch: float = 1.0  # of the height relative to the width
    jitter: ColorJitter = ColorJitter()


@dataclass(frozen=True)
class ScenePlan:
    """A scene before a pixel is drawn; later placements lie on top."""

    background_seed: int
    placements: tuple[Placement, ...]
    photo_fraction: float = 1.0  # of a photograph's width, from the left


def _drawn_size(place: Placement) -> tuple[float, float]:
    """Width and height of a sticker before rotation, as fractions of the side."""
    width, height = load_sticker(place.kind, place.style).size
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


def _fits(candidate: Box, others: Sequence[Box], limit: float = 1 / 3) -> bool:
    """Inside the image, and no box covered by more than `limit` of its area."""
    if min(candidate) < 0 or max(candidate) > 1:
        return False
    boxes = [*others, candidate]
    for box in boxes:
        covered = sum(_intersection(box, other) for other in boxes if other is not box)
        if covered > limit * _intersection(box, box):
            return False
    return True


def _augment(place: Placement, rng: random.Random) -> Placement:
    """The same sticker stretched and recolored; three in ten get any hue at all."""
    any_hue = rng.random() < 0.3
    stretch = math.exp(rng.uniform(-0.2, 0.2))
    hue = rng.random() if any_hue else rng.uniform(-0.05, 0.05)
    jitter = ColorJitter(hue, rng.uniform(0.5, 1.5), rng.uniform(0.7, 1.3))
    return replace(place, stretch=stretch, jitter=jitter)


def _find_room(
    kind: str,
    style: str,
    sizes: tuple[float, float],
    augment_prob: float,
    boxes: Sequence[Box],
    rng: random.Random,
) -> Placement | None:
    """A random placement that fits beside `boxes`, or None after 20 tries."""
    for _ in range(20):
        x, y = rng.random(), rng.random()
        size = math.exp(rng.uniform(math.log(sizes[0]), math.log(sizes[1])))
        angle, flip = rng.uniform(-15, 15), rng.random() < 0.5
        place = Placement(kind, style, x, y, size, angle, flip)
        if augment_prob and rng.random() >= 1 - augment_prob:
            place = _augment(place, rng)
        if _fits(_rotated_box(place), boxes):
            return place
    return None


def plan_scene(
    seed: int,
    styles: Sequence[str] = STYLES,
    max_objects: int = 6,
    sizes: tuple[float, float] = (0.15, 0.6),
    augment_prob: float = 0.0,
    empty_prob: float = 0.0,
    photo_fraction: float = 1.0,
) -> ScenePlan:
    """Sample kinds, styles, places, sizes and background; the seed decides it all.

    1…`max_objects` stickers of kinds that all `styles` draw. After the first, one in
    four repeats a kind that is there already. What finds no room is left out.

    For training: `augment_prob` of the stickers are stretched and recolored,
    `empty_prob` of the scenes lose their stickers, and photographic backgrounds come
    from the left `photo_fraction` of each photograph.
    """
    if isinstance(styles, str) or not styles or max_objects < 1:
        raise ValueError("a scene needs a tuple of styles and at least one object")
    fractions = (*sizes, augment_prob, empty_prob, photo_fraction)
    if not all(0 <= f <= 1 for f in fractions) or not 0 < sizes[0] <= sizes[1]:
        raise ValueError(f"sizes and probabilities outside 0…1: {fractions}")
    rng = random.Random(seed)
    names = style_kinds(*styles)
    placements: list[Placement] = []
    for _ in range(rng.randint(1, max_objects)):
        repeat = placements and rng.random() < 0.25
        kind = rng.choice(placements).kind if repeat else rng.choice(names)
        style, boxes = rng.choice(styles), [*map(_rotated_box, placements)]
        if place := _find_room(kind, style, sizes, augment_prob, boxes, rng):
            placements.append(place)
    if not placements:  # nothing fitted: put the last one in the middle
        placements = [Placement(kind, style, 0.5, 0.5, sizes[0], 0.0, False)]
    background_seed = rng.getrandbits(32)
    if rng.random() < empty_prob:
        placements = []
    return ScenePlan(background_seed, tuple(placements), photo_fraction)


@dataclass
class SceneObject:
    """One visible object: its kind, box in pixels and mask."""

    kind: str
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
    """An image and its ground truth; objects from left to right.

    `owner` [S, S] holds the index of the object that a pixel shows, -1 for background.
    """

    image: Image.Image
    objects: list[SceneObject]
    owner: Int[np.ndarray, "S S"]

    @property
    def counts(self) -> dict[str, int]:
        """How many of each kind, in the order of first appearance from the left."""
        return dict(Counter(item.kind for item in self.objects))


@cache
def _premultiplied(kind: str, style: str) -> Image.Image:
    """A sticker with its colors multiplied by alpha, ready to be resized."""
    return load_sticker(kind, style).convert("RGBa")


def _recolor(sticker: Image.Image, jitter: ColorJitter) -> Image.Image:
    """Another hue, saturation and brightness; alpha stays."""
    if jitter.hue:
        shift = round(256 * jitter.hue)
        alpha = sticker.getchannel("A")
        hue, saturation, value = sticker.convert("RGB").convert("HSV").split()
        hue = hue.point([(level + shift) % 256 for level in range(256)])
        sticker = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        sticker.putalpha(alpha)
    if jitter.saturation != 1:
        sticker = ImageEnhance.Color(sticker).enhance(jitter.saturation)
    if jitter.brightness != 1:
        sticker = ImageEnhance.Brightness(sticker).enhance(jitter.brightness)
    return sticker


def _draw_sticker(place: Placement, image_size: int) -> Image.Image:
    """A sticker as it is pasted: resized, recolored, flipped, rotated."""
    width, height = _drawn_size(place)
    size = (max(1, round(width * image_size)), max(1, round(height * image_size)))
    sticker = _premultiplied(place.kind, place.style)
    sticker = sticker.resize(size, Image.Resampling.BILINEAR).convert("RGBA")
    sticker = _recolor(sticker, place.jitter)
    if place.flip:
        sticker = sticker.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return sticker.rotate(place.angle, Image.Resampling.BILINEAR, expand=True)


def _corner(place: Placement, sticker: Image.Image, image_size: int) -> tuple[int, int]:
    """Left and top of the drawn sticker, inside the image whatever rounding does."""
    left = round(place.x * image_size - sticker.width / 2)
    top = round(place.y * image_size - sticker.height / 2)
    left = min(max(left, 0), image_size - sticker.width)
    top = min(max(top, 0), image_size - sticker.height)
    return left, top


def _bounding_box(mask: Bool[np.ndarray, "h w"]) -> Box:
    """The tightest box around a mask's pixels; x1 and y1 are exclusive."""
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return tuple(map(float, box))


def _read_truth(image: Image.Image, owner: np.ndarray, kinds: Sequence[str]) -> Scene:
    """What is visible of each sticker; `owner` [S, S] numbers them as in `kinds`."""
    objects = {}
    for index, kind in enumerate(kinds):
        mask = owner == index
        if mask.any():
            objects[index] = SceneObject(kind, _bounding_box(mask), mask)
    order = sorted(objects, key=lambda index: objects[index].center)
    from_left = np.full(len(kinds) + 1, -1)  # the last entry serves background, -1
    from_left[order] = range(len(order))
    return Scene(image, [objects[index] for index in order], from_left[owner])


def draw_scene(plan: ScenePlan, image_size: int = 128) -> Scene:
    """Draw a plan at `image_size` pixels and read off what is visible.

    A pixel belongs to the topmost sticker with alpha over one half there; boxes are
    those of the visible pixels. Raises ValueError for fewer than 16 pixels a side.
    """
    if image_size < 16:
        raise ValueError(f"image_size={image_size} is too small to draw: at least 16")
    image = draw_background(plan.background_seed, image_size, plan.photo_fraction)
    owner = np.full((image_size, image_size), -1)  # [S, S]: all background
    for index, place in enumerate(plan.placements):
        sticker = _draw_sticker(place, image_size)
        left, top = _corner(place, sticker, image_size)
        image.paste(sticker, (left, top), sticker)
        opaque = np.asarray(sticker.getchannel("A")) > 127  # [h, w]
        window = owner[top : top + sticker.height, left : left + sticker.width]
        window[opaque] = index  # a later sticker takes the pixel over
    return _read_truth(image, owner, [place.kind for place in plan.placements])


def make_scene(
    seed: int, image_size: int = 128, styles: Sequence[str] = STYLES, **options
) -> Scene:
    """The scene of a seed: `draw_scene(plan_scene(seed, …))`, options as there.

    The plan doesn't depend on `image_size`: any scene can be drawn at any size.
    """
    return draw_scene(plan_scene(seed, styles, **options), image_size)
