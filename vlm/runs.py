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
from accelerate import PartialState

__all__ = [
    "setting", "run_folder", "saved_state", "save_state", "check_output", "TrainingLog",
    "publish", "run_command",
]  # fmt: skip

STATE_FILE = "trainer.pt"
# What may change when a run goes on: who computes and when it saves, not the result.
FREE = ("micro_batch_size", "num_workers", "eval_every", "save_every")


def setting(default: Any, help: str, **flag: Any) -> Any:
    """A dataclass field with a default, and its flag's help and other options."""
    return field(default=default, metadata={"help": help, **flag})


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
    new = path.with_suffix(".new")
    try:
        torch.save(state, new)
        os.replace(new, path)
    except (OSError, RuntimeError) as error:  # PyTorch's own writer: RuntimeError
        new.unlink(missing_ok=True)
        raise OSError(
            f"step {state['step']} can't be saved in {path.parent} ({error}): make "
            "room, then --resume goes on from the last save"
        ) from error


def check_output(
    output: Path, settings: dict[str, Any], resume: bool, free: Sequence[str] = ()
) -> None:
    """Refuse to overwrite a result or a run, or to resume one with other settings.

    Those in FREE and in `free` may differ from the saved run's.
    Raises FileExistsError, FileNotFoundError or ValueError.
    """
    folder = run_folder(output)
    if output.exists():
        raise FileExistsError(f"{output} exists already: choose another --output")
    if not resume and (folder / STATE_FILE).exists():
        raise FileExistsError(
            f"{folder} holds an unfinished run: go on with --resume, or remove it"
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


def _to_jsonl(entries: list[dict[str, float]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


class TrainingLog:
    """A list of dicts, `entries`, that is also a file: `log.jsonl` in `folder`."""

    def __init__(self, folder: Path | None, first_step: int = 0, main: bool = True):
        """Go on at `first_step`: what an interrupted run wrote later is dropped.

        All processes read the file, the main one writes it.
        """
        path = folder / "log.jsonl" if folder else None
        self.path = path if main else None
        self.entries: list[dict[str, float]] = []
        if path and first_step:
            # Without what follows the last newline: a full disk cuts lines.
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            former = map(json.loads, lines)
            self.entries = [e for e in former if e["step"] <= first_step]
        if self.path:
            folder.mkdir(parents=True, exist_ok=True)
            new = path.with_suffix(".new")
            new.write_text(_to_jsonl(self.entries), encoding="utf-8")
            os.replace(new, path)

    def write(self, step: int, **values: float) -> None:
        """Add a line."""
        self.entries.append({"step": step, **values})
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_to_jsonl(self.entries[-1:]))


def publish(output: Path, log: list[dict], write: Callable[[Path], None]) -> None:
    """Let `output` appear, complete: what `write(folder)` writes, and the log."""
    result, processes = run_folder(output) / "result", PartialState()
    if processes.is_main_process:
        try:
            write(result)
            (result / "log.jsonl").write_text(_to_jsonl(log), encoding="utf-8")
        except OSError as error:
            raise OSError(f"{error}; all is trained: --resume writes it") from error
        os.replace(result, output)
        shutil.rmtree(result.parent)
    processes.wait_for_everyone()


def run_command(
    about: str,
    config_type: type,
    run: Callable[[Any, Path, bool, int | None], str | None],
    argv: Sequence[str] | None = None,
) -> int:
    """A command with a flag for each setting that isn't `init=False`.

    `run` gets (config, output, resume, stop_after), and returns what to print at last,
    None where it stopped early. A resumed run has its own settings, but for those that
    are given. Returns the exit status, as `run_main`.
    """
    from .cli import OneLineParser, run_main  # chapter 30's

    parser = OneLineParser(description=about, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--output", required=True, type=Path, help="folder that the result will be")
    parser.add_switch("--resume", "go on with an unfinished run")
    add("--stop_after", type=int, help="save and stop at this step")
    options = [option for option in fields(config_type) if option.init]
    for option in options:
        flag = {"type": option.type, **option.metadata}
        if option.default != "":
            flag["help"] += f" (default: {option.default})"
        if option.type is bool:
            parser.add_switch(f"--{option.name}", flag["help"])
        else:
            add(f"--{option.name}", **flag)

    def command() -> None:
        given = vars(parser.parse_args(argv))
        output, resume = given.pop("output").expanduser(), given.pop("resume", False)
        stop_after = given.pop("stop_after", None)
        if resume:
            saved = saved_state(output, mmap=True)["settings"]
            given = {o.name: saved[o.name] for o in options if o.name in saved} | given
        check_output(output, {}, resume)  # before anything takes time
        message = run(config_type(**given), output, resume, stop_after)
        if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
            print(message or f"stopped at step {stop_after}: go on with --resume")

    out_of_memory = "try a smaller --micro_batch_size, and what --help says of memory"
    stopped = "stopped: --resume goes on from the last save, if any"
    return run_main(command, out_of_memory, stopped)
