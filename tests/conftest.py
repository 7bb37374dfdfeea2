"""What every test shares: shapes checked at run time, seeds, tiny things to test on."""

import os
import shutil
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook

# Quiet before transformers is imported: a test that reaches the network is a bug.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

sys.path.insert(0, str(Path(__file__).parent))  # `from reference import …`

# Every `Float[Tensor, "B T D"]` in a signature is now checked at each call. This must
# happen before the first import of vlm, and only here: normal use pays nothing for it.
install_import_hook("vlm", "typecheck.check")


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test draws the same random numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture
def no_type_checks(monkeypatch):
    """As users call it: nothing checks types, and a trace meets the code alone."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def tokenizer():
    """A small tokenizer with PaliGemma's layout; shared, so leave it as it is."""
    from reference import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    """A tiny model with random weights; leave it as it is."""
    from reference import pair

    torch.manual_seed(0)
    return pair()[0]


@pytest.fixture(scope="module")
def checkpoint(model, tokenizer, tmp_path_factory):
    """Its checkpoint, in one file; leave it as it is."""
    from vlm.weights import save_hf_model

    folder = tmp_path_factory.mktemp("checkpoint")
    save_hf_model(model, tokenizer, folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of that checkpoint, to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, where there is one."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: nothing is tried in a browser")
    options = "no-sandbox disable-gpu disable-quic no-first-run disable-sync"
    options += " disable-background-networking disable-component-update"
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=path, args=[f"--{option}" for option in options.split()]
        )
        yield browser
        browser.close()
