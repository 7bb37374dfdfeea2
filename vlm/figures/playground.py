"""What the playground shows, as HTML: image, tokens, a page for where nothing runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from PIL import Image

from ..sampling import Generation
from .page import data_uri

PREVIEW = 480  # the longest side of an image on the page, in pixels
GREEN = (0, 158, 115)  # the background of a token of probability 1; of one of 0: white


def style() -> str:
    """The style sheet as an element; a page needs it once."""
    sheet = files("vlm.figures").joinpath("playground.css").read_text("utf-8")
    return f"<style>{sheet}</style>"


def wrap(content: str, kind: str = "") -> str:
    """HTML that the style sheet applies to, light or dark as the page is."""
    return f'<div class="vlm-play {kind}">{content}</div>'


def line(text: str, error: bool = False) -> str:
    """A line of text, marked and announced where it is about an error."""
    kind = ' class="error" role="alert"' if error else ""
    return wrap(f"<p{kind}>{escape(text)}</p>")


def picture(image: Image.Image, name: str, found: Sequence = ()) -> str:
    """An image, small and inside the page; `found` is what is drawn on it."""
    scale = PREVIEW / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    small = image.resize(size, reducing_gap=3.0)
    uri = data_uri(small, "jpeg", quality=85)
    labels = ", ".join(one.label for one in found)
    alt = f"{name}; marked on it: {labels}" if labels else name
    return wrap(f'<img alt="{escape(alt)}" src="{uri}">')


def token_strip(answer: Generation, eos_token_id: int) -> str:
    """The answer's tokens as a list: text and probability, the greener the higher."""
    items = []
    rows = zip(answer.token_ids, answer.pieces, answer.probabilities)
    for token_id, piece, p in rows:
        text = "end" if token_id == eos_token_id else piece.strip(" ") or "␣"
        color = ",".join(str(round(255 + (c - 255) * p)) for c in GREEN)
        items.append(
            f'<li style="background:rgb({color})">{escape(text)}'
            f"<small>{p:.2f}</small></li>"
        )
    name = "The tokens of the answer, each with its probability"
    return f'<ol aria-label="{name}">{"".join(items)}</ol>'


def answer(generation: Generation, eos_token_id: int, table: str = "") -> str:
    """An answer's words, the strip of its tokens, and a table, if there is one."""
    words = re.sub(r"<(loc|seg)\d+>", "", generation.text or "(nothing)")
    table = f"<pre>{escape(table)}</pre>" if table else ""
    strip = token_strip(generation, eos_token_id)
    return wrap(f"<p><b>{escape(words)}</b></p>{strip}{table}")


def static_page(shown: str, settings: str, said: str) -> str:
    """The playground's two halves where no kernel runs; a line says so."""
    why = (
        "What the playground showed when this page was made. Its buttons and sliders "
        "need a kernel: open the notebook in Jupyter, VS Code or Colab."
    )
    right = wrap(f"<pre>{escape(settings)}</pre>") + said
    halves = wrap(f"<div>{shown}</div><div>{right}</div>", "halves")
    return f"{style()}{line(why)}{halves}"
