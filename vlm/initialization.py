"""A new embedded model: its configuration, initial values and tokenizer.

Built in notebooks/21_pretraining.ipynb: edit it there, then run `make export`.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from .config import PaliGemmaConfig
from .paligemma import PaliGemmaForConditionalGeneration
from .processing import IMAGE_TOKEN, NUM_LOCS
from .world_tokenizer import tokenizer_corpus, train_tokenizer


def fourier_locs(width: int) -> Float[Tensor, "1024 D"]:
    """Vectors of length 1 for the loc tokens, in which neighbors are alike.

    Fourier features of the coordinate, from half a period over the picture to 64, and
    a random vector common to all of them that says "I am a coordinate".
    Source: Tancik et al. 2020.
    """
    coordinate = torch.linspace(0, 1, NUM_LOCS)[:, None]  # [1024, 1]
    frequencies = 0.5 * 128 ** torch.linspace(0, 1, width // 2)  # [D/2]
    angles = 2 * math.pi * coordinate * frequencies  # [1024, D/2]
    fade = frequencies**-0.5  # coarse waves weigh most: far apart must look far apart
    waves = torch.cat([angles.sin() * fade, angles.cos() * fade], dim=1)  # [1024, D]
    waves = F.normalize(F.pad(waves, (0, width - waves.shape[1])), dim=1)
    return F.normalize(waves + 0.5 * F.normalize(torch.randn(width), dim=0), dim=1)


@torch.no_grad()
def initialize(
    model: PaliGemmaForConditionalGeneration,
    first_loc: int,
    loc_init: str = "fourier",
) -> None:
    """Initial values of the embeddings, in place; all else keeps PyTorch's own.

    Token embeddings have length 1: scaled by √D they enter with unit variance. Loc
    embeddings, from the id `first_loc` on, are "fourier" features or "random" like the
    others. Positions of patches are random, as in big_vision.
    """
    embedding = model.language_model.model.embed_tokens.weight  # [V, D]
    width = embedding.shape[1]
    embedding.normal_(std=width**-0.5)
    if loc_init == "fourier":
        embedding[first_loc : first_loc + NUM_LOCS] = fourier_locs(width)
    positions = model.vision_tower.vision_model.embeddings.position_embedding.weight
    positions.normal_(std=positions.shape[1] ** -0.5)


def embedded_config(tokenizer: object, num_key_value_heads: int = 1) -> PaliGemmaConfig:
    """The shape of a new embedded model: PaliGemma's, for a laptop.

    As in PaliGemma, one key/value head serves all query heads. As in Gemma 7B,
    `head_dim` isn't hidden_size / num_attention_heads.
    """
    vision = dict(image_size=128, patch_size=16, num_hidden_layers=6)
    vision |= dict(hidden_size=160, intermediate_size=640, num_attention_heads=5)
    text = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=6)
    text |= dict(num_attention_heads=4, num_key_value_heads=num_key_value_heads)
    text |= dict(head_dim=64, max_position_embeddings=512)
    text |= dict(vocab_size=math.ceil(len(tokenizer) / 64) * 64)  # as PaliGemma pads it
    return PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        projection_dim=128,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def make_tokenizer(num_scenes: int = 3000) -> PreTrainedTokenizerFast:
    """The tokenizer of the world of stickers, as transformers saves and loads it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(tokenizer_corpus(num_scenes)),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )


def new_model(
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    num_key_value_heads: int = 1,
    loc_init: str = "fourier",
) -> tuple[PaliGemmaForConditionalGeneration, PreTrainedTokenizerFast]:
    """An untrained embedded model and its tokenizer, a new one if none is given."""
    tokenizer = tokenizer or make_tokenizer()
    torch.manual_seed(seed)
    config = embedded_config(tokenizer, num_key_value_heads)
    model = PaliGemmaForConditionalGeneration(config)
    first_loc = tokenizer.convert_tokens_to_ids("<loc0000>")
    initialize(model, first_loc, loc_init)
    return model, tokenizer
