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
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from accelerate import Accelerator
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from .detection import split_objects
from .inference import OneLineParser, advice, note, read_switch
from .paligemma import PaliGemmaForConditionalGeneration
from .processing import (
    PaliGemmaProcessor,
    check_tokens,
    load_image,
    locs_to_box,
    segs_to_codes,
)
from .training import (
    TrainingConfig,
    TrainingLog,
    check_settings,
    learning_rate_at,
    make_accelerator,
    make_optimizer,
)
from .weights import (
    ADAPTER_FILE,
    EMBEDDED,
    SMALL_FILES,
    _hub_id,
    empty_model,
    find_checkpoint,
    load_hf_model,
    make_processor,
    read_config,
    require_space,
    save_hf_model,
)

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "KEYS",
    "SPLITS",
    "ALL_BUT_THE_EYES",
    "STATE_FILE",
    "FREE",
    "GEMMA_NOTICE",
    "CARD",
    "MIXED",
    "ABOUT",
    "HELP",
    "Row",
    "check_objects",
    "parse_row",
    "read_rows",
    "find_splits",
    "say",
    "file_hash",
    "hold_out",
    "read_sides",
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
    "write_tensors",
    "save_state",
    "saved_settings",
    "load_state",
    "base_license",
    "license_note",
    "Base",
    "model_card",
    "describe_run",
    "work_folder",
    "check_place",
    "absolute",
    "find_settings",
    "check_names",
    "load_for_training",
    "epoch_ends",
    "row_order",
    "make_loader",
    "save_adapter",
    "complete",
    "check_space",
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


def check_objects(prefix: str, suffix: str) -> None:
    """Raise a ValueError for an answer to `detect` or `segment` that can't be parsed.

    An empty one is right where there is nothing to be found.
    """
    task = prefix.split()[0]
    for thing in split_objects(suffix) if task in ("detect", "segment") else ():
        segs_valid = task == "detect" and not thing.segs or segs_to_codes(thing.segs)
        if not (locs_to_box(thing.locs, 1, 1) and segs_valid and thing.is_named):
            text = f"{thing.locs}{thing.segs} {thing.label}".strip()
            raise ValueError(
                f"{text!r:.60} is not a valid object: "
                "four loc tokens y0 x0 y1 x1 that end past their start, sixteen seg "
                "tokens (detect: or none), a label, and ' ; ' between objects"
            )


def parse_row(line: str, folder: Path, where: str) -> Row:
    """One line of JSON → its row; ValueError, with `where`, for what is wrong."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
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
        if key != "suffix" and not values[key].strip():
            raise ValueError(f"{where}: {key} is empty")
    prefix, suffix = values["prefix"], values["suffix"]
    try:
        check_tokens(prefix)
        check_tokens(suffix)
        check_objects(prefix, suffix)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Row(folder / values["image"], prefix, suffix, where)


def read_rows(labels: Path) -> list[Row]:
    """The rows of a .jsonl file, pictures looked at.

    Paths of pictures count from the file's folder. Raises ValueError and
    FileNotFoundError that name file and line.
    """
    try:
        lines = labels.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{labels} is not text in UTF-8: {error}") from None
    rows, seen, name = [], set(), Path(*labels.parts[-2:])
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = parse_row(line, labels.parent, f"{name} line {number}")
        try:
            if row.image not in seen:
                load_image(row.image)
        except (OSError, ValueError) as error:
            raise type(error)(f"{row.where}: {error}") from None
        seen.add(row.image)
        rows.append(row)
    if not rows:
        raise ValueError(f"{labels} holds no rows")
    return rows


SPLITS = {"train": "train", "valid": "validation", "val": "validation"}
SPLITS |= {"validation": "validation", "test": "test"}  # names in exports → ours


def find_splits(data: str | os.PathLike) -> dict[str, Path]:
    """The .jsonl files of `data` by split: "train", maybe "validation" and "test".

    A file, or a folder with one, is "train". An annotation tool's export has several,
    and the split in their names or in the names of subfolders with one each.
    Raises FileNotFoundError where there is none, ValueError where it can't be told.
    """
    data = Path(data).expanduser()
    if data.is_file():
        return {"train": data}
    if not data.is_dir():
        raise FileNotFoundError(
            f"no folder {data}: give the one that holds pictures and a .jsonl file"
        )
    files = sorted(data.glob("*.jsonl"))
    if len(files) == 1:
        return {"train": files[0]}
    found: dict[str | None, list[Path]] = {}
    for file in files or sorted(data.glob("*/*.jsonl")):
        words = re.split(r"[\W_]+", (file.stem if files else file.parent.name).lower())
        split = next((SPLITS[word] for word in words if word in SPLITS), None)
        if files or split:
            found.setdefault(split, []).append(file)
    if None in found or any(len(some) > 1 for some in found.values()):
        names = ", ".join(str(f.relative_to(data)) for s in found.values() for f in s)
        raise ValueError(f"{data} holds {names}: give the one to use as --data")
    if "train" not in found:
        raise FileNotFoundError(
            f"no .jsonl file in {data} or {data / 'train'}: write one, with a line for "
            'each example, like {"image": "a.png", "prefix": "caption en", "suffix": '
            '"an owl"}'
        )
    return {split: file for split, (file,) in found.items()}


def say(message: str) -> None:
    """A line on the error stream; of several processes, one speaks."""
    if os.environ.get("RANK", "0") == "0":
        note(message)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hold_out(
    rows: Sequence[Row], share: float, seed: int, validation: Sequence[Row] = ()
) -> tuple[list[Row], list[Row]]:
    """(rows to train on, held-out rows): `share` of the pictures, chosen by `seed`.

    All rows of a picture stay on one side, those of a copy under another name too: with
    `validation`, which is held out instead, rows about its pictures aren't trained on.
    Raises ValueError where one of the two sides would be empty.
    """
    images = {row.image for row in [*rows, *validation]}
    digests = {image: file_hash(image) for image in images}
    pictures = sorted({digests[row.image] for row in rows})
    held = {digests[row.image] for row in validation}
    if not held:
        number = max(1, round(share * len(pictures)))
        held = set(random.Random(seed).sample(pictures, min(number, len(pictures))))
    training = [row for row in rows if digests[row.image] not in held]
    if not training:
        raise ValueError(
            f"{len(rows)} rows about {len(pictures)} different pictures are too few: "
            "all of them would be held out, and none trained on"
        )
    held_rows = [row for row in rows if digests[row.image] in held]
    return training, list(validation) or held_rows


def read_sides(
    files: dict[str, Path], share: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """(rows to train on, held-out rows) of some files; says what isn't used."""
    rows = read_rows(files["train"])
    validation = read_rows(files["validation"]) if "validation" in files else []
    training, held = hold_out(rows, share, seed, validation)
    if unused := len(rows) + len(validation) - len(training) - len(held):
        say(f"{unused} rows aren't trained on: their pictures are held out")
    if "test" in files:
        say(f"{files['test']} isn't read: it is for a last measure, when all is chosen")
    return training, held


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
) -> "PeftModel":
    """Put LoRA adapters on the linear maps among `names`; all else is frozen.

    In place; scale α / r = 2. `merge_and_unload()` of what is returned adds the
    adapters to the weights and leaves the model as it was built. Source: Hu et al.
    2022, in peft's implementation.
    """
    from peft import LoraConfig, get_peft_model  # slow to import: only when needed

    targets = linear_maps(model, names)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    return get_peft_model(model, config)


def choose_trained(
    model: PaliGemmaForConditionalGeneration,
    patterns: Sequence[str],
    lora_rank: int = 0,
) -> "PeftModel | None":
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
    adapters: "PeftModel | None",
    dtype: torch.dtype,
) -> None:
    """Make the model an ordinary one again: adapters merged, all weights in `dtype`."""
    if adapters is not None:
        adapters.merge_and_unload()  # as `load_hf_model` merges them
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
    them, and with `save_adapter` the result is these alone. `learning_rate` 0 becomes
    1e-5, or 2e-4 with LoRA; `micro_batch_size` 0 is the whole batch. `held_out`: share
    of the pictures that are measured and never trained on, unless the data has a
    validation file. Raises ValueError for a value that can't be.
    """

    train: Sequence[str] = ALL_BUT_THE_EYES
    lora_rank: int = 0
    save_adapter: bool = False
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
        if self.save_adapter and not self.lora_rank:
            raise ValueError("save_adapter needs adapters: give a lora_rank, like 8")
        self.learning_rate = self.learning_rate or (2e-4 if self.lora_rank else 1e-5)

    @property
    def rows_at_once(self) -> int:
        """How many rows go through the model together."""
        return self.micro_batch_size or self.batch_size

    def schedule(self, num_rows: int) -> TrainingConfig:
        """Steps, warm-up (5 %) and cosine for so many rows, in chapter 17's terms."""
        steps = math.ceil(self.epochs * num_rows / self.batch_size)
        return TrainingConfig(
            steps=steps,
            learning_rate=self.learning_rate,
            warmup_steps=max(1, round(0.05 * steps)),
            final_share=0.0,
            weight_decay=self.weight_decay,
        )


STATE_FILE = "state.safetensors"
# What may change when a run goes on: what it needs and writes, not what it learns; and
# where its rows are, for their files are known by name and hash.
FREE = ("micro_batch_size", "gradient_checkpointing", "save_every", "num_workers")
FREE += ("only_cpu", "save_adapter", "data", "validation")


def write_tensors(
    tensors: dict[str, Tensor], file: Path, about: dict[str, str]
) -> None:
    """Write a safetensors file; OSError where it can't be, as for any other file."""
    try:
        save_file(tensors, file, metadata=about)
    except SafetensorError as error:
        raise OSError(f"{file} can't be written: {error}") from error


def save_state(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    settings: dict[str, Any],
) -> None:
    """Write what is trained, its moments, the step and the run's settings: one file.

    It takes its place when it is complete; until then the former one is there. What is
    on a GPU is copied to the CPU's memory for it. No `optimizer`: no step is left.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"weight.{name}"] = parameter.detach().cpu()
            for key, value in optimizer.state[parameter].items() if optimizer else ():
                tensors[f"{key}.{name}"] = torch.as_tensor(value).cpu()
    about = {"step": str(step), "settings": json.dumps(settings)}
    write_tensors(tensors, folder / "state.new", about)
    os.replace(folder / "state.new", folder / STATE_FILE)


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings of a saved run; FileNotFoundError where none is saved."""
    if not (folder / STATE_FILE).is_file():
        raise FileNotFoundError(f"nothing is saved in {folder}: start without --resume")
    with safe_open(folder / STATE_FILE, "pt") as file:
        return json.loads(file.metadata()["settings"])


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put a saved state back and return its step."""
    parameters = dict(model.named_parameters())
    with safe_open(folder / STATE_FILE, "pt") as file, torch.no_grad():
        for key in file.keys():
            kind, _, name = key.partition(".")
            value = file.get_tensor(key)
            if kind == "weight":
                parameters[name].copy_(value)
            else:
                on = "cpu" if kind == "step" else parameters[name].device
                optimizer.state[parameters[name]][kind] = value.to(on)
        return int(file.metadata()["step"])


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
    path: str | None = None  # as an adapter names it
    revision: str | None = None

    @classmethod
    def of(cls, model_path: str | os.PathLike | None) -> Self:
        """Of a folder the name alone, not the path; of a hub id the revision too."""
        found = _hub_id(model_path or EMBEDDED)
        if found is None:
            folder = find_checkpoint(model_path).absolute()
            path = folder.name if model_path is None else str(folder)
            return cls(folder.name, None, base_license(model_path), path)
        name, revision = found
        license = base_license(name)
        return cls(f"{name}@{revision}" if revision else name, name, license, *found)


CARD = """---
{head}
---
# {name}

{base}, fine-tuned with `python -m vlm.finetuning`.
{form}

## Data

{rows} rows about {pictures} pictures; of these, {held_out_rows} rows about
{held_out_pictures} pictures were held out. First words of the prompts: {tasks}.

{files}

## Loss on held-out rows

| before | after |
|---|---|
| {before:.4g} | {after:.4g} |

Mean cross-entropy of an answer's token, on pictures that were not trained on. "After"
is of what this folder gives when it is loaded. Nothing else was measured: not how good
the answers are, and not what the base model could do that this one has forgotten.

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
    is_adapter: bool = False,
) -> str:
    """README.md of a fine-tuned model: data, held-out loss, recipe, license.

    `data`, `recipe`: from `describe_run`.
    """
    library = "peft" if is_adapter else "transformers"
    head = [f"library_name: {library}", "pipeline_tag: image-text-to-text"]
    head.append("tags: [paligemma]")
    if base.license:
        head.append(f"license: {base.license}")
    if base.hub_id:
        head.append(f"base_model: {base.hub_id}")
    return CARD.format(
        head="\n".join(head),
        name=name,
        base=base.name,
        form="An adapter alone, in peft's layout: its base is loaded with it."
        if is_adapter
        else "An ordinary checkpoint, for vlm and for transformers.",
        recipe="\n".join(f"| {key} | {value} |" for key, value in recipe.items()),
        before=before,
        after=after,
        license_note=license_note(base.license),
        **data,
    )


def describe_run(
    model: PaliGemmaForConditionalGeneration,
    rows_of: dict[str, str],
    training: Sequence[Row],
    held: Sequence[Row],
    config: FineTuningConfig,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(data, recipe) for the model card; what `model` trains must have been chosen.

    `rows_of`: name and hash of each split's file.
    """
    rows = [*training, *held]
    tasks = Counter(row.prefix.split()[0] for row in rows).most_common(5)
    data = {
        "files": "\n".join(f"- {split}: {file}" for split, file in rows_of.items()),
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
    }
    if "validation" in rows_of:
        recipe["held_out"] = "the validation file"
    return data, {name: v for name, v in recipe.items() if name not in FREE}


def work_folder(output: Path) -> Path:
    """Where a run lives until it is complete: a folder beside `output`."""
    return output.with_name(output.name + ".unfinished")


def check_place(output: Path, resume: bool) -> None:
    """Raise FileExistsError where a model or another run would be overwritten.

    What an earlier run left without having saved a step is written over.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists already: choose another --output")
    work = work_folder(output)
    if (work / STATE_FILE).exists() and not resume:
        raise FileExistsError(
            f"{work} holds an unfinished run: go on with --resume, or remove it"
        )


def absolute(path: str | os.PathLike | None) -> str | None:
    """A path as it can be found from anywhere; a hub id as it is."""
    place = Path(path or "").expanduser()
    return str(place.absolute()) if path and place.exists() else path and str(path)


def find_settings(
    work: Path,
    resume: bool,
    config: FineTuningConfig | None,
    where: dict[str, str | os.PathLike | None],
) -> tuple[FineTuningConfig, dict[str, Any], dict[str, Path]]:
    """(config, settings to save, files by split); with `resume`, None is as saved.

    `where`: data, validation, model_path. Raises ValueError for a setting that a saved
    run has otherwise, FileNotFoundError where none is saved.
    """
    saved = saved_settings(work) if resume else {}
    config = config or FineTuningConfig(**saved.get("config", {}))
    where = {name: path or saved.get(name) for name, path in where.items()}
    files = find_splits(where["data"])
    if where["validation"]:
        files["validation"] = find_splits(where["validation"])["train"]
    settings = {name: absolute(path) for name, path in where.items()}
    settings["rows"] = {
        split: f"{file.name}, SHA-256 {file_hash(file)}"
        for split, file in files.items()
        if split != "test"
    }
    if resume:
        if config.dtype == "auto":
            config = replace(config, dtype=saved["config"]["dtype"])
        now = json.loads(json.dumps(settings | asdict(config)))
        check_settings(saved | saved["config"], now, FREE)
    return config, settings, files


MIXED = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


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
    device, dtype = make_accelerator(cpu=config.only_cpu).device, config.dtype
    if dtype == "auto" and device.type == "cuda":
        dtype = "16-bit"
    model, tokenizer = load_hf_model(model_path, device, dtype)
    if model.dtype not in MIXED:
        raise ValueError(f"no training in {model.dtype}: give --dtype bfloat16")
    if model.dtype == torch.float16 and device.type == "cpu":
        raise ValueError(
            "no training in float16 on the CPU: give --dtype bfloat16 or float32"
        )
    accelerator = make_accelerator(MIXED[model.dtype], config.only_cpu)
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


def save_adapter(adapters: "PeftModel", folder: Path, base: Base) -> None:
    """Write the adapters alone, in peft's layout, with the name of their base.

    Parts are named as in transformers' model, so that peft finds them there, too.
    """
    from peft import get_peft_model_state_dict

    shutil.rmtree(folder, ignore_errors=True)
    ours = (
        r"(language_model|vision_tower)\.(?:vision_)?model\.|(multi_modal_projector)\."
    )
    saved = get_peft_model_state_dict(adapters, save_embedding_layers=False)
    tensors = {re.sub(ours, r"model.\1\2.", name): t for name, t in saved.items()}
    config = adapters.peft_config["default"]
    config.base_model_name_or_path, config.revision = base.path, base.revision
    parts = {name.partition(".lora_")[0] for name in tensors}
    config.target_modules = {part.removeprefix("base_model.model.") for part in parts}
    config.save_pretrained(folder)
    write_tensors(tensors, folder / ADAPTER_FILE, {"format": "pt"})


def complete(staged: Path, output: Path, card: str) -> None:
    """Let `output` appear: what is `staged` in the run's folder, card, log, notice.

    The folder of the unfinished run is gone afterwards.
    """
    (staged / "README.md").write_text(card, encoding="utf-8")
    if license_note("gemma") in card:
        (staged / "NOTICE").write_text(GEMMA_NOTICE, encoding="utf-8")
    shutil.copy(staged.parent / "log.jsonl", staged)
    os.replace(staged, output)
    shutil.rmtree(staged.parent)


def check_space(
    work: Path, model: PaliGemmaForConditionalGeneration, config: FineTuningConfig
) -> None:
    """Raise OSError unless there is room for saved states and a result in `dtype`."""
    result = trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    if not config.save_adapter:
        result = sum(weight.numel() for weight in model.parameters())
        result *= getattr(torch, config.dtype).itemsize
        beside = [Path(model.name_or_path, name) for name in model.companions]
        result += sum(file.stat().st_size for file in beside)
    # A save, weights and two moments, is written beside the former one; the last one,
    # which has no moments, is there while the result is written.
    saves = 2 * 3 * trained if config.save_every else 0
    there = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    require_space(work, max(saves, trained + result) - there)


class FineTuning:
    """One run: everything read and checked, then `train`, then `publish`."""

    def __init__(
        self,
        output: Path,
        config: FineTuningConfig,
        settings: dict[str, Any],
        files: dict[str, Path],
        resume: bool = False,
    ):
        """`config`, `settings` and `files` are `find_settings`'."""
        self.output, self.work = output, work_folder(output)
        self.rows, self.held = read_sides(files, config.held_out, config.seed)
        model_path = settings["model_path"]
        check_names(model_path, config)
        self.accelerator, self.model, self.processor = load_for_training(
            model_path, config
        )
        positions = self.model.config.text_config.max_position_embeddings
        check_lengths([*self.rows, *self.held], self.processor, positions)
        self.base, self.dtype = Base.of(model_path), self.model.dtype
        self.config = replace(config, dtype=str(self.dtype).removeprefix("torch."))
        self.settings = settings | {"config": asdict(self.config)}
        before = None if resume else self.measure()
        torch.manual_seed(config.seed)  # of what adapters start as
        self.adapters = choose_trained(self.model, config.train, config.lora_rank)
        described = (self.model, settings["rows"], self.rows, self.held, self.config)
        self.about = describe_run(*described)  # data and recipe
        self.learner = AnswerLoss(self.model)
        self.schedule = config.schedule(len(self.rows))
        self.optimizer = make_optimizer(self.learner, self.schedule)
        self.first = load_state(self.work, self.model, self.optimizer) if resume else 0
        self.main = self.accelerator.is_main_process
        if self.main:
            check_space(self.work, self.model, self.config)
        self.accelerator.wait_for_everyone()
        self.log = TrainingLog(self.work if self.main else None, self.first)
        if before is not None:
            self.log.write(0, held_out=before)

    def measure(self) -> float:
        """The loss on the held-out rows, as the model is now."""
        size, place = self.config.rows_at_once, self.accelerator
        return held_out_loss(place, self.model, self.processor, self.held, size)

    def train(self, stop_after: int | None = None) -> bool:
        """All steps, or up to `stop_after`; the last is saved. True at the end."""
        config, total = self.config, self.schedule.steps
        loader = make_loader(self.rows, self.processor, config, self.first)
        prepared = self.accelerator.prepare(self.learner, self.optimizer, loader)
        learner, optimizer, loader = prepared
        ends = epoch_ends(len(self.rows), config.batch_size, config.epochs)
        last = min(total, stop_after or total)
        steps = range(self.first + 1, last + 1)
        bar = tqdm(steps, "fine-tuning", unit="step", disable=not self.main or None)
        for step, parts in zip(bar, loader):
            rate = learning_rate_at(step - 1, self.schedule)
            work = (self.accelerator, learner, optimizer, parts)
            loss = finetuning_step(*work, rate, config.max_grad_norm)
            self.log.add(step, loss=loss)
            save = config.save_every and step % config.save_every == 0 or step == last
            if save or step in ends or step % 10 == 0:
                values = {"learning_rate": rate}
                if step in ends and step < total:
                    values["held_out"] = self.measure()
                self.log.write(step, **values)
            if save and self.main:
                left = self.optimizer if step < total else None
                save_state(self.work, step, self.model, left, self.settings)
        self.accelerator.wait_for_everyone()
        return last == total

    def publish(self) -> None:
        """Merge, round, measure, let `output` appear; until then the state is there."""
        staged, alone = self.work / "checkpoint", self.config.save_adapter
        if self.main and alone:
            save_adapter(self.adapters, staged, self.base)
        finish(self.model, self.adapters, self.dtype)
        after = self.measure()
        if self.main and not alone:
            save_hf_model(self.model, self.processor.tokenizer, staged)
        if "held_out" not in self.log.entries[-1]:  # or it was written, and no more
            self.log.write(self.schedule.steps, held_out=after)
        if self.main:
            losses = (self.log.entries[0]["held_out"], after)
            card = model_card(self.output.name, self.base, *self.about, *losses, alone)
            complete(staged, self.output, card)
        self.accelerator.wait_for_everyone()


def finetune(
    data: str | os.PathLike | None,
    output: str | os.PathLike,
    config: FineTuningConfig | None = None,
    model_path: str | os.PathLike | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    validation: str | os.PathLike | None = None,
) -> list[dict[str, float]]:
    """Fine-tune a checkpoint on a folder's rows; returns the log, one dict a line.

    `output` appears when all is done, with checkpoint, model card and log; until then
    the run is in `output`.unfinished. The log's first line has the held-out loss
    before, its last line that of the weights in `output`. `stop_after`: save and stop
    at this step. `resume`: go on with the run that is saved there; what is None is
    taken from it, and what would change the result must be as it was. `validation`: a
    .jsonl file to measure on, instead of a part of the data.
    Raises ValueError and OSError for what a user can get wrong, FloatingPointError when
    a loss is no longer a number. Under `accelerate launch`, several processes share
    each batch and have the loss of one.
    """
    if stop_after is not None and stop_after < 1:
        raise ValueError(f"stop_after must be at least 1, not {stop_after}")
    output = Path(output).expanduser()
    check_place(output, resume)
    where = {"data": data, "validation": validation, "model_path": model_path}
    found = find_settings(work_folder(output), resume, config, where)
    run = FineTuning(output, *found, resume)
    again = run.config.gradient_checkpointing
    try:
        with gradient_checkpointing(run.model) if again else nullcontext():
            done = run.train(stop_after)
        if done:
            run.publish()
    except OSError as error:
        if not (run.work / STATE_FILE).is_file():
            raise
        raise OSError(f"{error}; --resume goes on from the last save") from error
    return run.log.entries


ABOUT = """
Fine-tune a PaliGemma on a folder of yours: pictures, and one .jsonl file with a line
for each example:
  {"image": "a.png", "prefix": "caption en", "suffix": "an owl on a roof"}
Where nothing is to be detected or segmented, the right suffix is "". A part of the
pictures is held out: the loss on them is measured before and after, and never on a
picture that was trained on. A folder with train/ and valid/ inside, each with a .jsonl
file, is read as that, and --validation names another file. What comes out is an
ordinary checkpoint with a model card, for this package and for transformers; with
--save_adapter it is what LoRA learned alone, in peft's layout, a fraction of the size.

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
    "save_adapter": "write the adapters alone, in peft's layout",
    "learning_rate": "peak; 2e-4 with LoRA",
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
    add("--validation", metavar="FILE", help="rows to measure on, instead of a share")
    add("--resume", **switch, default=False, help="go on with a saved run, as it was")
    add("--stop_after", metavar="N", type=int, help="save and stop at this step")
    for name, value in vars(FineTuningConfig()).items():
        kind = dict(type=type(value), metavar=name[0].upper())
        if isinstance(value, tuple):
            kind = dict(nargs="+", metavar="PATTERN")
        elif isinstance(value, bool):
            kind = switch
        shown = " ".join(value) if isinstance(value, tuple) else value
        add(f"--{name}", **kind, help=f"{HELP[name]}; default: {shown}")
    return parser


def parse_options(argv: list[str] | None = None) -> dict[str, Any]:
    """The command line's words → options; ValueError with one line of advice."""
    options = vars(build_parser().parse_args(argv))
    for name in ("output",) if options["resume"] else ("data", "output"):
        if options[name] is None:
            raise ValueError(f"--{name} is missing: give a folder")
    return options


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status.

    0; 2 after one line of advice; 130, as shells expect, when it was interrupted.
    """
    try:
        options = parse_options(argv)
        settings = [field.name for field in fields(FineTuningConfig)]
        given = {name: options.pop(name) for name in settings}
        given = {name: value for name, value in given.items() if value is not None}
        if options["resume"]:
            work = work_folder(Path(options["output"]).expanduser())
            given = saved_settings(work)["config"] | given
        log = finetune(**options, config=FineTuningConfig(**given))
    except KeyboardInterrupt:
        say("stopped: --resume goes on from the last save, if there is one")
        return 130
    except Exception as error:
        line = advice(
            error,
            "the run doesn't fit in the device's memory: try a smaller "
            "--micro_batch_size, --gradient_checkpointing or --lora_rank 8",
        )
        if line is None:
            raise
        say(f"error: {line}")
        return 2
    if os.environ.get("RANK", "0") != "0":
        return 0
    if not Path(options["output"]).expanduser().exists():
        print(f"stopped at step {log[-1]['step']}: go on with --resume")
    else:
        before, after = log[0]["held_out"], log[-1]["held_out"]
        print(f"loss on held-out rows: {before:.4g} before, {after:.4g} after")
        print(f"checkpoint and model card in {options['output']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
