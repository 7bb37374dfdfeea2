"""Pretraining: initial values, patch targets, data, objective, command, ablations."""

import json
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from reference import ROOT, run_in_two_processes
from torch.nn import functional as F

from vlm import pretraining, scene_dataset
from vlm.auxiliary import BACKGROUND_WEIGHT, AuxiliaryHeads
from vlm.backgrounds import TRAINING_PHOTO_FRACTION
from vlm.config import PaliGemmaConfig
from vlm.hub import EMBEDDED
from vlm.initialization import (
    embedded_config,
    fourier_locs,
    initialize,
    make_tokenizer,
    new_model,
)
from vlm.mask_tokens import MaskDecoder, MaskVQVAE, mask_iou
from vlm.paligemma import PaliGemmaForConditionalGeneration
from vlm.pretraining import (
    BOX_WEIGHT,
    PretrainingConfig,
    PretrainingObjective,
    main,
    run,
    soft_targets,
    validation_losses,
)
from vlm.processing import PaliGemmaProcessor
from vlm.questions import EMPTY_CAPTION, sample_question
from vlm.runs import run_folder
from vlm.scene_dataset import (
    TASKS,
    SceneDataset,
    collate,
    patch_targets,
)
from vlm.scenes import (
    TRAINING_SEEDS,
    TRAINING_STYLES,
    VALIDATION_SEEDS,
    all_classes,
    make_scene,
)
from vlm.training import SuffixLoss
from vlm.weights import load_hf_model

CONFIG = PretrainingConfig(steps=4, batch_size=2, num_workers=0, evaluation_scenes=0)
# Muon raises a gradient's small singular values, and with them what rounding made.
ADAMW = replace(CONFIG, optimizer="adamw")
LOSSES = {"validation_loss": 1.5, "validation_loss_segs": 0.5}
LOSSES |= {"validation_loss_words": 1.6, "validation_loss_locs": 1.7}
LOSSES |= {"validation_mask_iou": 0.5}


@pytest.fixture(scope="module")
def world_tokenizer():
    return make_tokenizer(num_scenes=50)


@pytest.fixture(scope="module")
def vqvae():
    torch.manual_seed(1)
    return MaskVQVAE().eval()


@pytest.fixture(scope="module")
def processor(world_tokenizer):
    return PaliGemmaProcessor(world_tokenizer, num_image_tokens=16, image_size=64)


def small_model(tokenizer, seed=0, **_):
    """The embedded model's shape, thinner, for pictures of 64 px."""
    torch.manual_seed(seed)
    config = embedded_config(tokenizer).to_dict()
    config["vision_config"] |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "num_image_tokens": 16,
    }
    config["text_config"] |= {"num_hidden_layers": 1, "intermediate_size": 64}
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_dict(config))
    initialize(model, tokenizer.convert_tokens_to_ids("<loc0000>"))
    return model


def make_objective(processor, vqvae, config=CONFIG):
    first_seg = processor.tokenizer.convert_tokens_to_ids("<seg000>")
    model = small_model(processor.tokenizer)
    return PretrainingObjective(model, vqvae.decoder.codebook, first_seg, config)


# Initial values


def test_neighboring_locs_are_alike_and_far_ones_are_not():
    locs = fourier_locs(128)
    torch.testing.assert_close(locs.norm(dim=1), torch.ones(1024))
    likeness = locs @ locs.T
    assert likeness[500, 501] > 0.99 > likeness[500, 540] > likeness[500, 640] > 0.3
    assert likeness[0, 1023] < 0.3


def test_initial_values_are_those_that_were_asked_for(world_tokenizer):
    first = world_tokenizer.convert_tokens_to_ids("<loc0000>")

    def parts(**options):
        model, _ = new_model(3, world_tokenizer, **options)
        tower = model.vision_tower.vision_model
        positions = tower.embeddings.position_embedding.weight
        embedding = model.language_model.model.embed_tokens.weight
        return embedding.detach(), positions.detach()

    embedding, positions = parts()
    assert embedding.norm(dim=1).mean() == pytest.approx(1, abs=0.02)
    locs = embedding[first : first + 1024]
    assert (locs[:-1] * locs[1:]).sum(dim=1).min() > 0.9
    assert positions.norm(dim=1).mean() == pytest.approx(1, abs=0.1)
    embedding, _ = parts(loc_init="random")
    locs = embedding[first : first + 1024]
    assert (locs[:-1] * locs[1:]).sum(dim=1).mean().abs() < 0.02
    torch.testing.assert_close(parts()[0], parts()[0])


@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_shape_is_paligemmas_and_fits(world_tokenizer, num_key_value_heads):
    model, _ = new_model(0, world_tokenizer, num_key_value_heads)
    text = model.config.text_config
    assert text.num_key_value_heads == num_key_value_heads
    assert text.head_dim == 64 != text.hidden_size // text.num_attention_heads
    if num_key_value_heads == 1:
        assert 4 * sum(p.numel() for p in model.parameters()) < 15 * 10**6


# Patch targets and auxiliary heads


def test_patch_targets_against_counting_pixels():
    scene = make_scene(5, image_size=64)
    targets = patch_targets(scene, 4)
    names = list(all_classes())
    shown = 0
    for place in range(16):
        row, column = divmod(place, 4)
        patch = scene.owner[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        counts = [int((patch == i).sum()) for i in range(len(scene.objects))]
        best = counts.index(max(counts))
        label, box = (targets[name][place] for name in targets)
        if counts[best] <= 0.2 * 256:
            assert label == 0 and not box.any()
            continue
        shown += 1
        assert names[label - 1] == scene.objects[best].label
        center = torch.tensor([column + 0.5, row + 0.5] * 2) / 4
        wanted = torch.tensor(scene.objects[best].box) / 64 - center
        torch.testing.assert_close(box, wanted, atol=1e-6, rtol=0)
    assert 0 < shown < 16


def test_a_scene_without_stickers_is_all_background():
    targets = patch_targets(make_scene(5, 64, empty_prob=1.0), 4)
    assert not any(target.any() for target in targets.values())


def test_auxiliary_losses_are_pytorchs_means(processor):
    model = small_model(processor.tokenizer)
    heads = AuxiliaryHeads(model.config)
    features = torch.randn(2, 16, 128)
    items = [patch_targets(make_scene(seed, 64), 4) for seed in (5, 6)]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    classes, boxes = batch.values()
    losses = heads(features, batch) / heads.counts(classes)
    weight = torch.ones(101)
    weight[0] = BACKGROUND_WEIGHT
    logits = heads.class_head(features).flatten(0, 1)
    shown = classes > 0
    wanted = torch.stack(
        [
            F.cross_entropy(logits, classes.flatten(), weight=weight),
            F.l1_loss(heads.box_head(features)[shown], boxes[shown]),
        ]
    )
    torch.testing.assert_close(losses, wanted)


# Data


def test_an_item_depends_on_its_index_alone(processor, vqvae):
    dataset = SceneDataset(processor, vqvae)
    first = dataset[7]
    dataset[8]
    again = SceneDataset(processor, vqvae)[7]
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pixel_values"], dataset[8]["pixel_values"])


def test_only_training_seeds_styles_and_photographs(processor, vqvae, monkeypatch):
    drawn = []

    def spy(seed, image_size, styles, **options):
        drawn.append((seed, styles, options))
        return make_scene(seed, image_size, styles, **options)

    monkeypatch.setattr(scene_dataset, "make_scene", spy)
    dataset = SceneDataset(processor, vqvae)
    assert len(dataset) == len(TRAINING_SEEDS)
    for index in (0, 1, len(dataset) - 1):
        dataset[index]
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    for seed, styles, options in drawn:
        assert seed in TRAINING_SEEDS and seed not in VALIDATION_SEEDS
        assert tuple(styles) == TRAINING_STYLES
        assert options["photo_fraction"] == TRAINING_PHOTO_FRACTION
        assert 0 < options["empty_prob"] < 0.1 and options["augment_prob"] > 0


def texts(row, processor):
    """What each question of a packed row says: (prompt, answer)."""
    segments, types = row["segment_ids"], row["token_type_ids"]
    for number in range(1, int(segments.max()) + 1):
        yield [
            processor.tokenizer.decode(
                row["input_ids"][(segments == number) & (types == kind)]
            )
            for kind in (0, 1)
        ]


def test_a_scene_without_stickers_asks_and_says_so(processor, vqvae, monkeypatch):
    monkeypatch.setattr(scene_dataset, "EMPTY_PROB", 1.0)
    answers = dict(texts(SceneDataset(processor, vqvae)[3], processor))
    assert EMPTY_CAPTION in answers["<bos>caption en\n"]
    asked = [answer for prompt, answer in answers.items() if "detect" in prompt]
    assert asked == ["<eos>"]


def test_every_task_is_asked_once_and_any_can_be_first(processor, vqvae):
    dataset, first = SceneDataset(processor, vqvae), Counter()
    for index in range(120):
        prompts = [prompt for prompt, _ in texts(dataset[index], processor)]
        words = [prompt.removeprefix("<bos>").split()[0] for prompt in prompts]
        assert sorted(words) == ["answer"] * 3 + ["caption", "detect", "segment"]
        first[words[0]] += 1
    assert min(first[word] for word in ("caption", "detect", "segment")) >= 8
    assert len(list(texts(SceneDataset(processor, vqvae, 2)[0], processor))) == 2


def test_the_order_of_questions_doesnt_tell_the_number_of_stickers(
    world_tokenizer, vqvae
):
    processor = PaliGemmaProcessor(world_tokenizer, 16, image_size=32)
    dataset = SceneDataset(processor, vqvae)
    counts = {"caption": [], "other": []}
    for index in range(150):
        prompt = next(texts(dataset[index], processor))[0]
        num_objects = len(make_scene(index, 32, TRAINING_STYLES).objects)
        counts["caption" if "caption" in prompt else "other"].append(num_objects)
    means = [sum(numbers) / len(numbers) for numbers in counts.values()]
    assert abs(means[0] - means[1]) < 0.9  # with one generator for both: 2.7


def test_rows_fit_the_positions(processor, vqvae):
    dataset = SceneDataset(processor, vqvae)
    longest = max(len(dataset[index]["input_ids"]) for index in range(60))
    # 64 image tokens instead of 16; six objects of the longest name in each answer.
    assert (
        longest + 48 + 100
        < embedded_config(processor.tokenizer).text_config.max_position_embeddings
    )


def test_masks_encoded_together_are_as_one_by_one():
    vqvae = MaskVQVAE.from_pretrained(EMBEDDED)
    masks = [o.cropped_mask for o in make_scene(12, styles=TRAINING_STYLES).objects]
    codes = vqvae.encode_masks(masks)
    assert codes == [vqvae.encode_masks([mask])[0] for mask in masks]
    assert len({*map(tuple, codes)}) == len(masks) > 1


def test_rows_are_padded_on_the_right(processor, vqvae):
    dataset = SceneDataset(processor, vqvae)
    batch = collate([dataset[2], dataset[3]])
    lengths = [len(dataset[index]["input_ids"]) for index in (2, 3)]
    assert batch["input_ids"].shape == (2, max(lengths))
    padded = batch["segment_ids"] == -1
    assert padded.sum() == max(lengths) - min(lengths)
    assert not batch["token_type_ids"][padded].any()


# The objective


def test_soft_targets_by_hand():
    codebook = MaskDecoder.from_pretrained(EMBEDDED).codebook
    targets = soft_targets(codebook)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(128))
    assert torch.equal(targets.argmax(dim=1), torch.arange(128))
    vectors = codebook._embedding.double()
    squares = ((vectors[:, None] - vectors) ** 2).sum(-1)
    unit = (squares + 1e9 * torch.eye(128)).min(dim=1).values.median()
    likeness = torch.exp(-squares[5] / unit)
    wanted = (likeness / likeness.sum()).float()
    torch.testing.assert_close(targets[5], wanted, atol=1e-4, rtol=1e-3)


def test_hard_unweighted_and_alone_it_is_the_models_own_loss(processor, vqvae):
    config = replace(CONFIG, seg_targets="hard", seg_weight=1.0, questions_per_image=1)
    objective = make_objective(processor, vqvae, config)
    dataset = SceneDataset(processor, vqvae, num_questions=1)
    batch = collate([dataset[index] for index in range(6)])
    ids, types = batch["input_ids"], batch["token_type_ids"]
    plain = {
        "input_ids": ids,
        "pixel_values": batch["pixel_values"],
        "attention_mask": (batch["segment_ids"] >= 0).long(),
        "token_type_ids": types,
        "labels": ids.masked_fill(types == 0, -100),
    }
    own = SuffixLoss(objective.model)
    with torch.no_grad():
        ours, theirs = objective(batch)[:1], own(plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    assert torch.equal(objective.counts(batch)[:1], own.counts(plain))


def test_seg_tokens_have_their_weight_and_soft_targets(processor, vqvae):
    objective = make_objective(processor, vqvae)
    hard = make_objective(processor, vqvae, replace(CONFIG, seg_targets="hard"))
    first = objective.first_seg
    batch = {
        "input_ids": torch.tensor([[9, 9, 5, first + 3, first + 4, 7]]),
        "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]]),
        "patch_classes": torch.zeros(1, 16, dtype=torch.long),
    }
    assert objective.counts(batch)[0] == 0.5 + 0.5 + 1
    logits = torch.randn(1, 4, objective.model.config.text_config.vocab_size)
    log_probs = logits[0].log_softmax(dim=-1)
    codes = log_probs[:, first : first + 128]
    last = -log_probs[2, 7]
    wanted = last - 0.5 * (codes[0, 3] + codes[1, 4])
    torch.testing.assert_close(hard.text_loss(logits, batch), wanted)
    targets = soft_targets(vqvae.decoder.codebook)
    wanted = last - 0.5 * (targets[3] @ codes[0] + targets[4] @ codes[1])
    torch.testing.assert_close(objective.text_loss(logits, batch), wanted)


def test_every_parameter_has_a_gradient(processor, vqvae):
    objective = make_objective(processor, vqvae)
    dataset = SceneDataset(processor, vqvae)
    objective(collate([dataset[0], dataset[1]])).sum().backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_muon_has_the_hidden_matrices_and_no_others(processor, vqvae):
    one = make_objective(processor, vqvae)
    names = {id(p): name for name, p in one.named_parameters()}
    by_muon = {names[id(p)] for p in one.matrices}
    for name, parameter in one.named_parameters():
        inside = ".layers." in name or "multi_modal_projector" in name
        assert (name in by_muon) == (inside and parameter.ndim == 2), name
    plain = replace(CONFIG, optimizer="adamw")
    assert make_objective(processor, vqvae, plain).matrices == ()


def test_weights_of_the_losses(processor, vqvae):
    weights = make_objective(processor, vqvae).weights
    assert weights == pytest.approx((1, 0.3, 0.3 * BOX_WEIGHT))
    nothing = replace(CONFIG, auxiliary_weight=0.0)
    assert make_objective(processor, vqvae, nothing).weights == (1, 0, 0)


def test_validation_losses_are_means_over_tokens(processor, vqvae):
    model = small_model(processor.tokenizer).eval()
    one, two = (validation_losses(model, processor, vqvae, n) for n in (1, 2))
    assert 4 < one["validation_loss"] < 10 and one != two
    # The objective's own sums, from the same questions.
    objective, seed = SuffixLoss(model), VALIDATION_SEEDS[0]
    scene, rng = (
        make_scene(seed, processor.image_size),
        random.Random(f"questions {seed}"),
    )
    asked = [sample_question(scene, task, rng, vqvae.encode_masks) for task in TASKS]
    prompts, answers = zip(*[(q.prompt, q.answer) for q in asked])
    batch = processor(prompts, [scene.image], answers)
    with torch.no_grad():
        loss = (objective(batch) / objective.counts(batch)).item()
    assert one["validation_loss"] == pytest.approx(loss, rel=1e-5)
    text = " ".join(answers)
    counts = [text.count("<loc"), text.count("<seg")]
    counts.append(int(objective.counts(batch)) - sum(counts))
    parts = [one[f"validation_loss_{part}"] for part in ("locs", "segs", "words")]
    mean = sum(n * part for n, part in zip(counts, parts)) / sum(counts)
    assert min(counts) > 0 and mean == pytest.approx(loss, rel=1e-5)


def test_validation_masks_are_drawn_from_the_best_codes(processor, monkeypatch):
    """The right codes' logits raised: perfect masks; one code's: what it draws."""
    vqvae, model = MaskVQVAE.from_pretrained(EMBEDDED), small_model(processor.tokenizer)
    first = processor.tokenizer.convert_tokens_to_ids("<seg000>")
    forward, asked = model.forward, []

    def ask(scene, task, rng, encode_masks):
        question = sample_question(scene, task, rng, encode_masks)
        asked.extend(map(int, re.findall(r"<seg(\d+)>", question.answer)))
        return question

    def raised(input_ids, codes=None, **inputs):
        outputs = forward(input_ids=input_ids, **inputs)
        right = input_ids.roll(-1, 1)  # the next token of each
        is_seg = (right >= first) & (right < first + 128)
        best = right if codes is None else first + codes
        vocab_size = outputs["logits"].shape[-1]
        bonus = F.one_hot(best.where(is_seg, 0), vocab_size)
        return {"logits": outputs["logits"] + 100 * bonus}

    monkeypatch.setattr(pretraining, "sample_question", ask)
    monkeypatch.setattr(model, "forward", raised)
    assert validation_losses(model, processor, vqvae, 2)["validation_mask_iou"] == 1
    right = torch.tensor(asked).view(-1, 16)
    same = partial(raised, codes=torch.tensor(5))
    monkeypatch.setattr(model, "forward", same)
    iou = validation_losses(model, processor, vqvae, 2)["validation_mask_iou"]
    with torch.no_grad():
        drawn = vqvae.decoder(torch.full_like(right, 5))[:, 0] > 0
        wanted = vqvae.decoder(right)[:, 0] > 0
    assert iou == pytest.approx(mask_iou(drawn, wanted).mean().item()) and iou < 1


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"seg_targets": "mild"}, "seg_targets"),
        ({"loc_init": "zero"}, "loc_init"),
        ({"questions_per_image": 7}, "questions_per_image"),
        ({"questions_per_image": 0}, "questions_per_image"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"seg_weight": -1.0}, "seg_weight"),
    ],
)
def test_settings_that_cant_be(settings, word):
    with pytest.raises(ValueError, match=word):
        PretrainingConfig(**settings)


# The command

SHORT = "--steps 4 --batch_size 2 --num_workers 0 --save_every 1"
SHORT += " --evaluation_scenes 2"


@pytest.fixture
def small(world_tokenizer, monkeypatch):
    """The command makes the small model."""

    def make(seed, **_):
        return small_model(world_tokenizer, seed), world_tokenizer

    monkeypatch.setattr(pretraining, "new_model", make)
    monkeypatch.setattr(pretraining, "validation_losses", lambda *_: LOSSES)


@pytest.fixture
def evaluated(monkeypatch):
    """How many scenes the command evaluates; the numbers are made up."""
    scenes = []

    def evaluate(model, tokenizer, decoder, num_scenes):
        scenes.append(num_scenes)
        return {"styles trained on": {"scenes": num_scenes, "caption: class F1": 0.5}}

    monkeypatch.setattr("vlm.evaluation.evaluate", evaluate)
    return scenes


def weights_of(folder):
    return load_hf_model(folder, "cpu")[0].state_dict()


def test_one_command_makes_everything(small, evaluated, tmp_path, capsys):
    output = tmp_path / "stickers"
    assert main(["--output", str(output), *SHORT.split()]) == 0
    assert str(output) in capsys.readouterr().out
    assert {path.name for path in output.iterdir()} == {
        "README.md",
        "config.json",
        "evaluation.json",
        "generation_config.json",
        "log.jsonl",
        "mask_decoder.safetensors",
        "mask_encoder.safetensors",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not run_folder(output).exists()
    assert evaluated == [2]
    card = (output / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n")
    command = card.partition("--output runs/stickers ")[2].partition("\n")[0]
    assert "--steps 4 " in command
    assert "seg_weight" not in command  # it has its default
    assert "| caption: class F1 | 0.500 |" in card
    lines = (output / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    assert [e["text"] > 0 for e in log if "text" in e] == [True] * 4
    assert log[-1] == {"step": 4, **LOSSES}
    theirs = MaskDecoder.from_pretrained(EMBEDDED).state_dict()
    for name, tensor in MaskDecoder.from_pretrained(output).state_dict().items():
        assert torch.equal(tensor, theirs[name])


def test_stopped_and_resumed_it_makes_the_same(small, evaluated, tmp_path):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    command = ["--output", str(parts), *SHORT.split()]
    assert main(["--output", str(straight), *SHORT.split()]) == 0
    assert main([*command, "--stop_after", "1"]) == 0
    assert not parts.exists()
    resume = ["--output", str(parts), "--resume"]
    assert main([*resume, "--stop_after", "3"]) == 0
    assert main([*resume, "--evaluation_scenes", "0"]) == 0
    ours, theirs = weights_of(straight), weights_of(parts)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert evaluated == [2]


def test_an_evaluation_that_failed_is_repeated_without_training(small, tmp_path):
    def fail(folder, num_scenes):
        raise OSError("no space left")

    config = replace(CONFIG, evaluation_scenes=3)
    with pytest.raises(OSError, match="space"):
        run(config, tmp_path / "one", evaluate=fail)
    assert not (tmp_path / "one").exists()
    seen = []
    run(config, tmp_path / "one", True, evaluate=lambda *given: seen.append(given))
    assert [scenes for _, scenes in seen] == [3]
    assert (tmp_path / "one" / "model.safetensors").is_file()


def test_other_mask_tokens_are_refused_by_a_run_that_began_without(
    small, vqvae, tmp_path, capsys
):
    run(CONFIG, tmp_path / "one", stop_after=1)
    vqvae.save_pretrained(tmp_path / "masks")
    command = ["--output", str(tmp_path / "one"), "--resume", "--mask_tokens"]
    assert main([*command, str(tmp_path / "masks")]) == 2
    assert "codebook" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--mask_tokens", "nowhere"], "nowhere"),
        (["--seg_targets", "mild"], "seg_targets"),
        (["--resume"], "no saved run"),
    ],
)
def test_errors_are_one_line(small, tmp_path, capsys, flags, word):
    assert main(["--output", str(tmp_path / "one"), *SHORT.split(), *flags]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1
    assert not (tmp_path / "one").exists()


PAIR = """
import sys
import torch
sys.path[:0] = {paths!r}
from vlm import pretraining
from test_pretraining import ADAMW, CONFIG, LOSSES, replace, small_model
from vlm.initialization import make_tokenizer
from pathlib import Path

torch.set_num_threads(1)
tokenizer = make_tokenizer(num_scenes=50)
pretraining.new_model = lambda seed, **_: (small_model(tokenizer, seed), tokenizer)
pretraining.validation_losses = lambda *_: LOSSES
for name, config in (("adamw", ADAMW), ("muon", CONFIG)):
    config = replace(config, batch_size=4, micro_batch_size=1)
    pretraining.run(config, Path(sys.argv[1], name))
print(f"one of {{torch.distributed.get_world_size()}} processes")  # in one write
"""


def test_two_processes_make_what_one_makes(small, tmp_path):
    script = tmp_path / "pair.py"
    script.write_text(PAIR.format(paths=[str(ROOT), str(ROOT / "tests")]))
    done = run_in_two_processes(script, str(tmp_path / "two"))
    assert done.stdout.count("one of 2 processes") == 2, done.stdout
    for name, config, within in (("adamw", ADAMW, 1e-4), ("muon", CONFIG, 1e-2)):
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        run(replace(config, batch_size=4), one)
        logs = [(folder / "log.jsonl").read_text() for folder in (one, two)]
        for line, other in zip(*map(str.splitlines, logs), strict=True):
            assert json.loads(line) == pytest.approx(json.loads(other), rel=within)
    ours, theirs = (weights_of(tmp_path / name / "adamw") for name in ("one", "two"))
    for name, tensor in ours.items():
        # AdamW divides by a gradient's own size: where that is tiny, so is what two
        # orders of summation agree on.
        torch.testing.assert_close(tensor, theirs[name], atol=1e-3, rtol=0)


# Ablations


def test_ablations_are_made_row_by_row(small, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import ablate

    calls = []

    def call(command, check):
        assert command[1:3] == ["-m", "vlm.pretraining"] and check
        calls.append(command[3:])
        assert main(command[3:]) == 0

    monkeypatch.setattr(ablate.subprocess, "run", call)
    table, more = tmp_path / "table.json", "--steps 2 --batch_size 2 --num_workers 0"
    where = ["--runs", str(tmp_path), "--table", str(table)]
    command = ["ablate.py", *where, "--only", "random loc", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--", *more.split()])
    gone = {"row": "a row that is no longer made", "seed": 0}
    table.write_text(json.dumps([gone]))
    begun = f"--evaluation_scenes 0 --seed 1 {more} --loc_init random --stop_after 1"
    folder = tmp_path / f"{list(ablate.ROWS).index('random loc embeddings')}-1"
    assert main(["--output", str(folder), *begun.split()]) == 0
    ablate.main()
    entries = json.loads(table.read_text())
    assert [(e["row"], e["seed"]) for e in entries] == [
        ("random loc embeddings", 0),
        ("random loc embeddings", 1),
        ("a row that is no longer made", 0),
    ]
    for entry in entries[:2]:
        assert "--loc_init=random" in entry["command"]
        assert entry["all tokens"] == 1.5 and entry["seg tokens"] == 0.5
    assert ["--resume" in call for call in calls] == [False, True]
    ablate.main()  # nothing is left to do
    assert json.loads(table.read_text()) == entries and len(calls) == 2
    capsys.readouterr()


def test_every_ablation_is_a_recipe_that_can_be():
    sys.path.insert(0, str(ROOT / "tools"))
    import ablate

    sys.path.pop(0)
    names = {option.name: option.type for option in pretraining.fields(CONFIG)}
    seen = set()
    for changed in ablate.ROWS.values():
        values = ablate.SHORT | changed
        config = PretrainingConfig(**{n: names[n](v) for n, v in values.items()})
        assert config.steps * config.batch_size == 9600  # pictures, in every row
        assert str(config) not in seen, changed
        seen.add(str(config))
