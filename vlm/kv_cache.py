"""The key/value cache: dynamic, growing in chunks, and static, of a fixed length.

Built in notebooks/07_kv_cache.ipynb: edit it there, then run `make export`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .config import GemmaConfig


def _require_same_batch(buffer: Tensor, states: Tensor) -> None:
    """Raise ValueError where batch, heads or width differ: assignment broadcasts."""
    held, new = ((b, k, dh) for b, k, _, dh in (buffer.shape, states.shape))
    if held != new:
        raise ValueError(
            f"the cache holds (batch, heads, width) = {held}, but {new} came in: it "
            "serves one batch of one model, make a new one for the next"
        )


class KVCache:
    """Keys and values of every layer, in buffers that grow a chunk of tokens at a time.

    Concatenation copies the whole past for each new token; a buffer with room to spare
    copies it once in `chunk` tokens. For inference: buffers are written in place, which
    autograd can't follow back.
    """

    def __init__(self, chunk: int = 256):
        self.chunk = chunk
        # One pair for each layer, [B, K, capacity, Dh] both, and its filled length.
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._lengths: list[int] = []

    def num_items(self) -> int:
        """Tokens in the cache so far; 0 when empty."""
        return self._lengths[-1] if self._lengths else 0

    def key_length(self, num_new: int) -> int:
        """How many keys `update` returns once `num_new` tokens have come in."""
        return self.num_items() + num_new

    def update(
        self,
        key_states: Float[Tensor, "B K T Dh"],
        value_states: Float[Tensor, "B K T Dh"],
        layer_idx: int,
    ) -> tuple[Float[Tensor, "B K M Dh"], Float[Tensor, "B K M Dh"]]:
        """Append T tokens to a layer; returns all M of its keys and values, as views.

        Raises ValueError for another batch.
        """
        if layer_idx == len(self._buffers):  # the layer's first tokens
            self._buffers.append((key_states[:, :, :0], value_states[:, :, :0]))
            self._lengths.append(0)
        keys, values = self._buffers[layer_idx]  # [B, K, capacity, Dh] each
        _require_same_batch(keys, key_states)
        start = self._lengths[layer_idx]
        end = start + key_states.shape[2]
        if end > keys.shape[2]:
            keys, values = self._grow(keys, end), self._grow(values, end)
            self._buffers[layer_idx] = (keys, values)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self._lengths[layer_idx] = end
        return keys[:, :, :end], values[:, :, :end]  # [B, K, M, Dh] each

    def _grow(self, buffer: Tensor, length: int) -> Tensor:
        """A copy of `buffer` with room for `length` tokens, in whole chunks."""
        batch, heads, filled, width = buffer.shape
        capacity = -(-length // self.chunk) * self.chunk  # rounded up
        grown = buffer.new_empty(batch, heads, capacity, width)
        grown[:, :, :filled] = buffer
        return grown


class StaticKVCache:
    """The same interface over buffers of a fixed length, allocated once.

    The first pass gets its own keys and values back. Each later one gets the whole
    buffers: shapes never change, and the attention mask says which of the `max_length`
    slots count. The number of tokens is a tensor, `position`, which a compiled step or
    a CUDA graph moves on by itself. Like `KVCache`, for inference.
    """

    def __init__(
        self,
        config: GemmaConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.max_length = max_length
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        # Zeros, not uninitialized memory: a masked NaN would still poison the sum.
        self._buffers = [
            tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
            for _ in range(config.num_hidden_layers)
        ]
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self._tensors = [self.position, *chain(*self._buffers)]
        if self.position.is_cuda:  # else no graph would write to them
            for tensor in self._tensors:
                torch._dynamo.mark_static_address(tensor)
        self._is_empty = True

    def reset(self) -> None:
        """Empty it for another answer; its tensors stay where they are."""
        for tensor in self._tensors:
            tensor.zero_()
        self._is_empty = True

    def num_items(self) -> int:
        """Tokens in the cache so far; 0 when empty. Waits for a GPU."""
        return 0 if self._is_empty else int(self.position)

    def key_length(self, num_new: int) -> int:
        """How many keys `update` returns; ValueError where the tokens don't fit."""
        length = self.num_items() + num_new
        if length > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} tokens, but {length} are needed: "
                f"make it with max_length={length} or more"
            )
        return num_new if self._is_empty else self.max_length

    def filled(self) -> Bool[Tensor, "M"]:
        """Which slots the next token attends to: those filled, and its own."""
        slots = torch.arange(self.max_length, device=self.position.device)  # [M]
        return slots <= self.position

    def update(
        self,
        key_states: Float[Tensor, "B K T Dh"],
        value_states: Float[Tensor, "B K T Dh"],
        layer_idx: int,
    ) -> tuple[Float[Tensor, "B K M Dh"], Float[Tensor, "B K M Dh"]]:
        """Write T tokens into a layer's buffer; returns T or all `max_length` slots.

        Raises ValueError for another batch, and on a CPU IndexError for tokens that
        don't fit. On a GPU, CUDA is unusable then: ask `key_length` first.
        """
        keys, values = self._buffers[layer_idx]  # [B, K, max_length, Dh] each
        _require_same_batch(keys, key_states)
        slots = self.position + torch.arange(key_states.shape[2], device=keys.device)
        keys.index_copy_(2, slots, key_states.to(keys.dtype))  # another one in autocast
        values.index_copy_(2, slots, value_states.to(values.dtype))
        is_first, is_last = self._is_empty, layer_idx == len(self._buffers) - 1
        if is_last:
            self.position += len(slots)
            self._is_empty = False
        return (key_states, value_states) if is_first else (keys, values)


_KEPT: WeakKeyDictionary = WeakKeyDictionary()  # model → sizes → caches not in use


@contextmanager
def kept_cache(
    owner: nn.Module, config: GemmaConfig, *sizes: Any
) -> Iterator[StaticKVCache]:
    """A static cache that `owner` keeps for these sizes, empty; another if it's in use.

    A CUDA graph knows its tensors by their addresses: for others it would be recorded
    again.
    """
    unused = _KEPT.setdefault(owner, {}).setdefault(sizes, [])
    if not unused:
        with torch.inference_mode(False):  # or no other mode could write to it
            unused.append(StaticKVCache(config, *sizes))
    kv_cache = unused.pop()
    kv_cache.reset()
    try:
        yield kv_cache
    finally:
        unused.append(kv_cache)
