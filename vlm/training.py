"""The trainer: accumulated steps, schedule, exact resume, log; for every objective.

Built in notebooks/20_training.ipynb: edit it there, then run `make export`.
"""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from .hub import require_space
from .paligemma import PaliGemmaForConditionalGeneration
from .runs import open_run, save_state, setting, write_log


class Objective(nn.Module):
    """A model and its K losses.

    `forward(batch)` returns them as sums, which can be added over micro-batches;
    `counts(batch)`, what each will be divided by, before anything is computed.
    """

    names: tuple[str, ...] = ("loss",)
    weights: tuple[float, ...] = (1.0,)
    matrices: Sequence[nn.Parameter] = ()  # that Muon trains; AdamW trains the others

    def counts(self, batch: Any) -> Float[Tensor, "K"]:
        """How many terms each loss of this batch sums up."""
        raise NotImplementedError


class SuffixLoss(Objective):
    """Cross-entropy of the suffix's tokens, given image and prefix."""

    def __init__(self, model: PaliGemmaForConditionalGeneration):
        super().__init__()
        self.model = model

    def counts(self, batch: dict[str, Tensor]) -> Float[Tensor, "1"]:
        """The number of labels."""
        return (batch["labels"] != -100).sum().float()[None]

    def forward(self, batch: dict[str, Tensor]) -> Float[Tensor, "1"]:
        """A batch with labels → their summed loss; no logits for the image tokens."""
        length = batch["labels"].shape[1]
        length -= self.model.config.vision_config.num_image_tokens
        loss = self.model(**batch, logits_to_keep=length)["loss"]  # a mean
        return loss * self.counts(batch)


class ChainedOptimizer(torch.optim.Optimizer):
    """Several optimizers, each with its own parameters, as one: one state, one call."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        groups = [group for one in optimizers for group in one.param_groups]
        super().__init__(groups, {})

    def step(self, closure: None = None) -> None:
        """A step of each."""
        groups = iter(self.param_groups)  # load_state_dict replaces these, and state
        for one in self.optimizers:
            one.param_groups = [next(groups) for _ in one.param_groups]
            one.state = self.state
            one.step()


WARMUP = 0.05  # of the steps: AdamW's second moments need about fifty to settle
BETAS = (0.9, 0.98)  # .999 remembers 1,000 steps, as long as a short run
MAX_GRAD_NORM = 1.0  # as in PaliGemma; a rare steep batch can't undo a hundred others
MUON_SCALE = 10.0  # times AdamW's learning rate: 0.02, its author's, in chapter 21
LOG_EVERY = 10  # steps: a line's losses are their mean


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to zero (0-based `step`).

    Source: Loshchilov & Hutter 2017.
    """
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def make_optimizer(
    module: nn.Module, weight_decay: float, matrices: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Muon for `matrices`, AdamW for all others that aren't frozen.

    Weight decay on matrices only. `training_step` sets the learning rate, times a
    group's "scale". Sources: Loshchilov & Hutter 2019, Jordan et al. 2024.
    """
    by_muon = {id(p) for p in matrices}
    trained = [
        p for p in module.parameters() if p.requires_grad and id(p) not in by_muon
    ]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=BETAS)
    if not matrices:
        return adamw
    group = {"params": list(matrices), "scale": MUON_SCALE}
    return ChainedOptimizer(adamw, torch.optim.Muon([group], weight_decay=weight_decay))


def make_accelerator(mixed_precision: str = "no") -> Accelerator:
    """An `Accelerator` that shares out whole batches, whatever ran before it.

    Under a launcher with several processes the device stays that of the first run.
    """
    # Accelerate keeps format and device for the life of a process, and refuses another
    # format. Forgetting both allows a second run; a group of processes has to stay.
    alone = not torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=alone)
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    if mixed_precision == "fp16" and accelerator.scaler is None:  # it would be float32
        raise ValueError(f"no fp16 on {accelerator.device.type}: use bf16 or no")
    return accelerator


def micro_batches(items: list[Any], collate: Callable, size: int) -> list[Any]:
    """Items → batches of at most `size` (0: one of all), each made by `collate`."""
    size = size or len(items)
    return [collate(items[i : i + size]) for i in range(0, len(items), size)]


def training_step(
    accelerator: Accelerator,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Any],
    learning_rate: float,
) -> dict[str, float]:
    """One update from this process's micro-batches; returns the batch's losses.

    Each sum is divided by its count over all micro-batches of all processes: the same
    update, however a batch is cut. Raises FloatingPointError for NaN or infinity.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("scale", 1.0)
    plain = accelerator.unwrap_model(objective)
    counts = torch.stack([plain.counts(batch) for batch in micro_batches]).sum(dim=0)
    counts = accelerator.reduce(counts, "sum").clamp(min=1)  # [K]
    weights = counts.new_tensor(plain.weights)  # [K]
    losses = torch.zeros_like(counts)  # [K]
    for number, batch in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)  # only then do processes share gradients
        with nullcontext() if last else accelerator.no_sync(objective):
            part = objective(batch) / counts  # [K]
            # Gradients are averaged over processes, and should be summed.
            accelerator.backward((part * weights).sum() * accelerator.num_processes)
        losses += part.detach()
    norm = accelerator.clip_grad_norm_(objective.parameters(), MAX_GRAD_NORM)
    values = accelerator.reduce(losses, "sum").tolist()
    checked = [*values, norm] if accelerator.scaler is None else values
    if not all(map(math.isfinite, checked)):  # a scaler skips steps that overflow
        advice = "lower the learning rate, or use float32"
        raise FloatingPointError(f"a loss {values} or gradient is NaN or inf: {advice}")
    optimizer.step()
    optimizer.zero_grad()
    return dict(zip(plain.names, values, strict=True))


@dataclass(kw_only=True)
class TrainingConfig:
    """The settings that every run has; ValueError for a value that can't be."""

    steps: int = setting(1000, "updates of the weights")
    batch_size: int = setting(64, "examples an update, all processes together")
    micro_batch_size: int = setting(0, "examples at once in a process; 0: all of them")
    learning_rate: float = setting(1e-3, "peak, after the warm-up")
    weight_decay: float = setting(0.0, "of matrices; vectors have none")
    mixed_precision: str = setting("no", "in autocast", choices=("no", "bf16", "fp16"))
    seed: int = setting(0, "of data and initial values")
    num_workers: int = setting(0, "processes that prepare data")
    eval_every: int = setting(0, "steps between validations; 0: only at the end")
    save_every: int = setting(500, "steps between saves; 0: only at the end")

    def __post_init__(self) -> None:
        for option in fields(self):
            name, value = option.name, getattr(self, option.name)
            least = 1 if name in ("steps", "batch_size", "epochs") else 0
            if option.type in (int, float) and not least <= value < math.inf:
                raise ValueError(f"{name} must be at least {least}, not {value}")
            choices = option.metadata.get("choices", (value,))
            if value not in choices:
                raise ValueError(f"{name} is one of {[*choices]}, not {value!r}")


def _trained(objective: nn.Module) -> dict[str, Tensor]:
    "What a step may change: parameters that aren't frozen, and buffers."
    parameters = objective.named_parameters()
    trained = {name: p.detach() for name, p in parameters if p.requires_grad}
    return trained | dict(objective.named_buffers())


def _make_loader(
    dataset: Dataset, collate: Callable, config: TrainingConfig, first: int, last: int
) -> DataLoader:
    "The batches of the steps after `first`, to `last`; each a list of micro-batches."
    items = Subset(dataset, range(first * config.batch_size, last * config.batch_size))
    split = partial(micro_batches, collate=collate, size=config.micro_batch_size)
    # Of its own: an iterator draws a number, and ours must be as they were.
    options = {"num_workers": config.num_workers, "generator": torch.Generator()}
    return DataLoader(items, config.batch_size, collate_fn=split, **options)


def train(
    objective: Objective,
    dataset: Dataset,
    collate: Callable[[list[Any]], Any],
    config: TrainingConfig,
    output: Path | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    about: dict[str, Any] | None = None,
    free: Sequence[str] = (),
    result_bytes: int = 0,
) -> list[dict[str, float]]:
    """Train `objective` in place; returns the log, one dict a line.

    Step s takes items (s - 1) * batch_size … s * batch_size - 1 of `dataset`, so an
    item should depend on its index alone. `output`: where the caller will `publish` a
    result of `result_bytes`; until then log and state lie beside it (None: nowhere).
    `stop_after`: save and stop at this step. `evaluate(step)`: more to log, every
    `eval_every` steps (then also before the first) and last. `about`: what else must
    be the same when a run is resumed, but for the names in `free`. Raises as
    `open_run`, `training_step`, `require_space`, `save_state`; ValueError for a batch
    that processes can't share.
    """
    accelerator = make_accelerator(config.mixed_precision)
    settings = asdict(config) | (about or {})
    state = open_run(output, settings, resume, free)
    if output:
        size = 3 * sum(t.nbytes for t in _trained(objective).values())  # and moments
        require_space(output, (0 if resume else size) + max(size, result_bytes))
    first, last = state["step"], min(stop_after or config.steps, config.steps)
    if stop_after is not None and stop_after <= first:
        raise ValueError(f"stop_after={stop_after}: the run is at step {first} already")
    loader = _make_loader(dataset, collate, config, first, last)
    optimizer = make_optimizer(objective, config.weight_decay, objective.matrices)
    plain, main = objective, accelerator.is_main_process
    objective, optimizer, loader = accelerator.prepare(plain, optimizer, loader)
    stateful = {"optimizer": optimizer, "scaler": accelerator.scaler}  # float16's
    stateful = {name: part for name, part in stateful.items() if part}
    torch.manual_seed(config.seed)
    if resume:
        for name, tensor in _trained(plain).items():
            tensor.copy_(state["trained"][name])
        torch.set_rng_state(state["generator"])
        for name, part in stateful.items():
            part.load_state_dict(copy.deepcopy(state[name]))
    log, output = state["log"], output if main else None  # one writes
    del state  # three times the weights
    write_log(output, log)
    eval_every = config.eval_every or config.steps

    def add_to_log(step: int, values: dict[str, float]) -> None:
        log.append({"step": step} | {name: float(v) for name, v in values.items()})
        write_log(output, log[-1:], "a")

    def log_evaluation(step: int) -> None:
        objective.eval()
        add_to_log(step, evaluate(step))
        objective.train()

    if evaluate and config.eval_every and first == 0:
        log_evaluation(0)
    objective.train()
    bar = tqdm(range(first + 1, last + 1), "training", disable=None if main else True)
    losses = []
    for step, parts in zip(bar, loader):
        rate = learning_rate_at(step - 1, config.steps, config.learning_rate)
        losses.append(training_step(accelerator, objective, optimizer, parts, rate))
        saves = step == last or step % (config.save_every or last) == 0
        evaluates = step == config.steps or step % eval_every == 0
        if saves or evaluates or step % LOG_EVERY == 0:
            means = {k: sum(one[k] for one in losses) / len(losses) for k in losses[0]}
            add_to_log(step, {"learning_rate": rate} | means)
            losses.clear()
            bar.set_postfix(log[-1], refresh=False)
        if evaluate and evaluates:
            log_evaluation(step)
        if output and saves:
            state = {"step": step, "settings": settings, "log": log}
            state |= {"trained": _trained(plain), "generator": torch.get_rng_state()}
            state |= {name: part.state_dict() for name, part in stateful.items()}
            save_state(output, state)
    accelerator.wait_for_everyone()
    objective.eval()
    return log
