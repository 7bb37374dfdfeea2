"""Attention masks from one rule: causal, prefix-LM, padding, sliding window, packed.

Built in notebooks/08_masks.ipynb: edit it there, then run `make export`.
"""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from .kv_cache import KVCache, StaticKVCache


def make_attn_mask(
    attention_mask: Shaped[Tensor, "B M"],
    token_type_ids: Int[Tensor, "B M"],
    num_new: int | None = None,
    segment_ids: Int[Tensor, "B M"] | None = None,
) -> Bool[Tensor, "B 1 T M"]:
    """Which of M tokens each of the last T = `num_new` (None: all) attends to.

    - `attention_mask`: 1 real, 0 padding, which no token attends to. Padding attends to
      all, so that its softmax is defined; its output is never used.
    - `token_type_ids`: query i attends to key j where cumsum(types)[j] <= its own, as
      in big_vision. Ones: causal; zeros: bidirectional; zeros, then ones: prefix-LM.
    - `segment_ids` of packed rows: 0 image, 1, 2, … questions. A question attends to
      the image and itself, the image to itself and the first question's prompt.
    """
    num_new = attention_mask.shape[1] if num_new is None else num_new
    real = attention_mask.bool()  # [B, M]
    block = token_type_ids.cumsum(dim=1)  # [B, M]
    mask = block[:, None, :] <= block[:, -num_new:, None]  # [B, T, M]
    if segment_ids is not None:
        key, query = segment_ids[:, None, :], segment_ids[:, -num_new:, None]
        own = query.clamp(min=1)  # [B, T, 1]; image tokens go with question 1
        mask = mask & ((key == 0) | (key == own))  # [B, T, M]
    mask = mask & real[:, None, :]  # no token attends to padding,
    mask = mask | ~real[:, -num_new:, None]  # and padding attends to all
    return mask[:, None]  # [B, 1, T, M]: the same for every head


def sliding_window_mask(
    attention_mask: Bool[Tensor, "B 1 T M"], window: int, past: int = 0
) -> Bool[Tensor, "B 1 T M"]:
    """Leave each token the last `window` of those that it attends to, itself included.

    Of the T new tokens, after `past` cached ones, those that attend to each other (the
    prefix, in a prefill) go on doing so. Padding and empty slots of a cache aren't
    attended to, so they don't count. Source: Beltagy et al. 2020.
    """
    num_new, length = attention_mask.shape[2:]
    if length <= window:
        return attention_mask
    so_far = attention_mask.cumsum(dim=-1)  # [B, 1, T, M]
    after = so_far[..., -1:] - so_far  # [B, 1, T, M]: attended to, after this key
    if num_new == 1:
        return attention_mask & (after < window)
    new = attention_mask[..., past : past + num_new]  # [B, 1, T, T]
    mutual = F.pad(new & new.mT, (past, length - past - num_new))  # [B, 1, T, M]
    return attention_mask & (mutual | (after < window))


def mask_and_positions(
    inputs_embeds: Float[Tensor, "B T D"],
    kv_cache: KVCache | StaticKVCache | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    is_prefix: bool = False,
) -> tuple[Bool[Tensor, "B 1 T keys"] | None, Int[Tensor, "B T"] | None]:
    """The mask and the position ids of T new tokens, after those in the cache.

    The mask is None where every token attends to every other: then attention needn't
    read one, and can choose its fastest kernel.

    - `attention_mask` [B, M] of 1 and 0, M cached and new tokens (None: all ones); or a
      mask [B, 1, T, M], which is taken as it is, and then there are no position ids.
    - `token_type_ids` [B, M]: see `make_attn_mask` (None: all ones, causal; with
      `is_prefix` all zeros, bidirectional).

    A static cache may return empty slots too: the mask is False there.
    Raises ValueError for another shape, and where a static cache has no room.
    """
    past = 0 if kv_cache is None else kv_cache.num_items()
    batch, num_new = inputs_embeds.shape[:2]
    length, device = past + num_new, inputs_embeds.device
    nothing_given = attention_mask is None and token_type_ids is None
    if nothing_given and (is_prefix or num_new == 1):
        if kv_cache is None or kv_cache.key_length(num_new) == length:
            position_ids = torch.arange(past, length, device=device)  # [T]
            return None, position_ids.expand(batch, num_new)
    ones = torch.ones(batch, length, dtype=torch.long, device=device)
    mask = ones if attention_mask is None else attention_mask
    absent = torch.zeros_like(ones) if is_prefix else ones
    types = absent if token_type_ids is None else token_type_ids
    pairs = batch, 1, num_new, length
    for name, given, shape in (
        ("attention_mask", mask, ones.shape if mask.ndim == 2 else pairs),
        ("token_type_ids", types, ones.shape),
    ):
        if given.shape != shape:
            found = f"{name} is {list(given.shape)}, expected {list(shape)}: {past}"
            raise ValueError(f"{found} tokens in the cache and {num_new} new ones")
    position_ids = None
    if mask.ndim == 2:
        position_ids = (mask.long().cumsum(dim=1) - 1).clamp(min=0)  # [B, M]
        position_ids = position_ids[:, -num_new:]  # [B, T]: real tokens count from 0
        mask = make_attn_mask(mask, types, num_new)  # [B, 1, T, M]
    if kv_cache is not None:
        mask = F.pad(mask, (0, kv_cache.key_length(num_new) - length))
    return mask, position_ids
