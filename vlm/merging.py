"""Image features take their seats in the text, and one rule says who sees whom.

Built in notebooks/13_merging.ipynb: edit it there, then run `make export`.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "may_read", "merge_image_features", "rows_per_picture", "share_pictures",
    "prefix_lm_mask",
]  # fmt: skip


def may_read(tensor: Tensor) -> bool:
    """Whether a check may read values: on the CPU, and where no graph is traced.

    Elsewhere it would make a GPU wait, and `torch.compile` and `torch.export` fail.
    """
    return tensor.is_cpu and not torch.compiler.is_compiling()


def merge_image_features(
    inputs_embeds: Float[Tensor, "B T D"],
    image_features: Float[Tensor, "B N D"],
    image_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T D"]:
    """Put each row's N image features, in order, where its `image_mask` is True.

    Raises ValueError where a row hasn't exactly N image tokens. On a GPU and in a graph
    that is traced, where values can't be read, all features become NaN instead.
    """
    pictures, num_features, _ = image_features.shape
    counts = image_mask.sum(dim=1)  # [B]
    wrong = (counts != num_features).any()
    if pictures != image_mask.shape[0] or (may_read(wrong) and wrong):
        raise ValueError(
            f"{pictures} pictures of {num_features} features each for {len(counts)} "
            f"rows with {counts.tolist()} image tokens: make the inputs with a "
            "processor whose num_image_tokens and <image> id are the model's"
        )
    image_features = image_features.masked_fill(wrong, float("nan"))
    # Features are taken in order, row by row: the same order in which seats are found.
    return inputs_embeds.masked_scatter(
        image_mask[..., None], image_features.to(inputs_embeds.dtype)
    )  # [B, T, D]


def rows_per_picture(pictures: int, num_rows: int) -> int:
    """How many consecutive rows each picture serves; ValueError if not equally many."""
    if pictures == 0 or num_rows % pictures:
        raise ValueError(
            f"{pictures} pictures can't serve {num_rows} rows evenly: give one for "
            "each row, or one for every n consecutive rows"
        )
    return num_rows // pictures


def share_pictures(
    image_features: Float[Tensor, "pictures N D"], num_rows: int
) -> Float[Tensor, "B N D"]:
    """Each picture's features for as many consecutive rows as the others get.

    With a picture for each row, nothing changes. Raises ValueError where `num_rows`
    can't be shared out evenly.
    """
    repeats = rows_per_picture(image_features.shape[0], num_rows)
    return image_features.repeat_interleave(repeats, dim=0)  # [B, N, D]


def prefix_lm_mask(
    attention_mask: Int[Tensor, "B M"],
    token_type_ids: Int[Tensor, "B M"],
    num_new: int | None = None,
) -> Bool[Tensor, "B 1 T M"]:
    """Who sees whom: image and prompt each other, the answer what came before it.

    `attention_mask` is 1 for real tokens; `token_type_ids` is 0 for image and prompt,
    1 for the answer. Query q sees key k where cumsum(type)[k] <= cumsum(type)[q] and
    k is real. The mask's T rows are the last `num_new` of the M tokens (None: all).

    A padding token has nothing to see; it sees everything, so that its softmax is
    defined. Nobody reads what it computes. Source: big_vision's PaliGemma.
    """
    num_new = attention_mask.shape[1] if num_new is None else num_new
    real = attention_mask.bool()  # [B, M]
    block = token_type_ids.cumsum(dim=1)  # [B, M]
    mask = block[:, None, :] <= block[:, -num_new:, None]  # [B, T, M]
    mask = mask & real[:, None, :]  # nobody sees padding
    mask = mask | ~real[:, -num_new:, None]  # but padding itself sees all
    return mask[:, None]  # [B, 1, T, M]: the same for every head
