"""Speed and memory against transformers, as ratios measured in one run.

    python benchmarks/run.py [--model_path FOLDER] [--device cuda] [--output FILE.json]

Both models load the same checkpoint. The two sides of each comparison take turns, so
that a machine that slows down slows both, and the middle ratio is reported. Above 1 the
first side is faster, or takes more memory. `speed.json` has a quiet machine's numbers,
on one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import PaliGemmaForConditionalGeneration as Reference
from transformers.utils import logging

from vlm import (
    GemmaConfig,
    GemmaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    generate,
    load_hf_model,
    save_hf_model,
)
from vlm.hub import EMBEDDED, find_checkpoint
from vlm.kv_cache import KVCache
from vlm.mask_tokens import MaskVQVAE
from vlm.masks import make_attn_mask
from vlm.packing import pack_questions
from vlm.questions import caption, sample_question
from vlm.scene_dataset import TASKS, collate
from vlm.scenes import VALIDATION_SEEDS, make_scene
from vlm.speed import quantize_int8
from vlm.weights import make_processor

NEW_TOKENS = 48

# Linux keeps a process's own peak in VmHWM; ru_maxrss starts at its parent's there.
PEAK_MEMORY = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from transformers import PaliGemmaForConditionalGeneration as Model
from vlm import load_hf_model

def peak():
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource  # macOS
    unit = 1024 if sys.platform == "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit

AutoTokenizer.from_pretrained(sys.argv[1])  # the imports of both
before = peak()
model = {load}
for parameter in model.parameters():
    parameter.sum().item()  # a mapped file takes memory when it is read
print(peak() - before)
"""
LOAD_OURS = "load_hf_model(sys.argv[1], 'cpu')[0]"
LOAD_REFERENCE = "Model.from_pretrained(sys.argv[1])"


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, with all that it asks of a GPU."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def step_seconds(write: Callable[[int], object]) -> float:
    """Seconds of a decode step: all tokens less one, which is prefill and the rest."""
    both = seconds(lambda: write(NEW_TOKENS)) - seconds(lambda: write(1))
    return both / (NEW_TOKENS - 1)


def compare(
    name: str, ours: Callable, other: Callable, rounds: int, clock: Callable = seconds
) -> dict[str, float | str]:
    """Time both in turns, after one warm-up of each; `ratio` is other / ours."""
    clock(ours), clock(other)
    pairs = [(clock(ours), clock(other)) for _ in range(rounds)]
    ratios = [b / a for a, b in pairs]
    return {
        "name": name,
        "milliseconds": 1e3 * statistics.median(a for a, _ in pairs),
        "other_milliseconds": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def peak_memory(load: str, folder: Path) -> float:
    """MiB that a fresh process needs to load a checkpoint and read every weight."""
    program = PEAK_MEMORY.format(load=load)
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


@torch.no_grad()
def speed(folder: Path, rounds: int, device: str) -> list[dict[str, float | str]]:
    """Prefill and generation, ours against transformers' and against ourselves."""
    model, tokenizer = load_hf_model(folder, device)
    reference = Reference.from_pretrained(folder, dtype=model.dtype).to(device).eval()
    processor = make_processor(model, tokenizer)
    scenes = [make_scene(seed, processor.image_size) for seed in VALIDATION_SEEDS[:8]]
    one = processor(["caption en"], [scenes[0].image])
    eight = processor(["caption en"] * 8, [scene.image for scene in scenes])
    one, eight = to(one, model), to(eight, model)

    def typed(inputs: dict) -> dict:
        return inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}

    def write(inputs: dict, num_new: int = NEW_TOKENS, **settings: object) -> object:
        endless = Endless(tokenizer)
        return generate(model, endless, inputs, max_new_tokens=num_new, **settings)

    def write_reference(inputs: dict, num_new: int = NEW_TOKENS) -> object:
        settings = {"max_new_tokens": num_new, "min_new_tokens": num_new}
        return reference.generate(**typed(inputs), do_sample=False, **settings)

    def write_without_cache() -> None:
        inputs = dict(one)
        for _ in range(NEW_TOKENS):
            logits = model(**inputs, logits_to_keep=1)["logits"]
            token = logits[:, -1].argmax(-1, keepdim=True)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
            mask = inputs["attention_mask"]
            inputs["attention_mask"] = torch.cat([mask, torch.ones_like(token)], dim=1)

    rows = [
        compare(
            "prefill of 8, ours : transformers",
            lambda: model(**eight, logits_to_keep=1),
            lambda: reference(**typed(eight), logits_to_keep=1),
            rounds,
        )
    ]
    steps = f"{NEW_TOKENS} tokens"
    for inputs, many in ((one, ""), (eight, " of 8 rows")):
        theirs = partial(write_reference, inputs)
        for how, compiled in (("", False), (" compiled", True)):
            ours = partial(write, inputs, compile=compiled)
            against = f"{many}, ours{how} : transformers"
            rows += [
                compare(f"a step{against}", ours, theirs, rounds, step_seconds),
                compare(f"{steps}{against}", ours, theirs, rounds),
            ]
    return rows + [
        compare(
            f"{steps}, cache : none", lambda: write(one), write_without_cache, rounds
        ),
        compare(
            f"{steps}, static : dynamic cache",
            lambda: write(one, cache="static"),
            lambda: write(one),
            rounds,
        ),
        compare(
            f"8 × {steps}, in one batch : one by one",
            lambda: write(eight),
            lambda: [
                write({name: tensor[i : i + 1] for name, tensor in eight.items()})
                for i in range(8)
            ],
            rounds,
        ),
    ]


@torch.no_grad()
def long_cache(rounds: int, device: str) -> dict[str, float | str]:
    """A step through one layer of the 3B's decoder after few and many tokens.

    `more_bytes`: what the longer cache adds to the bytes that a step reads.
    """
    layer, few, many = GemmaConfig(num_hidden_layers=1, vocab_size=256), 300, 4000
    decoder = GemmaForCausalLM(layer).to(device, torch.bfloat16).eval()

    def step(length: int) -> Callable[[], object]:
        kv_cache = KVCache()

        def states(count: int) -> torch.Tensor:
            shape = 1, count, layer.hidden_size  # [B, T, D]
            return torch.randn(shape).to(device, torch.bfloat16)

        positions = torch.arange(length, device=device)[None]  # [B, T]
        decoder.model(states(length), None, positions, kv_cache)
        return lambda: decoder.model(states(1), None, positions[:, -1:], kv_cache)

    row = compare(
        f"a layer of the 3B, {few} : {many:,} cached tokens",
        *(step(few), step(many), rounds),
    )
    token = 2 * layer.num_key_value_heads * layer.head_dim * 2  # keys, values; 2 bytes
    weights = sum(p.nbytes for p in decoder.model.layers.parameters())
    return row | {"more_bytes": 1 + token * (many - few) / weights}


@torch.no_grad()
def int8(rounds: int, device: str) -> list[dict[str, float | str]]:
    """A step through one layer of the 3B's decoder: int8 against bfloat16."""
    layer = GemmaConfig(num_hidden_layers=1, vocab_size=256)
    plain = GemmaForCausalLM(layer).to(device, torch.bfloat16).eval()
    quantized = copy.deepcopy(plain)
    quantize_int8(quantized)

    def step(decoder: GemmaForCausalLM, batch: int) -> Callable[[], object]:
        states = torch.randn(batch, 1, layer.hidden_size)  # [B, T=1, D]
        states = states.to(device, torch.bfloat16)
        positions = torch.zeros(batch, 1, dtype=torch.long, device=device)  # [B, T]
        return lambda: decoder.model(states, None, positions)

    return [
        compare(f"a layer of the 3B, {n} rows, int8 : bfloat16",
                step(quantized, n), step(plain, n), rounds)
        for n in (1, 8)
    ]  # fmt: skip


def training(folder: Path, rounds: int, device: str) -> list[dict[str, float | str]]:
    """A step of AdamW on captions, with the same loss in both, and on packed questions.

    Six questions about a picture are one packed row here, and six rows, each with the
    picture, in transformers.
    """
    model, tokenizer = load_hf_model(folder, device)
    reference = Reference.from_pretrained(folder, dtype=model.dtype).to(device)
    processor = make_processor(model, tokenizer)
    scenes = [make_scene(seed, processor.image_size) for seed in VALIDATION_SEEDS[:16]]
    images = [scene.image for scene in scenes]

    def trainer(model: torch.nn.Module, batch: dict) -> Callable[[], torch.Tensor]:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        batch = to(batch, model)

        def step() -> torch.Tensor:
            loss = model(**batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def row(name: str, ours: Callable, other: Callable) -> dict[str, float | str]:
        row = compare(f"{name}, ours : transformers", ours, other, rounds)
        return row | {"pictures_per_second": 16e3 / row["milliseconds"]}

    batch = processor(["caption en"] * 16, images, [caption(scene) for scene in scenes])
    ours, other = trainer(model, batch), trainer(reference, batch)
    torch.testing.assert_close(ours(), other(), atol=1e-4, rtol=1e-4)
    rows = [row("training: captions of 16 pictures", ours, other)]

    rng = random.Random(0)
    encode_masks = MaskVQVAE.from_pretrained(EMBEDDED).encode_masks
    asked = [[sample_question(s, t, rng, encode_masks) for t in TASKS] for s in scenes]
    prefix, suffix = processor.encode_prefix, processor.encode_suffix
    packed = collate([
        pack_questions(
            [(prefix(q.prompt), suffix(q.answer)) for q in questions],
            processor.num_image_tokens,
        )
        for questions in asked
    ])  # fmt: skip
    segments, types = packed.pop("segment_ids"), packed["token_type_ids"]
    packed |= {
        "pixel_values": batch["pixel_values"],
        "labels": packed["input_ids"].masked_fill(types == 0, -100),
        "attention_mask": make_attn_mask(segments >= 0, types, segment_ids=segments),
    }
    alone = [question for questions in asked for question in questions]
    images = [image for image in images for _ in TASKS]
    prompts, answers = [q.prompt for q in alone], [q.answer for q in alone]
    other = trainer(reference, processor(prompts, images, answers))
    return [*rows, row("training: packed questions", trainer(model, packed), other)]


def startup(rounds: int) -> dict[str, float | str]:
    """What the command's --help costs, against a Python that does nothing."""

    def python(*arguments: str) -> Callable[[], object]:
        command = [sys.executable, *arguments]
        quiet = {"check": True, "stdout": subprocess.DEVNULL}
        return lambda: subprocess.run(command, **quiet)

    show_help = python("-m", "vlm.inference", "--help")
    return compare("bare Python : --help", python("-c", "pass"), show_help, rounds)


def to(inputs: dict, model: PaliGemmaForConditionalGeneration) -> dict:
    """The inputs on the model's device, the pixels in its dtype."""
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    return inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}


def machine(device: str) -> str:
    """What it is measured on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    model = named[0] if named else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {capability}, {torch.get_num_threads()} threads"


class Endless:
    """A tokenizer whose EOS never comes, so that every run writes as many tokens."""

    eos_token_id = -1

    def __init__(self, tokenizer: object):
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)


def memory(tokenizer_folder: Path) -> dict[str, float]:
    """Peak memory of loading a random checkpoint of about 300 MB, in file sizes."""
    _, tokenizer = load_hf_model(tokenizer_folder, "cpu")
    config = PaliGemmaConfig(
        vision_config={
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
        },
        text_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 6,
            "vocab_size": 2176,
        },
        projection_dim=768,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_hf_model(PaliGemmaForConditionalGeneration(config), tokenizer, folder)
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2**20
        ours = peak_memory(LOAD_OURS, folder)
        reference = peak_memory(LOAD_REFERENCE, folder)
    return {"file_mib": size, "ours": ours / size, "transformers": reference / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", help="default: the embedded checkpoint")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each side")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, help="write the numbers here, as JSON")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    folder = find_checkpoint(arguments.model_path)

    rounds, device = arguments.rounds, arguments.device
    rows = [startup(rounds), *speed(folder, rounds, device), *int8(rounds, device)]
    rows += [long_cache(rounds, device)]
    rows += training(folder, rounds, device)
    where = f"{folder.name} on {machine(device)}, torch {torch.__version__}"
    print(where)
    print(f"{'':50}{'ms':>9}{'other ms':>10}{'ratio':>8}   lowest … highest")
    for row in rows:
        print(
            f"{row['name']:50}{row['milliseconds']:9.1f}"
            f"{row['other_milliseconds']:10.1f}{row['ratio']:8.2f}"
            f"   {row['lowest']:.2f} … {row['highest']:.2f}"
        )
    needed = memory(folder)
    size = f"{needed['file_mib']:.0f} MiB"
    print(f"\npeak memory to load and read a file of {size}, in file sizes")
    print(f"  ours {needed['ours']:.2f}, transformers {needed['transformers']:.2f}")
    if arguments.output:
        numbers = {"machine": where, "speed": rows, "memory": needed}
        text = json.dumps(numbers, indent=2) + "\n"
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
