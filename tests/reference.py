"""What several tests share: tiny models, ours and transformers'; turned photographs."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from vlm.config import PaliGemmaConfig
from vlm.paligemma import PaliGemmaForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent

VISION = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    image_size=28,
    patch_size=14,
)
TEXT = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=12,  # not hidden_size / num_attention_heads, as in Gemma 7B
    max_position_embeddings=256,
)

# Orientation tag of a photograph → how its pixels are stored, if it has the tag.
STORED_TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def tiny_config(
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **others: Any,
) -> PaliGemmaConfig:
    """A model of 54 thousand weights; `tiny_config(text=dict(num_key_value_heads=2))`.

    `<image>` is id 120 of 128, so everything below 120 may stand in a prompt.
    """
    text = {**TEXT, **(text or {})}
    defaults = dict(projection_dim=text["hidden_size"], image_token_index=120)
    return PaliGemmaConfig(
        vision_config={**VISION, **(vision or {})},
        text_config=text,
        **{**defaults, **others},
    )


def reference_config(
    config: PaliGemmaConfig, attention: str = "eager"
) -> transformers.PaliGemmaConfig:
    """The same shape for transformers; `attention`: "eager" or "sdpa"."""
    theirs = transformers.PaliGemmaConfig.from_dict(config.to_dict())
    for part in (theirs, theirs.text_config, theirs.vision_config):
        part._attn_implementation = attention
    return theirs


@torch.no_grad()
def randomize(model: nn.Module, scale: float = 1.0) -> nn.Module:
    """Weights large enough that every part matters, norms and biases too."""
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            weight.add_(0.2 * scale * torch.randn_like(weight))
        elif "embed" in name:
            weight.normal_(std=0.1 * scale)
        else:
            weight.normal_(std=1.3 * scale * weight[0].numel() ** -0.5)
    return model


def to_our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformers PaliGemma's state dict under our names, which are the hub's."""
    renamed = {}
    for name, weight in weights.items():
        name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
        name = name.replace("model.multi_modal_projector.", "multi_modal_projector.")
        name = name.replace("model.language_model.", "language_model.model.")
        name = name.replace("lm_head.", "language_model.lm_head.")
        renamed[name] = weight
    return renamed


def pair(
    config: PaliGemmaConfig | None = None, attention: str = "eager"
) -> tuple[
    PaliGemmaForConditionalGeneration, transformers.PaliGemmaForConditionalGeneration
]:
    """Our model and transformers', random and with the same weights, in eval mode."""
    config = config or tiny_config()
    theirs = transformers.PaliGemmaForConditionalGeneration(
        reference_config(config, attention)
    )
    randomize(theirs).eval()
    ours = PaliGemmaForConditionalGeneration(config).eval()
    ours.load_state_dict(to_our_names(theirs.state_dict()), strict=True)
    return ours, theirs


def random_inputs(
    config: PaliGemmaConfig,
    prompts: tuple[int, ...] = (5,),
    suffixes: tuple[int, ...] | None = None,
    padding: str = "left",
) -> dict[str, Tensor]:
    """Random rows with `prompts[i]` prompt tokens, padded; like the processor's output.

    `suffixes`: suffix lengths, which add `labels`. `token_type_ids` are always there:
    transformers needs them to build the right mask.
    """
    num_images = config.vision_config.num_image_tokens
    suffixes = suffixes or (0,) * len(prompts)
    lengths = [num_images + p + s for p, s in zip(prompts, suffixes, strict=True)]
    input_ids = torch.full((len(prompts), max(lengths)), config.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    token_type_ids = torch.zeros_like(input_ids)
    for row, (length, suffix) in enumerate(zip(lengths, suffixes, strict=True)):
        start = max(lengths) - length if padding == "left" else 0
        end = start + length
        input_ids[row, start:end] = torch.randint(4, 120, (length,))
        input_ids[row, start : start + num_images] = config.image_token_index
        attention_mask[row, start:end] = 1
        token_type_ids[row, end - suffix : end] = 1
    side = config.vision_config.image_size
    inputs = dict(
        input_ids=input_ids,
        attention_mask=attention_mask,
        token_type_ids=token_type_ids,
        pixel_values=torch.rand(len(prompts), 3, side, side) * 2 - 1,
    )
    if any(suffixes):
        inputs["labels"] = input_ids.masked_fill(token_type_ids == 0, -100)
    return inputs


SENTENCES = (
    "caption en\n",
    "detect owl ; pizza\n",
    "segment owl\n",
    "answer en how many owls are there?\n",
    "two owls, a pizza and an apple",
)


@cache
def trained_tokenizer():
    from vlm.world_tokenizer import train_tokenizer

    return train_tokenizer(SENTENCES, num_pieces=512)


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with PaliGemma's layout, as `AutoTokenizer` would give it."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained_tokenizer(),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def close(ours: Tensor, theirs: Tensor) -> None:
    """The same numbers, to 1e-5."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def assert_same_training(ours: nn.Module, theirs: nn.Module, inputs: dict) -> None:
    """One loss, and the same gradient for every weight; the gradients stay in both."""
    for model in (ours, theirs):
        model.zero_grad()
    loss, expected = ours(**inputs)["loss"], theirs(**inputs).loss
    close(loss, expected)
    loss.backward()
    expected.backward()
    gradients = to_our_names({n: p.grad for n, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        close(parameter.grad, gradients[name])


def run_in_two_processes(script: Path, *words: str) -> subprocess.CompletedProcess:
    """Run a script twice at once, as one training on the CPU.

    Not by `accelerate launch --cpu --num_processes 2`: that starts a single process, so
    let the script print how many there are.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node", "2", str(script), *words],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done
