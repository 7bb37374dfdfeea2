"""PaliGemma: SigLIP encoder, linear projector, Gemma decoder.

Built in notebooks/14_paligemma.ipynb: edit it there, then run `make export`.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .config import PaliGemmaConfig
from .gemma import build_language_model, check_ids
from .kv_cache import KVCache, StaticKVCache
from .merging import can_read_values, merge_image_features
from .projector import PaliGemmaMultiModalProjector
from .siglip import SiglipVisionModel


def next_token_loss(
    logits: Float[Tensor, "B n V"], labels: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of each next token, in float32; labels of -100 don't count.

    `logits` may be those of the last n tokens alone. The loss is nan where no label
    counts. Raises ValueError for a single position: it has no next token.
    """
    if logits.shape[1] < 2:
        raise ValueError("one position has no next token to learn: keep 2 or all")
    labels = labels[:, -logits.shape[1] :]  # [B, n]
    logits = logits[:, :-1].flatten(0, 1).float()  # [B * (n-1), V]
    targets = labels[:, 1:].flatten().long()  # position t predicts the token at t + 1
    return F.cross_entropy(logits, targets, ignore_index=-100)


class PaliGemmaForConditionalGeneration(nn.Module):
    """PaliGemma (Beyer et al. 2024); its parts are named as in the hub's files."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = SiglipVisionModel(config.vision_config)
        self.multi_modal_projector = PaliGemmaMultiModalProjector(config)
        self.language_model = build_language_model(config.text_config)

    def tie_weights(self) -> None:
        """Make the output head and the embedding one matrix (again, after loading)."""
        self.language_model.tie_weights()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.multi_modal_projector.linear.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the weights."""
        return self.multi_modal_projector.linear.weight.dtype

    def encode_images(self, pixels: Float[Tensor, "B C S S"]) -> Float[Tensor, "B N D"]:
        """Images → soft tokens, not scaled: only text embeddings are."""
        return self.multi_modal_projector(self.vision_tower(pixels))

    def embed_inputs(
        self, input_ids: Int[Tensor, "B T"], features: Float[Tensor, "_ N D"] | None
    ) -> Float[Tensor, "B T D"]:
        """Token embeddings, with the image features at the image tokens."""
        image_mask = input_ids == self.config.image_token_index  # [B, T]
        # The image token's id may lie outside the table, and its row is never used.
        token_ids = input_ids.masked_fill(image_mask, self.config.pad_token_id)
        inputs_embeds = self.language_model.model.embed(token_ids)  # [B, T, D]
        if features is not None:
            return merge_image_features(inputs_embeds, features, image_mask)
        if can_read_values(image_mask) and image_mask.any():
            raise ValueError("image tokens need pixel_values and an empty cache")
        return inputs_embeds.masked_fill(image_mask[..., None], float("nan"))

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        pixel_values: Float[Tensor, "images C S S"] | None = None,
        attention_mask: Tensor | None = None,
        kv_cache: KVCache | StaticKVCache | None = None,
        token_type_ids: Tensor | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        logits_to_keep: int = 0,
        output_attentions: bool = False,
        output_image_hidden_states: bool = False,
    ) -> dict[str, Any]:
        """One pass: prefill, training, or a decode step with a filled cache.

        - `pixel_values` in [-1, 1]: one a row, or each for as many consecutive rows.
        - `attention_mask` [B, M] of 1 and 0, M cached and new; or bool [B, 1, T, M].
        - `token_type_ids` [B, M]: 0 prefix, 1 answer; None: 0, with a filled cache 1.
        - `labels`: ids to learn, or -100. `logits_to_keep`: the last n tokens', 0 all.

        Returns `logits` [B, T, V], `kv_cache`, `loss` given labels; if asked, each
        layer's `attentions` [B, H, T, M], the projector's `image_hidden_states`. Raises
        ValueError where shapes or image tokens disagree (not on a GPU: logits are NaN).
        """
        if labels is not None and token_type_ids is None:
            raise ValueError("labels need token_type_ids: else the answer is prefix")
        check_ids("input_ids", input_ids)
        is_prefill = kv_cache is None or kv_cache.num_items() == 0
        if not is_prefill:
            pixel_values = None  # in the cache already
        features = None if pixel_values is None else self.encode_images(pixel_values)
        outputs = self.language_model(
            inputs_embeds=self.embed_inputs(input_ids, features),
            attention_mask=attention_mask,
            kv_cache=kv_cache,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            output_attentions=output_attentions,
            token_type_ids=token_type_ids,
            is_prefix=is_prefill,  # without types: what comes later is answer
        )
        if output_image_hidden_states:
            outputs["image_hidden_states"] = features
        if labels is not None:
            check_ids("labels", labels, input_ids.shape)
            outputs["loss"] = next_token_loss(outputs["logits"], labels)
        return outputs
