"""Merge a LoRA adapter, in the layout of the library peft, into its base model.

Built in notebooks/16_weights.ipynb: edit it there, then run `make export`.
"""

from pathlib import Path

from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from .hub import ADAPTER_FILE
from .shards import missing_file, read_header
from .tensor_names import canonical_name

__all__ = ["apply_adapter"]

_PREFIX = "base_model.model."  # before every name in peft's files


def apply_adapter(model: nn.Module, folder: Path) -> None:
    """Merge the LoRA adapter in `folder` into the model's weights.

    Each of its tensors must be for a part that the model has, by its name in any of the
    three layouts. Raises FileNotFoundError and ValueError.
    Source: Hu et al. 2022, in peft's implementation.
    """
    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise missing_file(ADAPTER_FILE, folder)
    read_header(file)  # or says that it can't be read
    tensors = load_file(file).items()
    state = {canonical_name(name.removeprefix(_PREFIX)): t for name, t in tensors}
    lora = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    whole = {name: tensor for name, tensor in state.items() if name not in lora}
    try:
        config = LoraConfig.from_pretrained(folder)
        if not isinstance(config, LoraConfig):
            raise ValueError(f"it is {config.peft_type}, and only LORA is read")
        model.load_state_dict(model.state_dict() | whole)
        config.target_modules = {name.partition(".lora_")[0] for name in lora}
        config.modules_to_save = config.exclude_modules = None
        config.layers_to_transform = None
        for pattern in (config.rank_pattern, config.alpha_pattern):
            for name in list(pattern):
                pattern[canonical_name(name)] = pattern.pop(name)
        adapters = PeftModel(model, config)
        named = {_PREFIX + name: tensor for name, tensor in lora.items()}
        loaded = set_peft_model_state_dict(adapters, named)
        missing = [name for name in loaded.missing_keys if ".lora_" in name]
        if missing or loaded.unexpected_keys:
            raise ValueError(f"odd tensors {missing + loaded.unexpected_keys}")
        adapters.merge_and_unload()
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{folder}'s adapter can't be merged: {why:.160}") from error
    model.requires_grad_(True)
