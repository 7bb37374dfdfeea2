import json
import os
import re
import shutil

import pytest
import torch
from checkpoints import adapted, assert_same_weights, edit_adapter, refused
from peft import IA3Config, PeftModel
from reference import pair, random_inputs
from safetensors.torch import load_file, save_file

from vlm.hub import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    COMPANIONS,
    EMBEDDED,
    SINGLE_FILE,
    canonical_name,
)
from vlm.paligemma import PaliGemmaForConditionalGeneration
from vlm.segmentation import load_mask_decoder
from vlm.weights import load_hf_model, save_hf_model


@pytest.fixture
def adapter(copy, tmp_path):
    """A folder with an adapter for the checkpoint `copy`, which has a mask decoder."""
    (copy / COMPANIONS[0]).write_bytes(b"decoder")
    wrapped = adapted(load_hf_model(copy, "cpu")[0])
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model, config):
    torch.manual_seed(7)
    with torch.no_grad():
        return model(**random_inputs(config, (5, 2)))["logits"]


SETTINGS = {
    "lora": {},
    "scaled": dict(target_modules=["o_proj", "fc2"], lora_alpha=5, use_rslora=True),
    "by pattern": dict(
        target_modules=r".*layers\.1\..*_proj", exclude_modules=".*up.*"
    ),
    "dora": dict(use_dora=True),
    "whole parts": dict(modules_to_save=["post_layernorm", "norm"]),
    "ranks": dict(rank_pattern={"layers.1.mlp.fc1": 3}, alpha_pattern={"q_proj": 9}),
}


@pytest.mark.parametrize("how", SETTINGS)
def test_an_adapter_loads_merged_into_its_base(copy, tokenizer, tmp_path, how):
    (copy / COMPANIONS[0]).write_bytes(b"decoder")
    base = load_hf_model(copy, "cpu")[0]
    wrapped = adapted(base, **SETTINGS[how])
    config = base.config
    expected = logits(wrapped, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    model, _ = load_hf_model(tmp_path / "adapter", "cpu")
    assert type(model) is PaliGemmaForConditionalGeneration and not model.training
    assert all(weight.requires_grad for weight in model.parameters())
    torch.testing.assert_close(logits(model, config), expected, atol=1e-5, rtol=0)
    unadapted = logits(load_hf_model(copy, "cpu")[0], config)
    assert (unadapted - expected).abs().max() > 1e-2
    assert_same_weights(model, wrapped.merge_and_unload())
    assert model.name_or_path == str((tmp_path / "adapter").resolve())
    assert model.companions == [copy.resolve() / COMPANIONS[0]]
    save_hf_model(model, tokenizer, tmp_path / "merged")  # an ordinary one
    assert_same_weights(load_hf_model(tmp_path / "merged", "cpu")[0], model)


def test_an_adapter_in_sixteen_bits_is_what_peft_makes_of_it(adapter, copy):
    model, _ = load_hf_model(adapter, "cpu", "bfloat16")
    base, _ = load_hf_model(copy, "cpu", "bfloat16")
    expected = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    assert model.dtype == torch.bfloat16
    assert_same_weights(model, expected)


@pytest.mark.parametrize(
    "name", ["", None, "paligemma-stickers", "/old/paligemma-stickers"]
)
def test_an_adapter_of_the_embedded_model_with_its_mask_decoder(tmp_path, name):
    base, _ = load_hf_model(device="cpu")
    wrapped = adapted(base)
    expected = logits(wrapped, base.config)
    wrapped.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert settings["base_model_name_or_path"] == str(EMBEDDED)  # peft looked there
    edit_adapter(tmp_path, base_model_name_or_path=name)
    model, _ = load_hf_model(tmp_path, "cpu")
    assert model.name_or_path == str(tmp_path.resolve())
    torch.testing.assert_close(logits(model, base.config), expected, atol=1e-4, rtol=0)
    ours, theirs = (load_mask_decoder(f).state_dict() for f in (tmp_path, None))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert model.config == base.config


def test_an_adapter_brings_its_own_mask_decoder(adapter, tokenizer, tmp_path):
    (adapter / COMPANIONS[0]).write_bytes(b"its own")
    model, _ = load_hf_model(adapter, "cpu")
    assert model.companions == [adapter.resolve() / COMPANIONS[0]]
    save_hf_model(model, tokenizer, tmp_path / "merged")
    assert (tmp_path / "merged" / COMPANIONS[0]).read_bytes() == b"its own"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers, about itself
def test_an_adapter_trained_in_transformers(copy, tmp_path):
    """Its names are those of transformers 5 in memory; ours is the same model."""
    torch.manual_seed(0)
    plain = pair()[1]  # as `model` was made
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    theirs = adapted(plain)
    theirs.save_pretrained(tmp_path / "theirs")
    names = load_file(tmp_path / "theirs" / ADAPTER_FILE)
    assert any(name.startswith("base_model.model.model.language") for name in names)
    edit_adapter(tmp_path / "theirs", base_model_name_or_path=str(copy))
    loaded, _ = load_hf_model(tmp_path / "theirs", "cpu")
    for name, value in theirs.merge_and_unload().state_dict().items():
        ours = loaded.state_dict()[canonical_name(name)]
        torch.testing.assert_close(ours, value, atol=1e-6, rtol=0)
        is_adapted = re.search(r"q_proj.weight|fc1.weight|linear.weight", name)
        assert torch.equal(value, before[name]) == (not is_adapted), name


def rename(folder, change):
    file = folder / ADAPTER_FILE
    tensors = {change(name): tensor for name, tensor in load_file(file).items()}
    save_file({n: t.clone() for n, t in tensors.items() if n}, file)


SPOILED = {
    "a part that the model lacks": lambda f: rename(f, lambda n: n.replace("q_", "w_")),
    "half of a pair": lambda f: rename(f, lambda n: n if "lora_A" in n else None),
    "nothing": lambda f: rename(f, lambda n: None),
    "a tensor too many": lambda f: rename(
        f, lambda n: n.replace("lora_B.w", "lora_B.x")
    ),
    "another rank": lambda f: edit_adapter(f, r=3),
    "another kind": lambda f: IA3Config().save_pretrained(f),
    "an unknown kind": lambda f: edit_adapter(f, peft_type="NO"),
    "a number for its base": lambda f: edit_adapter(f, base_model_name_or_path=3),
    "itself as its base": lambda f: edit_adapter(f, base_model_name_or_path=str(f)),
    "no rank": lambda f: edit_adapter(f, r=None),
    "no JSON": lambda f: (f / ADAPTER_CONFIG).write_text("{"),
    "a list": lambda f: (f / ADAPTER_CONFIG).write_text("[]"),
    "a truncated file": lambda f: os.truncate(f / ADAPTER_FILE, 900),
    "a model beside it": lambda f: save_file({}, f / SINGLE_FILE),
}


@pytest.mark.parametrize("how", SPOILED)
def test_an_adapter_that_does_not_fit_is_refused(adapter, how):
    SPOILED[how](adapter)
    with refused(ValueError, re.escape(str(adapter))):
        load_hf_model(adapter, "cpu")


def test_an_adapter_beside_a_config_is_an_adapter(adapter, copy):
    expected, _ = load_hf_model(adapter, "cpu")
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        shutil.copy(copy / name, adapter)
    assert_same_weights(load_hf_model(adapter, "cpu")[0], expected)


def test_an_adapter_is_read_from_safetensors_alone(adapter):
    file = adapter / ADAPTER_FILE
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    with refused(FileNotFoundError, f"no {ADAPTER_FILE}.*pickle"):
        load_hf_model(adapter, "cpu")


def test_an_adapter_whose_base_is_gone(adapter):
    edit_adapter(adapter, base_model_name_or_path="/no/such/folder")
    with refused(FileNotFoundError, "no folder /no/such/folder"):
        load_hf_model(adapter, "cpu")
