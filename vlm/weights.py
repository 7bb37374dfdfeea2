"""Load and save checkpoints: strict tensor names, safetensors, tied weights.

Built in notebooks/16_weights.ipynb: edit it there, then run `make export`.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .config import PaliGemmaConfig
from .devices import FLOAT_TYPES, choose_device, choose_dtype
from .hub import (
    ADAPTER_FILE,
    COMPANIONS,
    EMBEDDED,
    EMBEDDING,
    SMALL_FILES,
    TIED,
    StoredTensor,
    adapter_base,
    canonical_name,
    find_checkpoint,
    find_tensors,
    finish_save,
    missing_file,
    read_index,
    require_space,
)
from .paligemma import PaliGemmaForConditionalGeneration as PaliGemma
from .processing import IMAGE_TOKEN, PaliGemmaProcessor


def check_tensors(model: PaliGemma, tensors: list[StoredTensor], whose: object) -> None:
    """Raise a ValueError unless names and shapes of `tensors` are exactly the model's.

    One of embedding and output head may be absent: they are one matrix. `whose`: what
    the error begins with, like the folder that they come from.
    """
    expected = {name: [*p.shape] for name, p in model.state_dict().items()}
    seen, problems = {}, []
    for name, file, tensor in tensors:
        ours, where = canonical_name(name), f"{name} in {file.name}"
        if ours not in expected:
            problems.append(f"unexpected {where}")
        elif ours in seen:
            problems.append(f"{where} repeats one in {seen[ours]}")
        elif tensor is None:  # of an index: the shard may say more
            pass
        elif (shape := [*tensor.shape]) != expected[ours]:
            problems.append(f"{where} has shape {shape}, not {expected[ours]}")
        elif tensor.dtype not in FLOAT_TYPES:
            problems.append(f"{where} has dtype {tensor.dtype}, not in {FLOAT_TYPES}")
        seen[ours] = file.name
    seen[EMBEDDING if TIED in seen else TIED] = None  # one matrix: one name is enough
    problems += [f"missing {name}" for name in expected if name not in seen]
    if problems:
        more = f"{len(problems)} tensors: " if len(problems) > 1 else ""
        why = shorten(more + "; ".join(problems), 160, placeholder=" …")
        advice = "give both of one model, not quantized, LoRA merged (merge_and_unload)"
        raise ValueError(f"{whose} doesn't fit its config.json: {why}: {advice}")


class _SkipInit(TorchFunctionMode):
    "Skips torch.nn.init, which has nothing to fill on the meta device."

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs)


def empty_model(config: PaliGemmaConfig) -> PaliGemma:
    """A model with parameters on the meta device: shapes alone."""
    with torch.device("meta"), _SkipInit():
        return PaliGemma(config)


def read_weights(
    tensors: list[StoredTensor], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors by their names in our model, read one at a time.

    On the CPU in the file's own dtype they stay mapped from the file, not copied.
    Raises ValueError where an output head in the files isn't the embedding.
    """
    state: dict[str, Tensor] = {}
    for name, file, tensor in tensors:
        if device.type != "cpu" or tensor.dtype != dtype:
            with safe_open(file, "pt") as opened:  # closed again, its pages are gone
                tensor = opened.get_tensor(name).to(device, dtype)
        state[canonical_name(name)] = tensor
    embedding = state.setdefault(EMBEDDING, state.get(TIED))
    head = state.setdefault(TIED, embedding)
    if head is not embedding and not torch.equal(head, embedding):
        differ = f"{EMBEDDING} and {TIED} differ in {file.parent}"
        raise ValueError(f"{differ}: PaliGemma ties them, this is another model")
    return state


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside the weights; FileNotFoundError where there is none."""
    from transformers import AutoTokenizer  # slow to import, so only when needed

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of every kind: a broken tokenizer.json is Exception's
        reason = shorten(str(error) or repr(error), 100)
        advice = "fetch tokenizer.json (or tokenizer.model) and tokenizer_config.json"
        what = f"no tokenizer that can be read in {folder}: {advice} ({reason})"
        raise FileNotFoundError(what) from error


def _companions_in(folder: Path) -> list[Path]:
    return [folder / name for name in COMPANIONS if (folder / name).is_file()]


def load_hf_model(
    model_path: str | os.PathLike | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> tuple[PaliGemma, Any]:
    """Load (model, tokenizer) from a folder, a hub id, or None: the embedded one.

    A hub id may end in `@revision`: a branch, tag or commit. Names and shapes of all
    tensors, in any of three layouts, are checked before a weight is read. Of an adapter
    (LoRA, in peft's layout) comes its base model, merged with it. The model is in eval
    mode; `name_or_path` is its folder, `companions` the files of its mask tokens there.
    Raises FileNotFoundError and ValueError that name the file and the tensor.
    """
    device = choose_device(device)
    choose_dtype(dtype, torch.float32, device)  # a wrong name: before anything is read
    folder = find_checkpoint(model_path, SMALL_FILES)
    if (base := adapter_base(folder)) is not None:
        model, tokenizer = load_hf_model(base, device, dtype)
        files = ["adapter_*.json", "adapter_*.safetensors", *COMPANIONS]
        folder = find_checkpoint(model_path, files).resolve()
        apply_adapter(model, folder)
        model.name_or_path = str(folder)
        model.companions = _companions_in(folder) or model.companions
        return model, tokenizer
    if not (folder / "config.json").is_file():
        raise missing_file("config.json", folder)
    config, tokenizer = PaliGemmaConfig.from_pretrained(folder), load_tokenizer(folder)
    model = empty_model(config)
    if promised := read_index(folder):
        check_tensors(model, promised, folder)  # before gigabytes come
    folder = find_checkpoint(model_path).resolve()
    tensors = find_tensors(folder)
    check_tensors(model, tensors, folder)
    dtypes = {canonical_name(name): tensor.dtype for name, _, tensor in tensors}
    stored = dtypes.get(EMBEDDING) or dtypes[TIED]
    dtype = choose_dtype(dtype, stored, device, config.text_config.model_type)
    state = read_weights(tensors, device, dtype)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.name_or_path, model.companions = str(folder), _companions_in(folder)
    return model.eval(), tokenizer


def apply_adapter(model: nn.Module, folder: Path) -> None:
    """Merge the LoRA adapter in `folder` into the model's weights.

    Each of its tensors must be for a part that the model has, by its name in any of the
    three layouts. Raises FileNotFoundError and ValueError.
    Source: Hu et al. 2022, in peft's implementation.
    """
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict  # slow to import

    if not (folder / ADAPTER_FILE).is_file():
        raise missing_file(ADAPTER_FILE, folder)
    prefix = "base_model.model."  # before every name in peft's files
    try:
        tensors = load_file(folder / ADAPTER_FILE).items()
        state = {canonical_name(name.removeprefix(prefix)): t for name, t in tensors}
        lora = {name: tensor for name, tensor in state.items() if ".lora_" in name}
        whole = {name: tensor for name, tensor in state.items() if name not in lora}
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
        named = {prefix + name: tensor for name, tensor in lora.items()}
        loaded = set_peft_model_state_dict(adapters, named)
        missing = [name for name in loaded.missing_keys if ".lora_" in name]
        if missing or loaded.unexpected_keys:
            raise ValueError(f"odd tensors {missing + loaded.unexpected_keys}")
        adapters.merge_and_unload()
    except Exception as error:  # peft's and safetensors' are of every kind
        why = " ".join(str(error).split())
        raise ValueError(f"{folder}'s adapter can't be merged: {why:.160}") from error
    model.requires_grad_(True)


def make_processor(model: PaliGemma, tokenizer: Any) -> PaliGemmaProcessor:
    """The processor with the image size and number of image tokens of a model.

    Raises ValueError where the tokenizer belongs to another model.
    """
    vision, ours = model.config.vision_config, model.config.image_token_index
    theirs = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if theirs != ours:
        differ = f"{IMAGE_TOKEN} is {theirs} for the tokenizer, {ours} for the model"
        raise ValueError(f"{differ}: give each model its own tokenizer")
    return PaliGemmaProcessor(tokenizer, vision.num_image_tokens, vision.image_size)


def side_files(config: PaliGemmaConfig) -> dict[str, dict[str, Any]]:
    """What transformers reads beside config, weights and tokenizer, file by file."""
    vision = config.vision_config
    steps = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")
    image_processor = dict.fromkeys(steps, True) | {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "size": {"height": vision.image_size, "width": vision.image_size},
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_seq_length": vision.num_image_tokens,
    }
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {
        "preprocessor_config.json": image_processor,
        "generation_config.json": {name: getattr(config, name) for name in ids},
    }


def _companions_of(
    model: PaliGemma, folder: Path, companions_from: str | os.PathLike | None
) -> list[Path]:
    "The files of a model's mask tokens: of `companions_from`, or those it came with."
    files = getattr(model, "companions", [])
    if companions_from is not None:
        source = Path(companions_from)
        files = _companions_in(source) or [source / COMPANIONS[0]]
    if gone := [file for file in files if not file.is_file()]:
        needed = f"there is no {gone[0]}, and this model's masks need it"
        raise FileNotFoundError(f"{needed}: give its folder as companions_from")
    if others := {*_companions_in(folder)} - {folder / file.name for file in files}:
        other = f"{min(others)} is another model's"
        raise ValueError(f"{other}: save elsewhere, or give companions_from")
    return files


def _tensors_to_save(model: nn.Module) -> tuple[PaliGemma, dict[str, Tensor]]:
    "(the model itself, its tensors by name), out of compile's and DDP's wrappers."
    inner = model
    while not isinstance(inner, PaliGemma):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            kind = type(model).__name__
            raise ValueError(f"can't save a {kind}: merge adapters (merge_and_unload)")
    state = {canonical_name(name): t for name, t in inner.state_dict().items()}
    found = [StoredTensor(name, Path("state_dict"), t) for name, t in state.items()]
    check_tensors(empty_model(inner.config), found, "the model")
    if odd := [n for n, t in state.items() if t.is_meta or type(t) is not Tensor]:
        raise ValueError(f"{odd[0]} isn't a plain tensor: gather its shards first")
    head, embedding = state.pop(TIED), state[EMBEDDING]
    if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
        raise ValueError(f"{TIED} isn't {EMBEDDING} any more: call tie_weights first")
    return inner, state


def save_hf_model(
    model: nn.Module,
    tokenizer: Any,
    folder: str | os.PathLike,
    max_shard_size: str = "5GB",
    companions_from: str | os.PathLike | None = None,
) -> None:
    """Write a checkpoint in the hub's layout, which transformers loads as it is.

    Larger than `max_shard_size` (like "5GB") it becomes shards and an index. The mask
    tokens' files come along, from where the model was loaded or `companions_from`.
    Raises ValueError, FileNotFoundError or OSError, and leaves `folder` as it was.
    """
    folder = Path(os.path.expanduser(folder))
    model, state = _tensors_to_save(model)
    companions = _companions_of(model, folder, companions_from)
    require_space(folder, sum(tensor.nbytes for tensor in state.values()))
    folder.mkdir(parents=True, exist_ok=True)
    finish_save(folder)
    for unfinished in folder.glob(".unfinished-save-*"):  # of a process that was killed
        shutil.rmtree(unfinished, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-save-") as scratch:
        staged = Path(scratch, "complete")
        model.config.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        for name, values in side_files(model.config).items():
            (staged / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        for file in companions:
            shutil.copyfile(file, staged / file.name)
        try:
            save_torch_state_dict(state, staged, max_shard_size=max_shard_size)
        except SafetensorError as error:  # a full disk; the others raise OSError
            raise OSError(f"{error}: nothing in {folder} was replaced") from error
        for file in staged.glob("*.safetensors"):  # made readable for the owner alone
            shutil.copymode(staged / "config.json", file)
        finish_save(folder, staged)


def describe_model(
    model: PaliGemma, model_path: str | os.PathLike | None = None
) -> str:
    """One sentence on the model that gave an answer: name, size, dtype and device."""
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    size = f"{millions:,.1f} M parameters, {model.dtype}, {model.device}"
    if model_path is not None and Path(os.path.expanduser(model_path)) != EMBEDDED:
        return f"{model_path}: {size}"
    return (
        f"the embedded model {EMBEDDED.name}: {size}. It knows about a hundred kinds "
        "of sticker and nothing else; in a photograph it sees stickers"
    )


def load_chosen_model() -> tuple[PaliGemma, Any, str]:
    """(model, tokenizer, description) of the folder or hub id in VLM_MODEL.

    Its weights come in "16-bit" on CUDA. Of the embedded model where the variable is
    unset, or where that checkpoint can't be loaded: a printed line says why.
    """
    if chosen := os.environ.get("VLM_MODEL", "").strip():
        dtype = "16-bit" if choose_device().type == "cuda" else "auto"
        try:
            model, tokenizer = load_hf_model(chosen, dtype=dtype)
            return model, tokenizer, describe_model(model, chosen)
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            print(f"VLM_MODEL={chosen} can't be loaded:", *str(error).split())
            print("This page goes on with the embedded model.")
    model, tokenizer = load_hf_model()
    return model, tokenizer, describe_model(model)
