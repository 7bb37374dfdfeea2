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

STATE_FILE, LOG_FILE = "trainer.pt", "log.jsonl"
# What may change when a run goes on: who computes and when it saves, not the result.
FREE = ("micro_batch_size", "num_workers", "eval_every", "save_every")


def setting(default: Any, help: str, **flag: Any) -> Any:
    """A dataclass field with a default, and its flag's help and other options."""
    if default != "":
        help += f" (default: {default})"
    return field(default=default, metadata={"help": help, **flag})


def run_folder(output: Path) -> Path:
    """Where a run lives until `output` is complete: a folder beside it."""
    return output.with_name(output.name + ".unfinished")


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


def open_run(
    output: Path | None, settings: dict, resume: bool, free: Sequence[str] = ()
) -> dict[str, Any]:
    """The state from which the run that makes `output` goes on, or a new one starts.

    Refuses to overwrite a result or a run, and to resume one with other settings, but
    for those in FREE and in `free`. Tensors stay in the file: copy what is to be kept.
    Raises FileExistsError, FileNotFoundError or ValueError.
    """
    path = run_folder(output) / STATE_FILE if output else None
    if output and output.exists():
        raise FileExistsError(f"{output} exists already: choose another --output")
    if path and path.exists() and not resume:
        raise FileExistsError(
            f"{path.parent} holds an unfinished run: go on with --resume, or remove it"
        )
    if not resume:
        return {"step": 0, "settings": settings, "log": []}
    if not path or not path.exists():
        raise FileNotFoundError(f"no saved run for output {output}: leave --resume out")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    saved = state["settings"]
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
    return state


def write_log(output: Path | None, entries: list[dict], mode: str = "w") -> None:
    """Write the run's log, a line of JSON an entry; mode "a": after what is there."""
    if output is None:
        return
    path = run_folder(output) / LOG_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def publish(output: Path, log: list[dict], write: Callable[[Path], None]) -> None:
    """Let `output` appear, complete: what `write(folder)` writes, and the log."""
    folder, result = run_folder(output), run_folder(output) / "result"
    if PartialState().is_main_process:  # the others are done: evaluating takes long
        shutil.rmtree(result, ignore_errors=True)  # of an attempt that failed
        try:
            write(result)
            write_log(output, log)
        except OSError as error:
            raise OSError(f"{error}; all is trained: --resume writes it") from error
        os.replace(folder / LOG_FILE, result / LOG_FILE)
        os.replace(result, output)
        shutil.rmtree(folder)


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
    add("--output", required=True, type="path", help="folder that the result will be")
    parser.add_switch("--resume", "go on with an unfinished run")
    add("--stop_after", type=int, help="save and stop at this step")
    options = [option for option in fields(config_type) if option.init]
    for option in options:
        if option.type is bool:
            parser.add_switch(f"--{option.name}", **option.metadata)
        else:
            add(f"--{option.name}", **{"type": option.type} | option.metadata)

    def command() -> None:
        given = vars(parser.parse_args(argv))
        output, resume = Path(given.pop("output")), given.pop("resume", False)
        stop_after = given.pop("stop_after", None)
        saved = open_run(output, {}, resume)["settings"]  # before anything takes time
        given = {o.name: saved[o.name] for o in options if o.name in saved} | given
        message = run(config_type(**given), output, resume, stop_after)
        if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
            print(message or f"stopped at step {stop_after}: go on with --resume")

    out_of_memory = "try a smaller --micro_batch_size, and what --help says of memory"
    stopped = "stopped: --resume goes on from the last save, if any"
    return run_main(command, out_of_memory, stopped)
