"""Keep every token's keys and values, so that a new token costs one token's work
instead of a whole text's.

Built in notebooks/07_kv_cache.ipynb: edit it there, then run `make export`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from .config import GemmaConfig

__all__ = ["KVCache", "StaticKVCache"]


def _require_same_rows(buffer: Tensor, states: Tensor) -> None:
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
    autograd can't follow back. Raises ValueError for a chunk of less than one token.
    """

    def __init__(self, chunk: int = 256):
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1 token")
        self.chunk = chunk
        # One pair for each layer, [B, K, capacity, Dh] both, and its filled length.
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._lengths: list[int] = []

    def num_items(self) -> int:
        """Tokens remembered so far; 0 when empty."""
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

        Raises ValueError where a layer is skipped or the batch is another one.
        """
        if not 0 <= layer_idx <= len(self._buffers):
            raise ValueError(
                f"layer {layer_idx} came in before layer {len(self._buffers)}"
            )
        if layer_idx == len(self._buffers):  # the layer's first tokens
            self._buffers.append((key_states[:, :, :0], value_states[:, :, :0]))
            self._lengths.append(0)
        keys, values = self._buffers[layer_idx]  # [B, K, capacity, Dh] each
        _require_same_rows(keys, key_states)
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

    `update` returns the whole buffer, so shapes never change; the attention mask says
    which of its `max_length` places are filled. Like `KVCache`, for inference.
    Raises ValueError for a `max_length` of less than one token.
    """

    def __init__(
        self,
        config: GemmaConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if max_length < 1:
            raise ValueError(f"max_length={max_length} must be at least 1 token")
        self.max_length = max_length
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        # Zeros, not uninitialized memory: a masked NaN would still poison the sum.
        self._buffers = [
            (
                torch.zeros(shape, device=device, dtype=dtype),
                torch.zeros(shape, device=device, dtype=dtype),
            )
            for _ in range(config.num_hidden_layers)
        ]
        self._lengths = [0] * config.num_hidden_layers

    def num_items(self) -> int:
        """Tokens remembered so far; 0 when empty."""
        return self._lengths[-1]

    def key_length(self, num_new: int) -> int:
        """How many keys `update` returns: always the whole buffer.

        Raises ValueError where `num_new` tokens don't fit any more.
        """
        self._require_room(self.num_items() + num_new)
        return self.max_length

    def update(
        self,
        key_states: Float[Tensor, "B K T Dh"],
        value_states: Float[Tensor, "B K T Dh"],
        layer_idx: int,
    ) -> tuple[Float[Tensor, "B K M Dh"], Float[Tensor, "B K M Dh"]]:
        """Write T tokens into a layer's buffer; returns all M = max_length places.

        Raises ValueError where they don't fit, for a layer that isn't there, or where
        the batch is another one.
        """
        if not 0 <= layer_idx < len(self._buffers):
            raise ValueError(
                f"layer {layer_idx} of a cache for {len(self._buffers)} layers"
            )
        keys, values = self._buffers[layer_idx]  # [B, K, M, Dh] each
        _require_same_rows(keys, key_states)
        start = self._lengths[layer_idx]
        end = start + key_states.shape[2]
        self._require_room(end)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self._lengths[layer_idx] = end
        return keys, values

    def _require_room(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} tokens, but {length} are needed: "
                f"make it with max_length={length} or more"
            )
