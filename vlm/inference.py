"""One command asks the model about a picture: words as they are made, boxes in a table
and drawn.

Built in notebooks/24_inference.ipynb: edit it there, then run `make export`.
"""

import argparse
import difflib
import random
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from PIL import Image
    from torch import device as Device

    from .detection import ParsedObjects
    from .paligemma import PaliGemmaForConditionalGeneration
    from .processing import PaliGemmaProcessor
    from .sampling import Generation, GenerationSettings

__all__ = [
    "MASKS_LATER",
    "ABOUT",
    "read_switch",
    "OneLineParser",
    "build_parser",
    "parse_options",
    "check_output",
    "check_request",
    "make_settings",
    "stream_answer",
    "note",
    "format_table",
    "test_inference",
    "run",
    "main",
]

MASKS_LATER = "masks come with chapter 16, and --mask_decoder will take their decoder"
ABOUT = """
Ask a vision-language model about a picture. The answer appears as it is made; boxes
are listed in pixels of the picture and drawn into --output.

Without --model_path the embedded model answers. It knows a hundred kinds of sticker
and nothing else of the world: shown a photograph, it sees stickers in it. It
understands:
  caption en                              detect owl
  answer en how many owls are there?      detect owl ; pizza
For photographs give --model_path a PaliGemma checkpoint: a folder, or a hub id such as
google/paligemma-3b-mix-224.
"""


def read_switch(text: str) -> bool:
    """True, yes, 1 → True and False, no, 0 → False; anything else is an error."""
    meanings = {"true": True, "yes": True, "1": True}
    meanings |= {"false": False, "no": False, "0": False}
    if text.lower() not in meanings:
        raise ArgumentTypeError(f"{text!r} is neither True nor False")
    return meanings[text.lower()]


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError where others print usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists all options")


def build_parser() -> OneLineParser:
    """All options, with their help."""
    parser = OneLineParser(
        prog="python -m vlm.inference",
        usage="%(prog)s --prompt PROMPT --image_file_path PICTURE [options]",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    switch = dict(nargs="?", const=True, default=False, type=read_switch)
    add("--prompt", help='what to ask, in quotes: "detect owl"')
    add("--image_file_path", metavar="PICTURE", help="the picture to ask about")
    add("--output", metavar="FILE", help="where to draw the boxes: a .png or .jpg")
    add("--model_path", metavar="P", help="folder or hub id; default: embedded model")
    add("--mask_decoder", metavar="P", help="no use yet: masks come with chapter 16")
    add(
        "--max_tokens_to_generate",
        metavar="N",
        type=int,
        default=100,
        help="default: 100",
    )
    add("--do_sample", metavar="BOOL", **switch, help="draw tokens by chance")
    add("--temperature", metavar="T", type=float, help="of sampling; default: 0.8")
    add("--top_p", metavar="P", type=float, help="of sampling; default: 0.9")
    add("--top_k", metavar="K", type=int, help="of sampling; default: all")
    add("--seed", metavar="N", type=int, help="draw the same tokens again")
    add("--only_cpu", metavar="BOOL", **switch, help="leave a GPU alone")
    return parser


def parse_options(argv: list[str] | None = None) -> Namespace:
    """The command line's words → options; ValueError with one line of advice."""
    options, unknown = build_parser().parse_known_args(argv)
    if unknown:
        word = unknown[0].partition("=")[0]
        if not word.startswith("-"):
            raise ValueError(
                f"{word!r} belongs to no option: put a prompt or path that has spaces "
                "in quotes"
            )
        flags = [f"--{name}" for name in vars(options)]
        near = difflib.get_close_matches(word, flags, n=1)
        advice = f"did you mean {near[0]}?" if near else "--help lists all options"
        raise ValueError(f"unknown option {word}: {advice}")
    if options.prompt is None:
        raise ValueError('--prompt is missing: say what to ask, as in "detect owl"')
    if options.image_file_path is None:
        raise ValueError("--image_file_path is missing: say which picture to look at")
    return options


def check_output(output: Path, picture_path: Path) -> None:
    """Raise ValueError or FileNotFoundError where a drawing can't be saved there."""
    from PIL import Image

    if not output.parent.is_dir():
        raise FileNotFoundError(
            f"no folder {output.parent}: make it, or change --output"
        )
    kind = Image.registered_extensions().get(output.suffix.lower())
    if output.is_dir() or kind not in Image.SAVE:
        raise ValueError(f"--output {output} must be a file that ends in .png or .jpg")
    if output.exists() and output.samefile(picture_path):
        raise ValueError(f"--output {output} is the picture itself: give another name")


def check_request(
    prompt: str, image_file_path: str | Path, output: str | Path | None = None
) -> "Image.Image":
    """Everything about a request that needs no model; returns the picture.

    Raises FileNotFoundError and ValueError that say what to do.
    """
    from .processing import load_image

    if not prompt.strip():
        raise ValueError('the prompt is empty: say what to ask, as in "caption en"')
    picture = load_image(image_file_path)
    if output is not None:
        check_output(Path(output), Path(image_file_path))
    return picture


def make_settings(
    max_tokens_to_generate: int,
    temperature: float,
    top_p: float | None,
    do_sample: bool,
    top_k: int | None = None,
    seed: int | None = None,
) -> "GenerationSettings":
    """The settings of generation, checked; messages use the command line's names."""
    from .sampling import GenerationSettings

    try:
        return GenerationSettings(
            max_new_tokens=max_tokens_to_generate,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
    except ValueError as error:
        message = str(error).replace("max_new_tokens", "max_tokens_to_generate")
        raise ValueError(message) from None


def stream_answer(
    model: "PaliGemmaForConditionalGeneration",
    processor: "PaliGemmaProcessor",
    prompt: str,
    picture: "Image.Image",
    settings: "GenerationSettings",
) -> "Generation":
    """Ask, print the pieces of the answer as they are made, return all of it.

    Raises ValueError, before anything is printed, where the answer may not fit.
    """
    from .sampling import check_inputs, generation_steps

    inputs = processor(text=[prompt], images=[picture])
    check_inputs(model, inputs, settings)
    tokenizer = processor.tokenizer
    for (answer,) in generation_steps(model, tokenizer, inputs, settings):
        print(answer.pieces[-1], end="", flush=True)
    print()
    if answer.token_ids[-1] != tokenizer.eos_token_id:
        limit = len(answer.token_ids)
        note(f"cut after {limit} tokens: --max_tokens_to_generate allows more")
    return answer


def note(message: str) -> None:
    """A line about the answer, on the error stream: the answer itself stays pure."""
    print(message, file=sys.stderr)


def format_table(found: "ParsedObjects") -> str:
    """Detections as lines of text: label, x0 y0 x1 y1 in pixels, score."""
    rows = [("label", "x0", "y0", "x1", "y1", "score")]
    for thing in found:
        pixels = (str(round(value)) for value in thing.box)
        rows.append((" ".join(thing.label.split()), *pixels, f"{thing.score:.2f}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows
    ]
    if not found:
        lines = ["nothing found"]
    if found.invalid:
        lines.append(f"{found.invalid} left out: no valid box")
    return "\n".join(lines)


def test_inference(
    model: "PaliGemmaForConditionalGeneration",
    processor: "PaliGemmaProcessor",
    device: "str | Device",
    prompt: str,
    image_file_path: str | Path,
    max_tokens_to_generate: int = 100,
    temperature: float = 0.8,
    top_p: float | None = 0.9,
    do_sample: bool = False,
    top_k: int | None = None,
    seed: int | None = None,
    output: str | Path | None = None,
) -> str:
    """Ask `model` on `device` about a picture; print the answer and return its text.

    Boxes, where the answer has or should have some, are printed as a table in pixels of
    the picture. `output`: where to save the picture with the boxes drawn.
    Raises FileNotFoundError and ValueError that say what to do.
    """
    from .detection import draw_detections, parse_detections

    picture = check_request(prompt, image_file_path, output)
    settings = make_settings(
        max_tokens_to_generate, temperature, top_p, do_sample, top_k, seed
    )
    answer = stream_answer(model.to(device), processor, prompt, picture, settings)
    wants_boxes = prompt.split()[0] in ("detect", "segment")
    found = parse_detections(answer if wants_boxes else "", *picture.size)
    if wants_boxes:
        print(format_table(found))
    if "<seg" in answer.text:
        note(f"only boxes are shown: {MASKS_LATER}")
    if output is not None:
        draw_detections(picture, found).save(output)
        note(f"wrote {output}{'' if found else ', without a box'}")
    return answer.text


test_inference.__test__ = False  # the name is a habit of the field, not a test


def run(options: Namespace) -> None:
    """Do what the options ask, cheap checks first."""
    task, _, rest = options.prompt.strip().partition(" ")
    if options.mask_decoder is not None:
        raise ValueError(f"--mask_decoder has no use yet: {MASKS_LATER}")
    if task == "segment" and options.model_path is None:
        raise ValueError(
            f"the embedded model can't segment yet: {MASKS_LATER}; "
            f'for boxes ask "detect {rest}"'
        )
    shaping = ("temperature", "top_p", "top_k")
    idle = [name for name in shaping if getattr(options, name) is not None]
    repeatable = not options.do_sample or options.seed is not None
    seed = options.seed if repeatable else random.SystemRandom().randrange(2**32)
    generation = dict(
        max_tokens_to_generate=options.max_tokens_to_generate,
        temperature=0.8 if options.temperature is None else options.temperature,
        top_p=0.9 if options.top_p is None else options.top_p,
        do_sample=options.do_sample,
        top_k=options.top_k,
        seed=seed,
    )
    make_settings(**generation)
    check_request(options.prompt, options.image_file_path, options.output)
    if idle and not options.do_sample:
        note(f"--{idle[0]} counts only with --do_sample True")

    # Imported late: `--help` and a misspelled option are answered without torch.
    from .processing import PaliGemmaProcessor
    from .weights import EMBEDDED, load_hf_model

    device = "cpu" if options.only_cpu else "auto"
    model, tokenizer = load_hf_model(options.model_path, device)
    vision = model.config.vision_config
    test_inference(
        model,
        PaliGemmaProcessor(tokenizer, vision.num_image_tokens, vision.image_size),
        model.device,
        options.prompt,
        options.image_file_path,
        **generation,
        output=options.output,
    )
    name = options.model_path or f"{EMBEDDED.name} (it knows only stickers)"
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    drawn = "" if repeatable else f", --seed {seed}"
    note(f"answered by {name}, {millions:,.1f} M weights, {model.device}{drawn}")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 after one line of advice."""
    try:
        run(parse_options(argv))
    except (OSError, ValueError) as error:
        note(f"error: {' '.join(str(error).split())}")
        return 2
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        note("error: the model doesn't fit in the device's memory: try --only_cpu True")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
