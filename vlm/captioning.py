"""Attention maps: the image patches that each token of an answer attends to.

Built in notebooks/26_captioning.ipynb: edit it there, then run `make export`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from jaxtyping import Float
from torch import Tensor

from .detokenizer import IncrementalDetokenizer
from .images import ImageLike
from .paligemma import PaliGemmaForConditionalGeneration
from .processing import PaliGemmaProcessor
from .sampling import Generation, generate_tokens


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """What each token of an answer attended to, in the image.

    `attention`: mean weights on the image's patches, row by row from the top left.
    What a token's map lacks to a sum of 1 went to prompt and answer.
    """

    prompt: str
    pieces: list[str]  # the tokens as text; one that adds no text by name: `<eos>`
    probabilities: list[float]
    attention: Float[Tensor, "T side side"]


@torch.no_grad()
def image_attention(
    model: PaliGemmaForConditionalGeneration,
    inputs: dict[str, Tensor],
    token_ids: Sequence[int],
) -> tuple[Float[Tensor, "layers H T N"], Float[Tensor, "T"]]:
    """Attention to the image for each token of an answer, and its probability.

    `inputs`: the processor's, one row; `token_ids`: the answer's. One pass over all of
    it, with the mask of training. Row t is that of the position that predicts token t.
    Raises ValueError for several rows, or an answer without tokens.
    """
    if len(inputs["input_ids"]) != 1 or len(token_ids) == 0:
        raise ValueError("give one row, and an answer of at least one token")
    prompt = inputs["input_ids"].to(model.device)  # [1, P]
    answer = torch.tensor([list(token_ids)], device=model.device)  # [1, T]
    length = answer.shape[1]
    outputs = model(
        input_ids=torch.cat([prompt, answer], dim=1),  # [1, P + T]
        pixel_values=inputs["pixel_values"].to(model.device),
        # Without these the answer would attend to its own future.
        token_type_ids=torch.cat([prompt * 0, answer * 0 + 1], dim=1),
        logits_to_keep=length + 1,
        output_attentions=True,
    )
    image = (prompt[0] == model.config.image_token_index).nonzero()[:, 0]  # [N]
    rows = [layer[0, :, -length - 1 : -1, image] for layer in outputs["attentions"]]
    weights = torch.stack(rows)  # [layers, H, T, N]
    probabilities = outputs["logits"][0, :-1].float().softmax(dim=-1)  # [T, V]
    return weights.float().cpu(), probabilities.gather(1, answer.T)[:, 0].cpu()


def attention_maps(
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    prompt: str,
    image: ImageLike,
    answer: str | Generation | None = None,
) -> AttentionMaps:
    """What each token of `answer` (None: the model's own, greedy) attends to.

    A token's map is the mean over all heads of the later half of the layers. A string
    is taken as taught, with EOS at its end. Raises ValueError for a Generation without
    tokens, TypeError for another type.
    """
    inputs, tokenizer = processor(text=[prompt], images=[image]), processor.tokenizer
    if answer is None:
        (answer,) = generate_tokens(model, tokenizer, inputs)
    if not isinstance(answer, str | Generation):
        raise TypeError(f"give one answer, not a {type(answer).__name__}")
    is_text = isinstance(answer, str)
    token_ids = processor.encode_suffix(answer) if is_text else answer.token_ids
    weights, probabilities = image_attention(model, inputs, token_ids)
    weights = weights[len(weights) // 2 :].mean(dim=(0, 1))  # → [T, N]
    side = isqrt(processor.num_image_tokens)
    maps = weights.unflatten(1, (side, side))  # [T, side, side]
    text = IncrementalDetokenizer(tokenizer)
    pieces = [text.add(i) or tokenizer.convert_ids_to_tokens(i) for i in token_ids]
    return AttentionMaps(prompt, pieces, probabilities.tolist(), maps)
