"""Fine-tuning: what is trained and what stays, rows and splits, the command."""

import errno
import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image
from reference import close, random_inputs, randomize, run_in_two_processes, tiny_config

from vlm import inference
from vlm.finetuning import (
    ALL_BUT_VISION,
    FineTuningConfig,
    _write_card,
    enable_gradient_checkpointing,
    finetune,
    main,
    match_parameters,
    merge_adapters,
    save_adapter,
    set_trainable,
)
from vlm.paligemma import PaliGemmaForConditionalGeneration
from vlm.processing import PaliGemmaProcessor
from vlm.rows import (
    Row,
    _check_objects,
    _find_splits,
    read_rows,
    train_validation_split,
)
from vlm.training import SuffixLoss, make_accelerator, make_optimizer, training_step
from vlm.weights import load_hf_model, make_processor, save_hf_model

QUICK = ["--epochs", "2", "--batch_size", "4", "--learning_rate", "3e-3"]


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    """A GPU is left alone, with accelerate's own switch."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def tiny_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = randomize(PaliGemmaForConditionalGeneration(tiny_config()))
    return model.to(dtype).eval()


def batch(rows=4):
    """Rows of different lengths: answers of 1 … `rows` tokens."""
    prompts, suffixes = (5,) * rows, tuple(range(1, rows + 1))
    return random_inputs(tiny_config(), prompts, suffixes, padding="right")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, request):
    """The same tiny random model twice, in float32 and in bfloat16."""
    tokenizer = request.getfixturevalue("tokenizer")
    config = tiny_config(
        text=dict(vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = randomize(PaliGemmaForConditionalGeneration(config))
    folder = tmp_path_factory.mktemp("models")
    save_hf_model(model, tokenizer, folder / "float32")
    save_hf_model(model.to(torch.bfloat16), tokenizer, folder / "bfloat16")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve pictures of one color each; the answer depends on the color."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    lines = []
    for number in range(12):
        red = number % 2
        noise = np.full((30, 40, 3), 20 + rng.randrange(20), np.uint8)
        noise[..., 0] += 180 * red
        Image.fromarray(noise).save(folder / f"{number}.png")
        answer = "two owls, a pizza" if red else "an apple"
        line = {"image": f"{number}.png", "prefix": "caption en", "suffix": answer}
        lines.append(json.dumps(line))
    (folder / "labels.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def weights(folder):
    return load_hf_model(folder, "cpu")[0].state_dict()


def assert_same(ours, theirs):
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# What is trained


def test_patterns_match_names_and_the_head_is_the_embedding():
    model = tiny_model()
    everything = match_parameters(model, ["*"])
    assert len(everything) == len(list(model.parameters()))
    attention = match_parameters(model, ["language_model.*.self_attn.*"])
    assert len(attention) == 3 * 4
    assert all(".self_attn." in name for name in attention)
    two = match_parameters(model, ["multi_modal_projector.*", "*.norm.weight"])
    assert two == [
        "multi_modal_projector.linear.weight",
        "multi_modal_projector.linear.bias",
        "language_model.model.norm.weight",
    ]
    with pytest.raises(ValueError, match="named like 'voice.*'.*language_model"):
        match_parameters(model, ["*", "voice.*"])


def test_lora_goes_on_the_linear_layers_but_the_head():
    model = tiny_model()
    set_trainable(model, ["*"], lora_rank=2)
    layers = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    assert len(layers) == 2 * 6 + 1 + 3 * 7 and not any("lm_head" in n for n in layers)
    with pytest.raises(ValueError, match="linear layers"):
        set_trainable(tiny_model(), ["language_model.model.norm.weight"], lora_rank=2)


def test_the_default_leaves_the_vision_tower_alone():
    model = tiny_model()
    assert FineTuningConfig(data="x").train == ALL_BUT_VISION
    set_trainable(model, ALL_BUT_VISION)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith("vision_tower."), name


def test_frozen_is_bit_for_bit_and_trained_moves():
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_trainable(model, ["*.mlp.up_proj.weight"])
    step_once(model, batch())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("up_proj" in name), name


def test_new_adapters_change_nothing_and_merged_ones_give_the_same():
    model, inputs = tiny_model(), batch()
    keys, start = model.state_dict().keys(), model(**inputs)["logits"]
    adapters = set_trainable(model, ["language_model.*"], lora_rank=2)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert torch.equal(model(**inputs)["logits"], start)
    for _ in range(3):
        step_once(model, inputs)
    learned = model(**inputs)["logits"]
    assert (learned - start).abs().max() > 1e-3
    merge_adapters(model, adapters, torch.float32)
    torch.testing.assert_close(model(**inputs)["logits"], learned, atol=2e-5, rtol=0)
    assert model.state_dict().keys() == keys


def test_trained_weights_are_float32_and_frozen_matrices_stay_bfloat16():
    model = tiny_model(torch.bfloat16)
    adapters = set_trainable(model, ["language_model.model.layers.*"])
    optimizer = step_once(model, batch(), learning_rate=1e-5, mixed="bf16")
    for name, parameter in model.named_parameters():
        wanted = parameter.requires_grad or parameter.ndim < 2
        assert (parameter.dtype == torch.float32) == wanted, name
    moments = [m for state in optimizer.state.values() for m in state.values()]
    assert moments and all(moment.dtype == torch.float32 for moment in moments)
    merge_adapters(model, adapters, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "pattern",
    ["*", "*position_embedding*", "*embed_tokens*", "vision*norm*", "multi*", "*fc1*"],
)
def test_any_part_can_be_trained_under_bfloat16(pattern):
    model = tiny_model(torch.bfloat16)
    set_trainable(model, [pattern])
    step_once(model, batch(), mixed="bf16")


def step_once(model, batch, learning_rate=1e-2, mixed="no"):
    """One step of training with AdamW; returns the optimizer."""
    accelerator = make_accelerator(mixed)
    objective = SuffixLoss(model)
    optimizer = make_optimizer(objective, 0.0)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    training_step(accelerator, objective, optimizer, [batch], learning_rate)
    return optimizer


def test_checkpointing_has_the_same_gradients_and_keeps_less():
    inputs, results = batch(), []
    for again in (False, True):
        model, kept = tiny_model(), 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        if again:
            enable_gradient_checkpointing(model)
        with hooks:
            loss = SuffixLoss(model)(inputs)
        loss.backward()
        results.append((kept, loss, [p.grad for p in model.parameters()]))
    (kept, loss, gradients), (fewer, same_loss, same) = results
    assert torch.equal(loss, same_loss)
    torch.testing.assert_close(gradients, same, atol=1e-6, rtol=1e-5)
    assert fewer < kept / 2


# The rows


def test_validation_images_are_never_trained_on(tmp_path):
    rows = []
    for number in range(20):
        image = tmp_path / f"{number}.png"
        # Every image is there twice, under two names, and asked about twice.
        Image.new("RGB", (8, 8), (number // 2 * 20, 0, 0)).save(image)
        rows += [Row(image, "caption en", "owl"), Row(image, "detect owl", "owl")]
    training, validation = train_validation_split(rows, 0.2, seed=0)
    assert len(validation) == 2 * 2 * 2
    assert len(training) + len(validation) == len(rows)
    colors = [{r.image.read_bytes() for r in side} for side in (training, validation)]
    assert not colors[0] & colors[1]
    assert train_validation_split(rows, 0.2, seed=0)[1] == validation
    others = [train_validation_split(rows, 0.2, seed=s)[1] for s in range(1, 5)]
    assert any(other != validation for other in others)
    with pytest.raises(ValueError, match="1 different images are too few"):
        train_validation_split(rows[:4], 0.2, seed=0)
    with pytest.raises(ValueError, match="too few"):
        train_validation_split(rows, 0.2, 0, validation=rows)


def test_rows_may_have_empty_lines_and_a_byte_order_mark(data):
    lines = (data / "labels.jsonl").read_text()
    odd = data / "odd.txt"  # a file may be given outright
    odd.write_text("\ufeff\n" + lines.replace("\n", "\n\n"), encoding="utf-8")
    rows = read_rows(odd)
    assert len(rows) == 12 and rows[1].where.endswith("/odd.txt line 4")
    assert rows[0].image == data / "0.png"
    odd.unlink()


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(dict(zip(("image", "prefix", "suffix"), row, strict=True)))
        for row in rows
    ]
    path.write_text("\n".join(lines))


def test_training_and_asking_have_one_form_of_a_prompt(data, tokenizer):
    labels = data / "forms.txt"
    write_rows(labels, [("0.png", " detect owl;pizza\n", " "), ("0.png", "a b", "c\n")])
    processor = PaliGemmaProcessor(tokenizer, 4, 28)
    for row, asked in zip(
        read_rows(labels), ("detect owl ; pizza", "a b"), strict=True
    ):
        trained = processor([row.prefix], [row.image], [row.suffix])
        question = processor([asked], [row.image])["input_ids"]
        prefix = trained["input_ids"][trained["token_type_ids"] == 0]
        assert torch.equal(prefix, question[0])
    answers = [processor.encode_suffix(row.suffix) for row in read_rows(labels)]
    assert answers == [processor.encode_suffix(""), processor.encode_suffix("c")]
    assert answers[0] == [tokenizer.eos_token_id]
    labels.unlink()


BOX = "<loc0100><loc0200><loc0300><loc0400>"
SEGS = "<seg000>" * 16


@pytest.mark.parametrize(
    "prefix, suffix",
    [
        ("detect owl", ""),
        ("segment owl", ""),
        ("detect owl", f"{BOX} owl ; {BOX}{SEGS} snowy owl"),
        ("segment owl", f"{BOX}{SEGS} owl"),
        ("caption en", "owls; <3"),
        ("answer en where is the owl?", f"at {BOX}"),
    ],
)
def test_answers_that_can_be_read_are_learned(prefix, suffix):
    _check_objects(prefix, suffix)


@pytest.mark.parametrize(
    "prefix, suffix",
    [
        ("detect owl", "owl"),
        ("detect owl", f"{BOX}"),
        ("detect owl", f"{BOX[9:]} owl"),
        ("detect owl", f"{BOX}<loc0500> owl"),
        ("detect owl", "<loc0300><loc0200><loc0100><loc0400> owl"),
        ("detect owl", "<loc0100><loc0400><loc0300><loc0400> owl"),
        ("detect owl", f"{BOX}{SEGS[8:]} owl"),
        ("detect owl ; pig", f"{BOX} owl {BOX} pig"),
        ("segment owl", f"{BOX} owl"),
        ("segment owl", f"{BOX}{SEGS}{SEGS} owl"),
        ("segment owl", f"{SEGS}{BOX} owl"),
    ],
)
def test_answers_that_nothing_could_read_are_refused(prefix, suffix):
    with pytest.raises(ValueError, match="not a valid object"):
        _check_objects(prefix, suffix)


@pytest.mark.parametrize("form", ["{}/_annotations.jsonl", "_annotations.{}.jsonl"])
def test_an_export_is_read_as_what_its_names_say(tmp_path, form):
    files = [tmp_path / form.format(name) for name in ("train", "valid", "test")]
    for file in files:
        write_rows(file, [])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "old.jsonl").touch()  # not the data's
    assert _find_splits(tmp_path) == {"train": files[0], "val": files[1]}
    write_rows(tmp_path / form.format("val"), [])
    with pytest.raises(ValueError, match="holds .*train.*, .*val.*, .*valid"):
        _find_splits(tmp_path)
    (tmp_path / form.format("val")).unlink()
    assert _find_splits(files[2]) == {"train": files[2]}
    files[0].unlink()
    with pytest.raises(ValueError, match="holds .*train and valid"):
        _find_splits(tmp_path)


@pytest.mark.parametrize("names", [["trainval"], ["carnival_train", "carnival_valid"]])
def test_a_name_may_hold_both_words(tmp_path, names):
    files = [tmp_path / f"{name}.jsonl" for name in names]
    for file in files:
        write_rows(file, [])
    assert [*_find_splits(tmp_path).values()] == files


# The command


@pytest.fixture
def folder(data, tmp_path, monkeypatch):
    """A folder of one's own, with data that a test may spoil."""
    monkeypatch.chdir(tmp_path)
    for path in data.iterdir():
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "mine"


def read_log(folder):
    lines = Path(folder, "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(log):
    return [entry["validation_loss"] for entry in log if "validation_loss" in entry]


def run(model_path, *more):
    words = ["--data", "mine", "--output", "new", "--model_path", str(model_path)]
    return main([*words, *QUICK, *more])


def test_every_epoch_has_every_row(checkpoints, folder, monkeypatch):
    taken = []

    def train(objective, dataset, *args, **given):
        taken.append(dataset)
        return [{"step": 1}]

    monkeypatch.setattr("vlm.finetuning.train", train)
    model = str(checkpoints / "float32")
    for seed in (0, 1):
        config = FineTuningConfig(data="mine", model_path=model, seed=seed)
        finetune(config, Path("new"), stop_after=1)
    order, other = (dataset.indices for dataset in taken)
    assert sorted(order[:11]) == sorted(order[11:22]) == list(range(11))
    assert order[:11] != order[11:22] and order != other
    assert len(order) >= 3 * 11 and len(taken[0].dataset) == 11


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("vlm.finetuning.finetune", interrupt)
    assert main(["--data", "x", "--output", str(tmp_path / "run")]) == 130
    assert "--resume goes on from the last save" in capsys.readouterr().err


def test_the_command_from_folder_to_checkpoint(checkpoints, folder, capsys):
    assert run(checkpoints / "float32", "--epochs", "8") == 0
    out = capsys.readouterr().out
    log = read_log("new")
    before, *_, after = losses(log)
    assert f"{before:.4g} before, {after:.4g} after" in out and after < before / 2
    # Eleven rows to train on, in batches of four: an epoch is three steps.
    assert [entry["step"] for entry in log if "validation_loss" in entry] == (
        [0, 3, 6, 9, 12, 15, 18, 21, 22, 22]
    )
    assert not Path("new.unfinished").exists()
    card = Path("new/README.md").read_text()
    assert f"| {before:.4g} | {after:.4g} |" in card
    assert "| training | 11 | 11 | labels.jsonl, SHA-256 " in card
    assert "| validation | 1 | 1 | a part of the same |" in card
    assert "caption (12)" in card and "| steps | 22 |" in card
    assert "license:" not in card and "names no license" in card
    assert str(checkpoints) not in card  # a folder's path is private
    was, now = weights(checkpoints / "float32"), weights("new")
    for name in was:
        frozen = name.startswith("vision_tower.")
        assert torch.equal(was[name], now[name]) == frozen, name


def test_the_loss_after_is_that_of_the_saved_weights(checkpoints, folder):
    config = FineTuningConfig(
        data="mine",
        model_path=str(checkpoints / "bfloat16"),
        learning_rate=3e-3,
        epochs=1,
    )
    said = finetune(config, Path("new"))
    log = read_log("new")
    assert f"{log[-1]['validation_loss']:.4g} after" in said
    assert "| dtype | bfloat16 |" in Path("new/README.md").read_text()
    rows = read_rows(Path("mine/labels.jsonl"))
    _, rows = train_validation_split(rows, config.validation_fraction, config.seed)
    for path, entry in ((checkpoints / "bfloat16", log[0]), ("new", log[-1])):
        model, tokenizer = load_hf_model(path, "cpu")
        assert model.dtype == torch.bfloat16
        processor = make_processor(model.float(), tokenizer)
        texts = [row.prefix for row in rows], [row.image for row in rows]
        inputs = processor(*texts, [row.suffix for row in rows])
        with torch.no_grad():
            loss = model(**inputs)["loss"].item()
        assert entry["validation_loss"] == pytest.approx(loss, rel=0.03)


def test_the_last_validation_is_of_the_weights_that_are_written(
    checkpoints, folder, monkeypatch
):
    seen = []

    def validate(objective, *given):
        state = objective.model.state_dict()
        seen.append({name: tensor.clone() for name, tensor in state.items()})
        return {"validation_loss": float(len(seen))}

    monkeypatch.setattr("vlm.finetuning._validate", validate)
    assert run(checkpoints / "bfloat16", "--lora_rank", "2") == 0
    assert read_log("new")[-1]["validation_loss"] == len(seen)
    assert_same(weights("new"), seen[-1])


@pytest.mark.filterwarnings("default")  # transformers warns about itself
def test_what_lora_leaves_is_an_ordinary_checkpoint(checkpoints, folder):
    words = ["--lora_rank", "2", "--gradient_checkpointing", "--micro_batch_size", "3"]
    assert run(checkpoints / "bfloat16", *words) == 0
    theirs, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        "new", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.dtype == torch.bfloat16
    was, now = weights(checkpoints / "bfloat16"), weights("new")
    changed = {name for name in was if not torch.equal(was[name], now[name])}
    assert changed and all("_proj" in n or "projector" in n for n in changed), changed
    assert "| lora_rank | 2 |" in Path("new/README.md").read_text()


def test_a_stopped_run_goes_on_as_if_it_had_not(checkpoints, folder, capsys):
    model, words = checkpoints / "float32", ["--lora_rank", "2", "--save_every", "2"]
    assert run(model, *words, "--stop_after", "4") == 0
    assert "stopped at step 4: go on with --resume" in capsys.readouterr().out
    assert not Path("new").exists()
    assert run(model, *words) == 2
    assert "holds an unfinished run" in capsys.readouterr().err
    assert run(model, *words, "--resume", "--weight_decay", "0.1") == 2
    assert "has weight_decay 0.0, not 0.1: resume it" in capsys.readouterr().err
    assert run(model, *words, "--resume") == 0
    Path("new").rename("parts")
    assert run(model, *words) == 0
    assert_same(weights("new"), weights("parts"))
    assert Path("new/log.jsonl").read_text() == Path("parts/log.jsonl").read_text()


def test_the_place_and_the_rows_are_checked_before_weights_are_loaded(
    checkpoints, folder, capsys, monkeypatch
):
    monkeypatch.setattr("vlm.finetuning.load_hf_model", lambda *given: 1 / 0)
    assert run(checkpoints / "float32", "--output", "mine") == 2
    assert "mine exists already" in capsys.readouterr().err
    spoil(folder, 1, "{")
    assert run(checkpoints / "float32") == 2
    assert "line 1: not valid JSON" in capsys.readouterr().err


def test_an_adapter_may_be_asked_for_when_a_run_goes_on(checkpoints, folder):
    model, words = checkpoints / "float32", ["--lora_rank", "2"]
    assert run(model, *words, "--stop_after", "2") == 0
    assert main(["--output", "new", "--resume", "--save_adapter"]) == 0
    Path("new").rename("adapter")
    assert run(model, *words) == 0
    assert_same(weights("adapter"), weights("new"))


def test_the_flag_turns_on_gradient_checkpointing(checkpoints, folder, monkeypatch):
    calls = []

    def recompute(layer, *args, use_reentrant):
        calls.append(layer)
        return layer(*args)

    monkeypatch.setattr("vlm.finetuning.checkpoint", recompute)
    assert run(checkpoints / "float32", "--stop_after", "1") == 0 and not calls
    words = ["--output", "other", "--stop_after", "1", "--gradient_checkpointing"]
    assert run(checkpoints / "float32", *words) == 0 and calls


def test_a_resumed_run_has_its_settings_again(
    checkpoints, folder, capsys, monkeypatch, tmp_path
):
    """Also from elsewhere, and with less memory: neither changes what is learned."""
    model, words = checkpoints / "bfloat16", ["--seed", "3", "--train", "*.mlp.*"]
    assert run(model, *words) == 0
    Path("new").rename("whole")
    assert run(model, *words, "--stop_after", "2") == 0
    where = ["--output", str(tmp_path / "new"), "--resume"]
    monkeypatch.chdir("/")
    for flag, value in {
        "--seed": "4",
        "--train": "*.norm.*",
        "--learning_rate": "1e-3",
        "--dtype": "float32",
        "--model_path": str(checkpoints / "float32"),
        "--data": str(checkpoints.parent / "other"),
    }.items():
        if flag == "--data":
            shutil.copytree(folder, value)
            spoil(Path(value), 1, json.dumps(GOOD))
        assert main([*where, flag, value]) == 2
        name = "rows" if flag == "--data" else flag[2:]
        assert f" {name} " in capsys.readouterr().err.partition("the saved run has")[2]
    moved = tmp_path / "moved"
    folder.rename(moved)
    free = ["--micro_batch_size", "2", "--save_every", "1", "--gradient_checkpointing"]
    free += ["--dtype", "auto"]  # whatever it is
    assert main([*where, *free, "--data", str(moved)]) == 0
    ours, theirs = weights(tmp_path / "new"), weights(tmp_path / "whole")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-2, rtol=1e-2)
    assert "| seed | 3 |" in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.filterwarnings("default::UserWarning")  # the command shows them
def test_rows_of_ones_own_validation_file_are_measured_and_not_trained(
    checkpoints, folder, capsys
):
    lines = (folder / "labels.jsonl").read_text().splitlines()
    rows = [tuple(json.loads(line).values()) for line in lines]
    for name, some in (("train", rows[:8]), ("valid", rows[7:10]), ("test", rows[10:])):
        write_rows(folder / name / "rows.jsonl", some)
        for image in {image for image, *_ in some}:
            shutil.copy(folder / image, folder / name)
    (folder / "labels.jsonl").unlink()
    assert run(checkpoints / "float32") == 0
    said = capsys.readouterr()
    assert "mine/test/rows.jsonl isn't read" in said.err
    assert "1 rows about validation images" in said.err
    card = Path("new/README.md").read_text()
    assert "| training | 7 | 7 | rows.jsonl, SHA-256 " in card
    assert "| validation | 3 | 3 | rows.jsonl, SHA-256 " in card
    assert "| validation_fraction | the validation file |" in card


def test_number_formats_follow_each_other_in_one_process(checkpoints, folder):
    for number, dtype in enumerate(("float32", "bfloat16", "float32")):
        config = FineTuningConfig(
            data="mine",
            model_path=str(checkpoints / "float32"),
            epochs=1,
            dtype=dtype,
        )
        finetune(config, Path(f"new{number}"))
        assert load_hf_model(f"new{number}", "cpu")[0].dtype == getattr(torch, dtype)


@pytest.mark.filterwarnings("default")  # peft asks transformers for an old name
def test_an_adapter_alone_gives_what_the_merged_checkpoint_gives(
    checkpoints, folder, tmp_path, capsys
):
    for base in ("float32", "bfloat16"):
        for output, words in (
            (f"{base}-all", []),
            (f"{base}-part", ["--save_adapter"]),
        ):
            words = ["--lora_rank", "2", "--output", output, *words]
            assert run(checkpoints / base, *words) == 0
        assert_same(weights(f"{base}-all"), weights(f"{base}-part"))
        assert read_log(f"{base}-all") == read_log(f"{base}-part")
    files = {path.name for path in Path("float32-part").iterdir()}
    wanted = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert files == wanted | {"log.jsonl"}
    card = Path("float32-part/README.md").read_text()
    assert "library_name: peft" in card and str(checkpoints) not in card
    # peft puts it into transformers' model, every part of it.
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        checkpoints / "float32"
    )
    theirs = PeftModel.from_pretrained(theirs, "float32-part").eval()
    ours, _ = load_hf_model("float32-part", "cpu")
    inputs = random_inputs(ours.config, (4,))
    with torch.no_grad():
        close(ours(**inputs)["logits"], theirs(**inputs).logits)
    # It can be trained further.
    assert run("float32-part", "--output", "next") == 0
    assert "validation loss" in capsys.readouterr().out


def test_an_adapter_names_its_base(tmp_path):
    model = tiny_model()
    adapters = set_trainable(model, ["multi*"], lora_rank=2)
    for base, name, revision in (
        (str(tmp_path), str(tmp_path), None),
        ("google/paligemma-3b-pt-224@bf", "google/paligemma-3b-pt-224", "bf"),
    ):
        weights = {n: p for n, p in adapters.named_parameters() if p.requires_grad}
        save_adapter(adapters, weights, tmp_path / "new", base)
        values = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
        assert values["base_model_name_or_path"] == name
        assert values["revision"] == revision


@pytest.mark.parametrize("words", [[], ["--lora_rank", "4", "--save_adapter"]])
def test_the_embedded_models_children_can_segment(words, folder, tmp_path, capsys):
    suffix = f"{BOX}{SEGS} owl"
    write_rows(
        folder / "labels.jsonl",
        [(f"{n}.png", "segment owl", suffix) for n in range(12)],
    )
    quick = ["--epochs", "1", *words]
    assert main(["--data", "mine", "--output", "new", *quick]) == 0
    asked = ["--prompt", "segment owl", "--image_file_path", "mine/0.png", "--only_cpu"]
    capsys.readouterr()
    assert inference.main([*asked, "--model_path", "new"]) == 0
    said = capsys.readouterr()
    assert "score" in said.out or "nothing found" in said.out


# A full disk


def fill_disk(monkeypatch, free):
    usage = SimpleNamespace(total=2**40, used=2**40 - free, free=free)
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)


@pytest.mark.parametrize(
    "words, needed",
    [
        # In float32: what is trained and two moments, twice while a state is replaced.
        (["--train", "*"], lambda whole, adapters: 2 * 3 * 4 * whole),
        # And beside the last state, the result: everything, or what LoRA learned.
        (["--lora_rank", "2"], lambda whole, adapters: 3 * 4 * adapters + 4 * whole),
        (
            ["--lora_rank", "2", "--save_adapter"],
            lambda whole, adapters: 2 * 3 * 4 * adapters,
        ),
        (
            ["--lora_rank", "2", "--dtype", "bfloat16"],
            lambda whole, adapters: 3 * 4 * adapters + 2 * whole,
        ),
    ],
)
def test_space_is_there_before_the_first_step(
    words, needed, checkpoints, folder, capsys, monkeypatch
):
    model = load_hf_model(checkpoints / "float32", "cpu")[0]
    whole = sum(weight.numel() for weight in model.parameters())
    set_trainable(model, ALL_BUT_VISION, lora_rank=2)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed = needed(whole, adapters)
    monkeypatch.setattr("vlm.training.training_step", lambda *given: 1 / 0)
    fill_disk(monkeypatch, needed - 1 - 4 * adapters)  # they are merged at the end
    assert run(checkpoints / "float32", *words) == 2
    error = capsys.readouterr().err
    assert "GB free" in error and error.count("\n") == 1
    assert not Path("new.unfinished").exists()
    fill_disk(monkeypatch, needed + 4 * adapters)
    with pytest.raises(ZeroDivisionError):
        run(checkpoints / "float32", *words)


@pytest.mark.parametrize("lora", [[], ["--lora_rank", "2"]])
def test_a_disk_that_is_full_at_the_end_loses_nothing(
    lora, checkpoints, folder, capsys, monkeypatch
):
    def full(*given, **facts):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert run(checkpoints / "float32", *lora) == 0
    Path("new").rename("whole")
    for place in ("save_hf_model", "_write_card"):
        with monkeypatch.context() as patch:
            patch.setattr(f"vlm.finetuning.{place}", full)
            words = ["--resume"] if place == "_write_card" else lora
            assert run(checkpoints / "float32", *words) == 2
        error = capsys.readouterr().err
        assert "No space left" in error and "all is trained: --resume" in error
        assert error.count("\n") == 1 and not Path("new").exists()
    monkeypatch.setattr("vlm.training.training_step", lambda *given: 1 / 0)
    assert main(["--output", "new", "--resume"]) == 0  # nothing is trained again
    assert_same(weights("new"), weights("whole"))
    assert read_log("new") == read_log("whole")


def test_a_run_out_of_memory_is_advised_and_not_in_the_way(
    checkpoints, folder, capsys, monkeypatch
):
    def step(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    model = checkpoints / "float32"
    with monkeypatch.context() as patch:
        patch.setattr("vlm.training.training_step", step)
        assert run(model) == 2
    assert "try a smaller --micro_batch_size" in capsys.readouterr().err
    assert Path("new.unfinished").exists()  # its log, and no step to lose
    assert run(model, "--micro_batch_size", "1") == 0


def test_resume_without_a_run_says_so(checkpoints, folder, capsys):
    assert run(checkpoints / "float32", "--resume") == 2
    assert "no saved run for output new: leave --resume out" in capsys.readouterr().err


def write_card(folder, model_path):
    """The card of a run from `model_path`, as if it had been trained."""
    rows = [Row(Path("0.png"), "caption en", "owl"), Row(Path("1.png"), "a", "pizza")]
    _write_card(
        folder,
        FineTuningConfig(data="x", model_path=model_path),
        name="mine",
        splits=(rows[:1], rows[1:], {"train": "labels.jsonl, SHA-256 0"}),
        num_trained=1,
        log=[{"validation_loss": 2.0}, {"loss": 1.0}, {"validation_loss": 0.5}],
    )
    return (folder / "README.md").read_text()


def test_the_license_of_the_base_is_in_the_card(tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\n---\n")

    def download(name, file, **options):
        if name == "no/network":
            raise FileNotFoundError(name)
        return base / file

    monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", download)
    for path in ("some/model", str(base)):
        card = write_card(tmp_path, path)
        assert "license: mit\n" in card and "license carries over: mit" in card
    assert "license: apache-2.0\n" in write_card(tmp_path, "")
    (base / "README.md").write_bytes(b"license: caf\xe9")
    for path in ("no/network", str(base), str(tmp_path / "nowhere")):
        card = write_card(tmp_path, path)
        assert "license:" not in card and "names no license" in card
    assert not (tmp_path / "NOTICE").exists()


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_float16_is_not_trained_on_the_cpu(dtype, checkpoints, folder, capsys):
    assert run(checkpoints / "float32", "--dtype", dtype) == 2
    assert "give --dtype bfloat16" in capsys.readouterr().err
    assert not Path("new.unfinished").exists()


def test_paligemma_2_is_fine_tuned_too(tokenizer, folder, capsys):
    text = dict(model_type="gemma2", query_pre_attn_scalar=8, sliding_window=8)
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = tiny_config(
        text=dict(vocab_size=len(tokenizer), **text), image_token_index=image
    )
    torch.manual_seed(0)
    model = randomize(PaliGemmaForConditionalGeneration(config))
    save_hf_model(model, tokenizer, "two")
    assert run("two", "--lora_rank", "2") == 0
    ours = load_hf_model("new", "cpu")[0]
    theirs, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        "new", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.manual_seed(1)
    inputs = random_inputs(config, (4,))
    with torch.no_grad():
        wanted = theirs.eval()(**inputs).logits
        close(ours(**inputs)["logits"], wanted)


def test_the_card_of_googles_children_carries_gemmas_terms(tmp_path):
    page = "https://huggingface.co/google/paligemma-3b-pt-224/tree/bfloat16"
    card = write_card(tmp_path, page)
    assert "license: gemma\n" in card
    assert "base_model: google/paligemma-3b-pt-224\n" in card
    assert "google/paligemma-3b-pt-224@bfloat16, fine-tuned with" in card
    assert "| 2 | 0.5 |" in card and "caption (1), a (1)." in card
    assert "Gemma Terms of Use" in card and "owl" not in card
    assert "ai.google.dev/gemma/terms" in (tmp_path / "NOTICE").read_text()


SCRIPT = """
import sys
import torch
from vlm.finetuning import main
torch.set_num_threads(1)
status = main(sys.argv[1:])
print(f"one of {torch.distributed.get_world_size()} processes", file=sys.stderr)
raise SystemExit(status)
"""


def test_two_processes_have_the_loss_of_one(checkpoints, folder):
    assert run(checkpoints / "float32", "--micro_batch_size", "1") == 0
    Path("run.py").write_text(SCRIPT)
    words = ["--data", "mine", "--output", "two", *QUICK]
    words += ["--model_path", str(checkpoints / "float32"), "--micro_batch_size", "1"]
    done = run_in_two_processes(Path("run.py"), *words)
    assert done.stderr.count("of 2 processes") == 2, done.stderr
    one, two = read_log("new"), read_log("two")
    assert [entry["step"] for entry in two] == [entry["step"] for entry in one]
    for a, b in zip(one, two, strict=True):
        for name in {"loss", "validation_loss"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=2e-3), (a, b)


# Mistakes


def spoil(folder, number, text):
    """Put `text` into a line of the labels; `number` counts from 1."""
    lines = (folder / "labels.jsonl").read_text().splitlines()
    lines[number - 1] = text
    (folder / "labels.jsonl").write_text("\n".join(lines))


GOOD = {"image": "0.png", "prefix": "caption en", "suffix": "an owl"}
DETECT = GOOD | {"prefix": "detect owl"}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{'image': 1}", "labels.jsonl line 3: not valid JSON"),
        ("[1, 2]", "labels.jsonl line 3: a row is an object like"),
        (GOOD | {"answer": "owl"}, "'suffix': 'an owl', 'answer': 'owl'}"),
        ({"image": "0.png", "prefix": "a"}, "not {'image': '0.png', 'prefix': 'a'}"),
        (GOOD | {"suffix": 7}, "labels.jsonl line 3: 'suffix' can't be 7"),
        (GOOD | {"prefix": "\n "}, "'prefix' can't be '\\n '"),
        (GOOD | {"prefix": "<image>a"}, "labels.jsonl line 3: '<image>a'"),
        (
            GOOD | {"suffix": "owl<eos>"},
            "labels.jsonl line 3: 'owl<eos>' contains <eos>",
        ),
        (GOOD | {"prefix": "<bos>a"}, "labels.jsonl line 3: '<bos>a' contains <bos>"),
        (GOOD | {"suffix": "<pad>"}, "labels.jsonl line 3: '<pad>' contains <pad>"),
        (GOOD | {"suffix": "<loc7> a"}, "labels.jsonl line 3: '<loc7>' is not a token"),
        (GOOD | {"suffix": "<loc1024>"}, "labels.jsonl line 3: '<loc1024>' is not"),
        (GOOD | {"suffix": "<seg128>"}, "labels.jsonl line 3: '<seg128>' is not"),
        (DETECT | {"suffix": "owl"}, "labels.jsonl line 3: 'owl' is not a valid obj"),
        (GOOD | {"image": "no.png"}, "labels.jsonl line 3: no image file at"),
        (GOOD | {"image": "labels.jsonl"}, "cannot identify image file"),
        (GOOD | {"suffix": "owl " * 300}, "labels.jsonl line 3: "),
    ],
)
def test_a_bad_row_is_one_line_with_its_place(
    line, message, checkpoints, folder, capsys
):
    spoil(folder, 3, line if isinstance(line, str) else json.dumps(line))
    assert run(checkpoints / "float32") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not Path("new.unfinished").exists()


def test_a_row_that_is_too_long_says_by_how_much(checkpoints, folder, capsys):
    spoil(folder, 3, json.dumps(GOOD | {"suffix": "owl " * 300}))
    assert run(checkpoints / "float32") == 2
    error = capsys.readouterr().err
    assert re.search(r"labels.jsonl line 3: \d+ tokens.*256 positions", error)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data", "nowhere"], "nowhere holds no .jsonl file"),
        (["--data", "mine/0.png"], "0.png: 'utf-8' codec can't decode"),
        (["--output", "mine"], "mine exists already"),
        (["--model_path", "nowhere"], "no folder nowhere"),
        (["--train", "voice.*"], "no parameter is named like 'voice.*'"),
        (["--train", "*norm*", "--lora_rank", "2"], "LoRA works on linear layers"),
        (["--validation_fraction", "0.99"], "too few"),
        (["--validation_fraction", "1.5"], "too few"),
        (["--validation_fraction", "-1"], "validation_fraction must be at least 0"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--batch_size", "0"], "batch_size must be at least 1"),
        (["--lora_rank", "-1"], "lora_rank must be at least 0"),
        (["--save_adapter"], "save_adapter needs adapters"),
        (["--stop_after", "0"], "stop_after=0"),
        (["--dtype", "int8"], "int8"),
        (["--gradient_checkpointing", "maybe"], "--gradient_checkpointing"),
        (["--learning", "1"], "--learning"),
        (["--epochs", "many"], "--epochs"),
    ],
)
def test_a_bad_option_is_one_line(words, message, checkpoints, folder, capsys):
    assert run(checkpoints / "float32", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not Path("new").exists() and not Path("new.unfinished").exists()


def test_no_labels_and_two_are_errors_that_name_them(checkpoints, folder, capsys):
    (folder / "more.jsonl").write_text("")
    assert run(checkpoints / "float32") == 2
    assert "mine holds labels.jsonl, more.jsonl" in capsys.readouterr().err
    for path in folder.glob("*.jsonl"):
        path.unlink()
    assert run(checkpoints / "float32") == 2
    assert "mine holds no .jsonl file" in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run_with_one_line(
    checkpoints, folder, capsys
):
    assert run(checkpoints / "float32", "--learning_rate", "1e30") == 2
    error = capsys.readouterr().err
    assert "NaN or inf" in error.splitlines()[-1]
    assert not Path("new").exists()


@pytest.mark.parametrize("missing", ["data", "output"])
def test_data_and_output_must_be_given(missing, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [w for w in ("data", "output") if w != missing]
    assert main([word for name in words for word in (f"--{name}", "x")]) == 2
    assert missing in capsys.readouterr().err
