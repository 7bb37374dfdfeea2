"""Draw the README's picture: what the embedded model answers to four prompts.

    python tools/make_cover.py

Every word, box and mask is the model's own answer to the prompt above it, on
validation scenes drawn at 320 px.
"""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm import load_hf_model
from vlm.answers import parse_answer
from vlm.detection import draw_objects
from vlm.sampling import generate_tokens
from vlm.scenes import VALIDATION_SEEDS, make_scene
from vlm.segmentation import load_mask_decoder
from vlm.weights import make_processor

COVER = Path(__file__).parents[1] / "book" / "images" / "cover.png"
SIDE, MARGIN, TEXT = 320, 16, 114
PANELS = (  # place among the validation scenes, prompt
    (417, "caption en"),
    (417, "detect owl"),
    (417, "segment elephant"),
    (417, "answer en is there an owl?"),
)
PROMPT_COLOR, ANSWER_COLOR, INK, PAPER = "#B87A00", "#007A59", "#222222", "#FFFFFF"


def wrap(text: str, width: int, font: ImageFont.ImageFont) -> list[str]:
    """Break a text into lines no wider than `width` pixels; of sixteen seg tokens three
    are written out."""
    lines = [""]
    text = re.sub(r"((?:<seg\d+>){3})(?:<seg\d+>){13}", r"\1 …", text)
    for word in text.replace("><", "> <").split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def main() -> None:
    """Ask, draw, write."""
    model, tokenizer = load_hf_model(device="cpu")
    processor = make_processor(model, tokenizer)
    decoder = load_mask_decoder()
    font = ImageFont.load_default(size=17)
    width = MARGIN + (SIDE + MARGIN) * len(PANELS)
    cover = Image.new("RGB", (width, SIDE + 2 * MARGIN + TEXT), PAPER)
    draw = ImageDraw.Draw(cover)
    for number, (place, prompt) in enumerate(PANELS):
        picture = make_scene(VALIDATION_SEEDS[place], SIDE).image
        inputs = processor([prompt], [picture])
        (answer,) = generate_tokens(model, tokenizer, inputs, max_new_tokens=64)
        found = parse_answer(prompt, answer, picture.size, decoder)
        picture = draw_objects(picture, found or ())
        left = MARGIN + number * (SIDE + MARGIN)
        cover.paste(picture, (left, MARGIN))
        lines = [(prompt, PROMPT_COLOR)]
        lines += [(line, ANSWER_COLOR) for line in wrap(answer.text, SIDE, font)]
        for row, (line, color) in enumerate(lines):
            place = (left, SIDE + 1.5 * MARGIN + 21 * row)
            draw.text(place, line, fill=color, font=font)
    COVER.parent.mkdir(parents=True, exist_ok=True)
    cover.save(COVER, optimize=True)
    print(f"wrote {COVER}")


if __name__ == "__main__":
    main()
