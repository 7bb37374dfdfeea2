"""Sequence packing: several questions about one image in one row, with segment ids."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def pack_questions(
    questions: list[tuple[list[int], list[int]]], num_image_tokens: int
) -> dict[str, Int[Tensor, "T"]]:
    """Several questions about one picture in one row: image, then all of them.

    `questions`: (prefix ids, image tokens first; suffix ids) of each. Returns
    `input_ids`, `position_ids`, `token_type_ids` and `segment_ids` (0 image, 1, 2, …).
    Each question counts its positions on from the image, as if it stood alone.
    """
    input_ids = questions[0][0][:num_image_tokens]
    position_ids = list(range(num_image_tokens))
    token_type_ids = [0] * num_image_tokens
    segment_ids = [0] * num_image_tokens
    for number, (prefix, suffix) in enumerate(questions, start=1):
        prefix = prefix[num_image_tokens:]
        length = len(prefix) + len(suffix)
        input_ids += prefix + suffix
        position_ids += range(num_image_tokens, num_image_tokens + length)
        token_type_ids += [0] * len(prefix) + [1] * len(suffix)
        segment_ids += [number] * length
    return {
        "input_ids": torch.tensor(input_ids),
        "position_ids": torch.tensor(position_ids),
        "token_type_ids": torch.tensor(token_type_ids),
        "segment_ids": torch.tensor(segment_ids),
    }


def packed_mask(
    segment_ids: Int[Tensor, "B T"], token_type_ids: Int[Tensor, "B T"]
) -> Bool[Tensor, "B 1 T T"]:
    """Who sees whom in packed rows (padding has question -1).

    Everyone sees the image. A question sees itself by the prefix-LM rule, and no other
    question. The image and the first question's prompt see each other, as they will
    when a question stands alone; if it saw the other prompts, they would meet in it.
    """
    block = token_type_ids.cumsum(dim=1)  # [B, T]
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    earlier = block[:, None, :] <= block[:, :, None]  # [B, T, T]
    mask = (query == key) & earlier
    mask = mask | ((key == 0) & (query >= 0))
    first_prompt = (key == 1) & (token_type_ids == 0)[:, None, :]
    return (mask | ((query == 0) & first_prompt))[:, None]  # [B, 1, T, T]
