"""Draw scenes whose every truth is known, and put that truth into words and tokens.

Built in notebooks/15_scenes.ipynb: edit it there, then run `make export`.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageEnhance, ImageFilter
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from .processing import (
    IMAGE_TOKEN,
    NUM_LOCS,
    NUM_SEGS,
    Box,
    box_to_locs,
    codes_to_segs,
    loc_token,
    seg_token,
)

__all__ = [
    "STYLES",
    "TRAINING_STYLES",
    "VALIDATION_STYLE",
    "TEST_STYLE",
    "ALL_STYLES",
    "TRAINING_SEEDS",
    "VALIDATION_SEEDS",
    "TEST_SEEDS",
    "PHOTOS",
    "UNSEEN_PHOTOS",
    "TRAINING_PHOTO_PART",
    "ASSETS",
    "NUMBER_WORDS",
    "EMPTY_CAPTION",
    "EncodeMask",
    "SIDES",
    "Kind",
    "all_kinds",
    "style_kinds",
    "load_sticker",
    "load_photo",
    "Look",
    "Placement",
    "ScenePlan",
    "plan_scene",
    "draw_background",
    "photo_crops",
    "SceneObject",
    "Scene",
    "draw_scene",
    "make_scene",
    "caption",
    "parse_caption",
    "object_strings",
    "neighbor",
    "Question",
    "caption_question",
    "detect_question",
    "segment_question",
    "count_question",
    "presence_question",
    "relation_questions",
    "absent_kind",
    "sample_question",
    "world_sentences",
    "train_tokenizer",
]

STYLES = ("fluent", "noto")  # what scenes show unless another style is asked for
TRAINING_STYLES = (*STYLES, "flat")
VALIDATION_STYLE = "twemoji"  # not trained on, but it had a say in decisions
TEST_STYLE = "fxemoji"  # three quarters of the kinds; asked about once, at the end
ALL_STYLES = (*TRAINING_STYLES, VALIDATION_STYLE, TEST_STYLE)
TRAINING_SEEDS = range(10**9)
VALIDATION_SEEDS = range(10**9, 10**9 + 500)
TEST_SEEDS = range(4 * 10**9, 4 * 10**9 + 500)
PHOTOS = tuple("astronaut brick camera china coffee flower grass gravel".split())
UNSEEN_PHOTOS = ("chelsea", "rocket")  # no backgrounds: they show a kind up close
TRAINING_PHOTO_PART = 2 / 3  # of a photograph's width, from the left
ASSETS = files("vlm") / "assets"


@dataclass(frozen=True)
class Kind:
    """One kind of sticker: its English name and plural."""

    name: str
    plural: str

    @property
    def with_article(self) -> str:
        """`a pizza`, `an owl`; by sound: `a unicorn`, `an hourglass`."""
        vowel = self.name[0] in "aeiou" and self.name != "unicorn"
        vowel = vowel or self.name == "hourglass"
        return f"{'an' if vowel else 'a'} {self.name}"


@cache
def all_kinds() -> dict[str, Kind]:
    """The hundred kinds by name, in alphabetical order."""
    text = (ASSETS / "stickers" / "kinds.json").read_text(encoding="utf-8")
    return {e["name"]: Kind(e["name"], e["plural"]) for e in json.loads(text)}


def _find_kind(name: str) -> Kind:
    """The kind of that name; ValueError where there is none."""
    if name not in all_kinds():
        raise ValueError(f"unknown kind {name!r}; all_kinds() lists the hundred names")
    return all_kinds()[name]


def _file_name(kind: str) -> str:
    """A sticker's file in its style's folder: `hot_dog.webp`."""
    return kind.replace(" ", "_") + ".webp"


@cache
def style_kinds(*styles: str) -> tuple[str, ...]:
    """The kinds that every one of these styles draws, in alphabetical order.

    Raises ValueError for an unknown style.
    """
    drawn = {_file_name(kind) for kind in all_kinds()}
    for style in styles:
        if style not in ALL_STYLES:
            expected = ", ".join(ALL_STYLES)
            raise ValueError(f"unknown style {style!r}; expected one of {expected}")
        drawn &= {file.name for file in (ASSETS / "stickers" / style).iterdir()}
    return tuple(kind for kind in all_kinds() if _file_name(kind) in drawn)


@cache
def load_sticker(kind: str, style: str) -> Image.Image:
    """A sticker's RGBA picture, trimmed to what is visible.

    Raises ValueError for an unknown kind or style, and a kind that the style lacks.
    """
    if _find_kind(kind).name not in style_kinds(style):
        raise ValueError(f"the style {style!r} has no drawing of {kind!r}")
    with (ASSETS / "stickers" / style / _file_name(kind)).open("rb") as file:
        return Image.open(file).convert("RGBA")


@cache
def load_photo(name: str) -> Image.Image:
    """One of the photographs in `vlm/assets/photos`, as RGB.

    Raises ValueError for a name that isn't there.
    """
    path = ASSETS / "photos" / f"{name}.jpg"
    if not path.is_file():
        raise ValueError(f"no photograph {name!r} among the assets")
    with path.open("rb") as file:
        return Image.open(file).convert("RGB")


@dataclass(frozen=True)
class Look:
    """How a sticker's drawing is changed; as it stands, not at all."""

    stretch: float = 1.0  # of the height against the width
    hue: float = 0.0  # added, in turns of the color wheel
    saturation: float = 1.0  # factor
    brightness: float = 1.0  # factor


@dataclass(frozen=True)
class Placement:
    """Where a sticker lies; lengths are shares of the picture's side."""

    kind: str
    style: str
    x: float  # center
    y: float
    size: float  # longest side, before it is turned
    angle: float  # degrees, counterclockwise
    flip: bool
    look: Look = Look()


@dataclass(frozen=True)
class ScenePlan:
    """All that a scene is, before a pixel is drawn: later placements lie on top."""

    background_seed: int
    placements: tuple[Placement, ...]
    photo_part: float = 1.0  # of a photograph's width, from the left: for backgrounds


def _drawn_size(place: Placement) -> tuple[float, float]:
    """Width and height of a sticker before it is turned, as shares of the side."""
    width, height = load_sticker(place.kind, place.style).size
    height *= place.look.stretch
    scale = place.size / max(width, height)
    return width * scale, height * scale


def _turned_box(place: Placement) -> Box:
    """The box around a turned sticker, as shares of the side."""
    width, height = _drawn_size(place)
    turn = math.radians(place.angle)
    cos, sin = abs(math.cos(turn)), abs(math.sin(turn))
    half_width = (width * cos + height * sin) / 2
    half_height = (width * sin + height * cos) / 2
    return (
        place.x - half_width,
        place.y - half_height,
        place.x + half_width,
        place.y + half_height,
    )


def _area(box: Box) -> float:
    """Width times height, 0 for a box turned inside out."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _shared_area(a: Box, b: Box) -> float:
    """The area that lies in both boxes."""
    return _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))


def _fits(candidate: Box, others: Sequence[Box], limit: float = 1 / 3) -> bool:
    """Inside the picture, and no box covered by more than `limit` of its area."""
    if min(candidate) < 0 or max(candidate) > 1:
        return False
    boxes = [*others, candidate]
    for box in boxes:
        covered = sum(_shared_area(box, other) for other in boxes if other is not box)
        if covered > limit * _area(box):
            return False
    return True


def _random_placement(
    kind: str, style: str, sizes: tuple[float, float], rng: random.Random
) -> Placement:
    """Anywhere, of any size in `sizes`, turned a little, flipped or not."""
    return Placement(
        kind,
        style,
        x=rng.random(),
        y=rng.random(),
        size=math.exp(rng.uniform(math.log(sizes[0]), math.log(sizes[1]))),
        angle=rng.uniform(-15, 15),
        flip=rng.random() < 0.5,
    )


def _varied(place: Placement, rng: random.Random) -> Placement:
    """The same with another look, its colors mostly near the true ones."""
    any_hue = rng.random() < 0.3
    look = Look(
        stretch=math.exp(rng.uniform(-0.2, 0.2)),
        hue=rng.random() if any_hue else rng.uniform(-0.05, 0.05),
        saturation=rng.uniform(0.5, 1.5),
        brightness=rng.uniform(0.7, 1.3),
    )
    return replace(place, look=look)


def plan_scene(
    seed: int,
    styles: Sequence[str] = STYLES,
    max_objects: int = 6,
    sizes: tuple[float, float] = (0.15, 0.6),
    vary: float = 0.0,
    empty_prob: float = 0.0,
    photo_part: float = 1.0,
) -> ScenePlan:
    """Choose kinds, styles, places, sizes and background; the same for the same seed.

    1…`max_objects` stickers; after the first, one in four repeats a kind that is there
    already. Sizes are drawn evenly on a logarithmic scale. What finds no room in 20
    tries is left out. Kinds are those that all of `styles` draw.

    For training: `vary` is the share of the stickers with another look, `empty_prob`
    that of the scenes without a sticker (the others stay as they are), `photo_part`
    that of a photograph's width, from the left, of which backgrounds are cut.

    Raises ValueError for no styles, no objects, and for shares outside 0…1.
    """
    if isinstance(styles, str):
        raise ValueError(f"styles must be several names: write ({styles!r},)")
    if not styles or max_objects < 1:
        raise ValueError("a scene needs at least one style and one object")
    if not 0 < sizes[0] <= sizes[1] <= 1:
        raise ValueError(f"sizes must be shares, 0 < least ≤ most ≤ 1, not {sizes}")
    shares = {"vary": vary, "empty_prob": empty_prob, "photo_part": photo_part}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} must be a share, 0 to 1")
    rng = random.Random(seed)
    names = style_kinds(*styles)
    placements: list[Placement] = []
    boxes: list[Box] = []
    for _ in range(rng.randint(1, max_objects)):
        repeat = placements and rng.random() < 0.25
        kind = rng.choice(placements).kind if repeat else rng.choice(names)
        style = rng.choice(styles)
        for _ in range(20):
            place = _random_placement(kind, style, sizes, rng)
            if vary and rng.random() >= 1 - vary:
                place = _varied(place, rng)
            box = _turned_box(place)
            if _fits(box, boxes):
                placements.append(place)
                boxes.append(box)
                break
    if not placements:  # twenty misses in a row: put one in the middle
        placements.append(Placement(kind, style, 0.5, 0.5, sizes[0], 0.0, False))
    background_seed = rng.getrandbits(32)
    if rng.random() < empty_prob:
        placements = []
    return ScenePlan(background_seed, tuple(placements), photo_part)


Color = tuple[int, int, int]  # red, green, blue, 0…255


def _random_color(rng: random.Random) -> Color:
    """Any of the 16.8 million."""
    return (rng.randrange(256), rng.randrange(256), rng.randrange(256))


def _blend(start: Color, end: Color, share: Float[np.ndarray, "S S"]) -> Image.Image:
    """The first color where `share` is 0, the second where it is 1."""
    step = np.array(end) - np.array(start)
    mixed = np.array(start) + step * share[..., None]  # [S, S, 3]
    return Image.fromarray(mixed.astype(np.uint8))


def _draw_gradient(rng: random.Random, side: int) -> Image.Image:
    """One color fades into another, in any direction."""
    start, end = _random_color(rng), _random_color(rng)
    turn = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-0.5, 0.5, side)
    share = axis[None, :] * math.cos(turn) + axis[:, None] * math.sin(turn) + 0.5
    return _blend(start, end, share.clip(0, 1))


def _draw_texture(rng: random.Random, side: int) -> Image.Image:
    """Blotches of two colors: a few random cells, enlarged smoothly."""
    cells = rng.choice((4, 8, 16, 32))
    noise = np.frombuffer(rng.randbytes(cells * cells), np.uint8)
    blotches = Image.fromarray(noise.reshape(cells, cells))
    share = np.asarray(blotches.resize((side, side), Image.Resampling.BICUBIC))
    return _blend(_random_color(rng), _random_color(rng), share / 255)


@cache
def _photo_part(name: str, part: Box) -> Image.Image:
    """A part of a photograph, given in shares of its width and height."""
    photo = load_photo(name)
    return photo.crop([round(p * s) for p, s in zip(part, photo.size * 2)])


def _cut_square(
    photo: Image.Image, least: float, rng: random.Random, side: int
) -> Image.Image:
    """A square piece: at least the share `least` of the photograph's shorter side."""
    cut = rng.uniform(least, 1.0) * min(photo.size)
    left = rng.uniform(0, photo.width - cut)
    top = rng.uniform(0, photo.height - cut)
    window = (left, top, left + cut, top + cut)
    return photo.resize((side, side), Image.Resampling.BILINEAR, box=window)


def _cut_from_photo(rng: random.Random, side: int, photo_part: float) -> Image.Image:
    """A square piece of a photograph; half are flipped, half are blurred."""
    photo = _photo_part(rng.choice(PHOTOS), (0.0, 0.0, photo_part, 1.0))
    piece = _cut_square(photo, 0.25, rng, side)
    if rng.random() < 0.5:
        piece = piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        piece = piece.filter(ImageFilter.BoxBlur(rng.uniform(0, side / 40)))
    return piece


def draw_background(seed: int, side: int, photo_part: float = 1.0) -> Image.Image:
    """A plain ground, a gradient, a texture or, twice as often, a piece of a photo.

    Of a photograph, only the left `photo_part` of its width is used.
    """
    rng = random.Random(seed)
    style = rng.choice(("plain", "gradient", "texture", "photo", "photo"))
    if style == "plain":
        return Image.new("RGB", (side, side), _random_color(rng))
    if style == "gradient":
        return _draw_gradient(rng, side)
    if style == "texture":
        return _draw_texture(rng, side)
    return _cut_from_photo(rng, side, photo_part)


def photo_crops(
    split: str, num_crops: int, side: int = 128, seed: int = 0
) -> list[Image.Image]:
    """Square pieces of photographs that no background with `TRAINING_PHOTO_PART` shows.

    From the right part of one photograph after the other: its upper half for the split
    "validation", its lower half for "test". The astronaut's is left out: behind her
    stands a rocket. Raises ValueError for another split.
    """
    if split not in ("validation", "test"):
        raise ValueError(f'split must be "validation" or "test", not {split!r}')
    top = 0.0 if split == "validation" else 0.5
    part = (TRAINING_PHOTO_PART, top, 1.0, top + 0.5)
    photos = [_photo_part(name, part) for name in PHOTOS if name != "astronaut"]
    rng = random.Random(seed)
    return [
        _cut_square(photos[number % len(photos)], 0.5, rng, side)
        for number in range(num_crops)
    ]


@dataclass
class SceneObject:
    """One visible thing: its kind, box in pixels and mask."""

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
        """The mask, cut out along its box."""
        x0, y0, x1, y1 = map(int, self.box)
        return self.mask[y0:y1, x0:x1]


@dataclass
class Scene:
    """A picture and the truth about it; objects from left to right.

    `owner` [S, S] holds the index of the object that a pixel shows, -1 for background.
    """

    image: Image.Image
    objects: list[SceneObject]
    owner: Int[np.ndarray, "S S"]

    @property
    def counts(self) -> dict[str, int]:
        """How many of each kind, in the order of first appearance from the left."""
        return dict(Counter(thing.kind for thing in self.objects))


def _recolor(sticker: Image.Image, look: Look) -> Image.Image:
    """Another hue, saturation and brightness; transparency stays."""
    if look.hue:
        turn = round(256 * look.hue)
        alpha = sticker.getchannel("A")
        hue, saturation, value = sticker.convert("RGB").convert("HSV").split()
        hue = hue.point([(level + turn) % 256 for level in range(256)])
        sticker = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        sticker.putalpha(alpha)
    if look.saturation != 1:
        sticker = ImageEnhance.Color(sticker).enhance(look.saturation)
    if look.brightness != 1:
        sticker = ImageEnhance.Brightness(sticker).enhance(look.brightness)
    return sticker


def _draw_sticker(place: Placement, side: int) -> Image.Image:
    """A sticker as it goes into a picture: sized, colored, flipped, turned."""
    width, height = _drawn_size(place)
    size = (max(1, round(width * side)), max(1, round(height * side)))
    sticker = load_sticker(place.kind, place.style)
    sticker = _recolor(sticker.resize(size, Image.Resampling.BILINEAR), place.look)
    if place.flip:
        sticker = sticker.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return sticker.rotate(place.angle, Image.Resampling.BILINEAR, expand=True)


def _corner(place: Placement, sticker: Image.Image, side: int) -> tuple[int, int]:
    """Where the drawn sticker's left and top edges go; it stays inside the picture."""
    left = round(place.x * side - sticker.width / 2)
    top = round(place.y * side - sticker.height / 2)
    left = min(max(left, 0), side - sticker.width)
    top = min(max(top, 0), side - sticker.height)
    return left, top


def _box_around(mask: Bool[np.ndarray, "h w"]) -> Box:
    """The tightest box around a mask's pixels; the far edges lie behind the last."""
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return tuple(map(float, box))


def _describe(image: Image.Image, owner: np.ndarray, kinds: Sequence[str]) -> Scene:
    """Gather what is visible of each sticker, from left to right.

    `owner` [S, S] counts in the order of drawing, `kinds` is in that order too.
    """
    drawn = []  # (number in the order of drawing, object)
    for index, kind in enumerate(kinds):
        mask = owner == index
        if mask.any():
            drawn.append((index, SceneObject(kind, _box_around(mask), mask)))
    drawn.sort(key=lambda pair: pair[1].center)
    from_left = np.full(len(kinds) + 1, -1)  # the last entry serves background, -1
    for new, (old, _) in enumerate(drawn):
        from_left[old] = new
    return Scene(image, [thing for _, thing in drawn], from_left[owner])


def draw_scene(plan: ScenePlan, image_size: int = 128) -> Scene:
    """Draw a plan at `image_size` pixels and work out what is visible of each thing.

    A pixel belongs to the topmost sticker whose alpha there is over one half; boxes
    are those of the visible pixels. Raises ValueError for fewer than 16 pixels a side.
    """
    if image_size < 16:
        raise ValueError(f"image_size={image_size} is too small to draw: at least 16")
    image = draw_background(plan.background_seed, image_size, plan.photo_part)
    owner = np.full((image_size, image_size), -1)  # [S, S]: nobody's yet
    for index, place in enumerate(plan.placements):
        sticker = _draw_sticker(place, image_size)
        left, top = _corner(place, sticker, image_size)
        image.paste(sticker, (left, top), sticker)
        solid = np.asarray(sticker.getchannel("A")) > 127
        window = owner[top : top + sticker.height, left : left + sticker.width]
        window[solid] = index  # a later sticker takes the pixel over
    return _describe(image, owner, [place.kind for place in plan.placements])


def make_scene(
    seed: int,
    image_size: int = 128,
    styles: Sequence[str] = STYLES,
    max_objects: int = 6,
    vary: float = 0.0,
    empty_prob: float = 0.0,
    photo_part: float = 1.0,
) -> Scene:
    """The scene of a seed: `draw_scene(plan_scene(seed))`, with the same options.

    The plan doesn't depend on `image_size`: the same scene can be drawn at any size.
    """
    options = {"vary": vary, "empty_prob": empty_prob, "photo_part": photo_part}
    plan = plan_scene(seed, styles, max_objects, **options)
    return draw_scene(plan, image_size)


NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six")
EMPTY_CAPTION = "nothing I know"


def caption(scene: Scene) -> str:
    """What is there, from left to right: `two owls, a pizza and an apple`.

    Where no sticker is, `EMPTY_CAPTION`.
    """
    if not scene.objects:
        return EMPTY_CAPTION
    phrases = []
    for name, count in scene.counts.items():
        kind = _find_kind(name)
        number = NUMBER_WORDS[count] if count < len(NUMBER_WORDS) else str(count)
        phrases.append(kind.with_article if count == 1 else f"{number} {kind.plural}")
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last


def parse_caption(text: str) -> Counter[str]:
    """The kinds that a caption names, with their numbers; unknown words are ignored."""
    numbers = {word: n for n, word in enumerate(NUMBER_WORDS)} | {"a": 1, "an": 1}
    names = {kind.plural: kind.name for kind in all_kinds().values()}
    names |= {name: name for name in all_kinds()}
    counts: Counter[str] = Counter()
    for phrase in re.split(r",| and ", text):
        number, _, name = phrase.strip().partition(" ")
        if name not in names:
            continue
        if number in numbers:
            counts[names[name]] += numbers[number]
        elif number.isdecimal():
            counts[names[name]] += int(number)
    return counts


EncodeMask = Callable[[Bool[np.ndarray, "h w"]], Sequence[int]]


def object_strings(
    scene: Scene, kinds: Iterable[str], encode_mask: EncodeMask | None = None
) -> str:
    """The answer to `detect a ; b`: each thing's four loc tokens and label.

    From left to right. With `encode_mask` (mask crop → 16 codes) it is the answer to
    `segment`. Nothing of these kinds there: the empty string. Raises ValueError for one
    name that isn't in a list.
    """
    if isinstance(kinds, str):
        raise ValueError(f"kinds must be several names: write [{kinds!r}]")
    kinds = set(kinds)
    side = scene.image.width
    answers = []
    for thing in scene.objects:
        if thing.kind not in kinds:
            continue
        tokens = box_to_locs(thing.box, side, side)
        if encode_mask is not None:
            tokens += codes_to_segs(encode_mask(thing.cropped_mask))
        answers.append(f"{tokens} {thing.kind}")
    return " ; ".join(answers)


SIDES = {  # side → (axis of the box center, sign of the difference)
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}


def neighbor(scene: Scene, kind: str, side: str, margin: float = 10.0) -> str | None:
    """The answer to "what is `side` the `kind`?"; None where it would be a quarrel.

    The space around the thing is cut into four quarters along its diagonals. The
    answer is the one kind whose center lies in the quarter, or "nothing". A quarrel:
    the kind isn't there exactly once, two things share the quarter, or one lies within
    `margin` degrees of its border.

    Raises ValueError for a side that isn't in `SIDES`.
    """
    if side not in SIDES:
        raise ValueError(f"unknown side {side!r}; expected one of {', '.join(SIDES)}")
    if scene.counts.get(kind) != 1:
        return None
    here = next(thing for thing in scene.objects if thing.kind == kind)
    axis, sign = SIDES[side]
    found = []
    for thing in scene.objects:
        if thing is here:
            continue
        along = (thing.center[axis] - here.center[axis]) * sign
        across = abs(thing.center[1 - axis] - here.center[1 - axis])
        angle = math.degrees(math.atan2(across, along))  # 0: straight on, 180: behind
        if abs(angle - 45) < margin:
            return None
        if angle < 45:
            found.append(thing.kind)
    if len(found) > 1:
        return None
    return found[0] if found else "nothing"


@dataclass(frozen=True)
class Question:
    """A prompt and its right answer.

    `task` is caption, detect, segment, count, presence or relation.
    """

    task: str
    prompt: str
    answer: str


def caption_question(scene: Scene) -> Question:
    """`caption en`."""
    return Question("caption", "caption en", caption(scene))


def detect_question(scene: Scene, kinds: Sequence[str]) -> Question:
    """`detect owl ; pizza`; kinds that aren't there are fair to ask for."""
    prompt = f"detect {' ; '.join(kinds)}"
    return Question("detect", prompt, object_strings(scene, kinds))


def segment_question(
    scene: Scene, kinds: Sequence[str], encode_mask: EncodeMask
) -> Question:
    """`segment owl`: boxes and masks."""
    prompt = f"segment {' ; '.join(kinds)}"
    return Question("segment", prompt, object_strings(scene, kinds, encode_mask))


def count_question(scene: Scene, kind: str) -> Question:
    """`answer en how many owls are there?`; ValueError for an unknown kind."""
    prompt = f"answer en how many {_find_kind(kind).plural} are there?"
    return Question("count", prompt, str(scene.counts.get(kind, 0)))


def presence_question(scene: Scene, kind: str) -> Question:
    """`answer en is there an owl?`; ValueError for an unknown kind."""
    prompt = f"answer en is there {_find_kind(kind).with_article}?"
    return Question("presence", prompt, "yes" if kind in scene.counts else "no")


def relation_questions(scene: Scene) -> list[Question]:
    """`answer en what is left of the owl?`: every one that has a clear answer."""
    questions = []
    for kind in scene.counts:
        for side in SIDES:
            answer = neighbor(scene, kind, side)
            if answer is not None:
                prompt = f"answer en what is {side} the {kind}?"
                questions.append(Question("relation", prompt, answer))
    return questions


def _maybe_absent(scene: Scene, share: float, rng: random.Random) -> str:
    """A kind of the scene, or in `share` of the cases one that isn't there."""
    if rng.random() < share or not scene.objects:
        return absent_kind(scene, rng)
    return rng.choice(list(scene.counts))


def _kinds_to_find(scene: Scene, most: int, rng: random.Random) -> list[str]:
    """One to `most` kinds of the scene; in a tenth an absent one too, or alone."""
    if rng.random() < 0.1 or not scene.objects:
        return [absent_kind(scene, rng)]
    present = list(scene.counts)
    kinds = rng.sample(present, min(len(present), rng.randint(1, most)))
    if rng.random() < 0.1:
        kinds.append(absent_kind(scene, rng))
        rng.shuffle(kinds)
    return kinds


def absent_kind(scene: Scene, rng: random.Random) -> str:
    """A kind that isn't in the scene."""
    names = list(all_kinds())
    while (name := rng.choice(names)) in scene.counts:
        pass
    return name


def sample_question(
    scene: Scene,
    task: str,
    rng: random.Random,
    encode_mask: EncodeMask | None = None,
) -> Question:
    """A question of `task` about a scene; `segment` needs `encode_mask`.

    Things that aren't there are asked for too: in a fifth of `count`, in half of
    `presence`, and in `detect` and `segment` once in ten times alone and once in ten
    beside others. Where no relation has a clear answer, presence is asked for instead.

    Raises ValueError for an unknown task, and for `segment` without `encode_mask`.
    """
    if task == "caption":
        return caption_question(scene)
    if task == "detect":
        return detect_question(scene, _kinds_to_find(scene, 3, rng))
    if task == "segment" and encode_mask is not None:
        return segment_question(scene, _kinds_to_find(scene, 2, rng), encode_mask)
    if task == "count":
        return count_question(scene, _maybe_absent(scene, 0.2, rng))
    if task == "relation":
        questions = relation_questions(scene)
        telling = [q for q in questions if q.answer != "nothing"]
        if telling and rng.random() < 0.8:
            return rng.choice(telling)
        if questions:
            return rng.choice(questions)
    if task in ("relation", "presence"):
        return presence_question(scene, _maybe_absent(scene, 0.5, rng))
    raise ValueError(
        f"no question for task {task!r}: it is one of caption, detect, segment (given "
        "a mask encoder), count, relation and presence"
    )


def world_sentences(num_scenes: int, seed: int = 0) -> Iterator[str]:
    """What is said in this world, loc and seg tokens left out: text to learn from.

    Every kind in every prompt, then captions and relations of `num_scenes` scenes.
    """
    rng = random.Random(seed)
    for kind in all_kinds().values():
        yield f"detect {kind.name} ; {kind.name}\n"
        yield f"segment {kind.name} ; {kind.name}\n"
        yield f"answer en how many {kind.plural} are there?\n"
        yield f"answer en is there {kind.with_article}?\n"
    for _ in range(num_scenes):
        scene = make_scene(rng.choice(TRAINING_SEEDS), image_size=32)
        for question in [caption_question(scene), *relation_questions(scene)]:
            yield f"{question.prompt}\n"
            yield question.answer
    yield EMPTY_CAPTION
    yield "yes no nothing zero one two three four five six"
    yield "0 1 2 3 4 5 6 7 8 9"


SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids 0, 1, 2, 3
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
_SPACES = normalizers.Replace(" ", "▁")
# A word with the space before it; digits and line ends stand alone.
_WORDS = pre_tokenizers.Split(
    Regex(r"▁?\p{L}+|\n|\p{N}|▁?[^▁\p{L}\p{N}\n]+|▁"), "isolated"
)


def _learn_pieces(
    sentences: Iterable[str], num_pieces: int
) -> tuple[list[str], list[tuple[str, str]]]:
    """Byte-pair encoding: characters, then merged pieces, and the merges in order."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer, learner.pre_tokenizer = _SPACES, _WORDS
    trainer = trainers.BpeTrainer(
        vocab_size=num_pieces,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["▁", "\n"],
        show_progress=False,
    )
    learner.train_from_iterator(sentences, trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    return pieces[len(SPECIAL_TOKENS) :], [tuple(pair) for pair in learned["merges"]]


def _as_is(token: str) -> AddedToken:
    """A token that is found in the raw text, before anything is cut."""
    return AddedToken(token, normalized=False)


def train_tokenizer(sentences: Iterable[str], num_pieces: int = 1024) -> Tokenizer:
    """A byte-pair tokenizer laid out like PaliGemma's: pieces, loc, seg, image.

    At most `num_pieces` pieces, the 256 bytes among them. As in Gemma's, spaces become
    "▁" and belong to the word behind them, and characters never seen fall back to
    bytes, so any prompt has ids. pad, eos, bos, unk are 0…3.
    Source: Sennrich et al. 2016 (BPE); byte fallback as in the library SentencePiece.
    """
    learned, merges = _learn_pieces(sentences, num_pieces - len(BYTE_TOKENS))
    pieces = [*SPECIAL_TOKENS, *BYTE_TOKENS, *learned]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = _SPACES, _WORDS
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    locs = [loc_token(index) for index in range(NUM_LOCS)]
    segs = [seg_token(code) for code in range(NUM_SEGS)]
    tokenizer.add_special_tokens([_as_is(token) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([_as_is(token) for token in [*locs, *segs]])
    tokenizer.add_special_tokens([_as_is(IMAGE_TOKEN)])
    return tokenizer
