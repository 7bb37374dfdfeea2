"""Words, boxes and pictures become numbers, and come back.

Built in notebooks/12_processing.ipynb: edit it there, then run `make export`.
"""

import math
import operator
import re
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor

from .images import ImageLike, image_to_pixels, load_image

__all__ = [
    "NUM_LOCS", "NUM_SEGS", "IMAGE_TOKEN", "Box", "loc_token", "seg_token",
    "check_size", "box_to_locs", "locs_to_box", "codes_to_segs", "segs_to_codes",
    "check_tokens", "PaliGemmaProcessor",
]  # fmt: skip

NUM_LOCS = 1024  # <loc0000> … <loc1023>: a coordinate in 1024 steps
NUM_SEGS = 128  # <seg000> … <seg127>: a piece of a mask
IMAGE_TOKEN = "<image>"
EXTRA_TOKENS = [  # what PaliGemma adds to Gemma's tokenizer, in the order of their ids
    *(f"<loc{index:04d}>" for index in range(NUM_LOCS)),
    *(f"<seg{code:03d}>" for code in range(NUM_SEGS)),
    IMAGE_TOKEN,
]

Box = tuple[float, float, float, float]  # x0, y0, x1, y1


def _as_index(index: Any, count: int, name: str) -> int:
    "A whole number in 0…count - 1, or an error that says so."
    try:
        index = operator.index(index)
    except TypeError:
        raise TypeError(f"a {name} must be a whole number, not {index!r}") from None
    if not 0 <= index < count:
        raise ValueError(f"{name} {index} is outside 0…{count - 1}")
    return index


def loc_token(index: SupportsIndex) -> str:
    """`<loc0000>` … `<loc1023>`; ValueError outside, TypeError for a fraction."""
    return EXTRA_TOKENS[_as_index(index, NUM_LOCS, "loc index")]


def seg_token(code: SupportsIndex) -> str:
    """`<seg000>` … `<seg127>`; ValueError outside, TypeError for a fraction."""
    return EXTRA_TOKENS[NUM_LOCS + _as_index(code, NUM_SEGS, "seg code")]


def add_paligemma_tokens(tokenizer: Any) -> Any:
    """Give a bare Gemma tokenizer the loc, seg and image tokens, in PaliGemma's order.

    On Gemma's 256000 tokens this gives the real ids: 256000…, 257024…, 257152. Tokens
    that are in the vocabulary already keep their ids. Returns the tokenizer.
    """
    tokenizer.add_tokens(EXTRA_TOKENS[:-1])
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer


def check_size(width: float, height: float) -> None:
    """Raise a ValueError unless both are positive numbers."""
    for side in (width, height):
        if not isinstance(side, Real) or not 0 < side < math.inf:
            raise ValueError(
                f"width and height must be positive numbers, not {width} and {height}"
            )


def box_to_locs(box: Box, width: float, height: float) -> str:
    """A box (x0, y0, x1, y1) in pixels → four loc tokens, in the order y0 x0 y1 x1.

    A coordinate v in 0…1 becomes `round(v * 1023)`, as big_vision encodes it; what
    lies outside the picture is moved to its border. ValueError for other than numbers.
    """
    check_size(width, height)
    try:
        x0, y0, x1, y1 = map(float, box)
        fractions = (y0 / height, x0 / width, y1 / height, x1 / width)
        bins = [round(min(max(v, 0.0), 1.0) * (NUM_LOCS - 1)) for v in fractions]
    except (TypeError, ValueError):  # not four, not numbers, or NaN
        raise ValueError(f"a box is four numbers x0, y0, x1, y1, not {box}") from None
    return "".join(loc_token(u) for u in bins)


def locs_to_box(text: str, width: float, height: float) -> Box | None:
    """Four loc tokens → (x0, y0, x1, y1) in pixels; None where they make no box.

    Not exactly four, an index over 1023, or an end that isn't past its start: no box.
    """
    check_size(width, height)
    bins = [int(n) for n in re.findall(r"<loc([0-9]{4})>", text)]
    if len(bins) != 4 or max(bins) >= NUM_LOCS:
        return None
    y0, x0, y1, x1 = (u / (NUM_LOCS - 1) for u in bins)
    if y1 <= y0 or x1 <= x0:
        return None
    return (x0 * width, y0 * height, x1 * width, y1 * height)


def codes_to_segs(codes: Sequence[int]) -> str:
    """Codes 0…127 → seg tokens, one after another; errors as in `seg_token`."""
    return "".join(seg_token(code) for code in codes)


def segs_to_codes(text: str) -> list[int] | None:
    """Sixteen seg tokens → their codes; None unless exactly sixteen are in range."""
    codes = [int(n) for n in re.findall(r"<seg([0-9]{3})>", text)]
    if len(codes) != 16 or max(codes) >= NUM_SEGS:
        return None
    return codes


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


def normalize_prompt(prompt: str) -> str:
    """The one form of a prompt, for training and for asking.

    No whitespace around it; after `detect` and `segment`, names are separated by
    exactly " ; ". A comma may be part of a name and stays.
    """
    task, *rest = prompt.split(maxsplit=1) or [""]
    if task in ("detect", "segment") and rest:
        names = [name.strip() for name in rest[0].split(";")]
        return f"{task} {' ; '.join(name for name in names if name)}".strip()
    return prompt.strip()


def check_tokens(text: str) -> None:
    """Raise a ValueError for what a prompt or an answer can't contain.

    That is special tokens, which the processor adds, and loc and seg tokens that don't
    exist, such as `<loc7>` or `<seg128>`. An empty text is fine.
    """
    for token in (IMAGE_TOKEN, "<bos>", "<eos>", "<pad>", "<unk>"):
        if token in text:
            raise ValueError(
                f"{text!r:.80} contains {token}: leave it out, the processor adds the "
                "image tokens and the other special ones"
            )
    found = re.findall(r"<\s*(?:loc|seg)(?![a-z])[^<>]*>?", text, re.IGNORECASE)
    if unknown := {*found}.difference(EXTRA_TOKENS):
        raise ValueError(
            f"{min(unknown)!r:.20} is not a token: there are <loc0000> to <loc1023> "
            "and <seg000> to <seg127>"
        )


def _first_wrong_token(tokenizer: Any) -> str | None:
    "The first of the extra tokens that isn't one id, in their order; None if all are."
    first = tokenizer.convert_tokens_to_ids(EXTRA_TOKENS[0])
    if first in (None, tokenizer.unk_token_id):
        return EXTRA_TOKENS[0]
    text = "".join(EXTRA_TOKENS)
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    for index, token in enumerate(EXTRA_TOKENS):
        if ids[index : index + 1] != [first + index]:
            return token
    return None


def _as_strings(values: Any, name: str) -> list[str]:
    "One string or several, as a list; TypeError for anything else."
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise TypeError(
            f"{name} must be a string or a list of strings, not {values!r:.80}"
        )
    return list(values)


class PaliGemmaProcessor:
    """Prompts and pictures → the tensors that the model takes.

    A row is `<image>` N times, `<bos>`, the prompt, a newline; with a suffix, then the
    suffix and `<eos>`. Same ids as transformers' processor of this name, and the same
    pixels for upright, opaque, 8-bit pictures. Different on purpose: prompts are
    brought to one form (`normalize_prompt`), whitespace around a suffix is dropped, and
    `<image>` or `<eos>` typed into either is an error (`check_tokens`).
    """

    def __init__(self, tokenizer: Any, num_image_tokens: int, image_size: int):
        """`tokenizer`: as AutoTokenizer gives it, with PaliGemma's extra tokens.

        Extra tokens that are in its vocabulary, but not among its *added* tokens, would
        be cut into letters: they are added, which keeps their ids. Raises ValueError
        where one still isn't one id in PaliGemma's order, and for numbers below 1.
        """
        for number in (num_image_tokens, image_size):
            if not isinstance(number, Integral) or number < 1:
                raise ValueError(
                    "num_image_tokens and image_size must be whole numbers from 1, "
                    f"not {num_image_tokens} and {image_size}"
                )
        token = _first_wrong_token(tokenizer)
        ids = {*tokenizer.convert_tokens_to_ids(EXTRA_TOKENS)}
        if token and ids.isdisjoint({None, tokenizer.unk_token_id}):  # all have ids
            token = _first_wrong_token(add_paligemma_tokens(tokenizer))
        if token:
            raise ValueError(
                f"{token} isn't one token of this tokenizer, in PaliGemma's order: "
                "call add_paligemma_tokens(tokenizer) first, or take the checkpoint's"
            )
        if None in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            raise ValueError("the tokenizer names no bos_token or no eos_token")
        self.tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        self.image_size = image_size
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.pad_token_id = tokenizer.pad_token_id or 0

    def encode_prefix(self, prompt: str) -> list[int]:
        """Image tokens, BOS, the normalized prompt, newline; errors: check_tokens."""
        prompt = normalize_prompt(prompt)
        check_tokens(prompt)
        ids = self.tokenizer.encode(prompt + "\n", add_special_tokens=False)
        image_ids = [self.image_token_id] * self.num_image_tokens
        return [*image_ids, self.tokenizer.bos_token_id, *ids]

    def encode_suffix(self, suffix: str) -> list[int]:
        """The answer and EOS, which is all of an empty answer; errors: check_tokens."""
        check_tokens(suffix)
        ids = self.tokenizer.encode(suffix.strip(), add_special_tokens=False)
        return [*ids, self.tokenizer.eos_token_id]

    def __call__(
        self,
        text: str | Sequence[str],
        images: ImageLike | Sequence[ImageLike],
        suffix: str | Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Prompts, pictures → `input_ids`, `attention_mask` [B, T], `pixel_values`.

        A picture for each prompt, or for every n consecutive ones (one for all, too):
        the model encodes each once. Rows are padded on the left, ready to generate.
        With `suffix`, to train: padded on the right, with `token_type_ids` (1 on the
        suffix) and `labels` (-100 off it). ValueError for numbers that don't fit.
        """
        texts = _as_strings(text, "text")
        suffixes = None if suffix is None else _as_strings(suffix, "suffix")
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if not texts:
            raise ValueError("text is empty: give at least one prompt and its picture")
        if not images or len(texts) % len(images):
            raise ValueError(
                f"{len(texts)} prompts, but {len(images)} pictures: give one for each "
                "prompt, or one for every n consecutive prompts"
            )
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
        return {**rows, "pixel_values": torch.stack(pixels)}  # [pictures, 3, S, S]
