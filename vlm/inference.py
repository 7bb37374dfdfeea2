"""The command line: ask a model about one image or many; `test_inference` in Python.

Built in notebooks/30_inference.ipynb: edit it there, then run `make export`.
"""

import argparse
import glob
import json
import os
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .cli import OneLineParser, print_err, run_main

if TYPE_CHECKING:  # importing torch takes seconds: --help and typos don't wait for it
    import torch

    from .mask_tokens import MaskDecoder
    from .paligemma import PaliGemmaForConditionalGeneration
    from .processing import PaliGemmaProcessor
    from .sampling import GenerationConfig

# First words of the prompts; the last four are known to `pt` checkpoints only.
TASKS = ("caption", "answer", "detect", "segment", "cap", "describe", "ocr", "question")
# Second words of `caption` and `answer`: the languages of Crossmodal-3600.
LANGUAGES = """ar bn cs da de el en es fa fi fil fr he hi hr hu id it iw ja ko mi nl no
pl pt quz ro ru sv sw te th tr uk vi zh""".split()


def check_prompt(prompt: str, has_decoder: bool = True) -> tuple[str, list[str]]:
    """(its first word, the task; warnings where PaliGemma may not take it as meant).

    Raises ValueError where it asks nothing, and for `segment …` without a mask decoder.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a string, not {type(prompt).__name__}")
    task, *words = prompt.split() or [""]
    rest, meant = " ".join(words), task.rstrip(":").lower()
    names = [name for name in re.split(r"\s*(?:[,;]|\band\b)\s*", rest) if name]
    if not task:
        raise ValueError('the prompt is empty: say what to ask, as in "caption en"')
    if task in ("detect", "segment") and not names:
        raise ValueError(f'{task} what? Name it, as in "{task} owl"')
    if task == "segment" and not has_decoder:
        raise ValueError("segment needs the mask decoder: see load_mask_decoder")
    if task in ("detect", "segment") and len(names) > rest.count(";") + 1:
        separated = f'"{task} {" ; ".join(names)}"'
        return task, [f'only ";" separates names: write {separated}']
    if task in ("caption", "answer") and not {*words[:1]} & {*LANGUAGES}:
        asked = "" if task == "caption" else f" {rest or 'is it red?'}"
        return task, [f'a language comes after {task}: "{task} en{asked}"']
    hint = 'try "caption en", "detect owl" or "answer en is there an owl?"'
    hint = f'write "{meant} {rest}"' if meant in TASKS else hint
    unknown = f"{task!r} isn't a task that PaliGemma is trained on: {hint}"
    return task, [] if task in TASKS else [unknown]


USAGE = "python -m vlm.inference --prompt PROMPT --image_file_path IMAGE [options]"
ABOUT = """
Ask a vision-language model about a picture, or about many. The answer appears as it is
made; boxes and masks are listed in pixels of the picture and drawn into --output.

Prompts: "caption en", "answer en is there an owl?", "detect owl ; pizza", "segment owl"

Without --model_path the embedded model answers. It knows about a hundred kinds of
sticker and nothing else of the world: shown a photograph, it sees stickers in it. For
photographs give --model_path a PaliGemma checkpoint, a folder or a hub id such as
google/paligemma-3b-mix-224@bfloat16 (@ names a branch, tag or commit), and to segment
give --mask_decoder the file that belongs to it: for Google's that is vae-oid.npz.

With --json each picture gives one line: an object with file, width, height, prompt,
answer, truncated, objects (in COCO's form: label, score, bbox, segmentation), invalid
and repeated; or, for a file that can't be read, with file, prompt and error. The exit
status is 1 then, 2 for a request that can't be met.

Examples:
  python -m vlm.inference --prompt "segment owl" --image_file_path a.png --output b.png
  python -m vlm.inference --prompt "detect owl" --image_file_path folder "more/*.jpg"
      --output drawings --json > found.jsonl
"""
OUT_OF_MEMORY = "try --dtype 16-bit, --only_cpu True or a smaller --batch_size"


def build_parser() -> OneLineParser:
    """All flags, with their help."""
    parser = OneLineParser(usage=USAGE, description=ABOUT)
    add, add_switch = parser.add_argument, parser.add_switch
    path, whole = dict(type="path", metavar="PATH"), dict(type=int, metavar="N")
    several, real = dict(nargs="+", action="extend"), dict(type=float, metavar="X")
    images = "what to ask about: files, folders, patterns in quotes"
    drawing = "where to draw what was found: .png or .jpg; a folder for several"
    add("--prompt", required=True, help='what to ask, in quotes: "detect owl"')
    add("--image_file_path", required=True, **path, **several, help=images)
    add("--output", **path, help=drawing)
    add_switch("--json", "a JSON object for each image, on a line of its own")
    add("--model_path", **path, help="folder or hub id; default: embedded")
    add("--mask_decoder", **path, help="an .npz or a folder; default: the model's own")
    add("--max_tokens_to_generate", **whole, default=100, help="default: 100")
    add_switch("--do_sample", "sample, instead of greedy decoding")
    add("--temperature", **real, help="of sampling; default: 0.8")
    add("--top_p", **real, help="of sampling; default: 0.9, 1: all")
    add("--top_k", **whole, help="of sampling; default: all")
    add("--seed", **whole, help="of sampling: the same answer again")
    add("--batch_size", **whole, default=1, help="images to ask about at once")
    add("--dtype", default="auto", help="of the weights: 16-bit, float32 …")
    add_switch("--only_cpu", "run on the CPU, even where there is a GPU")
    return parser


def find_images(words: Sequence[str]) -> list[str]:
    """The files that some words name, each once.

    A folder stands for the images in it, a pattern with `*`, `?` or `[` for the files
    that match, any other word for a file. FileNotFoundError where none is found.
    """
    files, suffixes = [], set()
    for suffix, name in Image.registered_extensions().items():
        if name in Image.OPEN and Image.MIME.get(name, "").startswith("image/"):
            suffixes.add(suffix)  # neither a PDF, which it can't read, nor a video
    for word in words:
        found = [word]
        if os.path.isdir(word):
            inside = sorted(glob.glob(os.path.join(glob.escape(word), "*")))
            found = [file for file in inside if Path(file).suffix.lower() in suffixes]
        elif {*"*?["} & {*word} and "://" not in word and not os.path.exists(word):
            found = sorted(filter(os.path.isfile, glob.glob(word, recursive=True)))
        if not found:
            raise FileNotFoundError(f"no picture found in {word}")
        files += found
    return list(dict.fromkeys(files))


def drawing_paths(
    output: str | Path | None, images: Sequence[str | Path], single: bool = True
) -> dict[str | Path, Path]:
    """Where to draw, by image file: `output`, or for several a file in that folder.

    The folder is made where there is none; .png is added to what isn't a PNG or JPEG.
    Raises ValueError and FileNotFoundError where a drawing can't be saved, or would
    replace an image or another drawing.
    """
    if output is None:
        return {}
    output, usual = Path(os.path.expanduser(output)), (".png", ".jpg", ".jpeg")
    wanted = "file that ends in .png or .jpg" if single else "folder, for many drawings"
    paths = [Path(os.path.expanduser(file)) for file in images]
    taken = paths if single else [path.parent for path in paths]
    if not output.parent.is_dir():
        raise FileNotFoundError(f"no folder {output.parent}: make it for --output")
    if (output.suffix.lower() in usual) != single:
        raise ValueError(f"--output {output} must be a {wanted}")
    if output.exists() and any(p.exists() and output.samefile(p) for p in taken):
        raise ValueError(f"--output {output} would replace an image: choose another")
    if single:
        return {images[0]: output}
    output.mkdir(exist_ok=True)
    names = [p.name if p.suffix.lower() in usual else f"{p.name}.png" for p in paths]
    if len({*map(str.casefold, names)}) < len(names):  # on some disks one file
        raise ValueError(f"--output {output}: some images have one name, split them")
    return {file: output / name for file, name in zip(images, names)}


def make_settings(max_tokens_to_generate: int, **settings: Any) -> "GenerationConfig":
    """The settings of generation; errors call the limit by the flag's name."""
    from .sampling import GenerationConfig

    try:
        return GenerationConfig(max_new_tokens=max_tokens_to_generate, **settings)
    except ValueError as error:
        message = str(error).replace("max_new_tokens", "max_tokens_to_generate")
        raise ValueError(message.removesuffix(", or None")) from None


def test_inference(
    model: "PaliGemmaForConditionalGeneration",
    processor: "PaliGemmaProcessor",
    device: "str | torch.device",
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
    """Ask `model` on `device` about an image; print the answer and return its text.

    Boxes and masks are printed as a table in pixels of the image, and drawn on a copy
    of it, `output`. `decoder`: the model's mask decoder, which `segment …` needs.
    Raises FileNotFoundError, ValueError and TypeError that say what to do.
    """
    from .answers import print_answers
    from .devices import choose_device
    from .images import load_image
    from .processing import PaliGemmaProcessor

    _, warnings = check_prompt(prompt, has_decoder=callable(decoder))
    if not isinstance(processor, PaliGemmaProcessor):
        raise TypeError("processor must be what make_processor(model, tokenizer) makes")
    if not isinstance(do_sample, bool):
        raise TypeError(f"do_sample must be True or False, not {do_sample!r}")
    device, image = choose_device(device), load_image(image_file_path)
    sampling = dict(do_sample=do_sample, temperature=temperature, top_k=top_k)
    settings = make_settings(max_tokens_to_generate, **sampling, top_p=top_p, seed=seed)
    outputs = drawing_paths(output, [image_file_path])
    for line in warnings:
        print_err(line)
    parts, images = (model.to(device), processor, decoder), {image_file_path: image}
    return print_answers(*parts, prompt, images, settings, outputs)[0]


test_inference.__test__ = False  # the name is a habit of the field, not a test


def load_images(files: Sequence[str], prompt: str, style: str) -> dict:
    """The images by file; errors are reported, but raised in the style "stream"."""
    from .images import load_image

    images = {}
    for file in files:
        try:
            images[file] = load_image(file)
        except (OSError, ValueError) as error:
            if style == "stream":
                raise
            why = str(error) if file in str(error) else f"{file}: {error}"
            print_err(f"error: {why}")
            if style == "json":
                print(json.dumps(dict(file=file, prompt=prompt, error=why)), flush=True)
    return images


def load_parts(options: argparse.Namespace) -> tuple:
    """Model, processor and, to `segment`, the mask decoder, which is checked first."""
    from .segmentation import load_mask_decoder
    from .weights import load_hf_model, make_processor

    decoder, device = None, "cpu" if options.only_cpu else "auto"
    if options.prompt.split()[0] == "segment":
        decoder = load_mask_decoder(options.model_path, options.mask_decoder)
    model, tokenizer = load_hf_model(options.model_path, device, options.dtype)
    return model, make_processor(model, tokenizer), decoder


def run(options: argparse.Namespace) -> int:
    """Do what the flags ask, cheap checks first; returns the exit status."""
    prompt, words = options.prompt, options.image_file_path
    (task, warnings), files = check_prompt(prompt), find_images(words)
    single = len(words) == 1 and files == words
    outputs = drawing_paths(options.output, files, single)
    if options.batch_size < 1:
        raise ValueError(f"--batch_size {options.batch_size} must be at least 1")
    names, flags = ("temperature", "top_p", "top_k", "seed"), vars(options)
    given = {name: flags[name] for name in names if flags[name] is not None}
    sampling = dict(do_sample=options.do_sample, temperature=0.8, top_p=0.9) | given
    if options.do_sample and options.seed is None:  # PyTorch's is the same in each run
        sampling["seed"] = random.SystemRandom().randrange(2**32)
    settings = make_settings(options.max_tokens_to_generate, **sampling)
    if not options.do_sample:
        warnings += [f"--{name} counts only with --do_sample True" for name in given]
    if options.mask_decoder is not None and task != "segment":
        warnings.append('--mask_decoder counts only with a prompt like "segment owl"')

    from tqdm import tqdm

    from .answers import print_answers
    from .weights import describe_model

    style = "json" if options.json else "stream" if single else "text"
    # None hides the bar, too, where stderr is no terminal.
    hidden = True if single or sys.stderr is None else None
    starts, parts, status = range(0, len(files), options.batch_size), None, 0
    for start in tqdm(starts, unit="batch", disable=hidden):
        batch = files[start : start + options.batch_size]
        images = load_images(batch, prompt, style)
        status |= len(images) < len(batch)
        if images and parts is None:
            for line in warnings:
                print_err(line)
            parts = load_parts(options)
        if images:
            print_answers(*parts, prompt, images, settings, outputs, style)
    if parts is not None:
        drawn = f"; again with --seed {settings.seed}"
        again = drawn if settings.seed != options.seed else ""
        print_err(f"answered by {describe_model(parts[0], options.model_path)}{again}")
    return status


def main(argv: list[str] | None = None) -> int:
    """The command line; beside `run_main`'s statuses, 1 where some images failed."""
    return run_main(lambda: run(build_parser().parse_args(argv)), OUT_OF_MEMORY)


if __name__ == "__main__":
    raise SystemExit(main())
