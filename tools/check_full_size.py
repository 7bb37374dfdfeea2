"""Check memory, loading time and parity on a checkpoint as large as the real one.

    python tools/check_full_size.py [FOLDER] [--rounds 3] [--write]

FOLDER holds a checkpoint of tools/make_full_size.py, which is called where there is
none: 7 GB of disk, and random weights, the same on every machine. Our code and that of
transformers are compared on it, in processes of their own, one after the other:

- the ids of 1,000 prompts, and the pixels of two photographs;
- seconds to load and then read every weight, against those to read the files, when
  they lie on the disk and when the system has them in its cache;
- peak memory of that, against the size of the files;
- seconds from the start of a process to 20 tokens about a photograph, in bfloat16, in
  int8, and with transformers in bfloat16 and float32; how much of the memory's
  bandwidth our decode steps use;
- in float32, the logits of the whole prefill and 8 greedy tokens.

With --write the numbers are kept: benchmarks/full_size.json, and the weights page's
table. It needs 18 GB of memory and, on two free cores, a few minutes.
"""

from __future__ import annotations

import argparse
import json
import os
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

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ROOT / "benchmarks" / "full_size.json"
PHOTOS = ROOT / "vlm" / "assets" / "photos"
QUESTIONS = (("chelsea.jpg", "caption en"), ("coffee.jpg", "detect cup ; spoon"))
NEW_TOKENS = 8
TEXT_TOKENS = 20  # a caption's length
MEMORY_NEEDED = 17e9  # 11.7 GB of float32 weights, and what is computed from them
LIMITS = {"logits": 1e-3, "memory": 1.08, "seconds": 1.3}

TASKS = (
    "caption {language}",
    "cap {language}",
    "describe {language}",
    "ocr",
    "answer {language} {question}",
    "question {language} {thing}",
    "detect {thing}",
    "detect {thing} ; {other}",
    "segment {thing}",
    "segment {thing} ; {other}",
    "{strange}",
    "{thing} {strange}",
    "answer {language} {strange}",
)
LANGUAGES = ("en", "de", "fr", "es", "ja", "zh", "ar", "hi", "th", "zh-Hans")
QUESTIONS_ASKED = (
    "what is on the table?",
    "how many owls are there?",
    "Où est le chat ?",
    "Was ist links davon?",
    "猫はどこにいますか。",
    "这是什么颜色？",
)
THINGS = (
    "cat",
    "owl",
    "traffic light",
    "left person",
    "Bücherregal",
    "café au lait",
    "зонт",
    "चाय",
    "קפה",
    "T-shirt (red)",
)
STRANGE = (
    "",
    " ",
    "   two  spaces ",
    "\n",
    "\n\n\n",
    "line one\nline two\n",
    "\r\n",
    "\t tab",
    "<loc0000><loc0001><loc1022><loc1023>",
    "<loc0051> <loc0309>\n<loc0708>",
    "<seg000><seg127>",
    "<loc0512><loc0512><loc1023><loc1023><seg000><seg064><seg127> owl ; ",
    "<start_of_turn>user",
    "▁▁",
    "e\u0301 is not \u00e9",
    "\u200b\ufeff",
    "👩‍👩‍👧‍👦 🦉",
    "𝕏 ﬁ ①",
    "العربية",
    "日本語とEnglish",
    "0123456789 3.14159 1e-6",
    "https://example.org/?q=a&b=c#d",
    "</s> <b>bold</b>",
    "x" * 300,
)


def make_prompts() -> list[str]:
    """1,000 prompts: all tasks, many scripts, the empty one, loc and seg tokens."""
    draw = random.Random(0)
    prompts = dict.fromkeys(STRANGE)  # a set that keeps its order
    while len(prompts) < 1000:
        prompts[
            draw.choice(TASKS).format(
                language=draw.choice(LANGUAGES),
                question=draw.choice(QUESTIONS_ASKED),
                thing=" and ".join(draw.sample(THINGS, draw.randint(1, 3))),
                other=draw.choice(THINGS),
                strange=" ".join(draw.sample(STRANGE, draw.randint(1, 3))),
            )
        ] = None
    return list(prompts)


# The parts, each run in a process of its own


def memory(field: str = "VmHWM") -> int:
    """Bytes of memory of this process: VmHWM is its peak, VmRSS what it has now."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split(field + ":")[1].split()[0]) * 1024
    import resource  # macOS knows the peak alone

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    """Wall-clock seconds of a call, and what it returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def touch(model: object) -> None:
    """Read one byte of each page of each weight: a mapped file is only now read."""
    import torch

    for weight in model.parameters():
        weight.detach().view(torch.uint8).view(-1)[::4096].sum()


def forget(folder: Path) -> None:
    """Have the system drop the files from its cache: the next read is from the disk."""
    for file in folder.glob("*.safetensors"):
        opened = os.open(file, os.O_RDONLY)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(opened)


def their_inputs(processor: object, photo: str, prompt: str) -> dict:
    """A photograph and a prompt as transformers' model takes them, all of it prefix."""
    import torch
    from PIL import Image

    picture = Image.open(PHOTOS / photo).convert("RGB")
    inputs = processor(images=picture, text="<image>" + prompt, return_tensors="pt")
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs


def part_tokens(folder: Path, scratch: Path) -> dict:
    """Our processor and transformers' on the same prompts and photographs."""
    from PIL import Image
    from transformers import AutoProcessor

    from vlm import PaliGemmaConfig, PaliGemmaProcessor
    from vlm.processing import normalize_prompt
    from vlm.weights import load_tokenizer

    vision = PaliGemmaConfig.from_pretrained(folder).vision_config
    ours = PaliGemmaProcessor(
        load_tokenizer(folder), vision.num_image_tokens, vision.image_size
    )
    theirs = AutoProcessor.from_pretrained(folder, backend="pil")
    names = ["<loc0000>", "<loc1023>", "<seg000>", "<seg127>", "<image>"]
    ids = [256000, 257023, 257024, 257151, 257152]
    assert ours.tokenizer.convert_tokens_to_ids(names) == ids

    dot = Image.new("RGB", (2, 2))
    prompts = make_prompts()
    different = []
    for prompt in prompts:
        text = "<image>" + normalize_prompt(prompt)  # theirs takes prompts as they are
        wanted = theirs(images=dot, text=text)["input_ids"][0]
        if ours.encode_prefix(prompt) != list(wanted):
            different.append(prompt)
    off = 0.0
    for photo, prompt in QUESTIONS:
        wanted = their_inputs(theirs, photo, prompt)
        pixels = ours(prompt, PHOTOS / photo)["pixel_values"]
        off = max(off, (pixels - wanted["pixel_values"]).abs().max().item())
    return {"prompts": len(prompts), "different": different, "pixels_off": off}


def part_read(folder: Path, scratch: Path) -> dict:
    """Read all shards from end to end through a small buffer, and keep nothing."""

    def read() -> None:
        buffer = bytearray(2**24)
        for file in sorted(folder.glob("*.safetensors")):
            with open(file, "rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass

    return {"seconds": seconds(read)[0]}


def part_load_ours(folder: Path, scratch: Path) -> dict:
    """load_hf_model in the files' own dtype, then every weight read once."""
    from transformers import AutoTokenizer  # noqa: F401  imported before we measure

    import vlm.weights

    spent = {}
    load_tokenizer = vlm.weights.load_tokenizer

    def timed(folder: Path) -> object:
        before = memory("VmRSS")
        spent["seconds"], tokenizer = seconds(lambda: load_tokenizer(folder))
        spent["memory"] = memory("VmRSS") - before
        return tokenizer

    vlm.weights.load_tokenizer = timed
    before = memory("VmRSS")
    load, (model, _) = seconds(lambda: vlm.weights.load_hf_model(folder, "cpu"))
    read, _ = seconds(lambda: touch(model))
    return {
        "load_seconds": load - spent["seconds"],
        "seconds": load - spent["seconds"] + read,
        "tokenizer_seconds": spent["seconds"],
        "tokenizer_memory": spent["memory"],
        "program_memory": before,
        "peak_memory": memory(),
        "dtype": str(model.dtype),
    }


def part_load_theirs(folder: Path, scratch: Path) -> dict:
    """transformers' tokenizer and model, then every weight read once."""
    import torch
    from transformers import AutoTokenizer, PaliGemmaForConditionalGeneration

    import vlm.weights  # noqa: F401  the same imports as ours

    before = memory("VmRSS")
    tokenizer_seconds, _tokenizer = seconds(
        lambda: AutoTokenizer.from_pretrained(folder)
    )
    tokenizer_memory = memory("VmRSS") - before
    load, model = seconds(
        lambda: PaliGemmaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.bfloat16
        )
    )
    read, _ = seconds(lambda: touch(model))
    return {
        "load_seconds": load,
        "seconds": load + read,
        "tokenizer_seconds": tokenizer_seconds,
        "tokenizer_memory": tokenizer_memory,
        "program_memory": before,
        "peak_memory": memory(),
        "dtype": str(model.dtype),
    }


def part_logits_ours(folder: Path, scratch: Path) -> dict:
    """Prefill and greedy tokens in float32; the logits go into `scratch`."""
    import numpy as np
    import torch

    from vlm import load_hf_model
    from vlm.sampling import generate_tokens
    from vlm.weights import make_processor

    model, tokenizer = load_hf_model(folder, "cpu", "float32")
    processor = make_processor(model, tokenizer)
    tokens = []
    for number, (photo, prompt) in enumerate(QUESTIONS):
        inputs = processor(prompt, PHOTOS / photo)
        with torch.no_grad():
            logits = model(**inputs)["logits"][0]  # [T, V]
        np.save(scratch / f"ours-{number}.npy", logits.numpy())
        del logits
        rows = generate_tokens(model, tokenizer, inputs, max_new_tokens=NEW_TOKENS)
        tokens.append(rows[0].token_ids)
    return {"tokens": tokens, "peak_memory": memory()}


def part_logits_theirs(folder: Path, scratch: Path) -> dict:
    """The same with transformers, from its own processor on."""
    import numpy as np
    import torch
    from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

    model, info = PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys")), info
    model.eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    tokens = []
    for number, (photo, prompt) in enumerate(QUESTIONS):
        inputs = their_inputs(processor, photo, prompt)
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            logits = model(**inputs).logits[0]  # [T, V]
            np.save(scratch / f"theirs-{number}.npy", logits.numpy())
            del logits
            out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        tokens.append(out[0, length:].tolist())
    return {"tokens": tokens, "peak_memory": memory()}


def written(model: object, tokenizer: object) -> dict:
    """Write TEXT_TOKENS greedily about the first photograph."""
    from vlm.sampling import GenerationConfig, token_steps
    from vlm.weights import make_processor

    photo, prompt = QUESTIONS[0]
    inputs = make_processor(model, tokenizer)(prompt, PHOTOS / photo)
    settings = GenerationConfig(max_new_tokens=TEXT_TOKENS)
    start = time.perf_counter()
    times = [time.perf_counter() for _ in token_steps(model, inputs, settings)]
    read = [*model.language_model.model.layers.parameters()]
    read += [*model.language_model.model.layers.buffers()]  # int8 weights
    read += [model.language_model.lm_head.weight]
    return {
        "prefill_seconds": times[0] - start,
        "step_seconds": (times[-1] - times[0]) / (len(times) - 1),
        "step_bytes": sum(tensor.nbytes for tensor in read),
        "peak_memory": memory(),
    }


def part_text_ours(folder: Path, scratch: Path) -> dict:
    """Our model in the files' own dtype."""
    from vlm import load_hf_model

    return written(*load_hf_model(folder, "cpu"))


def part_text_int8(folder: Path, scratch: Path) -> dict:
    """Our model with int8 weights in the decoder's layers."""
    from vlm import load_hf_model
    from vlm.speed import quantize_int8

    model, tokenizer = load_hf_model(folder, "cpu")
    quantize_int8(model)
    return written(model, tokenizer)


def text_theirs(folder: Path, dtype: str) -> dict:
    """The same number of tokens from transformers."""
    from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

    model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = their_inputs(processor, *QUESTIONS[0])
    length = {"min_new_tokens": TEXT_TOKENS, "max_new_tokens": TEXT_TOKENS}
    model.eval().generate(**inputs.to(model.dtype), **length, do_sample=False)
    return {"peak_memory": memory()}


def part_text_theirs_bfloat16(folder: Path, scratch: Path) -> dict:
    """transformers in the files' own dtype."""
    return text_theirs(folder, "bfloat16")


def part_text_theirs_float32(folder: Path, scratch: Path) -> dict:
    """transformers in float32, which processors without bfloat16 compute faster."""
    return text_theirs(folder, "float32")


def part_bandwidth(folder: Path, scratch: Path) -> dict:
    """Bytes a second that a sum reads from memory, at best, on all threads."""
    import torch

    numbers = torch.randn(2**28)  # 1 GB: no cache holds it
    best = min(seconds(numbers.sum)[0] for _ in range(7))
    return {"bytes_per_second": numbers.nbytes / best}


PARTS = {
    name.removeprefix("part_"): part
    for name, part in list(globals().items())
    if name.startswith("part_")
}


# Putting them together


def run(part: str, folder: Path, scratch: Path, cold: bool = False) -> dict:
    """One part in a fresh process; its last line is its result."""
    print(f"{part}{', from the disk' if cold else ''} …", flush=True)
    command = [sys.executable, __file__, str(folder), "--part", part]
    command += ["--scratch", str(scratch)]
    if cold:
        forget(folder)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{part} failed with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_loading(folder: Path, rounds: int, scratch: Path, cold: bool) -> dict:
    """Both loaders and plain reading, in turns; times as shares of that of reading.

    Every round begins with another of the three: a disk that slows down as more is
    read from it would favor whoever always comes first.
    """
    steps = ["read", "load_ours", "load_theirs"]
    done = []
    for _ in range(rounds):
        done.append({step: run(step, folder, scratch, cold) for step in steps})
        steps.append(steps.pop(0))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    read = [one["read"]["seconds"] for one in done]

    def shares(seconds: list[float]) -> dict:
        ratios = [one / other for one, other in zip(seconds, read)]
        return {"together": sum(seconds) / sum(read), "rounds": ratios}

    result = {"read_seconds": read}
    for side in ("ours", "theirs"):
        loads = [one[f"load_{side}"] for one in done]
        peak = max(load["peak_memory"] for load in loads)
        result[side] = {
            "returned": shares([load["load_seconds"] for load in loads]),
            "touched": shares([load["seconds"] for load in loads]),
            "tokenizer_seconds": [load["tokenizer_seconds"] for load in loads],
            "tokenizer_memory": max(x["tokenizer_memory"] for x in loads) / size,
            "memory": max(x["peak_memory"] - x["program_memory"] for x in loads) / size,
            "process_memory": peak / size,
            "dtype": loads[0]["dtype"],
        }
    return result


def measure_text(folder: Path, rounds: int, scratch: Path) -> dict:
    """All ways to write, in turns: from the start of a process to its end."""
    names = ("ours", "int8", "theirs_bfloat16", "theirs_float32")
    done: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, runs in done.items():
            run("read", folder, scratch)  # float32 weights push it out of the cache
            work = partial(run, f"text_{name}", folder, scratch)
            whole, one = seconds(work)
            runs.append(one | {"seconds": whole})
    text = {
        name: {key: [one[key] for one in runs] for key in runs[0]}
        for name, runs in done.items()
    }
    return text | run("bandwidth", folder, scratch)


def compare_logits(scratch: Path) -> dict:
    """The largest difference of two prefills, against the size of their logits."""
    import numpy as np

    worst, deviations, count = 0.0, [], 0
    for number in range(len(QUESTIONS)):
        ours = np.load(scratch / f"ours-{number}.npy", mmap_mode="r")
        theirs = np.load(scratch / f"theirs-{number}.npy", mmap_mode="r")
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        off = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs))
        deviations.append(float(np.std(theirs[-1])))
        worst = max(worst, off / deviations[-1])
        count += ours.size
    return {"numbers": count, "std": max(deviations), "relative": worst}


def measure(folder: Path, rounds: int, scratch: Path) -> dict:
    """Everything, as it goes into the JSON file."""
    import accelerate
    import huggingface_hub
    import safetensors
    import torch
    import transformers

    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    tokens = run("tokens", folder, scratch)
    load = {}
    if hasattr(os, "posix_fadvise"):  # where the cache can be emptied: Linux
        load["disk"] = measure_loading(folder, rounds, scratch, cold=True)
    run("read", folder, scratch)
    load["cache"] = measure_loading(folder, rounds, scratch, cold=False)
    text = measure_text(folder, rounds, scratch)
    sides = ("ours", "theirs")
    logits = {side: run(f"logits_{side}", folder, scratch) for side in sides}
    return {
        "checkpoint": {"files": len(files), "bytes": size},
        "machine": {
            "system": platform.system(),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "huggingface_hub": huggingface_hub.__version__,
            "accelerate": accelerate.__version__,
        },
        "tokens": tokens,
        "rounds": rounds,
        "load": load,
        "text": text,
        "logits": compare_logits(scratch),
        "greedy": {side: logits[side]["tokens"] for side in sides},
        "float32_memory": {side: logits[side]["peak_memory"] / size for side in sides},
    }


def text_table(numbers: dict) -> list[str]:
    """What a text costs, from the start of a process, in Markdown."""
    text, size = numbers["text"], numbers["checkpoint"]["bytes"]
    sides = {
        "ours": "this book",
        "int8": "… in int8",
        "theirs_bfloat16": "transformers",
        "theirs_float32": "… in float32",
    }
    theirs = [
        min(pair)
        for pair in zip(*(text[name]["seconds"] for name in [*sides][2:]), strict=True)
    ]

    def row(what: str, show: Callable[[dict], str]) -> str:
        return " | ".join([f"| {what}", *(show(text[name]) for name in sides), ""])

    def times_faster(side: dict) -> str:
        ratios = [b / a for a, b in zip(side["seconds"], theirs, strict=True)]
        middle = statistics.median(ratios)
        return f"{middle:.2f} ({min(ratios):.2f} … {max(ratios):.2f})"

    def step(side: dict, show: Callable[[float], str]) -> str:
        if "step_seconds" not in side:
            return ""
        return show(statistics.median(side["step_seconds"]))

    def share(side: dict) -> str:
        rate = side.get("step_bytes", [0])[0] / text["bytes_per_second"]
        return step(side, lambda seconds: f"{rate / seconds:.0%}")

    return [
        f"| a photograph and a prompt to {TEXT_TOKENS} tokens | "
        + " | ".join(sides.values())
        + " |",
        "|---|" + "--:|" * len(sides),
        row("seconds", lambda side: f"{statistics.median(side['seconds']):.1f}"),
        row("times as fast as the faster transformers", times_faster),
        row("peak memory, in file sizes",
            lambda side: f"{max(side['peak_memory']) / size:.2f}"),
        row("a decode step, in milliseconds",
            lambda side: step(side, lambda seconds: f"{1e3 * seconds:.0f}")),
        row("its weights' bytes a second, of the bandwidth", share),
    ]  # fmt: skip


def table(numbers: dict) -> str:
    """The numbers in Markdown, with what they were measured with."""
    machine, tokens, loads = numbers["machine"], numbers["tokens"], numbers["load"]
    logits, greedy = numbers["logits"], numbers["greedy"]
    size = numbers["checkpoint"]["bytes"] / 1e9
    equal = tokens["prompts"] - len(tokens["different"])
    same = sum(a == b for a, b in zip(greedy["ours"], greedy["theirs"]))
    names = ("torch", "transformers", "safetensors", "huggingface_hub")
    versions = ", ".join(f"{name} {machine[name]}" for name in names)
    pixels_off = f"{tokens['pixels_off']:.0e}" if tokens["pixels_off"] else "none"
    bandwidth = numbers["text"]["bytes_per_second"] / 1e9
    threads = machine["threads"]
    threads = "one thread" if threads == 1 else f"{threads} threads"

    def ratios(shares: dict) -> str:
        low, high = min(shares["rounds"]), max(shares["rounds"])
        return f"{shares['together']:.2f} ({low:.2f} … {high:.2f})"

    def row(text: str, show: Callable[[dict], str], load: dict) -> str:
        return f"| {text} | {show(load['ours'])} | {show(load['theirs'])} |"

    lines = [
        f"| {numbers['checkpoint']['files']} files, {size:.2f} GB together, bfloat16 "
        "| this book | transformers |",
        "|---|--:|--:|",
    ]
    places = {"disk": "from disk", "cache": "from the system's cache"}
    for place, load in loads.items():
        lines += [
            row(
                f"load {places[place]}, relative to a plain read of the files",
                lambda side: ratios(side["returned"]),
                load,
            ),
            row(
                "… and read every weight once",
                lambda side: ratios(side["touched"]),
                load,
            ),
        ]
    cache = loads["cache"]
    lines += [
        row(
            "peak memory of that, tokenizer included, in file sizes",
            lambda side: f"{side['memory']:.3f}",
            cache,
        ),
        row(
            "… of which the tokenizer",
            lambda side: f"{side['tokenizer_memory']:.3f}",
            cache,
        ),
        row(
            "… with Python and its libraries",
            lambda side: f"{side['process_memory']:.3f}",
            cache,
        ),
        row(
            "the tokenizer, in seconds",
            lambda side: f"{statistics.median(side['tokenizer_seconds']):.1f}",
            cache,
        ),
        "",
        *text_table(numbers),
        "",
        "| this book against transformers | |",
        "|---|--:|",
        f"| prompts with the same ids | {equal:,} of {tokens['prompts']:,} |",
        f"| two photographs, largest difference of pixels in −1 … 1 | {pixels_off} |",
        f"| float32 logits of two prefills, {logits['numbers'] / 1e6:.0f} million "
        f"numbers, largest difference in their standard deviation "
        f"| {logits['relative']:.0e} |",
        f"| continuations with the same {NEW_TOKENS} greedy tokens "
        f"| {same} of {len(greedy['ours'])} |",
        "",
        f"Measured on {machine['system']}, CPU, {threads}, with {versions}. Times are "
        f"those of {numbers['rounds']} rounds together, the lowest and the highest "
        "round in brackets, without the tokenizer; every round began with another of "
        "the three. A text's times go from the start of its process to its end; the "
        f"bandwidth, that of a sum, was {bandwidth:.0f} GB/s. Reading means once "
        "through a small buffer, keeping nothing, which took "
        + " and ".join(
            f"{statistics.median(load['read_seconds']):.1f} s {places[place]}"
            for place, load in loads.items()
        )
        + ".",
    ]
    return "\n".join(lines)


def problems(numbers: dict) -> list[str]:
    """What is not as it must be."""
    found = []
    if numbers["tokens"]["different"]:
        found.append(f"other ids for {numbers['tokens']['different'][:3]}")
    if numbers["logits"]["relative"] > LIMITS["logits"]:
        found.append(f"logits differ by {numbers['logits']['relative']:.1e}")
    if numbers["greedy"]["ours"] != numbers["greedy"]["theirs"]:
        found.append("other greedy tokens")
    memory = numbers["load"]["cache"]["ours"]["memory"]
    if memory > LIMITS["memory"]:
        found.append(f"memory: {memory:.3f} of the files, over {LIMITS['memory']}")
    if "disk" in numbers["load"]:
        seconds = numbers["load"]["disk"]["ours"]["touched"]["together"]
        if seconds > LIMITS["seconds"]:
            found.append(f"seconds: {seconds:.2f} of reading, over {LIMITS['seconds']}")
    return found


def available_memory() -> float:
    """Bytes that could be taken now; infinity where the system doesn't say."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return float("inf")
    return int(info.read_text().split("MemAvailable:")[1].split()[0]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", default=ROOT / "runs" / "paligemma-3b-224"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timings of each side")
    parser.add_argument("--write", action="store_true", help="keep the numbers")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](folder, arguments.scratch)))
        return 0
    if available_memory() < MEMORY_NEEDED:
        free = available_memory() / 1e9
        raise SystemExit(
            f"{MEMORY_NEEDED / 1e9:.0f} GB of memory are needed and {free:.0f} GB are "
            "free: close something, or use a larger machine"
        )
    if not (folder / "config.json").is_file():
        maker = Path(__file__).with_name("make_full_size.py")
        subprocess.run([sys.executable, maker, folder], check=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        numbers = measure(folder, arguments.rounds, Path(scratch))
    print(table(numbers))
    if arguments.write:
        from what_fits import PAGE, fill

        text = json.dumps(numbers, indent=2, ensure_ascii=False) + "\n"
        NUMBERS.write_text(text, encoding="utf-8")
        page = fill("full size", table(numbers))
        PAGE.write_text(page, encoding="utf-8", newline="\n")
    wrong = problems(numbers)
    for problem in wrong:
        print(f"not as it must be: {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
