"""Command lines: switches, one-line errors, exit statuses; and what imports cost."""

import os
import subprocess
import sys
import warnings
from argparse import SUPPRESS

import pytest

from vlm.cli import (
    OneLineParser,
    print_err,
    printable,
    read_path,
    run_main,
    user_message,
)


@pytest.fixture
def parser():
    parser = OneLineParser(prog="ask", description="two\nlines")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--images", type=read_path, nargs="+")
    parser.add_switch("--do_sample", help="sample")
    return parser


# Flags


@pytest.mark.parametrize(
    "words, meaning",
    [((), False), (("--do_sample",), True), (("--do_sample", "True"), True)]
    + [(("--do_sample", "false"), False), (("--do_sample=yes",), True)]
    + [(("--do_sample", "no"), False), (("--do_sample", "1"), True)]
    + [(("--do_sample", "0"), False)],
)
def test_switches_mean_what_they_say(words, meaning, parser):
    assert parser.parse_args(["--prompt", "x", *words]).do_sample is meaning


def test_a_switch_that_isnt_given_can_be_absent():
    parser = OneLineParser(argument_default=SUPPRESS)
    parser.add_switch("--resume", help="go on")
    assert vars(parser.parse_args([])) == {}
    assert vars(parser.parse_args(["--resume"])) == {"resume": True}


@pytest.mark.parametrize(
    "words, key",
    [
        (["--promt", "x"], "did you mean --prompt?"),
        (["--xyz", "x", "--prompt", "x"], "unknown flag --xyz"),
        (["--prom", "x"], "did you mean --prompt?"),  # no abbreviations
        (["--prompt=x", "--do_samples=1"], "did you mean --do_sample?"),
        (["--prompt", "detect", "owl"], "'owl' belongs to no flag"),
        (["--prompt", "x", "--do_sample", "perhaps"], "neither True nor False"),
        (["--prompt", "x", "--images", "a.png", ""], "--images: the path is empty"),
        (["--prompt"], "expected one argument"),
        ([], "required: --prompt"),
    ],
)
def test_a_wrong_command_is_one_line_that_helps(words, key, parser):
    with pytest.raises(ValueError, match=key.replace("?", r"\?")) as caught:
        parser.parse_args(words)
    assert "\n" not in str(caught.value)


def test_a_description_keeps_its_lines(parser, capsys):
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--help"])
    assert "two\nlines" in capsys.readouterr().out


def test_a_tilde_is_expanded(parser, monkeypatch):
    monkeypatch.setenv("HOME", "/home/reader")
    monkeypatch.setenv("USERPROFILE", "/home/reader")
    options = parser.parse_args(["--prompt", "x", "--images", "~/a.png"])
    assert options.images == ["/home/reader/a.png"]


# Messages and exit statuses


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to"),
        RuntimeError("CUDA out of memory. Tried to allocate 3 GiB"),
    ],
)
def test_every_kind_of_full_memory_is_a_line(error):
    assert user_message(error, "take less") == "out of memory: take less"


def test_a_long_error_is_a_short_line():
    line = user_message(ValueError("too\nlong " * 999), "")
    assert 400 < len(line) <= 500 and line.endswith("…") and "\n" not in line


def ends_with(error: BaseException | None, status: int | None = None):
    def run() -> int | None:
        if error is not None:
            raise error
        return status

    return run_main(run, "take less", stopped="--resume goes on")


def test_statuses(capsys):
    assert [ends_with(None), ends_with(None, 1)] == [0, 1]
    assert capsys.readouterr() == ("", "")
    for error, status, said in (
        (ValueError("no owl"), 2, "error: no owl\n"),
        (FileNotFoundError("no file"), 2, "error: no file\n"),
        (FloatingPointError("NaN"), 2, "error: NaN\n"),
        (MemoryError(), 2, "error: out of memory: take less\n"),
        (KeyboardInterrupt(), 130, "--resume goes on\n"),
    ):
        assert ends_with(error) == status
        assert capsys.readouterr() == ("", said)


@pytest.mark.filterwarnings("default::UserWarning")  # the command shows them
def test_a_warning_is_one_line_without_the_place_in_the_code(capsys):
    shown = warnings.showwarning
    assert run_main(lambda: warnings.warn("no \x1b[31m owl", stacklevel=1), "") == 0
    assert capsys.readouterr() == ("", "warning: no \\x1b[31m owl\n")
    assert warnings.showwarning is shown  # only the command's are shown so


@pytest.mark.parametrize("error", [RuntimeError("shapes disagree"), TypeError("x")])
def test_a_fault_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        ends_with(error)


def test_a_closed_pipe_ends_it_quietly(capsys, monkeypatch):
    reader, writer = os.pipe()
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        os.close(reader)
        assert run_main(lambda: print("two owls", flush=True), "") == 141
    assert capsys.readouterr().err == ""


def test_one_of_several_processes_speaks(capsys, monkeypatch):
    for rank, said in (("0", "step 3\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        print_err("step 3")
        assert capsys.readouterr().err == said


def test_a_closed_error_stream_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    print_err("step 3")


def test_names_of_files_cant_paint_the_terminal():
    assert printable("an owl\n\x1b[31m.png") == r"an owl\n\x1b[31m.png"


# What running a model brings along


@pytest.mark.parametrize("module", ["weights", "answers", "segmentation"])
def test_running_a_model_loads_neither_renderer_nor_trainer(module):
    unwanted = {"vlm.scenes", "vlm.questions", "vlm.training", "peft", "matplotlib"}
    if module == "segmentation":  # answers are written in pycocotools' run lengths
        unwanted |= {"pycocotools", "vlm.metrics"}
    code = f"import sys, vlm.{module}; print({unwanted} & {{*sys.modules}})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_command_line_waits_for_nothing_heavy():
    code = "import sys, vlm.inference, vlm.cli; print({*sys.modules})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = eval(done.stdout)
    assert not loaded & {"torch", "numpy", "transformers", "tqdm", "accelerate"}
