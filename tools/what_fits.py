"""Compute the table "What fits where" of the weights page, from sizes alone.

    python tools/what_fits.py [--check]

Weights, and the cache of keys and values for one picture and 256 tokens of text, of
every checkpoint family, in bytes. Nothing is run: the models are built without numbers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from accelerate import init_empty_weights

from vlm import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from vlm.config import Gemma2Config

PAGE = Path(__file__).resolve().parent.parent / "book" / "weights.md"
FAMILIES = {  # PaliGemma's default sizes and PaliGemma 2's are those of their 3B models
    "PaliGemma 3B": GemmaConfig(),
    "PaliGemma 2 3B": Gemma2Config(),
    "PaliGemma 2 10B": Gemma2Config(
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
    "PaliGemma 2 28B": Gemma2Config(
        hidden_size=4608,
        intermediate_size=36864,
        num_hidden_layers=46,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144,
    ),
}
SIDES = (224, 448, 896)
FORMATS = {"float32": 4, "bfloat16, float16": 2}
MACHINES = (8, 16, 24, 80)  # gigabytes
TEXT_TOKENS = 256
# What activations, libraries and the screen leave of a machine's memory.
COMFORTABLE, TIGHT = 0.7, 0.92


def make_config(family: str, side: int) -> PaliGemmaConfig:
    """The sizes of one checkpoint; PaliGemma 2's decoder is a Gemma 2."""
    text = FAMILIES[family]
    return PaliGemmaConfig(
        vision_config={"image_size": side},
        text_config=text,
        projection_dim=text.hidden_size,
    )


def count_weights(config: PaliGemmaConfig) -> int:
    """Parameters of the whole model; the tied head counts once."""
    with init_empty_weights():
        model = PaliGemmaForConditionalGeneration(config)
    model.tie_weights()
    return sum(weight.numel() for weight in model.parameters())


def cache_numbers(config: PaliGemmaConfig) -> int:
    """Numbers in the cache of one row: a picture, and some text."""
    text = config.text_config
    tokens = config.vision_config.num_image_tokens + TEXT_TOKENS
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return tokens * per_token


def verdict(share: float) -> str:
    """How much of a machine is taken → what to expect."""
    return "yes" if share <= COMFORTABLE else "tight" if share <= TIGHT else "–"


def table() -> str:
    """The Markdown table: a row for each family and number format."""
    sides = " / ".join(str(side) for side in SIDES)
    machines = " | ".join(f"{size} GB" for size in MACHINES)
    lines = [
        f"| checkpoint | dtype | weights, GB | cache, GB: {sides} px | {machines} |",
        "|---|---|--:|--:|" + ":-:|" * len(MACHINES),
    ]
    for family in FAMILIES:
        configs = [make_config(family, side) for side in SIDES]
        weights = count_weights(configs[0])  # larger tables of positions are nothing
        for name, size in FORMATS.items():
            caches = [cache_numbers(config) * size / 1e9 for config in configs]
            needed = weights * size / 1e9 + caches[-1]
            cells = [f"{family}: {weights / 1e9:.2f} billion", name]
            cells += [f"{weights * size / 1e9:.2f}"]
            cells += [" / ".join(f"{cache:.2f}" for cache in caches)]
            cells += [verdict(needed / machine) for machine in MACHINES]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fill(name: str, text: str) -> str:
    """The weights page with `text` between the two markers called `name`."""
    page = PAGE.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = page.partition(start)
    _, also_found, after = rest.partition(end)
    if not (found and also_found):
        raise SystemExit(f"{PAGE} has no markers {start} and {end}")
    return f"{before}{start}\n\n{text}\n\n{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    page = fill("what fits", table())
    if arguments.check:
        if page != PAGE.read_text(encoding="utf-8"):
            print(f"{PAGE} is out of date: run tools/what_fits.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(page, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
