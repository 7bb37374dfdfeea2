"""Patches: against transformers, against the loop that defines them, and bad input."""

import jaxtyping
import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers.models.siglip.modeling_siglip import (
    SiglipVisionEmbeddings as ReferenceEmbeddings,
)

from vlm.config import SiglipVisionConfig
from vlm.patch_embeddings import SiglipVisionEmbeddings

SIZES = [
    dict(image_size=28, patch_size=14, hidden_size=24, num_attention_heads=3),
    dict(image_size=56, patch_size=8, hidden_size=32, num_attention_heads=4),
    dict(image_size=42, patch_size=7, hidden_size=200, num_attention_heads=2),
    dict(
        image_size=16, patch_size=16, hidden_size=8, num_attention_heads=1,
        num_channels=1,
    ),  # one patch, gray
]  # fmt: skip


def pictures(config: SiglipVisionConfig, batch: int = 2) -> torch.Tensor:
    side = config.image_size
    return torch.rand(batch, config.num_channels, side, side) * 2 - 1


@torch.no_grad()
def by_loop(
    embeddings: SiglipVisionEmbeddings, pixel_values: torch.Tensor
) -> torch.Tensor:
    """The definition: cut, flatten, multiply, add the position; in reading order."""
    size = embeddings.config.patch_size
    matrix = embeddings.patch_embedding.weight.flatten(1)  # [D, C * P * P]
    vectors = []
    for y in range(0, pixel_values.shape[2], size):
        for x in range(0, pixel_values.shape[3], size):
            patch = pixel_values[:, :, y : y + size, x : x + size].flatten(1)
            vectors.append(patch @ matrix.T + embeddings.patch_embedding.bias)
    return torch.stack(vectors, dim=1) + embeddings.position_embedding.weight


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_same_as_transformers(size):
    config = SiglipVisionConfig(**size)
    reference = ReferenceEmbeddings(transformers.SiglipVisionConfig(**size))
    ours = SiglipVisionEmbeddings(config)
    ours.load_state_dict(reference.state_dict(), strict=True)
    batch = pictures(config)
    assert_close(ours(batch), reference(batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_same_as_the_loop(size):
    config = SiglipVisionConfig(**size)
    embeddings = SiglipVisionEmbeddings(config)
    batch = pictures(config)
    out = embeddings(batch)
    assert out.shape == (2, config.num_image_tokens, config.hidden_size)
    assert_close(out, by_loop(embeddings, batch), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_pixel_changes_its_own_patch_alone():
    config = SiglipVisionConfig(**SIZES[1])  # 7 × 7 patches of 8 px
    embeddings = SiglipVisionEmbeddings(config)
    before = pictures(config, batch=1)
    after = before.clone()
    after[0, 1, 17, 30] += 1.0  # row 2, column 3 of the grid
    changed = (embeddings(after) != embeddings(before)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [2 * 7 + 3]


@torch.no_grad()
def test_pictures_of_a_batch_do_not_mix():
    config = SiglipVisionConfig(**SIZES[0])
    embeddings = SiglipVisionEmbeddings(config)
    batch = pictures(config, batch=3)
    alone = torch.cat([embeddings(picture[None]) for picture in batch])
    assert_close(embeddings(batch), alone, atol=1e-5, rtol=0)


def test_pixels_take_the_dtype_of_the_weights():
    config = SiglipVisionConfig(**SIZES[0])
    embeddings = SiglipVisionEmbeddings(config).to(torch.bfloat16)
    assert embeddings(pictures(config)).dtype == torch.bfloat16


def test_gradients_reach_weights_positions_and_pixels():
    config = SiglipVisionConfig(**SIZES[0])
    embeddings = SiglipVisionEmbeddings(config)
    batch = pictures(config).requires_grad_()
    embeddings(batch).square().sum().backward()
    gradients = [p.grad for p in embeddings.parameters()] + [batch.grad]
    assert len(gradients) == 4 and all(g.abs().sum() > 0 for g in gradients)


def test_positions_are_no_part_of_a_checkpoint():
    names = set(SiglipVisionEmbeddings(SiglipVisionConfig(**SIZES[0])).state_dict())
    assert names == {
        "patch_embedding.weight",
        "patch_embedding.bias",
        "position_embedding.weight",
    }


@pytest.mark.parametrize("shape", [(2, 3, 56, 56), (2, 1, 28, 28), (2, 4, 28, 28)])
def test_wrong_size_is_refused(shape):
    embeddings = SiglipVisionEmbeddings(SiglipVisionConfig(**SIZES[0]))
    message = (
        rf"shape \[{', '.join(map(str, shape))}\], but this model takes "
        r"\[batch, 3, 28, 28\]"
    )
    with pytest.raises(ValueError, match=message):
        embeddings(torch.zeros(shape))


def test_bytes_are_refused(no_type_checks):
    embeddings = SiglipVisionEmbeddings(SiglipVisionConfig(**SIZES[0]))
    with pytest.raises(ValueError, match="uint8 .*takes .* floats"):
        embeddings(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(2, 28, 28, 3), (2, 3, 28, 14), (3, 28, 28)])
def test_shapes_that_the_signature_forbids(shape):
    """Color last, not square, no batch: the checked signature speaks first in tests."""
    embeddings = SiglipVisionEmbeddings(SiglipVisionConfig(**SIZES[0]))
    with pytest.raises(jaxtyping.TypeCheckError, match="pixel_values"):
        embeddings(torch.zeros(shape))
    unchecked = SiglipVisionEmbeddings.forward.__wrapped__  # as in normal use
    with pytest.raises(ValueError, match=r"takes \[batch, 3, 28, 28\]"):
        unchecked(embeddings, torch.zeros(shape))
