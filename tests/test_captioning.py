"""Marks of captions, and where the model looked."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from reference import pair, tiny_config

from vlm.captioning import (
    Marks,
    exact_share,
    kinds_f1,
    look,
    mark_kinds,
    name_tokens,
    picture_attention,
)
from vlm.config import PaliGemmaConfig
from vlm.processing import PaliGemmaProcessor
from vlm.questions import caption
from vlm.sampling import Generation, generate_tokens
from vlm.scenes import VALIDATION_SEEDS, make_scene

SCENES = [make_scene(seed, 64) for seed in VALIDATION_SEEDS[:20]]
TRUTHS = [caption(scene) for scene in SCENES]


# Marks


def test_the_truth_is_perfect():
    marks = mark_kinds(TRUTHS, SCENES)
    assert marks.missed == marks.invented == ()
    assert marks.precision == marks.recall == marks.f1 == 1
    assert kinds_f1(TRUTHS, SCENES) == exact_share(TRUTHS, TRUTHS) == 1


def test_one_kind_missed_and_one_invented():
    scene = SCENES[0]
    *rest, last = scene.counts
    absent = next(k for s in SCENES for k in s.counts if k not in scene.counts)
    answer = ", ".join(["a " + kind for kind in rest] + [f"two {absent}"])
    answer = answer.replace(f"two {absent}", f"a {absent}")
    marks = mark_kinds([answer], [scene])
    assert marks == Marks(tuple(rest), (last,), (absent,))
    assert marks.precision == marks.recall == len(rest) / len(scene.counts)


def test_order_number_and_repetition_do_not_count():
    scene = next(scene for scene in SCENES if len(scene.counts) > 2)
    kinds = ", ".join(f"a {kind}" for kind in reversed(scene.counts))
    assert kinds_f1([f"{kinds}, {kinds}"], [scene]) == 1
    assert exact_share([kinds], [caption(scene)]) == 0


def test_zero_of_a_kind_is_not_named():
    (kind,) = next(scene.counts for scene in SCENES if len(scene.counts) == 1)
    scene = next(scene for scene in SCENES if list(scene.counts) == [kind])
    assert mark_kinds([f"0 {kind}"], [scene]).missed == (kind,)


def test_the_average_is_micro():
    few = next(scene for scene in SCENES if len(scene.counts) == 1)
    many = max(SCENES, key=lambda scene: len(scene.counts))
    scenes, answers = [few, many], [caption(few), ""]
    right, missed = 1, len(many.counts)
    assert kinds_f1(answers, scenes) == pytest.approx(2 * right / (2 * right + missed))


def test_silence_is_worth_nothing_and_divides_by_nothing():
    marks = mark_kinds(["", "a view of nothing in particular"], SCENES[:2])
    assert marks.precision == marks.recall == marks.f1 == 0
    assert Marks().f1 == 0


@pytest.mark.parametrize("answers", [[], ["a"], ["a"] * 3])
def test_pairs_must_match(answers):
    with pytest.raises(ValueError, match="in pairs"):
        kinds_f1(answers, SCENES[:2] if answers else [])
    with pytest.raises(ValueError, match="in pairs"):
        exact_share(answers, ["a", "b"])


@pytest.mark.parametrize("answers", ["ab", [Generation(), Generation()], [None, "a"]])
def test_answers_are_strings(answers):
    for measure in (exact_share.__wrapped__, kinds_f1.__wrapped__):
        with pytest.raises(TypeError, match="answers"):
            measure(answers, SCENES[:2])


# Look


def config_for(tokenizer, text=None, **vision) -> PaliGemmaConfig:
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    words = dict(vocab_size=len(tokenizer), max_position_embeddings=512)
    return tiny_config(
        vision=vision, text={**words, **(text or {})}, image_token_index=image_id
    )


@pytest.fixture(scope="module")
def models(tokenizer):
    return pair(config_for(tokenizer))


@pytest.fixture(scope="module")
def processor(tokenizer):
    return PaliGemmaProcessor(tokenizer, 4, 28)


PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
)


def test_it_looks_at_what_the_model_writes(models, processor):
    inputs = processor(["caption en"], [PICTURE])
    (row,) = generate_tokens(models[0], processor.tokenizer, inputs, max_new_tokens=6)
    seen = look(models[0], processor, "caption en", PICTURE, max_new_tokens=6)
    assert seen.attention.shape == (len(row.token_ids), 2, 2)
    assert seen.probabilities == pytest.approx(row.probabilities, abs=1e-5)
    again = look(models[0], processor, "caption en", PICTURE, row)
    torch.testing.assert_close(again.attention, seen.attention, rtol=0, atol=0)


def test_maps_are_those_of_transformers(models, processor):
    answer = "two owls and a pizza"
    seen = look(models[0], processor, "caption en", PICTURE, answer)
    inputs = processor(["caption en"], [PICTURE], [answer])
    del inputs["labels"]
    with torch.no_grad():
        layers = models[1](**inputs, output_attentions=True).attentions
    rows = torch.stack(layers[1:])[:, 0].mean(dim=(0, 1))  # 3 layers: the later two
    new = len(seen.pieces)
    expected = rows[-new - 1 : -1, :4].unflatten(1, (2, 2))
    torch.testing.assert_close(seen.attention, expected, rtol=0, atol=1e-5)


def test_a_token_does_not_see_what_comes_after_it(models, processor):
    short = look(models[0], processor, "caption en", PICTURE, "two owls")
    long = look(models[0], processor, "caption en", PICTURE, "two owls, a pizza")
    same = len(short.pieces) - 1  # all but the end
    torch.testing.assert_close(
        long.attention[:same], short.attention[:same], rtol=0, atol=1e-6
    )


def test_the_end_is_named_and_pieces_make_the_answer(models, processor):
    seen = look(models[0], processor, "caption en", PICTURE, "an owl <loc0012> é")
    assert seen.pieces[-1] == "<eos>"
    assert len(seen.pieces) == len(seen.probabilities) == len(seen.attention)
    assert "<loc0012>" in seen.pieces
    ids = processor.tokenizer.encode("é", add_special_tokens=False)
    assert name_tokens(processor.tokenizer, ids)[-1] == "é"


def test_weights_are_shares(models, processor):
    seen = look(models[0], processor, "detect owl", PICTURE, "owl")
    share = seen.attention.sum(dim=(1, 2))
    assert (seen.attention >= 0).all() and (0 < share).all() and (share < 1).all()


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_any_heads_and_any_image_size(tokenizer, heads):
    config = config_for(tokenizer, dict(num_key_value_heads=heads), image_size=70)
    ours, _ = pair(config)
    seen = look(ours, PaliGemmaProcessor(tokenizer, 25, 70), "a", PICTURE, "owl")
    assert seen.attention.shape[1:] == (5, 5)


def test_an_empty_generation_is_refused(models, processor):
    with pytest.raises(ValueError, match="at least one token"):
        look(models[0], processor, "caption en", PICTURE, Generation())


def test_what_is_no_answer_is_refused(models, processor):
    unchecked = look.__wrapped__  # without the tests' own type checks
    with pytest.raises(TypeError, match="one answer"):  # what `generate` returns
        unchecked(models[0], processor, "caption en", PICTURE, ["an owl"])


def test_token_ids_may_be_a_tensor(models, processor):
    inputs = processor(["caption en"], [PICTURE])
    ids = processor.encode_suffix("an owl")
    _, expected = picture_attention(models[0], inputs, ids)
    unchecked = inspect.unwrap(picture_attention)
    with torch.no_grad():
        _, chances = unchecked(models[0], inputs, torch.tensor(ids))
    torch.testing.assert_close(chances, expected)
