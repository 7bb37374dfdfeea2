"""Sequence packing: several questions about one image in one row, with segment ids.

Built in notebooks/20_training.ipynb: edit it there, then run `make export`.
"""

import torch
from jaxtyping import Int
from torch import Tensor


def pack_questions(
    questions: list[tuple[list[int], list[int]]], num_image_tokens: int
) -> dict[str, Int[Tensor, "T"]]:
    """Several questions about one image in one row: image tokens, then all of them.

    `questions`: (prefix ids, image tokens first; suffix ids) of each. Returns
    `input_ids`, `position_ids`, `token_type_ids` and `segment_ids` (0 image, 1, 2, …).
    Each question counts its positions on from the image, as if it stood alone.
    """
    row = {
        "input_ids": questions[0][0][:num_image_tokens],
        "position_ids": list(range(num_image_tokens)),
        "token_type_ids": [0] * num_image_tokens,
        "segment_ids": [0] * num_image_tokens,
    }
    for number, (prefix, suffix) in enumerate(questions, start=1):
        ids = prefix[num_image_tokens:] + suffix
        row["input_ids"] += ids
        row["position_ids"] += range(num_image_tokens, num_image_tokens + len(ids))
        row["token_type_ids"] += [0] * (len(ids) - len(suffix)) + [1] * len(suffix)
        row["segment_ids"] += [number] * len(ids)
    return {name: torch.tensor(values) for name, values in row.items()}
