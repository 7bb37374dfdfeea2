"""Gemma 2, PaliGemma 2's decoder: four norms, soft-capped scores, sliding windows.

Built in notebooks/24_gemma2.ipynb: edit it there, then run `make export`.
"""

from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .attention import GemmaAttention
from .config import Gemma2Config
from .gemma import GemmaForCausalLM, GemmaMLP, GemmaModel
from .kv_cache import KVCache, StaticKVCache
from .masks import sliding_window_mask
from .rmsnorm import GemmaRMSNorm


def soft_cap(
    values: Float[Tensor, "*axes"], cap: float | None
) -> Float[Tensor, "*axes"]:
    """Squash values smoothly into -cap … cap (Bello et al. 2016); None: no cap."""
    return values if cap is None else cap * torch.tanh(values / cap)


class Gemma2Attention(GemmaAttention):
    """Grouped-query attention with a scale of its own and soft-capped scores."""

    def __init__(self, config: Gemma2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.scaling = config.query_pre_attn_scalar**-0.5
        if config.attn_logit_softcapping is not None:
            self.score_mod = partial(soft_cap, cap=config.attn_logit_softcapping)


class Gemma2DecoderLayer(nn.Module):
    """Norm, attention, norm, add; norm, MLP, norm, add.

    Here `post_attention_layernorm` is the norm on what attention returns. In Gemma 1
    the norm of that name is at the entrance of the MLP.
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
        attention_mask: Bool[Tensor, "B 1 T M"] | None,
        kv_cache: KVCache | StaticKVCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B H T M"] | None]:
        """Hidden states after this block; attention weights when asked, else None."""
        normalized = self.input_layernorm(hidden_states)  # [B, T, D]
        attn_output, weights = self.self_attn(
            normalized, cos, sin, attention_mask, kv_cache, output_attentions
        )
        hidden_states = hidden_states + self.post_attention_layernorm(attn_output)
        mlp_output = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        hidden_states = hidden_states + self.post_feedforward_layernorm(mlp_output)
        return hidden_states, weights


class Gemma2Model(GemmaModel):
    """Embedding table, blocks with and without a window in turn, final norm."""

    layer_class = Gemma2DecoderLayer

    def layer_masks(
        self,
        attention_mask: Bool[Tensor, "B 1 T M"] | None,
        inputs_embeds: Float[Tensor, "B T D"],
        kv_cache: KVCache | StaticKVCache | None,
    ) -> list[Bool[Tensor, "B 1 T M"] | None]:
        """Each layer's mask: through the window where the config says so."""
        batch, num_new = inputs_embeds.shape[:2]
        past = 0  # counts where several new tokens attend to each other
        if kv_cache is not None and (attention_mask is None or num_new > 1):
            past = kv_cache.num_items()
        windowed, window = attention_mask, self.config.sliding_window
        if windowed is None and window is not None and past + num_new > window:
            windowed = inputs_embeds.new_ones(batch, 1, num_new, past + num_new).bool()
        if windowed is not None and window is not None:
            windowed = sliding_window_mask(windowed, window, past)
        masks = {"sliding_attention": windowed, "full_attention": attention_mask}
        return [masks[kind] for kind in self.config.layer_types]


class Gemma2ForCausalLM(GemmaForCausalLM):
    """Gemma 2 and its output head: Gemma's interface, soft-capped logits."""

    model_class = Gemma2Model

    def compute_logits(self, states: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Final states → logits between -cap and cap."""
        logits = super().compute_logits(states)  # [B, T, V]
        return soft_cap(logits, self.config.final_logit_softcapping)
