"""Masks: one rule for all of them, pair by pair; positions; a cache's empty slots."""

import pytest
import torch

from vlm.config import GemmaConfig
from vlm.kv_cache import KVCache, StaticKVCache
from vlm.masks import make_attn_mask, mask_and_positions


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
    mask = make_attn_mask(attention_mask, types)[:, 0]
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
def test_every_query_attends_to_something(padding):
    assert make_attn_mask(*random_rows(padding)).any(dim=-1).all()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("num_new", [1, 4, 12])
def test_with_a_cache_it_is_the_last_rows(padding, num_new):
    rows = random_rows(padding)
    mask = make_attn_mask(*rows, num_new)
    assert mask.shape == (5, 1, num_new, 12)
    assert torch.equal(mask, make_attn_mask(*rows)[:, :, -num_new:])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_all_ones_is_causal_and_all_zeros_is_full(padding):
    attention_mask, _ = random_rows(padding)
    ones = torch.ones_like(attention_mask)
    causal = (
        torch.ones(12, 12, dtype=torch.bool).tril() & attention_mask.bool()[:, None]
    )
    causal = causal | ~attention_mask.bool()[:, :, None]  # padding attends to all
    assert torch.equal(make_attn_mask(attention_mask, ones)[:, 0], causal)
    assert make_attn_mask(ones, torch.zeros_like(ones)).all()


def test_a_one_opens_a_block_that_later_zeros_join():
    types = torch.tensor([[0, 0, 1, 0, 1]])
    mask = make_attn_mask(torch.ones_like(types), types)[0, 0].int()
    assert mask.tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


def test_causal_mask_by_hand():
    table = torch.tensor([[0, 1, 1], [1, 1, 0]])
    expected = [
        [[[1, 1, 1], [0, 1, 0], [0, 1, 1]]],  # padding attends to everything
        [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]],
    ]
    assert make_attn_mask(table, torch.ones_like(table), 3).int().tolist() == expected
    last_rows = [[matrix[0][-1:]] for matrix in expected]
    assert make_attn_mask(table, torch.ones_like(table), 1).int().tolist() == last_rows


def test_positions_count_real_tokens():
    table = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 1]])
    _, position_ids = mask_and_positions(torch.zeros(2, 5, 3), None, table)
    assert position_ids.tolist() == [[0, 0, 0, 1, 2], [0, 1, 1, 1, 2]]
    kv_cache = KVCache()
    fill(kv_cache, GemmaConfig(num_hidden_layers=1, head_dim=4), 4, batch=2)
    _, position_ids = mask_and_positions(torch.zeros(2, 1, 3), kv_cache, table)
    assert position_ids.tolist() == [[2], [2]]


def fill(kv_cache, config, tokens, batch=1):
    states = torch.ones(batch, config.num_key_value_heads, tokens, config.head_dim)
    for layer_idx in range(config.num_hidden_layers):
        kv_cache.update(states, states, layer_idx)


@pytest.mark.parametrize("past", [0, 3])
def test_empty_slots_of_a_static_cache_are_masked_out(past):
    config = GemmaConfig(num_hidden_layers=2, head_dim=4)
    real = torch.tensor([[0, 1, 1, 1, 1]])
    static, growing = StaticKVCache(config, 1, max_length=8), KVCache()
    masks = []
    for kv_cache in (static, growing):
        if past:
            fill(kv_cache, config, past)
        embeds = torch.zeros(1, 5 - past, 2)
        mask, position_ids = mask_and_positions(embeds, kv_cache, real)
        assert position_ids.tolist() == [[0, 0, 1, 2, 3][past:]]
        masks.append(mask)
    expected = make_attn_mask(real, torch.ones_like(real), 5 - past)
    assert torch.equal(masks[1], expected)
    # The first pass gets its own tokens back, later ones the whole buffer.
    assert masks[0].shape[-1] == (8 if past else 5) and not masks[0][..., 5:].any()
    assert torch.equal(masks[0][..., :5], expected)


def test_a_mask_of_pairs_is_taken_as_it_is():
    mask = torch.rand(2, 1, 3, 3) < 0.5
    taken, position_ids = mask_and_positions(torch.zeros(2, 3, 4), None, mask)
    assert torch.equal(taken, mask) and position_ids is None


def test_packed_questions_attend_to_the_image_and_to_themselves():
    """Read off a drawing: image, prompt 1, answer 1, prompt 2, answer 2, padding."""
    segments = torch.tensor([[0, 1, 1, 2, 2, -1]])
    types = torch.tensor([[0, 0, 1, 0, 1, 0]])
    mask = make_attn_mask(segments >= 0, types, segment_ids=segments)
    assert mask[0, 0].int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],
    ]
