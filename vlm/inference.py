"""One command, or a playground of buttons, asks the model about any picture of yours.

Built in notebooks/24_inference.ipynb: edit it there, then run `make export`.
"""

import argparse
import base64
import difflib
import functools
import glob
import io
import json
import os
import random
import re
import sys
import threading
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from PIL import Image
    from torch import device as Device

    from .detection import ParsedObjects
    from .mask_tokens import MaskDecoder
    from .paligemma import PaliGemmaForConditionalGeneration
    from .processing import ImageLike, PaliGemmaProcessor
    from .sampling import Generation, GenerationSettings

__all__ = [
    "ABOUT",
    "TASKS",
    "LANGUAGES",
    "TOO_LARGE",
    "OUT_OF_MEMORY",
    "PREVIEW",
    "STYLE",
    "HALF",
    "PLAYGROUND_FULL",
    "read_switch",
    "OneLineParser",
    "build_parser",
    "parse_options",
    "find_images",
    "drawing_paths",
    "check_prompt",
    "prompt_remarks",
    "check_decoder",
    "make_settings",
    "answer_steps",
    "read_answer",
    "draw_found",
    "readable",
    "note",
    "answer_remarks",
    "format_table",
    "to_coco",
    "show_answers",
    "test_inference",
    "load_parts",
    "run",
    "advice",
    "main",
    "dressed",
    "picture_html",
    "token_strip",
    "shipped_pictures",
    "example_prompts",
    "read_upload",
    "Controls",
    "connect",
    "Easel",
    "guarded",
    "Playground",
    "playground",
]

ABOUT = """
Ask a vision-language model about a picture, or about many. The answer appears as it is
made; boxes and masks are listed in pixels of the picture and drawn into --output.

Without --model_path the embedded model answers. It knows about a hundred kinds of
sticker and nothing else of the world: shown a photograph, it sees stickers in it. It
understands:
  caption en                              detect owl
  answer en how many owls are there?      detect owl ; pizza
  answer en is there an owl?              segment owl ; pizza
For photographs give --model_path a PaliGemma checkpoint: a folder, or a hub id such as
google/paligemma-3b-mix-224@bfloat16, where @ names a branch, tag or commit. To segment
with it, give --mask_decoder the file that belongs to it: for Google's that is
vae-oid.npz.

With --json each picture gives one line: an object with file, width, height, prompt,
answer, truncated, objects (in COCO's form: label, score, bbox, segmentation), invalid
and repeated; or, for a file that can't be read, with file, prompt and error. The exit
status is 1 then, 2 where nothing could be asked.

Examples, each on one line:
  python -m vlm.inference --prompt "caption en" --image_file_path scene.png
  python -m vlm.inference --prompt "segment owl" --image_file_path scene.png
      --output owl.png
  python -m vlm.inference --prompt "segment cat" --image_file_path cat.jpg
      --model_path google/paligemma-3b-mix-224 --mask_decoder vae-oid.npz
  python -m vlm.inference --prompt "detect owl" --image_file_path folder "more/*.jpg"
      --output drawings --json > found.jsonl
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

    def parse_args(self, args=None, namespace=None) -> Namespace:
        """The words → options; ValueError with advice for a stray or misspelled one."""
        options, unknown = self.parse_known_args(args, namespace)
        if not unknown:
            return options
        word = unknown[0].partition("=")[0]
        if not word.startswith("-"):
            raise ValueError(
                f"{word!r} belongs to no option: write the option's name before it, "
                "and put a prompt or path that has spaces in quotes"
            )
        flags = [f"--{name}" for name in vars(options)]
        near = difflib.get_close_matches(word, flags, n=1)
        advice = f"did you mean {near[0]}?" if near else "--help lists all options"
        raise ValueError(f"unknown option {word}: {advice}")


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
    pictures = "what to ask about: files, folders, patterns in quotes"
    more = dict(nargs="+", action="extend", metavar="PICTURE")
    add("--image_file_path", **more, help=pictures)
    drawing = "where to draw what was found: .png or .jpg; a folder for several"
    add("--output", metavar="FILE", help=drawing)
    add("--json", metavar="BOOL", **switch, help="a JSON object a picture and line")
    add("--model_path", metavar="PATH", help="folder or hub id; default: embedded")
    decoder = "an .npz or a folder; default: the file beside the model"
    add("--mask_decoder", metavar="PATH", help=decoder)
    add(
        "--max_tokens_to_generate",
        metavar="N",
        type=int,
        default=100,
        help="default: 100",
    )
    add("--do_sample", metavar="BOOL", **switch, help="draw tokens by chance")
    add("--temperature", metavar="X", type=float, help="of sampling; default: 0.8")
    add("--top_p", metavar="X", type=float, help="of sampling; default: 0.9, 1: all")
    add("--top_k", metavar="N", type=int, help="of sampling; default: all")
    add("--seed", metavar="N", type=int, help="draw the same tokens again")
    together = "pictures to ask about at once; default: 1"
    add("--batch_size", metavar="N", type=int, default=1, help=together)
    add("--dtype", default="auto", help="of the weights: 16-bit, float32 …")
    add("--only_cpu", metavar="BOOL", **switch, help="leave a GPU alone")
    return parser


def parse_options(argv: list[str] | None = None) -> Namespace:
    """The command line's words → options; ValueError with one line of advice."""
    options = build_parser().parse_args(argv)
    if options.prompt is None:
        raise ValueError('--prompt is missing: say what to ask, as in "detect owl"')
    if options.image_file_path is None:
        raise ValueError("--image_file_path is missing: say which picture to look at")
    for name, value in vars(options).items():
        if "" in (value if isinstance(value, list) else [value]) and name != "prompt":
            raise ValueError(f"--{name} is empty")
    if options.batch_size < 1:
        raise ValueError(f"--batch_size {options.batch_size} must be at least 1")
    return options


def find_images(words: Sequence[str]) -> list[str]:
    """The files that some words name, each once.

    A folder stands for the files in it with a picture's extension; a pattern with `*`,
    `?` or `[` for the files that match; both sorted. Any other word is taken for a
    file. Raises FileNotFoundError where there is none.
    """
    from PIL import Image

    kinds, files = Image.registered_extensions(), []

    def is_image(name: str) -> bool:  # Pillow can read it, and it's no other data
        kind = None if name.startswith(".") else kinds.get(Path(name).suffix.lower())
        return kind in Image.OPEN and Image.MIME.get(kind, "").startswith("image/")

    for word in words:
        path = os.path.expanduser(word)
        if os.path.isdir(path):
            found = [os.path.join(path, n) for n in os.listdir(path) if is_image(n)]
        elif set("*?[") & set(path) and "://" not in path and not os.path.exists(path):
            found = glob.glob(path, recursive=True)
        else:
            files.append(path)
            continue
        found = sorted(filter(os.path.isfile, found))
        if not found:
            raise FileNotFoundError(f"no picture found in {word}")
        files += found
    return list(dict.fromkeys(files))


def drawing_paths(
    output: str | Path, image_files: Sequence[str | Path], single: bool = True
) -> list[Path]:
    """Where the drawing of each picture goes: `output`, or for several a file in it.

    That folder is made where there is none; a drawing in it is called as its picture,
    with .png added to what isn't a PNG or JPEG. Raises ValueError and FileNotFoundError
    where a drawing can't be saved, or would replace a picture or another drawing.
    """
    from PIL import Image

    output = Path(os.path.expanduser(output))
    folder, paths, theirs = output.parent, [output], image_files
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: make it, or change --output")
    usual, kind = (".png", ".jpg", ".jpeg"), output.suffix.lower()
    if single:
        try:
            if output.is_dir():
                raise ValueError("a folder")
            kind = Image.registered_extensions().get(kind, "none")
            Image.new("RGB", (1, 1)).save(io.BytesIO(), kind)
        except (OSError, ValueError, KeyError):  # each format has its own way to refuse
            raise ValueError(
                f"--output {output} must be a file that ends in .png or .jpg"
            ) from None
    else:
        if kind in usual or output.is_file():
            raise ValueError(f"--output {output} must be a folder, for many drawings")
        output.mkdir(exist_ok=True)
        folder, theirs = output, {os.path.dirname(f) or "." for f in image_files}
        paths = [output / Path(file).name for file in image_files]
        paths = [p if p.suffix.lower() in usual else Path(f"{p}.png") for p in paths]
        if len(set(paths)) < len(paths):
            raise ValueError(
                f"--output {output}: some pictures have one name, split them"
            )
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output {output}: that folder can't be written to")
    if output.exists() and any(map(output.samefile, filter(os.path.exists, theirs))):
        raise ValueError(
            f"--output {output} would replace a picture: give another name"
        )
    return paths


# First words of the prompts that PaliGemma is trained on; the last four `pt` ones only.
TASKS = ("caption", "answer", "detect", "segment", "cap", "describe", "ocr", "question")
# Second words of `caption` and `answer`: the languages of Crossmodal-3600.
LANGUAGES = """ar bn cs da de el en es fa fi fil fr he hi hr hu id it iw ja ko mi nl no
pl pt quz ro ru sv sw te th tr uk vi zh""".split()


def check_prompt(prompt: str) -> str:
    """The prompt's first word, its task; ValueError for a prompt that asks nothing."""
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a string, not {type(prompt).__name__}")
    task, *things = prompt.replace(";", " ").split() or [""]
    if not task:
        raise ValueError('the prompt is empty: say what to ask, as in "caption en"')
    if task in ("detect", "segment") and not things:
        raise ValueError(f'{task} what? Name it, as in "{task} owl"')
    return task


def prompt_remarks(prompt: str) -> list[str]:
    """What to know about a prompt that a PaliGemma may not take as it was meant."""
    task, *words = prompt.split()
    rest, meant = " ".join(words), task.rstrip(":").lower()
    names = [name for name in re.split(r"\s*(?:[,;]|\band\b)\s*", rest) if name]
    advice = ""
    if task in ("detect", "segment") and len(names) > rest.count(";") + 1:
        several = f'"{task} {" ; ".join(names)}"'
        advice = f'only ";" separates names: for several things write {several}'
    elif task == "caption" and not set(words[:1]) & set(LANGUAGES):
        advice = 'a language comes after caption: "caption en"'
    elif task == "answer" and not set(words[:1]) & set(LANGUAGES):
        advice = f'a language comes after answer: "answer en {rest or "is it red?"}"'
    elif task not in TASKS:
        advice = 'try "caption en", "detect owl" or "answer en is there an owl?"'
        advice = f'write "{meant} {rest}"' if meant in TASKS else advice
        advice = f"{task!r} begins no prompt that a PaliGemma is trained on: {advice}"
    return [advice] if advice else []


def check_decoder(prompt: str, decoder: "MaskDecoder | None") -> None:
    """Raise ValueError for `segment …` where there is no mask decoder."""
    if check_prompt(prompt) == "segment" and not callable(decoder):
        raise ValueError(
            "segment needs the mask decoder that belongs to the model: give what "
            "load_mask_decoder returns"
        )


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

    if not isinstance(do_sample, bool):
        raise TypeError(f"do_sample must be True or False, not {do_sample!r}")
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
        message = message.replace(", or None", "")
        raise ValueError(message) from None


def answer_steps(
    model: "PaliGemmaForConditionalGeneration",
    processor: "PaliGemmaProcessor",
    prompt: str,
    images: "Sequence[Image.Image]",
    settings: "GenerationSettings",
) -> Iterator[list["Generation"]]:
    """Ask, and yield the answers, one a picture, after each token: they grow.

    Raises ValueError, before the first token, where an answer may not fit.
    """
    from .sampling import check_inputs, generation_steps

    inputs = processor(text=[prompt] * len(images), images=images)
    check_inputs(model, inputs, settings)
    yield from generation_steps(model, processor.tokenizer, inputs, settings)


def read_answer(
    prompt: str,
    answer: "Generation",
    size: tuple[int, int],
    decoder: "MaskDecoder | None" = None,
) -> "ParsedObjects | None":
    """What the answer found, in pixels of the picture of `size`, (width, height).

    Detections for `detect …`, Segmentations for `segment …`, None for other tasks.
    """
    from .detection import parse_detections
    from .segmentation import parse_segmentations

    task = check_prompt(prompt)
    if task == "segment":
        return parse_segmentations(answer, *size, decoder)
    return parse_detections(answer, *size) if task == "detect" else None


def draw_found(picture: "Image.Image", found: "ParsedObjects | None") -> "Image.Image":
    """A copy of the picture, with the boxes and masks of what was found."""
    from .detection import draw_detections
    from .segmentation import draw_segmentations

    masks = any(hasattr(thing, "mask") for thing in found or ())
    return (draw_segmentations if masks else draw_detections)(picture, found or ())


def readable(text: str) -> str:
    """The text, with what no terminal should get, as a newline, as its number."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def note(message: str) -> None:
    """A line about the answer, on the error stream: the answer itself stays pure."""
    from tqdm import tqdm

    if sys.stderr is not None:  # it may be closed
        with tqdm.external_write_mode(sys.stderr):  # above the bar, if there is one
            print(readable(message), file=sys.stderr)


def answer_remarks(answer: "Generation", eos_token_id: int) -> list[str]:
    """What to know about an answer: whether it was cut."""
    if answer.token_ids[-1] == eos_token_id:
        return []
    return [f"cut after {len(answer.token_ids)} tokens: a higher limit allows more"]


def format_table(found: "ParsedObjects") -> str:
    """What was found as lines of text: label, x0 y0 x1 y1 in pixels, score.

    Segmentations get a column more: how many pixels the mask has.
    """
    masks = any(hasattr(thing, "mask") for thing in found)
    rows = [("label", "x0", "y0", "x1", "y1", *(["mask"] if masks else []), "score")]
    for thing in found:
        pixels = [str(round(value)) for value in thing.box]
        pixels += [str(thing.mask.sum())] if masks else []
        rows.append((" ".join(thing.label.split()), *pixels, f"{thing.score:.2f}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows
    ]
    if not found:
        lines = ["nothing found"]
    if found.invalid:
        lines.append(f"{found.invalid} left out: no valid box or mask")
    if found.repeated:
        lines.append(f"{found.repeated} left out: written before, token by token")
    return "\n".join(lines)


def to_coco(found: "ParsedObjects") -> list[dict[str, Any]]:
    """What was found, in COCO's form: label, score, bbox, and segmentation of masks.

    bbox is [x, y, width, height] in pixels of the picture, segmentation run lengths as
    pycocotools writes them, {"size": [height, width], "counts": "…"}.
    """
    import numpy as np
    from pycocotools import mask as coco_mask

    objects = []
    for thing in found:
        x0, y0, x1, y1 = thing.box
        bbox = [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)]
        one = {"label": thing.label, "score": round(thing.score, 4), "bbox": bbox}
        if hasattr(thing, "mask"):
            runs = coco_mask.encode(np.asfortranarray(thing.mask, dtype=np.uint8))
            one["segmentation"] = runs | {"counts": runs["counts"].decode()}
        objects.append(one)
    return objects


def show_answers(
    model: "PaliGemmaForConditionalGeneration",
    processor: "PaliGemmaProcessor",
    prompt: str,
    images: "Sequence[Image.Image]",
    settings: "GenerationSettings",
    decoder: "MaskDecoder | None" = None,
    outputs: Sequence[Path] = (),
    files: Sequence[str] = (),
    as_json: bool = False,
) -> list[str]:
    """Print the answer about each picture and what it found; draw into `outputs`.

    Without `files`, the pictures' names, it is one picture, whose answer appears as it
    is made. `as_json`: an object a picture and line. Returns the texts.
    """
    from tqdm import tqdm

    for answers in answer_steps(model, processor, prompt, images, settings):
        if not files:
            print(answers[0].pieces[-1], end="", flush=True)
    end = processor.tokenizer.eos_token_id
    for answer, image, output, file in zip_longest(answers, images, outputs, files):
        found = read_answer(prompt, answer, image.size, decoder)
        remarks = answer_remarks(answer, end)
        with tqdm.external_write_mode():  # above the bar, if there is one
            if as_json:
                record = {"file": file, "width": image.width, "height": image.height}
                record |= {"prompt": prompt, "answer": answer.text}
                record |= {"truncated": bool(remarks), "objects": to_coco(found or ())}
                for name in ("invalid", "repeated"):
                    record[name] = getattr(found, name, 0)
                print(json.dumps(record), flush=True)
            else:
                print(f"{readable(file)}: {answer.text}" if file else "")
                if found is not None:
                    print(format_table(found), flush=True)
        for line in remarks:
            note(f"{file}: {line}" if file else line)
        if output is not None:
            draw_found(image, found).save(output)
            if not files:
                note(f"wrote {output}{'' if found else ', without a box'}")
    return [answer.text for answer in answers]


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
    decoder: "MaskDecoder | None" = None,
) -> str:
    """Ask `model` on `device` about a picture; print the answer and return its text.

    Boxes and masks, where the answer has or should have some, are printed as a table in
    pixels of the picture. `output`: where to save the picture with both drawn on it.
    `decoder`: the model's mask decoder, which `segment …` needs.
    Raises FileNotFoundError, ValueError and TypeError that say what to do.
    """
    from .processing import PaliGemmaProcessor, load_image
    from .weights import choose_device

    if not isinstance(processor, PaliGemmaProcessor):
        raise TypeError(
            "the processor must be a PaliGemmaProcessor: make_processor(model, "
            "tokenizer) returns one"
        )
    device = choose_device(device)
    check_decoder(prompt, decoder)
    picture = load_image(image_file_path)
    outputs = [] if output is None else drawing_paths(output, [image_file_path])
    settings = make_settings(
        max_tokens_to_generate, temperature, top_p, do_sample, top_k, seed
    )
    for line in prompt_remarks(prompt):
        note(line)
    asked = (model.to(device), processor, prompt, [picture], settings)
    (text,) = show_answers(*asked, decoder, outputs)
    return text


test_inference.__test__ = False  # the name is a habit of the field, not a test


def load_parts(options: Namespace) -> tuple:
    """Model, processor and, to `segment`, the mask decoder, which is checked first."""
    decoder = None
    if check_prompt(options.prompt) == "segment":
        from .segmentation import load_mask_decoder

        decoder = load_mask_decoder(options.model_path, options.mask_decoder)
    elif options.mask_decoder is not None:
        note('--mask_decoder counts only with a prompt like "segment owl"')

    from .weights import load_hf_model, make_processor

    device = "cpu" if options.only_cpu else "auto"
    model, tokenizer = load_hf_model(options.model_path, device, options.dtype)
    return model, make_processor(model, tokenizer), decoder


def run(options: Namespace) -> int:
    """Do what the options ask, cheap checks first; returns the exit status."""
    shaping = ("temperature", "top_p", "top_k", "seed")
    given = [name for name in shaping if getattr(options, name) is not None]
    repeatable = not options.do_sample or options.seed is not None
    seed = options.seed if repeatable else random.SystemRandom().randrange(2**32)
    settings = make_settings(
        options.max_tokens_to_generate,
        0.8 if options.temperature is None else options.temperature,
        0.9 if options.top_p is None else options.top_p,
        options.do_sample,
        options.top_k,
        seed,
    )
    prompt, words = options.prompt, options.image_file_path
    check_prompt(prompt)
    if os.path.isfile(prompt) and not any(map(os.path.exists, words)):
        raise ValueError(
            f"--prompt {prompt} is a file: are --prompt and --image_file_path swapped?"
        )
    files = find_images(words)
    single = len(words) == 1 and files == [os.path.expanduser(words[0])]
    alone = single and not options.json
    outputs = {}
    if options.output is not None:
        outputs = dict(zip(files, drawing_paths(options.output, files, single)))
    remarks = [f"--{name} counts only with --do_sample True" for name in given]
    remarks = prompt_remarks(prompt) + ([] if options.do_sample else remarks)

    # Imported late: `--help` and a misspelled option are answered without torch.
    from tqdm import tqdm

    from .processing import load_image

    model, status = None, 0
    quiet = len(files) == 1 or sys.stderr is None or not sys.stderr.isatty()
    with tqdm(total=len(files), unit=" pictures", disable=quiet) as bar:
        for start in range(0, len(files), options.batch_size):
            batch, images = files[start : start + options.batch_size], {}
            for file in batch:
                try:
                    images[file] = load_image(file)
                except (OSError, ValueError) as error:
                    if alone:
                        raise
                    status, line = 1, advice(error)
                    note(f"error: {line if file in line else f'{file}: {line}'}")
                    if options.json:
                        record = {"file": file, "prompt": prompt, "error": line}
                        print(json.dumps(record), flush=True)
            if images and model is None:
                for line in remarks:
                    note(line)
                model, processor, decoder = load_parts(options)
            if images:
                asked = (model, processor, prompt, [*images.values()], settings)
                there = [outputs[file] for file in images if outputs]
                names = () if alone else [*images]
                show_answers(*asked, decoder, there, names, options.json)
            bar.update(len(batch))
    if model is not None:
        from .weights import describe_model

        drawn = "" if repeatable else f"; again with --seed {seed}"
        note(f"answered by {describe_model(model, options.model_path)}{drawn}")
    return status


TOO_LARGE = (
    "the model doesn't fit in the device's memory: try --dtype 16-bit, --only_cpu True "
    "or a smaller --batch_size"
)
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def advice(error: Exception, too_large: str = TOO_LARGE) -> str | None:
    """The line for a mistake of the user's; None for a fault of the program.

    `too_large` is the line for a device without enough memory.
    """
    if isinstance(error, (OSError, ValueError, FloatingPointError)):
        line = " ".join(str(error).split())
        return line if len(line) <= 500 else f"{line[:499]}…"
    full = any(words in str(error) for words in OUT_OF_MEMORY)
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and full:
        return too_large
    return None


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status.

    0; 1 where one of several pictures couldn't be read; 2 after one line of advice;
    as shells expect, 130 when it was interrupted and 141 when nobody reads on.
    """
    for console in (sys.stdout, sys.stderr):  # it may not know every character
        if isinstance(console, io.TextIOWrapper):
            console.reconfigure(errors="backslashreplace")
    try:
        return run(parse_options(argv))
    except KeyboardInterrupt:
        note("stopped")
        return 130
    except BrokenPipeError:  # as of `| head -1`; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        line = advice(error)
        if line is None:
            raise
        note(f"error: {line}")
        return 2


PREVIEW = 480  # the longest side of the picture on the page, in pixels
STYLE = """<style>
.vlm-play { color: var(--vlm-ink, var(--jp-ui-font-color1, inherit));
  font-size: 14px; overflow-wrap: anywhere; }
.vlm-play img { display: block; max-width: 100%; height: auto; margin: 0; }
.vlm-play p { margin: .4em 0; line-height: 1.4; }
.vlm-play ol { display: flex; flex-wrap: wrap; gap: 3px; margin: .4em 0; padding: 0; }
.vlm-play li { list-style: none; margin: 0; padding: 1px 5px; border-radius: 3px;
  color: #111; font: 13px/1.4 monospace; text-align: center; white-space: pre; }
.vlm-play li small { display: block; font-size: 11px; }
.vlm-play pre { margin: .4em 0; padding: 0; background: none; border: none;
  color: inherit; font: 13px/1.4 monospace; overflow-x: auto; }
.vlm-play .halves { display: flex; flex-wrap: wrap; gap: 1em; }
.vlm-play .halves > div { flex: 1 1 20em; min-width: 0; }
.vlm-play .mistake { border-left: 4px solid #D55E00; padding-left: .6em; }
</style>"""


def dressed(content: str) -> str:
    """HTML in the playground's dress, light or dark as the page is."""
    return f'{STYLE}<div class="vlm-play">{content}</div>'


def picture_html(picture: "Image.Image", alt: str) -> str:
    """A picture as HTML that carries it along, small; `alt` says what it shows."""
    scale = PREVIEW / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    file = io.BytesIO()
    picture.resize(size, reducing_gap=3.0).save(file, "jpeg", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{data}">'


def token_strip(answer: "Generation", eos_token_id: int) -> str:
    """The answer's tokens as an HTML list: text, probability, and green the surer."""
    items = []
    rows = zip(answer.token_ids, answer.pieces, answer.probabilities)
    for token_id, piece, p in rows:
        text = "end" if token_id == eos_token_id else piece.strip(" ") or "␣"
        color = ",".join(str(round(255 + (c - 255) * p)) for c in (0, 158, 115))
        items.append(
            f'<li style="background:rgb({color})">{escape(text)}'
            f"<small>{p:.2f}</small></li>"
        )
    name = "The tokens of the answer, each with its probability"
    return f'<ol aria-label="{name}">{"".join(items)}</ol>'


def shipped_pictures() -> dict[str, Path]:
    """The pictures that come with the book: a scene, then the photographs, by name."""
    from .scenes import ASSETS

    folder = Path(str(ASSETS))
    photos = sorted((folder / "photos").glob("*.jpg"))
    pictures = {"the book's scene": folder / "examples" / "scene.png"}
    return pictures | {f"photograph: {path.stem}": path for path in photos}


def example_prompts(kinds: Sequence[str] = ()) -> list[str]:
    """A prompt of each sort about these kinds of sticker, and one about an absent kind.

    No kinds: about an owl and an elephant, which are in the book's scene. Raises
    ValueError for a kind that isn't one of the hundred.
    """
    from .scenes import all_kinds

    kinds = kinds or ("owl", "elephant")
    if unknown := [name for name in kinds if name not in all_kinds()]:
        raise ValueError(f"unknown kind {unknown[0]!r}: all_kinds() has the hundred")
    first, last = all_kinds()[kinds[0]], all_kinds()[kinds[-1]]
    absent = next(name for name in all_kinds() if name not in kinds)
    return [
        "caption en",
        f"detect {' ; '.join(kinds[:3])}",
        f"segment {first.name}",
        f"answer en how many {first.plural} are there?",
        f"answer en is there {last.with_article}?",
        f"answer en what is left of the {first.name}?",
        f"detect {absent}",
    ]


def read_upload(content: bytes, name: str) -> "Image.Image":
    """The bytes of a file → picture in RGB, upright; ValueError where they are none."""
    from PIL import Image

    from .processing import load_image

    try:
        with Image.open(io.BytesIO(content)) as opened:
            return load_image(opened)
    except (OSError, ValueError, Image.DecompressionBombError):
        raise ValueError(
            f"{name} can't be read as a picture: it is damaged, too large or of an "
            "unknown format; save it as PNG or JPEG"
        ) from None


HALF = {"flex": "1 1 20em", "padding": "0 1em 0 0"}  # side by side, if there is room


class Controls:
    """The left half of the playground: what is asked, and how."""

    def __init__(self, shipped: dict[str, Path], room: int):
        import ipywidgets as widgets

        def field(kind: type, name: str, **settings: Any) -> Any:
            look = dict(style={"description_width": "7em"}, layout={"width": "auto"})
            return kind(description=name, **look, **settings)

        self.shipped = shipped
        self.pictures = field(widgets.Dropdown, "picture", options=list(shipped))
        self.new_scene = widgets.Button(description="New scene", icon="random")
        self.upload = widgets.FileUpload(description="Your picture", accept="image/*")
        hint = "for a file of more than 10 MB"
        typed = dict(placeholder=hint, continuous_update=False)  # not at each letter
        self.path = field(widgets.Text, "or its path", **typed)
        self.examples = field(widgets.Dropdown, "examples")
        self.prompt = field(widgets.Text, "prompt", value="caption en")
        self.do_sample = field(widgets.Checkbox, "draw tokens by chance")
        heat, share = dict(min=0.0, max=2.0), dict(min=0.05, max=1.0, step=0.05)
        self.temperature = field(widgets.FloatSlider, "temperature", value=0.8, **heat)
        self.top_p = field(widgets.FloatSlider, "top_p", value=0.9, **share)
        self.top_k = field(widgets.BoundedIntText, "top_k (0: all)", max=10**6)
        self.seed = field(widgets.BoundedIntText, "seed", max=2**31 - 1)
        most = max(1, min(300, room // 2))
        size = dict(min=1, max=most, value=min(150, most))
        self.max_tokens = field(widgets.IntSlider, "max tokens", **size)
        look = dict(icon="play", button_style="primary")
        self.run = widgets.Button(description="Run", **look)
        self.stop = widgets.Button(description="Stop", icon="stop", disabled=True)

        self.choosing = [self.pictures, self.new_scene, self.upload, self.path]
        sampling = [self.temperature, self.top_p, self.top_k, self.seed]
        for widget in sampling:
            switch = (self.do_sample, "value"), (widget, "disabled")
            widgets.dlink(*switch, lambda on: not on)
        self.fields = [self.prompt, self.do_sample, *sampling, self.max_tokens]
        rows = [self.pictures, widgets.HBox([self.new_scene, self.upload])]
        rows += [self.path, self.examples, *self.fields]
        rows += [widgets.HBox([self.run, self.stop])]
        self.box = widgets.VBox(rows, layout=HALF)

    def settings(self) -> "GenerationSettings":
        """What the switch and the sliders say."""
        shaping = (self.temperature.value, self.top_p.value, self.do_sample.value)
        top_k = self.top_k.value or None
        return make_settings(self.max_tokens.value, *shaping, top_k, self.seed.value)

    def describe(self) -> str:
        """What the fields say, a line each; those that are switched off don't count."""
        on = [widget for widget in self.fields if not widget.disabled]
        return "\n".join(f"{widget.description:24}{widget.value}" for widget in on)

    def offer(self, prompts: Sequence[str]) -> None:
        """Examples to choose from; the prompt stays until one is chosen."""
        self.examples.options = [("choose one", ""), *((p, p) for p in prompts)]
        self.examples.index = 0

    def set_busy(self, busy: bool) -> None:
        """While an answer is made only Stop acts, at other times all but Stop."""
        for widget in (*self.choosing, self.run):
            widget.disabled = busy
        self.stop.disabled = not busy


def connect(controls: Controls, playground: "Playground") -> None:
    """Say which widget does what in the playground."""

    def pick(name: str | None) -> None:
        if name is not None:  # None: a picture was opened that isn't in the list
            playground.open(controls.shipped[name], name)

    def take_upload(files: Sequence[dict]) -> None:
        for file in files:
            playground.open(bytes(file["content"]), file["name"])

    def take_path(path: str) -> None:
        if path:
            controls.path.value = ""  # so that the same path can be given again
            playground.open(path, Path(path).name)

    def take_example(prompt: str) -> None:
        if prompt:
            controls.prompt.value = prompt
            controls.examples.value = ""  # so that the same one can be chosen again

    def start() -> None:
        if not controls.run.disabled:
            controls.set_busy(True)
            threading.Thread(target=playground.run, daemon=True).start()

    for widget, act in (
        (controls.pictures, pick),
        (controls.upload, take_upload),
        (controls.path, take_path),
        (controls.examples, take_example),
    ):
        widget.observe(lambda change, act=act: act(change["new"]), "value")
    controls.new_scene.on_click(lambda _: playground.new_scene())
    controls.run.on_click(lambda _: start())
    controls.stop.on_click(lambda _: playground.stopped.set())


class Easel:
    """The right half of the playground: a line, the picture, the answer."""

    def __init__(self, about: str):
        import ipywidgets as widgets

        self.picture: Image.Image | None = None  # in its own size, upright
        self.name = ""
        self.line, self.view, self.text, self.about = outputs = [
            widgets.HTML() for _ in range(4)
        ]
        self.about.value = dressed(f"<p><small>{escape(about)}</small></p>")
        self.box = widgets.VBox(outputs, layout=HALF)

    def open(self, picture: "ImageLike | bytes", name: str) -> None:
        """Put up another picture: a path, an image, an array, or a file's bytes.

        Raises FileNotFoundError and ValueError; the easel is empty then.
        """
        from .processing import load_image

        self.picture = None  # nobody should ask about the last one by mistake
        self.line.value = self.view.value = self.text.value = ""
        is_file = isinstance(picture, bytes)
        self.picture = read_upload(picture, name) if is_file else load_image(picture)
        self.name = f"{name}, {self.picture.width} × {self.picture.height} pixels"
        self.put_up(self.picture)
        self.say(self.name)

    def say(self, line: str, mistake: bool = False) -> None:
        """The line above the picture, marked where it is about a mistake."""
        kind = ' class="mistake" role="alert"' if mistake else ""
        self.line.value = dressed(f"<p{kind}>{escape(line)}</p>")

    def put_up(self, drawing: "Image.Image", found: Sequence = ()) -> None:
        """The picture, small, with what was found on it."""
        labels = ", ".join(thing.label for thing in found)
        name = f"{self.name}; marked on it: {labels}" if found else self.name
        self.view.value = dressed(picture_html(drawing, name))

    def write(self, answer: "Generation", eos_token_id: int, table: str = "") -> None:
        """The answer's words, all of its tokens, and a table."""
        words = re.sub(r"<(loc|seg)\d+>", "", answer.text or "(nothing)")
        parts = f"<p><b>{escape(words)}</b></p>{token_strip(answer, eos_token_id)}"
        parts += f"<pre>{escape(table)}</pre>" if table else ""
        self.text.value = dressed(parts)

    def still(self, settings: str) -> str:
        """Both halves as HTML for where no kernel runs; it says so."""
        line = (
            "What the playground showed when this page was made. Its buttons and "
            "sliders need a kernel: open the notebook in Jupyter, VS Code or Colab."
        )
        left = self.line.value + self.view.value
        right = dressed(f"<pre>{escape(settings)}</pre>")
        right += self.text.value + self.about.value
        halves = f'<div class="halves"><div>{left}</div><div>{right}</div></div>'
        return dressed(f"<p><em>{line}</em></p>{halves}")


PLAYGROUND_FULL = (
    "the device's memory is full: allow fewer tokens, or restart the kernel and load "
    "a smaller checkpoint"
)


def guarded(method: Callable) -> Callable:
    """A mistake of the user's becomes a line in the playground, as in `main`."""

    @functools.wraps(method)
    def attempt(self: "Playground", *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            line = advice(error, PLAYGROUND_FULL)
            if line is None:
                self.easel.say(f"a fault of the program: {error!r}", mistake=True)
                raise
            self.easel.say(line, mistake=True)

    return attempt


class Playground:
    """Widgets that ask a model about a picture; the last line of a cell shows them.

    `model` and `processor`: as for `test_inference`. `decoder`: for `segment …`.
    `about`: who answers. All of it works from Python too: set values in `controls`,
    call `open`, `new_scene` or `run`, and read `answer`, `found` and `drawing` (the
    picture in its own size, with what was found). A mistake of the user's becomes a
    line in the widgets, never an exception.
    """

    def __init__(
        self,
        model: "PaliGemmaForConditionalGeneration",
        processor: "PaliGemmaProcessor",
        decoder: "MaskDecoder | None" = None,
        about: str = "",
    ):
        import ipywidgets as widgets

        self.model, self.processor, self.decoder = model, processor, decoder
        self.stopped = threading.Event()
        positions = model.config.text_config.max_position_embeddings
        shipped, room = shipped_pictures(), positions - processor.num_image_tokens
        self.controls, self.easel = Controls(shipped, room), Easel(about)
        connect(self.controls, self)
        halves = [self.controls.box, self.easel.box]
        self.panel = widgets.Box(halves, layout={"flex_flow": "row wrap"})
        name, path = next(iter(shipped.items()))
        self.open(path, name)

    @guarded
    def open(
        self, picture: "ImageLike | bytes", name: str = "", kinds: Sequence[str] = ()
    ) -> None:
        """Ask about this from now on: a path, an image, an array, or a file's bytes.

        `kinds`: the kinds of sticker in it, if known; the examples are about them.
        """
        self.answer = self.found = self.drawing = None
        if name not in self.controls.shipped:
            self.controls.pictures.index = None
        self.controls.offer(example_prompts(kinds))
        self.easel.open(picture, name or "your picture")

    def new_scene(self, seed: int | None = None) -> None:
        """Ask about a scene that training never saw."""
        from .scenes import VALIDATION_SEEDS, make_scene

        seed = random.choice(VALIDATION_SEEDS) if seed is None else seed
        scene = make_scene(seed, PREVIEW)
        self.open(scene.image, f"validation scene {seed}", list(scene.counts))

    @guarded
    def run(self) -> "Generation | None":
        """Ask, until the end or Stop; returns the answer, or None after a mistake."""
        prompt, picture = self.controls.prompt.value.strip(), self.easel.picture
        end, settings = self.processor.tokenizer.eos_token_id, self.controls.settings()
        self.answer = self.found = self.drawing = None
        self.stopped.clear()
        self.controls.set_busy(True)
        try:
            check_decoder(prompt, self.decoder)
            if picture is None:
                raise ValueError("there is no picture: choose one, or take yours")
            self.easel.put_up(picture)
            self.easel.say("reading the picture and the prompt …")
            asked = (self.model, self.processor, prompt, [picture], settings)
            for (answer,) in answer_steps(*asked):
                self.easel.write(answer, end)
                if self.stopped.is_set():
                    break
            found = read_answer(prompt, answer, picture.size, self.decoder)
            self.answer, self.found = answer, found
            if found is not None:
                self.drawing = draw_found(picture, found)
                self.easel.put_up(self.drawing, found)
                self.easel.write(answer, end, format_table(found))
            lines = answer_remarks(answer, end) + prompt_remarks(prompt)
            if self.stopped.is_set():
                lines = [f"stopped after {len(answer.token_ids)} tokens"]
            self.easel.say("; ".join([self.easel.name, *lines]))
        finally:
            self.controls.set_busy(False)
        return answer

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        "The widgets; and for where no kernel runs, a picture of them that says so."
        still = self.easel.still(self.controls.describe())
        return self.panel._repr_mimebundle_(**kwargs) | {"text/html": still}


def playground(
    model_path: str | os.PathLike | None = None,
    mask_decoder: str | os.PathLike | None = None,
) -> Playground:
    """A Playground of the model at `model_path`, a folder or a hub id.

    Without one: of the model that the variable VLM_MODEL names, else the embedded one.
    `mask_decoder`: an .npz or a folder, for a checkpoint that has none beside it.
    Raises what `load_hf_model` and `load_mask_decoder` raise.
    """
    from .segmentation import load_mask_decoder
    from .weights import (
        describe_model,
        load_chosen_model,
        load_hf_model,
        make_processor,
    )

    if model_path is None:
        wanted = os.environ.get("VLM_MODEL", "").strip()
        model, tokenizer, about = load_chosen_model()
        if about != describe_model(model):  # another than the embedded one
            model_path = wanted
        elif wanted:  # it can't be had, and the decoder belongs to it
            mask_decoder = None
    else:
        model, tokenizer = load_hf_model(model_path)
        about = describe_model(model, model_path)
    decoder = None
    try:
        decoder = load_mask_decoder(model_path, mask_decoder)
    except ValueError as error:
        if mask_decoder is not None:
            raise
        about = f"{about}. No masks: {error}"
    return Playground(model, make_processor(model, tokenizer), decoder, about)


if __name__ == "__main__":
    raise SystemExit(main())
