"""Processor: prompts, boxes, mask codes and images to the tensors a model takes.

Built in notebooks/12_processing.ipynb: edit it there, then run `make export`.
"""

import math
import operator
import re
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .images import ImageLike, image_to_pixels, load_image

NUM_LOCS = 1024  # <loc0000> … <loc1023>: a coordinate in 1024 steps
NUM_SEGS = 128  # <seg000> … <seg127>: a part of a mask
IMAGE_TOKEN = "<image>"
EXTRA_TOKENS = [  # what PaliGemma adds to Gemma's tokenizer, in the order of their ids
    *(f"<loc{index:04d}>" for index in range(NUM_LOCS)),
    *(f"<seg{code:03d}>" for code in range(NUM_SEGS)),
    IMAGE_TOKEN,
]

Box = tuple[float, float, float, float]  # x0, y0, x1, y1


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
    if not all(isinstance(v, Real) and 0 < v < math.inf for v in (width, height)):
        raise ValueError(f"{width=} and {height=} must be positive numbers")


def box_to_locs(box: Box, width: float, height: float) -> str:
    """A box (x0, y0, x1, y1) in pixels → four loc tokens, in the order y0 x0 y1 x1.

    A coordinate v in 0…1 becomes `round(v * 1023)`, as big_vision encodes it; what
    lies outside the picture is moved to its border.
    """
    check_size(width, height)
    x0, y0, x1, y1 = map(float, box)
    fractions = (y0 / height, x0 / width, y1 / height, x1 / width)
    bins = [round(min(max(v, 0.0), 1.0) * (NUM_LOCS - 1)) for v in fractions]
    return "".join(EXTRA_TOKENS[u] for u in bins)  # loc tokens come first


def locs_to_box(text: str, width: float, height: float) -> Box | None:
    """Four loc tokens → (x0, y0, x1, y1) in pixels; None where they make no box.

    Not exactly four, an index over 1023, or an end that isn't past its start: no box.
    """
    check_size(width, height)
    bins = [int(n) for n in re.findall(r"<loc([0-9]{4})>", text)]
    if len(bins) != 4 or max(bins) >= NUM_LOCS:
        return None
    y0, x0, y1, x1 = (u / (NUM_LOCS - 1) for u in bins)
    box = (x0 * width, y0 * height, x1 * width, y1 * height)
    return box if y0 < y1 and x0 < x1 else None


def codes_to_segs(codes: Sequence[int]) -> str:
    """Codes → seg tokens, one after another; ValueError unless all are in 0…127."""
    if not all(0 <= operator.index(code) < NUM_SEGS for code in codes):
        raise ValueError(f"{codes} holds a code outside 0…{NUM_SEGS - 1}")
    return "".join(EXTRA_TOKENS[NUM_LOCS + int(code)] for code in codes)


def segs_to_codes(text: str) -> list[int] | None:
    """Sixteen seg tokens → their codes; None unless exactly sixteen are in range."""
    codes = [int(n) for n in re.findall(r"<seg([0-9]{3})>", text)]
    return codes if len(codes) == 16 and max(codes) < NUM_SEGS else None


def pack_rows(
    prefixes: Sequence[list[int]],
    suffixes: Sequence[list[int]] | None = None,
    pad_token_id: int = 0,
) -> dict[str, Tensor]:
    """Rows of ids, each of its own length → tensors [B, T], padded to the longest.

    `input_ids`; `attention_mask`, 1 for real tokens; padded on the left. With suffixes
    on the right; then also `token_type_ids`, 1 for suffix tokens, and `labels`, the
    suffix's ids and -100 elsewhere.
    """
    side = "left" if suffixes is None else "right"

    def pad(rows: list[list[int]], value: int = 0) -> Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return pad_sequence(tensors, True, value, side)  # [B, T]

    if suffixes is None:
        mask = [[1] * len(p) for p in prefixes]
        return {"input_ids": pad(prefixes, pad_token_id), "attention_mask": pad(mask)}
    rows = list(zip(prefixes, suffixes, strict=True))
    return {
        "input_ids": pad([p + s for p, s in rows], pad_token_id),
        "attention_mask": pad([[1] * len(p + s) for p, s in rows]),
        "token_type_ids": pad([[0] * len(p) + [1] * len(s) for p, s in rows]),
        "labels": pad([[-100] * len(p) + s for p, s in rows], -100),
    }


def normalize_prompt(prompt: str) -> str:
    """The one form of a prompt, for training and for asking.

    No whitespace around it; " ; " between the names after `detect` and `segment`.
    """
    task, *rest = prompt.split(maxsplit=1) or [""]
    if task in ("detect", "segment") and rest:
        names = [name.strip() for name in rest[0].split(";")]
        return f"{task} {' ; '.join(name for name in names if name)}".strip()
    return prompt.strip()


def check_tokens(text: str) -> None:
    """ValueError for special tokens, and for loc and seg tokens that don't exist."""
    for token in (IMAGE_TOKEN, "<bos>", "<eos>", "<pad>", "<unk>"):
        if token in text:
            raise ValueError(f"{text!r:.80} contains {token}: the processor adds it")
    found = re.findall(r"<\s*(?:loc|seg)(?![a-z])[^<>]*>?", text, re.IGNORECASE)
    if unknown := {*found}.difference(EXTRA_TOKENS):
        raise ValueError(
            f"{min(unknown)!r:.20} is not a token: there are <loc0000> to <loc1023> "
            "and <seg000> to <seg127>"
        )


def _first_wrong_token(tokenizer: Any) -> str | None:
    "The first extra token that isn't one id, in PaliGemma's order; None if all are."
    wanted = tokenizer.convert_tokens_to_ids(EXTRA_TOKENS)
    text = "".join(EXTRA_TOKENS)
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    for i, token in enumerate(EXTRA_TOKENS):
        if ids[i : i + 1] != [wanted[i]] or wanted[i] != wanted[0] + i:
            return token
    return None


def _as_strings(values: Any, name: str) -> list[str]:
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise TypeError(f"{name} must be a string or several, not {values!r:.80}")
    return list(values)


class PaliGemmaProcessor:
    """Prompts and pictures → the tensors that the model takes.

    A row is `<image>` N times, `<bos>`, the prompt, a newline; with a suffix, then the
    suffix and `<eos>`. Same ids as transformers' processor of this name, but prompts
    have one form (`normalize_prompt`), whitespace around a suffix is dropped, and
    `<image>` or `<eos>` typed into either is an error (`check_tokens`).

    ValueError for a tokenizer that hasn't one id for each extra token, in PaliGemma's
    order. Where they are in the vocabulary, but not among its *added* tokens, they
    would be cut into letters: they are added, which keeps their ids.
    """

    def __init__(self, tokenizer: Any, num_image_tokens: int, image_size: int):
        if _first_wrong_token(tokenizer):
            if {*EXTRA_TOKENS} <= {*tokenizer.get_vocab()}:  # it knows all of them
                add_paligemma_tokens(tokenizer)
        if token := _first_wrong_token(tokenizer):
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
        prefixes = [self.encode_prefix(prompt) for prompt in _as_strings(text, "text")]
        suffixes = None
        if suffix is not None:
            suffixes = [self.encode_suffix(s) for s in _as_strings(suffix, "suffix")]
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if not prefixes or not images or len(prefixes) % len(images):
            got = f"{len(prefixes)} prompts, but {len(images)} pictures"
            raise ValueError(f"{got}: give one for each, or one for every n of them")
        if suffixes is not None and len(suffixes) != len(prefixes):
            raise ValueError(f"{len(prefixes)} prompts, but {len(suffixes)} suffixes")
        pixels = [image_to_pixels(load_image(i), self.image_size) for i in images]
        rows = pack_rows(prefixes, suffixes, self.pad_token_id)
        return {**rows, "pixel_values": torch.stack(pixels)}  # [pictures, 3, S, S]
