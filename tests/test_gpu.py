"""On a GPU: the same answers as on the CPU, and no waiting. `make test-gpu` runs them.

Without a GPU they are skipped. VLM_TEST_DEVICE=cpu tries the tests themselves.
"""

import os
import warnings

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlm.config import GemmaConfig
from vlm.gemma import GemmaForCausalLM
from vlm.hub import EMBEDDED
from vlm.inference import main
from vlm.kv_cache import KVCache
from vlm.sampling import GenerationConfig, generate, prefill, token_steps
from vlm.scenes import ASSETS, VALIDATION_SEEDS, make_scene
from vlm.training import SuffixLoss, make_accelerator, make_optimizer, training_step
from vlm.weights import load_hf_model, make_processor

DEVICE = os.environ.get("VLM_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="no CUDA GPU on this machine",
    ),
]
PROMPTS = ["caption en", "detect owl ; pizza", "segment rocket", "answer en is it red?"]
SCENE = str(ASSETS / "examples" / "scene.png")


def load(dtype, device=None):
    model, tokenizer = load_hf_model(device=device or DEVICE, dtype=dtype)
    return model, tokenizer, make_processor(model, tokenizer)


def scene_inputs(model, processor, prompts=PROMPTS, answers=None):
    """Questions about validation scenes, on the model's device and in its dtype."""
    seeds = VALIDATION_SEEDS[: len(prompts)]
    images = [make_scene(seed, processor.image_size).image for seed in seeds]
    inputs = processor(prompts, images, answers)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    return inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}


def test_the_texts_are_the_cpus(no_type_checks):
    texts = {}
    for device in ("cpu", DEVICE):
        model, tokenizer, processor = load("float32", device)
        inputs = scene_inputs(model, processor)
        texts[device] = generate(model, tokenizer, inputs, max_new_tokens=60)
    assert texts[DEVICE] == texts["cpu"]


@torch.no_grad()
def test_bfloat16_logits_are_transformers(no_type_checks):
    model, _, processor = load("bfloat16")
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        EMBEDDED, dtype=torch.bfloat16
    ).to(DEVICE)
    inputs = scene_inputs(model, processor)
    types = torch.zeros_like(inputs["input_ids"])
    ours = model(**inputs, logits_to_keep=1)["logits"].float()
    expected = theirs(**inputs, token_type_ids=types, logits_to_keep=1).logits.float()
    error = (ours - expected).square().mean().sqrt() / expected.std()
    assert error < 0.02  # bfloat16 has 8 bits


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_step_waits_once(cache, do_sample, no_type_checks):
    if DEVICE != "cuda":
        pytest.skip("only CUDA reports where Python waits for it")
    model, _, processor = load("float32")
    settings = GenerationConfig(9, do_sample, top_k=40, top_p=0.9, seed=0, cache=cache)
    steps = token_steps(model, scene_inputs(model, processor), settings)
    next(steps)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            for _ in range(5):
                next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 5


@torch.no_grad()
def test_flash_attention_is_possible(no_type_checks):
    """Without padding there is no mask, and the fastest kernel may run."""
    model, _, processor = load("bfloat16")
    inputs = scene_inputs(model, processor, ["caption en"] * 2)
    steps = token_steps(model, inputs, GenerationConfig(4))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):  # or an error
        prefill(model, inputs, KVCache())
        assert len(list(steps)) == 4


@torch.no_grad()
def test_padding_leaves_attention_fused(no_type_checks):
    """No fused kernel takes a mask and groups; views of the one head, all of them."""
    config = GemmaConfig(num_hidden_layers=1, vocab_size=256)  # the 3B's, Dh = 256
    decoder = GemmaForCausalLM(config).to(DEVICE, torch.bfloat16)
    ids = torch.ones(2, 16, dtype=torch.long, device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel([*fused, SDPBackend.CUDNN_ATTENTION]):  # or an error
        decoder(ids, attention_mask=mask)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # the compiler's
@torch.no_grad()  # type checks hide from the decorator that token_steps is a generator
def test_compiled_steps_write_the_same(no_type_checks):
    model, tokenizer, processor = load("float32")
    inputs, limit = scene_inputs(model, processor), dict(max_new_tokens=40)
    plain = generate(model, tokenizer, inputs, **limit)
    counters.clear()
    for _ in range(3):  # a CUDA graph is recorded in the second step
        assert generate(model, tokenizer, inputs, compile=True, **limit) == plain
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # the compiler's
@torch.no_grad()
def test_batches_of_two_sizes_keep_their_graphs(no_type_checks):
    """Answers take turns: nothing is recorded again, and memory doesn't grow."""
    model, tokenizer, processor = load("float32")
    prompts = [["caption en"] * rows for rows in (3, 2)]
    sizes = [scene_inputs(model, processor, texts) for texts in prompts]
    limit = dict(max_new_tokens=8)
    plain = [generate(model, tokenizer, inputs, **limit) for inputs in sizes]
    reserved = []
    for _ in range(8):
        texts = [generate(model, tokenizer, s, compile=True, **limit) for s in sizes]
        assert texts == plain
        reserved.append(torch.cuda.memory_reserved() if DEVICE == "cuda" else 0)
    assert reserved[-1] == reserved[3]


def test_training_in_bfloat16_learns(no_type_checks, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    model, _, processor = load("float32")
    answers = ["a striped owl", "two blue pizzas", "a tiny ball", "no idea"]
    batch = scene_inputs(model, processor, ["caption en"] * 4, answers)
    accelerator = make_accelerator("bf16")
    objective, optimizer = accelerator.prepare(
        SuffixLoss(model), make_optimizer(model, 0.0)
    )
    losses = [
        training_step(accelerator, objective, optimizer, [batch], 1e-3)["loss"]
        for _ in range(12)
    ]
    assert losses[-1] < losses[0] / 2


def test_overflow_in_float16_is_said(no_type_checks):
    model, tokenizer, processor = load("float16")
    with torch.no_grad():
        model.language_model.model.norm.weight.fill_(60_000.0)
    with pytest.raises(FloatingPointError, match="float16.* dtype='float32'"):
        generate(model, tokenizer, scene_inputs(model, processor), max_new_tokens=2)


@pytest.mark.parametrize("prompt", ["caption en", "detect owl", "segment owl"])
def test_the_command_answers_as_on_the_cpu(prompt, capsys, no_type_checks):
    said = []
    for more in (["--only_cpu"], []):
        ask = ["--prompt", prompt, "--image_file_path", SCENE, "--json"]
        assert main([*ask, "--dtype", "float32", *more]) == 0
        said.append(capsys.readouterr().out.partition('"score"')[0])
    assert said[0] == said[1]
