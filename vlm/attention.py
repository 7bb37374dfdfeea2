"""Grouped-query attention: fewer key/value heads than query heads; eager or fused.

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


def repeat_kv(
    states: Float[Tensor, "B K M Dh"], group_size: int
) -> Float[Tensor, "B H M Dh"]:
    """Repeat each head `group_size` times in a row; a single head without copying."""
    groups = states.unsqueeze(2).expand(-1, -1, group_size, -1, -1)  # [B, K, G, M, Dh]
    return groups.flatten(1, 2)  # [B, H, M, Dh]


def eager_attention(
    query_states: Float[Tensor, "B H T Dh"],
    key_states: Float[Tensor, "B K M Dh"],
    value_states: Float[Tensor, "B K M Dh"],
    attention_mask: Bool[Tensor, "B 1 T M"] | None,
    scaling: float,
    score_mod: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Float[Tensor, "B H T Dh"], Float[Tensor, "B H T M"]]:
    """The formula, step by step → attention output and attention weights.

    `score_mod` changes scaled scores before they are masked. Without a mask, every
    query attends to every key; a row of the mask that is all False gives NaN.
    """
    group_size = query_states.shape[1] // key_states.shape[1]
    key_states = repeat_kv(key_states, group_size)  # [B, H, M, Dh]
    value_states = repeat_kv(value_states, group_size)  # [B, H, M, Dh]
    scores = query_states @ key_states.transpose(2, 3) * scaling  # [B, H, T, M]
    if score_mod is not None:
        scores = score_mod(scores)  # [B, H, T, M]
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = scores.float().softmax(dim=-1).to(query_states.dtype)  # [B, H, T, M]
    return weights @ value_states, weights  # [B, H, T, Dh], [B, H, T, M]


class GemmaAttention(nn.Module):
    """Grouped-query self-attention with RoPE; with one key/value head, multi-query.

    The head width is the config's `head_dim`, which need not be D / H.
    Source: Shazeer 2019 (multi-query), Ainslie et al. 2023 (grouped-query).
    """

    score_mod: Callable[[Tensor], Tensor] | None = None  # Gemma 2 has one

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
        attention_mask: Bool[Tensor, "B 1 T M"] | None,
        output_attentions: bool,
    ) -> tuple[Float[Tensor, "B H T Dh"], Float[Tensor, "B H T M"] | None]:
        """Fused, unless the weights are asked for or there is a `score_mod`."""
        states = query_states, key_states, value_states
        if output_attentions or self.score_mod is not None:
            attn_output, weights = eager_attention(
                *states, attention_mask, self.scaling, self.score_mod
            )
            return attn_output, weights if output_attentions else None
        group_size = query_states.shape[1] // key_states.shape[1]
        if attention_mask is None or query_states.shape[2] == 1:
            # All queries of a group attend to the same: as if they were of one head.
            queries = query_states.unflatten(1, (-1, group_size)).flatten(2, 3)
            states = queries, key_states, value_states  # queries: [B, K, H / K * T, Dh]
        else:  # on CUDA, masked groups may be unfused
            states = query_states, *(repeat_kv(s, group_size) for s in states[1:])
        attn_output = F.scaled_dot_product_attention(
            *states, attention_mask, scale=self.scaling
        )
        return attn_output.reshape(query_states.shape), None

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        cos: Float[Tensor, "B T Dh"],
        sin: Float[Tensor, "B T Dh"],
        attention_mask: Bool[Tensor, "B 1 T M"] | None,
        kv_cache: "KVCache | StaticKVCache | None" = None,
        output_attentions: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B H T M"] | None]:
        """T new tokens attend to M cached and new ones where the mask is True.

        Without a mask, to all. Returns the output and, with `output_attentions`, the
        weights, else None. Raises ValueError for a mask that isn't boolean.
        """
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            raise ValueError(
                f"attention_mask is {attention_mask.dtype}, expected torch.bool: True "
                "where a token attends (for zeros and minus infinities: mask == 0)"
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
        attn_output, weights = self.attend(
            query_states, key_states, value_states, attention_mask, output_attentions
        )  # [B, H, T, Dh], [B, H, T, M]
        attn_output = attn_output.transpose(1, 2).flatten(2)  # [B, T, H * Dh]
        return self.o_proj(attn_output), weights
