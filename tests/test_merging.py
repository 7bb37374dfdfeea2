import pytest
import torch
from reference import pair, random_inputs, tiny_config

from vlm.masks import make_attn_mask
from vlm.merging import can_read_values, merge_image_features

RAGGED = [
    ((5, 2, 3), (0, 0, 0)),  # to generate
    ((5, 2, 3), (1, 6, 3)),  # to train
    ((4, 4), (3, 3)),  # no padding at all
    ((0, 7), (5, 0)),  # no prompt, no answer
]


def what_the_decoder_gets(model, inputs):
    """The embeddings and the mask that transformers hands to its decoder."""
    seen = {}
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen["inputs_embeds"], seen["attention_mask"] == 0


# --- Parity -----------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [14, 28, 42])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("prompts, suffixes", RAGGED)
def test_embeddings_and_mask_are_those_of_transformers(
    prompts, suffixes, padding, image_size
):
    config = tiny_config(vision=dict(image_size=image_size))
    ours, theirs = pair(config)
    inputs = random_inputs(config, prompts, suffixes, padding)
    embeds, mask = what_the_decoder_gets(theirs, inputs)
    with torch.no_grad():
        merged = ours.embed_inputs(
            inputs["input_ids"], ours.encode_images(inputs["pixel_values"])
        )
    torch.testing.assert_close(merged, embeds, atol=1e-5, rtol=0)

    real = inputs["attention_mask"].bool()
    here = make_attn_mask(inputs["attention_mask"], inputs["token_type_ids"])
    assert torch.equal(here[:, 0][real], mask[:, 0][real])

    ones = torch.ones_like(inputs["token_type_ids"])
    triangle = make_attn_mask(inputs["attention_mask"], ones)
    assert not torch.equal(triangle[:, 0][real], mask[:, 0][real])


# --- Image features -----------------------------------------------------------------


def test_features_come_in_order_wherever_the_image_tokens_are():
    image_mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]).bool()
    embeds, features = torch.randn(2, 6, 4), torch.randn(2, 3, 4)
    merged = merge_image_features(embeds, features, image_mask)
    for row in range(2):
        left = iter(features[row])
        for column in range(6):
            is_image = image_mask[row, column]
            expected = next(left) if is_image else embeds[row, column]
            assert torch.equal(merged[row, column], expected)


def test_gradients_reach_features_and_words_but_no_image_token():
    image_mask = torch.tensor([[True, True, False]])
    embeds = torch.randn(1, 3, 4, requires_grad=True)
    features = torch.randn(1, 2, 4, requires_grad=True)
    merge_image_features(embeds, features, image_mask).sum().backward()
    assert (features.grad == 1).all()
    assert torch.equal(embeds.grad[0, :, 0], torch.tensor([0.0, 0.0, 1.0]))


def test_the_dtype_of_the_words_wins():
    features = torch.randn(1, 1, 4, dtype=torch.bfloat16)
    merged = merge_image_features(
        torch.randn(1, 2, 4), features, torch.tensor([[True, False]])
    )
    assert merged.dtype == torch.float32


@pytest.mark.parametrize("counts", [(1, 2), (3, 3), (0, 0)])
def test_a_wrong_number_of_image_tokens_is_an_error(counts):
    image_mask = torch.tensor([[i < n for i in range(4)] for n in counts])
    with pytest.raises(ValueError, match="2 features each for 2 rows"):
        merge_image_features(torch.randn(2, 4, 3), torch.randn(2, 2, 3), image_mask)


@pytest.mark.parametrize("counts", [(1, 2), (0, 0), (3, 1), (2, 1)])
def test_where_values_cannot_be_read_a_wrong_number_of_image_tokens_is_nan(
    counts, monkeypatch, no_type_checks
):
    """Also in a row whose own number is right: features move on from row to row."""
    monkeypatch.setattr("vlm.merging.can_read_values", lambda tensor: False)
    image_mask = torch.tensor([[i < n for i in range(4)] for n in counts])
    merged = merge_image_features(torch.randn(2, 4, 3), torch.ones(2, 2, 3), image_mask)
    assert torch.equal(merged.isnan().all(dim=-1), image_mask)


def test_values_are_read_on_the_cpu_and_in_no_trace():
    assert can_read_values(torch.ones(()))
    assert not can_read_values(torch.ones((), device="meta"))
    compiled = torch.compile(
        lambda x: x + can_read_values(x), backend="eager", fullgraph=True
    )
    assert compiled(torch.zeros(())) == 0


def test_pictures_are_shared_by_consecutive_rows():
    features, words = torch.randn(2, 3, 4), torch.randn(6, 3, 4)
    everywhere = torch.ones(6, 3, dtype=torch.bool)
    shared = merge_image_features(words, features, everywhere)
    assert torch.equal(shared, features[[0, 0, 0, 1, 1, 1]])
    alone = merge_image_features(words[:2], features, everywhere[:2])
    assert torch.equal(alone, features)


@pytest.mark.parametrize("pictures, rows", [(2, 3), (3, 2), (0, 2)])
def test_pictures_that_do_not_come_out_even_are_an_error(pictures, rows):
    message = f"{pictures} pictures can't serve {rows} rows evenly"
    with pytest.raises(ValueError, match=message):
        merge_image_features(
            torch.randn(rows, 5, 4),
            torch.randn(pictures, 3, 4),
            torch.ones(rows, 5, dtype=torch.bool),
        )
