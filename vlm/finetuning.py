"""Teach a trained model a task of your own: what to train, what to leave, what is lost.

Built in notebooks/25_finetuning.ipynb: edit it there, then run `make export`.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from .inference import OneLineParser, advice, note, read_switch
from .paligemma import PaliGemmaForConditionalGeneration
from .processing import IMAGE_TOKEN, PaliGemmaProcessor, load_image
from .training import (
    TrainingConfig,
    TrainingLog,
    learning_rate_at,
    make_optimizer,
)
from .weights import (
    SMALL_FILES,
    empty_model,
    find_checkpoint,
    load_hf_model,
    make_processor,
    read_config,
    save_hf_model,
)

if TYPE_CHECKING:
    from peft import LoraModel

__all__ = [
    "KEYS",
    "ALL_BUT_THE_EYES",
    "STATE_FILE",
    "GEMMA_NOTICE",
    "CARD",
    "MIXED",
    "ABOUT",
    "HELP",
    "Row",
    "find_labels",
    "parse_row",
    "read_rows",
    "hold_out",
    "check_lengths",
    "choose_parameters",
    "linear_maps",
    "add_lora",
    "choose_trained",
    "finish",
    "gradient_checkpointing",
    "make_parts",
    "AnswerLoss",
    "finetuning_step",
    "held_out_loss",
    "FineTuningConfig",
    "save_state",
    "load_state",
    "base_license",
    "license_note",
    "Base",
    "model_card",
    "describe_run",
    "fixed_settings",
    "unfinished",
    "check_names",
    "load_for_training",
    "epoch_ends",
    "row_order",
    "make_loader",
    "write_checkpoint",
    "FineTuning",
    "finetune",
    "build_parser",
    "parse_options",
    "main",
]

KEYS = ("image", "prefix", "suffix")


@dataclass(frozen=True)
class Row:
    """A picture, what is asked about it, what is to be answered; and its own place."""

    image: Path
    prefix: str
    suffix: str
    where: str = ""  # as in "labels.jsonl line 3"


def find_labels(data: str | os.PathLike) -> Path:
    """The one .jsonl file of a folder, or the file itself.

    Raises FileNotFoundError where there is none, ValueError where there are several.
    """
    data = Path(data).expanduser()
    if data.is_file():
        return data
    if not data.is_dir():
        raise FileNotFoundError(
            f"no folder {data}: give the one that holds pictures and a .jsonl file"
        )
    found = sorted(data.glob("*.jsonl"))
    if not found:
        raise FileNotFoundError(
            f"no .jsonl file in {data}: write one, with a line for each example like "
            '{"image": "a.png", "prefix": "caption en", "suffix": "an owl"}'
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{data} holds {names}: give the one to use as --data")
    return found[0]


def parse_row(line: str, folder: Path, where: str) -> Row:
    """One line of JSON → its row; ValueError, with `where`, for what is wrong."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object: {{...}}, not {line.strip():.40}")
    for key in values:
        if key not in KEYS:
            known = ", ".join(KEYS)
            raise ValueError(f"{where}: unknown key {key!r}; there are {known}")
    for key in KEYS:
        if key not in values:
            raise ValueError(f"{where}: {key!r} is missing")
        if not isinstance(values[key], str):
            raise ValueError(f"{where}: {key} must be text, not {values[key]!r:.40}")
        if not values[key].strip():
            raise ValueError(f"{where}: {key} is empty")
        if IMAGE_TOKEN in values[key]:
            raise ValueError(
                f"{where}: {key} contains {IMAGE_TOKEN}: leave it out, the processor "
                "adds the image tokens"
            )
    return Row(folder / values["image"], values["prefix"], values["suffix"], where)


def read_rows(data: str | os.PathLike) -> list[Row]:
    """The rows of a folder's .jsonl file (or of that file), pictures looked at.

    Paths of pictures count from the file's folder. Raises ValueError and
    FileNotFoundError that name file and line.
    """
    labels = find_labels(data)
    try:
        lines = labels.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{labels} is not text in UTF-8: {error}") from None
    rows, seen = [], set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = parse_row(line, labels.parent, f"{labels.name} line {number}")
        try:
            if row.image not in seen:
                load_image(row.image)
        except (OSError, ValueError) as error:
            raise type(error)(f"{row.where}: {error}") from None
        seen.add(row.image)
        rows.append(row)
    return rows


def hold_out(
    rows: Sequence[Row], share: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """(rows to train on, held-out rows): `share` of the pictures, chosen by `seed`.

    All rows of a picture stay on one side, those of a copy under another name too.
    Raises ValueError where one of the two sides would be empty.
    """
    digests = {row.image: "" for row in rows}
    for image in digests:
        digests[image] = hashlib.sha256(image.read_bytes()).hexdigest()
    pictures = sorted(set(digests.values()))
    number = max(1, round(share * len(pictures)))
    if number >= len(pictures):
        raise ValueError(
            f"{len(rows)} rows about {len(pictures)} different pictures are too few to "
            f"hold {share:.0%} of the pictures out and train on the others"
        )
    held = set(random.Random(seed).sample(pictures, number))
    return (
        [row for row in rows if digests[row.image] not in held],
        [row for row in rows if digests[row.image] in held],
    )


def check_lengths(
    rows: Sequence[Row], processor: PaliGemmaProcessor, positions: int
) -> None:
    """Raise a ValueError for the first row that needs more than `positions` tokens."""
    for row in rows:
        prefix = processor.encode_prefix(row.prefix)
        length = len(prefix) + len(processor.encode_suffix(row.suffix))
        if length > positions:
            raise ValueError(
                f"{row.where}: {length} tokens, {processor.num_image_tokens} of them "
                f"the picture's, but the model has {positions} positions: shorten it"
            )


ALL_BUT_THE_EYES = ("language_model.*", "multi_modal_projector.*")


def choose_parameters(
    model: PaliGemmaForConditionalGeneration, patterns: Sequence[str]
) -> list[str]:
    """Names of the parameters that a pattern like `*.self_attn.*` matches.

    The output head is the embedding and isn't listed again. Raises ValueError for a
    pattern that matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            parts = sorted({name.partition(".")[0] + ".*" for name in names})
            raise ValueError(
                f"no parameter is named like {pattern!r}: the parts are "
                f"{', '.join(parts)}, and a name in full is {names[-2]}"
            )
    return [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)]


def linear_maps(
    model: PaliGemmaForConditionalGeneration, names: Sequence[str]
) -> list[str]:
    """The linear maps among parameters, as names of modules, for LoRA.

    Raises ValueError where there is none.
    """
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in names
    ]
    if not found:
        raise ValueError(
            "LoRA works on linear maps, and none is among the parameters to train: "
            "choose others, or --lora_rank 0"
        )
    return found


def add_lora(
    model: PaliGemmaForConditionalGeneration, names: Sequence[str], rank: int
) -> "LoraModel":
    """Put LoRA adapters on the linear maps among `names`; all else is frozen.

    In place; scale α / r = 2. `merge_and_unload()` of what is returned adds the
    adapters to the weights and leaves the model as it was built. Source: Hu et al.
    2022, in peft's implementation.
    """
    from peft import LoraConfig, LoraModel  # slow to import, so only when needed

    targets = linear_maps(model, names)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    return LoraModel(model, config, "default")


def choose_trained(
    model: PaliGemmaForConditionalGeneration,
    patterns: Sequence[str],
    lora_rank: int = 0,
) -> "LoraModel | None":
    """Freeze all but what patterns name, or, with a rank, but LoRA adapters on that.

    What is trained becomes float32, its gradients and moments with it. Frozen matrices
    keep their dtype; vectors, a few thousandths of the whole, become float32 because
    norms ask for one dtype. Returns the adapters, which `finish` merges.
    """
    names = choose_parameters(model, patterns)
    adapters = add_lora(model, names, lora_rank) if lora_rank else None
    for name, parameter in model.named_parameters():
        if adapters is None:
            parameter.requires_grad_(name in names)
        if parameter.requires_grad or parameter.ndim < 2:
            parameter.data = parameter.data.float()
    return adapters


def finish(
    model: PaliGemmaForConditionalGeneration,
    adapters: "LoraModel | None",
    dtype: torch.dtype,
) -> None:
    """Make the model an ordinary one again: adapters merged, all weights in `dtype`."""
    if adapters is not None:
        adapters.merge_and_unload()
    model.to(dtype).requires_grad_(True).eval()


@contextmanager
def gradient_checkpointing(model: PaliGemmaForConditionalGeneration) -> Iterator[None]:
    """Inside the context, each layer forgets its activations and computes them again.

    Same loss, same gradients; one forward pass more. Source: Chen et al. 2016.
    """
    layers = [
        *model.vision_tower.vision_model.encoder.layers,
        *model.language_model.model.layers,
    ]
    for layer in layers:  # an attribute of the object hides the method of its class
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def make_parts(
    rows: Sequence[Row], processor: PaliGemmaProcessor, size: int
) -> list[dict[str, Tensor]]:
    """Rows → parts of at most `size` rows, each a batch with labels."""
    return [
        processor(
            text=[row.prefix for row in rows[start : start + size]],
            images=[row.image for row in rows[start : start + size]],
            suffix=[row.suffix for row in rows[start : start + size]],
        )
        for start in range(0, len(rows), size)
    ]


class AnswerLoss(nn.Module):
    """The model, asked for its loss: a sum over answer tokens, not their mean.

    Sums of parts and of processes can be added; means can't.
    """

    def __init__(self, model: PaliGemmaForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """A batch with labels → its summed loss; the picture's logits are left out."""
        labels = batch["labels"]
        length = labels.shape[1] - self.model.config.vision_config.num_image_tokens
        loss = self.model(**batch, logits_to_keep=length)["loss"]
        return loss * (labels != -100).sum()


def finetuning_step(
    accelerator: Accelerator,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[dict[str, Tensor]],
    learning_rate: float,
    max_grad_norm: float,
) -> float:
    """One update from all parts of a batch; returns the batch's loss.

    Each part's sum is divided by the answer tokens of all parts of all processes.
    Processes exchange gradients once, after the last part, and average them, hence the
    factor.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    count = sum((part["labels"] != -100).sum() for part in parts)
    count = accelerator.reduce(count, "sum")
    total = torch.zeros((), device=count.device)
    for number, part in enumerate(parts, start=1):
        last = number == len(parts)
        with nullcontext() if last else accelerator.no_sync(learner):
            loss = learner(part) * accelerator.num_processes / count
            accelerator.backward(loss)
        total += loss.detach()
    accelerator.clip_grad_norm_(learner.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return accelerator.reduce(total, "mean").item()


@torch.no_grad()
def held_out_loss(
    accelerator: Accelerator,
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    rows: Sequence[Row],
    size: int,
) -> float:
    """Mean loss of an answer's token over rows, which processes share."""
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(2, device=accelerator.device)  # loss, tokens
    for part in make_parts(mine, processor, size):
        part = {name: tensor.to(sums.device) for name, tensor in part.items()}
        with accelerator.autocast():
            loss = AnswerLoss(model)(part)
        sums += torch.stack([loss.float(), (part["labels"] != -100).sum().float()])
    loss, tokens = accelerator.reduce(sums, "sum").tolist()
    return loss / tokens


@dataclass
class FineTuningConfig:
    """The settings of one run; the command line has a flag for each.

    `train`: patterns of names; with a `lora_rank`, adapters go on the linear maps among
    them. `learning_rate` 0 is 1e-5, or 2e-4 with LoRA; `micro_batch_size` 0 is the
    whole batch. `held_out`: share of the pictures that are measured and never trained
    on. Raises ValueError for a value that can't be.
    """

    train: Sequence[str] = ALL_BUT_THE_EYES
    lora_rank: int = 0
    learning_rate: float = 0.0
    epochs: int = 3
    batch_size: int = 8
    micro_batch_size: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    held_out: float = 0.1
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    seed: int = 0
    save_every: int = 0
    num_workers: int = 0
    only_cpu: bool = False

    def __post_init__(self):
        for name in ("epochs", "batch_size", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in (
            "lora_rank",
            "learning_rate",
            "micro_batch_size",
            "weight_decay",
            "save_every",
            "num_workers",
        ):
            if getattr(self, name) < 0:
                value = getattr(self, name)
                raise ValueError(f"{name} must not be negative, not {value}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be a share in 0…1, not {self.held_out}")

    @property
    def rows_at_once(self) -> int:
        """How many rows go through the model together."""
        return self.micro_batch_size or self.batch_size

    def schedule(self, num_rows: int) -> TrainingConfig:
        """Steps, warm-up (5 %) and cosine for so many rows, in chapter 17's terms."""
        steps = math.ceil(self.epochs * num_rows / self.batch_size)
        return TrainingConfig(
            steps=steps,
            learning_rate=self.learning_rate or (2e-4 if self.lora_rank else 1e-5),
            warmup_steps=max(1, round(0.05 * steps)),
            final_share=0.0,
            weight_decay=self.weight_decay,
        )


STATE_FILE = "state.safetensors"


def save_state(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: dict[str, Any],
) -> None:
    """Write what is trained, its moments, the step and the run's settings: one file.

    It takes its place when it is complete; until then the former one is there. What is
    on a GPU is copied to the CPU's memory for it.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"weight.{name}"] = parameter.detach().cpu()
            for key, value in optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = torch.as_tensor(value).cpu()
    about = {"step": str(step), "run": json.dumps(run)}
    save_file(tensors, folder / "state.new", metadata=about)
    os.replace(folder / "state.new", folder / STATE_FILE)


def load_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: dict[str, Any],
) -> int:
    """Put a saved state back and return its step.

    Raises FileNotFoundError where none is saved, ValueError where it is of another run.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"nothing is saved in {folder}: start without --resume")
    parameters = dict(model.named_parameters())
    with safe_open(path, "pt") as file, torch.no_grad():
        about = file.metadata()
        saved = json.loads(about["run"])
        for name, value in json.loads(json.dumps(run)).items():
            if saved.get(name) != value:
                raise ValueError(
                    f"the run in {folder} has {name} {saved.get(name)}, not {value}: "
                    "resume it as it was started"
                )
        for key in file.keys():
            kind, _, name = key.partition(".")
            value = file.get_tensor(key)
            if kind == "weight":
                parameters[name].copy_(value)
            else:
                on = "cpu" if kind == "step" else parameters[name].device
                optimizer.state[parameters[name]][kind] = value.to(on)
    return int(about["step"])


GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms\n"
)


def base_license(model_path: str | os.PathLike | None) -> str | None:
    """The license that the base model's card names; of Google's models, Gemma's."""
    if str(model_path).startswith("google/"):
        return "gemma"
    try:
        card = find_checkpoint(model_path, only=["README.md"]) / "README.md"
        text = card.read_text("utf-8")
    except (OSError, ValueError):  # no card, none in UTF-8, no network to ask for it
        return None
    named = re.search(r"^license: *(\S+)", text, re.MULTILINE)
    return named[1] if named else None


def license_note(license: str | None) -> str:
    """What whoever shares fine-tuned weights must know about their license."""
    if license == "gemma":
        return (
            "These weights are a modified version of Google's. The [Gemma Terms of Use]"
            "(https://ai.google.dev/gemma/terms) and their policy on prohibited uses "
            "carry over, to you and to whoever gets the weights from you: pass on the "
            "terms and the file NOTICE."
        )
    if license:
        return f"The base model's license carries over: {license}."
    return (
        "The base model's folder names no license. Find out which it has before you "
        "share these weights: it carries over."
    )


@dataclass(frozen=True)
class Base:
    """The model that a run starts from, as its card names it."""

    name: str
    hub_id: str | None = None
    license: str | None = None

    @classmethod
    def of(cls, model_path: str | os.PathLike | None) -> Self:
        """Of a folder the name alone, not the path; of a hub id the revision too."""
        license = base_license(model_path)
        if model_path is None or Path(model_path).expanduser().exists():
            return cls(find_checkpoint(model_path).absolute().name, license=license)
        hub_id, _, _ = str(model_path).partition("@")
        return cls(str(model_path), hub_id, license)


CARD = """---
{head}
---
# {name}

{base}, fine-tuned with `python -m vlm.finetuning`.

## Data

{rows} rows about {pictures} pictures; of these, {held_out_rows} rows about
{held_out_pictures} pictures were held out. First words of the prompts: {tasks}.
The file is `{file}`, with the SHA-256
`{sha256}`.

## Loss on held-out rows

| before | after |
|---|---|
| {before:.4g} | {after:.4g} |

Mean cross-entropy of an answer's token, on pictures that were not trained on. "After"
is of the weights in this folder. Nothing else was measured: not how good the answers
are, and not what the base model could do that this one has forgotten.

## Recipe

| | |
|---|---|
{recipe}

## License

{license_note}
"""


def model_card(
    name: str,
    base: Base,
    data: dict[str, Any],
    recipe: dict[str, Any],
    before: float,
    after: float,
) -> str:
    """README.md of a fine-tuned model: data, held-out loss, recipe, license.

    `data`, `recipe`: from `describe_run`.
    """
    head = ["library_name: transformers", "pipeline_tag: image-text-to-text"]
    head.append("tags: [paligemma]")
    if base.license:
        head.append(f"license: {base.license}")
    if base.hub_id:
        head.append(f"base_model: {base.hub_id}")
    return CARD.format(
        head="\n".join(head),
        name=name,
        base=base.name,
        recipe="\n".join(f"| {key} | {value} |" for key, value in recipe.items()),
        before=before,
        after=after,
        license_note=license_note(base.license),
        **data,
    )


def describe_run(
    model: PaliGemmaForConditionalGeneration,
    labels: Path,
    training: Sequence[Row],
    held: Sequence[Row],
    config: FineTuningConfig,
    dtype: torch.dtype,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(data, recipe) for the model card; what `model` trains must have been chosen.

    `dtype` is that of the frozen weights and of the result: what is trained is float32.
    """
    rows = [*training, *held]
    tasks = Counter(row.prefix.split()[0] for row in rows).most_common(5)
    data = {
        "file": labels.name,
        "sha256": hashlib.sha256(labels.read_bytes()).hexdigest(),
        "rows": len(rows),
        "pictures": len({row.image for row in rows}),
        "held_out_rows": len(held),
        "held_out_pictures": len({row.image for row in held}),
        "tasks": ", ".join(f"{task} ({count})" for task, count in tasks),
    }
    schedule = config.schedule(len(training))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    recipe = asdict(config) | {
        "train": " ".join(f"`{pattern}`" for pattern in config.train),
        "trained parameters": f"{trained:,}",
        "steps": schedule.steps,
        "learning_rate": schedule.learning_rate,
        "dtype": str(dtype).removeprefix("torch."),
    }
    for name in ("save_every", "num_workers", "only_cpu"):  # nothing depends on them
        del recipe[name]
    return data, recipe


def fixed_settings(
    recipe: dict[str, Any], data: dict[str, Any], model_path: str | os.PathLike | None
) -> dict[str, Any]:
    """What a resumed run must have in common with its beginning: all but memory."""
    free = ("micro_batch_size", "gradient_checkpointing")
    settings = {name: value for name, value in recipe.items() if name not in free}
    return settings | {"model_path": str(model_path), "sha256": data["sha256"]}


MIXED = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


def unfinished(output: Path, resume: bool) -> Path:
    """Where a run lives until it is complete: a folder beside `output`.

    What an earlier run left there without having saved a step is written over.

    Raises FileExistsError where a model or another run would be overwritten.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists already: choose another --output")
    work = output.with_name(output.name + ".unfinished")
    if (work / STATE_FILE).exists() and not resume:
        raise FileExistsError(
            f"{work} holds an unfinished run: go on with --resume, or remove it"
        )
    return work


def check_names(model_path: str | os.PathLike | None, config: FineTuningConfig) -> None:
    """Raise a ValueError for patterns that fit no weights; weights aren't read."""
    folder = find_checkpoint(model_path, only=SMALL_FILES)
    model = empty_model(read_config(folder))
    model.tie_weights()
    names = choose_parameters(model, config.train)
    if config.lora_rank:
        linear_maps(model, names)


def load_for_training(
    model_path: str | os.PathLike | None, config: FineTuningConfig
) -> tuple[Accelerator, PaliGemmaForConditionalGeneration, PaliGemmaProcessor]:
    """Accelerator, model and processor that fit each other.

    With dtype "auto" weights are as stored; on an NVIDIA GPU `choose_dtype`'s
    "16-bit".
    """
    device, dtype = PartialState(cpu=config.only_cpu).device, config.dtype
    if dtype == "auto" and device.type == "cuda":
        dtype = "16-bit"
    model, tokenizer = load_hf_model(model_path, device, dtype)
    if model.dtype not in MIXED:
        raise ValueError(f"no training in {model.dtype}: give --dtype bfloat16")
    if model.dtype == torch.float16 and device.type == "cpu":
        raise ValueError(
            "no training in float16 on the CPU: give --dtype bfloat16 or float32"
        )
    accelerator = Accelerator(
        cpu=config.only_cpu,
        mixed_precision=MIXED[model.dtype],
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    if config.batch_size % accelerator.num_processes:
        raise ValueError(
            f"{accelerator.num_processes} processes can't share a batch of "
            f"{config.batch_size} evenly: change --batch_size"
        )
    return accelerator, model, make_processor(model, tokenizer)


def epoch_ends(num_rows: int, batch_size: int, epochs: int) -> set[int]:
    """The steps at which every row has been seen once, twice, …."""
    return {math.ceil(n * num_rows / batch_size) for n in range(1, epochs + 1)}


def row_order(num_rows: int, length: int, seed: int) -> list[int]:
    """`length` indices of rows: every row once, in random order, and again."""
    rng, order = random.Random(seed), []
    while len(order) < length:
        order += rng.sample(range(num_rows), num_rows)
    return order[:length]


def make_loader(
    rows: Sequence[Row],
    processor: PaliGemmaProcessor,
    config: FineTuningConfig,
    first: int = 0,
) -> DataLoader:
    """All batches from step `first` on, each in parts of `config.rows_at_once`."""
    length = config.schedule(len(rows)).steps * config.batch_size
    order = row_order(len(rows), length, config.seed)
    return DataLoader(
        Subset(rows, order[first * config.batch_size :]),
        batch_size=config.batch_size,
        collate_fn=partial(make_parts, processor=processor, size=config.rows_at_once),
        num_workers=config.num_workers,
    )


def write_checkpoint(
    model: PaliGemmaForConditionalGeneration,
    tokenizer: Any,
    work: Path,
    output: Path,
    card: str,
) -> None:
    """Let `output` appear, complete: checkpoint, card, log, and Gemma's notice.

    `work`, which held the unfinished run and its log, is gone afterwards.
    """
    staged = work / "checkpoint"
    shutil.rmtree(staged, ignore_errors=True)
    save_hf_model(model, tokenizer, staged)
    (staged / "README.md").write_text(card, encoding="utf-8")
    if license_note("gemma") in card:
        (staged / "NOTICE").write_text(GEMMA_NOTICE, encoding="utf-8")
    shutil.copy(work / "log.jsonl", staged)
    os.replace(staged, output)
    shutil.rmtree(work)


class FineTuning:
    """One run: everything read and checked, then `train`, then `publish`."""

    def __init__(
        self,
        data: str | os.PathLike,
        output: str | os.PathLike,
        config: FineTuningConfig,
        model_path: str | os.PathLike | None = None,
        resume: bool = False,
    ):
        self.output = Path(output).expanduser()
        self.work = unfinished(self.output, resume)
        self.config = config
        labels = find_labels(data)
        rows = read_rows(labels)
        self.rows, self.held = hold_out(rows, config.held_out, config.seed)
        check_names(model_path, config)
        self.accelerator, self.model, self.processor = load_for_training(
            model_path, config
        )
        positions = self.model.config.text_config.max_position_embeddings
        check_lengths(rows, self.processor, positions)
        self.base = Base.of(model_path)
        before, self.dtype = None if resume else self.measure(), self.model.dtype
        torch.manual_seed(config.seed)  # of what adapters start as
        self.adapters = choose_trained(self.model, config.train, config.lora_rank)
        self.data, self.recipe = describe_run(
            self.model, labels, self.rows, self.held, config, self.dtype
        )
        self.settings = fixed_settings(self.recipe, self.data, model_path)
        self.learner = AnswerLoss(self.model)
        self.schedule = config.schedule(len(self.rows))
        self.optimizer = make_optimizer(self.learner, self.schedule)
        state = (self.work, self.model, self.optimizer, self.settings)
        self.first = load_state(*state) if resume else 0
        self.accelerator.wait_for_everyone()
        place = self.work if self.accelerator.is_main_process else None
        self.log = TrainingLog(place, self.first)
        if before is not None:
            self.log.write(0, held_out=before)

    def measure(self) -> float:
        """The loss on the held-out rows, as the model is now."""
        size, place = self.config.rows_at_once, self.accelerator
        return held_out_loss(place, self.model, self.processor, self.held, size)

    def train(self, stop_after: int | None = None) -> bool:
        """All steps, or up to `stop_after`, where the run is saved; True at the end."""
        config, total = self.config, self.schedule.steps
        learner, optimizer, loader = self.accelerator.prepare(
            self.learner,
            self.optimizer,
            make_loader(self.rows, self.processor, config, self.first),
        )
        main = self.accelerator.is_main_process
        ends = epoch_ends(len(self.rows), config.batch_size, config.epochs)
        steps = range(self.first + 1, min(total, stop_after or total) + 1)
        bar = tqdm(steps, "fine-tuning", unit="step", disable=None if main else True)
        for step, parts in zip(bar, loader):
            rate = learning_rate_at(step - 1, self.schedule)
            work = (self.accelerator, learner, optimizer, parts)
            loss = finetuning_step(*work, rate, config.max_grad_norm)
            self.log.add(step, loss=loss)
            save = config.save_every and step % config.save_every == 0
            save = save or step == stop_after
            if save or step in ends or step % 10 == 0:
                values = {"learning_rate": rate}
                if step in ends and step < total:
                    values["held_out"] = self.measure()
                self.log.write(step, **values)
            if save and main:
                save_state(self.work, step, self.model, self.optimizer, self.settings)
        self.accelerator.wait_for_everyone()
        return not stop_after or stop_after >= total

    def publish(self) -> None:
        """Merge, round, measure, and let `output` appear."""
        finish(self.model, self.adapters, self.dtype)
        self.log.write(self.schedule.steps, held_out=self.measure())
        if self.accelerator.is_main_process:
            losses = [self.log.entries[place]["held_out"] for place in (0, -1)]
            about = (self.output.name, self.base, self.data, self.recipe)
            card = model_card(*about, *losses)
            tokenizer = self.processor.tokenizer
            write_checkpoint(self.model, tokenizer, self.work, self.output, card)
        self.accelerator.wait_for_everyone()


def finetune(
    data: str | os.PathLike,
    output: str | os.PathLike,
    config: FineTuningConfig | None = None,
    model_path: str | os.PathLike | None = None,
    resume: bool = False,
    stop_after: int | None = None,
) -> list[dict[str, float]]:
    """Fine-tune a checkpoint on a folder's rows; returns the log, one dict a line.

    `output` appears when all is done, with checkpoint, model card and log; until then
    the run is in `output`.unfinished. The log's first line has the held-out loss
    before, its last line that of the weights in `output`. `stop_after`: save and stop
    at this step. Raises ValueError and OSError for what a user can get wrong, and
    FloatingPointError when a loss is no longer a number. Under `accelerate launch`,
    several processes share each batch and have the loss of one.
    """
    if stop_after is not None and stop_after < 1:
        raise ValueError(f"stop_after must be at least 1, not {stop_after}")
    config = config or FineTuningConfig()
    run = FineTuning(data, output, config, model_path, resume)
    again = config.gradient_checkpointing
    with gradient_checkpointing(run.model) if again else nullcontext():
        done = run.train(stop_after)
    if done:
        run.publish()
    return run.log.entries


ABOUT = """
Fine-tune a PaliGemma on a folder of yours: pictures, and one .jsonl file with a line
for each example:
  {"image": "a.png", "prefix": "caption en", "suffix": "an owl on a roof"}
A part of the pictures is held out: the loss on them is measured before and after, and
never on a picture that was trained on. What comes out is an ordinary checkpoint with a
model card, for this package and for transformers.

Without --model_path the embedded model learns. It is small: let it have a
--learning_rate near 3e-4, or 3e-3 with LoRA. With several GPUs:
  accelerate launch -m vlm.finetuning ...

Examples, each on one line:
  python -m vlm.finetuning --data folder --output mine --learning_rate 3e-4
  python -m vlm.finetuning --data folder --output mine
      --model_path google/paligemma-3b-pt-224 --lora_rank 8 --micro_batch_size 2
      --gradient_checkpointing
  python -m vlm.finetuning --data folder --output mine --learning_rate 3e-4
      --train "*.self_attn.*"
"""
HELP = {
    "train": "patterns of parameters to train, in quotes",
    "lora_rank": "train adapters of this rank instead; 0: none",
    "learning_rate": "peak; 0: 1e-5, or 2e-4 with LoRA",
    "epochs": "how often every picture is seen",
    "batch_size": "rows in a batch, all processes together",
    "micro_batch_size": "rows at once in a process; 0: its whole batch",
    "weight_decay": "on matrices",
    "max_grad_norm": "longer gradients are shortened",
    "held_out": "share of the pictures to measure on",
    "gradient_checkpointing": "less memory, more time",
    "dtype": "of frozen weights and of the result",
    "seed": "of the split, the order and the adapters",
    "save_every": "steps between saves, for --resume; 0: none",
    "num_workers": "processes that read pictures",
    "only_cpu": "leave a GPU alone",
}


def build_parser() -> OneLineParser:
    """A flag for every field of FineTuningConfig, and where to read and write."""
    parser = OneLineParser(
        prog="python -m vlm.finetuning",
        usage="%(prog)s --data FOLDER --output FOLDER [options]",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    switch = dict(nargs="?", const=True, type=read_switch, metavar="BOOL")
    add("--data", metavar="FOLDER", help="pictures and a .jsonl file, or that file")
    add("--output", metavar="FOLDER", help="where the new checkpoint will be")
    add("--model_path", metavar="P", help="folder or hub id; default: embedded model")
    add("--resume", **switch, default=False, help="go on with a run that was saved")
    add("--stop_after", metavar="N", type=int, help="save and stop at this step")
    for name, value in vars(FineTuningConfig()).items():
        kind = dict(type=type(value), metavar=name[0].upper())
        if isinstance(value, tuple):
            kind = dict(nargs="+", metavar="PATTERN")
        elif isinstance(value, bool):
            kind = switch
        shown = " ".join(value) if isinstance(value, tuple) else value
        add(f"--{name}", **kind, default=value, help=f"{HELP[name]}; default: {shown}")
    return parser


def parse_options(argv: list[str] | None = None) -> dict[str, Any]:
    """The command line's words → options; ValueError with one line of advice."""
    options = build_parser().parse_args(argv)
    for name in ("data", "output"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name} is missing: give a folder")
    return vars(options)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status.

    0; 2 after one line of advice; 130, as shells expect, when it was interrupted.
    """
    first = os.environ.get("RANK", "0") == "0"  # of several processes, one speaks
    try:
        options = parse_options(argv)
        names = ("data", "output", "model_path", "resume", "stop_after")
        where = {name: options.pop(name) for name in names}
        log = finetune(**where, config=FineTuningConfig(**options))
    except KeyboardInterrupt:
        if first:
            note("stopped: --resume goes on from the last save, if there is one")
        return 130
    except Exception as error:
        line = advice(
            error,
            "the run doesn't fit in the device's memory: try a smaller "
            "--micro_batch_size, --gradient_checkpointing or --lora_rank 8",
        )
        if line is None:
            raise
        if first:
            note(f"error: {line}")
        return 2
    if first and not Path(where["output"]).expanduser().exists():
        print(f"stopped at step {log[-1]['step']}: go on with --resume")
    elif first:
        before, after = log[0]["held_out"], log[-1]["held_out"]
        print(f"loss on held-out rows: {before:.4g} before, {after:.4g} after")
        print(f"checkpoint and model card in {where['output']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
