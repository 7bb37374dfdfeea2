"""Figures that work without a kernel: what their HTML promises."""

import io
import json
import re
from base64 import b64decode

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.captioning import AttentionMaps
from vlm.figures import attention_over_picture
from vlm.figures.attention import loc_marks, visible

PIECES = ["<loc0000>", "<loc0341>", "<loc0682>", "<loc1023>", " owl & <b>", "<eos>"]


def a_look(pieces=PIECES, side=4):
    return AttentionMaps(
        "detect owl",
        list(pieces),
        [0.5] * len(pieces),
        torch.rand(len(pieces), side, side) / side**2,
    )


def steps_of(html: str) -> list[dict]:
    found = re.search(r'<script type="application/json">(.*?)</script>', html, re.S)
    return json.loads(found[1])


def alpha(uri: str) -> np.ndarray:
    data = b64decode(uri.partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., 3]


# Attention over the picture


def test_two_figures_on_a_page_share_no_id():
    picture, look = Image.new("RGB", (60, 40)), a_look()
    pages = [attention_over_picture(picture, look).data for _ in range(2)]
    ids = [re.findall(r'\bid="([^"]+)"', page) for page in pages]
    assert len(ids[0]) == len(set(ids[0])) and not {*ids[0]} & {*ids[1]}
    for page, own in zip(pages, ids):
        used = re.findall(r'href="#([^"]+)"|getElementById\("([^"]+)"\)', page)
        assert {a or b for a, b in used} <= {*own}


def test_tokens_are_escaped_everywhere():
    html = attention_over_picture(Image.new("RGB", (60, 40)), a_look()).data
    assert "<loc" not in html and "<eos>" not in html and "<b>" not in html
    assert ">&lt;loc0341&gt;</button>" in html and "owl &amp; &lt;b&gt;" in html
    names = [step["name"] for step in steps_of(html)]
    assert names == ["all tokens", *(piece.strip() for piece in PIECES)]


def test_every_token_is_a_button_with_a_note_and_one_is_reached_by_tab():
    html = attention_over_picture(Image.new("RGB", (60, 40)), a_look()).data
    assert html.count("<button") == len(PIECES) + 1
    buttons = re.findall(r"<button [^>]*>", html)
    assert ['tabindex="0"' in button for button in buttons].count(True) == 1
    assert ['aria-pressed="true"' in button for button in buttons].count(True) == 1
    assert 'role="img" aria-label="Where the model looked' in html
    assert 'aria-live="polite"' in html
    assert all("attention is on the picture" in s["note"] for s in steps_of(html))


def test_nothing_is_loaded_and_the_page_stays_light():
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), np.uint8)
    look = a_look(["a"] * 20, side=64)
    html = attention_over_picture(Image.fromarray(noise), look).data
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    loaded = re.findall(r"https?://[^\"') ]+", html)
    assert set(loaded) <= {"http://www.w3.org/2000/svg"}
    assert len(re.search(r"data:image/jpeg;base64,[^\"]+", html)[0]) <= 40_000
    assert len(html) < 200_000


def test_the_veil_is_clear_where_the_weight_is_largest():
    look = a_look()
    html = attention_over_picture(Image.new("RGB", (60, 40)), look).data
    for weights, step in zip(look.attention, steps_of(html)[1:], strict=True):
        veil = alpha(step["veil"])
        assert veil.shape == (4, 4)
        assert veil.flat[int(weights.argmax())] == 0
        assert veil.flat[int(weights.argmin())] == veil.max()


def test_lines_and_boxes_have_the_pictures_shape():
    wide = Image.new("RGB", (200, 100))
    steps = steps_of(attention_over_picture(wide, a_look()).data)
    assert steps[1]["lines"] == [[0, 0.0, 1000.0, 0.0]]  # y first: across
    assert steps[2]["lines"][1] == [333.3, 0, 333.3, 500.0]
    assert steps[3]["boxes"] == [] and len(steps[3]["lines"]) == 3
    assert steps[4]["boxes"] == [[333.3, 0.0, 666.7, 333.3]]
    assert steps[5]["lines"] == [] and steps[5]["boxes"] == steps[4]["boxes"]
    assert [step["own"] for step in steps] == [False, *[True] * 4, False, False]


def test_objects_begin_anew_and_what_is_no_box_is_not_drawn():
    first = ["<loc0100>", "<loc0200>", "<loc0300>", "<loc0400>", " owl", " ;"]
    upside_down = ["<loc0500>", "<loc0600>", "<loc0400>", "<loc0700>"]
    marks = loc_marks([*first, *upside_down])
    assert marks[6].lines == [("y", 500)]
    assert [m.boxes for m in marks[3:]] == [[(100, 200, 300, 400)]] * 7
    assert loc_marks(["<loc1024>", "<seg001>", "a"])[-1].lines == []


@pytest.mark.parametrize(
    ("piece", "shown"), [(" owl", "owl"), (" ", "␣"), ("\n", "⏎"), ("<eos>", "<eos>")]
)
def test_no_button_is_empty(piece, shown):
    assert visible(piece) == shown
