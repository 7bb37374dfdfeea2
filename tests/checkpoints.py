"""What tests of checkpoints share: how they are compared, spoiled and refused."""

import json
import re
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from vlm.hub import ADAPTER_CONFIG, SINGLE_FILE


def assert_same_weights(model, expected):
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    head, embedding = model.language_model.lm_head, model.language_model.model
    assert head.weight is embedding.embed_tokens.weight


@contextmanager
def refused(error, *words):
    """The block raises `error`, in one line of reasonable length with all the words."""
    with pytest.raises(error) as raised:
        yield
    said = str(raised.value)
    assert "\n" not in said and len(said) < 500, said
    assert all(re.search(word, said) for word in words), said


def rewrite(folder, change):
    tensors = load_file(folder / SINGLE_FILE)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(change(tensors), folder / SINGLE_FILE, {"format": "pt"})


def edit(file, change):
    """Change the values of a JSON file."""
    values = json.loads(file.read_text())
    file.write_text(json.dumps(change(values)))


def content(folder):
    """The files of a folder: name → bytes."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def adapted(model, **settings):
    """peft's model with an adapter that changes something."""
    settings = {"r": 2, "target_modules": ["q_proj", "fc1", "linear"], **settings}
    wrapped = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    return wrapped.eval()


def edit_adapter(folder, **settings):
    edit(folder / ADAPTER_CONFIG, lambda values: values | settings)
