"""The vision tower: against transformers layer by layer, its properties, bad input."""

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from vlm.config import SiglipVisionConfig
from vlm.siglip import SiglipAttention, SiglipEncoderLayer, SiglipMLP, SiglipVisionModel

# Heads 8, 6 and 72 wide, MLPs wider and narrower than the stream, 4, 9, 49 patches.
SIZES = [
    dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=3, image_size=28, patch_size=14,
    ),
    dict(
        hidden_size=48, intermediate_size=30, num_hidden_layers=4,
        num_attention_heads=8, image_size=21, patch_size=7,
    ),
    dict(
        hidden_size=144, intermediate_size=538, num_hidden_layers=3,
        num_attention_heads=2, image_size=56, patch_size=8, layer_norm_eps=1e-3,
    ),
]  # fmt: skip


@torch.no_grad()
def pair(
    size: dict, attention: str = "eager"
) -> tuple[SiglipVisionModel, transformers.SiglipVisionModel]:
    """Our tower and transformers', with the same random weights, all biases too."""
    config = transformers.SiglipVisionConfig(
        **size, vision_use_head=False, attn_implementation=attention
    )
    theirs = transformers.SiglipVisionModel(config).eval()
    for weight in theirs.parameters():
        if weight.ndim == 1:
            weight.add_(0.2 * torch.randn_like(weight))
    ours = SiglipVisionModel(SiglipVisionConfig(**size)).eval()
    ours.vision_model.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def pictures(size: dict, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, size["image_size"], size["image_size"]) * 2 - 1


def check(ours: Tensor, theirs: Tensor) -> None:
    assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_same_as_transformers_layer_by_layer(size, attention):
    ours, theirs = pair(size, attention)
    batch = pictures(size)
    expected = theirs(batch, output_hidden_states=True)
    tower = ours.vision_model
    states = tower.embeddings(batch)
    check(states, expected.hidden_states[0])
    for layer, after in zip(
        tower.encoder.layers, expected.hidden_states[1:], strict=True
    ):
        states = layer(states)
        check(states, after)
    check(tower.post_layernorm(states), expected.last_hidden_state)
    check(ours(batch), expected.last_hidden_state)


def test_gradients_are_transformers():
    ours, theirs = pair(SIZES[0])
    batch = pictures(SIZES[0])
    target = torch.randn(2, 4, 24)
    (ours(batch) - target).square().mean().backward()
    (theirs(batch).last_hidden_state - target).square().mean().backward()
    ours_by_name = dict(ours.vision_model.named_parameters())
    for name, weight in theirs.named_parameters():
        check(ours_by_name[name].grad, weight.grad)


@torch.no_grad()
def test_attention_is_the_formula():
    config = SiglipVisionConfig(**SIZES[0])
    attention = SiglipAttention(config)
    states = torch.randn(2, 4, 24)
    queries, keys, values = (
        part(states) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    heads = []
    for head in range(3):
        mine = slice(8 * head, 8 * head + 8)
        scores = queries[..., mine] @ keys[..., mine].transpose(1, 2) / 8**0.5
        heads.append(scores.softmax(-1) @ values[..., mine])
    check(attention(states), attention.out_proj(torch.cat(heads, dim=-1)))


@torch.no_grad()
def test_mlp_activates_with_the_tanh_form():
    mlp = SiglipMLP(SiglipVisionConfig(**SIZES[0]))
    states = 3 * torch.randn(2, 4, 24)
    inner = mlp.fc1(states)
    activated = (
        inner
        / 2
        * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    )
    check(mlp(states), mlp.fc2(activated))
    assert (mlp(states) - mlp.fc2(F.gelu(inner))).abs().max() > 1e-5


@torch.no_grad()
def test_encoder_knows_no_order():
    """Shuffled patches give shuffled features: only position embeddings know places."""
    ours, _ = pair(SIZES[2])
    states = torch.randn(2, 49, 144)
    order = torch.randperm(49)
    straight = ours.vision_model.encoder(states)
    shuffled = ours.vision_model.encoder(states[:, order])
    check(shuffled, straight[:, order])


@torch.no_grad()
def test_one_layer_lets_every_patch_hear_every_pixel():
    """First patch to last and last to first: nothing is masked."""
    layer = SiglipEncoderLayer(SiglipVisionConfig(**SIZES[1]))
    states = torch.randn(1, 9, 48)
    for place in (0, 8):
        touched = states.clone()
        touched[0, place] += torch.randn(48)
        changed = (layer(touched) - layer(states)).abs().amax(-1)
        assert (changed > 1e-6).all()


@torch.no_grad()
def test_pictures_of_a_batch_do_not_mix():
    ours, _ = pair(SIZES[0])
    batch = pictures(SIZES[0], batch=3)
    check(ours(batch), torch.cat([ours(picture[None]) for picture in batch]))


@torch.no_grad()
def test_final_norm_is_applied():
    ours, _ = pair(SIZES[0])
    batch = pictures(SIZES[0])
    normed = ours(batch)
    ours.vision_model.post_layernorm = nn.Identity()
    assert (ours(batch) - normed).abs().max() > 0.1


def test_bfloat16_stays_bfloat16():
    model = SiglipVisionModel(SiglipVisionConfig(**SIZES[0])).to(torch.bfloat16)
    assert model(pictures(SIZES[0])).dtype == torch.bfloat16


def test_real_tower_has_its_published_size_and_no_head():
    with torch.device("meta"):
        model = SiglipVisionModel(SiglipVisionConfig())
    assert sum(p.numel() for p in model.parameters()) == 412_442_352
    assert not any("head" in name for name in model.state_dict())
    assert all(name.startswith("vision_model.") for name in model.state_dict())


def test_wrong_size_is_refused():
    model = SiglipVisionModel(SiglipVisionConfig(**SIZES[0]))
    with pytest.raises(ValueError, match=r"takes \[batch, 3, 28, 28\]"):
        model(torch.zeros(1, 3, 56, 56))
