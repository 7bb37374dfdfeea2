"""Rebuild the pictures under ``vlm/assets`` from pinned public packages.

The repository ships what this script makes, so nothing here is needed to use the
course. Run it to change the set of stickers, or to see where every file comes from::

    python tools/make_assets.py                      # fetch the packages (npm, pip)
    python tools/make_assets.py --packages FOLDER    # or take them from a folder

Five npm packages hold the stickers, one per style; two wheels hold the photographs.
Each package's SHA-256 is checked before a byte of it is read. The result depends only
on the packages and on the versions of Pillow and resvg-py (Pillow 13.0.0 and
resvg-py 0.5.0 made the shipped files): running the script twice gives the same files.

It writes the images and ``kinds.json`` and removes images it no longer makes. The
licence files beside them are written by hand and left alone.

Needs Pillow, resvg-py and tqdm, and npm on the path unless ``--packages`` is given.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image
from tqdm import tqdm

ASSETS = Path(__file__).resolve().parent.parent / "vlm" / "assets"

STICKER_SIDE = 128  # longest side of a sticker, in pixels
RENDER_SIDE = 512  # vector stickers are drawn this large, then scaled down
ALPHA_FLOOR = 8  # fainter pixels do not count when a sticker is trimmed
STICKER_QUALITY = 88
PHOTO_SIDE = 512
PHOTO_QUALITY = 88


@dataclass(frozen=True)
class Package:
    """A package at one version, and the file it is published as."""

    name: str
    version: str
    file: str
    sha256: str

    @property
    def is_wheel(self) -> bool:
        """Whether it is a Python wheel (otherwise it is an npm tarball)."""
        return self.file.endswith(".whl")


FLUENT = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
NOTO = Package(
    "@iconify-json/noto",
    "1.2.9",
    "iconify-json-noto-1.2.9.tgz",
    "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
)
FLAT = Package(
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "iconify-json-fluent-emoji-flat-1.2.6.tgz",
    "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
)
TWEMOJI = Package(
    "@twemoji/svg",
    "15.0.0",
    "twemoji-svg-15.0.0.tgz",
    "1d2907557a422c7c4e3feca50ef915c39da1db3d76b4a4d7e73fb59bce4403c3",
)
FXEMOJI = Package(
    "@iconify-json/fxemoji",
    "1.2.2",
    "iconify-json-fxemoji-1.2.2.tgz",
    "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
)
SCIKIT_IMAGE = Package(
    "scikit-image",
    "0.26.0",
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
)
SCIKIT_LEARN = Package(
    "scikit-learn",
    "1.9.1",
    "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
)
PACKAGES = (FLUENT, NOTO, FLAT, TWEMOJI, FXEMOJI, SCIKIT_IMAGE, SCIKIT_LEARN)

# Photograph -> the wheel that holds it and its path there.
PHOTOS: dict[str, tuple[Package, str]] = {
    "astronaut": (SCIKIT_IMAGE, "skimage/data/astronaut.png"),
    "brick": (SCIKIT_IMAGE, "skimage/data/brick.png"),
    "camera": (SCIKIT_IMAGE, "skimage/data/camera.png"),
    "chelsea": (SCIKIT_IMAGE, "skimage/data/chelsea.png"),
    "china": (SCIKIT_LEARN, "sklearn/datasets/images/china.jpg"),
    "coffee": (SCIKIT_IMAGE, "skimage/data/coffee.png"),
    "flower": (SCIKIT_LEARN, "sklearn/datasets/images/flower.jpg"),
    "grass": (SCIKIT_IMAGE, "skimage/data/grass.png"),
    "gravel": (SCIKIT_IMAGE, "skimage/data/gravel.png"),
    "rocket": (SCIKIT_IMAGE, "skimage/data/rocket.jpg"),
}

# Kind -> its Unicode code point. Chosen to be everyday things with a short name, drawn
# as the same thing in the first four styles, unlike one another, and without a
# background square or disc. The fifth style has three quarters: see FXEMOJI_LACKS.
KINDS: dict[str, str] = {
    "airplane": "2708",
    "alarm clock": "23f0",
    "ambulance": "1f691",
    "anchor": "2693",
    "apple": "1f34e",
    "avocado": "1f951",
    "backpack": "1f392",
    "balloon": "1f388",
    "banana": "1f34c",
    "basketball": "1f3c0",
    "bat": "1f987",
    "bear": "1f43b",
    "bee": "1f41d",
    "bell": "1f514",
    "bicycle": "1f6b2",
    "book": "1f4d5",
    "bus": "1f68c",
    "butterfly": "1f98b",
    "cactus": "1f335",
    "camera": "1f4f7",
    "candle": "1f56f",
    "car": "1f697",
    "carrot": "1f955",
    "cat": "1f408",
    "chair": "1fa91",
    "cookie": "1f36a",
    "cow": "1f404",
    "crab": "1f980",
    "crocodile": "1f40a",
    "crown": "1f451",
    "cupcake": "1f9c1",
    "dog": "1f415",
    "doughnut": "1f369",
    "drum": "1f941",
    "duck": "1f986",
    "eggplant": "1f346",
    "elephant": "1f418",
    "flamingo": "1f9a9",
    "fox": "1f98a",
    "frog": "1f438",
    "ghost": "1f47b",
    "gift": "1f381",
    "giraffe": "1f992",
    "guitar": "1f3b8",
    "hamburger": "1f354",
    "hammer": "1f528",
    "hedgehog": "1f994",
    "helicopter": "1f681",
    "horse": "1f40e",
    "hot dog": "1f32d",
    "hourglass": "23f3",
    "ice cream": "1f368",
    "key": "1f511",
    "koala": "1f428",
    "ladybug": "1f41e",
    "lemon": "1f34b",
    "light bulb": "1f4a1",
    "lion": "1f981",
    "locomotive": "1f682",
    "lollipop": "1f36d",
    "magnet": "1f9f2",
    "monkey": "1f412",
    "mushroom": "1f344",
    "octopus": "1f419",
    "owl": "1f989",
    "palm tree": "1f334",
    "panda": "1f43c",
    "parrot": "1f99c",
    "penguin": "1f427",
    "pig": "1f416",
    "pineapple": "1f34d",
    "pizza": "1f355",
    "pretzel": "1f968",
    "pumpkin": "1f383",
    "rabbit": "1f407",
    "robot": "1f916",
    "rocket": "1f680",
    "sailboat": "26f5",
    "shark": "1f988",
    "sheep": "1f411",
    "snail": "1f40c",
    "snake": "1f40d",
    "snowman": "26c4",
    "soccer ball": "26bd",
    "star": "2b50",
    "strawberry": "1f353",
    "sunflower": "1f33b",
    "taco": "1f32e",
    "television": "1f4fa",
    "tiger": "1f405",
    "top hat": "1f3a9",
    "tractor": "1f69c",
    "trophy": "1f3c6",
    "trumpet": "1f3ba",
    "tulip": "1f337",
    "turtle": "1f422",
    "umbrella": "2602",
    "unicorn": "1f984",
    "watermelon": "1f349",
    "whale": "1f433",
}

# Kind -> its drawing's name in the Firefox OS set, which has no table of code points,
# where that isn't the kind's name without spaces. Whole animals where the other styles
# show whole animals.
FXEMOJI_NAMES = {
    "apple": "redapple",
    "backpack": "schoolsatchel",
    "bee": "honeybee",
    "book": "closedbook",
    "car": "automobile",
    "cat": "catside",
    "dog": "dogside",
    "eggplant": "aubergine",
    "fox": "foxsmiling",
    "gift": "present",
    "hourglass": "hourglassflowingsand",
    "ladybug": "ladybeetle",
    "locomotive": "steamlocomotive",
    "panda": "pandaface",
    "pig": "pigside",
    "pizza": "sliceofpizza",
    "pumpkin": "jackolantern",
    "rabbit": "bunnyside",
    "snowman": "snowmanwithoutsnow",
    "star": "whitemediumstar",
    "tiger": "tigerside",
    "whale": "spurtingwhale",
}
# What that set doesn't draw, or draws as something else: a bunch of bananas, a ball
# above a hoop, a sailboat on a square of sky, a folded umbrella.
FXEMOJI_LACKS = {
    *("avocado", "bat", "butterfly", "carrot", "chair", "crab", "cupcake", "drum"),
    *("duck", "flamingo", "giraffe", "hedgehog", "hot dog", "lion", "magnet", "owl"),
    *("parrot", "pretzel", "robot", "shark", "taco", "unicorn"),
    *("banana", "basketball", "sailboat", "umbrella"),
}

# Plurals that do not follow the rules in ``plural_of``.
IRREGULAR_PLURALS = {"cactus": "cacti", "sheep": "sheep", "snowman": "snowmen"}


def plural_of(name: str) -> str:
    """Return the plural of a kind's name: ``"butterfly"`` gives ``"butterflies"``."""
    if name in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[name]
    if name.endswith(("s", "x", "z", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def fetch_package(package: Package, folder: Path) -> None:
    """Fetch ``package`` into ``folder`` with npm or pip, as configured here.

    The wheels are asked for by their platform, so the same file comes back on any
    machine; nothing is installed.
    """
    if not package.is_wheel:
        requirement = f"{package.name}@{package.version}"
        command = ["npm", "pack", "--silent", requirement]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--python-version=3.11"]
        command += ["--implementation=cp", "--abi=cp311"]
        for platform in package.file.removesuffix(".whl").split("-")[-1].split("."):
            command.append(f"--platform={platform}")
        command.append(f"{package.name}=={package.version}")
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def check_package(package: Package, folder: Path) -> Path:
    """Return the path of ``package`` in ``folder`` once its SHA-256 is right."""
    path = folder / package.file
    if not path.is_file():
        raise SystemExit(f"{path} is missing")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise SystemExit(f"{path}: SHA-256 is {digest}, not {package.sha256}")
    return path


def read_npm(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """Return the files of an npm tarball whose path under ``package/`` is wanted."""
    files = {}
    with tarfile.open(path) as tarball:
        for member in tarball:
            name = member.name.removeprefix("package/")
            if name in wanted:
                files[name] = tarball.extractfile(member).read()
    return files


def spellings(codepoint: str) -> tuple[str, str]:
    """Return a code point's file names: bare, and asking for the emoji form."""
    return codepoint, f"{codepoint}-fe0f"


def draw_svg(svg: str) -> Image.Image:
    """Draw an SVG picture at ``RENDER_SIDE`` pixels on a transparent ground."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIDE, height=RENDER_SIDE)
    return Image.open(io.BytesIO(bytes(png)))


def load_fluent(path: Path) -> dict[str, Image.Image]:
    """Return every kind's picture in the shaded style, 256 pixels a side."""
    names = {
        f"assets/{spelling}.webp": kind
        for kind, codepoint in KINDS.items()
        for spelling in spellings(codepoint)
    }
    files = read_npm(path, set(names))
    return {names[name]: Image.open(io.BytesIO(data)) for name, data in files.items()}


def draw_icon(icons: dict, word: str) -> Image.Image:
    """Draw one of the drawings in an Iconify package's ``icons.json``."""
    icon = icons["icons"][word]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return draw_svg(
        '<svg xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )


def load_iconify(path: Path) -> dict[str, Image.Image]:
    """Return every kind's picture from a package of Iconify's.

    Such a package keeps all its drawings in one JSON file, named in words; a second
    file gives the name of each code point.
    """
    files = read_npm(path, {"icons.json", "chars.json"})
    icons = json.loads(files["icons.json"])
    words = json.loads(files["chars.json"])
    pictures = {}
    for kind, codepoint in KINDS.items():
        word = next(words[s] for s in spellings(codepoint) if s in words)
        while word in icons.get("aliases", {}):
            word = icons["aliases"][word]["parent"]
        pictures[kind] = draw_icon(icons, word)
    return pictures


def load_fxemoji(path: Path) -> dict[str, Image.Image]:
    """Return the pictures that the Firefox OS set has, found by name."""
    icons = json.loads(read_npm(path, {"icons.json"})["icons.json"])
    return {
        kind: draw_icon(icons, FXEMOJI_NAMES.get(kind, kind.replace(" ", "")))
        for kind in KINDS
        if kind not in FXEMOJI_LACKS
    }


def load_twemoji(path: Path) -> dict[str, Image.Image]:
    """Return every kind's picture in Twemoji's style."""
    names = {
        f"{spelling}.svg": kind
        for kind, codepoint in KINDS.items()
        for spelling in spellings(codepoint)
    }
    files = read_npm(path, set(names))
    return {names[name]: draw_svg(data.decode()) for name, data in files.items()}


STYLES: dict[str, tuple[Package, Callable[[Path], dict[str, Image.Image]]]] = {
    "fluent": (FLUENT, load_fluent),
    "noto": (NOTO, load_iconify),
    "flat": (FLAT, load_iconify),
    "twemoji": (TWEMOJI, load_twemoji),
    "fxemoji": (FXEMOJI, load_fxemoji),
}


def shrink(image: Image.Image, side: int) -> Image.Image:
    """Scale ``image`` down so that its longest side is at most ``side`` pixels."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    size = tuple(max(1, round(length * scale)) for length in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)


def trim(image: Image.Image) -> Image.Image:
    """Crop an RGBA picture to the pixels that are not (almost) transparent."""
    visible = image.getchannel("A").point(lambda a: 255 * (a > ALPHA_FLOOR))
    return image.crop(visible.getbbox())


def make_sticker(image: Image.Image) -> Image.Image:
    """Trim a picture, scale it down, and trim what scaling made faint."""
    return trim(shrink(trim(image.convert("RGBA")), STICKER_SIDE))


def remove_others(folder: Path, suffix: str, names: set[str]) -> None:
    """Remove the images in ``folder`` that are not among ``names``."""
    for path in folder.glob(f"*{suffix}"):
        if path.name not in names:
            path.unlink()


def make_stickers(packages: Path, folder: Path) -> None:
    """Write ``kinds.json`` and one folder of stickers for each style."""
    kinds = [
        {"name": name, "plural": plural_of(name), "codepoint": KINDS[name]}
        for name in sorted(KINDS)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join("  " + json.dumps(kind) for kind in kinds)
    (folder / "kinds.json").write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    for style, (package, load) in STYLES.items():
        pictures = load(check_package(package, packages))
        lacks = FXEMOJI_LACKS if style == "fxemoji" else set()
        missing = sorted(set(KINDS) - lacks - set(pictures))
        if missing:
            raise SystemExit(f"{package.name} lacks {', '.join(missing)}")
        target = folder / style
        target.mkdir(exist_ok=True)
        files = {f"{name.replace(' ', '_')}.webp": name for name in sorted(pictures)}
        for file, name in tqdm(files.items(), desc=style, unit="sticker"):
            make_sticker(pictures[name]).save(
                target / file,
                quality=STICKER_QUALITY,
                alpha_quality=100,  # the mask is kept exactly
                method=4,
            )
        remove_others(target, ".webp", set(files))


def make_photos(packages: Path, folder: Path) -> None:
    """Write the photographs, scaled down, as JPEG files."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        wheels = {
            package: stack.enter_context(
                zipfile.ZipFile(check_package(package, packages))
            )
            for package in (SCIKIT_IMAGE, SCIKIT_LEARN)
        }
        for name, (package, path) in tqdm(PHOTOS.items(), desc="photos", unit="photo"):
            image = Image.open(io.BytesIO(wheels[package].read(path)))
            if image.mode != "L":
                image = image.convert("RGB")
            image = shrink(image, PHOTO_SIDE)
            image.info.clear()  # no metadata carried over
            image.save(folder / f"{name}.jpg", quality=PHOTO_QUALITY, optimize=True)
    remove_others(folder, ".jpg", {f"{name}.jpg" for name in PHOTOS})


def main() -> None:
    """Read the arguments, get the packages, and write the assets."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--packages",
        type=Path,
        metavar="FOLDER",
        help="folder that holds the packages already (default: fetch them)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ASSETS,
        metavar="FOLDER",
        help="where to write (default: the repository's vlm/assets)",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        packages = arguments.packages
        if packages is None:
            packages = Path(temporary)
            for package in tqdm(PACKAGES, desc="fetch", unit="package"):
                fetch_package(package, packages)
        for package in PACKAGES:
            check_package(package, packages)
        make_stickers(packages, arguments.output / "stickers")
        make_photos(packages, arguments.output / "photos")


if __name__ == "__main__":
    main()
