"""What the interactive figures share: pictures in the page, ids, style and script."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from io import BytesIO
from itertools import count

from PIL import Image

_numbers = count()  # two figures with the same content have different ids


def data_uri(image: Image.Image, kind: str = "png", **options: int) -> str:
    """A picture as the address that holds it; `options` go to the encoder."""
    file = BytesIO()
    image.save(file, kind, optimize=True, **options)
    return f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"


def unique_id(prefix: str, content: str) -> str:
    """An id that no other figure has, on this page or on another put beside it."""
    digest = sha256(content.encode()).hexdigest()[:8]
    return f"{prefix}-{digest}-{next(_numbers)}"


def style_and_script(figure: str, element_id: str) -> tuple[str, str]:
    """A figure's `.css` and `.js` as elements; the script is called on its element."""
    here = files("vlm.figures")
    style = here.joinpath(f"{figure}.css").read_text("utf-8")
    script = here.joinpath(f"{figure}.js").read_text("utf-8")
    call = f'({script})(document.getElementById("{element_id}"));'
    return f"<style>{style}</style>", f"<script>{call}</script>"
