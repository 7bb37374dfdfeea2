"""Training: masks, packing, targets, schedule, resume, several processes, bad input."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.nn import functional as F

from vlm import inference
from vlm.mask_tokens import Codebook, MaskDecoder, MaskEncoder, MaskVQVAE
from vlm.paligemma import PaliGemmaForConditionalGeneration
from vlm.processing import PaliGemmaProcessor, loc_token, seg_token
from vlm.scenes import all_kinds, make_scene
from vlm.training import (
    LOSSES,
    Lesson,
    SceneDataset,
    Teacher,
    TrainingConfig,
    TrainingLog,
    code_likeness,
    collate,
    embedded_config,
    fourier_locs,
    initialize,
    label_weights,
    learning_rate_at,
    load_teacher,
    main,
    make_accelerator,
    make_tokenizer,
    mask_plans,
    overhear,
    pack_questions,
    packed_mask,
    patch_targets,
    saved_run,
    sincos_positions,
    token_losses,
    train,
    validate,
)
from vlm.weights import load_hf_model, save_hf_model

CONFIG = TrainingConfig(
    steps=4,
    patch_steps=2,
    batch_size=2,
    questions_per_picture=3,
    warmup_steps=1,
    log_every=1,
    save_every=3,
)


TWO = replace(CONFIG, batch_size=4, silent_pictures=3, questions="segment,segment")


def random_masks():
    """An untrained mask encoder and decoder, always the same."""
    torch.manual_seed(1)
    return MaskVQVAE(MaskEncoder(), MaskDecoder()).eval()


@pytest.fixture(scope="module")
def world_tokenizer():
    return make_tokenizer(num_scenes=50)


@pytest.fixture(scope="module")
def processor(world_tokenizer):
    return PaliGemmaProcessor(world_tokenizer, num_image_tokens=16, image_size=64)


def small_model(tokenizer, seed=0):
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
    from vlm.config import PaliGemmaConfig

    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_dict(config))
    initialize(model, tokenizer)
    return model


@pytest.fixture(scope="module")
def first_half(world_tokenizer, processor, tmp_path_factory):
    """A run with masks, stopped after three of its six steps."""
    folder = tmp_path_factory.mktemp("run") / "parts"
    model = small_model(world_tokenizer)
    train(model, processor, CONFIG, folder, stop_after=3, vqvae=random_masks())
    return folder


@pytest.fixture
def started(first_half, tmp_path):
    """A copy of that run, to go on with."""
    return shutil.copytree(first_half, tmp_path / "parts")


def resume(folder, processor, config, **others):
    """Go on with the run in `folder`, as it was begun but for `others`."""
    model = small_model(processor.tokenizer, seed=9)
    settings = dict(resume=True, vqvae=random_masks()) | others
    return train(model, processor, config, folder, **settings)


def test_patch_targets_against_counting_pixels():
    scene = make_scene(5, image_size=64)
    kinds, boxes, shapes, outlines = patch_targets(scene, patch_size=16)
    names = list(all_kinds())
    for place in range(16):
        row, column = divmod(place, 4)
        patch = scene.owner[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        counts = [(patch == i).sum() for i in range(len(scene.objects))]
        best = int(np.argmax(counts))
        if counts[best] < 0.2 * 256:
            assert kinds[place] == 0 and not boxes[place].any()
            assert not shapes[place].any() and not outlines[place].any()
        else:
            thing = scene.objects[best]
            center = np.array([column + 0.5, row + 0.5] * 2) / 4
            assert names[kinds[place] - 1] == thing.kind
            np.testing.assert_allclose(
                boxes[place] + center, np.array(thing.box) / 64, atol=1e-6
            )
            np.testing.assert_array_equal(shapes[place].reshape(16, 16), patch == best)
            crop = Image.fromarray(thing.cropped_mask.astype(np.uint8) * 255)
            large = crop.resize((64, 64), Image.Resampling.BILINEAR)
            cells = np.asarray(large).reshape(16, 4, 16, 4).mean(axis=(1, 3)) / 255
            np.testing.assert_allclose(outlines[place], cells.flatten(), atol=1e-6)


def test_teacher_loss_is_pytorchs_weighted_mean(world_tokenizer):
    config = small_model(world_tokenizer).config
    teacher = Teacher(config)
    features = torch.randn(2, 16, 32)
    kinds = torch.randint(0, 3, (2, 16))
    boxes = torch.randn(2, 16, 4)
    shapes, outlines = torch.rand(2, 16, 256) < 0.5, torch.rand(2, 16, 256)
    states, plans = torch.randn(5, config.text_config.hidden_size), torch.rand(5, 256)
    totals, counts = teacher(features, kinds, boxes, shapes, outlines, states, plans)
    logits = teacher.kind_head(features).flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(
        logits, kinds.flatten(), teacher.kind_weight
    )
    torch.testing.assert_close(totals[0] / counts[0], wanted)
    shown = kinds > 0
    distance = (teacher.box_head(features) - boxes).abs().mean(-1)[shown].mean()
    torch.testing.assert_close(totals[1] / counts[1], 5 * distance)
    drawings = (
        (2, 1, teacher.shape_head(features)[shown], shapes[shown].float()),
        (3, 2, teacher.outline_head(features)[shown], outlines[shown]),
        (4, 2, teacher.plan_head(states), plans),
    )
    for place, factor, logits, drawing in drawings:
        wanted = factor * F.binary_cross_entropy_with_logits(logits, drawing)
        torch.testing.assert_close(totals[place] / counts[place], wanted)


def test_neighboring_locs_are_alike_and_far_ones_are_not():
    locs = fourier_locs(128)
    torch.testing.assert_close(locs.norm(dim=1), torch.ones(1024))
    alike = locs @ locs.T
    assert alike.diagonal(1).min() > 0.95
    assert alike[0, 512] < 0.6
    assert torch.unique(locs, dim=0).shape[0] == 1024


def test_sincos_positions_are_all_different():
    table = sincos_positions(8, 160)
    assert table.shape == (64, 160)
    apart = torch.cdist(table, table) + 9 * torch.eye(64)
    assert apart.min() > 0.1


def test_packed_rows_put_every_question_right_behind_the_image():
    row = pack_questions([([7, 7, 2, 5], [6, 1]), ([7, 7, 2, 8], [1])], 2)
    assert row["input_ids"].tolist() == [7, 7, 2, 5, 6, 1, 2, 8, 1]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4]
    assert row["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 1]
    assert row["question_ids"].tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_packed_mask_rules():
    questions = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, -1]])
    types = torch.tensor([[0, 0, 0, 1, 1, 0, 1, 1, 0]])
    mask = packed_mask(questions, types)[0, 0]
    for q in range(9):
        for k in range(9):
            who, whom = questions[0, q].item(), questions[0, k].item()
            if who == whom == 0 or (whom == 0 and who > 0):
                wanted = True  # everyone sees the image
            elif who == 0:
                wanted = whom == 1 and types[0, k] == 0  # it sees the first prompt
            elif who == whom:
                wanted = k <= q or types[0, k] == 0 or who == -1
            else:
                wanted = False
            assert mask[q, k].item() == bool(wanted), (q, k)


def test_questions_dont_touch_each_other(world_tokenizer, processor):
    """The second question's logits stay when the third changes, and the reverse."""
    model = small_model(world_tokenizer).eval()
    pixels = torch.randn(1, 3, 64, 64)

    def logits(third):
        prompts = ("caption en", "detect owl", third)
        packed = collate(
            [
                pack_questions(
                    [
                        (processor.encode_prefix(p), processor.encode_suffix("yes"))
                        for p in prompts
                    ],
                    16,
                )
                | {
                    "pixel_values": pixels[0],
                    "patch_kinds": torch.zeros(16, dtype=torch.long),
                    "patch_boxes": torch.zeros(16, 4),
                    "patch_shapes": torch.zeros(16, 256, dtype=torch.bool),
                    "patch_outlines": torch.zeros(16, 256),
                    "label_weights": torch.zeros(0),  # of no matter here
                }
            ]
        )
        with torch.no_grad():
            out = model(
                packed["input_ids"],
                pixels,
                packed_mask(packed["question_ids"], packed["token_type_ids"]),
                position_ids=packed["position_ids"],
            )["logits"]
        return out[packed["question_ids"] == 2]

    first = logits("answer en is there an owl?")
    torch.testing.assert_close(first, logits("detect pizza"), atol=1e-5, rtol=0)


def test_first_question_is_what_it_is_alone(world_tokenizer, processor):
    """Its logits are, and those of the image; with a mask that leaks they aren't."""
    model = small_model(world_tokenizer).eval()
    dataset = SceneDataset(processor, 16, replace(CONFIG, patch_steps=0))

    def image_sees_all_prompts(question_ids, token_type_ids):
        prompts = ((question_ids >= 0) & (token_type_ids == 0))[:, None, None]
        image = (question_ids == 0)[:, None, :, None]
        return packed_mask(question_ids, token_type_ids) | (image & prompts)

    for item in (dataset[0], dataset[1]):
        batch = collate([item])
        first = item["question_ids"] <= 1
        row = {n: item[n][first][None] for n in ("input_ids", "token_type_ids")}
        with torch.no_grad():
            alone = model(**row, pixel_values=batch["pixel_values"])["logits"]
            packed, leaky = (
                model(
                    batch["input_ids"],
                    batch["pixel_values"],
                    mask(batch["question_ids"], batch["token_type_ids"]),
                    position_ids=batch["position_ids"],
                )["logits"][:, first]
                for mask in (packed_mask, image_sees_all_prompts)
            )
        torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
        assert (leaky - alone).abs().max() > 1e-2


def test_items_depend_on_seed_and_index_alone(processor):
    one, two = (SceneDataset(processor, 16, CONFIG) for _ in range(2))
    other = SceneDataset(processor, 16, replace(CONFIG, seed=1))
    assert "input_ids" not in one[0] and "input_ids" in one[4]
    for name, tensor in one[5].items():
        assert torch.equal(tensor, two[5][name])
    assert not torch.equal(one[5]["pixel_values"], other[5]["pixel_values"])


def test_with_a_mask_encoder_segment_is_among_the_questions(processor):
    config = replace(CONFIG, patch_steps=0, questions_per_picture=6)
    plain = SceneDataset(processor, 16, config)
    masks = SceneDataset(processor, 16, config, encode_mask=lambda mask: [7] * 16)
    seg = processor.tokenizer.convert_tokens_to_ids("<seg007>")
    drawn = [int((masks[i]["input_ids"] == seg).sum()) for i in range(8)]
    assert sum(drawn) >= 6 * 16 and all(count % 16 == 0 for count in drawn)
    assert not any((plain[i]["input_ids"] == seg).any() for i in range(8))
    # The same scene either way: only what is asked about it differs.
    for i in range(8):
        assert torch.equal(plain[i]["pixel_values"], masks[i]["pixel_values"])


def test_questions_and_styles_are_those_of_the_settings(processor, monkeypatch):
    styles = []
    real = make_scene
    monkeypatch.setattr(
        "vlm.training.make_scene",
        lambda *args, **kw: styles.append(kw["styles"]) or real(*args, **kw),
    )
    config = replace(
        CONFIG,
        patch_steps=0,
        styles="flat,noto,flat",
        questions="caption",
        more_questions="count",
    )
    row = SceneDataset(processor, 16, config)[0]
    assert styles == [["flat", "noto", "flat"]]
    prompts = [
        processor.tokenizer.decode(
            row["input_ids"][(row["question_ids"] == n) & (row["token_type_ids"] == 0)]
        )
        for n in (1, 2, 3)
    ]
    assert sum("caption en" in prompt for prompt in prompts) == 1
    assert sum("how many" in prompt for prompt in prompts) == 2


def test_rows_keep_to_their_limit(processor):
    config = replace(CONFIG, patch_steps=0, questions_per_picture=8)
    mask = dict(encode_mask=lambda mask: [7] * 16)
    free = SceneDataset(processor, 16, replace(config, max_row_tokens=9999), **mask)
    tight = SceneDataset(processor, 16, replace(config, max_row_tokens=120), **mask)
    longest = [max(len(d[i]["input_ids"]) for i in range(8)) for d in (free, tight)]
    assert longest[0] > 150 and longest[1] <= 120
    assert all(tight[i]["question_ids"].max() >= 1 for i in range(8))


def test_training_never_draws_a_held_out_seed(processor, monkeypatch):
    seen = []
    real = make_scene
    monkeypatch.setattr(
        "vlm.training.make_scene",
        lambda seed, *args, **kw: seen.append(seed) or real(seed, *args, **kw),
    )
    dataset = SceneDataset(processor, 16, CONFIG)
    for i in range(8):
        dataset[i]
    assert len(seen) == 8 and all(0 <= seed < 10**9 for seed in seen)


def test_learning_rate_rises_then_falls_twice():
    config = TrainingConfig(steps=100, patch_steps=50, warmup_steps=10)
    rates = [learning_rate_at(step, config) for step in range(150)]
    for start, end, peak in ((0, 50, 1.5e-3), (50, 150, 1e-3)):
        part = rates[start:end]
        assert part[9] == pytest.approx(peak)
        assert part[:10] == sorted(part[:10])
        assert part[10:] == sorted(part[10:], reverse=True)
        assert part[-1] == pytest.approx(config.final_share * peak, rel=0.15)


def test_lesson_returns_the_models_own_loss(world_tokenizer, processor):
    model = small_model(world_tokenizer)
    lesson = Lesson(model, Teacher(model.config))
    plain = replace(CONFIG, patch_steps=0, first_loc_weight=1.0, seg_weight=1.0)
    dataset = SceneDataset(processor, 16, plain)
    batch = collate([dataset[0], dataset[1]])
    totals, counts = lesson(batch)
    loss = model(
        batch["input_ids"],
        batch["pixel_values"],
        packed_mask(batch["question_ids"], batch["token_type_ids"]),
        position_ids=batch["position_ids"],
        token_type_ids=batch["token_type_ids"],
        labels=batch["input_ids"].masked_fill(batch["token_type_ids"] == 0, -100),
    )["loss"]
    torch.testing.assert_close(totals[0] / counts[0], loss, atol=1e-5, rtol=0)
    patches = {n: t for n, t in batch.items() if n[:5] in ("pixel", "patch")}
    totals, counts = lesson(patches)
    assert totals[0] == counts[0] == 0 and (counts[1:-1] > 0).all()
    assert totals[-1] == counts[-1] == 0  # no masks were asked for
    assert not model.vision_tower._forward_hooks  # nobody listens outside lessons


def test_masks_begin_where_no_code_stands_before():
    first, other = list(range(10, 26)), list(range(9, 137, 8))
    row = [3, *first, 2, *other, 4, 5]
    targets = torch.tensor([[7] * len(row), row])
    asked = []

    class Decoder(MaskDecoder):
        def forward(self, codes):
            asked.extend(codes.tolist())
            return torch.linspace(-1, 1, 64).expand(len(codes), 1, 64, 64)

    starts, plans = mask_plans(targets, 9, Decoder())
    assert starts.nonzero().tolist() == [[1, 1], [1, 18]]
    assert asked == [[n - 9 for n in first], [n - 9 for n in other]]
    half = torch.tensor([0.0] * 8 + [1.0] * 8).repeat(16)
    torch.testing.assert_close(plans, half.expand(2, 256))
    for none in (mask_plans(targets[:1], 9, Decoder()), mask_plans(targets, 9, None)):
        assert not none[0].any() and none[1].shape == (0, 256)


def test_plans_are_asked_of_the_state_that_writes_the_first_code(
    world_tokenizer, processor
):
    """The loss by hand, from the model's own states and the drawn masks."""
    torch.manual_seed(0)
    model = small_model(world_tokenizer)
    vqvae = random_masks()
    first_seg = world_tokenizer.convert_tokens_to_ids(seg_token(0))
    lesson = Lesson(model, Teacher(model.config), vqvae, first_seg)
    config = replace(CONFIG, patch_steps=0, questions="segment,segment,caption")
    dataset = SceneDataset(processor, 16, config, vqvae.encode_mask)
    batch = collate([dataset[i] for i in range(3)])
    with overhear(model.language_model.model) as heard:
        totals, counts = lesson(batch)
    ((states, _),) = heard
    expected = []
    for row, ids in enumerate(batch["input_ids"].tolist()):
        for place in range(1, len(ids)):
            seg, before = (
                first_seg <= i < first_seg + 128 for i in (ids[place], ids[place - 1])
            )
            if seg and not before:
                codes = torch.tensor(ids[place : place + 16]) - first_seg
                drawn = (vqvae.decoder(codes[None])[0, 0] > 0).float()
                cells = drawn.unflatten(1, (16, 4)).unflatten(0, (16, 4)).mean((1, 3))
                logits = lesson.teacher.plan_head(states[row, place - 1])
                expected.append(
                    2 * F.binary_cross_entropy_with_logits(logits, cells.flatten())
                )
    assert len(expected) == counts[-1] > 2
    torch.testing.assert_close(totals[-1], torch.stack(expected).sum())
    learned = {id(p) for p in lesson.parameters() if p.requires_grad}
    assert not learned & {id(p) for p in lesson.mask_decoder.parameters()}


def test_silent_pictures_teach_the_eyes_and_come_last(world_tokenizer, processor):
    silent = dict(silent_pictures=2, batch_size=3, patch_steps=0)
    config = replace(CONFIG, **silent)
    dataset = SceneDataset(processor, 16, config)
    items = [dataset[i] for i in range(6)]
    assert ["input_ids" in item for item in items] == [True, False, False] * 2
    batch = collate(items)
    order = [items[i]["pixel_values"] for i in (0, 3, 1, 2, 4, 5)]
    assert torch.equal(batch["pixel_values"], torch.stack(order))
    assert len(batch["input_ids"]) == 2
    model = small_model(world_tokenizer).eval()
    lesson = Lesson(model, Teacher(model.config))
    totals, counts = lesson(batch)
    asked, silent = lesson(collate(items[::3])), lesson(collate(items[1:3] + items[4:]))
    torch.testing.assert_close(totals, asked[0] + silent[0])
    torch.testing.assert_close(counts, asked[1] + silent[1])


def test_likeness_by_hand():
    """Codes in a row, one apart: shares fall like a bell curve on both sides."""
    codebook = Codebook()
    codebook._embedding.zero_()
    codebook._embedding[:, 3] = 7 * torch.arange(128.0)  # the unit doesn't matter
    likeness = code_likeness(codebook)
    steps = torch.arange(128.0)
    bells = (-((steps[:, None] - steps) ** 2)).exp()
    torch.testing.assert_close(likeness, bells / bells.sum(dim=1, keepdim=True))


def test_seg_tokens_share_their_lesson_and_others_dont():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 200, requires_grad=True)
    targets = torch.tensor([[3, 60, 59, 187, 188], [0, 61, 199, 100, 7]])
    likeness = torch.rand(128, 128).softmax(dim=1)
    shares = F.one_hot(targets, 200).float()
    for place in ((0, 1), (0, 3), (1, 1), (1, 3)):  # ids 60 to 187 are seg tokens
        shares[place] = 0
        shares[place][60:188] = likeness[targets[place] - 60]
    expected = F.cross_entropy(
        logits.flatten(0, 1), shares.flatten(0, 1), reduction="none"
    ).unflatten(0, (2, 5))
    losses = token_losses(logits, targets, likeness, first_seg=60)
    torch.testing.assert_close(losses, expected)
    gradients = [torch.autograd.grad(x.sum(), logits)[0] for x in (losses, expected)]
    torch.testing.assert_close(*gradients)
    plain = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(token_losses(logits, targets), plain)


def test_label_weights_by_hand(world_tokenizer, processor):
    """The first token of each box, the masks and the rest; prompts count nothing."""
    prefix = torch.tensor(processor.encode_prefix("segment owl ; <loc0001>"))
    box = "".join(loc_token(n) for n in (1, 1023, 0, 5))
    mask = "".join(seg_token(n) for n in (0, 127, 1, 1))
    suffix = torch.tensor(processor.encode_suffix(f"{box}{mask} owl ; {box} owl"))
    types = torch.cat([torch.zeros_like(prefix), torch.ones_like(suffix)])
    config = replace(
        CONFIG,
        first_loc_weight=5.0,
        loc_weight=2.0,
        seg_weight=0.5,
        first_seg_weight=6.0,
    )
    ids = torch.cat([prefix, suffix])
    weights = label_weights(ids, types, world_tokenizer, config)
    assert not weights[: len(prefix)].any()
    tokens = world_tokenizer.convert_ids_to_tokens(suffix)
    places = [i for i, token in enumerate(tokens) if token.startswith("<loc")]
    assert len(places) == 8
    expected = torch.ones(len(suffix))
    expected[places] = 2.0
    expected[[places[0], places[4]]] = 5.0
    expected[4:6] = 3.0
    expected[6:8] = 0.5
    torch.testing.assert_close(weights[len(prefix) :], expected)


def test_a_caption_weighs_what_the_settings_say(processor):
    """Every token of it and nothing else, wherever in the row it stands."""
    plain = replace(CONFIG, patch_steps=0, questions_per_picture=6)
    heavy = replace(plain, caption_weight=4.0)
    one, other = (SceneDataset(processor, 16, c) for c in (plain, heavy))
    caption = torch.tensor(processor.encode_prefix("caption en")[16:])
    places = set()
    for i in range(8):
        row, ratio = one[i], other[i]["label_weights"] / one[i]["label_weights"]
        for number in range(1, int(row["question_ids"].max()) + 1):
            here = row["question_ids"] == number
            answer = here & (row["token_type_ids"] == 1)
            prompt = row["input_ids"][here & ~answer]
            asked = torch.equal(prompt, caption)
            places |= {number} if asked else set()
            assert (ratio[answer] == (4.0 if asked else 1.0)).all()
    assert len(places) > 1


def test_weights_count_in_the_loss(world_tokenizer, processor):
    """Twice the weight on one token: as if the batch held that token twice."""
    model = small_model(world_tokenizer).eval()
    lesson = Lesson(model, Teacher(model.config))
    dataset = SceneDataset(processor, 16, replace(CONFIG, patch_steps=0))
    batch = collate([dataset[0]])
    (place,) = torch.nonzero(batch["label_weights"][0])[3]

    def text_total(weights):
        with torch.no_grad():
            totals, counts = lesson(batch | {"label_weights": weights})
        return totals[0], counts[0]

    ones = (batch["label_weights"] > 0).float()
    only = torch.zeros_like(ones)
    only[0, place] = 1.0
    (total, count), (one, _) = text_total(ones), text_total(only)
    doubled, more = text_total(ones + only)
    assert one > 0 and more == count + 1
    torch.testing.assert_close(doubled, total + one)


def test_resumed_run_equals_one_in_one_go(world_tokenizer, processor, tmp_path):
    whole, parts = small_model(world_tokenizer), small_model(world_tokenizer)
    straight = train(whole, processor, CONFIG, tmp_path / "whole")
    train(parts, processor, CONFIG, tmp_path / "parts", stop_after=3)
    again = small_model(world_tokenizer, seed=9)
    resumed = train(again, processor, CONFIG, tmp_path / "parts", resume=True)
    assert straight == resumed and len(straight) == 6
    assert straight[0]["text"] == 0 and straight[-1]["text"] > 0
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    lines = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == straight


@pytest.mark.parametrize(
    "other",
    [
        dict(seed=99),
        dict(learning_rate=9.0),
        dict(steps=9),
        dict(mixed_precision="bf16"),
    ],
)
def test_a_run_goes_on_with_its_own_settings(
    other, world_tokenizer, processor, started
):
    """Another one is refused by name, and nothing has been changed then."""
    before = {f: f.read_bytes() for f in started.rglob("*") if f.is_file()}
    ((name, value),) = other.items()
    with pytest.raises(ValueError, match=rf"{name} .*{value}"):
        resume(started, processor, replace(CONFIG, **other))
    assert before == {f: f.read_bytes() for f in started.rglob("*") if f.is_file()}


def test_a_run_goes_on_with_its_own_mask_tokens_and_start(processor, started):
    for other in (dict(vqvae=None), dict(init="elsewhere")):
        with pytest.raises(ValueError, match="mask_tokens|init"):
            resume(started, processor, CONFIG, **other)
    masks = random_masks()
    masks.decoder.codebook._embedding[5, 7] += 1
    with pytest.raises(ValueError, match="mask_tokens"):
        resume(started, processor, CONFIG, vqvae=masks)


def test_when_to_write_may_change_on_the_way(processor, started):
    free = dict(log_every=2, save_every=1, eval_every=1)
    log = resume(started, processor, replace(CONFIG, **free))
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 6]


def test_a_stop_that_has_been_passed_is_refused(processor, started):
    for stop in (3, 0):
        with pytest.raises(ValueError, match="stop_after"):
            resume(started, processor, CONFIG, stop_after=stop)


def test_resume_restores_the_settings_of_the_command_line(
    tmp_path, started, capsys, monkeypatch
):
    """The same line again or none of its flags; another value is refused by name."""
    monkeypatch.setattr("vlm.training.validate", lambda model, processor: {"right": 1})
    base = tmp_path / "base"
    save_hf_model(*load_hf_model(started / "last", "cpu"), base)
    out = ["--output", str(tmp_path / "run")]
    line = ["--init", str(base), "--mask_tokens", str(base), "--batch_size", "2"]
    line += ["--steps", "3", "--seed", "3", "--questions_per_picture", "1"]
    assert main([*out, *line, "--stop_after", "1"]) == 0
    masks = MaskVQVAE(MaskEncoder(), MaskDecoder())
    masks.save_pretrained(tmp_path / "masks")
    for flag, value in (
        ("seed", "99"),
        ("batch_size", "64"),  # the default, given
        ("init", str(started)),
        ("mask_tokens", str(tmp_path / "masks")),
    ):
        capsys.readouterr()
        assert main([*out, "--resume", f"--{flag}", value]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and flag in error and "\n" not in error
    for number, flags in enumerate([[], line]):
        stop = ["--stop_after", str(2 + number), "--log_every", "1"]
        assert main([*out, "--resume", *flags, *stop]) == 0
    state = json.loads((tmp_path / "run" / "last" / "training_state.json").read_text())
    assert state["step"] == 3 and state["config"]["seed"] == 3
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in log]
    assert sorted(set(steps)) == [1, 2, 3]


def test_what_was_trained_to_segment_can_segment(processor, started, capsys):
    """After every save, its own mask decoder lies beside the model."""
    resume(started, processor, CONFIG)
    picture = started / "scene.png"
    make_scene(5, image_size=64).image.save(picture)
    command = ["--model_path", str(started / "last"), "--prompt", "segment owl"]
    command += ["--image_file_path", str(picture), "--only_cpu"]
    assert inference.main([*command, "--max_tokens_to_generate", "24"]) == 0
    saved = MaskVQVAE.from_pretrained(started / "last")
    for name, tensor in random_masks().state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name]), name


@pytest.mark.parametrize("run, saves", [("new", 2), ("parts", 1)])
def test_space_is_checked_before_the_first_step(
    run, saves, processor, started, monkeypatch
):
    """For two saves, or one beside that which is there: weights and two moments."""
    size = 3 * (started / "last" / "model.safetensors").stat().st_size
    free = shutil.disk_usage(started)._replace(free=saves * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: free)
    monkeypatch.setattr("vlm.training.make_scene", None)  # no step is taken
    model, masks = small_model(processor.tokenizer), random_masks()
    with pytest.raises(OSError, match="free in"):
        folder, going_on = started.parent / run, run == "parts"
        train(model, processor, CONFIG, folder, resume=going_on, vqvae=masks)


@pytest.mark.parametrize(
    "place", ["vlm.training.save_file", "vlm.training.save_hf_model"]
)
def test_a_full_disk_leaves_the_former_save(place, processor, started, monkeypatch):
    """And the run goes on from there when there is space again."""
    former = {f: f.read_bytes() for f in (started / "last").iterdir()}
    error = SafetensorError if "file" in place else OSError

    def full(*args, **settings):
        raise error("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(OSError, match="No space left on device"):
            resume(started, processor, replace(CONFIG, save_every=1))
    assert former == {f: f.read_bytes() for f in (started / "last").iterdir()}
    assert sorted(f.name for f in started.iterdir()) == ["last", "log.jsonl"]
    with (started / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lear')  # as much of a line as there was space for
    whole = small_model(processor.tokenizer)
    straight = train(whole, processor, CONFIG, vqvae=random_masks())
    assert resume(started, processor, CONFIG) == straight


def test_the_only_save_stays_until_another_is_in_its_place(
    processor, started, monkeypatch
):
    """The machine stopped between two renames once, and now stops there again."""
    (started / "last").rename(started / "last.old")
    former = {f.name: f.read_bytes() for f in (started / "last.old").iterdir()}

    def stop(source, target):
        if Path(source).name == "last.new":
            raise KeyboardInterrupt
        return replace_file(source, target)

    replace_file = os.replace
    monkeypatch.setattr("vlm.training.os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        resume(started, processor, replace(CONFIG, save_every=1))
    left = saved_run(started)
    assert former == {f.name: f.read_bytes() for f in left.iterdir()}


def test_trainings_follow_each_other_in_one_process(world_tokenizer, processor):
    """Whatever the one before computed in, each is as it would be on its own."""
    config = replace(CONFIG, patch_steps=0, steps=1)
    logs = []
    for mixed_precision in ("no", "bf16", "no"):
        settings = replace(config, mixed_precision=mixed_precision)
        logs.append(train(small_model(world_tokenizer), processor, settings))
    assert logs[0] == logs[2] != logs[1]
    assert logs[1][0]["text"] == pytest.approx(logs[0][0]["text"], rel=0.02)


def test_another_device_than_the_run_before(monkeypatch):
    """On a GPU, then on the CPU, and back: PyTorch's meta device plays the GPU."""
    for name, cpu in (("meta", False), ("cpu", True), ("meta", False)):
        with monkeypatch.context() as patch:
            if not cpu:
                patch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
            assert make_accelerator(cpu=cpu).device.type == name
    assert make_accelerator().device.type != "meta"


@pytest.mark.parametrize("name", ["last", "last.old"])
def test_run_is_never_overwritten(world_tokenizer, processor, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(small_model(world_tokenizer), processor, CONFIG, tmp_path)


def test_a_teacher_of_other_questions_is_refused(world_tokenizer, tmp_path):
    teacher = Teacher(small_model(world_tokenizer).config)
    tensors = {f"teacher.{n}": t + 1 for n, t in teacher.state_dict().items()}
    save_file(tensors, tmp_path / "training_state.safetensors")
    load_teacher(tmp_path, teacher)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, tensors[f"teacher.{name}"])
    del tensors["teacher.outline_head.weight"]
    save_file(tensors, tmp_path / "training_state.safetensors")
    with pytest.raises(ValueError, match="an earlier version's teacher"):
        load_teacher(tmp_path, teacher)


def test_resume_needs_a_run(world_tokenizer, processor, tmp_path):
    for folder, error in ((None, ValueError), (tmp_path, FileNotFoundError)):
        model = small_model(world_tokenizer)
        with pytest.raises(error, match="resume"):
            train(model, processor, CONFIG, folder, resume=True)


def test_evaluation_goes_into_the_log(world_tokenizer, processor):
    config = replace(CONFIG, patch_steps=0, steps=2, eval_every=1)
    model = small_model(world_tokenizer)
    modes = []

    def evaluate(model, step):
        modes.append(model.training)
        return {"score": step / 10}

    log = train(model, processor, config, evaluate=evaluate)
    assert [e["score"] for e in log if "score" in e] == [0.1, 0.2]
    assert modes == [False, False] and not model.training


def test_validation_encodes_a_picture_once(world_tokenizer, processor):
    model = small_model(world_tokenizer).eval()
    with overhear(model.vision_tower) as features:
        right = validate(model, processor, num_scenes=2)
    assert sum(len(batch) for batch in features) == 2
    assert set(right) == {"caption", "count", "relation", "presence"}


def test_log_refuses_what_is_no_number(tmp_path):
    log = TrainingLog(tmp_path)
    log.add(6, text=1.0, kinds=0.0)
    for refused in (log.add, log.write):
        with pytest.raises(FloatingPointError, match="no longer a number at step 7"):
            refused(7, text=math.nan, kinds=0.0)
    log.write(6)
    assert log.entries == [{"step": 6, "text": 1.0, "kinds": 0.0}]


def test_a_loss_that_is_no_number_is_never_saved(world_tokenizer, processor, tmp_path):
    model = small_model(world_tokenizer)
    config = replace(CONFIG, patch_steps=0, save_every=1, log_every=100)
    with torch.no_grad():
        model.multi_modal_projector.linear.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="no longer a number at step 1 "):
        train(model, processor, config, tmp_path)
    assert not (tmp_path / "last").exists()


SCRIPT = """
import sys
from dataclasses import replace
import torch
sys.path[:0] = [{tests!r}]
from test_training import TWO, random_masks, small_model
from vlm.processing import PaliGemmaProcessor, loc_token, seg_token
from vlm.training import make_accelerator, make_tokenizer, train
torch.set_num_threads(1)
tokenizer = make_tokenizer(num_scenes=50)
processor = PaliGemmaProcessor(tokenizer, num_image_tokens=16, image_size=64)
before = replace(TWO, patch_steps=0, steps=1, mixed_precision="bf16")
train(small_model(tokenizer), processor, before, vqvae=random_masks())
train(small_model(tokenizer), processor, TWO, {folder!r}, vqvae=random_masks())
print(f"one of {{make_accelerator().num_processes}} processes")
"""


def test_two_processes_have_the_loss_of_one(world_tokenizer, processor, tmp_path):
    """In a half of each batch all pictures are silent."""
    model, masks = small_model(world_tokenizer), random_masks()
    one = train(model, processor, TWO, vqvae=masks)
    script = tmp_path / "run.py"
    tests = str(Path(__file__).parent)
    script.write_text(SCRIPT.format(tests=tests, folder=str(tmp_path / "two")))
    # Not `accelerate launch --cpu --num_processes 2`: that starts a single process.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node", "2", str(script)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("of 2 processes") == 2, done.stdout
    lines = (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    two = [json.loads(line) for line in lines]
    assert [e["step"] for e in two] == [e["step"] for e in one]
    for a, b in zip(one, two, strict=True):
        for name in LOSSES:
            asked = name not in ("text", "plans") or a["step"] > TWO.patch_steps
            assert (a[name] > 0) == asked
            assert a[name] == pytest.approx(b[name], rel=2e-3), (a, b)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--resume"], "no saved run"),
        (["--init", "nowhere"], "no folder nowhere"),
        (["--mask_tokens", "nowhere"], "no mask_encoder.safetensors in nowhere"),
        (["--questions", "sing"], "no question for task 'sing'"),
        (["--styles", "cubist"], "unknown style 'cubist'"),
        (["--silent_pictures", "-1"], "silent_pictures=-1 must be at least 0"),
        (["--silent_pictures", "2"], "divisible by 1 + silent_pictures"),
        (["--steps", "0"], "all_steps is 0"),
        (["--log_every", "0"], "log_every is 0"),
        (["--questions_per_picture", "0"], "questions_per_picture is 0"),
        (["--mixed_precision", "fp8"], "fp8"),
    ],
)
def test_command_line_errors_are_one_line(
    arguments, message, tmp_path, capsys, monkeypatch, world_tokenizer
):
    monkeypatch.setattr("vlm.training.make_tokenizer", lambda: world_tokenizer)
    assert main(["--output", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path, monkeypatch, capsys, world_tokenizer
):
    monkeypatch.setattr("vlm.training.make_tokenizer", lambda: world_tokenizer)

    def interrupt(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("vlm.training.train", interrupt)
    assert main(["--output", str(tmp_path / "run"), "--steps", "1"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_unknown_flag_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--output", "x", "--lerning_rate", "1"])
    assert stop.value.code == 2
    assert "--lerning_rate" in capsys.readouterr().err
