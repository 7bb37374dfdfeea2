"""A playground of widgets: ask a model about an image, watch its tokens, stop it.

Built in notebooks/31_playground.ipynb: edit it there, then run `make export`.
"""

import io
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import not_
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ipywidgets as widgets
from PIL import Image

from .answers import answer_warnings, format_table, parse_answer
from .cli import user_message
from .detection import draw_objects
from .figures import playground as html
from .hub import EMBEDDED
from .images import ImageLike, load_image
from .inference import check_prompt
from .mask_tokens import MaskDecoder
from .paligemma import PaliGemmaForConditionalGeneration
from .processing import PaliGemmaProcessor
from .sampling import Generation, GenerationConfig, generation_steps
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
# As GenerationConfig names them; those between the first and the last shape sampling.
SETTINGS = ("do_sample", "temperature", "top_p", "top_k", "seed", "max_new_tokens")


def make_controls() -> SimpleNamespace:
    """The widgets that say what is asked, and how, by name; `box` holds them all."""

    def field(kind: type[widgets.Widget], name: str, **settings: Any) -> widgets.Widget:
        look = dict(style={"description_width": "7em"}, layout={"width": "auto"})
        return kind(description=name, **look, **settings)

    button, number, slider = widgets.Button, widgets.BoundedIntText, widgets.FloatSlider
    part, most = dict(min=0.05, max=1.0, step=0.05), dict(min=1, max=300)
    typed = dict(continuous_update=False)  # not at each letter
    typed["placeholder"] = "for a file of more than 10 MB"  # Jupyter's limit
    controls = SimpleNamespace(
        shipped=field(widgets.Dropdown, "picture", options=[*shipped_images().items()]),
        new_scene=button(description="New scene", icon="random"),
        upload=widgets.FileUpload(description="Your picture", accept="image/*"),
        path=field(widgets.Text, "or its path", **typed),
        examples=field(widgets.Dropdown, "examples"),
        prompt=field(widgets.Text, "prompt", value="caption en"),
        do_sample=field(widgets.Checkbox, "sample"),
        temperature=field(slider, "temperature", value=0.8, max=2.0),
        top_p=field(slider, "top_p", value=0.9, **part),
        top_k=field(number, "top_k (0: all)", max=10**6),
        seed=field(number, "seed", max=2**31 - 1),
        max_new_tokens=field(widgets.IntSlider, "max tokens", value=150, **most),
        run=button(description="Run", icon="play", button_style="primary"),
        stop=button(description="Stop", icon="stop", disabled=True),
    )
    fields = controls.fields = [vars(controls)[n] for n in ("prompt", *SETTINGS)]
    own, act = [controls.new_scene, controls.upload], [controls.run, controls.stop]
    rows = [controls.shipped, widgets.HBox(own), controls.path, controls.examples]
    controls.box = widgets.VBox([*rows, *fields, widgets.HBox(act)], layout=HALF)
    for widget in fields[2:-1]:  # they shape sampling
        widgets.dlink((controls.do_sample, "value"), (widget, "disabled"), not_)
    for widget in (controls.shipped, *own, controls.path, controls.run):
        widgets.dlink((controls.stop, "disabled"), (widget, "disabled"), not_)
    return controls


OUT_OF_MEMORY = "allow fewer tokens, or restart the kernel and load a smaller model"


@contextmanager
def report_errors(line: widgets.HTML) -> Iterator[None]:
    """An error that the user can fix becomes a line."""
    try:
        yield
    except Exception as error:
        message = user_message(error, OUT_OF_MEMORY)
        shown = message or f"a bug in the program: {error!r}"
        line.value = html.line(shown, error=True)
        if message is None:
            raise


def show_answer(play: "Playground", prompt: str) -> None:
    """Make an answer and show it, token by token, until its end or Stop."""
    image, tokenizer, output = play.image, play.processor.tokenizer, play.output
    eos = tokenizer.eos_token_id
    values = {name: vars(play.controls)[name].value for name in SETTINGS}
    settings = GenerationConfig(**values | {"top_k": values["top_k"] or None})
    _, lines = check_prompt(prompt, has_decoder=play.decoder is not None)
    if image is None:
        raise ValueError("there is no picture: choose one, or take yours")
    output.view.value = html.picture(image, play.name)
    output.line.value = html.line("reading the picture and the prompt …")
    inputs = play.processor(text=[prompt], images=[image])
    for (answer,) in generation_steps(play.model, tokenizer, inputs, settings):
        output.text.value = html.answer(answer, eos)
        if play.stopped.is_set():
            break
    found = parse_answer(prompt, answer, image.size, play.decoder)
    if found is not None:
        play.drawing = draw_objects(image, found)
        output.view.value = html.picture(play.drawing, play.name, found)
        output.text.value = html.answer(answer, eos, format_table(found))
    lines = answer_warnings(answer, eos) + lines
    if play.stopped.is_set():
        lines = [f"stopped after {len(answer.token_ids)} tokens"]
    output.line.value = html.line("; ".join([play.name, *lines]))
    play.answer, play.found = answer, found


def bind_events(playground: "Playground") -> None:
    """Say which widget does what."""
    controls = playground.controls

    def on_value(widget: widgets.Widget, act: Callable[[Any], None]) -> None:
        # None, "" and () mean that nothing is chosen: they clear a field.
        widget.observe(lambda change: change["new"] and act(change["new"]), "value")

    def take_upload(files: Sequence[dict]) -> None:
        controls.upload.value = ()  # so that the same file can be given again
        playground.open(bytes(files[0]["content"]), files[0]["name"])

    def take_path(path: str) -> None:
        controls.path.value = ""  # so that the same path can be given again
        playground.open(path, Path(path).name)

    def take_example(prompt: str) -> None:
        controls.prompt.value, controls.examples.value = prompt, ""

    def start(_: widgets.Button) -> None:
        if not controls.run.disabled:
            controls.stop.disabled = False
            threading.Thread(target=playground.run, daemon=True).start()

    on_value(controls.shipped, lambda p: playground.open(p, controls.shipped.label))
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
    `drawing` (`image`, in its own size, with what was found). An error that the user
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
        self.stopped, self.controls = threading.Event(), make_controls()
        names = ("style", "line", "view", "text", "about")
        self.output = SimpleNamespace(**{name: widgets.HTML() for name in names})
        self.output.style.value = html.style()
        self.output.about.value = html.line(about)
        right = widgets.VBox([*vars(self.output).values()], layout=HALF)
        halves, wrap = [self.controls.box, right], {"flex_flow": "row wrap"}
        self.box = widgets.Box(halves, layout=wrap)
        bind_events(self)
        self.open(self.controls.shipped.value, self.controls.shipped.label)

    def open(
        self, image: ImageLike | bytes, name: str = "", kinds: Sequence[str] = ()
    ) -> None:
        """Ask about this from now on: a path, an image, an array, or a file's bytes.

        `kinds`: the kinds of sticker in it, if known; the examples are about them.
        """
        output, name = self.output, name or "your picture"
        self.image = self.answer = self.found = self.drawing = None
        output.line.value = output.view.value = output.text.value = ""
        if name != self.controls.shipped.label:
            self.controls.shipped.index = None
        prompts = example_prompts(kinds or ("owl", "elephant"))  # of the book's scene
        self.controls.examples.options = [("choose one", ""), *zip(prompts, prompts)]
        with report_errors(self.output.line):
            self.image = read_image(image, name)
            self.name = f"{name}, {self.image.width} × {self.image.height} pixels"
            output.line.value = html.line(self.name)
            output.view.value = html.picture(self.image, self.name)

    def new_scene(self) -> None:
        """Ask about a scene that training never saw."""
        seed = random.choice(VALIDATION_SEEDS)
        scene = make_scene(seed, html.PREVIEW)
        self.open(scene.image, f"validation scene {seed}", list(scene.counts))

    def run(self) -> Generation | None:
        """Ask, until the end or Stop; returns the answer, or None after an error."""
        self.answer = self.found = self.drawing = None
        self.stopped.clear()
        self.controls.stop.disabled = False
        try:
            with report_errors(self.output.line):
                show_answer(self, self.controls.prompt.value.strip())
        finally:
            self.controls.stop.disabled = True
        return self.answer

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        "The widgets; and for where no kernel runs, a picture of them that says so."
        fields = (one for one in self.controls.fields if not one.disabled)
        on = [f"{one.description:24}{one.value}" for one in fields]
        shown = self.output.line.value + self.output.view.value
        said = self.output.text.value + self.output.about.value
        static = html.static_page(shown, "\n".join(on), said)
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
