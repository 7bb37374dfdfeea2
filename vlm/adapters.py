"""What is trained: parameters by pattern, or LoRA adapters, merged or saved alone.

Built in notebooks/25_finetuning.ipynb: edit it there, then run `make export`.
"""

import re
import shutil
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from .hub import ADAPTER_CONFIG, ADAPTER_FILE, parse_hub_id
from .paligemma import PaliGemmaForConditionalGeneration

__all__ = [
    "ALL_BUT_VISION", "set_trainable", "merge_adapters", "save_adapter",
    "enable_gradient_checkpointing",
]  # fmt: skip

ALL_BUT_VISION = ("language_model.*", "multi_modal_projector.*")


def match_parameters(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the parameters that a pattern like `*.self_attn.*` matches.

    The output head is the embedding and isn't listed again. ValueError for a pattern
    that matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"no parameter is named like {pattern!r}; a name in full is {names[-2]}"
            )
    return [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)]


def set_trainable(
    model: nn.Module, patterns: Sequence[str], lora_rank: int = 0
) -> nn.Module | None:
    """Freeze all but what `patterns` match; with a rank, all but LoRA adapters there.

    What is trained becomes float32. Frozen matrices keep their dtype; vectors, a few
    thousandths of the whole, become float32 too, because norms want one dtype. Returns
    peft's adapters (α = 2r), for `merge_adapters`. Source: Hu et al. 2022.
    """
    adapters, names = None, {*match_parameters(model, patterns)}
    if lora_rank:
        from peft import LoraConfig, get_peft_model  # slow to import: only when needed

        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        targets = [name for name in linear if f"{name}.weight" in names]
        if not targets:
            raise ValueError("LoRA works on linear layers, and no pattern matches one")
        scale = {"r": lora_rank, "lora_alpha": 2 * lora_rank}
        adapters = get_peft_model(model, LoraConfig(target_modules=targets, **scale))
    for name, parameter in model.named_parameters():
        if adapters is None:
            parameter.requires_grad_(name in names)
        if parameter.requires_grad or parameter.ndim < 2:
            parameter.data = parameter.data.float()
    return adapters


def merge_adapters(
    model: nn.Module, adapters: nn.Module | None, dtype: torch.dtype
) -> None:
    """Undo `set_trainable`: adapters added to their weights, everything in `dtype`."""
    if adapters is not None:
        adapters.merge_and_unload()
    model.to(dtype).requires_grad_(True).eval()


def save_adapter(adapters: nn.Module, folder: Path, base: str) -> None:
    """Write the adapters alone, in peft's layout; `base`: the model's folder or hub id.

    Layers are named as in transformers' model, so that peft finds them there, too.
    """
    from peft import get_peft_model_state_dict

    ours = r"(language_model|vision_tower|multi_modal_projector)(\.(vision_)?model)?\."
    saved = get_peft_model_state_dict(adapters, save_embedding_layers=False)
    tensors = {re.sub(ours, r"model.\1.", name): t for name, t in saved.items()}
    layers = {name.partition(".lora_")[0] for name in tensors}
    config = adapters.peft_config["default"]
    config.base_model_name_or_path, config.revision = parse_hub_id(base) or (base, None)
    config.target_modules = {name.removeprefix("base_model.model.") for name in layers}
    shutil.rmtree(folder, ignore_errors=True)
    config.save_pretrained(folder)
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    shutil.copymode(folder / ADAPTER_CONFIG, folder / ADAPTER_FILE)  # for all to read


def enable_gradient_checkpointing(model: PaliGemmaForConditionalGeneration) -> None:
    """Let the backward pass recompute each layer's activations instead of keeping them.

    Same gradients, one forward pass more. Source: Chen et al. 2016.
    """
    layers = [*model.vision_tower.vision_model.encoder.layers]
    layers += model.language_model.model.layers
    for layer in layers:  # an attribute of the object hides the method of its class
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
