"""Command lines: switches, errors of one line that suggest a fix, exit statuses.

Built in notebooks/30_inference.ipynb: edit it there, then run `make export`.
"""

import argparse
import difflib
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


def read_switch(text: str) -> bool:
    """The value of a switch: true, yes, 1 or false, no, 0, in upper or lower case."""
    if text.lower() not in ("true", "yes", "1", "false", "no", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "yes", "1")


def read_path(text: str) -> str:
    """A path with `~` expanded; an empty one would be taken for the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return os.path.expanduser(text)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that raises one-line ValueErrors; it takes no abbreviations."""

    def __init__(self, **options: Any):
        raw = argparse.RawDescriptionHelpFormatter  # a description keeps its lines
        super().__init__(formatter_class=raw, **options)
        self.register("type", "path", read_path)  # for add_argument(…, type="path")

    def add_switch(self, flag: str, help: str) -> None:
        """A flag, False by default, that takes `--flag`, `--flag True` or `… False`."""
        default = self.argument_default or False  # it may be argparse.SUPPRESS
        value = dict(nargs="?", const=True, type=read_switch, metavar="BOOL")
        self.add_argument(flag, **value, default=default, help=help)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists all flags")

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:
        """The words → options; ValueError for a misspelled flag or a stray word."""
        args = sys.argv[1:] if args is None else args
        flags = self._option_string_actions
        for flag in (word.partition("=")[0] for word in args):
            if flag.startswith("--") and flag not in flags:
                near = difflib.get_close_matches(flag, flags, n=1)
                hint = f"did you mean {near[0]}?" if near else "--help lists all flags"
                raise ValueError(f"unknown flag {flag}: {hint}")
        options, stray = self.parse_known_args(args)
        if stray:
            hint = "put what has spaces in quotes"
            raise ValueError(f"{stray[0]!r} belongs to no flag: {hint}")
        return options


def printable(text: str) -> str:
    """The text with control characters, such as a newline, written as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def print_err(message: str) -> None:
    """Print a line to stderr, above a progress bar; of several processes, rank 0's."""
    if sys.stderr is not None and os.environ.get("RANK", "0") == "0":
        from tqdm import tqdm  # importing it takes longer than all that --help needs

        tqdm.write(printable(message), file=sys.stderr)


def user_message(error: Exception, out_of_memory: str) -> str | None:
    """One line about an error that the user can fix; None for a bug in the program."""
    if isinstance(error, OSError | ValueError | FloatingPointError):
        return textwrap.shorten(str(error), 500, placeholder=" …")
    words = "out of memory|can't allocate memory|not enough memory"  # CUDA, MPS, CPU
    full = isinstance(error, MemoryError) or re.search(words, str(error))
    return f"out of memory: {out_of_memory}" if full else None


def run_main(
    run: Callable[[], int | None], out_of_memory: str, stopped: str = "stopped"
) -> int:
    """Call `run`; the exit status is what it returns (None: 0), or

    2 after an error that the user can fix, told in one line on stderr;
    130 after Ctrl-C, and 141 where nobody reads stdout any more (`… | head -1`).
    Any other exception passes: its traceback is what a bug report needs.
    """
    for console in (sys.stdout, sys.stderr):
        if hasattr(console, "reconfigure"):  # it may not know every character
            console.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():  # a line, without the place in the code
            warnings.showwarning = lambda text, *where: print_err(f"warning: {text}")
            return run() or 0
    except KeyboardInterrupt:
        print_err(stopped)
        return 130
    except BrokenPipeError:  # what is still in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if (message := user_message(error, out_of_memory)) is None:
            raise
        print_err(f"error: {message}")
        return 2
