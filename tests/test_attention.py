"""Grouped-query attention: the reference's numbers, its two ends, its masks."""

import inspect
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GemmaConfig as ReferenceConfig
from transformers.models.gemma.modeling_gemma import GemmaAttention as Reference

from vlm.attention import GemmaAttention, eager_attention, repeat_kv
from vlm.config import GemmaConfig
from vlm.rope import GemmaRotaryEmbedding

SHAPES = [  # D, H, K, Dh
    (32, 4, 1, 8),  # multi-query, head_dim = D / H
    (32, 4, 1, 20),  # multi-query, head_dim is not D / H
    (48, 6, 2, 20),  # grouped-query: the order of heads shows here alone
    (24, 6, 3, 2),
    (32, 4, 4, 12),  # multi-head
]


def sizes(shape: tuple[int, int, int, int]) -> dict[str, int]:
    names = "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"
    return dict(zip(names, shape))


def attention(shape: tuple[int, int, int, int]) -> GemmaAttention:
    return GemmaAttention(GemmaConfig(**sizes(shape)), layer_idx=0).eval()


def angles(head_dim: int, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(tokens).expand(batch, tokens)
    return GemmaRotaryEmbedding(head_dim)(torch.zeros(1), positions)


def random_mask(batch: int, tokens: int) -> Tensor:
    """Everyone sees themselves and about half of the others."""
    mask = torch.rand(batch, 1, tokens, tokens) < 0.5
    return mask | torch.eye(tokens, dtype=torch.bool)


def causal_mask(batch: int, tokens: int) -> Tensor:
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return mask.expand(batch, 1, tokens, tokens)


@pytest.mark.parametrize("make_mask", [random_mask, causal_mask])
@pytest.mark.parametrize("output_attentions", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_transformers(shape, output_attentions, make_mask):
    ours = attention(shape)
    config = ReferenceConfig(**sizes(shape), attn_implementation="eager")
    theirs = Reference(config, layer_idx=0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    states, mask = torch.randn(2, 7, shape[0]), make_mask(2, 7)
    cos_sin = angles(shape[3], 2, 7)
    added = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    expected, expected_weights = theirs(states, cos_sin, added)
    output, weights = ours(states, *cos_sin, mask, output_attentions=output_attentions)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    assert (weights is not None) == output_attentions
    if output_attentions:
        torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_do_not_depend_on_the_path(shape):
    layer, states, mask = (
        attention(shape),
        torch.randn(2, 5, shape[0]),
        random_mask(2, 5),
    )
    grads = []
    for explicit in (False, True):
        layer.zero_grad()
        output, _ = layer(
            states, *angles(shape[3], 2, 5), mask, output_attentions=explicit
        )
        output.square().sum().backward()
        grads.append([weight.grad.clone() for weight in layer.parameters()])
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-5)


def test_is_torchs_multi_head_attention_when_k_equals_h():
    layer, states, mask = (
        attention((32, 4, 4, 8)),
        torch.randn(2, 6, 32),
        random_mask(2, 6),
    )
    theirs = nn.MultiheadAttention(32, 4, bias=False, batch_first=True)
    projections = layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight
    weights = {
        "in_proj_weight": torch.cat(projections),
        "out_proj.weight": layer.o_proj.weight,
    }
    theirs.load_state_dict(weights, strict=True)
    forbidden = ~mask.expand(2, 4, 6, 6).flatten(0, 1)
    expected, expected_weights = theirs(
        states, states, states, attn_mask=forbidden, average_attn_weights=False
    )
    nowhere = torch.ones(2, 6, 8), torch.zeros(2, 6, 8)  # angle 0: no rotation
    output, weights = layer(states, *nowhere, mask, output_attentions=True)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_sharing_is_multi_head_attention_with_copied_heads(kv_heads):
    grouped, full = attention((24, 6, kv_heads, 4)), attention((24, 6, 6, 4))
    weights = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        heads = weights[name].unflatten(0, (kv_heads, 4))
        copies = [heads[head * kv_heads // 6] for head in range(6)]
        weights[name] = torch.cat(copies)
    full.load_state_dict(weights, strict=True)
    inputs = torch.randn(2, 5, 24), *angles(4, 2, 5), random_mask(2, 5)
    torch.testing.assert_close(grouped(*inputs)[0], full(*inputs)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("num_new, length", [(5, 5), (1, 9), (3, 8)])
def test_explicit_formula_matches_sdpa(heads, kv_heads, num_new, length):
    query_states = torch.randn(2, heads, num_new, 8)
    key_states, value_states = torch.randn(2, 2, kv_heads, length, 8)
    mask = causal_mask(2, length)[:, :, -num_new:]
    mixed, weights = eager_attention(
        query_states, key_states, value_states, mask, scaling=0.3
    )
    expected = F.scaled_dot_product_attention(
        query_states, key_states, value_states, mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, heads, num_new))
    assert (weights[~mask.expand_as(weights)] == 0).all()


def test_scores_are_changed_after_scaling_and_before_the_mask():
    states = torch.randn(3, 2, 4, 5, 8)
    mask = causal_mask(2, 5)
    seen = []

    def half(scores):
        seen.append(scores)
        return scores / 2

    mixed, weights = eager_attention(*states, mask, 0.6, score_mod=half)
    expected = eager_attention(*states, mask, 0.3)
    torch.testing.assert_close((mixed, weights), expected, atol=1e-6, rtol=0)
    (scores,) = seen
    torch.testing.assert_close(scores, states[0] @ states[1].mT * 0.6)


def test_what_nobody_sees_changes_nobody():
    layer, states, mask = (
        attention((48, 6, 2, 20)),
        torch.randn(2, 7, 48),
        random_mask(2, 7),
    )
    mask[..., 4] = False
    mask[..., 4, 4] = True
    changed = states.clone()
    changed[:, 4] = 100.0
    before = layer(states, *angles(20, 2, 7), mask)[0]
    after = layer(changed, *angles(20, 2, 7), mask)[0]
    others = torch.arange(7) != 4
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before[:, 4], after[:, 4])


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_depend_on_distance_alone(shape):
    layer, states = attention(shape), torch.randn(1, 6, shape[0])
    outputs = []
    for start in (0, 50):
        positions = start + torch.arange(6)[None]
        cos_sin = GemmaRotaryEmbedding(shape[3])(states, positions)
        outputs.append(layer(states, *cos_sin, causal_mask(1, 6))[0])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=0)


class Remembers:
    """The least that a cache must do."""

    def __init__(self):
        self.past: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int):
        if layer_idx in self.past:
            old_keys, old_values = self.past[layer_idx]
            keys, values = (
                torch.cat([old_keys, keys], 2),
                torch.cat([old_values, values], 2),
            )
        self.past[layer_idx] = keys, values
        return keys, values


@pytest.mark.parametrize("output_attentions", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_with_a_cache_new_tokens_see_the_old(shape, output_attentions):
    layer, states, mask = (
        attention(shape),
        torch.randn(2, 7, shape[0]),
        causal_mask(2, 7),
    )
    cos, sin = angles(shape[3], 2, 7)
    expected, _ = layer(states, cos, sin, mask)
    cache, outputs = Remembers(), []
    for start, end in ((0, 4), (4, 6), (6, 7)):
        new = slice(start, end)
        output, weights = layer(
            states[:, new],
            cos[:, new],
            sin[:, new],
            mask[:, :, new, :end],
            kv_cache=cache,
            output_attentions=output_attentions,
        )
        outputs.append(output)
        assert weights is None or weights.shape == (2, shape[1], end - start, end)
    assert list(cache.past) == [layer.layer_idx]
    assert cache.past[0][0].shape == (2, shape[2], 7, shape[3])  # K heads, not H
    torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=1e-5, rtol=0)


def test_neighboring_query_heads_share():
    names = torch.arange(2.0).reshape(1, 2, 1, 1)
    assert repeat_kv(names, 3).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(repeat_kv(names, 1), names)
    one_head = names[:, :1]
    assert repeat_kv(one_head, 8).data_ptr() == one_head.data_ptr()  # no copy


def test_real_layer_has_the_checkpoints_shapes():
    with torch.device("meta"):
        layer = GemmaAttention(GemmaConfig(), layer_idx=3)
    assert {name: tuple(weight.shape) for name, weight in layer.named_parameters()} == {
        "q_proj.weight": (2048, 2048),
        "k_proj.weight": (256, 2048),
        "v_proj.weight": (256, 2048),
        "o_proj.weight": (2048, 2048),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_mask_that_is_not_boolean_is_refused(dtype):
    """SDPA would add a float mask to the scores, and hide nothing."""
    layer, states = attention((32, 4, 1, 8)), torch.randn(1, 3, 32)
    mask = causal_mask(1, 3).to(dtype)
    unchecked = inspect.unwrap(GemmaAttention.forward)  # without the tests' type checks
    message = re.escape(f"attention_mask is {dtype}, expected torch.bool: True where a")
    with pytest.raises(ValueError, match=message):
        unchecked(layer, states, *angles(8, 1, 3), mask)


@pytest.mark.parametrize("num_new, masked", [(1, True), (1, False), (3, False)])
@pytest.mark.parametrize("num_heads, kv_heads", [(6, 1), (6, 2), (4, 4)])
def test_queries_of_a_group_may_be_queries_of_one_head(
    num_heads, kv_heads, num_new, masked
):
    layer = attention((48, num_heads, kv_heads, 20))
    query_states = torch.randn(2, num_heads, num_new, 20)
    key_states, value_states = torch.randn(2, 2, kv_heads, 5, 20)
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 0, 1]]).bool()[:, None, None]
    states = query_states, key_states, value_states, mask if masked else None
    expected, _ = layer.attend(*states, output_attentions=True)
    output, _ = layer.attend(*states, output_attentions=False)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("output_attentions", [False, True])
def test_without_a_mask_every_token_attends_to_every_token(output_attentions):
    layer, states = attention((48, 6, 2, 20)), torch.randn(2, 7, 48)
    everything = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    expected, _ = layer(states, *angles(20, 2, 7), everything)
    options = dict(output_attentions=output_attentions)
    output, _ = layer(states, *angles(20, 2, 7), None, **options)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
