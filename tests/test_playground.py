"""The playground: driven from Python, and once by a mouse in JupyterLab."""

import html
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime

import pytest
import torch
from PIL import Image
from reference import randomize, tiny_config

import vlm.playground
import vlm.weights
from vlm.figures.playground import token_strip
from vlm.mask_tokens import MaskDecoder
from vlm.paligemma import PaliGemmaForConditionalGeneration
from vlm.playground import Playground, example_prompts, playground
from vlm.processing import PaliGemmaProcessor
from vlm.sampling import Generation, generate
from vlm.scenes import VALIDATION_SEEDS, make_scene

EOS = 1
LOCS = ("<loc0000>", "<loc0512>", "<loc0512>", "<loc1023>")
OWL = (*LOCS, " owl")
MASKED_OWL = (*LOCS, *["<seg007>"] * 16, " owl")


@pytest.fixture(scope="module")
def parts(request):
    """A tiny random model and its processor."""
    tokenizer = request.getfixturevalue("tokenizer")
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = tiny_config(
        text=dict(vocab_size=image_token), image_token_index=image_token
    )
    model = randomize(PaliGemmaForConditionalGeneration(config)).eval()
    return model, PaliGemmaProcessor(tokenizer, 4, 28)


@pytest.fixture
def play(parts):
    return Playground(*parts, about="a <tiny> model")


@pytest.fixture
def says(monkeypatch):
    """Make the model write given pieces; `before` is called ahead of each of them."""

    def set_answer(*pieces: str, ends: bool = True, before=lambda count: None) -> None:
        def steps(model, tokenizer, inputs, settings):
            set_answer.settings = settings
            row = Generation()
            for piece in (*pieces, "") if ends else pieces:
                before(len(row.pieces))
                row.token_ids.append(7 if piece else tokenizer.eos_token_id)
                row.probabilities.append(0.5)
                row.pieces.append(piece)
                yield [row]

        monkeypatch.setattr(vlm.playground, "generation_steps", steps)

    return set_answer


def text(widget) -> str:
    """What a reader reads in an HTML widget."""
    plain = re.sub(r"<style>.*?</style>|<[^>]*>", "", widget.value, flags=re.DOTALL)
    return html.unescape(plain)


def is_error(play: Playground) -> bool:
    return 'class="error"' in play.output.line.value


def upload(play: Playground, name: str, content: bytes) -> None:
    """What the browser does when somebody picks a file."""
    file = {"name": name, "type": "", "size": len(content), "content": content}
    play.controls.upload.value = [{**file, "last_modified": datetime(2026, 1, 1)}]


def wait_until(true, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


# Asking


def test_the_text_is_what_generate_gives(parts, play):
    model, processor = parts
    play.controls.prompt.value = " caption en "
    play.controls.max_new_tokens.value = 12
    answer = play.run()
    inputs = processor(text=["caption en"], images=[play.image])
    wanted = generate(model, processor.tokenizer, inputs, max_new_tokens=12)[0]
    assert answer.text == wanted and play.answer is answer
    assert re.sub(r"<(loc|seg)\d+>", "", wanted) in text(play.output.text)
    assert play.found is None and play.drawing is None


def test_the_strip_grows_token_by_token(play, says):
    seen = []
    says("two", " owls", before=lambda count: seen.append(text(play.output.text)))
    play.run()
    assert seen == ["", "twotwo0.50", "two owlstwo0.50owls0.50"]
    assert text(play.output.text) == "two owlstwo0.50owls0.50end0.50"


def test_boxes_are_listed_and_drawn(play, says):
    says(*OWL)
    play.open(Image.new("RGB", (300, 600), "white"))
    play.controls.prompt.value = "detect owl"
    play.run()
    assert "owl    150   0  300  300" in text(play.output.text)
    assert [thing.label for thing in play.found] == ["owl"]
    assert play.drawing.size == (300, 600)
    assert play.drawing.getpixel((151, 200)) != (255, 255, 255)
    assert "marked on it: owl" in play.output.view.value
    assert play.image.getpixel((151, 200)) == (255, 255, 255)


def test_masks_are_listed_and_drawn(parts, says):
    decoder = MaskDecoder()
    decoder.forward = lambda codes: torch.ones(len(codes), 1, 64, 64)
    play = Playground(*parts, decoder)
    says(*MASKED_OWL)
    play.open(Image.new("RGB", (300, 600), "white"))
    play.controls.prompt.value = "segment owl"
    play.run()
    assert "owl    150   0  300  300  45000" in text(play.output.text)
    assert play.found[0].mask.sum() == 150 * 300
    assert play.drawing.getpixel((225, 150)) != (255, 255, 255)


def test_a_new_question_starts_from_a_clean_picture(play, says):
    says(*OWL)
    play.controls.prompt.value = "detect owl"
    play.run()
    marked = play.output.view.value
    says("two", before=lambda count: seen.append(play.output.view.value))
    seen = []
    play.controls.prompt.value = "caption en"
    play.run()
    assert marked not in seen and play.output.view.value != marked
    assert play.found is None and play.drawing is None


def test_an_answer_that_was_cut_and_a_strange_prompt_get_a_warning(play, says):
    says("two", ends=False)
    play.controls.prompt.value = "what is this"
    play.run()
    line = text(play.output.line)
    assert "cut after 1 tokens" in line and "'what' isn't a task" in line
    assert not is_error(play)


def test_nothing_found_is_said(play, says):
    says()
    play.controls.prompt.value = "detect unicorn"
    play.run()
    assert "nothing found" in text(play.output.text)
    assert "(nothing)" in text(play.output.text)


# Controls


def test_sliders_and_switches_reach_generation(play, says):
    says("two")
    play.run()
    assert not says.settings.do_sample
    controls = play.controls
    assert controls.temperature.disabled and controls.seed.disabled
    controls.do_sample.value = True
    assert not controls.temperature.disabled and not controls.seed.disabled
    controls.temperature.value, controls.top_p.value = 1.5, 0.6
    controls.top_k.value, controls.seed.value = 40, 7
    controls.max_new_tokens.value = 33
    play.run()
    settings = says.settings
    assert (settings.do_sample, settings.temperature, settings.top_p) == (
        True,
        1.5,
        0.6,
    )
    assert (settings.top_k, settings.seed, settings.max_new_tokens) == (40, 7, 33)
    controls.top_k.value = 0
    play.run()
    assert says.settings.top_k is None


def test_an_example_becomes_the_prompt_and_a_new_picture_keeps_it(play):
    play.controls.examples.value = "detect owl ; elephant"
    assert play.controls.prompt.value == "detect owl ; elephant"
    play.controls.prompt.value = "caption en"
    play.controls.examples.value = "detect owl ; elephant"  # the same, once more
    assert play.controls.prompt.value == "detect owl ; elephant"
    play.new_scene()
    assert play.controls.prompt.value == "detect owl ; elephant"
    assert play.controls.examples.value == ""


def test_a_validation_scene_brings_examples_about_its_kinds(play, monkeypatch):
    seed = VALIDATION_SEEDS[3]
    with monkeypatch.context() as patch:
        patch.setattr(vlm.playground.random, "choice", lambda seeds: seed)
        play.new_scene()
    kinds = list(make_scene(seed).counts)
    offered = [value for _, value in play.controls.examples.options]
    assert f"detect {' ; '.join(kinds)}" in offered
    assert str(seed) in text(play.output.line)
    play.controls.new_scene.click()
    seeds = {int(n) for n in re.findall(r"\d{10}", text(play.output.line))}
    assert seeds <= set(VALIDATION_SEEDS) and len(seeds) == 1
    assert play.controls.shipped.value is None


@pytest.mark.parametrize("kinds", [["owl", "elephant"], ["owl"], ["hot dog", "key"]])
def test_examples_name_what_is_there_and_one_thing_that_isnt(kinds):
    *there, absent = example_prompts(kinds)
    assert {prompt.split()[0] for prompt in there} == {
        *("caption", "detect", "segment", "answer")
    }
    assert absent.removeprefix("detect ") not in kinds


def test_every_shipped_picture_can_be_chosen(play):
    options = play.controls.shipped.options
    assert len(options) > 5
    for name, path in options[::-1]:
        play.controls.shipped.value = path
        assert text(play.output.line).startswith(name) and not is_error(play)
        assert 'alt="' in play.output.view.value


def test_a_path_can_be_typed(play, tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "mine.png")
    play.controls.path.value = str(tmp_path / "mine.png")
    assert text(play.output.line) == "mine.png, 30 × 20 pixels"
    assert play.controls.shipped.value is None


# Stopping


def test_run_works_in_the_background_and_stop_ends_it(play, says):
    says(*["<loc0001>"] * 500, before=lambda count: time.sleep(0.01))
    controls = play.controls
    controls.run.click()
    assert controls.run.disabled and not controls.stop.disabled
    wait_until(lambda: "0.50" in text(play.output.text))
    controls.stop.click()
    wait_until(lambda: not controls.run.disabled)
    assert controls.stop.disabled
    assert 1 <= len(play.answer.token_ids) < 500
    assert "stopped after" in text(play.output.line)
    assert not controls.shipped.disabled and not controls.upload.disabled


def test_a_double_click_asks_once(play):
    asked = []
    play.run = lambda: asked.append(1)
    for _ in range(3):
        play.controls.run.click()
    wait_until(lambda: asked)
    time.sleep(0.05)
    assert len(asked) == 1


def test_stop_doesnt_stop_the_next_answer(play, says):
    says("two", " owls")
    play.controls.stop.click()
    assert play.run().text == "two owls"


# Mistakes are a line


@pytest.mark.parametrize(
    ("prompt", "key"),
    [
        ("", "the prompt is empty"),
        ("  ", "the prompt is empty"),
        ("detect", "detect what?"),
        ("segment owl", "needs the mask decoder"),
        ("<image> caption en", "contains <image>"),
        ("detect" + " owl" * 300, "shorten the prompt"),
    ],
)
def test_a_bad_prompt_is_a_line(prompt, key, play):
    play.controls.prompt.value = prompt
    assert play.run() is None
    assert key in text(play.output.line) and is_error(play)
    assert not play.controls.run.disabled
    play.controls.prompt.value = "caption en"
    play.controls.max_new_tokens.value = 1
    assert play.run() is not None and not is_error(play)


@pytest.mark.parametrize(
    "content",
    [b"", b"Dear picture", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(50)],
    ids=["empty", "text", "gif", "png"],
)
def test_an_upload_that_is_no_picture_is_a_line(content, play):
    upload(play, "my <b>letter</b>.png", content)
    assert "my <b>letter</b>.png can't be read as a picture" in text(play.output.line)
    assert is_error(play) and "<b>letter" not in play.output.line.value
    assert play.image is None and play.output.view.value == ""
    assert play.run() is None  # and nobody asks about the last picture by mistake
    assert "there is no picture" in text(play.output.line)


def test_a_truncated_upload_is_a_line(play, tmp_path):
    Image.effect_noise((200, 200), 90).save(tmp_path / "noise.jpg")
    upload(play, "noise.jpg", (tmp_path / "noise.jpg").read_bytes()[:5000])
    assert "noise.jpg can't be read" in text(play.output.line)


def test_the_same_picture_can_be_uploaded_twice(play, tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    for _ in range(2):
        upload(play, "red.png", (tmp_path / "red.png").read_bytes())
        assert play.image.size == (9, 9)
        play.new_scene()
        assert play.image.size != (9, 9)


def test_the_same_path_can_be_opened_twice(play, monkeypatch):
    opened = []
    monkeypatch.setattr(play, "open", lambda path, name: opened.append(path))
    for _ in range(2):
        play.controls.path.value = "no.png"
    assert opened == ["no.png", "no.png"]


def test_a_path_to_nothing_is_a_line(play, tmp_path):
    for path in ("no.png", str(tmp_path)):
        play.controls.path.value = path
        assert "no image file at" in text(play.output.line) and is_error(play)


def test_a_fault_of_ours_is_raised_and_the_buttons_come_back(play, says):
    def fail(count):
        raise RuntimeError("shapes disagree")

    says("two", before=fail)
    with pytest.raises(RuntimeError, match="shapes disagree"):
        play.run()
    assert "a bug in the program" in text(play.output.line)
    assert not play.controls.run.disabled


def test_no_memory_is_a_line(play, says):
    def fail(count):
        raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")

    says("two", before=fail)
    assert play.run() is None and is_error(play)
    assert "memory" in text(play.output.line)


# What is shown


def test_the_strip_says_in_words_what_it_says_in_color():
    answer = Generation(
        [7, 8, 9, EOS], [1.0, 0.5, 0.0, 0.25], ["<loc0001>", " ", "", ""]
    )
    strip = token_strip(answer, EOS)
    assert strip.startswith("<ol aria-label=")
    assert re.findall(r"<li [^>]*>(.*?)<small>(.*?)</small></li>", strip) == [
        ("&lt;loc0001&gt;", "1.00"),
        ("␣", "0.50"),
        ("␣", "0.00"),
        ("end", "0.25"),
    ]
    assert "rgb(0,158,115)" in strip and "rgb(255,255,255)" in strip


def test_nothing_that_a_model_writes_becomes_markup(play, says):
    says("<script>", "alert(1)", "</script>")
    play.run()
    assert "<script>" not in play.output.text.value
    assert "a &lt;tiny&gt; model" in play.output.about.value


def test_a_page_without_a_kernel_gets_static_html_that_says_so(play, says):
    says(*OWL)
    play.controls.prompt.value = "detect owl"
    play.run()
    bundle = play._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    static = bundle["text/html"]
    assert "need a kernel" in static and "detect owl" in static
    assert "data:image/jpeg;base64," in static and "owl    " in static
    assert "<button" not in static and "<script" not in static


# The model that is loaded


def test_playground_takes_the_model_and_the_decoder_that_belongs_to_it(monkeypatch):
    monkeypatch.delenv("VLM_MODEL", raising=False)
    play = playground()
    assert isinstance(play.decoder, MaskDecoder)
    assert "about a hundred kinds of sticker and nothing else" in text(
        play.output.about
    )
    asked = []
    monkeypatch.setattr(
        vlm.playground, "load_mask_decoder", lambda *paths: asked.append(paths)
    )
    monkeypatch.setenv("VLM_MODEL", "no/such/folder")
    playground(mask_decoder="vae-oid.npz")  # belongs to the model that isn't there
    assert asked == [(str(vlm.weights.EMBEDDED.resolve()), None)]


def test_a_checkpoint_without_masks_says_which_file_to_give(
    parts, tmp_path, monkeypatch
):
    model, processor = parts
    vlm.weights.save_hf_model(model, processor.tokenizer, tmp_path / "tiny")
    monkeypatch.setenv("VLM_MODEL", str(tmp_path / "tiny"))
    for play in (playground(), playground(tmp_path / "tiny")):
        assert play.decoder is None
        about = text(play.output.about)
        assert "tiny" in about and "No masks" in about and "vae-oid.npz" in about
        assert "sticker" not in about
    with pytest.raises((OSError, ValueError)):
        playground(tmp_path / "tiny", tmp_path / "none.npz")


# In a real browser


CELL = "from pathlib import Path; import os\n"
CELL += "Path('kernel').write_text(str(os.getpid()))\n"
CELL += "from vlm.playground import playground\nplay = playground()\nplay"
PATIENCE = 300_000  # milliseconds; a busy machine starts a kernel slowly


def notebook() -> str:
    cell = {"cell_type": "code", "id": "play", "metadata": {}, "source": CELL}
    cell |= {"execution_count": None, "outputs": []}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": [cell], "metadata": {"kernelspec": kernel}}
    return json.dumps(content | {"nbformat": 4, "nbformat_minor": 5})


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def lab(tmp_path):
    """JupyterLab with one notebook; yields its address, and ends all it started."""
    pytest.importorskip("jupyterlab", reason="JupyterLab isn't installed")
    if sys.platform == "win32":
        pytest.skip("processes are counted and ended as on Linux and macOS")
    work = tmp_path / "work"
    work.mkdir()
    (work / "play.ipynb").write_text(notebook(), encoding="utf-8")
    homes = "HOME IPYTHONDIR JUPYTER_CONFIG_DIR JUPYTER_DATA_DIR JUPYTER_RUNTIME_DIR "
    homes += "JUPYTERLAB_SETTINGS_DIR JUPYTERLAB_WORKSPACES_DIR"
    env = {**os.environ, **{name: str(tmp_path / name) for name in homes.split()}}
    env.pop("VLM_MODEL", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", "--ip=127.0.0.1"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={work}"]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        command, env=env, cwd=work, stdout=log, stderr=log, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert server.poll() is None, (tmp_path / "log").read_text()
        try:
            with urllib.request.urlopen(f"{address}/api", timeout=10):
                return True
        except (urllib.error.URLError, OSError):
            return False

    try:
        wait_until(answers, seconds=PATIENCE / 1000)
        yield f"{address}/lab/tree/play.ipynb"
    finally:
        server.terminate()  # which ends its kernels, too
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        log.close()
    kernel = int((work / "kernel").read_text())
    wait_until(lambda: not is_alive(kernel))


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(PATIENCE)
    yield page
    page.close()


def test_the_playground_answers_in_jupyterlab(page, lab, tmp_path):
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(lab)
    page.get_by_text("| Idle").wait_for()  # the kernel listens
    page.locator(".jp-CodeCell .cm-content").first.click()
    page.keyboard.press("Shift+Enter")
    output = page.locator(".jp-OutputArea")
    line, strip = output.locator(".vlm-play p").first, output.locator(".vlm-play li")
    run = output.get_by_role("button", name="Run")
    run.wait_for()  # widgets, and not the static page
    assert output.get_by_text("need a kernel").count() == 0

    output.get_by_label("prompt").fill("answer en is there an owl?")
    run.click()
    output.locator(".vlm-play li", has_text="end").wait_for()
    assert strip.count() >= 2

    Image.new("RGB", (50, 40), "white").save(tmp_path / "mine.png")
    (tmp_path / "letter.txt").write_text("Dear picture")
    for name, said in (("mine.png", "50 × 40"), ("letter.txt", "can't be read")):
        with page.expect_file_chooser() as chooser:
            output.get_by_role("button", name="Your picture").click()
        chooser.value.set_files(tmp_path / name)
        output.get_by_text(f"{name}").and_(line).wait_for()
        assert said in line.inner_text()
    output.get_by_role("button", name="New scene").click()
    output.get_by_text("validation scene").wait_for()
    assert not errors
