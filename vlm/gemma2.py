"""A newer decoder in the same frame: four norms a layer, bounded scores and windows.

Built in notebooks/24_gemma2.ipynb: edit it there, then run `make export`.
"""

from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import GemmaAttention, explicit_attention
from .config import Gemma2Config
from .gemma import GemmaForCausalLM, GemmaMLP, GemmaModel
from .kv_cache import KVCache, StaticKVCache
from .rmsnorm import GemmaRMSNorm

__all__ = ["Gemma2ForCausalLM"]


def soft_cap(
    values: Float[Tensor, "*axes"], cap: float | None
) -> Float[Tensor, "*axes"]:
    """Bend values smoothly into -cap … cap; None leaves them as they are.

    Source: Gemma Team 2024 (Gemma 2), after Bello et al. 2016.
    """
    return values if cap is None else cap * torch.tanh(values / cap)


class Gemma2Attention(GemmaAttention):
    """Grouped-query attention with a scale of its own and bounded scores."""

    def __init__(self, config: Gemma2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.scaling = config.query_pre_attn_scalar**-0.5
        self.score_cap = config.attn_logit_softcapping

    def attend(
        self,
        query_states: Float[Tensor, "B H T Dh"],
        key_states: Float[Tensor, "B K M Dh"],
        value_states: Float[Tensor, "B K M Dh"],
        attention_mask: Bool[Tensor, "B 1 T M"],
        output_attentions: bool,
    ) -> tuple[Float[Tensor, "B H T Dh"], Float[Tensor, "B H T M"] | None]:
        """Mixed values, step by step: the fused kernel has no place for the cap."""
        states = query_states, key_states, value_states
        if self.score_cap is None:
            return super().attend(*states, attention_mask, output_attentions)
        mixed, weights = explicit_attention(
            *states,
            attention_mask,
            self.scaling,
            score_mod=partial(soft_cap, cap=self.score_cap),
        )
        return mixed, weights if output_attentions else None


class Gemma2DecoderLayer(nn.Module):
    """Norm, attention, norm, add; norm, MLP, norm, add.

    Here `post_attention_layernorm` is the norm on what attention returns. In Gemma 1
    the norm of that name stands at the entrance of the MLP.
    Source: Gemma Team 2024 (Gemma 2).
    """

    def __init__(self, config: Gemma2Config, layer_idx: int):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Gemma2Attention(config, layer_idx)
        self.mlp = GemmaMLP(config)
        self.input_layernorm = GemmaRMSNorm(width, eps)
        self.post_attention_layernorm = GemmaRMSNorm(width, eps)
        self.pre_feedforward_layernorm = GemmaRMSNorm(width, eps)
        self.post_feedforward_layernorm = GemmaRMSNorm(width, eps)

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        cos: Float[Tensor, "B T Dh"],
        sin: Float[Tensor, "B T Dh"],
        attention_mask: Bool[Tensor, "B 1 T M"],
        kv_cache: KVCache | StaticKVCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B H T M"] | None]:
        """The stream after this block; the attention weights when asked, else None."""
        mixed, weights = self.self_attn(
            self.input_layernorm(hidden_states),
            cos,
            sin,
            attention_mask,
            kv_cache,
            output_attentions,
        )
        hidden_states = hidden_states + self.post_attention_layernorm(mixed)
        mixed = self.mlp(self.pre_feedforward_layernorm(hidden_states))  # [B, T, D]
        hidden_states = hidden_states + self.post_feedforward_layernorm(mixed)
        return hidden_states, weights


def sliding_window_mask(
    attention_mask: Bool[Tensor, "B 1 T M"], window: int, past: int = 0
) -> Bool[Tensor, "B 1 T M"]:
    """Leave each token the last `window` of those that it may see, itself included.

    New tokens that see each other (image and prompt, in a prefill) go on doing so at
    any distance. The T new tokens stand behind `past` cached ones. What is counted is
    what can be seen: padding and empty places of a static cache don't count.
    """
    num_new, length = attention_mask.shape[2:]
    if length <= window:
        return attention_mask
    seen_so_far = attention_mask.cumsum(dim=-1)  # [B, 1, T, M]
    seen_after = seen_so_far[..., -1:] - seen_so_far  # [B, 1, T, M]
    new = attention_mask[..., past : past + num_new]  # [B, 1, T, T]
    mutual = F.pad(new & new.mT, (past, length - past - num_new))  # [B, 1, T, M]
    return attention_mask & (mutual | (seen_after < window))


class Gemma2Model(GemmaModel):
    """The table, blocks with and without a window in turn, the final norm."""

    layer_class = Gemma2DecoderLayer

    def layer_masks(
        self, attention_mask: Bool[Tensor, "B 1 T M"], past: int
    ) -> list[Bool[Tensor, "B 1 T M"]]:
        """Each layer's mask: through the window where the config says so."""
        windowed, window = attention_mask, self.config.sliding_window
        if window is not None:
            windowed = sliding_window_mask(attention_mask, window, past)
        return [
            windowed if kind == "sliding_attention" else attention_mask
            for kind in self.config.layer_types
        ]


class Gemma2ForCausalLM(GemmaForCausalLM):
    """Gemma 2 and its output head: the same interface as Gemma's, bounded logits.

    On its own it is causal. Source: Gemma Team 2024 (Gemma 2).
    """

    model_class = Gemma2Model

    def score(self, hidden_states: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Final states → logits between -cap and cap."""
        logits = super().score(hidden_states)  # [B, T, V]
        return soft_cap(logits, self.config.final_logit_softcapping)
