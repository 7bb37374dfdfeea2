"""Pictures as they come: any format, mode, size and orientation, through the command.

The answer is given; what counts is what the model sees and where boxes and masks land.
"""

from collections.abc import Callable
from contextlib import suppress
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from reference import STORED_TURNS, randomize, tiny_config

import vlm.answers
import vlm.playground
from vlm.answers import parse_answer
from vlm.images import image_to_pixels, load_image
from vlm.inference import test_inference
from vlm.mask_tokens import MaskDecoder
from vlm.paligemma import PaliGemmaForConditionalGeneration
from vlm.playground import Playground
from vlm.processing import PaliGemmaProcessor
from vlm.sampling import Generation

SIDE = 28  # of the square that the tiny model sees
ORIENTATION = 0x0112
# A box over the right half of the width and the upper quarter of the height.
ANSWER = "<loc0000><loc0512><loc0256><loc1023>" + "<seg003>" * 16 + " owl"


@pytest.fixture(scope="module")
def model(tokenizer):
    config = tiny_config(
        text=dict(vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return randomize(PaliGemmaForConditionalGeneration(config))


@pytest.fixture(scope="module")
def processor(tokenizer):
    return PaliGemmaProcessor(tokenizer, (SIDE // 14) ** 2, SIDE)


@pytest.fixture(scope="module")
def decoder():
    """Its masks are the left half of their boxes, whatever the codes."""
    decoder = MaskDecoder()
    left = torch.ones(1, 1, 64, 64)
    left[..., 32:] = -1
    decoder.forward = lambda codes: left.expand(len(codes), -1, -1, -1)
    return decoder


@pytest.fixture
def seen(monkeypatch):
    """What the model is shown, one picture a question; it answers ANSWER."""
    shown = []

    def steps(model, tokenizer, inputs, settings):
        shown.append(inputs["pixel_values"][0])
        yield [Generation([7, tokenizer.eos_token_id], [1.0, 1.0], [ANSWER, ""])]

    for module in (vlm.answers, vlm.playground):
        monkeypatch.setattr(module, "generation_steps", steps)
    return shown


def scene(width: int = 300, height: int = 200) -> Image.Image:
    """No two corners and no two halves alike; smooth, so that lossy formats keep it."""
    x, y = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]
    red, green = 255 * x + 0 * y, 255 * y + 0 * x
    blue = 255 * (x * y)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def exif(orientation: int) -> Image.Exif:
    tag = Image.Exif()
    tag[ORIENTATION] = orientation
    return tag


def sixteen_bits(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)


def with_alpha(picture: Image.Image) -> Image.Image:
    """Opaque on the left, clear on the right."""
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (picture.width // 2, 0, *picture.size))
    picture = picture.copy()
    picture.putalpha(alpha)
    return picture


def on_white(picture: Image.Image) -> Image.Image:
    picture = picture.copy()
    picture.paste("white", (picture.width // 2, 0, *picture.size))
    return picture


def gray(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def same(picture: Image.Image) -> Image.Image:
    return picture


def frames(picture: Image.Image) -> dict:
    return {"save_all": True, "append_images": [picture.rotate(180)]}


MOVING = frames(scene())
# name: (what is saved, how, what should be seen, by how much of 255 it may differ)
FILES: dict[str, tuple[Callable, dict, Callable, float]] = {
    "rgb.png": (same, {}, same, 0),
    "rgb.bmp": (same, {}, same, 0),
    "rgb.tiff": (same, {}, same, 0),
    "rgb.jpg": (same, {"quality": 90}, same, 3),
    "exact.webp": (same, {"lossless": True}, same, 0),
    "lossy.webp": (same, {"quality": 80}, same, 4),
    "still.gif": (same, {}, same, 12),
    "moving.gif": (same, MOVING, same, 12),
    "moving.webp": (same, {"lossless": True, **MOVING}, same, 0),
    "moving.png": (same, MOVING, same, 0),
    "gray.png": (lambda p: p.convert("L"), {}, gray, 0),
    "gray.jpg": (lambda p: p.convert("L"), {"quality": 90}, gray, 3),
    "gray-alpha.png": (
        lambda p: with_alpha(p.convert("L")),
        {},
        lambda p: on_white(gray(p)),
        1,
    ),
    "16-bit.png": (sixteen_bits, {}, gray, 1),
    "16-bit.tiff": (sixteen_bits, {}, gray, 1),
    "palette.png": (lambda p: p.quantize(256), {}, same, 12),
    "palette-alpha.png": (
        lambda p: with_alpha(p).quantize(256),
        {},
        on_white,
        16,
    ),
    "black-and-white.png": (
        lambda p: p.convert("1"),
        {},
        lambda p: p.convert("1").convert("RGB"),
        0,
    ),
    "cmyk.jpg": (lambda p: p.convert("CMYK"), {"quality": 95}, same, 5),
    "cmyk.tiff": (lambda p: p.convert("CMYK"), {}, same, 1),
    "rgba.png": (with_alpha, {}, on_white, 1),
    "rgba.webp": (with_alpha, {"lossless": True}, on_white, 1),
}


def ask(model, processor, decoder, path, **more) -> str:
    return test_inference(
        model, processor, "cpu", "segment owl", path, decoder=decoder, **more
    )


@pytest.mark.parametrize("name", FILES)
def test_a_format_is_seen_as_it_looks(
    name, model, processor, decoder, seen, tmp_path, capsys
):
    make, settings, look, tolerance = FILES[name]
    make(scene()).save(tmp_path / name, **settings)
    ask(model, processor, decoder, tmp_path / name, output=tmp_path / "out.png")
    # The upper quarter of the right half, and of that the left half: a sixteenth.
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        *("owl", "150", "0", "300", "50"),
        *(str(75 * 50), "1.00"),
    ]
    with Image.open(tmp_path / "out.png") as drawn:
        assert (drawn.mode, drawn.size) == ("RGB", (300, 200))
    wanted = image_to_pixels(look(scene()), SIDE)
    difference = (seen[0] - wanted).abs().max().item() * 127.5
    assert difference <= tolerance + 0.01


@pytest.mark.parametrize("orientation", STORED_TURNS)
@pytest.mark.parametrize("name", ["phone.jpg", "phone.png", "phone.webp"])
def test_a_turned_photograph_is_answered_upright(
    name, orientation, model, processor, decoder, seen, tmp_path, capsys
):
    turn = STORED_TURNS[orientation]
    stored = scene() if turn is None else scene().transpose(turn)
    lossless = {"lossless": True} if name.endswith("webp") else {"quality": 95}
    stored.save(tmp_path / name, exif=exif(orientation), **lossless)
    ask(model, processor, decoder, tmp_path / name, output=tmp_path / "out.png")
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[1:6] == ["150", "0", "300", "50", str(75 * 50)]
    wanted = image_to_pixels(scene(), SIDE)
    assert (seen[0] - wanted).abs().max().item() * 127.5 <= 3
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.size == (300, 200)
        assert drawn.getexif().get(ORIENTATION) is None  # it would be turned again
        change = np.asarray(drawn).astype(int) - np.asarray(scene())
    changed = np.abs(change).max(axis=-1) > 30
    # Drawn where the box is, and nowhere else.
    assert changed[:50, 150:].mean() > 0.3
    assert changed[60:].mean() == changed[:, :140].mean() == 0


def test_a_picture_of_16_bits_can_be_turned_too(
    model, processor, decoder, seen, tmp_path, capsys
):
    stored = sixteen_bits(scene().transpose(STORED_TURNS[6]))
    stored.save(tmp_path / "scan.png", exif=exif(6))
    ask(model, processor, decoder, tmp_path / "scan.png")
    assert "150   0  300  50" in capsys.readouterr().out
    wanted = image_to_pixels(gray(scene()), SIDE)
    assert (seen[0] - wanted).abs().max().item() * 127.5 <= 1


@pytest.mark.parametrize("size", [(1, 400), (400, 1), (1, 1), (3, 5000), (28, 28)])
def test_narrow_pictures(size, model, processor, decoder, seen, tmp_path, capsys):
    scene(*size).save(tmp_path / "narrow.png")
    ask(model, processor, decoder, tmp_path / "narrow.png", output=tmp_path / "o.png")
    row = capsys.readouterr().out.splitlines()[-1].split()
    x0, y0, x1, y1, mask = map(int, row[1:6])
    assert 0 <= x0 <= x1 == size[0] and 0 == y0 <= y1 <= size[1]
    assert 1 <= mask <= size[0] * size[1]
    with Image.open(tmp_path / "o.png") as drawn:
        assert drawn.size == size


def damaged(data: bytes, random: Random) -> bytes:
    """A few bytes changed, left out or put in, or the end cut off."""
    data = bytearray(data)
    for _ in range(random.choice([1, 2, 4])):
        place, some = random.randrange(len(data)), random.randbytes(random.randrange(5))
        damage = random.choice(["change", "change", "insert", "delete", "cut"])
        if damage == "change":
            data[place] = random.choice([0, 127, 255, random.randrange(256)])
        elif damage == "insert":
            data[place:place] = some
        elif damage == "delete":
            del data[place : place + len(some)]
        else:
            del data[max(place, 2) :]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of much that it mends
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_refused(name, tmp_path):
    make, settings, _, _ = FILES[name]
    path, small = tmp_path / name, scene(9, 6)  # small: damage hits headers too
    moves = frames(small) if "save_all" in settings else {}
    make(small).save(path, exif=exif(6), **{**settings, **moves})
    whole, random, read = path.read_bytes(), Random(0), 0
    for _ in range(40):
        path.write_bytes(damaged(whole, random))
        with suppress(ValueError):  # and nothing else
            load_image(path)
            read += 1
        try:
            opened = Image.open(path)
        except Exception:  # Pillow's own, before the picture is ours
            continue
        with opened, suppress(ValueError):
            load_image(opened)
    assert read < 40


def test_the_same_answer_scales_with_the_picture(decoder):
    answer = Generation([7], [1.0], [ANSWER])
    (small,) = parse_answer("segment owl", answer, (300, 200), decoder)
    (large,) = parse_answer("segment owl", answer, (3000, 1000), decoder)
    scales = (10, 5, 10, 5)
    assert large.box == pytest.approx([v * s for v, s in zip(small.box, scales)])
    assert large.mask.shape == (1000, 3000)
    assert large.mask.mean() == pytest.approx(small.mask.mean(), abs=0.002)


def test_forty_eight_million_pixels(model, processor, decoder, seen, tmp_path, capsys):
    large = scene().resize((8000, 6000), Image.Resampling.NEAREST)
    large.save(tmp_path / "large.jpg")
    text = ask(
        *(model, processor, decoder, tmp_path / "large.jpg"),
        output=tmp_path / "out.jpg",
    )
    assert text == ANSWER
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[1:5] == ["4004", "0", "8000", "1501"]  # 8000 · 512 / 1023, …
    assert int(row[5]) == pytest.approx(1998 * 1501, rel=0.01)
    with Image.open(tmp_path / "out.jpg") as drawn:
        assert drawn.size == (8000, 6000)


@pytest.mark.parametrize("name", ["rgb.jpg", "moving.gif", "16-bit.png", "cmyk.jpg"])
def test_an_upload_is_the_picture_that_the_command_reads(
    name, model, processor, decoder, seen, tmp_path
):
    make, settings, look, tolerance = FILES[name]
    make(scene()).save(tmp_path / name, **settings)
    playground = Playground(model, processor, decoder)
    playground.open((tmp_path / name).read_bytes(), name)
    playground.controls.prompt.value = "segment owl"
    playground.run()
    assert playground.drawing.size == (300, 200)
    assert playground.found[0].mask.shape == (200, 300)
    wanted = image_to_pixels(look(scene()), SIDE)
    assert (seen[-1] - wanted).abs().max().item() * 127.5 <= tolerance + 0.01


def test_an_upload_is_turned_upright(model, processor, decoder, seen, tmp_path):
    path = tmp_path / "phone.jpg"
    scene().transpose(STORED_TURNS[8]).save(path, exif=exif(8), quality=95)
    playground = Playground(model, processor, decoder)
    playground.open(path.read_bytes(), path.name)
    assert playground.image.size == (300, 200)
    assert "300 × 200" in playground.output.line.value
