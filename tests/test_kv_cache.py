"""The caches: nobody can tell from the outputs that they are there."""

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import (
    GemmaAttention as ReferenceAttention,
)

from vlm.attention import GemmaAttention
from vlm.config import GemmaConfig
from vlm.kv_cache import KVCache, StaticKVCache
from vlm.rope import GemmaRotaryEmbedding

NUM_LAYERS = 2


def tiny_config(num_key_value_heads: int = 1) -> GemmaConfig:
    return GemmaConfig(
        hidden_size=20,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        head_dim=6,
    )


def random_states(batch: int, heads: int, num_tokens: int, width: int) -> Tensor:
    return torch.randn(batch, heads, num_tokens, width)


@torch.no_grad()
def run(layers, hidden_states, pieces, kv_cache) -> Tensor:
    """Outputs of attention layers fed piece by piece; without a cache, all at once."""
    rotary = GemmaRotaryEmbedding(layers[0].head_dim)
    batch, outputs = len(hidden_states), []
    for start, end in pieces:
        states = hidden_states[:, start:end]
        cos, sin = rotary(states, torch.arange(start, end).expand(batch, -1))
        mask = torch.ones(end, end, dtype=torch.bool).tril()[start:]
        if kv_cache is not None:
            mask = F.pad(mask, (0, kv_cache.key_length(end - start) - end))
        mask = mask.expand(batch, 1, *mask.shape)
        for layer in layers:
            states = states + layer(states, cos, sin, mask, kv_cache)[0]
        outputs.append(states)
    return torch.cat(outputs, dim=1)


PIECES = {
    "one by one": [(t, t + 1) for t in range(11)],
    "prefill, then one by one": [(0, 6), *((t, t + 1) for t in range(6, 11))],
    "several at once": [(0, 3), (3, 8), (8, 11)],
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("kind", ["chunk 1", "chunk 4", "chunk 256", "static", "exact"])
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_same_outputs_with_and_without(num_key_value_heads, kind, pieces):
    config = tiny_config(num_key_value_heads)
    layers = [GemmaAttention(config, i) for i in range(NUM_LAYERS)]
    hidden_states = torch.randn(3, 11, config.hidden_size)
    kv_cache = {
        "chunk 1": lambda: KVCache(chunk=1),
        "chunk 4": lambda: KVCache(chunk=4),
        "chunk 256": KVCache,
        "static": lambda: StaticKVCache(config, 3, max_length=17),
        "exact": lambda: StaticKVCache(config, 3, max_length=11),
    }[kind]()
    expected = run(layers, hidden_states, [(0, 11)], None)
    actual = run(layers, hidden_states, pieces, kv_cache)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert kv_cache.num_items() == 11


@pytest.mark.parametrize("num_key_value_heads", [1, 2])
def test_matches_transformers(num_key_value_heads):
    config = tiny_config(num_key_value_heads)
    their_config = transformers.GemmaConfig(
        hidden_size=20,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        head_dim=6,
        attn_implementation="sdpa",
    )
    ours, theirs = GemmaAttention(config, 0), ReferenceAttention(their_config, 0)
    theirs.load_state_dict(ours.state_dict())
    our_cache, their_cache = KVCache(chunk=4), transformers.DynamicCache()
    rotary = GemmaRotaryEmbedding(config.head_dim)
    for start, end in PIECES["prefill, then one by one"]:
        states = torch.randn(2, end - start, 20)
        cos, sin = rotary(states, torch.arange(start, end).expand(2, -1))
        mask = torch.ones(end, end, dtype=torch.bool).tril()[start:]
        mask = mask.expand(2, 1, *mask.shape)
        with torch.no_grad():
            actual, _ = ours(states, cos, sin, mask, our_cache)
            expected, _ = theirs(states, (cos, sin), mask, past_key_values=their_cache)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert our_cache.num_items() == their_cache.get_seq_length() == 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_remembers_exactly_what_came_in(chunk, dtype):
    kv_cache, keys, values = KVCache(chunk), [], []
    for num_new in (5, 1, 1, 4, 1):
        keys.append(random_states(2, 3, num_new, 4).to(dtype))
        values.append(random_states(2, 3, num_new, 4).to(dtype))
        got = kv_cache.update(keys[-1], values[-1], layer_idx=0)
        assert got[0].equal(torch.cat(keys, dim=2))
        assert got[1].equal(torch.cat(values, dim=2))
        assert got[0].dtype == dtype


def test_grows_in_chunks_and_returns_views():
    """Between two growths nothing is copied: the buffer stays where it is."""
    kv_cache, addresses = KVCache(chunk=4), []
    for _ in range(12):
        state = random_states(1, 1, 1, 2)
        keys, values = kv_cache.update(state, state, layer_idx=0)
        addresses.append((keys.data_ptr(), values.data_ptr()))
    held = [addresses[i] == addresses[i - 1] for i in range(1, 12)]
    assert held == [i % 4 != 0 for i in range(1, 12)]
    assert keys.shape == values.shape == (1, 1, 12, 2)


def test_static_shapes_and_addresses_never_change():
    kv_cache = StaticKVCache(tiny_config(), 2, max_length=8)
    seen = set()
    for num_new in (3, 1, 1, 3):
        state = random_states(2, 1, num_new, 6)
        for layer_idx in range(NUM_LAYERS):
            keys, values = kv_cache.update(state, state, layer_idx)
        if num_new == 3 and not seen:  # the first pass: its own tokens
            assert keys is state and values is state
            continue
        seen.add((keys.shape, keys.data_ptr(), kv_cache.position.data_ptr()))
    assert len(seen) == 1
    assert keys.shape == (2, 1, 8, 6)
    assert kv_cache.position.tolist() == [8]


def test_static_empty_places_are_zero():
    """A masked NaN times zero would be NaN."""
    kv_cache = StaticKVCache(tiny_config(), 1, max_length=64)
    state = random_states(1, 1, 3, 6)
    for new in (state, state[:, :, :1]):
        for layer_idx in range(NUM_LAYERS):
            keys, values = kv_cache.update(new, new, layer_idx)
    expected = torch.cat([state, state[:, :, :1]], dim=2)
    assert keys[:, :, :4].equal(expected) and values[:, :, :4].equal(expected)
    assert not keys[:, :, 4:].any() and not values[:, :, 4:].any()
    assert kv_cache.filled().tolist() == [True] * 5 + [False] * 59


@pytest.mark.parametrize("make", [KVCache, lambda: StaticKVCache(tiny_config(), 1, 9)])
def test_keys_and_values_may_come_in_another_format(make):
    """In autocast, keys come out of the rotation in float32, values in bfloat16."""
    kv_cache = make()
    state = random_states(1, 1, 4, 6)
    for states in (state, state[:, :, :1].bfloat16()):
        keys, values = kv_cache.update(states, states, layer_idx=0)
        kv_cache.update(states, states, layer_idx=1)
    torch.testing.assert_close(keys[:, :, 4], state[:, :, 0], atol=1e-2, rtol=1e-2)


def test_static_dtype():
    kv_cache = StaticKVCache(tiny_config(), 1, 4, dtype=torch.bfloat16)
    state = random_states(1, 1, 1, 6).bfloat16()
    keys, values = kv_cache.update(state, state, layer_idx=1)
    assert keys.dtype == values.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "make", [KVCache, lambda: StaticKVCache(tiny_config(), 1, max_length=9)]
)
def test_counts(make):
    """num_items moves when the last layer has its tokens; key_length looks ahead."""
    kv_cache = make()
    is_static = isinstance(kv_cache, StaticKVCache)
    assert kv_cache.num_items() == 0
    assert kv_cache.key_length(4) == 4
    state = random_states(1, 1, 4, 6)
    for layer_idx in range(NUM_LAYERS):
        kv_cache.update(state, state, layer_idx)
    assert kv_cache.num_items() == 4
    assert kv_cache.key_length(1) == (9 if is_static else 5)
    kv_cache.update(state[:, :, :1], state[:, :, :1], layer_idx=0)
    assert kv_cache.num_items() == 4  # the pass isn't over
    kv_cache.update(state[:, :, :1], state[:, :, :1], layer_idx=1)
    assert kv_cache.num_items() == 5


def test_static_refuses_too_many_tokens():
    kv_cache = StaticKVCache(tiny_config(), 1, max_length=4)
    state = random_states(1, 1, 4, 6)
    for layer_idx in range(NUM_LAYERS):
        kv_cache.update(state, state, layer_idx)
    message = r"holds 4 tokens, but 5 are needed: make it with max_length=5 or more"
    with pytest.raises(ValueError, match=message):
        kv_cache.key_length(1)
    # One token into no room: a plain assignment would broadcast it away in silence.
    with pytest.raises(IndexError, match="out of bounds"):
        kv_cache.update(state[:, :, :1], state[:, :, :1], layer_idx=0)
    assert kv_cache.num_items() == 4


@pytest.mark.parametrize(
    "make", [KVCache, lambda: StaticKVCache(tiny_config(2), 3, max_length=9)]
)
@pytest.mark.parametrize("shape", [(1, 2, 6), (3, 1, 6), (3, 2, 1)])
def test_refuses_another_batch(make, shape):
    """Each of these would broadcast into the buffer without an error."""
    kv_cache, batch_heads_width = make(), (3, 2, 6)
    state = random_states(3, 2, 4, 6)
    kv_cache.update(state, state, layer_idx=0)
    other = random_states(shape[0], shape[1], 1, shape[2])
    with pytest.raises(ValueError, match="serves one batch of one model") as error:
        kv_cache.update(other, other, layer_idx=0)
    assert str(batch_heads_width) in str(error.value) and str(shape) in str(error.value)
