import pytest
import torch
from reference import pair, random_inputs, tiny_config

from vlm.gemma import causal_mask
from vlm.merging import (
    may_read,
    merge_image_features,
    prefix_lm_mask,
    share_pictures,
)

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
    here = prefix_lm_mask(inputs["attention_mask"], inputs["token_type_ids"])
    assert torch.equal(here[:, 0][real], mask[:, 0][real])

    triangle = causal_mask(inputs["attention_mask"], real.shape[1])
    assert not torch.equal(triangle[:, 0][real], mask[:, 0][real])


# --- Seats ------------------------------------------------------------------------


def test_features_sit_down_in_order_wherever_the_seats_are():
    image_mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]).bool()
    embeds, features = torch.randn(2, 6, 4), torch.randn(2, 3, 4)
    merged = merge_image_features(embeds, features, image_mask)
    for row in range(2):
        left = iter(features[row])
        for place in range(6):
            seat = image_mask[row, place]
            expected = next(left) if seat else embeds[row, place]
            assert torch.equal(merged[row, place], expected)


def test_gradients_reach_features_and_words_but_no_seat():
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
def test_a_wrong_number_of_seats_is_an_error(counts):
    image_mask = torch.tensor([[i < n for i in range(4)] for n in counts])
    with pytest.raises(ValueError, match="2 pictures of 2 features each for 2 rows"):
        merge_image_features(torch.randn(2, 4, 3), torch.randn(2, 2, 3), image_mask)


@pytest.mark.parametrize("counts", [(1, 2), (0, 0), (3, 1), (2, 1)])
def test_where_values_cannot_be_read_a_wrong_number_of_seats_is_nan(
    counts, monkeypatch, no_type_checks
):
    """Also in a row whose own seats are right: features move on from row to row."""
    monkeypatch.setattr("vlm.merging.may_read", lambda tensor: False)
    image_mask = torch.tensor([[i < n for i in range(4)] for n in counts])
    merged = merge_image_features(torch.randn(2, 4, 3), torch.ones(2, 2, 3), image_mask)
    assert torch.equal(merged.isnan().all(dim=-1), image_mask)
    with pytest.raises(ValueError, match="1 pictures"):  # shapes are always read
        merge_image_features(torch.randn(2, 4, 3), torch.ones(1, 2, 3), image_mask)


def test_values_are_read_on_the_cpu_and_in_no_trace():
    assert may_read(torch.ones(()))
    assert not may_read(torch.ones((), device="meta"))
    compiled = torch.compile(lambda x: x + may_read(x), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == 0


def test_pictures_are_shared_by_consecutive_rows():
    features = torch.randn(2, 3, 4)
    shared = share_pictures(features, 6)
    assert torch.equal(shared, features[[0, 0, 0, 1, 1, 1]])
    assert torch.equal(share_pictures(features, 2), features)


@pytest.mark.parametrize("pictures, rows", [(2, 3), (3, 2), (0, 2)])
def test_pictures_that_do_not_come_out_even_are_an_error(pictures, rows):
    message = f"{pictures} pictures can't serve {rows} rows evenly"
    with pytest.raises(ValueError, match=message):
        share_pictures(torch.randn(pictures, 3, 4), rows)


# --- The mask -----------------------------------------------------------------------


def random_rows(padding, rows=5, length=12):
    """Real tokens and types of ragged rows; some rows have no answer."""
    attention_mask = torch.zeros(rows, length, dtype=torch.long)
    token_type_ids = torch.zeros_like(attention_mask)
    for row in range(rows):
        prefix = int(torch.randint(1, 7, ()))
        answer = int(torch.randint(0, 6, ()))
        start = length - prefix - answer if padding == "left" else 0
        attention_mask[row, start : start + prefix + answer] = 1
        token_type_ids[row, start + prefix : start + prefix + answer] = 1
    return attention_mask, token_type_ids


@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_mask_is_the_rule_in_words(padding):
    attention_mask, types = random_rows(padding)
    mask = prefix_lm_mask(attention_mask, types)[:, 0]
    for row in range(len(mask)):
        for q in range(12):
            for k in range(12):
                if not attention_mask[row, q]:
                    allowed = True  # padding: so that the softmax is defined
                elif not attention_mask[row, k]:
                    allowed = False
                else:
                    allowed = types[row, k] == 0 or k <= q
                assert mask[row, q, k] == allowed


@pytest.mark.parametrize("padding", ["left", "right"])
def test_every_query_sees_something(padding):
    assert prefix_lm_mask(*random_rows(padding)).any(dim=-1).all()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("num_new", [1, 4, 12])
def test_with_a_cache_it_is_the_last_rows(padding, num_new):
    rows = random_rows(padding)
    mask = prefix_lm_mask(*rows, num_new)
    assert mask.shape == (5, 1, num_new, 12)
    assert torch.equal(mask, prefix_lm_mask(*rows)[:, :, -num_new:])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_all_ones_is_causal_and_all_zeros_is_full(padding):
    attention_mask, _ = random_rows(padding)
    ones = torch.ones_like(attention_mask)
    assert torch.equal(
        prefix_lm_mask(attention_mask, ones), causal_mask(attention_mask, 12)
    )
    assert prefix_lm_mask(ones, torch.zeros_like(ones)).all()


def test_a_one_opens_a_block_that_later_zeros_join():
    types = torch.tensor([[0, 0, 1, 0, 1]])
    mask = prefix_lm_mask(torch.ones_like(types), types)[0, 0].int()
    assert mask.tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
