"""The projector: one linear map, each patch alone, nothing scaled."""

import pytest
import torch
import transformers
from transformers.models.paligemma.modeling_paligemma import (
    PaliGemmaMultiModalProjector as ReferenceProjector,
)

from vlm.config import PaliGemmaConfig
from vlm.projector import PaliGemmaMultiModalProjector


def make_config(vision_width: int, text_width: int) -> PaliGemmaConfig:
    return PaliGemmaConfig(
        vision_config=dict(hidden_size=vision_width, num_attention_heads=4),
        text_config=dict(hidden_size=text_width),
        projection_dim=text_width,
    )


@pytest.mark.parametrize("num_image_tokens", [1, 4, 256])
@pytest.mark.parametrize("widths", [(24, 40), (40, 24), (32, 32), (1152, 2048)])
@torch.no_grad()
def test_matches_transformers(widths, num_image_tokens):
    config = make_config(*widths)
    theirs = ReferenceProjector(
        transformers.PaliGemmaConfig.from_dict(config.to_dict())
    )
    ours = PaliGemmaMultiModalProjector(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    features = torch.randn(2, num_image_tokens, widths[0])
    torch.testing.assert_close(ours(features), theirs(features), atol=1e-5, rtol=0)


@torch.no_grad()
def test_is_the_linear_map_and_no_more():
    """No activation, no factor √D: negative numbers and sizes come out as computed."""
    projector = PaliGemmaMultiModalProjector(make_config(24, 40))
    features = torch.randn(2, 9, 24).double()
    weight, bias = (p.double() for p in projector.parameters())
    expected = torch.einsum("bnv,dv->bnd", features, weight) + bias
    actual = projector.double()(features)
    torch.testing.assert_close(actual, expected)
    assert (actual < 0).any()


@torch.no_grad()
def test_each_patch_goes_alone():
    projector = PaliGemmaMultiModalProjector(make_config(24, 40))
    features, shuffle = torch.randn(2, 9, 24), torch.randperm(9)
    shuffled = projector(features[:, shuffle])
    torch.testing.assert_close(
        shuffled, projector(features)[:, shuffle], atol=1e-5, rtol=0
    )


def test_real_size():
    with torch.device("meta"):
        projector = PaliGemmaMultiModalProjector(PaliGemmaConfig())
    assert {name: tuple(p.shape) for name, p in projector.named_parameters()} == {
        "linear.weight": (2048, 1152),
        "linear.bias": (2048,),
    }
