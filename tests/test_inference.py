"""The command line: answers to stdout, one line for every mistake."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from reference import randomize, tiny_config

import vlm.answers
import vlm.weights
from vlm.answers import format_table
from vlm.detection import Detection, ParsedObjects
from vlm.inference import (
    check_prompt,
    drawing_paths,
    find_images,
    main,
    test_inference,
)
from vlm.mask_tokens import DECODER_FILE, MaskDecoder, MaskVQVAE
from vlm.paligemma import PaliGemmaForConditionalGeneration
from vlm.processing import PaliGemmaProcessor
from vlm.sampling import Generation, generate
from vlm.segmentation import Segmentation
from vlm.weights import load_hf_model, save_hf_model

OWL = ("<loc0000>", "<loc0341>", "<loc0682>", "<loc1023>", " owl")
NO_BOX = (" ;", " ", "<loc0001>", " owl")
SEGS = ("<seg007>",) * 16
HALF = 0.5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, request):
    """The folder of a tiny random model."""
    tokenizer = request.getfixturevalue("tokenizer")
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    # As in the real model, <image> has no row: a random model can't write it then.
    config = tiny_config(
        text=dict(vocab_size=image_token), image_token_index=image_token
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = randomize(PaliGemmaForConditionalGeneration(config))
    save_hf_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """The folder of a mask decoder whose masks fill their boxes."""
    decoder = MaskDecoder()
    with torch.no_grad():
        decoder.decoder[-1].weight.zero_()
        decoder.decoder[-1].bias.fill_(1)
    folder = tmp_path_factory.mktemp("masks")
    MaskVQVAE(decoder=decoder).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own, with a picture and what is none."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (300, 600), "white").save("picture.png")
    (tmp_path / "letter.jpg").write_text("Dear picture")
    (tmp_path / "empty").mkdir()


@pytest.fixture
def says(monkeypatch):
    """Make the model write given pieces: `says("a", " b")`; True ends with EOS."""

    def set_answer(*pieces: str, ends: bool = True) -> None:
        def steps(model, tokenizer, inputs, settings):
            row = Generation([], [], [])
            for piece in (*pieces, "") if ends else pieces:
                row.token_ids.append(7 if piece else tokenizer.eos_token_id)
                row.probabilities.append(HALF)
                row.pieces.append(piece)
                yield [row] * len(inputs["input_ids"])

        monkeypatch.setattr(vlm.answers, "generation_steps", steps)

    return set_answer


@pytest.fixture
def pictures(tmp_path):
    """A folder with two pictures, and what is none or isn't meant."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    Image.new("RGB", (300, 600), "white").save(folder / "a.png")
    Image.new("RGB", (60, 30), "white").save(folder / "b.JPG")
    Image.new("RGB", (60, 30), "white").save(folder / "more" / "d.webp")
    (folder / "c.png").write_text("Dear picture")
    (folder / "notes.txt").write_text("two pictures")
    (folder / ".a.png").write_text("what a Mac leaves")
    return folder


def ask_about(path: str, *more: str, prompt: str = "detect owl") -> list[str]:
    return ["--prompt", prompt, "--image_file_path", path, *more]


def ask(prompt: str = "detect owl", *more: str) -> list[str]:
    return ask_about("picture.png", *more, prompt=prompt)


def size(path: str) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


# Answers


def test_boxes_are_streamed_listed_and_drawn(checkpoint, says, capsys):
    says(*OWL, *NO_BOX)
    model = ("--model_path", str(checkpoint), "--only_cpu")
    assert main(ask("detect owl", *model, "--output", "out.png")) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "".join((*OWL, *NO_BOX)),
        "label   x0  y0   x1   y1  score",
        "owl    100   0  300  400   0.50",
        "1 left out: no valid box or mask",
    ]
    assert err.splitlines()[0] == "wrote out.png"
    assert f"answered by {checkpoint}" in err and ", cpu" in err
    with Image.open("out.png") as drawn:
        assert drawn.size == (300, 600)
        assert drawn.getpixel((100, 200)) != (255, 255, 255)
        assert drawn.getpixel((200, 200)) == (255, 255, 255)


def test_pieces_appear_one_by_one(checkpoint, monkeypatch):
    screen, seen = io.BytesIO(), []

    def steps(model, tokenizer, inputs, settings):
        row = Generation([], [], [])
        for piece, token in (("two", 7), (" owls", 8), ("", tokenizer.eos_token_id)):
            row.token_ids.append(token)
            row.probabilities.append(1.0)
            row.pieces.append(piece)
            yield [row]
            seen.append(screen.getvalue())

    monkeypatch.setattr(vlm.answers, "generation_steps", steps)
    # Like a pipe, it shows nothing before it is flushed.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="utf-8"))
    assert main(ask("caption en", "--model_path", str(checkpoint))) == 0
    assert seen == [b"two", b"two owls", b"two owls"]


def test_a_console_that_lacks_a_character_shows_its_number(
    checkpoint, says, monkeypatch
):
    says("é")
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    assert main(ask("caption en", "--model_path", str(checkpoint))) == 0
    sys.stdout.flush()
    assert screen.getvalue() == rb"\xe9" + os.linesep.encode()


def test_nothing_found_is_said_and_the_picture_saved(checkpoint, says, capsys):
    says()
    words = ("--model_path", str(checkpoint), "--output", "out.jpg")
    assert main(ask("detect unicorn", *words)) == 0
    out, err = capsys.readouterr()
    assert out == "\nnothing found\n"
    assert "wrote out.jpg, without a box" in err
    assert size("out.jpg") == (300, 600)


def test_a_caption_has_no_table(checkpoint, says, capsys):
    says("two", " owls")
    assert main(ask("caption en", "--model_path", str(checkpoint))) == 0
    assert capsys.readouterr().out == "two owls\n"


def test_boxes_are_in_pixels_of_the_upright_picture(checkpoint, says, capsys):
    says(*OWL)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (800, 400)).save("phone.jpg", exif=exif)
    words = ask_about("phone.jpg", "--output", "o.png")
    assert main([*words, "--model_path", str(checkpoint)]) == 0
    assert "owl    133   0  400  533" in capsys.readouterr().out
    assert size("o.png") == (400, 800)


def test_an_answer_that_was_cut_is_called_so(checkpoint, says, capsys):
    says("two", " owls", ends=False)
    main(ask("caption en", "--model_path", str(checkpoint)))
    assert "cut after 2 tokens: a higher limit allows more" in capsys.readouterr().err


def test_the_text_is_what_generate_gives(checkpoint, capsys):
    model, tokenizer = load_hf_model(checkpoint, "cpu")
    vision = model.config.vision_config
    processor = PaliGemmaProcessor(
        tokenizer, vision.num_image_tokens, vision.image_size
    )
    settings = dict(max_tokens_to_generate=12)
    text = test_inference(
        model, processor, "cpu", "caption en", "picture.png", **settings
    )
    inputs = processor(text=["caption en"], images=["picture.png"])
    assert text == generate(model, tokenizer, inputs, max_new_tokens=12)[0]
    assert capsys.readouterr().out == f"{text}\n"


def test_a_seed_repeats_an_answer_and_a_drawn_seed_is_shown(checkpoint, capsys):
    words = ask("caption en", "--model_path", str(checkpoint), "--do_sample", "True")
    words += ["--temperature", "5", "--top_p", "1", "--max_tokens_to_generate", "8"]

    def run(*more: str) -> tuple[str, str]:
        assert main([*words, *more]) == 0
        return capsys.readouterr()

    first, said = run()
    seed = said.rpartition("--seed ")[2].strip()
    assert run("--seed", seed)[0] == first
    assert run()[0] != first  # and a new run is a new draw
    assert "--seed" not in run("--seed", "1")[1]


def test_sampling_options_without_sampling_are_called_idle(checkpoint, says, capsys):
    says("two")
    words = ("--model_path", str(checkpoint), "--top_p", "0.5")
    assert main(ask("caption en", *words)) == 0
    assert "--top_p counts only with --do_sample True" in capsys.readouterr().err
    assert main(ask("caption en", *words, "--seed", "1")) == 0
    said = capsys.readouterr().err
    assert "--top_p counts only" in said and "--seed counts only" in said


def test_an_interrupted_run_says_so(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("vlm.inference.run", interrupt)
    assert main(ask("caption en")) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_masks_are_listed_and_drawn(checkpoint, masks, says, capsys):
    says(*OWL[:4], *SEGS, OWL[4], " ;", *OWL)  # the second has no mask
    words = ("--model_path", str(checkpoint), "--mask_decoder", str(masks))
    assert main(ask("segment owl", *words, "--output", "out.png")) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == [
        "label   x0  y0   x1   y1   mask  score",
        "owl    100   0  300  400  80000   0.50",
        "1 left out: no valid box or mask",
    ]
    assert "wrote out.png\n" in err
    with Image.open("out.png") as drawn:
        assert drawn.size == (300, 600)
        inside, outside = drawn.getpixel((200, 300)), drawn.getpixel((50, 500))
    assert inside != (255, 255, 255) and outside == (255, 255, 255)


def test_the_decoder_beside_the_checkpoint_is_taken(checkpoint, masks, says, capsys):
    says(*OWL[:4], *SEGS, OWL[4])
    beside = checkpoint / DECODER_FILE
    beside.write_bytes((masks / DECODER_FILE).read_bytes())
    try:
        assert main(ask("segment owl", "--model_path", str(checkpoint))) == 0
    finally:
        beside.unlink()
    assert "80000" in capsys.readouterr().out


def test_the_embedded_model_segments_and_says_what_it_knows(capsys):
    assert main(ask("segment owl", "--only_cpu", "--max_tokens_to_generate", "2")) == 0
    out, err = capsys.readouterr()
    assert out.endswith("nothing found\n") or "left out" in out
    said = " ".join(err.splitlines()[-1].split())
    assert "about a hundred kinds of sticker and nothing else" in said
    assert "in a photograph it sees stickers" in said


def test_another_model_isnt_said_to_know_stickers(checkpoint, says, capsys):
    says("two")
    main(ask("caption en", "--model_path", str(checkpoint)))
    assert "sticker" not in capsys.readouterr().err


def test_a_mask_decoder_without_segment_is_called_idle(checkpoint, says, capsys):
    says("two")
    words = ("--model_path", str(checkpoint), "--mask_decoder", "none.npz")
    assert main(ask("caption en", *words)) == 0
    assert "--mask_decoder counts only with" in capsys.readouterr().err


def test_segment_from_python_needs_a_decoder(checkpoint):
    model, tokenizer = load_hf_model(checkpoint, "cpu")
    processor = PaliGemmaProcessor(tokenizer, 4, 28)
    with pytest.raises(ValueError, match="load_mask_decoder"):
        test_inference(model, processor, "cpu", "segment owl", "picture.png")


def test_a_prompt_of_no_known_task_gets_a_warning(checkpoint, says, capsys):
    says("two")
    assert main(ask("What is this?", "--model_path", str(checkpoint))) == 0
    assert "'What' isn't a task" in capsys.readouterr().err


@pytest.mark.parametrize(
    "prompt, key",
    [
        ("detect owl, elephant", '"detect owl ; elephant"'),
        ("segment owl and elephant ; pizza", '"segment owl ; elephant ; pizza"'),
        ("caption", '"caption en"'),
        ("caption the picture", '"caption en"'),
        ("answer is there an owl?", '"answer en is there an owl?"'),
        ("Detect owl", '"detect owl"'),
        ("detect: owl", '"detect owl"'),
        ("find owl", '"detect owl"'),
    ],
)
def test_a_prompt_that_misses_by_little_gets_the_right_one(prompt, key):
    _, (line,) = check_prompt(prompt)
    assert key in line


@pytest.mark.parametrize(
    "prompt",
    ["detect owl", "detect owl;pizza", "detect owl ; hot dog ;", "segment sandman"]
    + ["caption en", "caption de", "answer en is there an owl?", "ocr", "cap en"],
)
def test_a_prompt_in_its_form_gets_no_warning(prompt):
    assert check_prompt(prompt) == (prompt.split()[0], [])


WRONG_TYPES = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ["detect owl"]}, "prompt"),
    ({"processor": None}, "make_processor"),
    ({"device": "gpu"}, "device"),
    ({"image_file_path": None}, "path"),
    ({"image_file_path": ["picture.png"]}, "path"),
    ({"max_tokens_to_generate": "many"}, "max_tokens_to_generate"),
    ({"max_tokens_to_generate": None}, "max_tokens_to_generate"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": "most"}, "top_p"),
    ({"do_sample": "False"}, "do_sample"),
    ({"seed": 1.5}, "seed"),
    ({"output": 3}, "PathLike"),
    ({"prompt": "segment owl", "decoder": "vae-oid.npz"}, "load_mask_decoder"),
]

ASK_WRONGLY = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from reference import tiny_tokenizer
from vlm.inference import test_inference
from vlm.processing import PaliGemmaProcessor
asked = dict(model=None, processor=PaliGemmaProcessor(tiny_tokenizer(), 4, 28))
asked |= dict(device="cpu", prompt="detect owl", image_file_path="picture.png")
for wrong, _ in {WRONG_TYPES}:
    try:
        test_inference(**asked | wrong)
    except (TypeError, ValueError) as error:
        print(str(error))
"""


def test_arguments_of_a_wrong_type_are_named():
    """In a process of its own, without the type checks that these tests are under."""
    command = [sys.executable, "-c", ASK_WRONGLY]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(WRONG_TYPES)
    for line, (_, named) in zip(lines, WRONG_TYPES):
        assert named in line


def test_a_table_keeps_its_columns():
    things = [Detection("hot dog", (1.4, 20.6, 300, 4000), 0.875)]
    things.append(Detection("a\nb", (0, 0, 1, 1)))
    assert format_table(ParsedObjects(things)).splitlines() == [
        "label    x0  y0   x1    y1  score",
        "hot dog   1  21  300  4000   0.88",
        "a b       0   0    1     1   1.00",
    ]
    mask = np.zeros((5, 3000), dtype=bool)
    mask[:, :2345] = True
    things = [Segmentation("owl", (0.0, 0.0, 2345.0, 5.0), mask)]
    assert format_table(ParsedObjects(things)).splitlines() == [
        "label  x0  y0    x1  y1   mask  score",
        "owl     0   0  2345   5  11725   1.00",
    ]
    nothing = ParsedObjects()
    nothing.invalid, nothing.repeated = 2, 3
    assert format_table(nothing).splitlines() == [
        "nothing found",
        "2 left out: no valid box or mask",
        "3 left out: written before, token by token",
    ]


# Several pictures


def test_folders_patterns_and_files_are_pictures(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    assert find_images(["."]) == ["./a.png", "./b.JPG", "./c.png"]
    assert find_images(["more", "a.png", "*.txt"]) == [
        *("more/d.webp", "a.png", "notes.txt")
    ]
    assert find_images(["[ab].*", "a.png", "**/*.webp"]) == [
        *("a.png", "b.JPG", "more/d.webp")
    ]
    for name in ("a[1].png", "a*.png", "two words.png", "~x.png"):
        (pictures / name).write_text("")
        assert find_images([name]) == [name]


def test_the_rest_goes_on_after_a_broken_picture(
    checkpoint, pictures, says, capsys, monkeypatch
):
    says(*OWL)
    loads = []
    load = vlm.weights.load_hf_model
    monkeypatch.setattr(
        vlm.weights, "load_hf_model", lambda *a: loads.append(a) or load(*a)
    )
    model = ("--model_path", str(checkpoint))
    words = ask_about("pictures", "no.png", "picture.png", *model)
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        *(f"pictures/a.png: {''.join(OWL)}", "label   x0  y0   x1   y1  score"),
        "owl    100   0  300  400   0.50",
        *(f"pictures/b.JPG: {''.join(OWL)}", "label  x0  y0  x1  y1  score"),
        "owl    20   0  60  20   0.50",
        *(f"picture.png: {''.join(OWL)}", "label   x0  y0   x1   y1  score"),
        "owl    100   0  300  400   0.50",
    ]
    said = err.splitlines()
    assert "pictures/c.png" in said[0] and "no.png" in said[1] and len(said) == 3
    assert len(loads) == 1


def test_nothing_is_loaded_where_no_picture_can_be_read(capsys, monkeypatch):
    monkeypatch.setattr(vlm.weights, "load_hf_model", None)
    assert main(ask_about("letter.jpg", "no.png")) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == err.count("\n") == 2


def test_each_picture_gets_its_drawing(checkpoint, pictures, says, capsys, tmp_path):
    says(*OWL)
    words = ask_about("pictures/[ab]*", "pictures/more/d.webp", "--output", "drawn")
    for _ in range(2):  # the second time in a folder that is there
        assert main([*words, "--model_path", str(checkpoint)]) == 0
    drawn = {file.name: size(file) for file in (tmp_path / "drawn").iterdir()}
    assert drawn == {"a.png": (300, 600), "b.JPG": (60, 30), "d.webp.png": (60, 30)}


def test_a_batch_is_answered_as_one_by_one(checkpoint, pictures, capsys):
    words = ask_about("pictures", "picture.png", "--json", prompt="caption en")
    words += ["--model_path", str(checkpoint), "--max_tokens_to_generate", "8"]
    said = []
    for count in ("1", "3"):
        assert main([*words, "--batch_size", count]) == 1
        lines = capsys.readouterr().out.splitlines()
        said.append(sorted(lines))
    assert said[0] == said[1] and len(said[0]) == 4


def test_an_interrupted_batch_keeps_what_it_said(
    checkpoint, pictures, says, capsys, monkeypatch
):
    says("two")
    steps, asked = vlm.answers.generation_steps, []

    def interrupted(*arguments):
        asked.append(arguments)
        if len(asked) == 2:
            raise KeyboardInterrupt
        yield from steps(*arguments)

    monkeypatch.setattr(vlm.answers, "generation_steps", interrupted)
    words = ask_about("pictures", "--model_path", str(checkpoint), prompt="caption en")
    assert main(words) == 130
    out, err = capsys.readouterr()
    assert out == "pictures/a.png: two\n" and err == "stopped\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_for_several_and_nothing_else_does(
    checkpoint, pictures, says, capsys, monkeypatch
):
    says("two")
    model = ("--model_path", str(checkpoint), "--json")
    for words, terminal, shown in (
        (ask_about("pictures", *model), Terminal(), True),
        (ask_about("pictures", *model), io.StringIO(), False),
        (ask_about("picture.png", *model), Terminal(), False),
    ):
        monkeypatch.setattr(sys, "stderr", terminal)
        main(words)
        assert ("%|" in terminal.getvalue()) is shown
        for line in capsys.readouterr().out.splitlines():
            json.loads(line)


# JSON


def records(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_picture_is_a_line_of_json(checkpoint, pictures, says, capsys):
    says(*OWL, *NO_BOX, " ;", *OWL, ends=False)
    model = ("--model_path", str(checkpoint), "--json", "True")
    assert main(ask_about("pictures", *model)) == 1
    a, b, broken = records(capsys)
    box = {"label": "owl", "score": HALF, "bbox": [100.0, 0.0, 200.0, 400.0]}
    assert a.pop("answer") == "".join((*OWL, *NO_BOX, " ;", *OWL))
    assert a == {
        **dict(file="pictures/a.png", width=300, height=600, prompt="detect owl"),
        **dict(truncated=True, objects=[box], invalid=1, repeated=1),
    }
    assert b["file"] == "pictures/b.JPG" and (b["width"], b["height"]) == (60, 30)
    assert broken.keys() == {"file", "prompt", "error"}
    assert broken["file"] == "pictures/c.png"


def test_one_picture_in_json(checkpoint, says, capsys):
    says("two", " owls")
    words = ("--model_path", str(checkpoint), "--json", "--output", "out.png")
    assert main(ask("caption en", *words)) == 0
    (record,) = records(capsys)
    assert record["answer"] == "two owls" and record["objects"] == []
    assert not record["truncated"] and size("out.png") == (300, 600)
    assert main(ask_about("letter.jpg", *words)) == 1
    (record,) = records(capsys)
    assert "letter.jpg" in record["error"]


@pytest.mark.filterwarnings("ignore:__array__")  # pycocotools and NumPy 2
def test_masks_in_json_are_run_lengths(checkpoint, masks, says, capsys):
    says(*OWL[:4], *SEGS, OWL[4])
    words = ("--model_path", str(checkpoint), "--mask_decoder", str(masks), "--json")
    assert main(ask("segment owl", *words)) == 0
    (record,) = records(capsys)
    (thing,) = record["objects"]
    assert thing["segmentation"]["size"] == [600, 300]
    mask = coco_mask.decode(thing["segmentation"])
    wanted = np.zeros((600, 300))
    wanted[0:400, 100:300] = 1
    assert (mask == wanted).all()
    assert coco_mask.toBbox(thing["segmentation"]).tolist() == thing["bbox"]


@pytest.mark.skipif(sys.platform != "linux", reason="such names are Linux's")
def test_any_file_name_survives_json(checkpoint, says, capsys):
    says("two")
    for name in (b"two words.png", b"two\nlines.png", b"\xff.png", "é.png".encode()):
        Image.new("RGB", (3, 3)).save(os.fsdecode(name))
        words = ask_about(os.fsdecode(name), "--model_path", str(checkpoint), "--json")
        assert main(words) == 0
        (record,) = records(capsys)
        assert os.fsencode(record["file"]) == name
    assert main(ask_about("t*.png", "*.png", "--model_path", str(checkpoint))) == 0
    assert r"two\nlines.png: two" in capsys.readouterr().out.splitlines()


def test_a_closed_pipe_ends_it_quietly(checkpoint, pictures, says, capsys, monkeypatch):
    says("two")
    reader, writer = os.pipe()
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        os.close(reader)
        words = ask_about("pictures", "--model_path", str(checkpoint), "--json")
        assert main(words) == 141
    assert "Broken" not in capsys.readouterr().err


def test_a_closed_error_stream_puts_nothing_into_the_answer(
    checkpoint, says, capsys, monkeypatch
):
    says("two")
    monkeypatch.setattr(sys, "stderr", None)
    assert main(ask("x", "--model_path", str(checkpoint), "--json")) == 0
    assert len(records(capsys)) == 1


# Options


def test_help_is_quick_and_honest():
    code = (
        "import sys\nfrom vlm.inference import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    sys.exit(end.code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, "--help failed, or brought torch along"
    said = " ".join(done.stdout.split())
    assert "a hundred kinds of sticker and nothing else of the world" in said
    assert "shown a photograph, it sees stickers in it" in said
    assert '--prompt "segment owl"' in said and "vae-oid.npz" in said
    for flag in ("--prompt", "--output", "--only_cpu", "--mask_decoder", "--seed"):
        assert flag in done.stdout


def test_pytest_leaves_test_inference_alone():
    assert test_inference.__test__ is False


# Mistakes: one line, status 2


MISTAKES = [
    ([], "--prompt"),
    (["--prompt", "detect owl"], "--image_file_path"),
    (["--prompt"], "argument --prompt: expected one argument"),
    (["--prompt", "detect", *ask("owl")[1:]], "'owl' belongs to no flag"),
    (ask("x", "--promt", "y"), "did you mean --prompt?"),
    (ask("x", "--max_tokens=5"), "did you mean --max_tokens_to_generate?"),
    (ask("x", "--xyz"), "unknown flag --xyz: --help lists all flags"),
    (ask("x", "--do_sample", "perhaps"), "'perhaps' is neither True nor False"),
    (ask("x", "--max_tokens_to_generate", "many"), "invalid int value: 'many'"),
    (ask("x", "--max_tokens_to_generate", "0"), "max_tokens_to_generate=0 must"),
    (ask("x", "--do_sample", "--temperature", "-1"), "temperature=-1.0 must be"),
    (ask("x", "--do_sample", "--temperature", "nan"), "temperature=nan must be"),
    (ask("x", "--do_sample", "--top_p", "0"), "top_p=0.0 must be in"),
    (ask("x", "--top_k", "0"), "top_k=0 must be"),
    (ask(" "), "the prompt is empty"),
    (["scene.png"], "required: --prompt"),
    (ask_about("no.png"), "no.png"),
    (ask_about("letter.jpg"), "letter.jpg is not a picture"),
    (ask_about("empty"), "no picture found in empty"),
    (ask_about("picture*.jpg"), "no picture found in picture*.jpg"),
    (ask_about("detect owl", prompt="picture.png"), "detect owl"),
    (ask_about("https://example.org/owl.png?size=3"), "download"),
    (ask_about(""), "--image_file_path: the path is empty"),
    (ask("x", "--model_path", ""), "--model_path: the path is empty"),
    (ask("x", "--output="), "--output: the path is empty"),
    (ask("x", "--batch_size", "0"), "--batch_size 0 must be at least 1"),
    (ask("x", "--output", "no/out.png"), "no folder no: make it"),
    (ask("x", "--output", "out.txt"), "must be a file that ends in .png or .jpg"),
    (ask("x", "--output", "out"), "must be a file that ends in .png or .jpg"),
    (ask("x", "--output", "empty"), "must be a file that ends in .png or .jpg"),
    (ask("x", "--output", "picture.png"), "would replace an image"),
    (ask_about("*.png", "--output", "out.png"), "out.png must be a folder"),
    (ask_about("*.png", "--output", "letter.jpg"), "letter.jpg must be a folder"),
    (ask_about("*.png", "--output", "no/out"), "no folder no: make it"),
    (ask_about("*.png", "--output", "."), "would replace an image"),
    (
        ask("x", "--image_file_path", "empty/../picture.png", "--output", "out"),
        "have one name",
    ),
    (
        ask("x", "--image_file_path", "empty/../PICTURE.PNG", "--output", "out"),
        "have one name",
    ),
    (ask("segment owl", "--model_path", "~no/such"), "~no/such"),
    (ask("x", "--output", "~no/out.png"), "no folder ~no"),
    (ask("segment owl", "--mask_decoder", "~no/a.npz"), "~no/a.npz"),
    (ask("detect"), 'detect what? Name it, as in "detect owl"'),
    (ask(" segment "), "segment what?"),
    (ask("detect ;"), "detect what?"),
    (ask("segment owl", "--mask_decoder", "no.npz"), "no.npz"),
    (ask("segment owl", "--mask_decoder", "letter.jpg"), "letter.jpg"),
    (ask("segment owl", "--mask_decoder", "empty"), "in empty"),
    (ask("segment owl", "--model_path", "empty"), "no mask decoder"),
    (ask("segment owl", "--model_path", "empty"), "vae-oid.npz"),
]


def check_mistake(words: list[str], key: str, capsys) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert key in err and "Traceback" not in err


@pytest.mark.parametrize("words, key", MISTAKES)
def test_a_mistake_is_one_line_before_any_model(words, key, capsys, monkeypatch):
    def load(*_):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(vlm.weights, "load_hf_model", load)
    check_mistake(words, key, capsys)


def test_the_picture_is_never_overwritten(capsys):
    picture = Path("picture.png")
    before = picture.read_bytes()
    check_mistake(ask("x", "--output", "./picture.png"), "choose another", capsys)
    assert picture.read_bytes() == before


def test_a_model_that_is_not_there(tmp_path, capsys):
    for path in ("no/such/folder", "empty", "letter.jpg"):
        check_mistake(ask("caption en", "--model_path", path), path, capsys)


def test_a_damaged_checkpoint(checkpoint, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in checkpoint.iterdir():
        part = 9999 if file.suffix == ".safetensors" else None
        (damaged / file.name).write_bytes(file.read_bytes()[:part])
    key = "model.safetensors"
    check_mistake(ask("caption en", "--model_path", str(damaged)), key, capsys)


def test_a_prompt_longer_than_the_positions(checkpoint, capsys):
    prompt = "detect" + " owl" * 300
    words = ask(prompt, "--model_path", str(checkpoint))
    check_mistake(words, "shorten the prompt", capsys)
    # The prompt alone would fit, the answer not: known before its first word.
    words = ("--model_path", str(checkpoint), "--max_tokens_to_generate", "260")
    check_mistake(ask("caption en", *words), "generate fewer tokens", capsys)


def test_an_image_token_in_the_prompt(checkpoint, capsys):
    words = ask("caption en <image>", "--model_path", str(checkpoint))
    check_mistake(words, "<image>", capsys)


def test_the_number_format_can_be_chosen(checkpoint, capsys):
    words = ask("caption en", "--model_path", str(checkpoint), "--only_cpu")
    few = ("--max_tokens_to_generate", "2")
    assert main([*words, *few, "--dtype", "bfloat16"]) == 0
    assert "torch.bfloat16" in capsys.readouterr().err
    check_mistake(
        [*words, "--dtype", "int3"], "use 'auto', '16-bit', 'float32'", capsys
    )


def test_no_memory_is_a_line_and_a_fault_of_ours_a_traceback(capsys, monkeypatch):
    def fails(message: str):
        def load(*_):
            raise RuntimeError(message)

        monkeypatch.setattr(vlm.weights, "load_hf_model", load)

    fails("CUDA out of memory. Tried to allocate 3 GiB")
    check_mistake(ask("caption en"), "try --dtype 16-bit, --only_cpu True", capsys)
    fails("shapes disagree")
    with pytest.raises(RuntimeError, match="shapes disagree"):
        main(ask("caption en"))


def test_the_process_ends_with_status_2():
    command = [sys.executable, "-m", "vlm.inference", "--prompt", "x", "--imge", "y"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: unknown flag --imge: --help lists all flags\n"


def test_spaces_around_a_prompt_do_not_count(checkpoint, capsys):
    said = []
    for prompt in ("caption en", "  caption en "):
        assert main(ask(prompt, "--model_path", str(checkpoint))) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_a_tilde_is_the_home_of_picture_and_drawing(
    checkpoint, capsys, tmp_path, monkeypatch
):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    Image.new("RGB", (20, 10)).save(tmp_path / "picture.png")
    words = ask_about("~/picture.png", "--model_path", str(checkpoint), "--output")
    for _ in range(2):  # the second time there is a drawing, to be replaced
        assert main([*words, "~/drawn.png"]) == 0
        assert size(tmp_path / "drawn.png") == (20, 10)
    capsys.readouterr()
    check_mistake([*words, "~/picture.png"], "would replace an image", capsys)
    with pytest.raises(ValueError, match="replace"):  # from Python, too
        drawing_paths("~/picture.png", ["~/picture.png"])
