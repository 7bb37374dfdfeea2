"""What the model attends to while it writes."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from reference import pair, tiny_config

from vlm.captioning import attention_maps, image_attention
from vlm.config import PaliGemmaConfig
from vlm.processing import PaliGemmaProcessor
from vlm.sampling import Generation, generate_tokens

# Attention maps


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


def test_without_an_answer_it_is_what_the_model_writes(models, processor, monkeypatch):
    short = partial(generate_tokens, max_new_tokens=6)
    monkeypatch.setattr("vlm.captioning.generate_tokens", short)
    inputs = processor(["caption en"], [PICTURE])
    (row,) = short(models[0], processor.tokenizer, inputs)
    maps = attention_maps(models[0], processor, "caption en", PICTURE)
    assert maps.attention.shape == (len(row.token_ids), 2, 2)
    assert maps.probabilities == pytest.approx(row.probabilities, abs=1e-5)
    again = attention_maps(models[0], processor, "caption en", PICTURE, row)
    torch.testing.assert_close(again.attention, maps.attention, rtol=0, atol=0)


def test_maps_are_those_of_transformers(models, processor):
    answer = "two owls and a pizza"
    maps = attention_maps(models[0], processor, "caption en", PICTURE, answer)
    inputs = processor(["caption en"], [PICTURE], [answer])
    del inputs["labels"]
    with torch.no_grad():
        layers = models[1](**inputs, output_attentions=True).attentions
    rows = torch.stack(layers[1:])[:, 0].mean(dim=(0, 1))  # 3 layers: the later two
    new = len(maps.pieces)
    expected = rows[-new - 1 : -1, :4].unflatten(1, (2, 2))
    torch.testing.assert_close(maps.attention, expected, rtol=0, atol=1e-5)


def test_a_token_does_not_see_what_comes_after_it(models, processor):
    short = attention_maps(models[0], processor, "caption en", PICTURE, "two owls")
    long = attention_maps(
        models[0], processor, "caption en", PICTURE, "two owls, a pizza"
    )
    same = len(short.pieces) - 1  # all but the end
    torch.testing.assert_close(
        long.attention[:same], short.attention[:same], rtol=0, atol=1e-6
    )


def test_the_end_is_named_and_pieces_make_the_answer(models, processor):
    maps = attention_maps(
        models[0], processor, "caption en", PICTURE, "an owl <loc0012> é"
    )
    assert maps.pieces[-2:] == ["é", "<eos>"]
    assert len(maps.pieces) == len(maps.probabilities) == len(maps.attention)
    assert "<loc0012>" in maps.pieces


def test_weights_are_shares(models, processor):
    maps = attention_maps(models[0], processor, "detect owl", PICTURE, "owl")
    share = maps.attention.sum(dim=(1, 2))
    assert (maps.attention >= 0).all() and (0 < share).all() and (share < 1).all()


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_any_heads_and_any_image_size(tokenizer, heads):
    config = config_for(tokenizer, dict(num_key_value_heads=heads), image_size=70)
    ours, _ = pair(config)
    maps = attention_maps(
        ours, PaliGemmaProcessor(tokenizer, 25, 70), "a", PICTURE, "owl"
    )
    assert maps.attention.shape[1:] == (5, 5)


def test_an_empty_generation_is_refused(models, processor):
    with pytest.raises(ValueError, match="at least one token"):
        attention_maps(models[0], processor, "caption en", PICTURE, Generation())


def test_another_type_of_answer_is_refused(models, processor):
    unchecked = attention_maps.__wrapped__  # without the tests' own type checks
    with pytest.raises(TypeError, match="one answer"):  # what `generate` returns
        unchecked(models[0], processor, "caption en", PICTURE, ["an owl"])


def test_token_ids_may_be_a_tensor(models, processor):
    inputs = processor(["caption en"], [PICTURE])
    ids = processor.encode_suffix("an owl")
    _, expected = image_attention(models[0], inputs, ids)
    unchecked = inspect.unwrap(image_attention)
    with torch.no_grad():
        _, chances = unchecked(models[0], inputs, torch.tensor(ids))
    torch.testing.assert_close(chances, expected)
