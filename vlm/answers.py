"""Answers about images: token by token, as text, table, COCO objects or a drawing.

Built in notebooks/30_inference.ipynb: edit it there, then run `make export`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from .cli import print_err, printable
from .detection import ParsedObjects, draw_objects, parse_detections
from .mask_tokens import MaskDecoder
from .paligemma import PaliGemmaForConditionalGeneration
from .processing import PaliGemmaProcessor
from .sampling import Generation, GenerationConfig, generation_steps
from .segmentation import parse_segmentations


def parse_answer(
    prompt: str,
    answer: Generation,
    size: tuple[int, int],
    decoder: MaskDecoder | None = None,
) -> ParsedObjects | None:
    """What the answer found, in pixels of the upright image: `size` is (W, H).

    Detections for `detect …`, Segmentations for `segment …`, None for other tasks.
    """
    task = prompt.split()[0]
    if task == "segment":
        return parse_segmentations(answer, *size, decoder)
    return parse_detections(answer, *size) if task == "detect" else None


def format_table(found: ParsedObjects) -> str:
    """What was found, a line each: label, x0 y0 x1 y1 in pixels, score.

    Segmentations have a column more: how many pixels the mask has.
    """
    has_masks = any(hasattr(one, "mask") for one in found)
    columns = ["label", "x0", "y0", "x1", "y1", *["mask"] * has_masks, "score"]
    rows = [columns] if found else [["nothing found"]]
    for one in found:
        pixels = [*map(round, one.box), *([one.mask.sum()] if has_masks else [])]
        label, score = printable(" ".join(one.label.split())), f"{one.score:.2f}"
        rows.append([label, *map(str, pixels), score])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for label, *numbers in rows:
        cells = map(str.rjust, numbers, widths[1:])
        lines.append("  ".join([label.ljust(widths[0]), *cells]))
    if found.invalid:
        lines.append(f"{found.invalid} left out: no valid box or mask")
    if found.repeated:
        lines.append(f"{found.repeated} left out: written before, token by token")
    return "\n".join(lines)


def to_coco(found: ParsedObjects) -> list[dict[str, Any]]:
    """What was found, in COCO's form: label, score, bbox, and a mask's segmentation.

    bbox is [x, y, width, height] in pixels; segmentation is pycocotools' run lengths.
    """
    objects = []
    for one in found:
        x0, y0, x1, y1 = one.box
        bbox = [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)]
        objects.append({"label": one.label, "score": round(one.score, 4), "bbox": bbox})
        if hasattr(one, "mask"):
            runs = coco_mask.encode(np.asfortranarray(one.mask, dtype=np.uint8))
            objects[-1]["segmentation"] = runs | {"counts": runs["counts"].decode()}
    return objects


def answer_warnings(answer: Generation, eos_token_id: int) -> list[str]:
    """What to know about an answer: that it was cut off, if it was."""
    if answer.token_ids[-1] == eos_token_id:
        return []
    return [f"cut after {len(answer.token_ids)} tokens: a higher limit allows more"]


def print_answers(
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    decoder: MaskDecoder | None,
    prompt: str,
    images: dict[str | Path, Image.Image],
    settings: GenerationConfig,
    outputs: dict[str | Path, Path],
    style: str = "stream",
) -> list[str]:
    """Ask about `images`, by file; print the answers, and return their texts.

    `style`: "stream" prints the one answer as it is made, "text" each complete answer
    after its file, "json" an object a line. `outputs`: where to draw, by file.
    """
    inputs = processor(text=[prompt] * len(images), images=[*images.values()])
    for answers in generation_steps(model, processor.tokenizer, inputs, settings):
        if style == "stream":
            print(answers[0].pieces[-1], end="", flush=True)
    for (file, image), answer in zip(images.items(), answers):
        found = parse_answer(prompt, answer, image.size, decoder)
        warnings = answer_warnings(answer, processor.tokenizer.eos_token_id)
        text = "" if style == "stream" else f"{printable(file)}: {answer.text}"
        if found is not None:
            text += f"\n{format_table(found)}"
        if style == "json":
            objects = ParsedObjects() if found is None else found
            record = dict(file=file, width=image.width, height=image.height)
            record |= dict(prompt=prompt, answer=answer.text, truncated=bool(warnings))
            record |= dict(objects=to_coco(objects), invalid=objects.invalid)
            text = json.dumps(record | dict(repeated=objects.repeated))
        with tqdm.external_write_mode():  # above the bar, if there is one
            print(text, flush=True)
        if outputs:
            draw_objects(image, found or ()).save(outputs[file])
        if outputs and style == "stream":
            empty = "" if found else ", without a box"
            warnings.append(f"wrote {outputs[file]}{empty}")
        for line in warnings:
            print_err(line if style == "stream" else f"{file}: {line}")
    return [answer.text for answer in answers]
