import pytest
import torch
from checkpoints import refused

import vlm.hub
from vlm.devices import choose_device, choose_dtype
from vlm.weights import load_hf_model


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "xla", "hpu", "meta", ""])
def test_a_device_that_is_not_there(checkpoint, device):
    with refused(ValueError, f"no device {device!r}.*'auto'"):
        load_hf_model(checkpoint, device)


@pytest.mark.parametrize(
    "dtype", ["int8", "float31", "bf16", "float8_e4m3fn", torch.int32, "nn"]
)
def test_bad_dtype_is_refused_before_anything_is_fetched(dtype, monkeypatch):
    monkeypatch.setattr(vlm.hub, "snapshot_download", pytest.fail)
    with refused(ValueError, "dtype=.* use 'auto'"):
        load_hf_model("some/model", "cpu", dtype)


def test_apples_gpus_have_bfloat16_since_macos_14_and_never_float64(monkeypatch):
    apple = torch.device("mps")
    for new, wanted in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(
            torch.backends.mps, "is_macos_or_newer", lambda *version, new=new: new
        )
        assert choose_dtype("auto", torch.bfloat16, apple) == wanted
    assert choose_dtype("auto", torch.float64, apple) == torch.float32
    assert choose_dtype("auto", torch.float16, apple) == torch.float16
    assert choose_dtype("auto", torch.bfloat16, torch.device("cpu")) == torch.bfloat16


def test_bfloat16_where_a_card_only_imitates_it(monkeypatch):
    card = torch.device("cuda")
    for native, wanted in ((True, torch.bfloat16), (False, torch.float16)):
        answer = {True: None, False: native}  # imitating it doesn't count
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, answer=answer: answer[including_emulation],
        )
        assert choose_dtype("auto", torch.bfloat16, card) == wanted
        assert choose_dtype("bfloat16", torch.bfloat16, card) == torch.bfloat16
        assert choose_dtype("16-bit", torch.float32, card) == wanted
        # PaliGemma 2's activations overflow float16.
        wide = torch.bfloat16 if native else torch.float32
        assert choose_dtype("auto", torch.bfloat16, card, "gemma2") == wide
        assert choose_dtype("16-bit", torch.float32, card, "gemma2") == wide
        assert choose_dtype("auto", torch.float32, card) == torch.float32


@pytest.mark.parametrize(
    ("cuda", "mps", "wanted"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_device(monkeypatch, cuda, mps, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device() == torch.device(wanted)
    assert choose_device("cpu") == choose_device(torch.device("cpu"))
