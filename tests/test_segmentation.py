"""Masks out of answers: what is valid, which pixels it is, whose decoder reads it."""

import dataclasses
import inspect
import random
import time
from math import exp, floor, log

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from vlm.detection import Detection, ParsedObjects, draw_objects
from vlm.hub import EMBEDDED
from vlm.images import load_image
from vlm.mask_tokens import MaskDecoder, MaskVQVAE
from vlm.metrics import mean_iou
from vlm.processing import box_to_locs, codes_to_segs, locs_to_box
from vlm.questions import object_strings
from vlm.sampling import Generation
from vlm.scenes import VALIDATION_SEEDS, make_scene
from vlm.segmentation import (
    GOOGLE_DECODER,
    GOOGLE_SHA256,
    Segmentation,
    load_mask_decoder,
    parse_segmentations,
    paste_mask,
    pixel_span,
)

BOX = "<loc0100><loc0200><loc0300><loc0400>"  # y0 x0 y1 x1
SEGS = codes_to_segs(range(16))


class Filled(MaskDecoder):
    """Everything inside, whatever the codes; remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, codes):
        self.asked.append(codes)
        return torch.ones(len(codes), 1, 64, 64)


@pytest.fixture(scope="module")
def embedded():
    return load_mask_decoder()


def smooth_values(seed: int) -> torch.Tensor:
    """64 × 64 values about -1…1 with a border somewhere."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 1, 6, 6, generator=generator)
    return F.interpolate(noise, (64, 64), mode="bicubic")[0, 0]


# Answers


def test_the_mask_lies_where_the_box_is():
    (owl,) = parse_segmentations(f"{BOX}{SEGS} owl", 2046, 1023, Filled())
    assert owl.label == "owl" and owl.score == 1.0
    assert owl.box == (400.0, 100.0, 800.0, 300.0)
    assert owl.mask.shape == (1023, 2046) and owl.mask.dtype == bool
    assert owl.mask[100:300, 400:800].all()
    assert owl.mask.sum() == 200 * 400


def test_all_objects_go_through_the_decoder_in_one_call():
    decoder = Filled()
    other = codes_to_segs(range(100, 116))
    text = f"{BOX}{SEGS} hot dog ; {BOX}{other} owl;{BOX}{SEGS}  a <b> c "
    found = parse_segmentations(text, 64, 48, decoder)
    assert [s.label for s in found] == ["hot dog", "owl", "a <b> c"]
    assert found.invalid == 0
    (codes,) = decoder.asked
    assert codes.tolist() == [list(range(16)), list(range(100, 116)), list(range(16))]


def test_objects_together_are_what_they_are_alone(embedded):
    rng = random.Random(0)
    things = []
    for label in ("owl", "bat", "cow"):
        segs = codes_to_segs([rng.randrange(128) for _ in range(16)])
        things.append(f"{BOX}{segs} {label}")
    together = parse_segmentations(" ; ".join(things), 300, 200, embedded)
    for one, text in zip(together, things, strict=True):
        (alone,) = parse_segmentations(text, 300, 200, embedded)
        assert alone.label == one.label and alone.box == one.box
        assert (alone.mask != one.mask).sum() <= 2  # rounding, where a value is 0


@pytest.mark.parametrize("text", ["", " ", " ; ", "\n"])
def test_an_answer_without_things_is_empty_and_needs_no_decoder(text):
    decoder = Filled()
    found = parse_segmentations(text, 10, 10, decoder)
    assert isinstance(found, ParsedObjects)
    assert found == [] and found.invalid == 0 and not decoder.asked


@pytest.mark.parametrize(
    "bad",
    [
        "owl",
        f"{BOX} owl",
        f"{SEGS} owl",
        f"{BOX}{SEGS}",
        f"{BOX}{SEGS[:-8]} owl",
        f"{BOX}{SEGS}<seg000> owl",
        f"{BOX}{SEGS[:-8]}<seg128> owl",
        f"{BOX}{SEGS[:-8]}<seg999> owl",
        f"{BOX}{SEGS[:40]}",
        f"{BOX[:-9]}{SEGS} owl",
        f"{BOX}<loc0500>{SEGS} owl",
        f"{BOX[:-9]}<loc1024>{SEGS} owl",
        f"{SEGS}{BOX} owl",
        f"owl {BOX}{SEGS}",
        f"{BOX}{SEGS} owl <loc0001>",
        f"{BOX}{SEGS} <seg001>",
        f"{BOX} {SEGS} owl",
        f"<loc0300><loc0200><loc0100><loc0400>{SEGS} owl",
        f"<loc0100><loc0400><loc0300><loc0200>{SEGS} owl",
        f"<loc0100><loc0200><loc0100><loc0400>{SEGS} owl",
        f"<loc0100><loc0200><loc0300><loc0200>{SEGS} owl",
    ],
)
def test_what_is_no_mask_is_left_out_and_counted(bad):
    good = f"{BOX}{SEGS}"
    decoder = Filled()
    found = parse_segmentations(f"{good} bat ; {bad} ; {good} cow", 50, 50, decoder)
    assert [s.label for s in found] == ["bat", "cow"]
    assert found.invalid == 1
    assert len(decoder.asked[0]) == 2
    alone = parse_segmentations(bad, 50, 50, decoder)
    assert alone == [] and alone.invalid == 1


def test_an_exact_repeat_is_left_out_counted_and_not_decoded():
    decoder = Filled()
    one, other = f"{BOX}{SEGS}", f"{BOX}{SEGS[:-8]}<seg099>"
    text = f"{one} owl ; {other} owl" + f" ; {one} owl" * 5 + f" ; {BOX}"
    found = parse_segmentations(text, 50, 50, decoder)
    assert [s.label for s in found] == ["owl", "owl"]
    assert (found.repeated, found.invalid) == (5, 1)
    assert len(decoder.asked[0]) == 2


def test_what_is_no_mask_is_invalid_each_time():
    found = parse_segmentations(" ; ".join([f"{BOX} owl"] * 3), 50, 50, Filled())
    assert found == [] and (found.repeated, found.invalid) == (0, 3)


@pytest.mark.parametrize("side", [None, 0, -64, 64.5, 64.0, float("nan"), "64"])
def test_what_is_no_size_is_refused_even_where_nothing_was_found(side):
    unchecked = inspect.unwrap(parse_segmentations)
    for text in ("", f"{BOX}{SEGS} owl"):
        with pytest.raises((ValueError, TypeError), match="width"):
            unchecked(text, side, 50, Filled())
        with pytest.raises((ValueError, TypeError), match="height"):
            unchecked(text, 50, side, Filled())


@pytest.mark.parametrize("decoder", [None, "masks", EMBEDDED])
def test_what_is_no_decoder_is_refused_even_where_nothing_was_found(decoder):
    for text in ("", f"{BOX}{SEGS} owl"):
        with pytest.raises(TypeError, match="decoder"):
            inspect.unwrap(parse_segmentations)(text, 50, 50, decoder)


def test_the_score_is_that_of_all_the_objects_tokens():
    pieces = [(f"<loc{n:04d}>", 0.5) for n in (100, 200, 300, 400)]
    pieces += [(f"<seg{n:03d}>", 0.25) for n in range(16)] + [
        (" owl", 0.9),
        ("", 0.001),
    ]
    names, chances = map(list, zip(*pieces))
    answer = Generation(list(range(len(pieces))), chances, names)
    (owl,) = parse_segmentations(answer, 100, 100, Filled())
    expected = exp((4 * log(0.5) + 16 * log(0.25) + log(0.9)) / 21)
    assert owl.score == pytest.approx(expected)


def test_a_decoder_in_half_precision_will_do(embedded):
    half = MaskDecoder.from_pretrained(EMBEDDED).to(torch.bfloat16)
    text = f"{BOX}{SEGS} owl"
    (a,) = parse_segmentations(text, 200, 200, half)
    (b,) = parse_segmentations(text, 200, 200, embedded)
    assert (a.mask != b.mask).mean() < 0.01


def test_a_segmentation_is_one_thing_and_does_not_change():
    thing = Segmentation("owl", (0.0, 0.0, 2.0, 2.0), np.ones((2, 2), bool))
    with pytest.raises(dataclasses.FrozenInstanceError):
        thing.label = "bat"
    assert thing == thing and thing != dataclasses.replace(thing)
    assert "mask" not in repr(thing)
    with pytest.raises(Exception, match="mask"):
        Segmentation("owl", (0.0, 0.0, 2.0, 2.0), np.ones((2, 2)))  # not bool


def test_the_truth_survives_its_tokens(embedded):
    encode = MaskVQVAE.from_pretrained(EMBEDDED).encode_masks
    scenes = [make_scene(seed, 128) for seed in VALIDATION_SEEDS[:8]]
    texts = [object_strings(s, *s.counts, encode_masks=encode) for s in scenes]
    found = [parse_segmentations(text, 128, 128, embedded) for text in texts]
    assert all(one.invalid == 0 for one in found)
    truth = [s.objects for s in scenes]
    assert mean_iou(found, truth) > 0.88


# Pixels


def test_a_span_holds_the_pixels_whose_centers_lie_in_it():
    rng = random.Random(0)
    for _ in range(2000):
        start = rng.uniform(0, 49.9)
        end = rng.uniform(start, 50)
        if start == end:
            continue
        centers = [j for j in range(50) if start < j + 0.5 <= end]
        first, past = pixel_span(start, end)
        assert 0 <= first < past <= 50
        if centers:
            assert list(range(first, past)) == centers
        else:
            assert past == first + 1 and first <= (start + end) / 2 < past


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ((0.0, 1.0), (0, 1)),
        ((2.0, 5.0), (2, 5)),
        ((2.3, 6.7), (2, 7)),
        ((2.5, 6.5), (3, 7)),
        ((2.51, 3.49), (3, 4)),  # between two centers, over a border
        ((7.1, 7.2), (7, 8)),
        ((7.6, 7.9), (7, 8)),
    ],
)
def test_spans_by_hand(edges, expected):
    assert pixel_span(*edges) == expected


@pytest.mark.parametrize("size", [16, 64, 128, 448, 1000, 1022])
def test_reading_an_edge_takes_back_what_writing_it_rounded(size):
    for start in range(size):
        end = size - start // 3
        if start < end:
            text = box_to_locs((start, start, end, end), size, size)
            x0, y0, x1, y1 = locs_to_box(text, size, size)
            assert pixel_span(x0, x1) == pixel_span(y0, y1) == (start, end)


def by_formula(values: np.ndarray, box, width: int, height: int) -> np.ndarray:
    """Pixel by pixel, as the chapter's equations say; whole boxes of 64 and more."""
    x0, y0, x1, y1 = box
    mask = np.zeros((height, width), bool)
    for i in range(y0, y1):
        for j in range(x0, x1):
            u = min(max(64 * (j + 0.5 - x0) / (x1 - x0) - 0.5, 0.0), 63.0)
            v = min(max(64 * (i + 0.5 - y0) / (y1 - y0) - 0.5, 0.0), 63.0)
            p, q = min(floor(v), 62), min(floor(u), 62)
            a, b = v - p, u - q
            upper = (1 - b) * values[p, q] + b * values[p, q + 1]
            lower = (1 - b) * values[p + 1, q] + b * values[p + 1, q + 1]
            mask[i, j] = (1 - a) * upper + a * lower > 0
    return mask


@pytest.mark.parametrize("box", [(0, 0, 64, 64), (10, 5, 110, 75), (3, 2, 120, 70)])
def test_pasting_is_the_formula(box):
    values = smooth_values(sum(box))
    ours = paste_mask(values, tuple(map(float, box)), 120, 80)
    theirs = by_formula(values.double().numpy(), box, 120, 80)
    assert 0 < theirs.sum() < (box[2] - box[0]) * (box[3] - box[1])
    assert (ours != theirs).sum() <= 1  # rounding, where a value is 0


def test_pasting_is_pillows_at_every_size():
    rng = random.Random(0)
    for seed in range(60):
        values = smooth_values(seed)
        x0, y0 = rng.uniform(0, 100), rng.uniform(0, 60)
        wide = 10 ** rng.uniform(-0.5, 2)
        box = (x0, y0, min(x0 + wide, 120), min(y0 + wide * rng.uniform(0.2, 3), 80))
        left, right = pixel_span(box[0], box[2])
        top, bottom = pixel_span(box[1], box[3])
        picture = Image.fromarray(values.numpy())
        size = (right - left, bottom - top)
        expected = np.zeros((80, 120), bool)
        window = np.asarray(picture.resize(size, Image.Resampling.BILINEAR)) > 0
        expected[top:bottom, left:right] = window
        assert (paste_mask(values, box, 120, 80) != expected).sum() <= 1


def test_zero_is_outside():
    assert not paste_mask(torch.zeros(64, 64), (0.0, 0.0, 9.0, 9.0), 9, 9).any()
    assert paste_mask(torch.full((64, 64), 1e-3), (0.0, 0.0, 9.0, 9.0), 9, 9).all()


def test_a_small_box_counts_all_values_not_four():
    values = -torch.ones(64, 64)
    values[:, 40:] = 1.0  # 24 of 64 inside: less than half
    values[30:34, 30:34] = 1.0  # but the middle is inside
    assert paste_mask(values, (3.0, 3.0, 4.0, 4.0), 8, 8).sum() == 0
    assert paste_mask(-values, (3.0, 3.0, 4.0, 4.0), 8, 8).sum() == 1


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((0, 0, 40, 30), (0, 30), (0, 40)),
        ((39, 29, 40, 30), (29, 30), (39, 40)),
        ((0, 0, 1, 1), (0, 1), (0, 1)),
        ((30.2, 20.2, 40, 30), (20, 30), (30, 40)),
        ((0, 0, 0.01, 0.01), (0, 1), (0, 1)),
        ((39.99, 29.99, 40, 30), (29, 30), (39, 40)),
        ((7.2, 5, 7.4, 25), (5, 25), (7, 8)),
    ],
)
def test_boxes_at_the_border_and_under_a_pixel(box, rows, columns):
    mask = paste_mask(torch.ones(64, 64), tuple(map(float, box)), 40, 30)
    expected = np.zeros((30, 40), bool)
    expected[slice(*rows), slice(*columns)] = True
    assert (mask == expected).all()


@pytest.mark.parametrize(
    "box",
    [
        (5, 5, 5, 9),
        (5, 5, 9, 5),
        (9, 5, 5, 9),
        (-1, 0, 5, 5),
        (0, 0, 41, 5),
        (0, 0, 5, 31),
    ],
)
def test_what_is_no_box_in_the_picture_is_refused(box):
    with pytest.raises(ValueError, match="40 × 30"):
        paste_mask(torch.ones(64, 64), tuple(map(float, box)), 40, 30)


def test_the_mask_moves_and_turns_with_its_box():
    values = smooth_values(1)
    mask = paste_mask(values, (11.0, 12.0, 111.0, 72.0), 200, 150)
    moved = paste_mask(values, (51.0, 21.0, 151.0, 81.0), 200, 150)
    assert (np.roll(mask, (9, 40), axis=(0, 1)) == moved).all()
    mirrored = paste_mask(values.flip(1), (89.0, 12.0, 189.0, 72.0), 200, 150)
    assert (mirrored[:, ::-1] != mask).sum() <= 1
    turned = paste_mask(values.T.contiguous(), (12.0, 11.0, 72.0, 111.0), 150, 200)
    assert (turned.T != mask).sum() <= 1


def test_a_large_picture_takes_seconds_and_no_gigabytes():
    resource = pytest.importorskip("resource")  # not on Windows

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MB on Linux

    before, start = peak(), time.process_time()
    mask = paste_mask(smooth_values(0), (0.0, 0.0, 8000.0, 6000.0), 8000, 6000)
    assert mask.shape == (6000, 8000) and 0 < mask.mean() < 1
    # A float a pixel is 183 MB, the mask 46 MB, twice that for a moment.
    assert peak() - before < 500
    assert time.process_time() - start < 20


# Pictures


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    """Which pixels differ, bool [H, W]."""
    return (np.asarray(before) != np.asarray(after)).any(axis=-1)


def disc(width=200, height=160, box=(40.0, 60.0, 140.0, 140.0), label="owl"):
    """A Segmentation with an ellipse in its box."""
    x0, y0, x1, y1 = box
    y, x = np.mgrid[:height, :width] + 0.5
    across, down = (2 * x - x0 - x1) / (x1 - x0), (2 * y - y0 - y1) / (y1 - y0)
    return Segmentation(label, box, across**2 + down**2 < 1)


def test_drawing_tints_the_mask_and_leaves_the_picture_alone():
    picture = Image.new("RGB", (200, 160), (90, 90, 90))
    thing = disc()
    drawn = draw_objects(picture, [thing])
    assert picture.getextrema() == ((90, 90),) * 3
    touched = changed(picture, drawn)
    assert touched[thing.mask].all()
    boxed = draw_objects(picture, [Detection("owl", thing.box)])
    assert (touched == (thing.mask | changed(picture, boxed))).all()
    pixels = np.asarray(drawn).astype(int)
    assert (pixels[100, 90] == pixels[110, 100]).all()  # one tint in the middle
    tint, pure = pixels[100, 90], np.asarray(boxed)[100, 40].astype(int)
    between = np.clip(tint, np.minimum(90, pure), np.maximum(90, pure))
    assert (tint == between).all() and (tint != pure).any()


def test_the_outline_is_solid():
    picture = Image.new("RGB", (200, 160), "white")
    thing = disc()
    pixels = np.asarray(draw_objects(picture, [thing]))
    color = np.asarray(draw_objects(picture, [Detection("owl", thing.box)]))[100, 40]
    row = thing.mask[120].nonzero()[0]
    assert (pixels[120, row[0]] == color).all() and (
        pixels[120, row[-1]] == color
    ).all()
    assert (pixels[120, row[len(row) // 2]] != color).any()


def test_drawing_nothing_changes_nothing():
    picture = Image.new("RGB", (20, 10), "green")
    assert not changed(picture, draw_objects(picture, [])).any()
    empty = Segmentation("owl", (1.0, 1.0, 5.0, 5.0), np.zeros((10, 20), bool))
    boxed = draw_objects(picture, [Detection("owl", empty.box)])
    assert not changed(boxed, draw_objects(picture, [empty])).any()


def test_a_label_has_the_color_that_detections_give_it():
    picture = Image.new("RGB", (400, 160), "white")
    spans = [("owl", 10), ("pig", 140), ("owl", 270)]
    things = [disc(400, 160, (x, 60.0, x + 100, 140.0), label) for label, x in spans]
    masks = draw_objects(picture, things)
    boxes = draw_objects(picture, [Detection(t.label, t.box) for t in things])
    tints = [masks.getpixel((x + 50, 100)) for _, x in spans]
    assert tints[0] == tints[2] != tints[1]
    for _, x in spans:
        assert masks.getpixel((x, 100)) == boxes.getpixel((x, 100))


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"200 × 160.*20 × 10"):
        draw_objects(Image.new("RGB", (20, 10)), [disc()])


def test_turned_photographs_are_measured_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter, as phones do
    path = tmp_path / "turned.png"
    Image.new("RGB", (40, 30), "white").save(path, exif=exif)
    width, height = load_image(path).size
    assert (width, height) == (30, 40)
    found = parse_segmentations(f"{BOX}{SEGS} owl", width, height, Filled())
    assert draw_objects(path, found).size == (30, 40)
    wrong = parse_segmentations(f"{BOX}{SEGS} owl", 40, 30, Filled())
    with pytest.raises(ValueError, match="own width and height"):
        draw_objects(path, wrong)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_any_picture_can_be_drawn_on(mode):
    found = parse_segmentations(f"{BOX}{SEGS} owl", 40, 30, Filled())
    drawn = draw_objects(Image.new(mode, (40, 30)), found)
    assert (drawn.mode, drawn.size) == ("RGB", (40, 30))


# The decoder's file


def same(a: MaskDecoder, b: MaskDecoder) -> bool:
    codes = torch.arange(16)[None]
    with torch.no_grad():
        return torch.equal(a(codes), b(codes))


def test_the_embedded_checkpoint_ships_its_own(embedded):
    assert isinstance(embedded, MaskDecoder) and not embedded.training
    assert same(embedded, load_mask_decoder(EMBEDDED))
    with torch.no_grad():
        values = embedded(torch.randint(128, (4, 16)))
    assert values.shape == (4, 1, 64, 64) and (values > 0).any() and (values < 0).any()


def test_a_decoder_can_be_given(tmp_path, embedded):
    other = MaskDecoder()
    MaskVQVAE(decoder=other).save_pretrained(tmp_path / "mine")
    file = tmp_path / "mine" / "mask_decoder.safetensors"
    assert same(other, load_mask_decoder(None, tmp_path / "mine"))
    assert same(other, load_mask_decoder(EMBEDDED, str(file)))
    assert same(other, load_mask_decoder(tmp_path / "mine"))  # beside a checkpoint
    arrays = {name: t.numpy() for name, t in other.state_dict().items()}
    np.savez(tmp_path / "mine.npz", **arrays)
    assert same(other, load_mask_decoder(None, tmp_path / "mine.npz"))
    assert not same(other, embedded)


def test_a_checkpoint_without_one_gets_no_other(tmp_path):
    with pytest.raises(ValueError) as raised:
        load_mask_decoder(tmp_path)
    for part in (str(tmp_path), GOOGLE_DECODER, "8,479,556", GOOGLE_SHA256):
        assert part in str(raised.value)


def test_only_the_decoder_of_a_hub_checkpoint_is_fetched(monkeypatch, tmp_path):
    asked = []

    def fetch(name, revision, allow_patterns, **others):
        asked.append((name, revision, sorted(allow_patterns)))
        return str(tmp_path)  # a checkpoint without one

    monkeypatch.setattr("vlm.hub.snapshot_download", fetch)
    with pytest.raises(ValueError, match="owner/model@v1 has no mask decoder"):
        load_mask_decoder("owner/model@v1")
    wanted = ["adapter_config.json", "mask_decoder.safetensors", "vae-oid.npz"]
    assert asked == [("owner/model", "v1", wanted)]


def test_googles_file_beside_a_checkpoint_must_be_googles(tmp_path):
    arrays = {name: t.numpy() for name, t in MaskDecoder().state_dict().items()}
    np.savez(tmp_path / GOOGLE_DECODER, **arrays)
    with pytest.raises(ValueError, match="SHA-256"):
        load_mask_decoder(tmp_path)


def test_a_path_without_a_decoder_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "none", tmp_path / "none.npz"):
        with pytest.raises(FileNotFoundError, match=tmp_path.name):
            load_mask_decoder(None, path)
    (tmp_path / "bad.npz").write_text("no archive", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.npz"):
        load_mask_decoder(None, tmp_path / "bad.npz")
