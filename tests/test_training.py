"""The trainer: steps, schedule, saving, resuming, several processes, the command."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from reference import ROOT, random_inputs, run_in_two_processes, tiny_config
from torch import nn
from torch.utils.data import Dataset

from vlm import runs
from vlm.mask_tokens import DECODER_FILE, ENCODER_FILE, MaskVQVAE
from vlm.mask_training import MaskDataset, MaskTrainingConfig, main
from vlm.paligemma import PaliGemmaForConditionalGeneration
from vlm.runs import open_run, run_command, run_folder, setting
from vlm.scenes import TRAINING_SEEDS, TRAINING_STYLES
from vlm.training import (
    SuffixLoss,
    TrainingConfig,
    learning_rate_at,
    make_accelerator,
    make_optimizer,
    micro_batches,
    train,
    training_step,
)

CONFIG = TrainingConfig(steps=8, batch_size=4, learning_rate=1e-2, save_every=3)


class Rows(Dataset):
    """Random rows with suffixes of one to four tokens; a row depends on its index."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        with torch.random.fork_rng():
            torch.manual_seed(index)
            suffixes = (4, 1 + index % 4)  # the first row sets the length
            rows = random_inputs(tiny_config(), (5, 5), suffixes, padding="right")
        return {name: tensor[1:] for name, tensor in rows.items()}


def collate(items):
    return {name: torch.cat([item[name] for item in items]) for name in items[0]}


class NoisyLoss(SuffixLoss):
    """Draws a random number in every forward pass, as dropout would."""

    def forward(self, batch):
        return super().forward(batch) * (0.5 + torch.rand(()))


def hidden_matrices(one):
    layers = one.model.language_model.model.layers
    return [p for p in layers.parameters() if p.ndim == 2]


class LossByMuon(SuffixLoss):
    """Muon trains the matrices of the decoder's layers."""

    def __init__(self, model):
        super().__init__(model)
        self.matrices = hidden_matrices(self)


def objective(seed=0, kind=SuffixLoss):
    torch.manual_seed(seed)
    return kind(PaliGemmaForConditionalGeneration(tiny_config()))


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def run(output=None, config=CONFIG, seed=0, kind=SuffixLoss, **options):
    """Train; returns the log and the weights at the end."""
    one = objective(seed, kind)
    log = train(one, Rows(), collate, config, output, **options)
    return log, weights(one)


@pytest.fixture(scope="module")
def first_half(tmp_path_factory):
    """The folder of a run that was stopped after three of its eight steps."""
    output = tmp_path_factory.mktemp("run") / "out"
    run(output, stop_after=3)
    return run_folder(output)


@pytest.fixture
def output(first_half, tmp_path):
    """The output of a copy of that run, to go on with."""
    shutil.copytree(first_half, tmp_path / "out.unfinished")
    return tmp_path / "out"


def read_log(folder):
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def saved_state(output):
    return open_run(output, {}, resume=True)


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}


# A step


def test_learning_rate_rises_then_falls():
    rates = [learning_rate_at(step, 100, 2.0) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[5] == 2.0 and rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[5 + 95 // 2] == pytest.approx(1.0, abs=0.05)
    assert 0 < rates[-1] < 0.01
    assert learning_rate_at(0, 30, 2.0) == 1.0  # two steps of warm-up
    assert learning_rate_at(0, 1, 2.0) == 2.0


def test_weight_decay_is_for_matrices_and_frozen_parameters_are_left_out():
    one = objective()
    one.model.vision_tower.requires_grad_(False)
    decayed, plain = make_optimizer(one, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 for p in plain["params"])
    trained = [p for p in one.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(plain["params"]) == len(trained)


def test_muon_moves_the_matrices_it_is_given_and_adamw_the_others():
    """A step is what PyTorch's two make, each with its own learning rate."""
    ours, theirs = objective(), objective()
    for one in (ours, theirs):
        for number, parameter in enumerate(one.parameters()):
            noise = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=noise)
    optimizer = make_optimizer(ours, 0.1, hidden_matrices(ours))
    for group in optimizer.param_groups:
        group["lr"] = 2e-3 * group.get("scale", 1.0)
    optimizer.step()
    matrices = hidden_matrices(theirs)
    ids = {id(p) for p in matrices}
    others = [p for p in theirs.parameters() if id(p) not in ids]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.98)).step()
    torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1).step()
    assert_equal_weights(weights(ours), weights(theirs))
    optimizer.zero_grad()
    assert all(p.grad is None for p in ours.parameters())


def test_suffix_loss_is_the_models_own_without_logits_of_the_image(monkeypatch):
    one, batch = objective(), collate([Rows()[i] for i in range(4)])
    expected = one.model(**batch)["loss"]
    kept = []
    forward = one.model.forward

    def spy(*args, **options):
        outputs = forward(*args, **options)
        kept.append(outputs["logits"].shape[1])
        return outputs

    monkeypatch.setattr(one.model, "forward", spy)
    torch.testing.assert_close(one(batch) / one.counts(batch), expected[None])
    assert kept == [batch["input_ids"].shape[1] - 4]
    assert one.counts(batch).item() == 1 + 2 + 3 + 4


def test_micro_batches_cut_and_collate():
    assert micro_batches([1, 2, 3, 4, 5], sum, 2) == [3, 7, 5]
    assert micro_batches([1, 2, 3], sum, 0) == [6]


def one_step(parts, step=training_step):
    one = objective()
    optimizer = torch.optim.SGD(one.parameters(), lr=1.0)
    losses = step(make_accelerator(), one, optimizer, parts, 1.0)
    return losses, nn.utils.parameters_to_vector(one.parameters())


def test_micro_batches_are_the_whole_batch():
    """And the mean of their means isn't: the parts have 3, 7 and 1 labels."""
    items = [Rows()[i] for i in range(5)]
    whole, moved = one_step([collate(items)])
    parts = micro_batches(items, collate, 2)
    losses, together = one_step(parts)
    assert losses["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    torch.testing.assert_close(moved, together, atol=1e-6, rtol=0)

    def mean_of_means(accelerator, one, optimizer, parts, learning_rate):
        for part in parts:
            (one(part) / one.counts(part) / len(parts)).sum().backward()
        nn.utils.clip_grad_norm_(one.parameters(), 1.0)
        optimizer.step()

    _, wrong = one_step(parts, mean_of_means)
    assert (wrong - moved).abs().max() > 1e-3


def test_gradients_are_clipped_together():
    one = objective()
    before = nn.utils.parameters_to_vector(one.parameters()).detach().clone()
    for p in one.parameters():
        p.register_hook(lambda gradient: 1000 * gradient)
    optimizer = torch.optim.SGD(one.parameters(), lr=1.0)
    batch = collate([Rows()[0]])
    training_step(make_accelerator(), one, optimizer, [batch], 0.5)
    after = nn.utils.parameters_to_vector(one.parameters())
    assert (after - before).norm().item() == pytest.approx(0.5, rel=1e-3)


def test_a_gradient_that_is_not_finite_stops_the_run_before_its_update():
    """The root at 0: a finite loss, an infinite slope."""

    class Root(SuffixLoss):
        def forward(self, batch):
            zero = sum(p.square().sum() for p in self.parameters()) * 0
            return super().forward(batch) + zero.sqrt()

    one = Root(objective().model)
    before = nn.utils.parameters_to_vector(one.parameters()).detach().clone()
    optimizer = torch.optim.SGD(one.parameters(), lr=1.0)
    with pytest.raises(FloatingPointError, match="gradient"):
        training_step(make_accelerator(), one, optimizer, [collate([Rows()[0]])], 0.5)
    assert torch.equal(nn.utils.parameters_to_vector(one.parameters()), before)


def test_float16_is_refused_where_it_would_silently_be_float32():
    with pytest.raises(ValueError, match="no fp16 on cpu"):
        make_accelerator("fp16")


def test_a_loss_that_is_not_a_number_stops_the_run_before_its_update(tmp_path):
    class Broken(SuffixLoss):
        calls = 0

        def forward(self, batch):
            Broken.calls += 1
            return super().forward(batch) * (math.nan if Broken.calls == 5 else 1)

    config = replace(CONFIG, save_every=4)
    with pytest.raises(FloatingPointError, match="NaN"):
        run(tmp_path / "out", config, kind=Broken)
    state = saved_state(tmp_path / "out")
    assert state["step"] == 4
    assert all(t.isfinite().all() for t in state["trained"].values())
    # As if it had been stopped there by hand.
    run(tmp_path / "same", config, stop_after=4)
    same = saved_state(tmp_path / "same")["trained"]
    assert_equal_weights(state["trained"], same)


def test_runs_follow_each_other_in_one_process():
    """Whatever the one before computed in, each is as it would be on its own."""
    logs = []
    for mixed_precision in ("no", "bf16", "no"):
        log, trained = run(config=replace(CONFIG, mixed_precision=mixed_precision))
        logs.append([entry["loss"] for entry in log])
        assert {t.dtype for t in trained.values()} == {torch.float32}
    assert logs[0] == logs[2] != logs[1]
    assert logs[1] == pytest.approx(logs[0], rel=0.02)


def test_another_device_than_the_run_before(monkeypatch):
    """On a GPU, then on the CPU, and back: PyTorch's meta device plays the GPU."""
    gpu, cpu = ("ACCELERATE_TORCH_DEVICE", "meta"), ("ACCELERATE_USE_CPU", "true")
    for variable, value in (gpu, cpu, gpu):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            device = "meta" if value == "meta" else "cpu"
            assert make_accelerator().device.type == device
    assert make_accelerator().device.type != "meta"


def test_the_log_has_mean_losses_and_what_is_evaluated():
    config, modes = replace(CONFIG, steps=25, eval_every=20), []
    one = objective()

    def evaluate(step):
        modes.append((step, one.training))
        return {"score": float(step)}

    log = train(one, Rows(), collate, config, evaluate=evaluate)
    assert modes == [(0, False), (20, False), (25, False)] and not one.training
    losses = [entry["step"] for entry in log if "loss" in entry]
    assert losses == [3, 6, 9, 10, 12, 15, 18, 20, 21, 24, 25]
    assert [e for e in log if "score" in e] == [
        {"step": step, "score": float(step)} for step, _ in modes
    ]
    every = train(objective(), Rows(), collate, replace(config, save_every=1))
    by_step = {e["step"]: e["loss"] for e in every}
    means = {e["step"]: e["loss"] for e in log if "loss" in e}
    expected = (by_step[4] + by_step[5] + by_step[6]) / 3
    assert means[6] == pytest.approx(expected)
    again = train(objective(), Rows(), collate, CONFIG, evaluate=evaluate)
    assert [e["step"] for e in again if "score" in e] == [8]  # eval_every = 0


# Stopped and resumed


@pytest.mark.parametrize("kind", [SuffixLoss, NoisyLoss, LossByMuon])
@pytest.mark.parametrize("changed", [{}, {"micro_batch_size": 4, "num_workers": 2}])
def test_a_resumed_run_is_one_in_one_go(kind, changed, tmp_path):
    """To the bit: losses, weights and log, also where the forward pass is random."""
    whole, expected = run(tmp_path / "whole", kind=kind)
    run(tmp_path / "parts", kind=kind, stop_after=3)
    config = replace(CONFIG, **changed)
    log, trained = run(tmp_path / "parts", config, seed=9, kind=kind, resume=True)
    assert log == whole and [entry["step"] for entry in log] == [3, 6, 8]
    assert_equal_weights(trained, expected)
    assert read_log(run_folder(tmp_path / "parts")) == whole


@pytest.mark.parametrize("part", ["optimizer", "generator", "trained"])
def test_every_part_of_the_state_matters(part, tmp_path):
    """The test above would notice if one of them weren't restored."""
    whole, _ = run(tmp_path / "whole", kind=NoisyLoss)
    run(tmp_path / "parts", kind=NoisyLoss, stop_after=3)
    state = saved_state(tmp_path / "parts")
    if part == "optimizer":
        state[part]["state"] = {}
    elif part == "generator":
        state[part] = torch.Generator().manual_seed(1).get_state()
    else:
        state[part] = {name: t + 0.01 for name, t in state[part].items()}
    runs.save_state(tmp_path / "parts", state)
    log, _ = run(tmp_path / "parts", kind=NoisyLoss, resume=True)
    assert log[0] == whole[0] and log[-1] != whole[-1]


SCRIPT = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_training import CONFIG, NoisyLoss, Rows, collate, objective
from vlm.training import train

class Deadly(Rows):
    def __getitem__(self, index):
        if index == {deadly}:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)

config = replace(CONFIG, eval_every=2)
train(objective(kind=NoisyLoss), Deadly(), collate, config, Path({output!r}))
"""


def test_a_run_that_is_killed_between_saves_goes_on(tmp_path):
    """SIGKILL as the fifth step begins (its successor is loaded), two after a save.

    Nothing tidies up.
    """
    output = tmp_path / "out"
    tests = str(ROOT / "tests")
    script = SCRIPT.format(tests=tests, deadly=5 * 4 + 2, output=str(output))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert saved_state(output)["step"] == 3
    assert read_log(run_folder(output))[-1]["step"] == 4
    config = replace(CONFIG, eval_every=2)
    whole, expected = run(tmp_path / "whole", config, kind=NoisyLoss)
    log, trained = run(output, config, seed=9, kind=NoisyLoss, resume=True)
    assert log == whole and [entry["step"] for entry in log] == [2, 3, 4, 6, 8]
    assert_equal_weights(trained, expected)


def test_killed_between_writing_and_renaming(output, monkeypatch):
    """The former state is there, whole, and the run goes on from it."""
    former = (run_folder(output) / runs.STATE_FILE).read_bytes()
    replace_file = os.replace

    def stop(source, target):
        if Path(target).name == runs.STATE_FILE:
            raise KeyboardInterrupt
        return replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("vlm.runs.os.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            run(output, resume=True)
    assert (run_folder(output) / runs.STATE_FILE).read_bytes() == former
    assert run(output, resume=True)[0] == run()[0]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos"),
    ],
)
def test_a_full_disk_leaves_the_former_state(error, output, monkeypatch):
    former = contents(run_folder(output))

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("vlm.runs.torch.save", full)
        with pytest.raises(OSError, match="step 6 can't be saved.*--resume"):
            run(output, resume=True)
    after = contents(run_folder(output))
    assert after[runs.STATE_FILE] == former[runs.STATE_FILE]
    assert sorted(after) == ["log.jsonl", "trainer.pt"]
    assert run(output, resume=True)[0] == run()[0]


def test_a_log_that_a_full_disk_cut_is_mended(output):
    with (run_folder(output) / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lear')  # as much of a line as there was space for
    log, _ = run(output, resume=True)
    assert log == run()[0] == read_log(run_folder(output))


def test_numbers_of_other_libraries_dont_spoil_the_saved_log(tmp_path):
    """NumPy's can't be loaded with weights_only."""
    config = replace(CONFIG, eval_every=1)
    options = {"config": config, "evaluate": lambda step: {"score": np.float64(step)}}
    run(tmp_path / "out", stop_after=3, **options)
    log, _ = run(tmp_path / "out", resume=True, **options)
    assert log == run(**options)[0]


@pytest.mark.parametrize("name, saves", [("new", 2), ("out", 1)])
def test_space_is_checked_before_the_first_step(name, saves, output, monkeypatch):
    """For two states, or one beside that which is there: weights and two moments."""
    size = 3 * sum(t.nbytes for t in saved_state(output)["trained"].values())
    where = output.with_name(name)
    for free in (saves * size - 1, saves * size):
        disk = shutil.disk_usage(output.parent)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda place, disk=disk: disk)
        if free < saves * size:
            with pytest.raises(OSError, match="free in"):
                run(where, resume=name == "out")
        else:
            run(where, resume=name == "out")


@pytest.mark.parametrize(
    "other",
    [dict(seed=99), dict(learning_rate=9.0), dict(steps=9), dict(batch_size=8)],
)
def test_a_run_goes_on_with_its_own_settings(other, output):
    """Another one is refused by name, and nothing has been changed then."""
    before = contents(run_folder(output))
    ((name, value),) = other.items()
    with pytest.raises(ValueError, match=rf"{name} .*{value}"):
        run(output, replace(CONFIG, **other), resume=True)
    assert before == contents(run_folder(output))


def test_what_the_caller_adds_must_be_the_same_too(tmp_path):
    about = {"data": "abc", "place": "here"}
    run(tmp_path / "out", stop_after=3, about=about)
    with pytest.raises(ValueError, match="data 'abc', not 'xyz'"):
        run(tmp_path / "out", resume=True, about=about | {"data": "xyz"})
    moved = about | {"place": "there"}
    with pytest.raises(ValueError, match="place"):
        run(tmp_path / "out", resume=True, about=moved)
    run(tmp_path / "out", resume=True, about=moved, free=("place",))


def test_what_only_says_who_computes_and_when_it_saves_may_change(output):
    free = dict(micro_batch_size=1, num_workers=1, eval_every=2, save_every=1)
    log, _ = run(output, replace(CONFIG, **free), resume=True)
    assert [entry["step"] for entry in log] == [3, 4, 5, 6, 7, 8]
    assert log[-1]["loss"] == pytest.approx(run()[0][-1]["loss"], rel=0.2)


def test_a_stop_that_has_been_passed_is_refused(output):
    for stop in (3, 0):
        with pytest.raises(ValueError, match="stop_after"):
            run(output, resume=True, stop_after=stop)


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved run for output None"):
        run(resume=True)
    with pytest.raises(FileNotFoundError, match="--resume"):
        run(tmp_path / "out", resume=True)


def test_nothing_is_overwritten(output, tmp_path):
    with pytest.raises(FileExistsError, match="unfinished run"):
        run(output)
    (tmp_path / "done").mkdir()
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="exists already"):
            run(tmp_path / "done", resume=resume)


def test_what_is_frozen_is_neither_saved_nor_changed(tmp_path):
    def frozen():
        one = objective()
        one.model.vision_tower.requires_grad_(False)
        return one

    one, before = frozen(), weights(frozen().model.vision_tower)
    config = replace(CONFIG, weight_decay=0.5)
    train(one, Rows(), collate, config, tmp_path / "out", stop_after=3)
    assert_equal_weights(weights(one.model.vision_tower), before)
    state = saved_state(tmp_path / "out")
    trained = {name for name, p in one.named_parameters() if p.requires_grad}
    buffers = {name for name, _ in one.named_buffers()}
    assert set(state["trained"]) == trained | buffers
    assert len(state["optimizer"]["state"]) == len(trained)
    resumed = train(frozen(), Rows(), collate, config, tmp_path / "out", resume=True)
    assert resumed == train(frozen(), Rows(), collate, config)


def test_a_run_that_was_trained_but_not_published_goes_on(tmp_path):
    whole, _ = run(tmp_path / "out")
    log, _ = run(tmp_path / "out", seed=9, resume=True)
    assert log == whole


# Several processes


def test_every_process_has_the_whole_log_and_one_writes_it(output, monkeypatch):
    whole, former = run()[0], contents(run_folder(output))
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    assert run(output, resume=True)[0] == whole
    assert contents(run_folder(output)) == former


def test_a_batch_that_processes_cant_share(monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(ValueError, match="batch size .4. .* processes .3."):
        run()


def small_step(accelerator, items):
    """Weights after a step of plain descent on a loss too small to be clipped."""
    one = objective()
    one.weights = (1e-3,)
    optimizer = torch.optim.SGD(one.parameters(), lr=100.0)
    prepared, optimizer = accelerator.prepare(one, optimizer)
    training_step(accelerator, prepared, optimizer, [collate(items)], 100.0)
    return nn.utils.parameters_to_vector(one.parameters()).detach()


TWO = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
sys.path[:0] = [{tests!r}]
from test_training import CONFIG, Rows, run, small_step
from vlm.mask_training import MaskTrainingConfig, train_mask_tokens
from vlm.training import make_accelerator
torch.set_num_threads(1)
folder = Path({folder!r})
run(config=replace(CONFIG, steps=1, mixed_precision="bf16"))  # another one before
run(folder / "text", replace(CONFIG, micro_batch_size=1))
config = MaskTrainingConfig(steps=3, batch_size=2, save_every=1)
train_mask_tokens(config, folder / "masks")
accelerator = make_accelerator()
items = [Rows()[i] for i in range(4)]
mine = items[:1] if accelerator.is_main_process else items[1:]
moved = small_step(accelerator, mine)
if accelerator.is_main_process:
    torch.save(moved, folder / "moved.pt")
print(f"one of {{accelerator.num_processes}} processes")
"""


def test_two_processes_are_one(tmp_path, monkeypatch):
    """Losses, weights and codebook; whatever was trained in the process before.

    AdamW hardly sees a factor in the gradients, so one step goes without it, with one
    row in the first process and three in the second.
    """
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as they will have it
    script = tmp_path / "run.py"
    script.write_text(
        TWO.format(tests=str(ROOT / "tests"), folder=str(tmp_path / "two"))
    )
    done = run_in_two_processes(script)
    assert done.stdout.count("one of 2 processes") == 2, done.stdout
    expected = small_step(make_accelerator(), [Rows()[i] for i in range(4)])
    moved = torch.load(tmp_path / "two" / "moved.pt", weights_only=True)
    start = nn.utils.parameters_to_vector(objective().parameters())
    assert (expected - start).abs().max() > 1e-3
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)
    one, trained = run(tmp_path / "text")
    two_log = read_log(run_folder(tmp_path / "two" / "text"))
    assert [e["step"] for e in two_log] == [e["step"] for e in one]
    for a, b in zip(one, two_log):
        assert a == pytest.approx(b, rel=1e-4)
    for name, tensor in saved_state(tmp_path / "two" / "text")["trained"].items():
        if name in trained:
            # AdamW divides by a gradient's own size: where that is tiny, so is
            # what two orders of summation agree on.
            torch.testing.assert_close(tensor, trained[name], atol=1e-3, rtol=0)
    arguments = ["--steps", "3", "--batch_size", "2", "--save_every", "1"]
    assert main(["--output", str(tmp_path / "masks"), *arguments]) == 0
    pair = [folder / "masks" for folder in (tmp_path, tmp_path / "two")]
    for a, b in zip(*map(read_log, pair), strict=True):
        if "commitment" in a:
            assert a == pytest.approx(b, rel=1e-3)
    books = [MaskVQVAE.from_pretrained(f).decoder.codebook._embedding for f in pair]
    torch.testing.assert_close(*books, atol=1e-3, rtol=0)


# The command


@pytest.fixture
def tiny_masks(monkeypatch):
    """Scenes to evaluate on are few."""
    monkeypatch.setattr("vlm.mask_training.VALIDATION_SEEDS", range(10**9, 10**9 + 2))
    return ["--steps", "4", "--batch_size", "1", "--save_every", "2"]


def test_masks_of_training_scenes_by_index(monkeypatch):
    drawn = []
    from vlm.scenes import make_scene

    def spy(seed, size, styles):
        drawn.append((seed, size, styles))
        return make_scene(seed, size, styles)

    monkeypatch.setattr("vlm.mask_training.make_scene", spy)
    data, last = MaskDataset(), len(TRAINING_SEEDS) - 1
    one, two, far = data[5], data[5], data[last]
    assert torch.equal(one, two) and one.shape[1:] == far.shape[1:] == (1, 64, 64)
    assert [seed for seed, *_ in drawn] == [5, 5, last]
    assert {styles for *_, styles in drawn} == {TRAINING_STYLES}
    assert one.min() >= -1 and one.max() <= 1


def test_masks_dont_come_in_micro_batches():
    with pytest.raises(ValueError, match="micro_batch_size"):
        MaskTrainingConfig(micro_batch_size=2)


def test_a_published_output_is_complete(tmp_path, tiny_masks, capsys):
    """One run at once, and one in two parts: the same files, and nothing beside."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["--output", str(whole), *tiny_masks]) == 0
    assert main(["--output", str(parts), *tiny_masks, "--stop_after", "2"]) == 0
    assert not parts.exists() and run_folder(parts).exists()
    assert "--resume" in capsys.readouterr().out
    assert main(["--output", str(parts), "--resume"]) == 0
    assert str(parts) in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]
    assert sorted(contents(whole)) == sorted([ENCODER_FILE, DECODER_FILE, "log.jsonl"])
    assert contents(whole) == contents(parts)
    MaskVQVAE.from_pretrained(whole)
    entries = read_log(whole)
    assert entries[0].keys() == {"step", "mean_iou", "codes_used"}
    assert entries[-2].keys() == {
        *("step", "learning_rate", "reconstruction", "commitment")
    }


def test_killed_between_the_moves_of_publishing(tmp_path, tiny_masks, monkeypatch):
    """The log is in the result by then, and the result isn't yet where it belongs."""
    whole, output = tmp_path / "whole", tmp_path / "out"
    assert main(["--output", str(whole), *tiny_masks]) == 0
    replace_file = os.replace

    def stop(source, target):
        if target == output:
            raise KeyboardInterrupt
        return replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("vlm.runs.os.replace", stop)
        assert main(["--output", str(output), *tiny_masks]) == 130
    assert not output.exists() and not (run_folder(output) / "log.jsonl").exists()
    assert main(["--output", str(output), "--resume"]) == 0
    assert contents(output) == contents(whole)


def test_dead_codes_are_revived_the_same_after_a_resume(tmp_path, tiny_masks):
    """With a codebook in which most are dead at once: random draws in every step."""
    from vlm.mask_training import MaskObjective

    def vqvae(seed):
        torch.manual_seed(seed)
        return MaskVQVAE(dead_threshold=1.0)

    config = MaskTrainingConfig(steps=4, batch_size=1, save_every=2)
    arguments = (MaskDataset(), torch.cat, config)
    whole, first, second = vqvae(0), vqvae(0), vqvae(1)
    train(MaskObjective(whole), *arguments)
    train(MaskObjective(first), *arguments, tmp_path / "out", stop_after=2)
    train(MaskObjective(second), *arguments, tmp_path / "out", resume=True)
    assert_equal_weights(weights(whole), weights(second))
    assert torch.equal(whole.counts, second.counts)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--resume"], "no saved run"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--batch_size", "-1"], "batch_size must be at least 1"),
        (["--save_every", "-1"], "save_every must be at least 0"),
        (["--learning_rate", "nan"], "learning_rate must be at least 0"),
        (["--mixed_precision", "fp8"], "fp8"),
        (["--stop_after", "0"], "stop_after=0"),
        (["--lerning_rate", "1"], "--lerning_rate"),
        (["--steps", "two"], "'two'"),
        (["--micro_batch_size", "1"], "micro_batch_size"),
    ],
)
def test_command_line_errors_are_one_line(
    arguments, message, tmp_path, capsys, tiny_masks
):
    assert main(["--output", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


def test_output_is_required_and_help_lists_every_flag(capsys):
    assert main([]) == 2
    assert "--output" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "--num_workers" in shown and "5000" in shown


@dataclass(kw_only=True)
class Switches(TrainingConfig):
    light: bool = setting(False, "a switch")
    names: tuple[str, ...] = setting(("a",), "some names", type=str, nargs="+")

    def __post_init__(self):
        super().__post_init__()
        self.names = tuple(self.names)


def command(arguments, run):
    """Status of a command with two more flags."""
    return run_command("A test.", Switches, run, arguments)


def test_flags_of_all_kinds(tmp_path, capsys):
    seen = []

    def run(config, output, resume, stop_after):
        seen.append((config.light, config.names, config.steps, stop_after))
        return "done"

    base = ["--output", str(tmp_path / "x")]
    for more in ([], ["--light"], ["--light", "False"], ["--names", "b", "c"]):
        assert command([*base, *more, "--steps", "7"], run) == 0
    names = [("a",), ("a",), ("a",), ("b", "c")]
    assert [s[:2] for s in seen] == list(zip((False, True, False, False), names))
    assert all(s[2:] == (7, None) for s in seen)
    assert command([*base, "--light", "maybe"], run) == 2
    assert "done" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, status, message",
    [
        (KeyboardInterrupt(), 130, "--resume"),
        (OSError("no room"), 2, "error: no room"),
        (FloatingPointError("NaN"), 2, "error: NaN"),
        (MemoryError(), 2, "micro_batch_size"),
        (RuntimeError("CUDA out of memory. Tried to"), 2, "micro_batch_size"),
    ],
)
def test_what_ends_a_run_is_one_line(error, status, message, tmp_path, capsys):
    def run(*arguments):
        raise error

    assert command(["--output", str(tmp_path / "x")], run) == status
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out


def test_bugs_are_not_hidden(tmp_path):
    def run(*arguments):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes"):
        command(["--output", str(tmp_path / "x")], run)


def test_of_several_processes_one_speaks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert command(["--output", str(tmp_path / "x")], lambda *arguments: "done") == 0
    assert capsys.readouterr().out == ""


def test_a_resumed_command_restores_its_settings(tmp_path, capsys, tiny_masks):
    out = ["--output", str(tmp_path / "run")]
    assert main([*out, *tiny_masks, "--seed", "3", "--stop_after", "2"]) == 0
    for flag, value in (("seed", "99"), ("batch_size", "8")):  # 8: the default, given
        capsys.readouterr()
        assert main([*out, "--resume", f"--{flag}", value]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and flag in error and "\n" not in error
    assert main([*out, "--resume", "--save_every", "1", "--stop_after", "3"]) == 0
    assert saved_state(tmp_path / "run")["settings"]["seed"] == 3
    assert main([*out, "--resume"]) == 0
    assert (tmp_path / "run" / DECODER_FILE).exists()
