"""PaliGemma 2: the reference's numbers, with caps, four norms and windows that bite."""

import json
import sys

import pytest
import torch
import transformers
from PIL import Image
from reference import (
    assert_same_training,
    close,
    pair,
    random_inputs,
    randomize,
    tiny_config,
    to_our_names,
)
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers.models.gemma2 import modeling_gemma2 as reference

from vlm.config import Gemma2Config, GemmaConfig, PaliGemmaConfig
from vlm.gemma import GemmaForCausalLM, build_language_model
from vlm.gemma2 import Gemma2ForCausalLM, soft_cap
from vlm.inference import main
from vlm.kv_cache import KVCache, StaticKVCache
from vlm.masks import make_attn_mask, sliding_window_mask
from vlm.paligemma import PaliGemmaForConditionalGeneration
from vlm.processing import PaliGemmaProcessor
from vlm.sampling import generate, generate_tokens
from vlm.weights import load_hf_model, save_hf_model

# Caps so low that they bend the small random model's numbers.
BASE = dict(
    model_type="gemma2",
    num_hidden_layers=4,
    num_key_value_heads=2,
    query_pre_attn_scalar=7,
    attn_logit_softcapping=1.5,
    final_logit_softcapping=2.0,
    sliding_window=4,
)
CHANGES = {
    "window of 4": {},
    "window of 2, one wide key/value head": dict(
        sliding_window=2, num_key_value_heads=1, head_dim=40
    ),
    "the caps of the real model, a window longer than the row": dict(
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=64
    ),
    "no caps, windows where the file says": dict(
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        layer_types=["full_attention"] * 2 + ["sliding_attention"] * 2,
    ),
    "no window": dict(sliding_window=None, layer_types=["full_attention"] * 4),
    "28B: narrow heads, a scale of hidden / heads": dict(
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=2,
        query_pre_attn_scalar=4,
    ),
}


def gemma2_config(**changes) -> PaliGemmaConfig:
    return tiny_config(text=BASE | changes)


@pytest.fixture(params=CHANGES, scope="module")
def models(request):
    torch.manual_seed(0)
    return pair(gemma2_config(**CHANGES[request.param]))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return pair(gemma2_config())[0]


def make_cache(model, kind, batch):
    if kind == "static":
        return StaticKVCache(model.config.text_config, batch, 40)
    return KVCache(chunk=3)


both_caches = pytest.mark.parametrize("kind", ["dynamic", "static"])
both_sides = pytest.mark.parametrize("padding", ["left", "right"])


# --- Parity with transformers -------------------------------------------------------


@both_sides
@torch.no_grad()
def test_prefill_and_answer_logits(models, padding):
    ours, theirs = models
    for suffixes in (None, (2, 7, 1)):
        inputs = random_inputs(ours.config, (5, 1, 3), suffixes, padding)
        real = inputs["attention_mask"].bool()
        close(ours(**inputs)["logits"][real], theirs(**inputs).logits[real])


@both_caches
@torch.no_grad()
def test_cached_decode_token_by_token(models, kind):
    ours, theirs = models
    inputs = random_inputs(ours.config, (5, 1, 3))
    cache = make_cache(ours, kind, 3)
    theirs_cache = transformers.DynamicCache(config=theirs.config.text_config)
    here = ours(**inputs, kv_cache=cache)["logits"]
    there = theirs(**inputs, past_key_values=theirs_cache, use_cache=True).logits
    mask = inputs["attention_mask"]
    for token in torch.randint(4, 120, (3, 7)).split(1, dim=1):
        close(here[:, -1], there[:, -1])
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        here = ours(token, attention_mask=mask, kv_cache=cache)["logits"]
        there = theirs(token, attention_mask=mask, past_key_values=theirs_cache).logits
    close(here[:, -1], there[:, -1])


@both_sides
def test_training_loss_and_gradients(models, padding):
    ours, theirs = models
    inputs = random_inputs(ours.config, (5, 1, 3), (2, 7, 1), padding)
    assert_same_training(ours, theirs, inputs)
    assert any(p.grad.abs().max() > 1e-3 for p in ours.vision_tower.parameters())


@both_caches
def test_greedy_tokens(models, tokenizer, kind):
    ours, theirs = models
    inputs = random_inputs(ours.config, (5, 1, 3))
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.suppress_tokens = [ours.config.image_token_index]
    expected = theirs.generate(**inputs, max_new_tokens=10, do_sample=False)[:, -10:]
    del inputs["token_type_ids"]
    rows = generate_tokens(ours, tokenizer, inputs, max_new_tokens=10, cache=kind)
    for row, wanted in zip(rows, expected.tolist()):
        assert row.token_ids == wanted[: len(row.token_ids)]  # ours ends at <eos>
    assert max(len(row.token_ids) for row in rows) == 10


@torch.no_grad()
def test_attentions(models):
    ours, theirs = models
    inputs = random_inputs(ours.config, (5, 1, 3), (2, 7, 1))
    real = inputs["attention_mask"].bool()
    outputs = ours(**inputs, output_attentions=True)
    there = theirs(**inputs, output_attentions=True).attentions
    assert len(outputs["attentions"]) == len(there) == 4
    for weights, expected in zip(outputs["attentions"], there):
        close(weights.transpose(1, 2)[real], expected.transpose(1, 2)[real])
    close(outputs["logits"], ours(**inputs)["logits"])


@torch.no_grad()
def test_the_decoder_alone_is_causal_and_transformers():
    shape = dict(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        query_pre_attn_scalar=7,
        sliding_window=5,
        max_position_embeddings=64,
    )
    theirs = reference.Gemma2ForCausalLM(
        transformers.Gemma2Config(**shape, attn_implementation="eager")
    )
    randomize(theirs).eval()
    ours = build_language_model(Gemma2Config(**shape)).eval()
    assert isinstance(ours, Gemma2ForCausalLM)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    input_ids = torch.randint(3, 53, (2, 13))
    close(ours(input_ids)["logits"], theirs(input_ids).logits)
    states = []
    for layer in ours.model.layers[:-1]:
        layer.register_forward_hook(lambda _, __, output: states.append(output[0]))
    ours(input_ids)
    expected = theirs(input_ids, output_hidden_states=True).hidden_states[1:-1]
    for state, wanted in zip(states, expected, strict=True):
        close(state, wanted)


# --- Each part matters --------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        dict(attn_logit_softcapping=None),
        dict(final_logit_softcapping=None),
        dict(query_pre_attn_scalar=12),  # head_dim, as in Gemma 1
        dict(sliding_window=5),
        dict(layer_types=["full_attention", "sliding_attention"] * 2),  # odd ones
    ],
    ids=lambda change: next(iter(change)),
)
@torch.no_grad()
def test_a_wrong_number_in_the_config_is_seen(change):
    """The same weights load strictly; only a comparison finds these mistakes."""
    ours, theirs = pair(gemma2_config())
    wrong = PaliGemmaForConditionalGeneration(gemma2_config(**change)).eval()
    wrong.load_state_dict(ours.state_dict(), strict=True)
    inputs = random_inputs(ours.config, (5, 1, 3), (2, 7, 1))
    real = inputs["attention_mask"].bool()
    expected = theirs(**inputs).logits[real]
    close(ours(**inputs)["logits"][real], expected)
    assert (wrong(**inputs)["logits"][real] - expected).abs().max() > 1e-3


def test_gemma_1_refuses_gemma_2_and_back(tokenizer, tmp_path):
    """Loaded non-strictly, nothing would be missing but the head: chapter 24."""
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    for wrong, text in (
        ("gemma", BASE),
        ("gemma2", {"num_key_value_heads": 2, "num_hidden_layers": 4}),
    ):
        config = tiny_config(
            text=text | {"vocab_size": image_token}, image_token_index=image_token
        )
        folder = tmp_path / wrong
        save_hf_model(PaliGemmaForConditionalGeneration(config), tokenizer, folder)
        values = json.loads((folder / "config.json").read_text())
        values["text_config"]["model_type"] = wrong
        values["text_config"].pop("layer_types", None)
        (folder / "config.json").write_text(json.dumps(values))
        problem = "unexpected" if wrong == "gemma" else "missing"
        message = rf"{problem} \S*layers.0.p\S*_feedforward_layernorm.weight"
        with pytest.raises(ValueError, match=message):
            load_hf_model(folder, "cpu")


# --- Soft caps ----------------------------------------------------------------------


def test_soft_cap():
    values = torch.linspace(-400, 400, 2001, dtype=torch.float64)
    bent = soft_cap(values, 50.0)
    assert bent.abs().max() <= 50 and (bent.diff() >= 0).all()
    small = torch.linspace(-1, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(soft_cap(small, 50.0), small, atol=2e-4, rtol=0)
    assert soft_cap(values, None) is values
    by_hand = torch.tensor([50 * 0.7615941559557649])  # tanh 1
    close(soft_cap(torch.tensor([50.0]), 50.0), by_hand)


@torch.no_grad()
def test_capped_logits_are_bounded(model):
    logits = model(**random_inputs(model.config, (5, 3)))["logits"]
    assert logits.abs().max() <= 2.0
    kept = model(**random_inputs(model.config, (5, 3)), logits_to_keep=1)["logits"]
    assert kept.abs().max() <= 2.0


def test_what_is_forbidden_stays_forbidden():
    """The cap comes before the mask: after it, -inf would become -cap."""
    ours, _ = pair(gemma2_config())
    inputs = random_inputs(ours.config, (5,), (4,))
    weights = ours(**inputs, output_attentions=True)["attentions"][1]
    mask = make_attn_mask(inputs["attention_mask"], inputs["token_type_ids"])
    assert (weights[~mask.expand_as(weights)] == 0).all()


# --- Windows ------------------------------------------------------------------------


def by_the_rule(mask, window, past):
    """Pair by pair, as the docstring says it."""
    result = mask.clone()
    batch, _, num_new, length = mask.shape
    for b in range(batch):
        for q in range(num_new):
            seen = [k for k in range(length) if mask[b, 0, q, k]]
            for k in seen[:-window]:
                new = k - past
                mutual = 0 <= new < num_new and mask[b, 0, new, past + q]
                result[b, 0, q, k] = bool(mutual)
    return result


@pytest.mark.parametrize("window", [1, 2, 3, 5, 20])
@both_sides
def test_window_is_counted_in_what_can_be_seen(window, padding):
    inputs = random_inputs(gemma2_config(), (5, 1, 3), (2, 7, 3), padding)
    real, types = inputs["attention_mask"], inputs["token_type_ids"]
    length = real.shape[1]
    for past in (0, length - 3, length - 1):
        mask = make_attn_mask(real, types, length - past)
        if past:  # after a cache everything is answer
            mask = make_attn_mask(real, torch.ones_like(real), length - past)
        expected = by_the_rule(mask, window, past)
        assert sliding_window_mask(mask, window, past).equal(expected)
        # The empty places of a static cache change nothing.
        static = sliding_window_mask(F.pad(mask, (0, 6)), window, past)
        assert static.equal(F.pad(expected, (0, 6)))
        assert expected.any(dim=-1).all()  # nobody is left with nothing to see


def test_image_and_prompt_see_each_other_at_any_distance():
    types = torch.tensor([[0] * 8 + [1] * 4])
    mask = make_attn_mask(torch.ones_like(types), types)
    windowed = sliding_window_mask(mask, 3)[0, 0]
    assert windowed[:8, :8].all() and not windowed[:8, 8:].any()
    assert windowed[8:].sum(dim=-1).tolist() == [3] * 4
    assert windowed[8].nonzero().flatten().tolist() == [6, 7, 8]
    assert windowed[11].nonzero().flatten().tolist() == [9, 10, 11]


def test_a_short_row_keeps_its_mask():
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    assert sliding_window_mask(mask, 5) is mask
    assert not sliding_window_mask(mask, 4).equal(mask)


@both_sides
@torch.no_grad()
def test_a_row_is_the_same_alone_and_in_a_batch(model, padding):
    """Padding is not counted by the window; cached decode, both sides of padding."""
    inputs = random_inputs(model.config, (5, 1, 3), padding=padding)
    tokens = torch.randint(4, 120, (3, 6))
    for kind in ("dynamic", "static"):
        cache, mask = make_cache(model, kind, 3), inputs["attention_mask"]
        pieces = [model(**inputs, kv_cache=cache)["logits"]]
        for token in tokens.split(1, dim=1):
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            pieces.append(model(token, attention_mask=mask, kv_cache=cache)["logits"])
        together = torch.cat(pieces, dim=1)
        for row in range(3):
            real = inputs["attention_mask"][row].bool()
            ids = torch.cat([inputs["input_ids"][row, real], tokens[row]])[None]
            types = torch.zeros_like(ids)
            types[:, -6:] = 1
            picture = inputs["pixel_values"][row : row + 1]
            alone = model(ids, picture, token_type_ids=types)["logits"][0]
            close(together[row, mask[row].bool()], alone)


@both_caches
@torch.no_grad()
def test_several_tokens_behind_a_filled_cache(model, kind):
    inputs = random_inputs(model.config, (5,), (6,))
    cache = make_cache(model, kind, 1)
    prefix = inputs["input_ids"][:, :-6]
    model(prefix, inputs["pixel_values"], kv_cache=cache)
    answer = model(inputs["input_ids"][:, -6:], kv_cache=cache)["logits"]
    close(answer, model(**inputs)["logits"][:, -6:])


# --- Configs and sizes --------------------------------------------------------------

PUBLISHED = {
    "3B": dict(),
    "10B": dict(
        hidden_size=3584,
        num_hidden_layers=42,
        intermediate_size=14336,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
    "28B": dict(
        hidden_size=4608,
        num_hidden_layers=46,
        intermediate_size=36864,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144,
    ),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size):
    text = Gemma2Config(**PUBLISHED[size])
    config = PaliGemmaConfig(text_config=text, projection_dim=text.hidden_size)
    with torch.device("meta"):
        ours = PaliGemmaForConditionalGeneration(config)
        theirs = transformers.PaliGemmaForConditionalGeneration(
            transformers.PaliGemmaConfig.from_dict(config.to_dict())
        )
    shapes = {name: weight.shape for name, weight in ours.state_dict().items()}
    expected = to_our_names(theirs.state_dict())
    assert shapes == {name: weight.shape for name, weight in expected.items()}
    counts = {"3B": 3_032_242_416, "10B": 9_662_638_832, "28B": 27_650_487_024}
    assert sum(weight.numel() for weight in ours.parameters()) == counts[size]


def test_the_scale_is_the_configs_and_not_the_heads():
    with torch.device("meta"):
        model = build_language_model(Gemma2Config(**PUBLISHED["28B"]))
    attention = model.model.layers[0].self_attn
    assert attention.scaling == 144**-0.5 and attention.head_dim == 128
    assert attention.q_proj.weight.shape == (32 * 128, 4608)


def test_gemma_1_is_what_it_was():
    with torch.device("meta"):
        model = build_language_model(GemmaConfig(num_hidden_layers=1))
    assert type(model) is GemmaForCausalLM
    assert not any("feedforward_layernorm" in name for name in model.state_dict())


# --- The same tools -----------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    """The folder of a random PaliGemma 2, and the model."""
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = tiny_config(
        text=BASE | dict(vocab_size=image_token, final_logit_softcapping=30.0),
        image_token_index=image_token,
    )
    torch.manual_seed(0)
    model = randomize(PaliGemmaForConditionalGeneration(config)).eval()
    folder = tmp_path_factory.mktemp("models") / "paligemma2"
    save_hf_model(model, tokenizer, folder)
    return folder, model


def processor_for(model, tokenizer):
    sizes = model.config.vision_config
    return PaliGemmaProcessor(tokenizer, sizes.num_image_tokens, sizes.image_size)


def test_saved_and_loaded(checkpoint):
    folder, model = checkpoint
    again, _ = load_hf_model(folder, "cpu")
    assert again.config == model.config
    for name, weight in model.state_dict().items():
        assert again.state_dict()[name].equal(weight), name


@torch.no_grad()
def test_transformers_loads_what_we_save(checkpoint):
    folder, ours = checkpoint
    theirs, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.text_config.model_type == "gemma2"
    inputs = random_inputs(tiny_config(), (5, 2))
    image_token = ours.config.image_token_index
    inputs["input_ids"][inputs["input_ids"] == 120] = image_token
    real = inputs["attention_mask"].bool()
    close(ours(**inputs)["logits"][real], theirs.eval()(**inputs).logits[real])


@pytest.mark.parametrize("layout", ["hub", "in memory", "saved"])
def test_every_layout_of_names_loads(layout, checkpoint, tokenizer, tmp_path):
    folder, small = checkpoint
    ours, theirs = pair(small.config)
    theirs.save_pretrained(tmp_path)  # with transformers' own config.json
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if layout == "in memory":
        state = {name: weight.clone() for name, weight in theirs.state_dict().items()}
        save_file(state, file, {"format": "pt"})
    if layout == "hub":
        save_hf_model(ours, tokenizer, tmp_path / "ours")
        (tmp_path / "ours" / "model.safetensors").replace(file)
    prefix = {
        "hub": "vision_tower.vision_model.",
        "in memory": "model.vision_tower.",
        "saved": "vision_tower.encoder.",
    }[layout]
    assert any(name.startswith(prefix) for name in load_file(file))
    again, _ = load_hf_model(tmp_path, "cpu")
    assert again.config == small.config
    for name, weight in ours.state_dict().items():
        assert again.state_dict()[name].equal(weight), name


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_ragged_rows(checkpoint, tokenizer, cache):
    _, model = checkpoint
    processor = processor_for(model, tokenizer)
    prompts = ["caption en", "detect owl ; pizza"]
    pictures = [Image.new("RGB", (40, 30), color) for color in ("orange", "navy")]
    together = generate(
        model, tokenizer, processor(prompts, pictures), max_new_tokens=9, cache=cache
    )
    alone = [
        generate(model, tokenizer, processor(prompt, picture), max_new_tokens=9)[0]
        for prompt, picture in zip(prompts, pictures)
    ]
    assert together == alone and all(alone)


def test_it_learns(tokenizer, checkpoint):
    """A few steps on one answer: the loss falls, and greedy decoding says it."""
    folder, _ = checkpoint
    model, _ = load_hf_model(folder, "cpu")
    processor = processor_for(model, tokenizer)
    picture = Image.new("RGB", (28, 28), "orange")
    batch = processor("caption en", picture, suffix="two owls")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        loss = model(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 < 1 < losses[0]
    inputs = processor("caption en", picture)
    assert generate(model, tokenizer, inputs, max_new_tokens=9) == ["two owls"]


def test_the_command_line_answers(checkpoint, tmp_path, monkeypatch, capsys):
    folder, _ = checkpoint
    picture = tmp_path / "picture.png"
    Image.new("RGB", (30, 60), "white").save(picture)
    command = ["--prompt", "caption en", "--image_file_path", str(picture)]
    command += ["--model_path", str(folder), "--max_tokens_to_generate", "6"]
    monkeypatch.setattr(sys, "argv", ["vlm.inference", *command])
    assert main(command) in (None, 0)
    assert capsys.readouterr().out.strip()


def test_bfloat16_and_mixed_precision():
    model, _ = pair(gemma2_config())
    inputs = random_inputs(model.config, (5, 1), (2, 6), "right")
    exact = model(**inputs)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs)["loss"]
    loss.backward()
    assert abs(loss.item() - exact.item()) < 0.1
    with torch.no_grad():
        logits = model.bfloat16()(**inputs)["logits"]
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
