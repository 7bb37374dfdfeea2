import copy as copy_module
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import jaxtyping
import pytest
import torch
import transformers
from checkpoints import assert_same_weights, content, edit, refused, rewrite
from peft import LoraConfig, get_peft_model
from reference import pair, random_inputs, tiny_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import vlm.hub
import vlm.weights
from vlm.hub import (
    COMPANIONS,
    EMBEDDED,
    EMBEDDING,
    INDEX_FILE,
    SINGLE_FILE,
    TIED,
    canonical_name,
    find_tensors,
    require_space,
)
from vlm.paligemma import PaliGemmaForConditionalGeneration
from vlm.processing import PaliGemmaProcessor
from vlm.segmentation import load_mask_decoder
from vlm.weights import (
    check_tensors,
    empty_model,
    load_chosen_model,
    load_hf_model,
    make_processor,
    save_hf_model,
)

CONFIGS = {
    "mqa": dict(),
    "gqa": dict(text=dict(num_key_value_heads=2), vision=dict(image_size=42)),
    "image-id-outside-the-table": dict(image_token_index=128),
}
LAYER = "language_model.model.layers.1."
LORA = LoraConfig(r=2, target_modules=["q_proj", "fc1", "linear"])


@pytest.fixture(scope="module", params=CONFIGS)
def models(request):
    torch.manual_seed(0)
    return pair(tiny_config(**CONFIGS[request.param]))


@pytest.fixture
def shards(model, tokenizer, tmp_path):
    save_hf_model(model, tokenizer, tmp_path / "shards", max_shard_size="40KB")
    return tmp_path / "shards"


def names_in(folder):
    return {stored.name for stored in find_tensors(folder)}


# --- There and back -----------------------------------------------------------------


def test_round_trip(models, tokenizer, tmp_path):
    save_hf_model(models[0], tokenizer, tmp_path)
    again, their_tokenizer = load_hf_model(tmp_path, "cpu")
    assert_same_weights(again, models[0])
    assert again.config == models[0].config and not again.training
    text = "detect owl ; pizza\n<loc0001><seg127> 🦉"
    assert their_tokenizer.encode(text) == tokenizer.encode(text)
    assert their_tokenizer.get_vocab() == tokenizer.get_vocab()
    inputs = random_inputs(again.config, (5, 2))
    with torch.no_grad():
        expected = models[0](**inputs)["logits"]
        torch.testing.assert_close(again(**inputs)["logits"], expected, atol=0, rtol=0)


def test_round_trip_in_shards(model, shards):
    files = sorted(path.name for path in shards.glob("*.safetensors"))
    assert len(files) > 2 and not (shards / SINGLE_FILE).exists()
    assert_same_weights(load_hf_model(shards, "cpu")[0], model)


def test_transformers_loads_what_we_save(models, tokenizer, tmp_path):
    ours, theirs = models
    save_hf_model(ours, tokenizer, tmp_path)
    loaded, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    inputs = random_inputs(ours.config, (5, 2))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = loaded.eval()(**inputs).logits[real]
        actual = ours(**inputs)["logits"][real]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    settings = loaded.generation_config
    assert (settings.bos_token_id, settings.eos_token_id) == (2, 1)
    assert settings.pad_token_id == 0


@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_transformers_finds_every_tensor_and_no_other(model, tokenizer, tmp_path, size):
    save_hf_model(model, tokenizer, tmp_path, size)
    _, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[kind], (kind, info[kind])


def test_transformers_processor_reads_what_we_save(checkpoint, tokenizer, model):
    sizes = model.config.vision_config
    ours = PaliGemmaProcessor(tokenizer, sizes.num_image_tokens, sizes.image_size)
    picture = torch.randint(0, 256, (50, 30, 3), dtype=torch.uint8).numpy()
    theirs = transformers.AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    expected = theirs(picture, return_tensors="pt")["pixel_values"]
    actual = ours("caption en", picture)["pixel_values"]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", ["1GB", "40KB"])
def test_what_transformers_saves_loads(models, tokenizer, tmp_path, size):
    ours, theirs = models
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / INDEX_FILE).exists() == (size == "40KB")
    names = names_in(tmp_path)
    assert not any("vision_model" in name or "lm_head" in name for name in names)
    assert_same_weights(load_hf_model(tmp_path, "cpu")[0], ours)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("layout", ["hub", "memory"])
def test_layouts_with_and_without_head(models, tokenizer, tmp_path, layout, head):
    ours, theirs = models
    save_hf_model(ours, tokenizer, tmp_path)
    state = (ours if layout == "hub" else theirs).state_dict()
    state = {
        name: t.clone() for name, t in state.items() if head or "lm_head" not in name
    }
    assert any("lm_head" in name for name in state) == head
    save_file(state, tmp_path / SINGLE_FILE, {"format": "pt"})
    assert_same_weights(load_hf_model(tmp_path, "cpu")[0], ours)


@pytest.mark.parametrize("name", [TIED, "lm_head.weight", "model.lm_head.weight"])
def test_the_embedding_may_lie_under_the_head_s_name_alone(copy, model, name):
    """safetensors' save_model keeps one name of tied weights, either one."""
    rewrite(copy, lambda t: {name if n == EMBEDDING else n: x for n, x in t.items()})
    assert EMBEDDING not in names_in(copy)
    assert_same_weights(load_hf_model(copy, "cpu")[0], model)
    loaded, _ = load_hf_model(copy, "cpu", "bfloat16")
    assert loaded.language_model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["hub", "memory"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_names_that_wrappers_give_are_read(
    models, tokenizer, tmp_path, prefix, layout
):
    ours, theirs = models
    save_hf_model(ours, tokenizer, tmp_path)
    state = (ours if layout == "hub" else theirs).state_dict()
    state = {f"{prefix}{name}": tensor.clone() for name, tensor in state.items()}
    save_file(state, tmp_path / SINGLE_FILE, {"format": "pt"})
    assert_same_weights(load_hf_model(tmp_path, "cpu")[0], ours)


def test_names_of_all_layouts(models):
    ours, theirs = models
    names = {canonical_name(name) for name in theirs.state_dict()}
    assert names == set(ours.state_dict())
    assert {canonical_name(name) for name in names} == names


# --- What doesn't fit is refused ----------------------------------------------------


def without(part):
    return lambda t: {name: x for name, x in t.items() if part not in name}


def with_tensor(name, tensor):
    return lambda t: t | {name: tensor}


def transposed(tensors):
    name = LAYER + "mlp.up_proj.weight"
    return tensors | {name: tensors[name].T.contiguous()}


QUERY, NORM = LAYER + "self_attn.q_proj.weight", LAYER + "input_layernorm.weight"
TENSORS = {  # what becomes of the file's tensors → key words of the error
    "missing": (without(QUERY), f"missing {QUERY}"),
    "missing embedding": (without(EMBEDDING), f"missing {EMBEDDING}"),
    "unexpected": (with_tensor("model.odd.x", torch.ones(1)), r"unexpected model\.odd"),
    "shape": (transposed, LAYER + r"mlp\.up.* shape \[32, 48\], not \[48, 32\]"),
    "dtype": (with_tensor(NORM, torch.ones(32).int()), f"{NORM}.* dtype torch.int32"),
    "twice": (with_tensor("module." + NORM, torch.ones(32)), f"{NORM} in .* repeats"),
    "untied": (
        lambda t: t | {"lm_head.weight": t[EMBEDDING] + 1},
        f"{EMBEDDING} and {TIED} differ",
    ),
    "many": (without("norm"), r"\d+ tensors: missing vision_tower"),
    "a layer": (without(LAYER), f"missing {LAYER}"),
    "a tower": (without("vision"), "missing vision_tower"),
    "adapters inside": (
        with_tensor(LAYER + "mlp.up_proj.lora_A.weight", torch.ones(2, 32)),
        "unexpected .*lora_A.*merge_and_unload",
    ),
    "a peft wrapper's": (
        lambda t: {"base_model.model." + name: x for name, x in t.items()},
        "merge_and_unload",
    ),
    "packed": (
        with_tensor(LAYER + "mlp.up_proj.qweight", torch.ones(2, 32).int()),
        "unexpected .*qweight.*quantized",
    ),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_damaged_checkpoints_are_refused(copy, damage):
    change, words = TENSORS[damage]
    rewrite(copy, change)
    with refused(ValueError, words, str(copy)):
        load_hf_model(copy, "cpu")


def test_an_empty_file(copy):
    rewrite(copy, lambda tensors: {})
    with refused(ValueError, f"{copy} doesn't fit .* tensors: missing"):
        load_hf_model(copy, "cpu")


def test_checked_before_a_weight_is_read(copy, monkeypatch):
    rewrite(copy, transposed)
    monkeypatch.setattr(vlm.weights, "read_weights", pytest.fail)
    with refused(ValueError, "has shape"):
        load_hf_model(copy, "cpu")


def test_numbers_are_compared_only_where_two_names_must_agree(copy, monkeypatch):
    monkeypatch.setattr(torch, "equal", pytest.fail)
    load_hf_model(copy, "cpu")


def test_all_problems_at_once(model, copy):
    rewrite(copy, lambda t: transposed(without(QUERY)(t)))
    with refused(ValueError, "has shape .*; missing"):
        check_tensors(model, find_tensors(copy), copy)


@pytest.mark.parametrize("keep", [0, 5, 10_000])
def test_a_truncated_file(copy, keep):
    os.truncate(copy / SINGLE_FILE, keep)
    with refused(ValueError, f"{copy}/{SINGLE_FILE} can't be read .*fetch it"):
        load_hf_model(copy, "cpu")


INSTEAD = {
    "model-Q4_K_M.gguf": "GGUF",
    "pytorch_model-00001-of-00002.bin": "pickle",
    "paligemma-3b-pt-224.npz": "JAX",
    "model.weights.h5": "Keras",
    "model-00001-of-00002.safetensors": "shards with their index",
    "README.md": "fetch it",
}


@pytest.mark.parametrize("name", INSTEAD)
@pytest.mark.parametrize("missing", ["config.json", SINGLE_FILE])
def test_another_format_is_named(copy, name, missing):
    (copy / missing).unlink()
    (copy / name).write_bytes(b"x")
    with refused(FileNotFoundError, f"no {missing} in {copy}.*{INSTEAD[name]}.*hub id"):
        load_hf_model(copy, "cpu")


@pytest.mark.parametrize("missing", ["config.json", SINGLE_FILE])
def test_a_trainer_s_folder_names_its_last_checkpoint(checkpoint, copy, missing):
    for number in (500, 1000, 50):
        shutil.copytree(checkpoint, copy / f"checkpoint-{number}")
    (copy / missing).unlink()
    with refused(FileNotFoundError, "give one like .*checkpoint-1000$"):
        load_hf_model(copy, "cpu")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", SINGLE_FILE, COMPANIONS[0]]
)
def test_git_lfs_pointers(copy, name):
    (copy / name).write_text(POINTER)
    load = load_mask_decoder if name in COMPANIONS else load_hf_model
    with refused(FileNotFoundError, f"{name}.*git lfs pull"):
        load(copy)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"model": 3}', ""])
def test_a_tokenizer_that_is_missing_or_broken(copy, text):
    for path in copy.glob("tokenizer*"):
        path.unlink() if text is None else path.write_text(text)
    with refused(FileNotFoundError, f"no tokenizer .* {copy}"):
        load_hf_model(copy, "cpu")


@pytest.mark.parametrize(
    "value", [{"load_in_4bit": True}, {"quant_method": "awq"}, "int8", None]
)
def test_quantized_weights(copy, value):
    edit(copy / "config.json", lambda v: v | {"quantization_config": value})
    words = "config.json: quantization_config=.* original weights"
    with refused(ValueError, words) if value else nullcontext():
        load_hf_model(copy, "cpu")


def test_another_architecture(copy):
    text = {"text_config": {"model_type": "llama"}}
    edit(copy / "config.json", lambda values: values | text)
    with refused(ValueError, "config.json.*llama"):
        load_hf_model(copy, "cpu")


def unlink_last(folder):
    sorted(folder.glob("*.safetensors"))[-1].unlink()


def truncate_last(folder):
    last = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(last, last.stat().st_size - 1)


def index_another_shard(folder):
    """The index says that one tensor lies in another shard than it does."""
    weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    files = list(weight_map.values())
    first = max(files, key=files.count)  # moving one tensor away leaves it others
    name = next(n for n, file in weight_map.items() if file == first)
    weight_map[name] = max(file for file in files if file != first)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def index_without_first(folder):
    first = sorted(folder.glob("*.safetensors"))[0].name
    values = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    kept = {name: file for name, file in values.items() if file != first}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": kept}))


def tensor_in_two_shards(folder):
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)


def without_index(folder):
    (folder / INDEX_FILE).unlink()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            unlink_last,
            FileNotFoundError,
            "shards/model-.*, named in the index, is missing",
        ),
        (truncate_last, ValueError, "can't be read"),
        (index_without_first, ValueError, "missing vision_tower"),
        (
            tensor_in_two_shards,
            ValueError,
            "in model-00002.* repeats one in model-00001",
        ),
        (without_index, FileNotFoundError, "shards with their index"),
    ],
)
def test_damaged_shards_are_refused(shards, change, error, words):
    change(shards)
    with refused(error, words):
        load_hf_model(shards, "cpu")


def test_a_tensor_is_read_from_the_shard_that_has_it(model, shards):
    """Headers say what is where: not an index's wrong line, nor an old shard's."""
    index_another_shard(shards)
    save_file({"odd": torch.ones(1)}, shards / "model-00009-of-00009.safetensors")
    assert_same_weights(load_hf_model(shards, "cpu")[0], model)


BROKEN = ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": null}}']


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_index(shards, text):
    (shards / INDEX_FILE).write_text(text)
    with refused(ValueError, f"{INDEX_FILE} is not an index"):
        load_hf_model(shards, "cpu")


def test_an_index_names_shards_beside_it_alone(shards, tmp_path):
    """Whatever path an index holds, no file of another folder is read."""
    outside = tmp_path / "outside.safetensors"
    save_file({"x": torch.ones(1)}, outside)
    for path in (str(outside), "../outside.safetensors"):
        text = json.dumps({"weight_map": {"x": path}})
        (shards / INDEX_FILE).write_text(text)
        with refused(
            FileNotFoundError, "shards/outside.safetensors, named in the index, is miss"
        ):
            find_tensors(shards)


def test_another_models_tokenizer(checkpoint, monkeypatch):
    model, tokenizer = load_hf_model(checkpoint, "cpu")
    monkeypatch.setattr(model.config, "image_token_index", 7)
    with refused(ValueError, "7 for the model"):
        make_processor(model, tokenizer)


def test_config_and_weights_of_different_picture_sizes(copy, model, tokenizer):
    larger = tiny_config(vision=dict(image_size=42))
    larger.save_pretrained(copy)
    with refused(ValueError, r"position_.* shape \[4, 24\], not \[9, 24\]"):
        load_hf_model(copy, "cpu")
    save_hf_model(PaliGemmaForConditionalGeneration(larger), tokenizer, copy)
    model.config.save_pretrained(copy)
    with refused(ValueError, r"position_.* shape \[9, 24\], not \[4, 24\]"):
        load_hf_model(copy, "cpu")


def test_processor_and_model_of_different_picture_sizes(tokenizer):
    words = dict(
        text=dict(vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = PaliGemmaForConditionalGeneration(tiny_config(**words))
    wide = tiny_config(vision=dict(image_size=42), **words)
    larger = PaliGemmaForConditionalGeneration(wide)
    picture = torch.randint(0, 256, (50, 30, 3), dtype=torch.uint8).numpy()
    small, large = (make_processor(m, tokenizer) for m in (model, larger))
    assert (small.num_image_tokens, large.num_image_tokens) == (4, 9)
    with pytest.raises(ValueError, match="use a processor with image_size=42"):
        larger(**small("caption en", picture))
    with pytest.raises(ValueError, match="use a processor with image_size=28"):
        model(**large("caption en", picture))
    finest = PaliGemmaProcessor(tokenizer, 1024, 448)  # as published, 14 px a patch
    with pytest.raises(ValueError, match=r"shape \[1, 3, 448, 448\].*image_size=42"):
        larger(**finest("caption en", picture))
    wrong = PaliGemmaProcessor(tokenizer, 4, 42)  # right pixels, too few seats
    with pytest.raises(ValueError, match=r"9 features each .* \[4\] image tokens"):
        larger(**wrong("caption en", picture))


# Spoiled at random: an error that a reader can use, at once, or none

VALUES = (None, True, -1, 0, 0.5, 1e300, 10**12, 10**30, float("nan"), "", "x" * 400)
VALUES += ([], [1] * 99, {}, {"a": None}, "F4", "I64", [2**62, 2**62], [-1, 3])


def spoil_value(draw, tree):
    """Replace, remove or rename something in nested dicts and lists."""
    while True:
        key = draw.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        if (
            not isinstance(tree[key], dict | list)
            or not tree[key]
            or draw.random() < 0.2
        ):
            break
        tree = tree[key]
    action = draw.random()
    if action < 0.15:
        del tree[key]
    elif action < 0.25 and isinstance(tree, dict):
        tree[draw.choice(["", "x" * 300, "model.x", f"{key}.", "layers.9e9."])] = (
            tree.pop(key)
        )
    else:
        tree[key] = draw.choice(VALUES)


def spoil_bytes(draw, data):
    """Cut off, overwrite or repeat a piece."""
    start = draw.randrange(min(len(data), 2000))
    piece = draw.choice([b"", b"\0" * 9, b"\xff", b"{", b'"', b"9" * 30, data[:start]])
    return data[:start] + piece + data[start + draw.choice([0, 1, 9, 10**9]) :]


def spoil_header(draw, data):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    spoil_value(draw, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def spoil_json(draw, data):
    values = json.loads(data)
    spoil_value(draw, values)
    return json.dumps(values).encode()


@pytest.fixture
def types_unchecked():
    """As users run it: a field of a wrong type reaches the code."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("gemma", ["gemma", "gemma2"])
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("config.json", spoil_json),
        ("config.json", spoil_bytes),
        (SINGLE_FILE, spoil_header),
        (SINGLE_FILE, spoil_bytes),
        (INDEX_FILE, spoil_json),
    ],
)
def test_what_is_spoiled_is_refused_in_a_line(
    tokenizer, tmp_path, monkeypatch, types_unchecked, name, how, gemma
):
    sizes = dict(vision=dict(num_hidden_layers=1), text=dict(model_type=gemma))
    model = PaliGemmaForConditionalGeneration(tiny_config(**sizes))
    save_hf_model(model, tokenizer, tmp_path, "100KB" if name == INDEX_FILE else "5GB")
    monkeypatch.setattr(vlm.weights, "load_tokenizer", lambda folder: None)  # quick
    whole, draw, refused = (tmp_path / name).read_bytes(), random.Random(0), 0
    for _ in range(40):
        (tmp_path / name).write_bytes(how(draw, whole))
        try:
            load_hf_model(tmp_path, "cpu")
        except (ValueError, FileNotFoundError) as error:
            said, refused = str(error), refused + 1
            assert len(said) < 500 and "\n" not in said, said
    assert refused >= 10


ABSURD = {
    "text_config": dict(num_hidden_layers=1000),
    "vision_config": dict(num_hidden_layers=1000),
    "image": dict(image_size=20_000, patch_size=2, num_image_tokens=None),
}


@pytest.mark.parametrize("part", ABSURD)
def test_absurd_sizes_are_refused_before_anything_is_built(copy, monkeypatch, part):
    values = json.loads((copy / "config.json").read_text())
    values[part if part != "image" else "vision_config"] |= ABSURD[part]
    (copy / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr(vlm.weights, "empty_model", pytest.fail)
    with pytest.raises(ValueError, match="config.json: .*(=1000|=20000), expected "):
        load_hf_model(copy, "cpu")


# --- Device, dtype and memory -------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64"])
def test_dtype(checkpoint, dtype):
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    model, _ = load_hf_model(checkpoint, "cpu", dtype)
    assert {p.dtype for p in model.parameters()} == {wanted} and model.dtype == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_dtype_is_the_files(model, tokenizer, tmp_path, dtype):
    halved = copy_module.deepcopy(model).to(dtype)
    save_hf_model(halved, tokenizer, tmp_path)
    assert_same_weights(load_hf_model(tmp_path, "cpu")[0], halved)


def test_one_dtype_though_the_file_has_two(model, tokenizer, tmp_path):
    save_hf_model(copy_module.deepcopy(model).bfloat16(), tokenizer, tmp_path)
    rewrite(
        tmp_path, lambda t: {n: x.float() if "norm" in n else x for n, x in t.items()}
    )
    loaded, _ = load_hf_model(tmp_path, "cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_mapped_weights_can_be_trained_and_the_file_stays(copy):
    before = (copy / SINGLE_FILE).read_bytes()
    model, _ = load_hf_model(copy, "cpu")
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    inputs = random_inputs(model.config, (5, 1), (2, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = model(**inputs)["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
    assert (copy / SINGLE_FILE).read_bytes() == before


def mapped_ranges(file):
    """Where in this process's memory a file is mapped, from Linux's own list."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            start, _, end = line.split()[0].partition("-")
            yield int(start, 16), int(end, 16)


def test_an_empty_model_has_shapes_and_nothing_to_compute(model):
    code = (
        "import sys; from vlm.weights import PaliGemmaConfig, empty_model; "
        "model = empty_model(PaliGemmaConfig()); "
        "assert all(weight.is_meta for weight in model.parameters()); "
        "assert 'torch._dynamo' not in sys.modules, 'the compiler was loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shapes = {
        name: t.shape for name, t in empty_model(model.config).state_dict().items()
    }
    assert shapes == {name: t.shape for name, t in model.state_dict().items()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_on_the_cpu_the_file_is_the_model(copy, monkeypatch):
    def no_memory(tensor, *args, **kwargs):
        assert tensor.is_meta, "random numbers were made, only to be overwritten"
        return tensor

    monkeypatch.setattr(torch.Tensor, "normal_", no_memory)
    model, _ = load_hf_model(copy, "cpu")
    ranges = list(mapped_ranges(copy / SINGLE_FILE))
    for name, weight in model.named_parameters():
        place = weight.data_ptr()
        assert any(start <= place < end for start, end in ranges), name
    halves, _ = load_hf_model(copy, "cpu", "bfloat16")
    place = next(halves.parameters()).data_ptr()
    assert not any(start <= place < end for start, end in ranges)


PEAK = """
import sys
from pathlib import Path
from vlm.hub import find_tensors
from vlm.weights import load_hf_model

def memory(field):
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 1024

tiny, folder, dtype = sys.argv[1:]
load_hf_model(tiny, "cpu", dtype)  # so that all libraries are there before we measure
before = memory("VmRSS")
model, _ = load_hf_model(folder, "cpu", dtype)
for weight in model.parameters():
    weight.sum().item()  # a mapped file takes memory when it is read
files = {stored.file for stored in find_tensors(Path(folder))}
size = sum(file.stat().st_size for file in files)
print((memory("VmHWM") - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_conversion_takes_the_new_model_s_memory_and_no_copy_of_the_file(
    checkpoint, tokenizer, tmp_path
):
    text = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=24)
    model = PaliGemmaForConditionalGeneration(tiny_config(text=text))
    save_hf_model(model, tokenizer, tmp_path)
    command = [sys.executable, "-c", PEAK, checkpoint, tmp_path, "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Half of the file, the tensor that is being converted, and what loading needs.
    assert float(done.stdout) < 0.75


# --- Saving -------------------------------------------------------------------------


def test_what_a_killed_save_left_goes_with_the_next(copy, tokenizer):
    model, _ = load_hf_model(copy, "cpu")
    (copy / ".unfinished-save-x").mkdir()
    (copy / ".unfinished-save-x" / SINGLE_FILE).write_bytes(b"half")
    save_hf_model(model, tokenizer, copy)
    assert not [*copy.glob(".*")]


def test_a_save_that_breaks_off_leaves_the_old_one(copy, tokenizer, monkeypatch):
    before = content(copy)
    torch.manual_seed(5)
    other = pair()[0]

    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)  # after the weights
    with pytest.raises(OSError, match="disk full"):
        save_hf_model(other, tokenizer, copy)
    assert content(copy) == before


def test_saving_over_leaves_nothing_behind(shards, tokenizer):
    torch.manual_seed(5)
    other = pair()[0]
    save_hf_model(other, tokenizer, shards)  # one file where shards were
    assert [path.name for path in shards.glob("*.safetensors*")] == [SINGLE_FILE]
    assert_same_weights(load_hf_model(shards, "cpu")[0], other)
    save_hf_model(other, tokenizer, shards, max_shard_size="60KB")
    assert not (shards / SINGLE_FILE).exists()
    assert_same_weights(load_hf_model(shards, "cpu")[0], other)


def test_a_loaded_model_can_be_saved_where_it_came_from(copy, tokenizer):
    model, _ = load_hf_model(copy, "cpu")
    with torch.no_grad():
        model.language_model.model.norm.weight.add_(1)
    save_hf_model(model, tokenizer, copy)
    assert_same_weights(load_hf_model(copy, "cpu")[0], model)


def test_files_are_what_the_hub_has(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    assert {"config.json", "preprocessor_config.json", "tokenizer.json"} <= names
    assert {SINGLE_FILE, "generation_config.json"} <= names
    assert TIED not in names_in(checkpoint)
    modes = {path.stat().st_mode for path in checkpoint.iterdir()}
    assert len(modes) == 1  # the weights may be read by whoever reads the config


def wrapped(model, how):
    """(a wrapped copy, the model that a save of it must bring back, or None)."""
    model = copy_module.deepcopy(model)
    if how == "compiled":
        return torch.compile(model), model
    if how == "compiled parts":
        whole = copy_module.deepcopy(model)
        model.vision_tower = torch.compile(model.vision_tower)
        layers = model.language_model.model.layers
        layers[1] = torch.compile(layers[1])
        return model, whole
    if how == "data parallel":  # DistributedDataParallel names its inside so, too
        return torch.compile(torch.nn.DataParallel(model)), model
    if how == "merged adapters":
        adapted = get_peft_model(model, LORA).merge_and_unload()
        return adapted, copy_module.deepcopy(adapted)
    if how == "peft":
        return get_peft_model(model, LORA), None
    if how == "adapters inside":
        return get_peft_model(model, LORA).base_model.model, None
    if how == "untied":
        head = model.language_model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach() + 1)
        return model, None
    if how == "no numbers":
        return empty_model(model.config), None
    if how == "integers":
        norm = model.language_model.model.norm
        norm.weight = torch.nn.Parameter(norm.weight.int(), requires_grad=False)
        return model, None
    if how == "another size":
        layer = torch.nn.Linear(8, 8)
        model.multi_modal_projector.linear = layer
        return model, None
    return pair()[1], None  # transformers'


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize(
    "how",
    [
        "compiled",
        "compiled parts",
        "data parallel",
        "merged adapters",
        "peft",
        "adapters inside",
        "untied",
        "no numbers",
        "integers",
        "another size",
        "transformers'",
    ],
)
def test_a_wrapped_model_is_unwrapped_or_refused(model, copy, tokenizer, how):
    before = content(copy)
    given, expected = wrapped(model, how)
    if expected is None:
        with pytest.raises(ValueError):
            save_hf_model(given, tokenizer, copy)
        assert content(copy) == before
        return
    save_hf_model(given, tokenizer, copy)
    assert not any("_orig_mod" in name for name in names_in(copy))
    assert_same_weights(load_hf_model(copy, "cpu")[0], expected)


def test_what_ddp_wraps_is_saved_with_its_companions(copy, tokenizer, tmp_path):
    import torch.distributed as dist

    (copy / COMPANIONS[0]).write_bytes(b"decoder")
    model, _ = load_hf_model(copy, "cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        save_hf_model(ddp, tokenizer, tmp_path / "ddp")
    finally:
        dist.destroy_process_group()
    again, _ = load_hf_model(tmp_path / "ddp", "cpu")
    assert_same_weights(again, model)
    assert again.companions == [tmp_path / "ddp" / "mask_decoder.safetensors"]
    assert model.companions == [copy / "mask_decoder.safetensors"]


def test_a_full_disk_leaves_the_old_checkpoint(copy, model, monkeypatch, tokenizer):
    before = content(copy)

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(vlm.weights, "save_torch_state_dict", full)
    with refused(OSError, "No space left", "nothing .* replaced"):
        save_hf_model(model, tokenizer, copy)
    assert content(copy) == before


@pytest.mark.parametrize("size", ["5GB", "40KB"])
@pytest.mark.parametrize("before", ["5GB", "40KB"])
def test_a_save_stopped_between_two_files_is_finished_by_the_next_load(
    model, tokenizer, tmp_path, monkeypatch, before, size
):
    """Whichever move is the last one: the new weights come, whole."""
    torch.manual_seed(5)
    wider = PaliGemmaForConditionalGeneration(tiny_config(text=dict(vocab_size=130)))
    save_hf_model(wider, tokenizer, tmp_path / "wanted", size)
    wanted, move = content(tmp_path / "wanted"), os.replace
    for allowed in range(len(wanted) + 1):
        folder, moves = tmp_path / str(allowed), iter(range(allowed + 1))

        def stop(*paths, moves=moves):
            if next(moves, None) is None:
                raise KeyboardInterrupt
            move(*paths)

        save_hf_model(model, tokenizer, folder, before)
        monkeypatch.setattr(os, "replace", stop)
        try:
            save_hf_model(wider, tokenizer, folder, size)
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(os, "replace", move)
        last = SINGLE_FILE if SINGLE_FILE in wanted else INDEX_FILE
        moved = content(folder).get(last) == wanted[last]
        assert moved == (allowed == len(wanted))  # until then, the old one is found
        assert_same_weights(load_hf_model(folder, "cpu")[0], wider)
        assert content(folder) == wanted, allowed


# Files that belong to a model's mask tokens


def test_companions_are_known_by_their_names():
    from vlm.mask_tokens import DECODER_FILE, ENCODER_FILE
    from vlm.segmentation import GOOGLE_DECODER

    assert COMPANIONS == (DECODER_FILE, ENCODER_FILE, GOOGLE_DECODER)


@pytest.mark.parametrize("names", [COMPANIONS[:2], COMPANIONS[:1], COMPANIONS[2:]])
def test_what_reads_mask_tokens_comes_along(copy, tokenizer, tmp_path, names):
    for name in names:
        (copy / name).write_bytes(name.encode())
    model, _ = load_hf_model(copy, "cpu")
    assert model.name_or_path == str(copy.resolve())
    save_hf_model(model, tokenizer, tmp_path / "new")
    again, _ = load_hf_model(tmp_path / "new", "cpu")
    save_hf_model(again, tokenizer, tmp_path / "new")  # where it came from
    save_hf_model(again, tokenizer, tmp_path / "newer")
    for folder in ("new", "newer"):
        found = {n: x for n, x in content(tmp_path / folder).items() if n in COMPANIONS}
        assert found == {name: name.encode() for name in names}


def test_a_new_model_s_come_from_a_folder_that_is_named(model, tokenizer, tmp_path):
    save_hf_model(model, tokenizer, tmp_path / "new", companions_from=EMBEDDED)
    again, _ = load_hf_model(tmp_path / "new", "cpu")
    assert again.companions == [tmp_path / "new" / name for name in COMPANIONS[:2]]
    for name in COMPANIONS[:2]:
        assert (tmp_path / "new" / name).read_bytes() == (EMBEDDED / name).read_bytes()
    with refused(FileNotFoundError, "mask_decoder"):
        save_hf_model(model, tokenizer, tmp_path / "no", companions_from=tmp_path)
    assert not (tmp_path / "no").exists()


def test_companions_that_are_gone_are_missed_before_anything_is_replaced(
    copy, checkpoint, tokenizer, tmp_path
):
    (copy / COMPANIONS[0]).write_bytes(b"decoder")
    model, _ = load_hf_model(copy, "cpu")
    (copy / COMPANIONS[0]).unlink()
    place = Path(shutil.copytree(checkpoint, tmp_path / "place"))
    before = content(place)
    for folder in (place, copy):
        with refused(FileNotFoundError, "mask_decoder"):
            save_hf_model(model, tokenizer, folder)
    assert content(place) == before


def test_another_model_s_companions_are_not_taken_for_this_one_s(
    model, copy, tokenizer
):
    (copy / COMPANIONS[0]).write_bytes(b"decoder")
    before = content(copy)
    with refused(ValueError, "mask_decoder"):
        save_hf_model(model, tokenizer, copy)
    assert content(copy) == before
    save_hf_model(model, tokenizer, copy, companions_from=copy)


def test_space_is_checked_before_anything_is_written(model, copy, monkeypatch):
    before = content(copy)
    usage = shutil.disk_usage(copy)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    monkeypatch.setattr(vlm.weights, "save_torch_state_dict", pytest.fail)
    with pytest.raises(OSError, match=r"needs .* GB, 0\.0001 GB free in") as raised:
        save_hf_model(model, None, copy)
    assert raised.value.errno == errno.ENOSPC and content(copy) == before
    require_space(copy / "not" / "there" / "yet", 100_000)
    with pytest.raises(OSError, match="GB free in"):
        require_space(copy / "not" / "there" / "yet", 100_001)
    assert content(copy) == before


# The model that VLM_MODEL names


def test_chosen_model_is_the_embedded_one_unless_another_is_named(monkeypatch):
    monkeypatch.delenv("VLM_MODEL", raising=False)
    model, tokenizer, about = load_chosen_model()
    assert EMBEDDED.name in about and "nothing else" in about
    assert str(model.dtype) in about and len(tokenizer) > 0


def test_the_weights_page_says_what_the_sizes_say():
    root = Path(__file__).resolve().parent.parent
    tool = root / "tools" / "what_fits.py"
    done = subprocess.run(
        [sys.executable, tool, "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_chosen_model_comes_from_a_folder_and_is_named(checkpoint, monkeypatch):
    monkeypatch.setenv("VLM_MODEL", str(checkpoint))
    loaded, _, about = load_chosen_model()
    assert about.startswith(f"{checkpoint}: ") and "sticker" not in about
    assert_same_weights(loaded.float().cpu(), load_hf_model(checkpoint, "cpu")[0])


@pytest.mark.parametrize("name", ["/no/such/folder", "someone/something@main"])
def test_a_chosen_model_that_cant_be_had_is_explained_and_replaced(
    name, monkeypatch, capsys
):
    monkeypatch.setenv("VLM_MODEL", name)
    _, _, about = load_chosen_model()
    said = capsys.readouterr().out
    assert f"VLM_MODEL={name} can't be loaded: no folder {name}" in said
    assert "embedded model" in said and EMBEDDED.name in about
