"""Gemma, the decoder: embedding table, blocks of attention and gated MLP, tied head.

Built in notebooks/09_gemma.ipynb: edit it there, then run `make export`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import GemmaAttention
from .config import GemmaConfig
from .kv_cache import KVCache, StaticKVCache
from .masks import mask_and_positions
from .rmsnorm import GemmaRMSNorm
from .rope import GemmaRotaryEmbedding


class GemmaMLP(nn.Module):
    """GeGLU (Shazeer 2020): one linear map, through a tanh-GELU, gates another."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden_states: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Up-project twice, activate the gate and multiply, down-project."""
        gate = self.gate_proj(hidden_states)  # [B, T, F]
        gate = F.gelu(gate, approximate="tanh")
        return self.down_proj(gate * self.up_proj(hidden_states))  # [B, T, D]


class GemmaDecoderLayer(nn.Module):
    """Norm, attention, add; norm, MLP, add.

    `post_attention_layernorm` is the norm at the entrance of the MLP: the name is the
    checkpoint files'.
    """

    def __init__(self, config: GemmaConfig, layer_idx: int):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = GemmaAttention(config, layer_idx)
        self.mlp = GemmaMLP(config)
        self.input_layernorm = GemmaRMSNorm(width, eps)
        self.post_attention_layernorm = GemmaRMSNorm(width, eps)

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
        hidden_states = hidden_states + attn_output  # [B, T, D]
        normalized = self.post_attention_layernorm(hidden_states)
        hidden_states = hidden_states + self.mlp(normalized)  # [B, T, D]
        return hidden_states, weights


class GemmaModel(nn.Module):
    """The embedding table, the blocks, the final norm."""

    layer_class: type[nn.Module] = GemmaDecoderLayer

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        self.layers = nn.ModuleList(
            self.layer_class(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = GemmaRMSNorm(width, config.rms_norm_eps)
        self.rotary_emb = GemmaRotaryEmbedding(config.head_dim, config.rope_theta)

    def embed(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Look tokens up and multiply by √D, rounded to the embedding's dtype first."""
        embeds = self.embed_tokens(input_ids)  # [B, T, D]
        return embeds * torch.tensor(self.config.hidden_size**0.5, dtype=embeds.dtype)

    def layer_masks(
        self,
        attention_mask: Bool[Tensor, "B 1 T M"] | None,
        inputs_embeds: Float[Tensor, "B T D"],
        kv_cache: KVCache | StaticKVCache | None,
    ) -> list[Bool[Tensor, "B 1 T M"] | None]:
        """Each layer's mask: all the same."""
        return [attention_mask] * len(self.layers)

    def forward(
        self,
        inputs_embeds: Float[Tensor, "B T D"],
        attention_mask: Bool[Tensor, "B 1 T M"] | None,
        position_ids: Int[Tensor, "B T"],
        kv_cache: KVCache | StaticKVCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Float[Tensor, "B T D"], list[Float[Tensor, "B H T M"] | None]]:
        """Scaled embeddings → final states; each layer's weights, None unless asked."""
        cos, sin = self.rotary_emb(inputs_embeds, position_ids)  # [B, T, Dh] each
        masks = self.layer_masks(attention_mask, inputs_embeds, kv_cache)
        hidden_states, attentions = inputs_embeds, []
        for layer, mask in zip(self.layers, masks):
            hidden_states, weights = layer(
                hidden_states, cos, sin, mask, kv_cache, output_attentions
            )
            attentions.append(weights)
        return self.norm(hidden_states), attentions


def check_ids(name: str, ids: Any, shape: Sequence[int] | None = None) -> None:
    """Raise ValueError unless `ids` are whole numbers [B, T], or of another `shape`."""
    is_tensor = isinstance(ids, Tensor)
    fits = is_tensor and (ids.ndim == 2 if shape is None else ids.shape == shape)
    if not fits or ids.dtype not in (torch.int64, torch.int32):
        expected = "[batch, tokens]" if shape is None else list(shape)
        got = f"{ids.dtype} {list(ids.shape)}" if is_tensor else type(ids).__name__
        raise ValueError(f"{name} must be int64 {expected}, not {got}")


class GemmaForCausalLM(nn.Module):
    """Gemma (Gemma Team 2024), its head tied to its embedding (Press & Wolf 2017)."""

    model_class: type[GemmaModel] = GemmaModel

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.model = self.model_class(config)
        # On the meta device, without memory: the table takes its place at once.
        self.lm_head = nn.Linear(
            config.hidden_size, config.vocab_size, bias=False, device="meta"
        )
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output head and the embedding one matrix."""
        self.lm_head.weight = self.model.embed_tokens.weight

    def compute_logits(self, states: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Final states → logits."""
        return self.lm_head(states)  # [B, T, V]

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        attention_mask: Tensor | None = None,
        kv_cache: KVCache | StaticKVCache | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        logits_to_keep: int = 0,
        output_attentions: bool = False,
        token_type_ids: Tensor | None = None,
        is_prefix: bool = False,
    ) -> dict[str, Any]:
        """Token ids or scaled embeddings → `logits` [B, T, V] and the `kv_cache`.

        - `attention_mask`, `token_type_ids`, `is_prefix`: see `mask_and_positions`.
          Without them, it is causal.
        - `position_ids` [B, T]: counted from `attention_mask` when absent.
        - `logits_to_keep`: 0 for logits at every position, n for the last n.
        - `output_attentions` adds `attentions`, one [B, H, T, M] a layer.

        Raises ValueError unless exactly one of `input_ids` and `inputs_embeds` is
        given, for inputs of another kind or shape, and for more tokens than positions,
        or than a static cache has room for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep={logits_to_keep} must be 0 (all) or more")
        if inputs_embeds is None:
            check_ids("input_ids", input_ids)
            inputs_embeds = self.model.embed(input_ids)  # [B, T, D]
        past = kv_cache.num_items() if kv_cache is not None else 0
        limit = self.config.max_position_embeddings
        if (length := past + inputs_embeds.shape[1]) > limit:
            found = f"{length} tokens, but the model has {limit} positions"
            raise ValueError(f"{found}: shorten the prompt or generate fewer tokens")
        mask, counted = mask_and_positions(
            inputs_embeds, kv_cache, attention_mask, token_type_ids, is_prefix
        )  # [B, 1, T, M], [B, T]
        position_ids = counted if position_ids is None else position_ids
        check_ids("position_ids", position_ids, inputs_embeds.shape[:2])
        hidden_states, attentions = self.model(
            inputs_embeds, mask, position_ids, kv_cache, output_attentions
        )
        if logits_to_keep:
            hidden_states = hidden_states[:, -logits_to_keep:]  # [B, n, D]
        outputs = {"logits": self.compute_logits(hidden_states), "kv_cache": kv_cache}
        if output_attentions:
            outputs["attentions"] = attentions
        return outputs


def build_language_model(config: GemmaConfig) -> GemmaForCausalLM:
    """The decoder that a config asks for: Gemma, or Gemma 2 for a `Gemma2Config`."""
    if config.model_type == "gemma2":
        from .gemma2 import Gemma2ForCausalLM  # a later chapter's

        return Gemma2ForCausalLM(config)
    return GemmaForCausalLM(config)
