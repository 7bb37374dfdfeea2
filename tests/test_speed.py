"""int8 weights: near the float ones, smaller, and nothing else changes."""

import copy

import pytest
import torch
from reference import pair, random_inputs, tiny_config
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from vlm.sampling import decode_one_token, generate
from vlm.scenes import VALIDATION_SEEDS, make_scene
from vlm.speed import FEW_ROWS, Int8Linear, quantize_int8
from vlm.weights import load_hf_model, make_processor, save_hf_model

# Largest error of an output, as a fraction of the largest output.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def embedded():
    return load_hf_model(device="cpu")


def exact(quantized, states):
    """In float64, from the module's own integers, scales and bias."""
    weight = quantized.weight.double() * quantized.scales.double()[:, None]
    bias = None if quantized.bias is None else quantized.bias.double()
    return F.linear(states.double(), weight, bias)


def number_of_bytes(module):
    return sum(t.nbytes for t in [*module.parameters(), *module.buffers()])


# --- One layer ----------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (FEW_ROWS, 1), (2, FEW_ROWS), ()])
@torch.no_grad()
def test_outputs_are_those_of_its_own_weights(shape, dtype, bias):
    quantized = Int8Linear(nn.Linear(96, 160, bias=bias).to(dtype))
    states = torch.randn(*shape, 96).to(dtype)
    outputs, expected = quantized(states), exact(quantized, states)
    assert outputs.dtype == dtype and outputs.shape == (*shape, 160)
    assert (outputs - expected).abs().max() < BOUNDS[dtype] * expected.abs().max()


@pytest.mark.parametrize("num_rows", [1, FEW_ROWS, FEW_ROWS + 1])
@torch.no_grad()
def test_few_rows_of_bfloat16_take_the_kernel(num_rows, monkeypatch):
    calls, kernel = [], torch._weight_int8pack_mm
    spy = lambda *inputs: calls.append(1) or kernel(*inputs)  # noqa: E731
    monkeypatch.setattr(torch, "_weight_int8pack_mm", spy)
    for dtype in (torch.float32, torch.bfloat16):
        Int8Linear(nn.Linear(32, 16).to(dtype))(torch.randn(num_rows, 32).to(dtype))
    assert len(calls) == (num_rows <= FEW_ROWS)


@pytest.mark.parametrize("width", [8, 40, 72])
@torch.no_grad()
def test_any_width_will_do(width, monkeypatch):
    """The kernel reads past the end of rows that aren't a multiple of 16 long."""

    def kernel(*inputs):
        raise AssertionError("the process may die here")

    monkeypatch.setattr(torch, "_weight_int8pack_mm", kernel)
    quantized = Int8Linear(nn.Linear(width, 48).bfloat16())
    states = torch.randn(1, width).bfloat16()
    expected = exact(quantized, states)
    assert (quantized(states) - expected).abs().max() < 2e-2 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_few_weights_at_once_give_what_all_give(dtype, monkeypatch):
    linear = nn.Linear(32, 50).to(dtype)
    states = torch.randn(FEW_ROWS + 1, 32).to(dtype)
    whole = Int8Linear(linear)
    expected = whole(states)
    for at_once in (7, 100, 320):  # a row each; three rows; ten rows, none left over
        monkeypatch.setattr("vlm.speed.AT_ONCE", at_once)
        parts = Int8Linear(linear)
        assert torch.equal(parts.weight, whole.weight)
        assert torch.equal(parts.scales, whole.scales)
        tolerance = dict(atol=1e-6, rtol=BOUNDS[dtype])
        torch.testing.assert_close(parts(states), expected, **tolerance)


@torch.no_grad()
def test_states_need_not_be_contiguous():
    quantized = Int8Linear(nn.Linear(32, 16, bias=False).bfloat16())
    states = torch.randn(32, 6).bfloat16().T  # [6, 32], the columns of a matrix
    torch.testing.assert_close(quantized(states), quantized(states.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_weight_moves_by_more_than_half_a_step(dtype):
    """Half a step of its own row's scale; cut off instead of rounded, it's a whole."""
    linear = nn.Linear(64, 40).to(dtype)
    quantized = Int8Linear(linear)
    scales = quantized.scales.double()[:, None]  # [out, 1]
    steps = linear.weight.detach().double() / scales  # [out, in]
    inside = steps.abs() <= 127  # a scale's own rounding may leave the largest outside
    error = (steps - quantized.weight.double()).abs()
    assert error[inside].max() < 0.501
    assert error.max() < 1 and quantized.weight.abs().max() == 127
    assert (steps - steps.trunc()).abs().max() > 0.9  # what cutting off would do


def test_a_large_row_leaves_the_others_as_fine_as_they_were():
    linear = nn.Linear(64, 40)
    before = Int8Linear(linear)
    with torch.no_grad():
        linear.weight[0] *= 1000
    after = Int8Linear(linear)
    assert torch.equal(before.weight[1:], after.weight[1:])
    assert torch.equal(before.scales[1:], after.scales[1:])


@torch.no_grad()
def test_a_row_of_zeros_stays_zero():
    linear = nn.Linear(8, 3, bias=False)
    linear.weight[1] = 0
    outputs = Int8Linear(linear)(torch.randn(5, 8))
    assert outputs.isfinite().all() and (outputs[:, 1] == 0).all()


def test_it_is_smaller_and_holds_nothing_to_train():
    linear = nn.Linear(256, 256, bias=False).bfloat16()
    quantized = Int8Linear(linear)
    assert number_of_bytes(quantized) < 0.51 * number_of_bytes(linear)
    assert not list(quantized.parameters())
    assert linear.weight.dtype == torch.bfloat16  # the old layer is as it was


@torch.no_grad()
def test_it_moves_between_dtypes_and_devices():
    quantized = Int8Linear(nn.Linear(32, 16))
    half = copy.deepcopy(quantized).to(torch.bfloat16)
    assert half.weight.dtype == torch.int8 and half.scales.dtype == torch.bfloat16
    states = torch.randn(4, 32)
    torch.testing.assert_close(
        half(states.bfloat16()).float(), quantized(states), atol=3e-2, rtol=3e-2
    )
    assert quantized.to("meta")(states.to("meta")).shape == (4, 16)
    assert quantized.weight.is_meta and quantized.scales.is_meta


# --- A model ------------------------------------------------------------------------


def gemma2():
    config = tiny_config(text=dict(model_type="gemma2", sliding_window=8))
    return pair(config)[0]


@pytest.mark.parametrize("make", [lambda: pair()[0], gemma2], ids=["gemma", "gemma2"])
def test_only_the_decoders_blocks_change(make):
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    quantize_int8(model)
    for name, module in model.named_modules():
        in_blocks = name.startswith("language_model.model.layers.")
        if in_blocks and name.endswith(NAMES):
            assert type(module) is Int8Linear and before[name] is nn.Linear
        else:
            assert type(module) is before[name]
    for name, weight in model.state_dict().items():
        if not name.endswith((*[f"{n}.weight" for n in NAMES], ".scales")):
            assert torch.equal(weight, weights[name]), name
    head = model.language_model.lm_head.weight
    assert head is model.language_model.model.embed_tokens.weight


def test_a_decoder_alone_and_nothing_left():
    decoder = pair()[0].language_model
    quantize_int8(decoder)
    assert type(decoder.model.layers[0].mlp.up_proj) is Int8Linear
    with pytest.raises(ValueError, match="quantized already"):
        quantize_int8(decoder)


def three_rows(model, tokenizer):
    """Ragged prompts about one scene."""
    processor = make_processor(model, tokenizer)
    texts = ["caption en", "detect owl ; horse ; rocket", "segment horse"]
    return processor(texts, [make_scene(VALIDATION_SEEDS[0]).image])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_writes_the_same_with_every_cache(dtype):
    model, tokenizer = load_hf_model(device="cpu", dtype=dtype)
    inputs = three_rows(model, tokenizer)
    quantize_int8(model)
    dynamic, static = (
        generate(model, tokenizer, inputs, max_new_tokens=30, cache=cache)
        for cache in ("dynamic", "static")
    )
    # bfloat16 has near ties among mask codes, which empty slots may tip over.
    same = 3 if dtype == torch.float32 else 1
    assert dynamic[:same] == static[:same]
    assert dynamic[0] == "two rockets, a horse and a balloon"
    assert "<loc" in dynamic[1] and "<seg" in dynamic[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()  # type checks hide from the decorator that token_steps is a generator
def test_the_compiled_step_takes_it(dtype, no_type_checks, monkeypatch):
    model, tokenizer = load_hf_model(device="cpu", dtype=dtype)
    inputs = three_rows(model, tokenizer)
    quantize_int8(model)
    counter = CompileCounter()
    compiled = torch.compile(
        decode_one_token, backend=counter, fullgraph=True, dynamic=False
    )
    monkeypatch.setattr("vlm.sampling.compiled_decode_step", lambda _: compiled)
    settings = dict(max_new_tokens=30)
    expected = generate(model, tokenizer, inputs, cache="static", **settings)
    assert generate(model, tokenizer, inputs, compile=True, **settings) == expected
    assert counter.frame_count == 1


def test_prefill_and_decode_steps_agree():
    """Two ways to multiply, one result: a row of many tokens, and one by one."""
    decoder = pair()[0].language_model.bfloat16()
    decoder.tie_weights()
    quantize_int8(decoder)
    ids = torch.randint(4, 120, (1, FEW_ROWS + 8))
    with torch.no_grad():
        at_once = decoder(ids)["logits"].float()
        few = decoder(ids[:, :FEW_ROWS])["logits"].float()
    gap = (at_once[:, :FEW_ROWS] - few).abs().max()
    assert gap < 0.05 * few.abs().max()


def test_a_quantized_model_is_not_saved(tokenizer, tmp_path):
    model = pair()[0]
    quantize_int8(model)
    with pytest.raises(ValueError, match="int8.*not quantized"):
        save_hf_model(model, tokenizer, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


@torch.no_grad()
def test_logits_stay_near():
    model = pair()[0]
    inputs = random_inputs(model.config, (5, 1, 3))
    before = model(**inputs)["logits"]
    quantize_int8(model)
    error = (model(**inputs)["logits"] - before).square().mean().sqrt()
    assert 0 < error < 0.05 * before.std()


def test_the_embedded_models_answers_stay_the_same(embedded):
    """Text and boxes of unseen scenes, greedy: at least 95 % letter for letter."""
    model, tokenizer = embedded
    processor = make_processor(model, tokenizer)
    asked = []
    for seed in VALIDATION_SEEDS[30:50]:
        scene = make_scene(seed, processor.image_size)
        label = scene.objects[0].label
        asked.append(("caption en", scene.image))
        asked.append((f"detect {label}", scene.image))
        asked.append((f"answer en is there a {label}?", scene.image))
    inputs = processor(*map(list, zip(*asked)))
    quantized = copy.deepcopy(model)
    quantize_int8(quantized)
    before, after = (
        generate(one, tokenizer, inputs, max_new_tokens=60)
        for one in (model, quantized)
    )
    same = sum(a == b for a, b in zip(before, after))
    assert len({*before}) > 20 and same >= 0.95 * len(asked)
