"""Rotary position embedding (RoPE): rotate queries and keys by their positions.

Built in notebooks/05_rope.ipynb: edit it there, then run `make export`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def rotate_half(states: Float[Tensor, "*B Dh"]) -> Float[Tensor, "*B Dh"]:
    """Rotate every pair by 90°: (first half, second half) → (-second, first)."""
    first, second = states.chunk(2, dim=-1)  # two of [..., Dh/2]
    return torch.cat([-second, first], dim=-1)  # [..., Dh]


class GemmaRotaryEmbedding(nn.Module):
    """Cosines and sines of the angles by which each position rotates its pairs.

    Number i of a head is paired with number i + Dh/2 (split halves), and pair i rotates
    by `base ** (-2 * i / Dh)` radians a position. `dim` is the head's width Dh; an odd
    one is a ValueError. Source: Su et al. 2021 (RoFormer).
    """

    def __init__(self, dim: int, base: float = 10000.0):
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim={dim} must be even: RoPE rotates pairs of numbers")
        self.dim = dim
        self.base = base

    def forward(
        self, hidden_states: Float[Tensor, "..."], position_ids: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T Dh"], Float[Tensor, "B T Dh"]]:
        """(cos, sin) for `position_ids`; `hidden_states` lends its dtype and device.

        The angles themselves are float32 whatever the dtype: in bfloat16, neighboring
        positions beyond 256 would share an angle. Raises ValueError for positions
        without a batch axis, which would broadcast over heads.
        """
        if position_ids.ndim != 2:
            raise ValueError(
                f"position_ids have shape {list(position_ids.shape)}, expected "
                "[batch, tokens]"
            )
        even = torch.arange(0, self.dim, 2, device=hidden_states.device)  # 2i: [Dh/2]
        inv_freq = 1.0 / self.base ** (even.float() / self.dim)  # [Dh/2]
        angles = position_ids[..., None].float() * inv_freq  # [B, T, Dh/2]
        angles = torch.cat([angles, angles], dim=-1)  # [B, T, Dh]
        dtype = hidden_states.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary_pos_emb(
    query_states: Float[Tensor, "B H T Dh"],
    key_states: Float[Tensor, "B K T Dh"],
    cos: Float[Tensor, "B T Dh"],
    sin: Float[Tensor, "B T Dh"],
) -> tuple[Float[Tensor, "B H T Dh"], Float[Tensor, "B K T Dh"]]:
    """Rotate queries and keys by their positions' angles; values stay as they are."""
    cos = cos.unsqueeze(1)  # [B, 1, T, Dh]: the same angles for every head
    sin = sin.unsqueeze(1)  # [B, 1, T, Dh]
    query_states = query_states * cos + rotate_half(query_states) * sin
    key_states = key_states * cos + rotate_half(key_states) * sin
    return query_states, key_states
