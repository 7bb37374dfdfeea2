import pytest
import torch
import transformers
from PIL import Image
from reference import (
    assert_same_training,
    close,
    pair,
    random_inputs,
    tiny_config,
)
from torch import nn
from torch.export import Dim, export
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import vlm.merging
import vlm.paligemma
from vlm.config import PaliGemmaConfig
from vlm.kv_cache import KVCache, StaticKVCache
from vlm.masks import make_attn_mask
from vlm.paligemma import PaliGemmaForConditionalGeneration, next_token_loss
from vlm.processing import PaliGemmaProcessor
from vlm.sampling import decode_one_token

CONFIGS = {
    "mqa": dict(),
    "gqa": dict(text=dict(num_key_value_heads=2), vision=dict(image_size=42)),
    "mha": dict(text=dict(num_key_value_heads=4, head_dim=8)),
    "one-image-token": dict(vision=dict(image_size=14), text=dict(head_dim=20)),
    "image-id-outside-the-table": dict(image_token_index=128),
    "patch-7": dict(vision=dict(patch_size=7, num_attention_heads=2)),
}


@pytest.fixture(params=CONFIGS, scope="module")
def models(request):
    torch.manual_seed(0)
    return pair(tiny_config(**CONFIGS[request.param]))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return pair()[0]


def without(inputs, *names):
    return {name: tensor for name, tensor in inputs.items() if name not in names}


def count_encodings(model):
    looks = []
    model.vision_tower.register_forward_hook(lambda *call: looks.append(1))
    return looks


# --- Parity with transformers -------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_prefill_logits(models, padding):
    ours, theirs = models
    inputs = random_inputs(ours.config, (5, 1, 3), padding=padding)
    real = inputs["attention_mask"].bool()
    expected = theirs(**inputs).logits[real]
    close(ours(**inputs)["logits"][real], expected)
    # Without types, all that is given in one pass is prefix.
    close(ours(**without(inputs, "token_type_ids"))["logits"][real], expected)


@torch.no_grad()
def test_prefill_logits_through_transformers_sdpa():
    ours, theirs = pair(attention="sdpa")
    inputs = random_inputs(ours.config, (5, 1, 3))
    real = inputs["attention_mask"].bool()
    close(ours(**inputs)["logits"][real], theirs(**inputs).logits[real])


@torch.no_grad()
def test_cached_decode_token_by_token(models):
    ours, theirs = models
    inputs = random_inputs(ours.config, (5, 1, 3))
    tokens = torch.randint(4, 120, (3, 5))
    cache, their_cache = KVCache(chunk=7), transformers.DynamicCache()
    here = ours(**inputs, kv_cache=cache)["logits"]
    there = theirs(**inputs, past_key_values=their_cache, use_cache=True).logits
    mask = inputs["attention_mask"]
    for token in tokens.split(1, dim=1):
        close(here[:, -1], there[:, -1])
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        outputs = ours(token, attention_mask=mask, kv_cache=cache)
        here = outputs["logits"]
        assert here.shape == (3, 1, 128) and outputs["kv_cache"] is cache
        there = theirs(token, attention_mask=mask, past_key_values=their_cache).logits
    close(here[:, -1], there[:, -1])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_training_loss_and_gradients(models, padding):
    ours, theirs = models
    inputs = random_inputs(ours.config, (5, 1, 3), (2, 6, 1), padding)
    assert_same_training(ours, theirs, inputs)
    assert any(p.grad.abs().max() > 1e-2 for p in ours.vision_tower.parameters())


@torch.no_grad()
def greedy(model, inputs, cache, steps):
    mask, written = inputs["attention_mask"], []
    outputs = model(**inputs, kv_cache=cache, logits_to_keep=1)
    for _ in range(steps):
        written.append(outputs["logits"][:, -1].argmax(-1, keepdim=True))
        mask = torch.cat([mask, torch.ones_like(written[-1])], dim=1)
        outputs = model(written[-1], attention_mask=mask, kv_cache=cache)
    return torch.cat(written, dim=1)


def test_greedy_tokens(models):
    ours, theirs = models
    inputs = random_inputs(ours.config, (5, 1, 3))
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[:, -8:]
    assert torch.equal(greedy(ours, inputs, KVCache(), 8), expected)
    static = StaticKVCache(ours.config.text_config, 3, 64)
    assert torch.equal(greedy(ours, inputs, static, 8), expected)


@torch.no_grad()
def test_attentions(models):
    ours, theirs = models
    inputs = random_inputs(ours.config, (5, 1, 3))
    real = inputs["attention_mask"].bool()
    here = ours(**inputs, output_attentions=True)["attentions"]
    there = theirs(**inputs, output_attentions=True).attentions
    assert len(here) == len(there) == ours.config.text_config.num_hidden_layers
    for weights, expected in zip(here, there):
        close(weights.transpose(1, 2)[real], expected.transpose(1, 2)[real])


@torch.no_grad()
def test_image_hidden_states_are_those_of_transformers(models):
    ours, theirs = models
    inputs = random_inputs(ours.config, (5, 1, 3))
    here = ours(**inputs, output_image_hidden_states=True)["image_hidden_states"]
    close(here, theirs(**inputs).image_hidden_states.view_as(here))
    assert "image_hidden_states" not in ours(**inputs)


def test_gradients_flow_through_image_hidden_states(models):
    ours, _ = models
    inputs = random_inputs(ours.config, (5, 1, 3))
    states = ours(**inputs, output_image_hidden_states=True)["image_hidden_states"]
    ours.zero_grad()
    states.square().sum().backward()
    tower = [p.grad for p in ours.vision_tower.parameters()]
    assert all(grad is not None for grad in tower)
    assert all(p.grad is None for p in ours.language_model.parameters())
    ours.zero_grad()


def test_what_is_broken_is_seen():
    ours, theirs = pair()
    inputs = random_inputs(ours.config, (5, 1, 3), (2, 6, 1))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**inputs).logits[real]
        ones = torch.ones_like(inputs["token_type_ids"])
        causal = ours(**(inputs | {"token_type_ids": ones}))["logits"][real]
        assert (causal - expected).abs().max() > 1e-2
        for parameter in ours.multi_modal_projector.parameters():
            parameter *= ours.config.text_config.hidden_size**0.5
        scaled = ours(**inputs)["logits"][real]
        assert (scaled - expected).abs().max() > 1e-2


# --- Properties ---------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_a_row_is_the_same_alone_and_in_a_batch(model, padding):
    inputs = random_inputs(model.config, (5, 1, 3), (2, 6, 1), padding)
    together = model(**inputs)["logits"]
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = model(
            inputs["input_ids"][row, real][None],
            inputs["pixel_values"][row : row + 1],
            token_type_ids=inputs["token_type_ids"][row, real][None],
        )
        close(alone["logits"][0], together[row, real])


@pytest.mark.parametrize("make_cache", ["dynamic", "static"])
@torch.no_grad()
def test_at_once_and_token_by_token(model, make_cache):
    inputs = random_inputs(model.config, (5, 1, 3), (4, 4, 4))
    at_once = model(**inputs)["logits"]
    length = inputs["input_ids"].shape[1]
    cache = KVCache(chunk=3)
    if make_cache == "static":
        cache = StaticKVCache(model.config.text_config, 3, length + 2)
    first = {name: inputs[name][:, :-4] for name in ("input_ids", "attention_mask")}
    pieces = [model(**first, pixel_values=inputs["pixel_values"], kv_cache=cache)]
    for end in range(length - 3, length + 1):
        mask = inputs["attention_mask"][:, :end]
        token = inputs["input_ids"][:, end - 1 : end]
        pieces.append(model(token, attention_mask=mask, kv_cache=cache))
    logits = torch.cat([piece["logits"] for piece in pieces], dim=1)
    real = inputs["attention_mask"].bool()
    close(logits[real], at_once[real])


@torch.no_grad()
def test_several_tokens_after_a_filled_cache_are_causal(model):
    inputs = random_inputs(model.config, (5,), (4,))
    cache = KVCache()
    prefix = inputs["input_ids"][:, :-4]
    model(prefix, inputs["pixel_values"], kv_cache=cache)
    answer = model(inputs["input_ids"][:, -4:], kv_cache=cache)["logits"]
    close(answer, model(**inputs)["logits"][:, -4:])


@torch.no_grad()
def test_the_answer_does_not_attend_to_its_future(model):
    inputs = random_inputs(model.config, (5,), (4,))
    before = model(**inputs)["logits"]
    inputs["input_ids"][:, -2] = 4 + (inputs["input_ids"][:, -2] - 3) % 100
    after = model(**inputs)["logits"]
    torch.testing.assert_close(before[:, :-2], after[:, :-2], atol=1e-6, rtol=0)
    assert (before[:, -2] - after[:, -2]).abs().max() > 1e-2


@torch.no_grad()
def test_the_vision_tower_runs_once():
    model, _ = pair()
    looks = count_encodings(model)
    inputs = without(random_inputs(model.config, (5, 3)), "token_type_ids")
    pixel_values, mask = inputs["pixel_values"], inputs["attention_mask"]
    cache = KVCache()
    token = model(**inputs, kv_cache=cache)["logits"][:, -1:].argmax(-1)
    for _ in range(4):
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        outputs = model(token, pixel_values, mask, cache)
        token = outputs["logits"][:, -1:].argmax(-1)
    assert len(looks) == 1
    assert cache.num_items() == mask.shape[1]


def test_labels_need_a_next_token_among_the_kept(model):
    inputs = random_inputs(model.config, (3,), (2,))
    with pytest.raises(ValueError, match="no next token to learn"):
        model(**inputs, logits_to_keep=1)
    assert torch.isfinite(model(**inputs, logits_to_keep=2)["loss"])


@torch.no_grad()
def test_logits_to_keep(model):
    inputs = random_inputs(model.config, (5, 3), (3, 3))
    everything = model(**inputs)
    for n in (2, 4):
        kept = model(**inputs, logits_to_keep=n)
        assert kept["logits"].shape[1] == n
        close(kept["logits"], everything["logits"][:, -n:])
    close(kept["loss"], everything["loss"])  # the last 4 places hold the whole answer


def test_several_questions_about_one_picture(model):
    inputs = random_inputs(
        model.config, (5, 1, 3, 2, 4, 1), (2, 6, 1, 3, 2, 2), "right"
    )
    pictures = inputs.pop("pixel_values")[:2]
    looks = []
    handle = model.vision_tower.register_forward_hook(
        lambda module, args, output: looks.append(len(args[0]))
    )
    results = []
    for pixel_values in (pictures, pictures.repeat_interleave(3, dim=0)):
        model.zero_grad()
        outputs = model(**inputs, pixel_values=pixel_values)
        outputs["loss"].backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        results.append((outputs["loss"], outputs["logits"], gradients))
    handle.remove()
    assert looks == [2, 6]
    (loss, logits, shared), (repeated_loss, repeated_logits, repeated) = results
    close(loss, repeated_loss)
    close(logits, repeated_logits)
    for here, there in zip(shared, repeated):
        close(here, there)


@torch.no_grad()
def test_a_mask_of_pairs_is_taken_as_it_is(model):
    inputs = random_inputs(model.config, (5, 1), (2, 3), "right")
    real, types = inputs["attention_mask"], inputs["token_type_ids"]
    mask, positions = make_attn_mask(real, types), (real.cumsum(1) - 1).clamp(min=0)
    outright = model(
        inputs["input_ids"],
        inputs["pixel_values"],
        attention_mask=mask,
        position_ids=positions,
    )
    assert torch.equal(outright["logits"], model(**without(inputs, "labels"))["logits"])


@torch.no_grad()
def test_a_boolean_mask_of_two_axes_will_do(model):
    inputs = without(random_inputs(model.config, (5, 1)), "token_type_ids")
    expected = model(**inputs)["logits"]
    inputs["attention_mask"] = inputs["attention_mask"].bool()
    assert torch.equal(model(**inputs)["logits"], expected)


def test_mixed_precision_trains():
    model, _ = pair()
    inputs = random_inputs(model.config, (5, 1), (2, 3), "right")
    exact = model(**inputs)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs)["loss"]
    loss.backward()
    assert abs(loss.item() - exact.item()) < 0.1
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@torch.no_grad()
def test_bfloat16_weights():
    model, _ = pair()
    inputs = random_inputs(model.config, (5, 1))
    exact = model(**inputs)["logits"]
    model = model.bfloat16()
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    logits = model(**inputs)["logits"]
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).abs().mean() < 0.1


def test_output_head_and_embedding_are_one_matrix(model):
    table = model.language_model.model.embed_tokens.weight
    assert model.language_model.lm_head.weight is table
    copied = PaliGemmaForConditionalGeneration(model.config)
    head = torch.nn.Parameter(torch.zeros_like(table))
    copied.language_model.lm_head.weight = head
    copied.tie_weights()
    decoder = copied.language_model
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight


def test_the_real_model_has_its_parameters():
    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(PaliGemmaConfig())
    parts = [model.vision_tower, model.multi_modal_projector, model.language_model]
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [412_442_352, 2_361_344, 2_508_662_784]


@torch.no_grad()
def test_the_loop_that_every_program_runs(tokenizer):
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = tiny_config(text=dict(vocab_size=1600), image_token_index=image_id)
    model, _ = pair(config)
    looks = count_encodings(model)
    processor = PaliGemmaProcessor(
        tokenizer=tokenizer,
        num_image_tokens=model.config.vision_config.num_image_tokens,
        image_size=model.config.vision_config.image_size,
    )
    model_inputs = processor(
        text=["caption en"], images=[Image.new("RGB", (40, 30), "orange")]
    )
    kv_cache = KVCache()
    outputs = model(
        input_ids=model_inputs["input_ids"],
        pixel_values=model_inputs["pixel_values"],
        attention_mask=model_inputs["attention_mask"],
        kv_cache=kv_cache,
    )
    next_token = outputs["logits"][:, -1, :].argmax(-1, keepdim=True)
    ids, mask = model_inputs["input_ids"], model_inputs["attention_mask"]
    for _ in range(4):
        ids = torch.cat([ids, next_token], dim=1)
        mask = torch.cat([mask, torch.ones_like(next_token)], dim=1)
        outputs = model(
            input_ids=next_token,
            pixel_values=model_inputs["pixel_values"],
            attention_mask=mask,
            kv_cache=kv_cache,
        )
        types = torch.zeros_like(ids)
        types[:, model_inputs["input_ids"].shape[1] :] = 1
        at_once = model(ids, model_inputs["pixel_values"], token_type_ids=types)
        close(outputs["logits"][:, -1], at_once["logits"][:, -1])
        next_token = outputs["logits"][:, -1, :].argmax(-1, keepdim=True)
    assert len(looks) == 1 + 4  # once in the loop, four times to check it


# --- Export -------------------------------------------------------------------------


class Prefill(nn.Module):
    """Picture and prompt → logits, and the cache's tensors, layer by layer."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, pixel_values, attention_mask):
        cache = KVCache(chunk=1)  # no room to spare: what it holds is the result
        outputs = self.model(input_ids, pixel_values, attention_mask, cache)
        return outputs["logits"], cache._buffers


class DecodeStep(Prefill):
    """One token a row, and a filled cache as tensors → logits, and the cache grown."""

    def forward(self, token_ids, attention_mask, past):
        cache = KVCache(chunk=1)
        for layer_idx, (keys, values) in enumerate(past):
            cache.update(keys, values, layer_idx)
        outputs = self.model(token_ids, None, attention_mask, cache)
        return outputs["logits"], cache._buffers


EXPORTED = {
    "gemma": dict(num_hidden_layers=2),
    "gemma2": dict(
        model_type="gemma2",
        num_hidden_layers=2,  # one with a window, one without
        num_key_value_heads=2,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
        query_pre_attn_scalar=7,
        sliding_window=4,
    ),
}


@pytest.mark.parametrize("kind, batch", [("gemma", 1), ("gemma", 3), ("gemma2", 3)])
@torch.no_grad()
def test_the_model_can_be_exported(kind, batch, no_type_checks):
    """Encoder, prefill and decode step as graphs: for any length, and any batch."""
    config = tiny_config(text=EXPORTED[kind], vision=dict(num_hidden_layers=1))
    model, _ = pair(config)
    inputs = random_inputs(model.config, (5, 1, 3)[:batch])
    rows = {0: Dim.AUTO} if batch > 1 else {}
    length = Dim.AUTO
    arguments = (inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])

    encoder = torch.nn.Module()
    encoder.model, encoder.forward = model, model.encode_images
    images = export(encoder, arguments[1:2], dynamic_shapes=(rows,)).module()
    prefill = export(
        Prefill(model),
        arguments,
        dynamic_shapes=(rows | {1: length}, rows, rows | {1: length}),
    ).module()
    _, past = Prefill(model)(*arguments)
    step = export(
        DecodeStep(model),
        (torch.full((batch, 1), 7), torch.ones(batch, 10).long(), past),
        dynamic_shapes=(
            rows,
            rows | {1: length},
            [(rows | {2: length}, rows | {2: length})] * len(past),
        ),
    ).module()

    for prompts in ((7, 2, 4, 9)[: batch + (batch > 1)], (3, 3)[:batch]):
        inputs = random_inputs(model.config, prompts)
        mask, pixel_values = inputs["attention_mask"], inputs["pixel_values"]
        close(images(pixel_values), model.encode_images(pixel_values))
        logits, past = prefill(inputs["input_ids"], pixel_values, mask)
        cache = KVCache()
        close(logits, model(**inputs, kv_cache=cache)["logits"])
        for _ in range(3):
            token_ids = logits[:, -1:].argmax(dim=-1)
            mask = torch.cat([mask, torch.ones_like(token_ids)], dim=1)
            logits, past = step(token_ids, mask, past)
            expected = model(token_ids, attention_mask=mask, kv_cache=cache)
            close(logits, expected["logits"])


@torch.no_grad()
def test_a_graph_says_nan_for_a_picture_without_its_image_tokens(model, no_type_checks):
    """It can't raise an error, and must not answer about half a picture."""
    inputs = random_inputs(model.config, (5, 3))
    arguments = (inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
    prefill = export(Prefill(model), arguments).module()
    assert prefill(*arguments)[0].isfinite().all()
    for seats in (3, 5):
        input_ids = inputs["input_ids"].clone()
        input_ids[0] = 8
        input_ids[0, :seats] = model.config.image_token_index
        if seats == 5:  # more than there are features: PyTorch's own error
            with pytest.raises(RuntimeError):
                prefill(input_ids, *arguments[1:])
        else:
            assert prefill(input_ids, *arguments[1:])[0].isnan().all()


class ReadsNothing(TorchDispatchMode):
    """Fails where a value goes from a tensor to Python: a GPU would have to wait."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_no_pass_waits_for_a_gpu(model, cache, monkeypatch):
    """As on a GPU, where checks of values are left out."""
    for module in (vlm.merging, vlm.paligemma):
        monkeypatch.setattr(module, "can_read_values", lambda tensor: False)
    train = random_inputs(model.config, (5, 1), (2, 3), "right")
    inputs = random_inputs(model.config, (5, 1))
    kv_cache = KVCache()
    if cache == "static":
        kv_cache = StaticKVCache(model.config.text_config, 2, 12)
    ids, positions = torch.ones(2, dtype=torch.long), torch.full((2, 1), 9)
    mask = torch.ones(2, 1, 1, 12 if cache == "static" else 10, dtype=torch.bool)
    with ReadsNothing():
        model(**train)["loss"].backward()
        with torch.no_grad():
            model(**inputs, kv_cache=kv_cache, logits_to_keep=1)
            decode_one_token(model, ids, positions, mask, kv_cache)
    model.zero_grad()


def test_a_training_step_compiles_without_a_break(no_type_checks):
    model, _ = pair()
    inputs = random_inputs(model.config, (5, 1), (2, 3), "right")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(**inputs)["loss"], model(**inputs)["loss"])


# --- The loss -------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_what_is_to_be_learned():
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[-100, 3, -100, 6, 0], [2, -100, -100, -100, 1]])
    places = [(0, 0, 3), (0, 2, 6), (0, 3, 0), (1, 3, 1)]
    expected = -sum(F.log_softmax(logits[b, t], -1)[w] for b, t, w in places) / 4
    torch.testing.assert_close(next_token_loss(logits, labels), expected)
    torch.testing.assert_close(next_token_loss(logits, labels.int()), expected)
    assert next_token_loss(logits.bfloat16(), labels).dtype == torch.float32


# --- Errors ---------------------------------------------------------------------------


def test_labels_without_types_are_an_error(model):
    inputs = random_inputs(model.config, (5,), (3,))
    with pytest.raises(ValueError, match="labels need token_type_ids"):
        model(**without(inputs, "token_type_ids"))


def test_image_tokens_without_a_picture_are_an_error(model):
    inputs = random_inputs(model.config)
    with pytest.raises(ValueError, match="need pixel_values and an empty cache"):
        model(inputs["input_ids"])


@torch.no_grad()
def test_where_values_cannot_be_read_they_become_nan(model, monkeypatch):
    monkeypatch.setattr(vlm.paligemma, "can_read_values", lambda tensor: False)
    inputs = random_inputs(model.config)
    assert model(inputs["input_ids"])["logits"].isnan().all()
    assert model(inputs["input_ids"][:, 4:])["logits"].isfinite().all()


def test_a_picture_without_its_image_tokens_is_an_error(model):
    inputs = random_inputs(model.config)
    with pytest.raises(ValueError, match=r"rows with \[3\] image tokens"):
        model(inputs["input_ids"][:, 1:], inputs["pixel_values"])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(input_ids=torch.rand(1, 9)), "input_ids must be int64"),
        (dict(input_ids=torch.arange(9)), "input_ids must be int64"),
        (dict(input_ids=[[1, 2, 3]]), "input_ids must be int64 .*, not list"),
        (dict(attention_mask=torch.ones(9)), "attention_mask is"),
        (dict(attention_mask=torch.ones(1, 9, 9)), "attention_mask is"),
        (dict(position_ids=torch.zeros(1, 1).long()), "position_ids must be int64"),
        (dict(position_ids=torch.rand(1, 9)), "position_ids must be int64"),
        (dict(labels=torch.rand(1, 9)), "labels must be int64"),
        (dict(labels=torch.ones(1, 10).long()), "labels must be int64"),
        (dict(logits_to_keep=-1), "logits_to_keep"),
    ],
)
@torch.no_grad()
def test_inputs_of_another_kind_or_shape_are_refused_by_name(
    model, changes, name, no_type_checks
):
    inputs = random_inputs(model.config) | changes
    with pytest.raises(ValueError, match=name):
        model(**inputs)


@pytest.mark.parametrize("pictures", [2, 4])
def test_pictures_that_do_not_come_out_even_are_an_error(model, pictures):
    inputs = random_inputs(model.config, (5, 3, 4))
    pixel_values = torch.zeros(pictures, 3, 28, 28)
    with pytest.raises(ValueError, match=f"{pictures} pictures can't serve 3 rows"):
        model(inputs["input_ids"], pixel_values)


@pytest.mark.parametrize("name", ["attention_mask", "token_type_ids"])
def test_masks_and_types_of_another_shape_are_errors(model, name):
    inputs = random_inputs(model.config, (5, 5))
    for wrong in (inputs[name][:, 1:], inputs[name][:1]):
        with pytest.raises(ValueError, match=rf"{name} is \[.*expected \[2, 9\]: 0 "):
            model(**(inputs | {name: wrong}))


@torch.no_grad()
def test_a_mask_that_did_not_grow_is_an_error(model):
    inputs = random_inputs(model.config, (5, 5))
    cache = KVCache()
    model(**inputs, kv_cache=cache)
    token = inputs["input_ids"][:, -1:]
    with pytest.raises(ValueError, match="expected .2, 10.: 9 tokens in the cache"):
        model(token, attention_mask=inputs["attention_mask"], kv_cache=cache)


def test_more_tokens_than_positions_are_an_error():
    config = tiny_config(text=dict(max_position_embeddings=8))
    model = PaliGemmaForConditionalGeneration(config)
    inputs = random_inputs(config, (5,))
    with pytest.raises(ValueError, match="9 tokens, but .* 8 positions"):
        model(**inputs)
