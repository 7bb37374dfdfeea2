"""Judge what a caption names, and see where the model looks while it writes.

Built in notebooks/26_captioning.ipynb: edit it there, then run `make export`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .images import ImageLike
from .paligemma import PaliGemmaForConditionalGeneration
from .processing import PaliGemmaProcessor
from .questions import parse_caption
from .sampling import Generation, IncrementalDetokenizer, generate_tokens
from .scenes import Scene

__all__ = ["exact_share", "kinds_f1"]


def check_pairs(answers: Sequence, truths: Sequence) -> None:
    """Refuse answers that aren't strings, are none, or aren't as many as the truths."""
    if isinstance(answers, str) or not all(isinstance(a, str) for a in answers):
        raise TypeError("answers is a list of strings: give each Generation's .text")
    if not answers or len(answers) != len(truths):
        raise ValueError(
            f"{len(answers)} answers for {len(truths)}: give at least one, in pairs"
        )


def exact_share(answers: Sequence[str], truths: Sequence[str]) -> float:
    """The share of answers that are right to the letter.

    Raises ValueError unless answers and truths are equally many, and not none;
    TypeError for answers that aren't strings.
    """
    check_pairs(answers, truths)
    return sum(a == t for a, t in zip(answers, truths)) / len(answers)


@dataclass(frozen=True)
class Marks:
    """Kinds that captions name rightly, miss, and invent, of one scene or of many."""

    right: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()
    invented: tuple[str, ...] = ()

    @property
    def precision(self) -> float:
        """The share of the kinds named that are there; 0 where nothing is named."""
        return len(self.right) / max(len(self.right) + len(self.invented), 1)

    @property
    def recall(self) -> float:
        """The share of the kinds there that are named; 0 where nothing is there."""
        return len(self.right) / max(len(self.right) + len(self.missed), 1)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 where nothing is right."""
        wrong = len(self.missed) + len(self.invented)
        return 2 * len(self.right) / max(2 * len(self.right) + wrong, 1)


def mark_kinds(answers: Sequence[str], scenes: Sequence[Scene]) -> Marks:
    """Compare the kinds that captions name with those in their scenes, all in one bag.

    A kind counts once a scene, however many there are and wherever the caption names
    it. Raises ValueError unless answers and scenes are equally many.
    """
    check_pairs(answers, scenes)
    right, missed, invented = [], [], []
    for answer, scene in zip(answers, scenes):
        named = [kind for kind, number in parse_caption(answer).items() if number]
        right += [kind for kind in named if kind in scene.counts]
        invented += [kind for kind in named if kind not in scene.counts]
        missed += [kind for kind in scene.counts if kind not in named]
    return Marks(tuple(right), tuple(missed), tuple(invented))


def kinds_f1(answers: Sequence[str], scenes: Sequence[Scene]) -> float:
    """F1 of the kinds that captions name, micro-averaged: over all scenes at once.

    Raises ValueError unless answers and scenes are equally many, and not none.
    """
    return mark_kinds(answers, scenes).f1


@dataclass(frozen=True, eq=False)
class Look:
    """Where a model looked, in the picture, while it wrote each token of an answer.

    `attention`: mean weights on the picture's patches, row by row from the top left.
    What a token's map lacks to a sum of 1 went to prompt and answer.
    """

    prompt: str
    pieces: list[str]  # the tokens as text; one that adds no text by name: `<eos>`
    probabilities: list[float]
    attention: Float[Tensor, "T side side"]

    @property
    def text(self) -> str:
        """The tokens, joined."""
        return "".join(self.pieces)


def name_tokens(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a token that adds none by its name, `<eos>`."""
    decoder = IncrementalDetokenizer(tokenizer)
    return [decoder.add(i) or tokenizer.convert_ids_to_tokens(i) for i in token_ids]


@torch.no_grad()
def picture_attention(
    model: PaliGemmaForConditionalGeneration,
    inputs: dict[str, Tensor],
    token_ids: Sequence[int],
) -> tuple[Float[Tensor, "layers H T N"], Float[Tensor, "T"]]:
    """Attention to the picture for each token of an answer, and its probability.

    `inputs`: the processor's, one row; `token_ids`: the answer's. One pass over all of
    it, with the mask of training. Row t is that of the position that predicts token t.
    The weights of a row with those on prompt and answer, left out here, sum to 1.
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
        # Without these the answer would see its own future.
        token_type_ids=torch.cat([prompt * 0, answer * 0 + 1], dim=1),
        logits_to_keep=length + 1,
        output_attentions=True,
    )
    picture = (prompt[0] == model.config.image_token_index).nonzero()[:, 0]  # [N]
    rows = [layer[0, :, -length - 1 : -1, picture] for layer in outputs["attentions"]]
    weights = torch.stack(rows)  # [layers, H, T, N]
    chances = outputs["logits"][0, :-1].float().softmax(dim=-1)  # [T, V]
    return weights.float().cpu(), chances.gather(1, answer.T)[:, 0].cpu()


def look(
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    prompt: str,
    image: ImageLike,
    answer: str | Generation | None = None,
    max_new_tokens: int = 100,
) -> Look:
    """Where the model looks while it writes `answer` (None: its own, greedy).

    A token's map is the mean over all heads of the later half of the layers. It shows
    where these layers took information from, not what caused the answer. A string is
    taken as taught, with EOS at its end.
    Raises ValueError where the image tokens make no square, or the answer is empty;
    TypeError for what is no answer.
    """
    side = isqrt(processor.num_image_tokens)
    if side * side != processor.num_image_tokens:
        raise ValueError(f"{processor.num_image_tokens} image tokens make no square")
    inputs = processor(text=[prompt], images=[image])
    if answer is None:
        (answer,) = generate_tokens(
            model, processor.tokenizer, inputs, max_new_tokens=max_new_tokens
        )
    if isinstance(answer, str):
        token_ids = processor.encode_suffix(answer)
    elif isinstance(answer, Generation):
        token_ids = answer.token_ids
    else:
        raise TypeError(
            f"give one answer, a string or a Generation, not {type(answer).__name__}"
        )
    weights, chances = picture_attention(model, inputs, token_ids)
    weights = weights[len(weights) // 2 :].mean(dim=(0, 1))  # → [T, N]
    return Look(
        prompt,
        name_tokens(processor.tokenizer, token_ids),
        chances.tolist(),
        weights.unflatten(1, (side, side)),  # [T, side, side]
    )
