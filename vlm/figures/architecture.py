"""The one map of the book: where a chapter's module sits in the whole."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from IPython.display import HTML

VISION, TEXT, SUFFIX, EXTRA = "vision", "text", "suffix", "extra"
FALLBACK = {VISION: "#0072B2", TEXT: "#E69F00", SUFFIX: "#009E73", EXTRA: "#CC79A7"}
WIDTH, HEIGHT = 846, 372


@dataclass(frozen=True)
class Box:
    """A module's place on the map, in the drawing's own units."""

    module: str
    x: int
    y: int
    width: int
    height: int
    color: str
    title: str
    detail: str = ""


BOXES = (
    Box(
        "patch_embeddings", 116, 44, 112, 50, VISION, "patch_embeddings", "cut, project"
    ),
    Box("siglip", 252, 44, 112, 50, VISION, "siglip", "vision tower"),
    Box("projector", 388, 44, 112, 50, VISION, "projector", "linear map"),
    Box("images", 116, 112, 112, 42, VISION, "images", "file to pixels"),
    Box("processing", 116, 164, 112, 42, TEXT, "processing", "token ids"),
    Box("merging", 252, 156, 112, 50, TEXT, "merging", "image tokens"),
    Box("gemma", 388, 124, 214, 148, TEXT, "gemma", "decoder"),
    Box("rmsnorm", 400, 160, 92, 30, TEXT, "rmsnorm"),
    Box("rope", 498, 160, 92, 30, TEXT, "rope"),
    Box("attention", 400, 196, 92, 30, TEXT, "attention"),
    Box("kv_cache", 498, 196, 92, 30, TEXT, "kv_cache"),
    Box("masks", 400, 232, 92, 30, TEXT, "masks"),
    Box("gemma2", 498, 232, 92, 30, TEXT, "gemma2"),
    Box("sampling", 634, 140, 92, 50, SUFFIX, "sampling", "next token"),
    Box("captioning", 746, 44, 94, 34, SUFFIX, "captioning"),
    Box("detection", 746, 112, 94, 34, SUFFIX, "detection"),
    Box("metrics", 746, 151, 94, 24, EXTRA, "metrics"),
    Box("segmentation", 746, 180, 94, 34, SUFFIX, "segmentation"),
    Box("mask_tokens", 746, 238, 94, 34, SUFFIX, "mask_tokens"),
    Box("scenes", 12, 316, 84, 40, EXTRA, "scenes", "a world"),
    Box("questions", 116, 316, 84, 40, EXTRA, "questions", "and answers"),
    Box("training", 220, 316, 84, 40, EXTRA, "training", "one trainer"),
    Box("pretraining", 324, 316, 98, 40, EXTRA, "pretraining", "the recipe"),
    Box("weights", 442, 316, 80, 40, EXTRA, "weights", "files"),
    Box("speed", 536, 316, 80, 40, EXTRA, "speed", "hardware"),
    Box("finetuning", 634, 316, 98, 40, EXTRA, "finetuning", "your data"),
    Box("inference", 742, 284, 98, 32, EXTRA, "inference"),
    Box("playground", 742, 324, 98, 32, EXTRA, "playground"),
)
FRAME = {"config", "paligemma"}  # these chapters are about the whole model
MODULES = {box.module for box in BOXES} | FRAME

# Lines from place to place: (points, colour)
ARROWS = (
    ("84,133 116,133", VISION),
    ("228,69 252,69", VISION),
    ("364,69 388,69", VISION),
    ("444,94 444,110 308,110 308,156", VISION),
    ("84,181 116,181", TEXT),
    ("172,112 172,94", VISION),
    ("228,181 252,181", TEXT),
    ("364,181 388,181", TEXT),
    ("602,165 634,165", SUFFIX),
    ("726,158 736,158 736,61 746,61", SUFFIX),
    ("726,165 736,165 736,129 746,129", SUFFIX),
    ("726,172 736,172 736,197 746,197", SUFFIX),
    ("793,238 793,214", SUFFIX),
    ("680,190 680,288 495,288 495,272", SUFFIX),
    ("96,336 116,336", EXTRA),
    ("200,336 220,336", EXTRA),
    ("304,336 324,336", EXTRA),
    ("422,336 442,336", EXTRA),
)


def _color(name: str) -> str:
    return f"var(--vlm-{name}, {FALLBACK[name]})"


def _text(x: float, y: float, text: str, size: float, style: str = "") -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="middle" '
        f'fill="var(--vlm-ink, #222)" {style}>{escape(text)}</text>'
    )


def _draw_box(box: Box, lit: bool) -> str:
    color = _color(box.color)
    ink = "var(--vlm-paper, #fff)" if lit else "var(--vlm-ink, #222)"
    fill = color if lit else "var(--vlm-paper, #fff)"
    holds_others = box.module == "gemma"
    middle = box.x + box.width / 2
    size = 10.5 if len(box.title) > 14 else 11.5 if box.width < 100 else 12
    if holds_others:
        baseline = box.y + 22
    elif box.detail:
        baseline = box.y + box.height / 2 - 2
    else:
        baseline = box.y + box.height / 2 + 4
    weight = "700" if lit else "500"
    parts = [
        f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" '
        f'rx="7" fill="{fill}" stroke="{color}" stroke-width="{3 if lit else 1.5}"/>',
        f'<text x="{middle}" y="{baseline}" font-size="{size}" text-anchor="middle" '
        f'font-weight="{weight}" fill="{ink}">{box.title}</text>',
    ]
    if box.detail and not holds_others:
        parts.append(
            f'<text x="{middle}" y="{baseline + 15}" font-size="10.5" '
            f'text-anchor="middle" fill="{ink}" opacity="0.8">{box.detail}</text>'
        )
    return "".join(parts)


def architecture_map(lit: str) -> HTML:
    """The map of the whole model with the box of the module `lit` filled.

    `config` and `paligemma` light the frame around the model. Works in light and dark
    mode and without a kernel. Raises ValueError for a module that isn't on the map.
    """
    if lit not in MODULES:
        raise ValueError(f"{lit!r} is not on the map; it has {sorted(MODULES)}")
    arrow_ids = {color: f"vlm-map-{lit}-{color}" for color in FALLBACK}
    markers = "".join(
        f'<marker id="{arrow_ids[color]}" viewBox="0 0 8 8" refX="7" refY="4" '
        f'markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{_color(color)}"/></marker>'
        for color in FALLBACK
    )
    arrows = "".join(
        f'<polyline points="{points}" fill="none" stroke="{_color(color)}" '
        f'stroke-width="1.6" marker-end="url(#{arrow_ids[color]})"/>'
        for points, color in ARROWS
    )
    frame_lit = lit in FRAME
    frame = (
        '<rect x="104" y="16" width="510" height="268" rx="12" fill="none" '
        f'stroke="{_color(VISION) if frame_lit else "var(--vlm-line, #ccc)"}" '
        f'stroke-width="{4 if frame_lit else 1.2}" '
        f'stroke-dasharray="{"none" if frame_lit else "5 4"}"/>'
    )
    name = "config · paligemma" if lit not in FRAME else lit
    weight = 'font-weight="700"' if frame_lit else 'opacity="0.7"'
    labels = (
        _text(190, 34, name, 12, weight)
        + _text(50, 137, "picture", 13)
        + _text(50, 185, "prompt", 13)
        + _text(568, 146, "decoder", 10.5, 'opacity="0.8"')
    )
    boxes = "".join(_draw_box(box, box.module == lit) for box in BOXES)
    label = f"Map of the model; this chapter builds {lit}."
    return HTML(
        f'<figure class="vlm-map" style="margin:1em 0">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" '
        f'aria-label="{escape(label)}" font-family="system-ui, sans-serif" '
        f'style="max-width:{WIDTH}px;background:var(--vlm-paper, #fff);'
        f'border-radius:8px"><defs>{markers}</defs>'
        f"{frame}{arrows}{boxes}{labels}</svg></figure>"
    )
