"""Any picture file to an upright RGB image, and to the pixels of transformers."""

import io
import struct

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from reference import STORED_TURNS

from vlm.images import image_to_pixels, load_image


@pytest.fixture(scope="module")
def picture():
    values = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((70, 50), Image.Resampling.BOX)


def their_pixels(image, image_size):
    size = {"height": image_size, "width": image_size}
    reference = transformers.SiglipImageProcessorPil(size=size)
    return reference(image, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK"])
@pytest.mark.parametrize(
    "size, image_size", [((70, 50), 28), ((9, 200), 56), ((1, 30), 42)]
)
def test_pixels_equal_the_reference(picture, mode, size, image_size):
    image = picture.resize(size).convert(mode)
    ours = image_to_pixels(load_image(image), image_size)
    theirs = their_pixels(image, image_size)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_other_statistics_or_filters_would_be_seen(picture):
    theirs = their_pixels(picture, 28)
    square = picture.resize((28, 28), Image.Resampling.BILINEAR)
    bilinear = torch.tensor(np.array(square)).permute(2, 0, 1) / 127.5 - 1
    assert (bilinear - theirs).abs().max() > 1e-2
    imagenet = (image_to_pixels(picture, 28) + 1) / 2 - 0.485
    assert (imagenet / 0.229 - theirs).abs().max() > 1e-2


# --- Pictures of every kind ---------------------------------------------------------


def same(image, expected, within=0):
    values, wanted = np.asarray(image, np.int16), np.asarray(expected, np.int16)
    assert image.mode == "RGB" and values.shape == wanted.shape
    assert np.abs(values - wanted).max() <= within


@pytest.mark.parametrize(("orientation", "back"), STORED_TURNS.items())
def test_phone_pictures_are_turned_upright(picture, tmp_path, orientation, back):
    stored = picture if back is None else picture.transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "phone.png", exif=exif)
    same(load_image(tmp_path / "phone.png"), picture)
    same(load_image(Image.open(tmp_path / "phone.png")), picture)


def test_sixteen_bits_are_scaled_to_eight(picture, tmp_path):
    gray = picture.convert("L")
    wide = np.asarray(gray).astype(np.uint16) * 257
    scan = Image.fromarray(wide)
    assert scan.mode == "I;16"
    scan.save(tmp_path / "scan.png")
    scan.save(tmp_path / "scan.ppm")
    with Image.open(tmp_path / "scan.ppm") as opened:
        assert opened.mode == "I"
    big_endian = Image.frombytes("I;16B", scan.size, wide.astype(">u2").tobytes())
    kinds = (scan, wide, "scan.png", "scan.ppm", scan.convert("I"), big_endian)
    kinds += (wide.astype(">u2"),)
    for image in kinds:
        image = tmp_path / image if isinstance(image, str) else image
        same(load_image(image), gray.convert("RGB"))


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_a_dark_frame_is_scaled_as_a_bright_one_is(mode):
    """A camera of 16 bits: what decides is the mode, not the brightest value."""
    for brightest in (200, 300):
        frame = Image.fromarray(np.array([[100, brightest]], np.uint16)).convert(mode)
        assert np.asarray(load_image(frame)).max() == round(brightest / 257)


def test_arrays_of_every_kind(picture):
    values = np.asarray(picture)
    for array in (values, values / 255, (values / 255).astype(np.float32)):
        same(load_image(array), picture)
    same(load_image(torch.tensor(values)), picture)
    gray = picture.convert("L")
    for array in (np.asarray(gray), np.asarray(gray)[:, :, None]):
        same(load_image(array), gray.convert("RGB"))
    light = gray.point(lambda value: 255 * (value > 99))
    same(load_image(np.asarray(gray) > 99), light.convert("RGB"))
    floats = Image.fromarray(np.asarray(gray, np.float32) / 255)
    assert floats.mode == "F"
    same(load_image(floats), gray.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa", "PA"])
def test_transparency_is_laid_on_white(mode):
    clear = Image.new("RGBA", (4, 4), (200, 200, 200, 0))
    clear.paste((60, 60, 60, 255), (0, 0, 2, 4))
    if mode == "La":
        clear = clear.convert("LA")
    if mode == "PA":
        clear = clear.convert("P").convert("PA")
        clear.putalpha(Image.new("L", (4, 4), 0))
        same(load_image(clear), Image.new("RGB", (4, 4), "white"))
        return
    expected = Image.new("RGB", (4, 4), "white")
    expected.paste((60, 60, 60), (0, 0, 2, 4))
    same(load_image(clear.convert(mode)), expected)


def test_a_palette_with_a_transparent_color(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.paste(0, (0, 0, 2, 4))
    image.save(tmp_path / "p.png", transparency=1)
    expected = Image.new("RGB", (4, 4), "white")
    expected.paste((10, 20, 30), (0, 0, 2, 4))
    same(load_image(tmp_path / "p.png"), expected)


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    same(load_image(str(tmp_path / "a.gif")), frames[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_pictures_one_pixel_wide(size):
    pixels = image_to_pixels(load_image(Image.new("RGB", size, "white")), 28)
    assert torch.equal(pixels, torch.ones(3, 28, 28))


def test_the_picture_that_is_given_stays_as_it_is(picture):
    sticker = picture.convert("RGBA")
    before = sticker.tobytes()
    load_image(sticker)
    assert sticker.tobytes() == before and sticker.mode == "RGBA"


# --- What is no picture -------------------------------------------------------------


def test_files_that_are_no_pictures(picture, tmp_path):
    with pytest.raises(FileNotFoundError, match="no image file at .*nowhere.png"):
        load_image(tmp_path / "nowhere.png")
    for path in (tmp_path, "~nobody/owl.png", "a" * 9999, "\0.png"):
        with pytest.raises(FileNotFoundError, match="no image file"):
            load_image(path)
    for address in ("https://example.org/owl.png", "data:image/png;base64,AAAA"):
        with pytest.raises(FileNotFoundError, match="download"):
            load_image(address)
    (tmp_path / "words.png").write_text("not a picture")
    with pytest.raises(ValueError, match="words.png is not a picture"):
        load_image(tmp_path / "words.png")
    whole = io.BytesIO()
    picture.save(whole, "PNG")
    (tmp_path / "half.png").write_bytes(whole.getvalue()[:2000])
    with pytest.raises(ValueError, match="half.png is not a picture that can be read"):
        load_image(tmp_path / "half.png")
    with (
        Image.open(tmp_path / "half.png") as opened,
        pytest.raises(ValueError, match="this is not a picture that can be read"),
    ):
        load_image(opened)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((3, 5, 5), np.uint8), r"channels last, not \[3, 5, 5\]"),
        (np.zeros(5, np.uint8), r"not \[5\]"),
        (np.zeros((0, 5, 3), np.uint8), "has no pixels"),
        (np.zeros((5, 5), np.int64), "not int64"),
        (np.full((5, 5), 1.5), "must lie in 0…1"),
        (np.full((5, 5), -0.1), "must lie in 0…1"),
        (np.full((5, 5), np.nan), "must lie in 0…1"),
        (Image.fromarray(np.full((5, 5), np.nan, np.float32)), "must lie in 0…1"),
        (Image.fromarray(np.full((5, 5), 200.0, np.float32)), "must lie in 0…1"),
        (Image.fromarray(np.full((5, 5), -1, np.int32)), "must lie in 0…65535"),
        (Image.fromarray(np.full((5, 5), 65536, np.int32)), "must lie in 0…65535"),
        (Image.new("RGB", (0, 5)), "the picture has no pixels"),
    ],
)
def test_arrays_that_are_no_pictures(array, message):
    with pytest.raises(ValueError, match=message):
        load_image(array)


def test_a_damaged_orientation_is_no_reason_to_refuse_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "damaged.jpg"
    Image.new("RGB", (20, 10), "red").save(path, exif=exif)
    data = path.read_bytes()
    start = data.index(b"Exif\0\0") + 6
    path.write_bytes(data[:start] + b"XX" + data[start + 2 :])
    assert load_image(path).size == (20, 10)


def test_a_note_that_cannot_be_written_anew_turns_the_picture_all_the_same(
    tmp_path, monkeypatch
):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10), "red").save(tmp_path / "odd.jpg", exif=exif)

    def fails(*args):
        raise struct.error("required argument is not an integer")

    monkeypatch.setattr(Image.Exif, "tobytes", fails)
    assert load_image(tmp_path / "odd.jpg").size == (10, 20)


def test_a_picture_that_was_given_stays_as_it_was(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10), "red").save(tmp_path / "phone.jpg", exif=exif)
    with Image.open(tmp_path / "phone.jpg") as picture:
        assert load_image(picture).size == (10, 20)
        assert picture.size == (20, 10) and picture.getexif()[0x0112] == 6


def test_tensors_of_bfloat16_are_pictures_too():
    half = torch.full((4, 5), 0.5)
    assert load_image(half.bfloat16()).tobytes() == load_image(half).tobytes()
