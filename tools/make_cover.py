"""Draw the README's picture: what the embedded model answers about three scenes.

    python tools/make_cover.py

Every word and box is the model's own answer to the prompt above it, on held-out scenes
drawn at 320 px.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm import PaliGemmaProcessor, generate, load_hf_model, parse_detections
from vlm.detection import draw_detections
from vlm.scenes import HELD_OUT_SEEDS, make_scene

COVER = Path(__file__).parents[1] / "book" / "images" / "cover.png"
SIDE, MARGIN, TEXT = 320, 16, 92
PANELS = (  # place among the held-out scenes, prompt
    (417, "caption en"),
    (417, "detect elephant"),
    (417, "answer en is there an owl?"),
)
PROMPT_COLOR, ANSWER_COLOR, INK, PAPER = "#B87A00", "#007A59", "#222222", "#FFFFFF"


def wrap(text: str, width: int, font: ImageFont.ImageFont) -> list[str]:
    """Break a text into lines no wider than `width` pixels."""
    lines = [""]
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
    vision = model.config.vision_config
    processor = PaliGemmaProcessor(
        tokenizer, vision.num_image_tokens, vision.image_size
    )
    font = ImageFont.load_default(size=17)
    width = MARGIN + (SIDE + MARGIN) * len(PANELS)
    cover = Image.new("RGB", (width, SIDE + 2 * MARGIN + TEXT), PAPER)
    draw = ImageDraw.Draw(cover)
    for number, (place, prompt) in enumerate(PANELS):
        picture = make_scene(HELD_OUT_SEEDS[place], SIDE).image
        inputs = processor([prompt], [picture])
        (answer,) = generate(model, tokenizer, inputs, max_new_tokens=64)
        found = parse_detections(answer, SIDE, SIDE) if "<loc" in answer else []
        left = MARGIN + number * (SIDE + MARGIN)
        cover.paste(draw_detections(picture, found), (left, MARGIN))
        lines = [(prompt, PROMPT_COLOR)]
        lines += [(line, ANSWER_COLOR) for line in wrap(answer, SIDE, font)]
        for row, (line, color) in enumerate(lines):
            place = (left, SIDE + 1.5 * MARGIN + 21 * row)
            draw.text(place, line, fill=color, font=font)
    COVER.parent.mkdir(parents=True, exist_ok=True)
    cover.save(COVER, optimize=True)
    print(f"wrote {COVER}")


if __name__ == "__main__":
    main()
