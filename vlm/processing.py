"""Words, boxes and pictures become numbers, and come back.

Built in notebooks/10_processing.ipynb: edit it there, then run `make export`.
"""

import os
import re
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

__all__ = [
    "NUM_LOCS",
    "NUM_SEGS",
    "IMAGE_TOKEN",
    "Box",
    "ImageLike",
    "loc_token",
    "seg_token",
    "add_paligemma_tokens",
    "box_to_locs",
    "locs_to_box",
    "codes_to_segs",
    "segs_to_codes",
    "load_image",
    "image_to_pixels",
    "pack_rows",
    "PaliGemmaProcessor",
]

NUM_LOCS = 1024  # <loc0000> … <loc1023>: a coordinate in 1024 steps
NUM_SEGS = 128  # <seg000> … <seg127>: a piece of a mask
IMAGE_TOKEN = "<image>"

Box = tuple[float, float, float, float]  # x0, y0, x1, y1
ImageLike = Image.Image | str | os.PathLike | np.ndarray | Tensor


def loc_token(index: int) -> str:
    """`<loc0000>` … `<loc1023>`; ValueError outside."""
    if not 0 <= index < NUM_LOCS:
        raise ValueError(f"loc index {index} is outside 0…{NUM_LOCS - 1}")
    return f"<loc{index:04d}>"


def seg_token(code: int) -> str:
    """`<seg000>` … `<seg127>`; ValueError outside."""
    if not 0 <= code < NUM_SEGS:
        raise ValueError(f"seg code {code} is outside 0…{NUM_SEGS - 1}")
    return f"<seg{code:03d}>"


def add_paligemma_tokens(tokenizer: Any) -> Any:
    """Give a bare Gemma tokenizer the loc, seg and image tokens, in PaliGemma's order.

    On Gemma's 256000 pieces this gives the real ids: 256000…, 257024…, 257152. Tokens
    that are there already keep their ids. Returns the tokenizer.
    """
    tokenizer.add_tokens([loc_token(i) for i in range(NUM_LOCS)])
    tokenizer.add_tokens([seg_token(i) for i in range(NUM_SEGS)])
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer


def box_to_locs(box: Box, width: float, height: float) -> str:
    """A box (x0, y0, x1, y1) in pixels → four loc tokens, in the order y0 x0 y1 x1.

    A coordinate v in 0…1 becomes `round(v * 1023)`, as big_vision encodes it; what
    lies outside the picture is moved to its border.
    """
    x0, y0, x1, y1 = box
    shares = (y0 / height, x0 / width, y1 / height, x1 / width)
    bins = (round(min(max(v, 0.0), 1.0) * (NUM_LOCS - 1)) for v in shares)
    return "".join(loc_token(b) for b in bins)


def locs_to_box(text: str, width: float, height: float) -> Box | None:
    """Four loc tokens → (x0, y0, x1, y1) in pixels; None where they make no box.

    Not exactly four, an index over 1023, or an end that isn't past its start: no box.
    """
    bins = [int(n) for n in re.findall(r"<loc(\d{4})>", text)]
    if len(bins) != 4 or max(bins) >= NUM_LOCS:
        return None
    y0, x0, y1, x1 = (b / (NUM_LOCS - 1) for b in bins)
    if y1 <= y0 or x1 <= x0:
        return None
    return (x0 * width, y0 * height, x1 * width, y1 * height)


def codes_to_segs(codes: Sequence[int]) -> str:
    """Codes 0…127 → seg tokens, one after another; ValueError outside."""
    return "".join(seg_token(int(code)) for code in codes)


def segs_to_codes(text: str) -> list[int] | None:
    """Sixteen seg tokens → their codes; None unless exactly sixteen are in range."""
    codes = [int(n) for n in re.findall(r"<seg(\d{3})>", text)]
    if len(codes) != 16 or max(codes) >= NUM_SEGS:
        return None
    return codes


def array_to_image(array: np.ndarray) -> Image.Image:
    """[H, W], [H, W, 1], [H, W, 3] or [H, W, 4] → a PIL image.

    Values: uint8 0…255, uint16 0…65535, float 0…1 or bool; anything else a ValueError.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(
            "an image array must be [H, W], [H, W, 3] or [H, W, 4], channels last, "
            f"not {list(array.shape)}"
        )
    if array.size == 0:
        raise ValueError(f"the image array {list(array.shape)} has no pixels")
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = (array / 257).round().astype(np.uint8)  # 65535 = 255 * 257
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError("a float image array must lie in 0…1")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"an image array must be uint8, uint16, bool or float, not {array.dtype}"
        )
    return Image.fromarray(array)


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Modes of more than eight bits a channel, scaled down; others as they are."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError("the picture has values that are not finite numbers")
    top = values.max()
    if image.mode == "F" and top <= 1.0:
        values = values * 255
    elif top > 255 or image.mode.startswith("I;16"):
        values = values / 257
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def _turn_upright(image: Image.Image) -> Image.Image:
    "A copy, turned as its note about orientation says, if that can be read."
    try:
        return ImageOps.exif_transpose(image)
    except SyntaxError:  # the note is damaged; the pixels aren't
        return image.copy()
    except struct.error:  # it can be read, but not written anew, once all is turned
        image = image.copy()
        with suppress(struct.error):
            ImageOps.exif_transpose(image, in_place=True)
        return image


def load_image(image: ImageLike) -> Image.Image:
    """Any picture → PIL image in RGB, upright.

    Takes a PIL image, a path, or an array ([H, W], [H, W, 3], [H, W, 4]; uint8, uint16,
    or float in 0…1). EXIF orientation is applied, 16 bits are scaled to 8, transparency
    is laid on white; of an animation the first frame counts.

    Raises FileNotFoundError for a missing file, ValueError for what is no picture.
    """
    if isinstance(image, (str, os.PathLike)):
        path = Path(image).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no image file at {path}")
        try:
            with Image.open(path) as opened:
                image = opened.copy()  # reads all of it before the file closes
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{path} is not a picture that can be read: {error}"
            ) from None
    elif isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float() if image.dtype == torch.bfloat16 else image
        image = array_to_image(image.numpy())
    elif isinstance(image, np.ndarray):
        image = array_to_image(image)
    elif isinstance(image, Image.Image):
        try:
            image.load()  # reads all of it
        except OSError as error:
            raise ValueError(f"the picture can't be read: {error}") from None
    else:
        raise ValueError(
            "an image must be a PIL image, a path or an array, "
            f"not {type(image).__name__}"
        )
    if 0 in image.size:
        raise ValueError(f"the picture has no pixels: its size is {image.size}")
    image = to_eight_bits(_turn_upright(image))
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def image_to_pixels(image: Image.Image, image_size: int) -> Float[Tensor, "3 S S"]:
    """RGB picture → float32 [3, S, S] in [-1, 1].

    The picture is squeezed to a square, bicubic, its aspect not kept. A box in shares
    of the sides fits the square and the original alike.
    """
    square = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square))  # [S, S, 3] uint8
    pixels = pixels.permute(2, 0, 1).float()  # [3, S, S]
    return (pixels / 255 - 0.5) / 0.5


def pack_rows(
    prefixes: Sequence[list[int]],
    suffixes: Sequence[list[int]],
    pad_token_id: int = 0,
    padding: Literal["left", "right"] = "right",
) -> dict[str, Tensor]:
    """Rows of ids, each of its own length → tensors [B, T], padded to the longest.

    `input_ids`; `attention_mask`, 1 for real tokens; `token_type_ids`, 1 for suffix
    tokens; `labels`, the suffix's ids and -100 elsewhere.
    """
    lengths = [len(p) + len(s) for p, s in zip(prefixes, suffixes, strict=True)]
    input_ids = torch.full((len(lengths), max(lengths)), pad_token_id)  # [B, T]
    attention_mask = torch.zeros_like(input_ids)
    token_type_ids = torch.zeros_like(input_ids)
    for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        start = max(lengths) - lengths[row] if padding == "left" else 0
        middle, end = start + len(prefix), start + lengths[row]
        input_ids[row, start:end] = torch.tensor(prefix + suffix)
        attention_mask[row, start:end] = 1
        token_type_ids[row, middle:end] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "labels": input_ids.masked_fill(token_type_ids == 0, -100),
    }


class PaliGemmaProcessor:
    """Prompts and pictures → the tensors that the model takes.

    A row is `<image>` N times, `<bos>`, the prompt, a newline; with a suffix, then the
    suffix and `<eos>`. Same ids as transformers' processor of this name, and the same
    pixels for upright, opaque, 8-bit pictures.
    """

    def __init__(self, tokenizer: Any, num_image_tokens: int, image_size: int):
        """`tokenizer`: as AutoTokenizer gives it, with PaliGemma's extra tokens.

        Raises ValueError where the tokenizer has no `<image>` token.
        """
        self.tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        self.image_size = image_size
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"the tokenizer has no {IMAGE_TOKEN} token: "
                "call add_paligemma_tokens(tokenizer) first"
            )
        self.pad_token_id = tokenizer.pad_token_id or 0

    def encode_prefix(self, prompt: str) -> list[int]:
        """Image tokens, BOS, prompt, newline as ids; ValueError if it has `<image>`."""
        if IMAGE_TOKEN in prompt:
            raise ValueError(
                f"the prompt {prompt!r} contains {IMAGE_TOKEN}: leave it out, "
                "the processor adds the image tokens"
            )
        ids = self.tokenizer.encode(prompt + "\n", add_special_tokens=False)
        image_ids = [self.image_token_id] * self.num_image_tokens
        return [*image_ids, self.tokenizer.bos_token_id, *ids]

    def encode_suffix(self, suffix: str) -> list[int]:
        """Answer and EOS as ids; ValueError for `<image>` inside."""
        if IMAGE_TOKEN in suffix:
            raise ValueError(f"the suffix {suffix!r} contains {IMAGE_TOKEN}")
        ids = self.tokenizer.encode(suffix, add_special_tokens=False)
        return [*ids, self.tokenizer.eos_token_id]

    def __call__(
        self,
        text: str | Sequence[str],
        images: ImageLike | Sequence[ImageLike],
        suffix: str | Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """One picture a prompt → `input_ids`, `attention_mask` [B, T], `pixel_values`.

        Rows are padded on the left, ready to generate. With `suffix`, to train: padded
        on the right, with `token_type_ids` (1 on the suffix) and `labels` (-100 off
        it). Raises ValueError unless prompts, pictures and suffixes are equally many.
        """
        texts = [text] if isinstance(text, str) else list(text)
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        suffixes = [suffix] if isinstance(suffix, str) else suffix
        if not texts:
            raise ValueError("text is empty: give at least one prompt and its picture")
        if len(images) != len(texts):
            raise ValueError(f"{len(texts)} prompts, but {len(images)} pictures")
        if suffixes is not None and len(suffixes) != len(texts):
            raise ValueError(f"{len(texts)} prompts, but {len(suffixes)} suffixes")
        pixels = [image_to_pixels(load_image(i), self.image_size) for i in images]
        prefixes = [self.encode_prefix(prompt) for prompt in texts]
        if suffixes is None:
            rows = pack_rows(prefixes, [[]] * len(texts), self.pad_token_id, "left")
            del rows["token_type_ids"], rows["labels"]
        else:
            answers = [self.encode_suffix(suffix) for suffix in suffixes]
            rows = pack_rows(prefixes, answers, self.pad_token_id, "right")
        return {**rows, "pixel_values": torch.stack(pixels)}  # pixels [B, 3, S, S]
