"""Let many query heads share a few key/value heads, and remember far less.

Built in notebooks/06_attention.ipynb: edit it there, then run `make export`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from .config import GemmaConfig
from .rope import apply_rotary_pos_emb

if TYPE_CHECKING:
    from .kv_cache import KVCache, StaticKVCache

__all__ = ["explicit_attention", "GemmaAttention"]


def repeat_kv(
    states: Float[Tensor, "B K M Dh"], group_size: int
) -> Float[Tensor, "B H M Dh"]:
    """Write out each key/value head `group_size` times in a row: H = K · group_size.

    Query heads 0 … group_size - 1 then face copies of head 0, the next ones of head 1.
    """
    return states.repeat_interleave(group_size, dim=1)


def explicit_attention(
    query_states: Float[Tensor, "B H T Dh"],
    key_states: Float[Tensor, "B K M Dh"],
    value_states: Float[Tensor, "B K M Dh"],
    attention_mask: Bool[Tensor, "B 1 T M"],
    scaling: float,
    score_mod: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Float[Tensor, "B H T Dh"], Float[Tensor, "B H T M"]]:
    """The formula written out, step by step: mixed values, and the attention weights.

    For checks, figures, and models with a `score_mod`: a function that changes scaled
    scores before they are masked. A row of the mask that is False throughout gives NaN.
    """
    group_size = query_states.shape[1] // key_states.shape[1]
    key_states = repeat_kv(key_states, group_size)  # [B, H, M, Dh]
    value_states = repeat_kv(value_states, group_size)  # [B, H, M, Dh]
    scores = query_states @ key_states.transpose(2, 3) * scaling  # [B, H, T, M]
    if score_mod is not None:
        scores = score_mod(scores)  # [B, H, T, M]
    scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = scores.float().softmax(dim=-1).to(query_states.dtype)  # [B, H, T, M]
    return weights @ value_states, weights  # [B, H, T, Dh], [B, H, T, M]


class GemmaAttention(nn.Module):
    """Grouped-query self-attention with RoPE; with one key/value head, multi-query.

    The head width is the config's `head_dim`, which need not be D / H.
    Source: Shazeer 2019 (multi-query), Ainslie et al. 2023 (grouped-query).
    """

    def __init__(self, config: GemmaConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def _split_heads(
        self, states: Float[Tensor, "B T width"]
    ) -> Float[Tensor, "B heads T Dh"]:
        states = states.unflatten(-1, (-1, self.head_dim))  # [B, T, heads, Dh]
        return states.transpose(1, 2)  # [B, heads, T, Dh]

    def attend(
        self,
        query_states: Float[Tensor, "B H T Dh"],
        key_states: Float[Tensor, "B K M Dh"],
        value_states: Float[Tensor, "B K M Dh"],
        attention_mask: Bool[Tensor, "B 1 T M"],
        output_attentions: bool,
    ) -> tuple[Float[Tensor, "B H T Dh"], Float[Tensor, "B H T M"] | None]:
        """Mixed values, by the fused kernel; step by step where weights are asked."""
        if output_attentions:
            return explicit_attention(
                query_states, key_states, value_states, attention_mask, self.scaling
            )
        mixed = F.scaled_dot_product_attention(
            query_states,
            key_states,
            value_states,
            attn_mask=attention_mask,
            scale=self.scaling,
            enable_gqa=query_states.shape[1] != key_states.shape[1],
        )  # [B, H, T, Dh]
        return mixed, None

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        cos: Float[Tensor, "B T Dh"],
        sin: Float[Tensor, "B T Dh"],
        attention_mask: Bool[Tensor, "B 1 T M"],
        kv_cache: "KVCache | StaticKVCache | None" = None,
        output_attentions: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B H T M"] | None]:
        """Mix the T new tokens with all M (cached and new) where the mask is True.

        Returns the result and None, or with `output_attentions`, which takes the
        explicit path, the weights. Raises ValueError for a mask that isn't boolean.
        """
        if attention_mask.dtype != torch.bool:
            raise ValueError(
                f"attention_mask is {attention_mask.dtype}, expected torch.bool: True "
                "where a token may look (write mask.bool(), or mask == 0 for one of "
                "zeros and minus infinities)"
            )
        query_states = self._split_heads(self.q_proj(hidden_states))  # [B, H, T, Dh]
        key_states = self._split_heads(self.k_proj(hidden_states))  # [B, K, T, Dh]
        value_states = self._split_heads(self.v_proj(hidden_states))  # [B, K, T, Dh]
        query_states, key_states = apply_rotary_pos_emb(
            query_states, key_states, cos, sin
        )
        if kv_cache is not None:
            key_states, value_states = kv_cache.update(
                key_states, value_states, self.layer_idx
            )  # [B, K, M, Dh] each
        mixed, weights = self.attend(
            query_states, key_states, value_states, attention_mask, output_attentions
        )  # [B, H, T, Dh], [B, H, T, M]
        mixed = mixed.transpose(1, 2).flatten(2)  # [B, T, H * Dh]
        return self.o_proj(mixed), weights
