"""The decoder: the reference's logits in one pass, cached and padded; bad input."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma import modeling_gemma as reference

from vlm.config import GemmaConfig
from vlm.gemma import (
    GemmaForCausalLM,
    GemmaMLP,
    build_language_model,
)
from vlm.kv_cache import KVCache, StaticKVCache

BASE = dict(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=12,  # not hidden_size / num_attention_heads
    max_position_embeddings=64,
)
SHAPES = {
    "MQA": {},
    "GQA": dict(num_key_value_heads=2),
    "MHA": dict(num_key_value_heads=4, head_dim=8),
    "wide heads": dict(head_dim=40, num_attention_heads=2),
    "one layer, other base and eps": dict(
        num_hidden_layers=1, rope_theta=500.0, rms_norm_eps=1e-3
    ),
}
every_shape = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)


@torch.no_grad()
def make_pair(changes=None):
    """Ours and transformers', with the same random weights, in eval mode."""
    shape = BASE | (changes or {})
    theirs_shape = dict(shape)
    rope_theta = theirs_shape.pop("rope_theta", 10000.0)
    their_config = transformers.GemmaConfig(
        **theirs_shape,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        attn_implementation="eager",
    )
    theirs = reference.GemmaForCausalLM(their_config).eval()
    for name, weight in theirs.named_parameters():
        weight.normal_(std=0.2 if "norm" in name else weight.shape[-1] ** -0.5)
    ours = GemmaForCausalLM(GemmaConfig(**shape)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def random_ids(batch: int, num_tokens: int) -> torch.Tensor:
    return torch.randint(3, 53, (batch, num_tokens))


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@every_shape
@torch.no_grad()
def test_prefill_matches_transformers_layer_by_layer(changes):
    ours, theirs = make_pair(changes)
    input_ids = random_ids(2, 13)
    states = {}
    for i, layer in enumerate(ours.model.layers):
        layer.register_forward_hook(lambda _, __, out, i=i: states.update({i: out[0]}))
    logits = ours(input_ids)["logits"]
    expected = theirs(input_ids, output_hidden_states=True)
    assert_same(ours.model.embed(input_ids), expected.hidden_states[0])
    for i in range(len(states) - 1):  # the last one is theirs after the final norm
        assert_same(states[i], expected.hidden_states[i + 1])
    assert_same(logits, expected.logits)


@pytest.mark.parametrize("cache", ["chunk of 3", "chunk of 256", "static"])
@every_shape
@torch.no_grad()
def test_cached_decode_matches_transformers(changes, cache):
    ours, theirs = make_pair(changes)
    input_ids = random_ids(2, 14)
    kv_cache = {
        "chunk of 3": lambda: KVCache(chunk=3),
        "chunk of 256": KVCache,
        "static": lambda: StaticKVCache(ours.config, 2, max_length=20),
    }[cache]()
    expected_cache = transformers.DynamicCache()
    for new in (input_ids[:, :8], *input_ids[:, 8:].split(1, dim=1)):
        outputs = ours(new, kv_cache=kv_cache)
        expected = theirs(new, past_key_values=expected_cache, use_cache=True)
        assert_same(outputs["logits"], expected.logits)
        assert outputs["kv_cache"] is kv_cache
    assert kv_cache.num_items() == 14


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@every_shape
@torch.no_grad()
def test_ragged_rows_equal_rows_alone(changes, side, static):
    """Padded prefill and two decode steps, against transformers on each row alone."""
    ours, theirs = make_pair(changes)
    rows = [random_ids(1, length)[0] for length in (9, 1, 6)]
    new_ids = random_ids(3, 2)
    input_ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        place = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        input_ids[i, place], mask[i, place] = row, 1
    kv_cache = StaticKVCache(ours.config, 3, 16) if static else KVCache(chunk=4)
    logits = [ours(input_ids, attention_mask=mask, kv_cache=kv_cache)["logits"]]
    whole_mask = mask
    for step in range(2):
        whole_mask = torch.cat([whole_mask, whole_mask.new_ones(3, 1)], dim=1)
        new = new_ids[:, step : step + 1]
        outputs = ours(new, attention_mask=whole_mask, kv_cache=kv_cache)
        logits.append(outputs["logits"])
    logits = torch.cat(logits, dim=1)
    assert logits.isfinite().all()
    for i, row in enumerate(rows):
        alone = theirs(torch.cat([row, new_ids[i]])[None]).logits[0]
        assert_same(logits[i][whole_mask[i].bool()], alone)


@torch.no_grad()
def test_mlp_matches_transformers():
    config = transformers.GemmaConfig(hidden_size=10, intermediate_size=14)
    theirs = reference.GemmaMLP(config)
    ours = GemmaMLP(GemmaConfig(hidden_size=10, intermediate_size=14))
    ours.load_state_dict(theirs.state_dict())
    states = 3 * torch.randn(2, 5, 10)
    assert_same(ours(states), theirs(states))


@torch.no_grad()
def test_gradients_match_transformers():
    ours, theirs = make_pair()
    input_ids = random_ids(2, 10)
    with torch.enable_grad():
        for logits in (ours(input_ids)["logits"], theirs(input_ids).logits):
            targets = input_ids[:, 1:].flatten()
            F.cross_entropy(logits[:, :-1].flatten(0, 1), targets).backward()
    expected = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        assert_same(weight.grad, expected[name].grad)


@torch.no_grad()
def test_no_token_sees_a_later_one():
    ours, _ = make_pair()
    input_ids = random_ids(1, 12)
    changed = input_ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 53
    moved = (ours(input_ids)["logits"] - ours(changed)["logits"]).abs().amax(dim=-1)[0]
    assert moved[:7].max() < 1e-5 < moved[7:].min()


@torch.no_grad()
def test_scale_is_rounded_to_the_embedding_dtype():
    """√2048 is 45.2548…, and 45.25 in bfloat16; the product rounds once more."""
    sizes = dict(vocab_size=7, hidden_size=2048, num_hidden_layers=0)
    model = GemmaForCausalLM(GemmaConfig(**sizes)).bfloat16().model
    input_ids = torch.arange(1, 7)[None]
    expected = (model.embed_tokens.weight[1:].float() * 45.25).bfloat16()
    assert model.embed(input_ids)[0].equal(expected)
    assert model.embed(input_ids).dtype == torch.bfloat16
    in_float32 = model.float().embed(input_ids)[0]
    assert_same(in_float32, model.embed_tokens.weight[1:] * 2048**0.5)


@torch.no_grad()
def test_inputs_embeds_are_taken_as_they_are():
    ours, _ = make_pair()
    input_ids = random_ids(2, 6)
    embeds = ours.model.embed(input_ids)
    logits = ours(inputs_embeds=embeds)["logits"]
    assert logits.equal(ours(input_ids)["logits"])


@torch.no_grad()
def test_head_and_embedding_are_one_matrix():
    ours, _ = make_pair()
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    ours.lm_head.weight = nn.Parameter(torch.zeros(53, 32))
    ours.tie_weights()
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.lm_head.weight.any()


@pytest.mark.parametrize("n", [1, 3, 9])
@torch.no_grad()
def test_logits_to_keep(n):
    ours, _ = make_pair()
    input_ids = random_ids(2, 9)
    kept = ours(input_ids, logits_to_keep=n)["logits"]
    assert_same(kept, ours(input_ids)["logits"][:, -n:])


@torch.no_grad()
def test_attentions_are_distributions_and_change_nothing():
    ours, _ = make_pair()
    input_ids = random_ids(2, 9)
    outputs = ours(input_ids, output_attentions=True)
    plain = ours(input_ids)
    assert "attentions" not in plain
    assert_same(outputs["logits"], plain["logits"])
    assert [a.shape for a in outputs["attentions"]] == [(2, 4, 9, 9)] * 3
    for weights in outputs["attentions"]:
        assert_same(weights.sum(dim=-1), torch.ones(2, 4, 9))
        assert not weights.triu(1).any()


@torch.no_grad()
def test_a_mask_of_one_for_each_pair_is_obeyed():
    """All True is bidirectional: then a change at the end moves the beginning."""
    ours, _ = make_pair()
    input_ids, positions = random_ids(1, 6), torch.arange(6)[None]
    everyone = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    causal = everyone.tril()
    expected = ours(input_ids)["logits"]
    both = dict(position_ids=positions)
    assert_same(ours(input_ids, attention_mask=causal, **both)["logits"], expected)
    seen = ours(input_ids, attention_mask=everyone, **both)["logits"]
    assert (seen - expected)[:, 0].abs().max() > 1e-2


@torch.no_grad()
def test_a_shift_of_all_positions_changes_nothing():
    ours, _ = make_pair()
    input_ids, positions = random_ids(1, 10), torch.arange(10)[None]
    shifted = ours(input_ids, position_ids=positions + 5)["logits"]
    assert_same(shifted, ours(input_ids)["logits"])


@torch.no_grad()
def test_float_and_bool_tables_are_fine():
    """The mask turns float when people append torch.ones to it."""
    ours, _ = make_pair()
    input_ids = random_ids(1, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    expected = ours(input_ids, attention_mask=mask)["logits"]
    for other in (mask.float(), mask.bool()):
        assert ours(input_ids, attention_mask=other)["logits"].equal(expected)


def test_real_model_has_gemma_2b_parameters():
    with torch.device("meta"):
        model = build_language_model(GemmaConfig())
    assert isinstance(model, GemmaForCausalLM)
    assert sum(weight.numel() for weight in model.parameters()) == 2_508_662_784


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        (
            dict(input_ids=random_ids(1, 3), inputs_embeds=torch.zeros(1, 3, 32)),
            "exactly one of input_ids and inputs_embeds",
        ),
        (
            dict(input_ids=random_ids(2, 5), attention_mask=torch.ones(2, 4)),
            r"mask is \[2, 4\], expected \[2, 5\]: 0 tokens in the cache and 5",
        ),
        (
            dict(input_ids=random_ids(2, 5), attention_mask=torch.ones(1, 5)),
            r"mask is \[1, 5\], expected \[2, 5\]",
        ),
        (
            dict(
                input_ids=random_ids(1, 5),
                attention_mask=torch.ones(1, 1, 4, 5, dtype=torch.bool),
            ),
            r"mask is \[1, 1, 4, 5\], expected \[1, 1, 5, 5\]",
        ),
        (
            dict(
                input_ids=random_ids(1, 5),
                attention_mask=torch.zeros(1, 1, 5, 5),
                position_ids=torch.arange(5)[None],
            ),
            "mask is torch.float32, expected torch.bool",
        ),
        (
            dict(
                input_ids=random_ids(1, 5),
                attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool),
            ),
            "position_ids must be int64",
        ),
        (
            dict(input_ids=random_ids(2, 5), position_ids=torch.zeros(2, 1).long()),
            "position_ids must be int64",
        ),
        (dict(input_ids=random_ids(1, 5), logits_to_keep=-1), "logits_to_keep"),
        (
            dict(input_ids=random_ids(1, 65)),
            "65 tokens, but the model has 64 positions",
        ),
    ],
)
def test_bad_inputs_are_refused(inputs, message, no_type_checks):
    with pytest.raises(ValueError, match=message):
        make_pair()[0](**inputs)


@pytest.mark.parametrize("input_ids", [torch.rand(1, 5), torch.arange(5), [[1, 2]]])
def test_ids_of_another_kind_are_refused(input_ids, no_type_checks):
    with pytest.raises(ValueError, match="input_ids must be int64"):
        make_pair()[0](input_ids)


def test_bad_decode_steps_are_refused():
    ours, _ = make_pair()
    kv_cache = StaticKVCache(ours.config, 1, max_length=60)
    with torch.no_grad():
        ours(random_ids(1, 60), kv_cache=kv_cache)
        with pytest.raises(ValueError, match="60 tokens in the cache and 1 new"):
            ours(random_ids(1, 1), attention_mask=torch.ones(1, 1), kv_cache=kv_cache)
        with pytest.raises(ValueError, match="holds 60 tokens, but 61 are needed"):
            ours(random_ids(1, 1), kv_cache=kv_cache)
        with pytest.raises(ValueError, match="65 tokens, but the model has 64"):
            ours(random_ids(1, 5), kv_cache=kv_cache)
    assert kv_cache.num_items() == 60
