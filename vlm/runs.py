"""A training run: where it lives, its log and state, resuming, and its command line.

Built in notebooks/20_training.ipynb: edit it there, then run `make export`.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "setting", "run_folder", "saved_state", "save_state", "publish", "check_output",
    "TrainingLog", "run_command",
]  # fmt: skip

STATE_FILE = "trainer.pt"
# What may change when a run goes on: who computes and when it saves, not the result.
FREE = ("micro_batch_size", "num_workers", "eval_every", "save_every")
OUT_OF_MEMORY = "try a smaller --micro_batch_size, and what else --help says of memory"


def setting(default: Any, help: str, **flag: Any) -> Any:
    """A dataclass field with a default, the help of its flag, and more on the flag."""
    return field(default=default, metadata={"flag": {"help": help, **flag}})


def run_folder(output: Path) -> Path:
    """Where a run lives until `output` is complete: a folder beside it."""
    return output.with_name(output.name + ".unfinished")


def saved_state(output: Path, mmap: bool = False) -> dict[str, Any]:
    """The last state of the run that makes `output`; FileNotFoundError without one."""
    path = run_folder(output) / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no saved run in {path.parent}: leave --resume out")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def save_state(output: Path, state: dict[str, Any]) -> None:
    """Replace the run's state, in one move; OSError where it can't be written."""
    path = run_folder(output) / STATE_FILE
    try:
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)
    except (OSError, RuntimeError) as error:  # PyTorch's own writer: RuntimeError
        path.with_suffix(".new").unlink(missing_ok=True)
        raise OSError(
            f"step {state['step']} can't be saved in {path.parent} ({error}): make "
            "room, then --resume goes on from the last save"
        ) from error


def publish(output: Path) -> None:
    """Let `output` appear, complete: the run's folder `result`, and the log in it."""
    shutil.copy(run_folder(output) / "log.jsonl", run_folder(output) / "result")
    os.replace(run_folder(output) / "result", output)
    shutil.rmtree(run_folder(output))


def check_output(
    output: Path, settings: dict[str, Any], resume: bool, free: Sequence[str] = ()
) -> None:
    """Refuse to overwrite a result or a run, or to resume one with other settings.

    Those in FREE and in `free` may differ from the saved run's.
    Raises FileExistsError, FileNotFoundError or ValueError.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists already: choose another --output")
    if not resume and (run_folder(output) / STATE_FILE).exists():
        raise FileExistsError(
            f"{run_folder(output)} holds an unfinished run: go on with --resume, or "
            "remove it"
        )
    saved = saved_state(output, mmap=True)["settings"] if resume else settings
    other = [
        f"{name} {saved.get(name)!r}, not {value!r}"
        for name, value in settings.items()
        if saved.get(name) != value and name not in (*FREE, *free)
    ]
    if other:
        raise ValueError(
            f"the saved run has {'; '.join(other)}: resume it with its own settings, "
            "or start a new one with another --output"
        )


class TrainingLog:
    """Losses, averaged from line to line: `entries` in memory, `log.jsonl` on disk."""

    def __init__(self, folder: Path | None, first_step: int = 0):
        """Go on at `first_step`: what an interrupted run wrote later is dropped."""
        self.path = folder / "log.jsonl" if folder else None
        self.entries: list[dict[str, float]] = []
        self._losses: list[dict[str, float]] = []
        if self.path and first_step:
            # Without what stands after the last line's end: a full disk cuts lines.
            lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
            former = [json.loads(line) for line in lines]
            self.entries = [e for e in former if e["step"] <= first_step]
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(entry) + "\n" for entry in self.entries)
            whole = self.path.with_suffix(".new")
            whole.write_text(text, encoding="utf-8")
            os.replace(whole, self.path)

    def add(self, losses: dict[str, float]) -> None:
        """Count a step's losses."""
        self._losses.append(losses)

    def write(self, step: int, **values: float) -> None:
        """Add a line: the mean losses since the last one, and `values`."""
        for name in self._losses[0] if self._losses else ():
            total = sum(losses[name] for losses in self._losses)
            values[name] = total / len(self._losses)
        self._losses.clear()
        self.entries.append({"step": step, **values})
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.entries[-1]) + "\n")


def run_command(
    about: str,
    config_type: type,
    run: Callable[[Any, Path, bool, int | None], str],
    argv: Sequence[str] | None = None,
) -> int:
    """A command with a flag for each setting that isn't `init=False`.

    `run` gets (config, output, resume, stop_after), and returns what to print at last.
    A resumed run has its own settings, but for those that are given. Returns the exit
    status, as `run_main`.
    """
    from .cli import OneLineParser, run_main  # chapter 30's

    parser = OneLineParser(description=about, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--output", required=True, type=Path, help="folder that the result will be")
    parser.add_switch("--resume", "go on with an unfinished run")
    add("--stop_after", type=int, help="save and stop at this step")
    for option in (o for o in fields(config_type) if o.init):
        flag = {"type": option.type, **option.metadata["flag"]}
        help = flag.pop("help")
        if option.default != "":
            help += f" (default: {option.default})"
        if option.type is bool:
            parser.add_switch(f"--{option.name}", help)
        else:
            add(f"--{option.name}", help=help, **flag)

    def command() -> None:
        given = vars(parser.parse_args(argv))
        output, resume = given.pop("output").expanduser(), given.pop("resume", False)
        stop_after = given.pop("stop_after", None)
        if resume:
            saved = saved_state(output, mmap=True)["settings"]
            kept = [o.name for o in fields(config_type) if o.init and o.name in saved]
            given = {name: saved[name] for name in kept} | given
        message = run(config_type(**given), output, resume, stop_after)
        if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
            print(message)

    stopped = "stopped: --resume goes on from the last save, if any"
    return run_main(command, OUT_OF_MEMORY, stopped)
