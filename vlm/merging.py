"""Insert image features into token embeddings, at the image tokens.

Built in notebooks/13_merging.ipynb: edit it there, then run `make export`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def rows_per_image(images: int, num_rows: int) -> int:
    """How many consecutive rows each image serves; ValueError if not equally many."""
    if images == 0 or num_rows % images:
        uneven = f"{images} pictures can't serve {num_rows} rows evenly"
        raise ValueError(f"{uneven}: give one for each, or one for every n of them")
    return num_rows // images


def can_read_values(tensor: Tensor) -> bool:
    """Whether a check may read values: a GPU would wait, and a graph can't."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def merge_image_features(
    inputs_embeds: Float[Tensor, "B T D"],
    image_features: Float[Tensor, "images N D"],
    image_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T D"]:
    """Put each row's N image features, in order, where its `image_mask` is True.

    Fewer images than rows serve consecutive rows: see `rows_per_image`.
    Raises ValueError where a row hasn't exactly N image tokens; where values can't be
    read, all features become NaN, or PyTorch fails: it has fewer features than tokens.
    """
    repeats = rows_per_image(image_features.shape[0], image_mask.shape[0])
    features = image_features.repeat_interleave(repeats, dim=0)  # [B, N, D]
    counts = image_mask.sum(dim=1)  # [B]
    wrong = (counts != features.shape[1]).any()
    if can_read_values(wrong) and wrong:
        raise ValueError(
            f"{features.shape[1]} features each for {len(counts)} rows with "
            f"{counts.tolist()} image tokens: make the inputs with a processor whose "
            "num_image_tokens and <image> id are the model's"
        )
    features = features.masked_fill(wrong, float("nan")).to(inputs_embeds.dtype)
    # masked_scatter takes features in the order in which it finds True: row by row.
    return inputs_embeds.masked_scatter(image_mask[..., None], features)  # [B, T, D]
