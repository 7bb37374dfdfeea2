"""Fine-tuning: what is trained, the run from rows to a checkpoint, its model card.

Built in notebooks/25_finetuning.ipynb: edit it there, then run `make export`.
"""

import math
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import reduce, send_to_device
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Subset

from .hub import ADAPTER_CONFIG, ADAPTER_FILE, EMBEDDED, parse_hub_id
from .paligemma import PaliGemmaForConditionalGeneration
from .processing import PaliGemmaProcessor
from .rows import Row, read_splits
from .runs import publish, run_command, setting
from .training import SuffixLoss, TrainingConfig, train
from .weights import load_hf_model, make_processor, save_hf_model

ALL_BUT_VISION = ("language_model.*", "multi_modal_projector.*")


def match_parameters(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the parameters that patterns like `*.self_attn.*` match, or ValueError.

    The output head is the embedding and isn't listed again.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no parameter is named like {pattern!r}; try {names[-2]}")
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
        lora = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=targets)
        adapters = get_peft_model(model, lora)
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


def save_adapter(
    adapters: nn.Module, weights: dict[str, Tensor], folder: Path, base: str
) -> None:
    """Write the adapters' weights in peft's layout; `base`: the model's folder or id.

    Layers are named as in transformers' model, so that peft finds them there, too.
    """
    ours = r"(language_model|vision_tower|multi_modal_projector)(\.(vision_)?model)?\."
    weights = {re.sub(ours, r"model.\1.", name): w for name, w in weights.items()}
    weights = {name.replace(".default.", "."): w for name, w in weights.items()}
    layers = {name.partition(".lora_")[0] for name in weights}
    config = adapters.peft_config["default"]
    config.base_model_name_or_path, config.revision = parse_hub_id(base) or (base, None)
    config.target_modules = {name.removeprefix("base_model.model.") for name in layers}
    config.save_pretrained(folder)
    save_file(weights, folder / ADAPTER_FILE, metadata={"format": "pt"})
    shutil.copymode(folder / ADAPTER_CONFIG, folder / ADAPTER_FILE)  # for all to read


def enable_gradient_checkpointing(model: PaliGemmaForConditionalGeneration) -> None:
    """Let the backward pass recompute each layer's activations instead of keeping them.

    Same gradients, one forward pass more. Source: Chen et al. 2016.
    """
    layers = [*model.vision_tower.vision_model.encoder.layers]
    layers += model.language_model.model.layers
    for layer in layers:  # an attribute of the object hides the method of its class
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


@dataclass(kw_only=True)
class FineTuningConfig(TrainingConfig):
    """The settings of a run; raises ValueError for a value out of range."""

    data: str = setting("", "folder with images and a .jsonl file, or that file")
    model_path: str = setting("", "folder or hub id; empty: the embedded model")
    train: Sequence[str] = setting(ALL_BUT_VISION, "name patterns", type=str, nargs="+")
    lora_rank: int = setting(0, "less memory: train adapters of this rank; 0: none")
    save_adapter: bool = setting(False, "write the adapters alone, in peft's layout")
    learning_rate: float = setting(0.0, "peak; 0: 1e-5, or 2e-4 with LoRA")
    epochs: int = setting(3, "how often every row is seen")
    batch_size: int = setting(8, "rows in a batch, all processes together")
    validation_fraction: float = setting(0.1, "of the images, unless there is a file")
    gradient_checkpointing: bool = setting(False, "less memory, more time")
    dtype: str = setting("auto", "of frozen weights and of the result")
    # Derived from the rows and the dtype, so not for a user to set
    steps: int = field(default=1, init=False)
    eval_every: int = field(default=1, init=False)
    mixed_precision: str = field(default="no", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("data is missing: give a folder of images and rows")
        if self.save_adapter and not self.lora_rank:
            raise ValueError("save_adapter needs adapters: give a lora_rank, like 8")
        for name in ("data", "model_path"):  # to be found from anywhere
            path = Path(os.path.expanduser(getattr(self, name)))
            if getattr(self, name) and path.exists():
                setattr(self, name, str(path.absolute()))
        self.train = tuple(self.train)
        self.learning_rate = self.learning_rate or (2e-4 if self.lora_rank else 1e-5)


def _collate(rows: Sequence[Row], processor: PaliGemmaProcessor) -> dict[str, Tensor]:
    "Rows → a batch with labels."
    prefixes, suffixes = [row.prefix for row in rows], [row.suffix for row in rows]
    return processor(prefixes, [row.image for row in rows], suffixes)


@torch.no_grad()
def _validate(
    objective: SuffixLoss, rows: list[Row], collate: Callable, size: int
) -> dict[str, float]:
    "Mean cross-entropy of a suffix token; each process computes its part of the rows."
    this = PartialState()
    mine = rows[this.process_index :: this.num_processes]
    sums = torch.zeros(2, device=this.device)
    for start in range(0, len(mine), size):
        batch = send_to_device(collate(mine[start : start + size]), this.device)
        sums += torch.cat([objective(batch), objective.counts(batch)])
    total, count = reduce(sums, "sum").tolist()
    return {"validation_loss": total / count}


def finetune(
    config: FineTuningConfig,
    output: Path,
    resume: bool = False,
    stop_after: int | None = None,
) -> str | None:
    """Fine-tune a checkpoint on a folder's rows; returns what to tell the user.

    `output` appears when all is done: checkpoint, model card, log. The log has the
    validation loss before the first step and after each epoch; its last line, that of
    the weights in `output`. `resume`, `stop_after` and errors: as in `train`.
    """
    # Read and check, cheap things first
    splits = read_splits(config.data, config.validation_fraction, config.seed)
    training, validation, files = splits
    device, dtype = Accelerator().device, config.dtype
    if dtype == "auto" and device.type == "cuda":
        dtype = "16-bit"  # as in `choose_dtype`; elsewhere, as weights are stored
    model, tokenizer = load_hf_model(config.model_path or None, device, dtype)
    processor, dtype = make_processor(model, tokenizer), model.dtype
    limit = model.config.text_config.max_position_embeddings
    for row in training + validation:
        ids = processor.encode_prefix(row.prefix) + processor.encode_suffix(row.suffix)
        if len(ids) > limit:
            raise ValueError(f"{row.where}: {len(ids)} tokens, but {limit} positions")
    config = replace(config, dtype=str(dtype).removeprefix("torch."))
    formats = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    if config.dtype not in formats or device.type == "cpu" and dtype == torch.float16:
        raise ValueError(f"no training in {config.dtype} here: give --dtype bfloat16")
    config.mixed_precision = formats[config.dtype]
    config.steps = math.ceil(config.epochs * len(training) / config.batch_size)
    config.eval_every = math.ceil(len(training) / config.batch_size)
    num_parameters = sum(p.numel() for p in model.parameters())
    torch.manual_seed(config.seed)  # of the adapters' initial values
    adapters = set_trainable(model, config.train, config.lora_rank)
    named = (adapters or model).named_parameters()
    trained = {name: p for name, p in named if p.requires_grad}
    num_trained = sum(p.numel() for p in trained.values())

    # Train: every row once an epoch, in an order that the seed fixes
    rng, order = random.Random(config.seed), []
    while len(order) < config.steps * config.batch_size:
        order += rng.sample(range(len(training)), len(training))
    objective, collate = SuffixLoss(model), partial(_collate, processor=processor)
    share = math.ceil(config.batch_size / PartialState().num_processes)
    size = config.micro_batch_size or share
    num_saved = num_trained if config.save_adapter else num_parameters
    validate = partial(_validate, objective, validation, collate, size)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    log = train(
        *(objective, Subset(training, order), collate, config),
        *(output, resume, stop_after),
        evaluate=lambda step: validate(),
        about={"rows": files},  # the data may move, not change
        free=("data", "save_adapter", "gradient_checkpointing"),
        result_bytes=num_saved * dtype.itemsize,
    )
    if log[-1]["step"] < config.steps:
        return None

    # Merge, round to the checkpoint's dtype, validate what is written, and write it
    merge_adapters(model, adapters, dtype)
    log.append({"step": config.steps, **validate()})

    def write(folder: Path) -> None:
        if config.save_adapter:
            save_adapter(adapters, trained, folder, config.model_path or EMBEDDED.name)
        else:
            save_hf_model(model, tokenizer, folder)
        facts = {"splits": splits, "num_trained": num_trained, "log": log}
        _write_card(folder, config, name=output.name, **facts)

    publish(output, log, write)
    before, after = (f"{log[i]['validation_loss']:.4g}" for i in (0, -1))
    return f"validation loss {before} before, {after} after; result in {output}"


def _write_card(folder: Path, config: FineTuningConfig, **facts: Any) -> None:
    """README.md, from its template; with Gemma's license, the NOTICE that it asks for.

    Of the rows only counts are told: a card is public, and prompts may not be.
    """
    hub_id, revision = parse_hub_id(config.model_path) or (None, None)
    base = Path(config.model_path or EMBEDDED)
    license = "gemma" if (hub_id or "").startswith("google/") else None
    with suppress(Exception):  # no card, a broken one, no network to ask for it
        license = license or ModelCard.load(hub_id or base / "README.md").data.license
    training, validation, _ = facts["splits"]
    assets = EMBEDDED.parents[1] / "assets" / "finetuned"
    card = ModelCard.from_template(
        ModelCardData(license=license, base_model=hub_id),
        str(assets / "card.md"),
        base=f"{hub_id}@{revision}" if revision else hub_id or base.name,
        config=config,
        tasks=Counter(row.prefix.split()[0] for row in training + validation),
        **facts,
    )
    card.save(folder / "README.md")
    if license == "gemma":
        shutil.copy(assets / "NOTICE", folder)


_ABOUT = """
Fine-tune a PaliGemma on a folder: images, and a .jsonl file with a line an example:
  {"image": "a.png", "prefix": "caption en", "suffix": "an owl on a roof"}
The suffix may be "", as where nothing is to be detected. A part of the images is for
validation, unless there are two files, train.jsonl and valid.jsonl, or two folders.
Without --model_path the embedded model learns, with a --learning_rate near 3e-4, or
3e-3 with LoRA. For the real one, on one GPU or on several (accelerate launch -m …):
  python -m vlm.finetuning --data folder --output mine --lora_rank 8
      --model_path google/paligemma-3b-pt-224 --micro_batch_size 2
      --gradient_checkpointing
ACCELERATE_USE_CPU=true leaves a GPU alone.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, as `run_command`."""
    return run_command(_ABOUT, FineTuningConfig, finetune, argv)


if __name__ == "__main__":
    raise SystemExit(main())
