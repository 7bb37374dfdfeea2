"""Fine-tuning: settings, the run from a folder of rows to a checkpoint, its card.

Built in notebooks/25_finetuning.ipynb: edit it there, then run `make export`.
"""

import math
import os
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from torch.utils.data import Subset

from .adapters import (
    ALL_BUT_VISION,
    gradient_checkpointing,
    merge_adapters,
    save_adapter,
    set_trainable,
)
from .hub import EMBEDDED, find_checkpoint, parse_hub_id, require_space
from .processing import PaliGemmaProcessor
from .rows import Row, check_lengths, read_splits
from .runs import (
    TrainingLog,
    check_output,
    publish,
    run_command,
    run_folder,
    setting,
)
from .training import SuffixLoss, TrainingConfig, make_accelerator, train
from .weights import load_hf_model, make_processor, save_hf_model

# What may change when a run goes on: where rows are (their hash stays), what it needs.
_FREE = ("data", "validation", "save_adapter", "gradient_checkpointing", "only_cpu")
_MIXED_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(kw_only=True)
class FineTuningConfig(TrainingConfig):
    """The settings of a run; ValueError for one that can't be."""

    data: str = setting("", "folder with images and a .jsonl file, or that file")
    validation: str = setting("", "rows to validate on, instead of a part of the data")
    model_path: str = setting("", "folder or hub id; empty: the embedded model")
    train: Sequence[str] = setting(
        ALL_BUT_VISION, "patterns of parameters, in quotes", type=str, nargs="+"
    )
    lora_rank: int = setting(0, "less memory: train adapters of this rank; 0: none")
    save_adapter: bool = setting(False, "write the adapters alone, in peft's layout")
    learning_rate: float = setting(0.0, "peak; 0: 1e-5, or 2e-4 with LoRA")
    epochs: int = setting(3, "how often every row is seen")
    batch_size: int = setting(8, "rows in a batch, all processes together")
    validation_fraction: float = setting(0.1, "of the images, unless there is a file")
    gradient_checkpointing: bool = setting(False, "less memory, more time")
    dtype: str = setting("auto", "of frozen weights and of the result")
    only_cpu: bool = setting(False, "leave a GPU alone")
    # Of the rows and the dtype, hence not for a user to set.
    steps: int = field(default=1, init=False)
    eval_every: int = field(default=1, init=False)
    mixed_precision: str = field(default="no", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("data is missing: give a folder of images and rows")
        if self.epochs < 1:
            raise ValueError("epochs must be at least 1")
        if not 0 < self.validation_fraction < 1:
            raise ValueError("validation_fraction must be between 0 and 1")
        if self.save_adapter and not self.lora_rank:
            raise ValueError("save_adapter needs adapters: give a lora_rank, like 8")
        for name in ("data", "validation", "model_path"):  # to be found from anywhere
            path = Path(getattr(self, name)).expanduser()
            if getattr(self, name) and path.exists():
                setattr(self, name, str(path.absolute()))
        self.train = tuple(self.train)
        self.learning_rate = self.learning_rate or (2e-4 if self.lora_rank else 1e-5)

    def resolve(self, num_rows: int, dtype: str) -> "FineTuningConfig":
        """A copy for so many rows, validated once an epoch, and weights in `dtype`."""
        config = replace(self, dtype=dtype)
        config.mixed_precision = _MIXED_PRECISION[dtype]
        config.steps = math.ceil(self.epochs * num_rows / self.batch_size)
        config.eval_every = math.ceil(num_rows / self.batch_size)
        return config


def _collate(rows: Sequence[Row], processor: PaliGemmaProcessor) -> dict[str, Tensor]:
    "Rows → a batch with labels."
    prefixes, suffixes = [row.prefix for row in rows], [row.suffix for row in rows]
    return processor(prefixes, [row.image for row in rows], suffixes)


class FineTuning:
    """One run: everything read and checked, then `optimize`, then `finish`."""

    def __init__(self, config: FineTuningConfig, output: Path, resume: bool = False):
        check_output(output, {}, resume)  # the place alone, before anything slow
        self.rows, self.validation, self.files = read_splits(
            config.data, config.validation, config.validation_fraction, config.seed
        )
        # Weights as they are stored; on a CUDA GPU, as `choose_dtype`'s "16-bit".
        device, dtype = make_accelerator(cpu=config.only_cpu).device, config.dtype
        if dtype == "auto" and device.type == "cuda":
            dtype = "16-bit"
        self.model, tokenizer = load_hf_model(config.model_path or None, device, dtype)
        self.output, self.resume, self.dtype = output, resume, self.model.dtype
        name = str(self.dtype).removeprefix("torch.")
        if name not in _MIXED_PRECISION or name == "float16" and device.type == "cpu":
            raise ValueError(f"no training in {name} here: give --dtype bfloat16")
        self.config = config = config.resolve(len(self.rows), name)
        self.accelerator = make_accelerator(config.mixed_precision, config.only_cpu)
        self.processor = make_processor(self.model, tokenizer)
        self.collate = partial(_collate, processor=self.processor)
        positions = self.model.config.text_config.max_position_embeddings
        check_lengths([*self.rows, *self.validation], self.processor, positions)
        torch.manual_seed(config.seed)  # of the adapters' initial values
        self.adapters = set_trainable(self.model, config.train, config.lora_rank)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.num_trained = sum(p.numel() for p in trained)
        result = sum(p.nbytes for p in trained)
        state = 0 if resume else 3 * result  # the last one, with two moments
        if not config.save_adapter:
            sizes = [p.numel() for p in self.model.parameters()]
            result = sum(sizes) * self.dtype.itemsize
        require_space(run_folder(output), state + result)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean cross-entropy of a suffix token over the validation rows."""
        shared = self.accelerator
        mine = self.validation[shared.process_index :: shared.num_processes]
        size = self.config.micro_batch_size or self.config.batch_size
        objective, sums = SuffixLoss(self.model), torch.zeros(2, device=shared.device)
        for start in range(0, len(mine), size):
            batch = self.collate(mine[start : start + size])
            batch = send_to_device(batch, shared.device)
            with shared.autocast():
                sums += torch.cat([objective(batch).float(), objective.counts(batch)])
        total, count = shared.reduce(sums, "sum").tolist()
        return total / count

    def optimize(self, stop_after: int | None = None) -> list[dict[str, float]]:
        """All steps, or those up to `stop_after`; returns the log."""
        config, num_rows = self.config, len(self.rows)
        rng, order = random.Random(config.seed), []
        while len(order) < config.steps * config.batch_size:  # epoch after epoch
            order += rng.sample(range(num_rows), num_rows)
        recompute = config.gradient_checkpointing
        with gradient_checkpointing(self.model) if recompute else nullcontext():
            return train(
                SuffixLoss(self.model),
                Subset(self.rows, order),
                self.collate,
                config,
                self.output,
                self.resume,
                stop_after,
                evaluate=lambda step: {"validation_loss": self.validate()},
                about={"rows": self.files},
                free=_FREE,
                accelerator=self.accelerator,
            )

    def finish(self, log: list[dict[str, float]]) -> None:
        """Merge, round, validate, write: `output` appears, and a last line of `log`."""
        config, is_main = self.config, self.accelerator.is_main_process
        folder = run_folder(self.output) / "result"
        if is_main and config.save_adapter:
            save_adapter(self.adapters, folder, config.model_path or EMBEDDED.name)
        merge_adapters(self.model, self.adapters, self.dtype)
        log.append({"step": config.steps, "validation_loss": self.validate()})
        if is_main:
            if not config.save_adapter:
                save_hf_model(self.model, self.processor.tokenizer, folder)
            _write_card(folder, self, log)
            TrainingLog(run_folder(self.output), config.steps).write(**log[-1])
            publish(self.output)
        self.accelerator.wait_for_everyone()


def _license(model_path: str) -> str | None:
    "The license that a model's card names; of Google's models, Gemma's."
    if model_path.startswith("google/"):
        return "gemma"
    try:
        folder = find_checkpoint(model_path or None, only=["README.md"])
        return ModelCard.load(folder / "README.md").data.license
    except Exception:  # no card, none that can be read, no network to ask for it
        return None


def _write_card(folder: Path, run: FineTuning, log: list[dict[str, float]]) -> None:
    """README.md, from its template; with Gemma's license, the NOTICE that it asks for.

    Of the rows only counts are told: a card is public, and prompts may not be.
    """
    path = run.config.model_path
    hub_id, revision = parse_hub_id(path or EMBEDDED) or (None, None)
    metadata = ModelCardData(
        library_name="peft" if run.config.save_adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["paligemma"],
        license=_license(hub_id or path),
        base_model=hub_id,
    )
    tasks = Counter(row.prefix.split()[0] for row in [*run.rows, *run.validation])
    losses = [entry["validation_loss"] for entry in log if "validation_loss" in entry]
    assets = Path(str(package_files("vlm"))) / "assets" / "finetuned"
    card = ModelCard.from_template(
        metadata,
        str(assets / "card.md"),
        run=run,
        base="@".join(filter(None, [hub_id, revision])) or Path(path or EMBEDDED).name,
        tasks=", ".join(f"{task} ({n})" for task, n in tasks.most_common(5)),
        losses=losses,
    )
    card.save(folder / "README.md")
    if metadata.license == "gemma":
        shutil.copy(assets / "NOTICE", folder)


def finetune(
    config: FineTuningConfig,
    output: str | os.PathLike,
    resume: bool = False,
    stop_after: int | None = None,
) -> list[dict[str, float]]:
    """Fine-tune a checkpoint on a folder's rows; returns the log, one dict a line.

    `output` appears when all is done: checkpoint, model card, log. The log has the
    validation loss before the first step and after each epoch; its last line, that of
    the weights in `output`. `resume`, `stop_after` and errors: as in `train`.
    """
    run = FineTuning(config, Path(output).expanduser(), resume)
    log = run.optimize(stop_after)
    if stop_after is None or stop_after >= run.config.steps:
        try:
            run.finish(log)
        except OSError as error:
            raise OSError(f"{error}; all is trained: --resume writes it") from error
    return log


_ABOUT = """
Fine-tune a PaliGemma on a folder of yours: images, and one .jsonl file with a line for
each example:
  {"image": "a.png", "prefix": "caption en", "suffix": "an owl on a roof"}
Where nothing is to be detected or segmented, the right suffix is "". A part of the
images is for validation and isn't trained on. A folder with train/ and valid/ inside,
each with a .jsonl file, is read as that. The result is an ordinary checkpoint with a
model card; with --save_adapter it is the LoRA adapter alone.

Without --model_path the embedded model learns: let it have a --learning_rate near 3e-4,
or 3e-3 with LoRA. For the real one, on one GPU or on several (accelerate launch -m …):
  python -m vlm.finetuning --data folder --output mine --lora_rank 8
      --model_path google/paligemma-3b-pt-224 --micro_batch_size 2
      --gradient_checkpointing
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, as `run_command`."""

    def run(config: FineTuningConfig, output: Path, *when: Any) -> str:
        log = finetune(config, output, *when)
        if not output.exists():
            return f"stopped at step {log[-1]['step']}: go on with --resume"
        loss = [entry["validation_loss"] for entry in log if "validation_loss" in entry]
        change = f"validation loss {loss[0]:.4g} before, {loss[-1]:.4g} after"
        return f"{change}; checkpoint and model card in {output}"

    return run_command(_ABOUT, FineTuningConfig, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
