"""Rotary positions: the reference's numbers, and nothing but offsets in the scores."""

import pytest
import torch
from torch import Tensor
from transformers import GemmaConfig as ReferenceConfig
from transformers.models.gemma import modeling_gemma as reference

from vlm.rope import GemmaRotaryEmbedding, apply_rotary_pos_emb, rotate_half


def turned(
    query_states: Tensor, key_states: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor]:
    cos, sin = GemmaRotaryEmbedding(query_states.shape[-1])(query_states, position_ids)
    return apply_rotary_pos_emb(query_states, key_states, cos, sin)


def scores(query_states: Tensor, key_states: Tensor, position_ids: Tensor) -> Tensor:
    queries, keys = turned(query_states, key_states, position_ids)
    return queries @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim, base", [(2, 1e4), (12, 1e4), (64, 5e5), (256, 1e4)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (4, 2), (3, 3)])
def test_matches_transformers(dim, base, heads, kv_heads, dtype):
    """Over all 8192 positions: speeds computed in another order fail at the far end."""
    config = ReferenceConfig(head_dim=dim)
    config.rope_parameters = {"rope_type": "default", "rope_theta": base}
    query_states = torch.randn(2, heads, 9, dim).to(dtype)
    key_states = torch.randn(2, kv_heads, 9, dim).to(dtype)
    position_ids = torch.randint(0, 8192, (2, 9))
    position_ids[0, 0] = 8191
    ours = GemmaRotaryEmbedding(dim, base)(query_states, position_ids)
    theirs = reference.GemmaRotaryEmbedding(config)(query_states, position_ids)
    assert ours[0].dtype == ours[1].dtype == dtype
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        apply_rotary_pos_emb(query_states, key_states, *ours),
        reference.apply_rotary_pos_emb(query_states, key_states, *theirs),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_is_multiplication_by_unit_complex_numbers(dim):
    states = torch.randn(1, 3, 20, dim)
    first, second = states.chunk(2, dim=-1)
    speeds = 10000.0 ** (-torch.arange(dim // 2).double() * 2 / dim)
    angles = torch.arange(20)[:, None] * speeds
    expected = torch.complex(first, second) * torch.exp(1j * angles)
    expected = torch.cat([expected.real, expected.imag], dim=-1).float()
    queries, _ = turned(states, states, torch.arange(20)[None])
    torch.testing.assert_close(queries, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [1, 7, 100])
def test_of_positions_scores_depend_on_the_offset_alone(shift):
    query_states, key_states = torch.randn(2, 4, 12, 64), torch.randn(2, 2, 12, 64)
    query_states = query_states[:, ::2]  # as many heads as keys, for the product
    positions = torch.arange(12).expand(2, 12)
    torch.testing.assert_close(
        scores(query_states, key_states, positions + shift),
        scores(query_states, key_states, positions),
        atol=1e-5,
        rtol=0,
    )


def test_scores_do_depend_on_the_offset():
    states = torch.randn(1, 1, 2, 64)
    near = scores(states, states, torch.tensor([[0, 1]]))
    far = scores(states, states, torch.tensor([[0, 9]]))
    assert (near - far).abs().max() > 0.1


def test_the_sign_of_the_offset_counts():
    """The same two tokens, as far apart, in the other order."""
    states = torch.randn(1, 1, 2, 64)
    before, after = (
        scores(states, states, torch.tensor([positions]))[0, 0, 0, 1]
        for positions in ([0, 3], [3, 0])
    )
    assert (before - after).abs() > 0.1


def test_rows_have_positions_of_their_own():
    states = torch.randn(2, 1, 3, 8)
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
    together, _ = turned(states, states, positions)
    for row in range(2):
        alone, _ = turned(*[states[row : row + 1]] * 2, positions[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)


def test_lengths_and_position_zero_stay():
    states = torch.randn(1, 2, 5, 16)
    queries, _ = turned(states, states, torch.tensor([[0, 1, 50, 1000, 8191]]))
    torch.testing.assert_close(queries.norm(dim=-1), states.norm(dim=-1))
    assert torch.equal(queries[:, :, 0], states[:, :, 0])


def test_angles_are_float32_in_a_bfloat16_model():
    """In bfloat16, 1000, 1001 and 1002 are one number."""
    states = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
    positions = torch.tensor([[1000, 1001, 1002, 8190, 8191]])
    cos, _ = GemmaRotaryEmbedding(64)(states, positions)
    exact, _ = GemmaRotaryEmbedding(64)(states.float(), positions)
    assert torch.equal(cos, exact.bfloat16())
    assert len(cos[0].unique(dim=0)) == 5


def test_rotate_half():
    assert rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [-3, -4, 1, 2]


def test_has_no_parameters():
    rotary = GemmaRotaryEmbedding(8)
    assert not list(rotary.parameters()) and not rotary.state_dict()


@pytest.mark.parametrize("dim", [1, 7])
def test_odd_width_is_refused(dim):
    with pytest.raises(ValueError, match=f"dim={dim} must be even: RoPE rotates pairs"):
        GemmaRotaryEmbedding(dim)
