"""Generation: sample a token from logits, decode in a loop, stop.

Built in notebooks/15_sampling.ipynb: edit it there, then run `make export`.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from math import inf, isnan
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from .detokenizer import IncrementalDetokenizer
from .gemma import check_ids
from .kv_cache import KVCache, StaticKVCache, kept_cache
from .merging import rows_per_image
from .paligemma import PaliGemmaForConditionalGeneration as PaliGemma


def apply_temperature(
    logits: Float[Tensor, "B V"], temperature: float
) -> Float[Tensor, "B V"]:
    """Divide by the temperature (> 0): under 1 sharpens the choice, over 1 flattens it.

    The largest logit becomes 0 first, so that a tiny temperature can't overflow.
    """
    return (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-37)


def top_k_filter(logits: Float[Tensor, "B V"], top_k: int) -> Float[Tensor, "B V"]:
    """Mask out (-inf) all but the k most probable; ties with the k-th stay too."""
    kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]  # [B, 1]
    return logits.masked_fill(logits < kth, -inf)


def top_p_filter(
    logits: Float[Tensor, "B V"], top_p: float, most: int | None = None
) -> Float[Tensor, "B V"]:
    """Mask out (-inf) all but the smallest set of tokens whose probabilities reach p.

    The token that crosses p is in it: it is never empty. `most`: how many top-k has
    left; only these are sorted, ties beyond are dropped. Source: Holtzman et al. 2020.
    """
    if top_p >= 1:  # everything stays; rounding must not drop the tail
        return logits
    k = min(most or logits.shape[-1], logits.shape[-1])
    sorted_logits, order = logits.topk(k, dim=-1)  # [B, k], in descending order
    probabilities = sorted_logits.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass ahead of each token
    drop = before >= top_p
    drop[:, 0] = False  # nothing is ahead of the first, however small p is
    kept = sorted_logits.masked_fill(drop, -inf)  # [B, k]
    return torch.full_like(logits, -inf).scatter(1, order, kept)  # vocabulary order


def sample_next_token(
    logits: Float[Tensor, "B V"],
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    uniform: Float[Tensor, "B"] | None = None,
) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
    """Choose each row's next token: (ids, probabilities of the chosen).

    Greedy unless `do_sample`, and at temperature 0. The probabilities are those of the
    filtered distribution that is drawn from; for greedy, the plain softmax's; NaN where
    a logit is NaN or inf. `uniform`: each row's number in [0, 1), as from
    `uniform_numbers`; without it, a random one.
    """
    logits = logits.float()
    if not do_sample or temperature == 0:
        probabilities, token_ids = logits.softmax(dim=-1).max(dim=-1)  # [B] each
        return token_ids, probabilities
    logits = apply_temperature(logits, temperature)
    if top_k is not None:
        logits = top_k_filter(logits, top_k)
    if top_p is not None:
        logits = top_p_filter(logits, top_p, most=top_k)
    probabilities = logits.softmax(dim=-1)  # [B, V]
    cumulative = probabilities.cumsum(dim=-1)  # [B, V]: a staircase from 0 to about 1
    # A GPU's parallel sum may rise by a hair where a probability is 0.
    cumulative = cumulative.masked_fill(probabilities == 0, 0)
    if uniform is None:
        uniform = torch.rand(len(logits), device=logits.device)
    height = uniform[:, None] * cumulative.amax(dim=-1, keepdim=True)  # [B, 1]
    token_ids = (cumulative > height).int().argmax(dim=-1, keepdim=True)  # the first
    return token_ids[:, 0], probabilities.gather(1, token_ids)[:, 0]  # [B] each


def uniform_numbers(
    seed: int | None, num_steps: int, num_rows: int
) -> Float[Tensor, "steps B"]:
    """Numbers in [0, 1) to draw with, for each step and row; None: always fresh ones.

    Those of a row depend on the seed and the row's number alone, and are drawn on the
    CPU: a seed means the same draws on every device and in every batch.
    """
    if seed is None:
        return torch.rand(num_steps, num_rows)
    columns = []
    for row in range(num_rows):
        # Python's generator makes of both a seed like no other row's.
        own = random.Random(f"{seed} {row}").getrandbits(63)
        generator = torch.Generator().manual_seed(own)
        columns.append(torch.rand(num_steps, generator=generator))
    return torch.stack(columns, dim=1)  # [steps, B]


RANGES = {  # setting → type, smallest and largest value, the same in words
    "max_new_tokens": (Integral, 1, inf, "a whole number, at least 1"),
    "temperature": (Real, 0, 1e38, "0 (greedy) or a positive number"),
    "top_k": (Integral, 1, inf, "a whole number, at least 1, or None"),
    "top_p": (Real, 1e-308, 1, "in (0, 1], or None"),
    "seed": (Integral, -(2**63), 2**64 - 1, "a whole number of at most 64 bits"),
}


@dataclass
class GenerationConfig:
    """How to continue a prompt; `generate` and `stream` take these by name.

    A row ends at EOS, at the limit, with the token that completes a string of `stop`
    (the token stays whole), or where `stop`, a function of its ids so far, is true.
    Raises ValueError for a value out of its range, with the range.
    """

    max_new_tokens: int = 100
    do_sample: bool = False  # greedy: always the most probable token
    temperature: float = 1.0  # then top_k, then top_p, shape what is drawn from
    top_k: int | None = None
    top_p: float | None = None
    stop: str | Sequence[str] | Callable[[list[int]], bool] | None = None
    seed: int | None = None  # with one, the same draws every time
    cache: str = "dynamic"  # grows; "static" is allocated once
    compile: bool = False  # decode steps, with a static cache: chapter 23

    def __post_init__(self) -> None:
        for name, (kind, low, high, words) in RANGES.items():
            value, default = getattr(self, name), getattr(type(self), name)
            in_range = isinstance(value, kind) and low <= value <= high
            if not in_range and value is not default:
                raise ValueError(f"{name}={value!r} must be {words}")
        if self.cache not in ("dynamic", "static"):
            raise ValueError(f"cache={self.cache!r} must be 'dynamic' or 'static'")
        if self.compile:
            self.cache = "static"
        if callable(self.stop):
            return
        self.stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        is_list = isinstance(self.stop, list | tuple)
        if not is_list or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError("stop must be a function, or strings that aren't empty")

    def should_stop(self, token_ids: list[int], text: str) -> bool:
        """Whether `stop` ends a row with these tokens and this text."""
        if callable(self.stop):
            return bool(self.stop(token_ids))
        return any(ending in text for ending in self.stop)


Inputs = dict[str, Tensor]  # as the processor makes them
Cache = KVCache | StaticKVCache


def prefill(model: PaliGemma, inputs: Inputs, kv_cache: Cache) -> Float[Tensor, "B V"]:
    """Read picture and prompt, fill the cache; logits after each row's last real token.

    Logits are computed from the shortest row's end on, not for the whole prompt.
    """
    attention_mask = inputs["attention_mask"]  # [B, T]
    length = attention_mask.shape[1]
    positions = torch.arange(length, device=attention_mask.device)  # [T]
    last = (attention_mask * positions).argmax(dim=1)  # [B]
    keep = length - int(last.min())
    if attention_mask.all():  # nothing to mask out: the model needn't read a mask
        inputs = inputs | {"attention_mask": None}
    logits = model(**inputs, kv_cache=kv_cache, logits_to_keep=keep)["logits"]
    rows = torch.arange(len(last), device=last.device)
    return logits[rows, last - (length - keep)]  # [B, keep, V] → [B, V]


def decode_one_token(
    model: PaliGemma,
    token_ids: Int[Tensor, "B"],
    position_ids: Int[Tensor, "B 1"],
    attention_mask: Bool[Tensor, "B 1 1 M"] | None,
    kv_cache: Cache,
) -> Float[Tensor, "B V"]:
    """One new token in, the next one's logits out.

    Straight to the decoder: its inputs were checked at the door, and no value is read
    here, so that Python never waits. `attention_mask`: which of M cached and new tokens
    are real; None: all. A static cache needs one; its empty slots are masked out here.
    """
    decoder = model.language_model
    inputs_embeds = decoder.model.embed(token_ids[:, None])  # [B, 1, D]
    if isinstance(kv_cache, StaticKVCache):
        attention_mask = attention_mask & kv_cache.filled()  # [B, 1, 1, M]
    states, _ = decoder.model(inputs_embeds, attention_mask, position_ids, kv_cache)
    return decoder.compute_logits(states)[:, -1]  # [B, 1, V] → [B, V]


@cache
def compiled_decode_step(device_type: str) -> Callable:
    """`decode_one_token` compiled, once for all: on a GPU into a CUDA graph."""
    mode = "reduce-overhead" if device_type == "cuda" else None
    # Each batch size and length of the cache is one more; at eight PyTorch would stop.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 64)
    return torch.compile(decode_one_token, fullgraph=True, dynamic=False, mode=mode)


@torch.no_grad()
def token_steps(
    model: PaliGemma, inputs: Inputs, settings: GenerationConfig
) -> Iterator[tuple[list[int], list[float]]]:
    """Yield (ids, probabilities) of all rows, one step at a time, up to the limit.

    EOS and `stop` are the caller's business. Raises FloatingPointError for logits that
    are NaN or inf: their argmax would be token 0, which reads as a blank.
    """
    device, limit = model.device, settings.max_new_tokens
    inputs = {n: t.to(device) for n, t in inputs.items() if t is not None}
    given = inputs["attention_mask"].bool()  # [B, T]
    is_padded, (batch, length) = not given.all(), given.shape
    capacity, decode = length + limit, decode_one_token
    if settings.compile:
        capacity = -(-capacity // 256) * 256  # few sizes, few compilations
        decode = compiled_decode_step(device.type)
    real = F.pad(given, (0, capacity - length), value=True)  # [B, capacity]
    real = real[:, None, None]  # [B, 1, 1, capacity]
    position_ids = given.sum(dim=1, keepdim=True)  # [B, 1]: the next token's
    kept = nullcontext(KVCache())
    if is_static := settings.cache == "static":
        sizes = model.config.text_config, batch, capacity, device, model.dtype
        kept = nullcontext(StaticKVCache(*sizes))
        if settings.compile:
            kept = kept_cache(model, *sizes)
    how = settings.do_sample, settings.temperature, settings.top_k, settings.top_p
    draws = [None] * limit
    if settings.do_sample:
        draws = uniform_numbers(settings.seed, limit, batch).to(device)  # [limit, B]
    image_id = model.config.image_token_index
    with kept as kv_cache:
        logits = prefill(model, inputs, kv_cache)  # [B, V]
        for step in range(limit):
            # No picture in an answer. (An id outside the table: an empty slice.)
            logits[:, image_id : image_id + 1] = -inf
            token_ids, probabilities = sample_next_token(logits, *how, draws[step])
            # The step's one transfer; as float32, ids are exact up to 2^24.
            ids, chances = torch.stack([token_ids.float(), probabilities]).tolist()
            if any(map(isnan, chances)):
                advice = "look for NaN in the weights and in pixel_values"
                if model.dtype == torch.float16:
                    advice = "if it overflows, use dtype='float32' or 'bfloat16'"
                what = f"logits are NaN or inf in {model.dtype}"
                raise FloatingPointError(f"{what}: {advice}")
            yield [*map(int, ids)], chances
            if step + 1 < limit:
                mask = None
                if is_static or is_padded:
                    mask = real if is_static else real[..., : length + step + 1]
                logits = decode(model, token_ids, position_ids, mask, kv_cache)
                position_ids += 1


@dataclass
class Generation:
    """What the model wrote for one row: a list each of ids, probabilities and pieces.

    Piece i is the text that token i added, "" for a special token. Probability i is
    that of token i in the distribution that it was chosen from.
    """

    token_ids: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The pieces, joined."""
        return "".join(self.pieces)


def check_inputs(model: PaliGemma, inputs: Inputs, settings: GenerationConfig) -> None:
    """ValueError for inputs that can't be continued: values are read here, once."""
    if {*inputs} - {"pixel_values"} != {"input_ids", "attention_mask"}:
        wanted = "input_ids, attention_mask and pixel_values, made without a suffix"
        raise ValueError(f"inputs must be {wanted}, not {', '.join(inputs)}")
    input_ids, mask = inputs["input_ids"], inputs["attention_mask"]
    check_ids("input_ids", input_ids)
    config = model.config.text_config
    vocab_size, limit = config.vocab_size, config.max_position_embeddings
    is_image = input_ids == model.config.image_token_index
    unknown = input_ids[~is_image & ((input_ids < 0) | (input_ids >= vocab_size))]
    if len(unknown):
        raise ValueError(
            f"input_ids hold {unknown[0]}, but the model knows 0…{vocab_size - 1}: "
            "the tokenizer belongs to another model"
        )
    fits = isinstance(mask, Tensor) and mask.shape == input_ids.shape
    if not fits or {*mask.unique().tolist()} - {0, 1} or not mask.any(dim=1).all():
        shape = list(input_ids.shape)
        raise ValueError(f"attention_mask must be {shape} of 0 and 1, in each row a 1")
    wanted = 0
    if (pixel_values := inputs.get("pixel_values")) is not None:
        rows_per_image(len(pixel_values), len(input_ids))
        wanted = model.config.vision_config.num_image_tokens
    counts = is_image.sum(dim=1).tolist()
    if {*counts} != {wanted}:
        raise ValueError(
            f"{counts} image tokens, but the model takes {wanted} a row for these "
            "pixel_values: use make_processor(model, tokenizer)"
        )
    length, new = input_ids.shape[1], settings.max_new_tokens
    if (needed := length + new - 1) > limit:  # the last token isn't fed back
        raise ValueError(
            f"{length} tokens of picture and prompt and {new} new ones need {needed} "
            f"positions, but the model has {limit}: shorten the prompt or generate "
            "fewer tokens"
        )


def grow_rows(
    tokenizer: Any, num_rows: int, steps: Iterator[tuple], settings: GenerationConfig
) -> Iterator[list[Generation]]:
    """The rows' Generations, grown by a token with each of `token_steps`' steps."""
    rows = [Generation() for _ in range(num_rows)]
    decoders = [IncrementalDetokenizer(tokenizer) for _ in rows]
    running = set(range(num_rows))
    for step, (token_ids, probabilities) in enumerate(steps, start=1):
        for i in sorted(running):
            row, token_id = rows[i], token_ids[i]
            row.token_ids.append(token_id)
            row.probabilities.append(probabilities[i])
            row.pieces.append(decoders[i].add(token_id))
            ended = step == settings.max_new_tokens
            ended = ended or token_id == tokenizer.eos_token_id
            if ended or settings.should_stop(row.token_ids, row.text):
                row.pieces[-1] += decoders[i].finish()
                running.discard(i)
        yield rows
        if not running:
            return


def generation_steps(
    model: PaliGemma, tokenizer: Any, inputs: Inputs, settings: GenerationConfig
) -> Iterator[list[Generation]]:
    """All rows' Generations, grown by a token each time, until every row ended.

    It is the same list every time. Raises at the call, as `check_inputs`.
    """
    check_inputs(model, inputs, settings)
    # Inference mode is faster, but spoils CUDA graphs made later (pytorch#135892).
    mode = torch.no_grad() if settings.compile else torch.inference_mode()
    steps = mode(token_steps)(model, inputs, settings)
    return grow_rows(tokenizer, len(inputs["input_ids"]), steps, settings)


def generate_tokens(
    model: PaliGemma, tokenizer: Any, inputs: Inputs, **settings: Any
) -> list[Generation]:
    """As `generate`, with each token's id, probability and piece of text."""
    *_, rows = generation_steps(model, tokenizer, inputs, GenerationConfig(**settings))
    return rows


def generate(
    model: PaliGemma, tokenizer: Any, inputs: Inputs, **settings: Any
) -> list[str]:
    """Continue every row of `inputs` (the processor's) and return the texts.

    `settings`: those of `GenerationConfig`, by name. Rows may be of different length,
    padded left or right. Of the special tokens, the text has only loc and seg tokens.
    Raises ValueError for settings out of range and for inputs that can't be continued.
    """
    return [row.text for row in generate_tokens(model, tokenizer, inputs, **settings)]


def stream(
    model: PaliGemma, tokenizer: Any, inputs: Inputs, **settings: Any
) -> Iterator[str]:
    """As `generate` for one row, yielding text as it is made; ValueError for more."""
    steps = generation_steps(model, tokenizer, inputs, GenerationConfig(**settings))
    if (num_rows := len(inputs["input_ids"])) != 1:
        raise ValueError(f"stream takes one row, not {num_rows}: use generate")
    return (rows[0].pieces[-1] for rows in steps if rows[0].pieces[-1])
