"""Generation: prefill, decode token by token, detokenize incrementally, stop.

Built in notebooks/15_sampling.ipynb: edit it there, then run `make export`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .gemma import check_ids
from .kv_cache import KVCache, StaticKVCache
from .merging import rows_per_image
from .next_token import sample_next_token
from .paligemma import PaliGemmaForConditionalGeneration
from .processing import IMAGE_TOKEN

__all__ = [
    "GenerationConfig",
    "IncrementalDetokenizer",
    "Generation",
    "check_inputs",
    "generation_steps",
    "generate_tokens",
    "generate",
    "stream",
]

Stop = str | Sequence[str] | Callable[[list[int]], bool]


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt; `generate` and `stream` take these by name.

    - `max_new_tokens` ≥ 1.
    - `do_sample`: draw; otherwise the likeliest token is taken (greedy).
    - `temperature` ≥ 0 (0 is greedy), `top_k` ≥ 1, `top_p` in (0, 1]: shape the
      distribution that is drawn from, in this order.
    - `stop`: a string or several (a row ends with the token that completes one; the
      token stays whole), or a function of the row's token ids so far. EOS always stops.
    - `seed`: the same draws every time.
    - `cache`: "dynamic" grows, "static" is allocated once.

    Raises ValueError for a value out of its range, with the range.
    """

    max_new_tokens: int = 100
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop: Stop | None = None
    seed: int | None = None
    cache: str = "dynamic"

    def __post_init__(self) -> None:
        kinds = dict.fromkeys(("max_new_tokens", "top_k", "seed"), Integral)
        for name, kind in {**kinds, "temperature": Real, "top_p": Real}.items():
            value, default = getattr(self, name), getattr(type(self), name)
            if not isinstance(value, kind) and value is not default:
                what = "a number" if kind is Real else "a whole number"
                raise ValueError(f"{name}={value!r} must be {what}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature} must be 0 (greedy) or positive"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1], or None")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} must be a number of at most 64 bits")
        if self.cache not in ("dynamic", "static"):
            raise ValueError(f"cache={self.cache!r} must be 'dynamic' or 'static'")
        if not callable(self.stop) and not all(
            isinstance(ending, str) and ending for ending in self.stop_strings
        ):
            raise ValueError("stop must be a function, or strings that aren't empty")

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list; empty where it is a function or absent."""
        if self.stop is None or callable(self.stop):
            return []
        is_list = isinstance(self.stop, (list, tuple))
        return list(self.stop) if is_list else [self.stop]

    def should_stop(self, token_ids: list[int], text: str) -> bool:
        """What `stop` says about a row's tokens and text so far."""
        if callable(self.stop):
            return bool(self.stop(token_ids))
        return any(ending in text for ending in self.stop_strings)


def prefill(
    model: PaliGemmaForConditionalGeneration,
    inputs: dict[str, Tensor],
    kv_cache: KVCache | StaticKVCache,
) -> Float[Tensor, "B V"]:
    """Read picture and prompt, fill the cache; logits after each row's last real token.

    Logits are computed from the shortest row's end on, not for the whole prompt.
    """
    attention_mask = inputs["attention_mask"]  # [B, T]
    length = attention_mask.shape[1]
    place = torch.arange(length, device=attention_mask.device)  # [T]
    last = (attention_mask * place).argmax(dim=1)  # [B]
    keep = length - int(last.min())
    logits = model(**inputs, kv_cache=kv_cache, logits_to_keep=keep)["logits"]
    rows = torch.arange(len(last), device=last.device)
    return logits[rows, last - (length - keep)]  # [B, keep, V] → [B, V]


def decode_one_token(
    model: PaliGemmaForConditionalGeneration,
    token_ids: Int[Tensor, "B"],
    attention_mask: Int[Tensor, "B M"],
    kv_cache: KVCache | StaticKVCache,
) -> Float[Tensor, "B V"]:
    """One new token in, the next one's logits out; the mask counts the new token."""
    outputs = model(
        input_ids=token_ids[:, None], attention_mask=attention_mask, kv_cache=kv_cache
    )
    return outputs["logits"][:, -1]  # [B, 1, V] → [B, V]


def make_cache(
    model: PaliGemmaForConditionalGeneration, kind: str, batch_size: int, length: int
) -> KVCache | StaticKVCache:
    """An empty cache, "dynamic" or "static"; the static one has room for `length`."""
    if kind == "dynamic":
        return KVCache()
    config = model.config.text_config
    return StaticKVCache(config, batch_size, length, model.device, model.dtype)


def _non_finite_message(dtype: torch.dtype) -> str:
    "What to say, and to advise, where logits are NaN or infinite."
    what = f"the model's logits are no longer numbers in {dtype}"
    if dtype == torch.float16:
        return (
            f"{what}. Some models outgrow float16: load it with dtype='float32' or "
            "'bfloat16'"
        )
    return f"{what}: look for NaN in the weights and in pixel_values"


@torch.no_grad()
def token_steps(
    model: PaliGemmaForConditionalGeneration,
    inputs: dict[str, Tensor],
    settings: GenerationConfig,
) -> Iterator[tuple[list[int], list[float]]]:
    """Yield (ids, probabilities) of all rows, one step at a time, up to the limit.

    It knows nothing of EOS or `stop`: whoever has enough stops asking. Raises
    FloatingPointError for logits that are no numbers, which would read as blanks.
    """
    inputs = {n: t.to(model.device) for n, t in inputs.items() if t is not None}
    attention_mask = inputs["attention_mask"]
    batch, length = attention_mask.shape
    kv_cache = make_cache(
        model, settings.cache, batch, length + settings.max_new_tokens
    )
    generator = None
    if settings.seed is not None:
        generator = torch.Generator().manual_seed(settings.seed)
    image_id = model.config.image_token_index
    logits = prefill(model, inputs, kv_cache)  # [B, V]
    for step in range(settings.max_new_tokens):
        if not logits.amax(dim=-1).isfinite().all():  # some may be forbidden: -inf
            raise FloatingPointError(_non_finite_message(model.dtype))
        # An answer holds no picture. (An id outside the table: an empty slice.)
        logits[:, image_id : image_id + 1] = float("-inf")
        token_ids, probabilities = sample_next_token(
            logits,
            settings.do_sample,
            settings.temperature,
            settings.top_k,
            settings.top_p,
            generator,
        )
        yield token_ids.tolist(), probabilities.tolist()
        if step + 1 < settings.max_new_tokens:
            one = attention_mask.new_ones(batch, 1)
            attention_mask = torch.cat([attention_mask, one], dim=1)  # [B, T + n]
            logits = decode_one_token(model, token_ids, attention_mask, kv_cache)


class IncrementalDetokenizer:
    """Turns a growing row of ids into pieces of text, special tokens left out.

    loc and seg tokens are text, also where the tokenizer calls them special. A
    character may take several byte tokens: its text comes with the last of them.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids)
        self.hidden = {i for t, i in special if not t.startswith(("<loc", "<seg"))}
        image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.hidden |= {tokenizer.eos_token_id, image_id}
        self.token_ids: list[int] = []
        self.text = ""

    def add(self, token_id: int) -> str:
        """The text that this token adds; empty for a special or unfinished one."""
        if token_id in self.hidden:
            return ""
        self.token_ids.append(token_id)
        return self._advance()

    def finish(self) -> str:
        """What is still held back: each byte of a cut character is a `\ufffd`."""
        return self._advance(final=True)

    def _advance(self, final: bool = False) -> str:
        text = self.tokenizer.decode(self.token_ids, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and not final:
            return ""
        piece = text[len(self.text) :]
        self.text += piece
        return piece


@dataclass
class Generation:
    """What the model wrote for one row: a list each of ids, probabilities and pieces.

    Piece i is the text that token i added (special tokens add none), so the pieces
    joined are the text. Probability i is what the distribution that token i was chosen
    from gave to it.
    """

    token_ids: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The pieces, joined."""
        return "".join(self.pieces)


def check_inputs(
    model: PaliGemmaForConditionalGeneration,
    inputs: dict[str, Tensor],
    settings: GenerationConfig,
) -> None:
    """Raise a ValueError for inputs that can't be continued, before any work.

    Values are read here, once, so that no pass of the model has to.
    """
    missing = [n for n in ("input_ids", "attention_mask") if n not in inputs]
    if missing:
        raise ValueError(f"inputs lack {' and '.join(missing)}: use the processor's")
    if "labels" in inputs or "token_type_ids" in inputs:
        raise ValueError(
            "inputs to generate from hold no labels and no token_type_ids: call our "
            "processor without a suffix (transformers' adds both: leave them out)"
        )
    input_ids, pixel_values = inputs["input_ids"], inputs.get("pixel_values")
    check_ids("input_ids", input_ids)
    vocabulary = model.config.text_config.vocab_size
    is_image = input_ids == model.config.image_token_index
    unknown = input_ids[~is_image & ((input_ids < 0) | (input_ids >= vocabulary))]
    if len(unknown):
        raise ValueError(
            f"input_ids hold {unknown[0]}, but the model knows 0…{vocabulary - 1}: the "
            "tokenizer belongs to another model"
        )
    mask = inputs["attention_mask"]
    if (
        not isinstance(mask, Tensor)
        or mask.shape != input_ids.shape
        or not ((mask == 0) | (mask == 1)).all()
        or not mask.any(dim=1).all()
    ):
        raise ValueError(
            f"attention_mask must be {list(input_ids.shape)} of 1 (a token) and 0 "
            "(padding), with a token in each row"
        )
    num_features, why = 0, "there are no pixel_values"
    if pixel_values is not None:
        rows_per_image(len(pixel_values), len(input_ids))
        num_features = model.config.vision_config.num_image_tokens
        why = f"the model takes {num_features}: make a processor with that number"
    counts = is_image.sum(dim=1).tolist()
    if {*counts} != {num_features}:
        raise ValueError(f"rows with {counts} image tokens, but {why}")
    length = input_ids.shape[1]
    needed = length + settings.max_new_tokens - 1  # the last one isn't fed back
    positions = model.config.text_config.max_position_embeddings
    if needed > positions:
        raise ValueError(
            f"a prompt of {length} tokens (the picture's among them) and "
            f"{settings.max_new_tokens} new ones need {needed} positions, but the "
            f"model has {positions}: shorten the prompt or generate fewer tokens"
        )


def generation_steps(
    model: PaliGemmaForConditionalGeneration,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    settings: GenerationConfig,
) -> Iterator[list[Generation]]:
    """Yield all rows' Generations, grown by a token each time, until every row ended.

    It is the same list every time; a row that has ended stays as it is. The inputs
    are taken as they are: `check_inputs` comes before.
    """
    rows = [Generation() for _ in inputs["input_ids"]]
    decoders = [IncrementalDetokenizer(tokenizer) for _ in rows]
    running = set(range(len(rows)))
    steps = token_steps(model, inputs, settings)
    for step, (token_ids, probabilities) in enumerate(steps, start=1):
        for i in sorted(running):
            row = rows[i]
            row.token_ids.append(token_ids[i])
            row.probabilities.append(probabilities[i])
            row.pieces.append(decoders[i].add(token_ids[i]))
            if (
                token_ids[i] == tokenizer.eos_token_id
                or step == settings.max_new_tokens
                or settings.should_stop(row.token_ids, row.text)
            ):
                row.pieces[-1] += decoders[i].finish()
                running.discard(i)
        yield rows
        if not running:
            return


def generate_tokens(
    model: PaliGemmaForConditionalGeneration,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    **settings: Any,
) -> list[Generation]:
    """As `generate`, with each token's id, probability and piece of text."""
    chosen = GenerationConfig(**settings)
    check_inputs(model, inputs, chosen)
    # Run to the end, keep the last state.
    *_, rows = generation_steps(model, tokenizer, inputs, chosen)
    return rows


def generate(
    model: PaliGemmaForConditionalGeneration,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    **settings: Any,
) -> list[str]:
    """Continue every row of `inputs` (the processor's) and return the texts.

    `settings`: those of `GenerationConfig`, by name. Rows may be of different length,
    padded left or right. loc and seg tokens are part of the text; the other special
    tokens are not.
    Raises ValueError for settings out of range and for inputs that can't be continued.
    """
    return [row.text for row in generate_tokens(model, tokenizer, inputs, **settings)]


def stream(
    model: PaliGemmaForConditionalGeneration,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    **settings: Any,
) -> Iterator[str]:
    """As `generate` for one row, yielding text as it is made.

    Raises ValueError for a batch, and where `generate` does.
    """
    chosen = GenerationConfig(**settings)
    check_inputs(model, inputs, chosen)
    if len(inputs["input_ids"]) != 1:
        raise ValueError(
            f"stream takes one row, not {len(inputs['input_ids'])}: use generate"
        )
    steps = generation_steps(model, tokenizer, inputs, chosen)
    return (rows[0].pieces[-1] for rows in steps if rows[0].pieces[-1])
