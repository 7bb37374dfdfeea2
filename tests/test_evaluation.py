"""The evaluation, on answers whose numbers are known."""

import json

import pytest

from vlm import evaluation, results
from vlm.backgrounds import draw_background, photo_crops
from vlm.evaluation import (
    SPLITS,
    _ask_model,
    _evaluate_scenes,
    _majority_baseline,
    _scene_questions,
    evaluate,
    main,
    silent_fraction,
)
from vlm.hub import EMBEDDED
from vlm.mask_tokens import MaskDecoder, MaskVQVAE
from vlm.questions import EMPTY_CAPTION, Question, make_question
from vlm.results import table, write_results
from vlm.sampling import Generation, generate
from vlm.scenes import (
    TEST_STYLE,
    VALIDATION_SEEDS,
    all_classes,
    make_scene,
    plan_scene,
    style_classes,
)
from vlm.weights import load_hf_model, make_processor

SEEDS = VALIDATION_SEEDS[:6]
SCENES = [make_scene(seed, 64) for seed in SEEDS]
CLASSES = list(all_classes())
EVERY_CLASS = "detect, every class asked"


@pytest.fixture(scope="module")
def decoder():
    return MaskDecoder.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def embedded():
    return load_hf_model(device="cpu")


def written(text, probability=1.0):
    return Generation([0], [probability], [text])


def answerer(write):
    """Answers about `SCENES`; `write` makes the text (and its probability)."""

    def answer(image, questions):
        (scene,) = (scene for scene in SCENES if scene.image is image)
        texts = [write(scene, question) for question in questions]
        return [written(*((t,) if isinstance(t, str) else t)) for t in texts]

    return answer


def knows_boxes(scene, question):
    if question.task.startswith("detect"):
        return make_question(scene, "detect", question.prompt.partition(" ")[2]).answer
    return question.answer


def numbers_of(write, decoder):
    return _evaluate_scenes(answerer(write), SCENES, SEEDS, CLASSES, decoder)


def test_a_scene_is_asked_the_same_every_time_and_for_absent_classes_too():
    for seed, scene in zip(SEEDS, SCENES, strict=True):
        questions = _scene_questions(scene, seed, CLASSES)
        assert questions == _scene_questions(scene, seed, CLASSES)
        asked = [q.prompt[7:] for q in questions if q.task == "detect"]
        assert set(scene.counts) <= set(asked)
        assert sum(kind not in scene.counts for kind in asked) == 2
        every = [q.prompt for q in questions if q.task == "detect every"]
        assert every == [f"detect {kind}" for kind in CLASSES]


def test_absent_classes_are_of_those_that_a_style_has():
    classes = style_classes(TEST_STYLE)
    for seed in range(50):
        questions = _scene_questions(SCENES[0], seed, classes)
        asked = {q.prompt.partition(" ")[2] for q in questions if "detect" in q.task}
        assert asked <= {*classes, *SCENES[0].counts}
        assert sum(q.task == "detect every" for q in questions) == len(classes)


def test_one_who_knows_everything_gets_full_marks(decoder):
    vqvae = MaskVQVAE.from_pretrained(EMBEDDED)

    def write(scene, question):
        if question.task == "segment":
            kind, encode_masks = question.prompt[8:], vqvae.encode_masks
            return make_question(
                scene, "segment", kind, encode_masks=encode_masks
            ).answer
        return knows_boxes(scene, question)

    numbers = numbers_of(write, decoder)
    assert 0.85 < numbers.pop("segment: mean IoU") < 1  # sixteen tokens lose a little
    assert numbers.pop("scenes") == len(SCENES)
    for name, value in numbers.items():
        expected = 0 if "invalid" in name or "false" in name else 1
        assert value == pytest.approx(expected), name  # precision: less an epsilon


def test_one_who_says_nothing_is_right_about_absent_things_alone(decoder):
    numbers = numbers_of(lambda *_: "", decoder)
    right = {name for name, value in numbers.items() if value and name != "scenes"}
    assert right == {"detect absent: nothing", "segment absent: nothing"}
    assert all(numbers[name] == 1 for name in right)


def test_half_an_object_is_counted_as_invalid(decoder):
    numbers = numbers_of(lambda *_: "<loc0001> owl", decoder)
    for task in ("detect", "segment"):
        asked = sum(
            question.task == task
            for seed, scene in zip(SEEDS, SCENES)
            for question in _scene_questions(scene, seed, CLASSES)
        )
        assert numbers[f"{task}: invalid objects"] == asked


@pytest.mark.parametrize("label", ["a class", "unicycle"])
def test_false_alarms_are_counted_and_cost_precision_where_they_are_sure(
    decoder, label
):
    thing, *_ = SCENES[0].objects
    box = make_question(SCENES[0], "detect", thing.label).answer[:36]
    name = thing.label if label == "a class" else label

    def write(scene, question):
        asked = question.task, question.prompt
        if asked == ("detect every", f"detect {thing.label}"):
            if thing.label not in scene.counts:
                return f"{box} {name}", 0.9
        return knows_boxes(scene, question), 0.5

    without = sum(thing.label not in scene.counts for scene in SCENES)
    numbers = numbers_of(write, decoder)
    assert (
        numbers[f"{EVERY_CLASS}: false alarms per image"] == without / len(SCENES) > 0
    )
    # A name of nothing at all is no class that has a precision.
    is_one = numbers[f"{EVERY_CLASS}: AP50"] == pytest.approx(1)
    assert is_one == (label == "unicycle")
    assert numbers["detect, present classes asked: AP50"] == pytest.approx(1)


def test_the_baseline_gives_each_tasks_most_common_answer():
    questions = [Question("count", "a", "1"), Question("count", "b", "2")]
    questions += [Question("count", "c", "2"), Question("presence", "d", "no")]
    rows = _majority_baseline(questions)(SCENES[0].image, questions)
    assert [row.text for row in rows] == ["2", "2", "2", "no"]


def test_a_picture_is_encoded_once_for_all_its_prompts(embedded):
    model, tokenizer = embedded
    processor = make_processor(*embedded)
    encoded = []
    hook = model.vision_tower.register_forward_hook(
        lambda _, given, __: encoded.append(given)
    )
    prompts = ["detect owl", "caption en", "segment owl"]
    image = make_scene(SEEDS[0], processor.image_size).image
    questions = [Question("", prompt, "") for prompt in prompts]
    rows = _ask_model(model, processor, image, questions)
    hook.remove()
    ((pixels,),) = encoded
    assert len(pixels) == 1
    each = processor(prompts, [image] * 3)
    texts = generate(model, tokenizer, each, max_new_tokens=160)
    assert [row.text for row in rows] == texts


def test_many_prompts_are_asked_in_parts(embedded, monkeypatch):
    parts = []

    def echo(model, tokenizer, inputs, **_):
        parts.append(inputs["input_ids"])
        texts = tokenizer.batch_decode(parts[-1], skip_special_tokens=True)
        return [written(text) for text in texts]

    monkeypatch.setattr(evaluation, "generate_tokens", echo)
    model, processor = embedded[0], make_processor(*embedded)
    questions = [Question("", str(number), "") for number in range(120)]
    rows = _ask_model(model, processor, SCENES[0].image, questions)
    assert [row.text.strip() for row in rows] == [q.prompt for q in questions]
    assert [len(part) for part in parts] == [50, 50, 20]


# Pictures without a sticker


def silent_answer(image, questions):
    return [written(EMPTY_CAPTION if q.task == "caption" else "") for q in questions]


@pytest.mark.parametrize("task", ["caption", "detect", "segment"])
def test_silent_is_who_says_nothing_in_every_task(task):
    images = [make_scene(seed, 32, empty_prob=1.0).image for seed in SEEDS]
    assert silent_fraction(silent_answer, images) == 1

    def talks_once(image, questions):
        rows = silent_answer(image, questions)
        (first, *_) = (i for i, q in enumerate(questions) if q.task == task)
        if image in images[:2]:
            rows[first] = written("an owl" if task == "caption" else "<loc0001> owl")
        return rows

    assert silent_fraction(talks_once, images) == pytest.approx(4 / 6)


# A whole evaluation


@pytest.fixture
def evaluated(embedded, decoder, monkeypatch):
    """`evaluate` of a model that is a function of (image, questions)."""

    def evaluated(answer, **options):
        monkeypatch.setattr(
            evaluation, "_ask_model", lambda m, p, *asked: answer(*asked)
        )
        return evaluate(*embedded, decoder, **options)

    return evaluated


@pytest.mark.parametrize("silent", [True, False])
def test_each_column_has_the_rows_of_silence(evaluated, silent):
    def talks(image, questions):
        return [written("an owl" if q.task == "caption" else "") for q in questions]

    numbers = evaluated(silent_answer if silent else talks, num_scenes=2)
    expected = {"styles trained on": silent, "validation style": silent}
    expected["without looking"] = False
    for name in ("empty scenes: silent", "photographs: silent"):
        assert {column: rows[name] for column, rows in numbers.items()} == expected
    assert {rows["scenes"] for rows in numbers.values()} == {2}


def test_empty_scenes_show_backgrounds_and_photographs_are_kept_from_training(
    evaluated, monkeypatch
):
    seen = []

    def keep(answer, images):
        seen.append([image.tobytes() for image in images])
        return 0.0

    monkeypatch.setattr(evaluation, "silent_fraction", keep)
    monkeypatch.setattr(evaluation, "_NUM_EMPTY", 2)
    evaluated(silent_answer, num_scenes=3)
    empty, photos = seen[:2]
    assert seen == [empty, photos] * 3  # in each column
    for image, seed in zip(empty, VALIDATION_SEEDS[:2], strict=True):
        assert image == draw_background(plan_scene(seed).background_seed, 128).tobytes()
    crops = photo_crops("validation", 2, 128)
    assert photos == [image.tobytes() for image in crops]


def test_the_split_decides_seeds_style_classes_and_crops(evaluated, monkeypatch):
    """With a split made up for it: the test split is for one look, at the end."""
    monkeypatch.setitem(SPLITS, "test", (range(40, 49), "flat"))
    some = style_classes("flat")[:80]
    monkeypatch.setattr(
        evaluation,
        "style_classes",
        lambda *styles: some if styles == ("flat",) else None,
    )
    drawn, crops, every = [], [], []

    def make(seed, side, styles=None, **options):
        drawn.append((seed, styles and tuple(styles)))
        return make_scene(seed, side, styles or ("noto",), **options)

    def crop(*options):
        crops.append(options)
        return photo_crops("validation", *options[1:])

    def model(image, questions):
        every.append(sum(q.task == "detect every" for q in questions))
        return silent_answer(image, questions)

    monkeypatch.setattr(evaluation, "make_scene", make)
    monkeypatch.setattr(evaluation, "photo_crops", crop)
    numbers = evaluated(model, split="test", num_scenes=3)
    assert list(numbers) == ["styles trained on", "test style", "without looking"]
    assert {seed for seed, _ in drawn} == {40, 41, 42}
    assert {styles for _, styles in drawn} == {None, ("flat",)}
    assert crops == [("test", 3, 128)]
    assert [number for number in every if number] == [100] * 3 + [80] * 3


def test_unknown_splits_and_no_scenes_are_refused(embedded, decoder):
    for split, number in (("training", 5), ("validation", 0)):
        with pytest.raises(ValueError, match="at least 1, of validation or test"):
            evaluate(*embedded, decoder, split, number)


# Results

NUMBERS = {"a": {"scenes": 5, "F1": 0.5, "more": 1}, "b": {"scenes": 5, "F1": 1.0}}


def test_table_has_a_dash_where_a_column_lacks_a_row():
    lines = table(NUMBERS).splitlines()
    assert lines[0] == "| | a | b |" and len(lines) == 5
    assert "| F1 | 0.500 | 1.000 |" in lines and "| more | 1 | – |" in lines


@pytest.mark.parametrize(
    ("card", "kept"),
    [
        ("before\n{start}\nold \\1\n{end}\nafter\n", ["before", "after"]),
        ("---\nlicense: mit\n---\n# Mine", ["---\nlicense: mit\n---\n# Mine\n"]),
        (None, ["# runs\n"]),
    ],
    ids=["markers", "no markers", "no card"],
)
def test_results_are_written_and_the_card_keeps_the_rest(tmp_path, card, kept):
    folder = tmp_path / "runs"
    folder.mkdir()
    readme = folder / "README.md"
    if card is not None:
        markers = {"start": results._START, "end": results._END}
        readme.write_text(card.format(**markers), encoding="utf-8")
    write_results(folder, {"old": {"scenes": 1}})
    write_results(folder, NUMBERS)
    written = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert written == NUMBERS
    text = readme.read_text(encoding="utf-8")
    assert table(NUMBERS) in text and "old" not in text
    assert text.count(results._START) == text.count(results._END) == 1
    assert all(part in text for part in kept)


def test_command_line(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(evaluation, "load_hf_model", lambda path: ("model", "tokens"))
    monkeypatch.setattr(evaluation, "load_mask_decoder", lambda *paths: paths)
    monkeypatch.setattr(evaluation, "evaluate", lambda *a: asked.append(a) or NUMBERS)
    words = ["--model_path", str(tmp_path), "--split", "test", "--scenes", "7"]
    assert main(words) == 0
    assert asked == [("model", "tokens", (str(tmp_path), None), "test", 7)]
    assert table(NUMBERS) in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert main([*words, "--write"]) == 0
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"README.md", "evaluation.json"}


def test_command_line_says_what_is_wrong(tmp_path, capsys):
    for words in (["--model_path", str(tmp_path / "none")], ["--scenes", "0"]):
        assert main(words) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert main(["--split", "training"]) == 2
    assert "training" in capsys.readouterr().err
    assert main(["--model_path", "owner/name", "--write"]) == 2  # the hub's cache
    assert "--write needs a folder" in capsys.readouterr().err
