"""A playground of widgets: ask a model about an image, watch its tokens, stop it.

Built in notebooks/31_playground.ipynb: edit it there, then run `make export`.
"""

import io
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from PIL import Image

from .answers import (
    answer_steps,
    answer_warnings,
    draw_answer,
    format_table,
    parse_answer,
)
from .cli import user_message
from .figures import playground as html
from .hub import EMBEDDED
from .images import ImageLike, load_image
from .mask_tokens import MaskDecoder
from .paligemma import PaliGemmaForConditionalGeneration
from .processing import PaliGemmaProcessor
from .prompts import check_decoder, prompt_warnings
from .sampling import Generation, GenerationConfig
from .scenes import ASSETS, VALIDATION_SEEDS, all_classes, make_scene, with_article
from .segmentation import load_mask_decoder
from .weights import describe_model, load_chosen_model, load_hf_model, make_processor


def shipped_images() -> dict[str, Path]:
    """The images that come with the book: a scene, then the photographs, by name."""
    folder = Path(str(ASSETS))
    photos = sorted((folder / "photos").glob("*.jpg"))
    images = {"the book's scene": folder / "examples" / "scene.png"}
    return images | {f"photograph: {path.stem}": path for path in photos}


def example_prompts(kinds: Sequence[str]) -> list[str]:
    """A prompt of each sort about these kinds of sticker, and one about another."""
    first, absent = kinds[0], next(name for name in all_classes() if name not in kinds)
    prompts = ["caption en", f"detect {' ; '.join(kinds[:3])}", f"segment {first}"]
    prompts.append(f"answer en how many {all_classes()[first]} are there?")
    prompts.append(f"answer en is there {with_article(kinds[-1])}?")
    prompts.append(f"answer en what is left of the {first}?")
    return [*prompts, f"detect {absent}"]


def read_image(image: ImageLike | bytes, name: str) -> Image.Image:
    """A path, an image, an array or a file's bytes → RGB, upright."""
    if not isinstance(image, bytes):
        return load_image(image)
    try:
        return load_image(Image.open(io.BytesIO(image)))
    except (OSError, ValueError, Image.DecompressionBombError):
        unread = f"{name} can't be read as a picture: save it as PNG or JPEG"
        raise ValueError(unread) from None


HALF = {"flex": "1 1 20em", "padding": "0 1em 0 0"}  # side by side, if there is room


def field(kind: type[widgets.Widget], name: str, **settings: Any) -> widgets.Widget:
    """A widget with its name on its left."""
    look = dict(style={"description_width": "7em"}, layout={"width": "auto"})
    return kind(description=name, **look, **settings)


class Controls:
    """The left half of the playground: what is asked, and how."""

    def __init__(self, shipped: Sequence[str]):
        button, number = widgets.Button, widgets.BoundedIntText
        part, most = dict(min=0.05, max=1.0, step=0.05), dict(min=1, max=300)
        typed = dict(continuous_update=False)  # not at each letter
        typed["placeholder"] = "for a file of more than 10 MB"  # Jupyter's limit
        self.shipped = field(widgets.Dropdown, "picture", options=shipped)
        self.new_scene = button(description="New scene", icon="random")
        self.upload = widgets.FileUpload(description="Your picture", accept="image/*")
        self.path = field(widgets.Text, "or its path", **typed)
        self.examples = field(widgets.Dropdown, "examples")
        self.prompt = field(widgets.Text, "prompt", value="caption en")
        self.do_sample = field(widgets.Checkbox, "sample")
        self.temperature = field(widgets.FloatSlider, "temperature", value=0.8, max=2.0)
        self.top_p = field(widgets.FloatSlider, "top_p", value=0.9, **part)
        self.top_k = field(number, "top_k (0: all)", max=10**6)
        self.seed = field(number, "seed", max=2**31 - 1)
        self.max_tokens = field(widgets.IntSlider, "max tokens", value=150, **most)
        self.run = button(description="Run", icon="play", button_style="primary")
        self.stop = button(description="Stop", icon="stop", disabled=True)
        sampling = [self.temperature, self.top_p, self.top_k, self.seed]
        for widget in sampling:
            switch = (self.do_sample, "value"), (widget, "disabled")
            widgets.dlink(*switch, lambda on: not on)
        self.fields = [self.prompt, self.do_sample, *sampling, self.max_tokens]
        own, act = [self.new_scene, self.upload], [self.run, self.stop]
        rows = [self.shipped, widgets.HBox(own), self.path, self.examples, *self.fields]
        self.box = widgets.VBox([*rows, widgets.HBox(act)], layout=HALF)

    def settings(self) -> GenerationConfig:
        """What the checkbox and the sliders say."""
        names = ("do_sample", "temperature", "top_p", "seed")
        values = {name: getattr(self, name).value for name in names}
        limit, top_k = self.max_tokens.value, self.top_k.value or None
        return GenerationConfig(max_new_tokens=limit, top_k=top_k, **values)

    def describe(self) -> str:
        """What the fields say, a line each; those that are switched off don't count."""
        on = [widget for widget in self.fields if not widget.disabled]
        return "\n".join(f"{widget.description:24}{widget.value}" for widget in on)

    def set_busy(self, busy: bool) -> None:
        """While an answer is made only Stop acts, at other times all but Stop."""
        for widget in (self.shipped, self.new_scene, self.upload, self.path, self.run):
            widget.disabled = busy
        self.stop.disabled = not busy


OUT_OF_MEMORY = "allow fewer tokens, or restart the kernel and load a smaller model"


class OutputPanel:
    """The right half of the playground: a line, the image, the answer."""

    def __init__(self, about: str):
        outputs = [widgets.HTML() for _ in range(5)]
        style, self.line, self.view, self.text, self.about = outputs
        style.value, self.about.value = html.style(), html.line(about)
        self.box = widgets.VBox(outputs, layout=HALF)

    def open(self, image: ImageLike | bytes, name: str) -> None:
        """Show another image; after an error there is none, not the last one."""
        self.image = None
        self.line.value = self.view.value = self.text.value = ""
        self.image = read_image(image, name)  # in its own size, upright
        self.name = f"{name}, {self.image.width} × {self.image.height} pixels"
        self.line.value = html.line(self.name)
        self.view.value = html.picture(self.image, self.name)

    @contextmanager
    def report_errors(self) -> Iterator[None]:
        """An error that the user can fix becomes a line."""
        try:
            yield
        except Exception as error:
            message = user_message(error, OUT_OF_MEMORY)
            shown = message or f"a bug in the program: {error!r}"
            self.line.value = html.line(shown, error=True)
            if message is None:
                raise


def bind_events(playground: "Playground", shipped: dict[str, Path]) -> None:
    """Say which widget does what."""
    controls = playground.controls

    def on_value(widget: widgets.Widget, act: Callable[[Any], None]) -> None:
        # None, "" and () mean that nothing is chosen: they clear a field.
        widget.observe(lambda change: change["new"] and act(change["new"]), "value")

    def take_upload(files: Sequence[dict]) -> None:
        playground.open(bytes(files[0]["content"]), files[0]["name"])

    def take_path(path: str) -> None:
        controls.path.value = ""  # so that the same path can be given again
        playground.open(path, Path(path).name)

    def take_example(prompt: str) -> None:
        controls.prompt.value, controls.examples.value = prompt, ""

    def start(_: widgets.Button) -> None:
        if not controls.run.disabled:
            controls.set_busy(True)
            threading.Thread(target=playground.run, daemon=True).start()

    on_value(controls.shipped, lambda name: playground.open(shipped[name], name))
    on_value(controls.upload, take_upload)
    on_value(controls.path, take_path)
    on_value(controls.examples, take_example)
    controls.new_scene.on_click(lambda _: playground.new_scene())
    controls.stop.on_click(lambda _: playground.stopped.set())
    controls.run.on_click(start)


class Playground:
    """Widgets that ask a model about an image; the last line of a cell shows them.

    `decoder`: for `segment …`. `about`: who answers. It works from Python too: set
    values in `controls`, call `open`, `new_scene` or `run`, read `answer`, `found` and
    `drawing` (the image in its own size, with what was found). An error that the user
    can fix becomes a line in the widgets, never an exception.
    """

    def __init__(
        self,
        model: PaliGemmaForConditionalGeneration,
        processor: PaliGemmaProcessor,
        decoder: MaskDecoder | None = None,
        about: str = "",
    ):
        self.model, self.processor, self.decoder = model, processor, decoder
        self.stopped, shipped = threading.Event(), shipped_images()
        self.controls, self.output = Controls([*shipped]), OutputPanel(about)
        bind_events(self, shipped)
        halves, wrap = [self.controls.box, self.output.box], {"flex_flow": "row wrap"}
        self.box = widgets.Box(halves, layout=wrap)
        self.open(shipped["the book's scene"], "the book's scene")

    def open(
        self, image: ImageLike | bytes, name: str = "", kinds: Sequence[str] = ()
    ) -> None:
        """Ask about this from now on: a path, an image, an array, or a file's bytes.

        `kinds`: the kinds of sticker in it, if known; the examples are about them.
        """
        self.answer = self.found = self.drawing = None
        if name not in self.controls.shipped.options:
            self.controls.shipped.index = None
        prompts = example_prompts(kinds or ("owl", "elephant"))  # of the book's scene
        self.controls.examples.options = [("choose one", ""), *zip(prompts, prompts)]
        with self.output.report_errors():
            self.output.open(image, name or "your picture")

    def new_scene(self, seed: int | None = None) -> None:
        """Ask about a scene that training never saw."""
        seed = random.choice(VALIDATION_SEEDS) if seed is None else seed
        scene = make_scene(seed, html.PREVIEW)
        self.open(scene.image, f"validation scene {seed}", list(scene.counts))

    def run(self) -> Generation | None:
        """Ask, until the end or Stop; returns the answer, or None after an error."""
        self.answer = self.found = self.drawing = None
        self.stopped.clear()
        self.controls.set_busy(True)
        try:
            with self.output.report_errors():
                self._ask(self.controls.prompt.value.strip())
        finally:
            self.controls.set_busy(False)
        return self.answer

    def _ask(self, prompt: str) -> None:
        output, image = self.output, self.output.image
        eos = self.processor.tokenizer.eos_token_id
        check_decoder(prompt, self.decoder)
        if image is None:
            raise ValueError("there is no picture: choose one, or take yours")
        output.view.value = html.picture(image, output.name)
        output.line.value = html.line("reading the picture and the prompt …")
        asked = (self.model, self.processor, prompt, [image], self.controls.settings())
        for (answer,) in answer_steps(*asked):
            output.text.value = html.answer(answer, eos)
            if self.stopped.is_set():
                break
        found = parse_answer(prompt, answer, image.size, self.decoder)
        if found is not None:
            self.drawing = draw_answer(image, found)
            output.view.value = html.picture(self.drawing, output.name, found)
            output.text.value = html.answer(answer, eos, format_table(found))
        lines = answer_warnings(answer, eos) + prompt_warnings(prompt)
        if self.stopped.is_set():
            lines = [f"stopped after {len(answer.token_ids)} tokens"]
        output.line.value = html.line("; ".join([output.name, *lines]))
        self.answer, self.found = answer, found

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        "The widgets; and for where no kernel runs, a picture of them that says so."
        shown = self.output.line.value + self.output.view.value
        said = self.output.text.value + self.output.about.value
        static = html.static_page(shown, self.controls.describe(), said)
        return self.box._repr_mimebundle_(**kwargs) | {"text/html": static}


def playground(
    model_path: str | Path | None = None, mask_decoder: str | Path | None = None
) -> Playground:
    """A Playground of the model at `model_path`, a folder or a hub id.

    Without one: of the model that the variable VLM_MODEL names, else the embedded one.
    `mask_decoder`: an .npz or a folder, for a checkpoint that has none beside it.
    Raises what `load_hf_model` and `load_mask_decoder` raise.
    """
    if model_path is None:
        model, tokenizer, about = load_chosen_model()
    else:
        model, tokenizer = load_hf_model(model_path)
        about = describe_model(model, model_path)
    if Path(model.name_or_path) == EMBEDDED.resolve():
        mask_decoder = None  # it has its own, also where VLM_MODEL can't be had
    decoder = None
    try:
        decoder = load_mask_decoder(model.name_or_path, mask_decoder)
    except ValueError as error:
        if mask_decoder is not None:
            raise
        about = f"{about}. No masks: {error}"
    return Playground(model, make_processor(model, tokenizer), decoder, about)
