"""Root mean square norm: the reference's numbers in two formats, and its properties."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm as ReferenceNorm

from vlm.rmsnorm import GemmaRMSNorm


def norm_pair(
    dim: int, eps: float, dtype: torch.dtype = torch.float32
) -> tuple[GemmaRMSNorm, ReferenceNorm]:
    """Ours and transformers', with the same random weight."""
    ours, theirs = GemmaRMSNorm(dim, eps), ReferenceNorm(dim, eps)
    weight = 0.3 * torch.randn(dim)
    for norm in (ours, theirs):
        norm.to(dtype).load_state_dict({"weight": weight}, strict=True)
    return ours, theirs


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
@pytest.mark.parametrize("dim", [1, 6, 48, 2048])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_matches_transformers(dim, eps, scale):
    ours, theirs = norm_pair(dim, eps)
    states = scale * torch.randn(2, 5, dim)
    torch.testing.assert_close(ours(states), theirs(states), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_bit_for_bit_the_reference(dtype):
    """Fails when the product with (1 + weight) is rounded early or made in `dtype`."""
    ours, theirs = norm_pair(512, 1e-6, dtype)
    states = torch.randn(4, 7, 512).to(dtype)
    output = ours(states)
    assert output.dtype == dtype
    torch.testing.assert_close(output, theirs(states), atol=0, rtol=0)


def test_small_weights_survive_bfloat16():
    norm = GemmaRMSNorm(4).bfloat16()
    states = torch.tensor([[300.0, 301.0, 302.0, 303.0]])  # RMS 301.5
    with torch.no_grad():
        norm.weight.fill_(0.003)  # 1 + 0.003 is 1 in bfloat16
    grown = norm(states)
    assert grown.dtype == torch.float32
    torch.testing.assert_close(
        grown / GemmaRMSNorm(4)(states), torch.full((1, 4), 1.003)
    )


def test_gradients_match_transformers():
    ours, theirs = norm_pair(24, 1e-6)
    grads = []
    states = torch.randn(3, 24)
    for norm in (ours, theirs):
        inputs = states.clone().requires_grad_()
        norm(inputs).square().sum().backward()
        grads.append((inputs.grad, norm.weight.grad))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-5)


def test_new_norm_gives_unit_size_whatever_the_scale():
    norm = GemmaRMSNorm(64)
    states = torch.randn(3, 64)
    output = norm(states)
    torch.testing.assert_close(output.square().mean(-1), torch.ones(3))
    torch.testing.assert_close(norm(1000 * states), output)


def test_zeros_stay_zeros():
    assert torch.equal(GemmaRMSNorm(8)(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_is_layer_norm_without_centering():
    states = torch.randn(5, 32)
    centered = states - states.mean(-1, keepdim=True)
    expected = nn.functional.layer_norm(states, (32,), eps=1e-6)
    torch.testing.assert_close(GemmaRMSNorm(32)(centered), expected)


def test_tokens_do_not_mix():
    norm = GemmaRMSNorm(16)
    states = torch.randn(2, 4, 16)
    changed = states.clone()
    changed[1, 2] *= -7
    same = torch.ones(2, 4, dtype=torch.bool)
    same[1, 2] = False
    assert torch.equal(norm(states)[same], norm(changed)[same])
    assert torch.equal(norm(states)[0], norm(states[0]))  # any leading axes
