"""Load real checkpoints and save your own, strictly: no tensor missing, none left over.

Built in notebooks/14_weights.ipynb: edit it there, then run `make export`.
"""

import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files as package_files
from mimetypes import guess_type
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from huggingface_hub import constants, save_torch_state_dict, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .config import PaliGemmaConfig
from .paligemma import PaliGemmaForConditionalGeneration
from .processing import IMAGE_TOKEN, PaliGemmaProcessor

__all__ = [
    "EMBEDDED",
    "SINGLE_FILE",
    "INDEX_FILE",
    "RENAMES",
    "EMBEDDING",
    "TIED",
    "SMALL_FILES",
    "COMPANIONS",
    "ALL_FILES",
    "FLOAT_TYPES",
    "READ_AHEAD",
    "ADAPTER_CONFIG",
    "ADAPTER_FILE",
    "canonical_name",
    "explain_hub_error",
    "find_checkpoint",
    "StoredTensor",
    "read_header",
    "read_index",
    "find_tensors",
    "check_counts",
    "check_tensors",
    "choose_device",
    "has_bfloat16",
    "choose_dtype",
    "empty_model",
    "stored_dtype",
    "check_tied",
    "read_weights",
    "load_tokenizer",
    "adapter_base",
    "read_config",
    "apply_adapter",
    "load_hf_model",
    "make_processor",
    "preprocessor_config",
    "generation_config",
    "require_space",
    "save_hf_model",
    "describe_model",
    "load_chosen_model",
]

EMBEDDED = Path(str(package_files("vlm"))) / "checkpoints" / "paligemma-stickers"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARDS = "model-*-of-*.safetensors"

# Other layouts' names → ours, which are those of the hub's files.
RENAMES = (
    (r"\b(_orig_mod|module)\.", ""),  # the wrappers of torch.compile, data parallel
    (r"^model\.", ""),  # transformers 5 in memory
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
EMBEDDING = "language_model.model.embed_tokens.weight"
_POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"
TIED = "language_model.lm_head.weight"  # the embedding again; files may leave it out


def canonical_name(name: str) -> str:
    """A tensor's name in any of the three layouts → its name in our model."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


_EXAMPLE = "give a checkpoint's folder, or a hub id like google/paligemma-3b-mix-224"


def _hub_id(model_path: str | os.PathLike) -> tuple[str, str | None] | None:
    "(owner/name, revision or None) of a hub id or its page's address; None of others."
    name, page = r"(\w[\w.-]*/[\w.-]+)", r"https?://(?:huggingface\.co|hf\.co)/"
    found = re.fullmatch(
        rf"{name}(?:@(\S+)|/)?|{page}{name}(?:/(?:tree|blob|resolve)/([^/\s]+)\S*|/)?",
        str(model_path),
    )
    if found is None or Path(model_path).exists():
        return None
    return found[1] or found[3], found[2] or found[4]


def _http_answer(error: BaseException | None) -> Any:
    "The hub's answer behind an error, or None where it gave none."
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__ or error.__context__
    return None if error is None else error.response


def explain_hub_error(name: str, revision: str | None, error: Exception) -> str:
    """Why the hub didn't give us `name`, and what to click or set: one sentence."""
    page, answer = f"{constants.ENDPOINT}/{name}", _http_answer(error)
    status, said = 0, ""
    if answer is not None:
        status = answer.status_code
        said = answer.headers.get("X-Error-Message", "no reason given").rstrip(".")
    reason = str(error).strip().partition("\n")[0].rstrip(".") or repr(error)
    log_in = "run `hf auth login`, or set HF_TOKEN to a token of your account"
    if isinstance(error, GatedRepoError):  # it is a RepositoryNotFoundError too
        return f"{name} is behind a license: accept it on {page}, then {log_in}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"the hub has no {name}, or it is private: look for it at {page}; if it "
            f"is private, {log_in}"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{name} has no revision {revision or 'main'}: {page}/tree/main lists all"
        )
    if status in (401, 403):
        return (
            f"the hub refuses {name} ({status}: {said}): {log_in}. A fine-grained "
            "token must be allowed to read gated repositories"
        )
    if status == 429 or status >= 500:
        return f"the hub answered {status} for {name}: try again later"
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"{name} is not, or not whole, in the cache {constants.HF_HUB_CACHE}, and "
            "the hub can't be reached: load it once with a network and without "
            f"HF_HUB_OFFLINE, or give a folder ({reason})"
        )
    return f"{name} can't be fetched from the hub: {reason}"


SMALL_FILES = ("*.json", "tokenizer.model")  # config, tokenizer, index: quick to fetch
# What reads and writes mask tokens, beside the weights: chapter 16's and Google's.
COMPANIONS = ("mask_decoder.safetensors", "mask_encoder.safetensors", "vae-oid.npz")
ALL_FILES = (*SMALL_FILES, "*.safetensors", "vae-oid.npz")
_STAGED = ".complete-save"  # where a save lies between "all written" and "all in place"


def _companions_in(folder: Path) -> list[str]:
    return [name for name in COMPANIONS if (folder / name).is_file()]


def _finish_save(folder: Path) -> None:
    """Move a complete save to its place: its weights' entry, file or index, last.

    Interrupted, it can go on: a load calls it too. Until the entry moves, the former
    weights' is there; what isn't a part of the new ones goes.
    """
    staged = folder / _STAGED
    if not staged.is_dir():
        return
    entry, weights = SINGLE_FILE, {SINGLE_FILE}
    if (staged / INDEX_FILE).is_file():
        shards = json.loads((staged / INDEX_FILE).read_text("utf-8"))["weight_map"]
        entry, weights = INDEX_FILE, {INDEX_FILE, *shards.values()}
    former = {SINGLE_FILE, INDEX_FILE, *(file.name for file in folder.glob(_SHARDS))}
    for file in sorted(staged.iterdir(), key=lambda file: file.name == entry):
        for name in former - weights if file.name == entry else ():
            (folder / name).unlink(missing_ok=True)
        with suppress(FileNotFoundError):  # another process was quicker
            os.replace(file, folder / file.name)
    with suppress(OSError):
        staged.rmdir()


def _refuse_pointers(folder: Path) -> None:
    "Raise FileNotFoundError where git left a note of what it should have fetched."
    for file in filter(Path.is_file, folder.glob("*.[jmns]*")):
        with file.open("rb") as opened:
            if opened.read(40).startswith(b"version https://git-lfs"):
                raise FileNotFoundError(
                    f"{file} is a Git LFS pointer: run `git lfs pull` in its folder"
                )


def find_checkpoint(
    model_path: str | os.PathLike | None,
    revision: str | None = None,
    only: Sequence[str] = ALL_FILES,
) -> Path:
    """The folder of a checkpoint: None is the embedded one; a hub id is fetched.

    A hub id is `owner/name` or `owner/name@revision`: a branch, a tag or a commit,
    which `revision` may name instead. Those of its files that match `only` are fetched
    into the hub's cache, unless they are there. Raises FileNotFoundError for what can't
    be had, ValueError for a revision that doesn't fit; both say what to do.
    """
    hub_id = None if model_path is None else _hub_id(model_path)
    if hub_id is None and revision is not None:
        raise ValueError(
            f"revision={revision!r} needs a hub id, and {model_path} is none: a folder "
            "has no revisions"
        )
    if model_path is None:
        return EMBEDDED
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        _finish_save(folder)
        _refuse_pointers(folder)
        return folder
    if folder.exists():
        is_picture = (guess_type(folder.name)[0] or "").startswith("image/")
        advice = _EXAMPLE if is_picture else "give the folder that holds it"
        kind = "picture, not a model" if is_picture else "file"
        raise FileNotFoundError(f"{folder} is a {kind}: {advice}")
    if hub_id is None:
        raise FileNotFoundError(f"no folder {model_path}: {_EXAMPLE}")
    name, in_id = hub_id
    if None not in (revision, in_id) and revision != in_id:
        raise ValueError(f"{model_path} and revision={revision!r} disagree: name one")
    revision = revision or in_id
    patterns = {"allow_patterns": list(only), "ignore_patterns": ["*/*"]}
    try:
        return Path(snapshot_download(name, revision=revision, **patterns))
    except (OSError, ValueError, HTTPError) as error:
        reason = explain_hub_error(name, revision, error)
        raise FileNotFoundError(f"no folder {model_path}, and {reason}") from error


# What may lie in a folder instead of a checkpoint in transformers' format.
_INSTEAD = {
    "*.gguf": "GGUF is quantized, for another engine: give what it was made from",
    _SHARDS: f"these are shards without their index: fetch {INDEX_FILE} too",
    "*.bin*": ".bin files are pickles and could run code: load them with transformers, "
    "and save_pretrained writes safetensors",
    "pali*.npz": f"it is in JAX's format: {_EXAMPLE}",
    "*.h5": f"it is in Keras' format: {_EXAMPLE}",
}


def _not_in(folder: Path, name: str) -> FileNotFoundError:
    "The error for a file that a folder lacks: what is there, and what to do about it."
    inner = [file.parent for file in folder.glob("*/*.json") if file.name in _CONFIGS]
    found = [advice for kind, advice in _INSTEAD.items() if any(folder.glob(kind))]
    advice = found[0] if found else f"fetch it too, or {_EXAMPLE}"
    if inner:  # a trainer's: the last one has the largest number
        last = max(inner, key=lambda f: [int(n) for n in re.findall(r"\d+", f.name)])
        advice = f"its subfolders are checkpoints, give one like {last}"
    return FileNotFoundError(f"no {name} in {folder}: {advice}")


class StoredTensor(NamedTuple):
    """The file that a tensor lies in, and what is known without reading its numbers."""

    file: Path
    shape: list[int] | None = None  # None: an index alone is here yet
    dtype: str | None = None


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What one safetensors file holds, by name; ValueError where it can't be read."""
    try:
        with safe_open(file, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {
                name: StoredTensor(file, list(part.get_shape()), part.get_dtype())
                for name, part in parts.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file.resolve()} can't be read (truncated?): delete it and fetch it "
            f"again ({shorten(str(error), 100)})"
        ) from error


def read_index(index: Path) -> dict[str, StoredTensor]:
    """Every tensor that an index of shards names; ValueError where it is none."""
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        for shard in weight_map.values():
            if not re.fullmatch(r"[\w.-]{1,200}", shard):
                raise ValueError(f"{shard[:50]!r} names no shard")
        return {n: StoredTensor(index.parent / s) for n, s in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index} is not an index of shards: {shorten(repr(error), 100)}. Fetch it "
            "again"
        ) from error


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor in the safetensors files of `folder`, by its name there.

    One file, or shards with an index. Raises FileNotFoundError where a file is missing,
    ValueError where one can't be read or the index and the shards disagree.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise _not_in(folder, SINGLE_FILE)
    promised, found = read_index(index), {}
    shards = {stored.file for stored in promised.values()}
    for shard in sorted({*shards, *folder.glob(_SHARDS)}):
        if shard not in shards:
            raise ValueError(
                f"{index} names no tensor of {shard.name}, a shard beside it: fetch "
                "the index again, or move the shard away"
            )
        if not shard.is_file():
            raise FileNotFoundError(
                f"{INDEX_FILE} names {shard.name}, which is missing in {folder}: fetch "
                "it too"
            )
        found |= read_header(shard)
    for name, (file, _, _) in promised.items():
        if name not in found or found[name].file != file:
            raise ValueError(
                f"{index} promises {name[:80]} in {file.name}, and it isn't there: "
                "fetch both files again"
            )
    return found


FLOAT_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# What strange names tell of, and what to do about it.
_STRANGE_NAMES = {
    r"lora_|base_layer|base_model": "They are peft's: save what merge_and_unload gives",
    r"qweight|absmax|quant_|SCB|_scale\b|_packed": "They are quantized: give the "
    "checkpoint that they were made from",
}


def _misfit(tensors: dict[str, StoredTensor], why: str) -> ValueError:
    folder = next((stored.file.parent for stored in tensors.values()), "the checkpoint")
    advice = "Give the config.json that belongs to these tensors"
    for kind, meaning in _STRANGE_NAMES.items():
        if any(re.search(kind, name) for name in tensors):
            advice = meaning
    why = shorten(why, 160, placeholder=" …")
    return ValueError(f"{folder} doesn't fit its config.json: {why}. {advice}")


def check_counts(config: PaliGemmaConfig, tensors: dict[str, StoredTensor]) -> None:
    """Raise a ValueError where config.json promises more than `tensors` are for.

    Before a model is built: absurd sizes would take all memory and time.
    """
    names = {canonical_name(name): stored for name, stored in tensors.items()}
    vision, text = config.vision_config, config.text_config
    layer = re.compile(r"(vision_tower|language_model)\..*layers\.(\d+)\.")
    layers = {found.groups() for found in map(layer.search, names) if found}
    held = Counter(part for part, _ in layers)
    rows = names[_POSITIONS].shape if _POSITIONS in names else None
    for what, promised, count in (
        ("vision layers", vision.num_hidden_layers, held["vision_tower"]),
        ("text layers", text.num_hidden_layers, held["language_model"]),
        ("image tokens", vision.num_image_tokens, rows[0] if rows else math.inf),
    ):
        if promised > count:
            why = f"it promises {promised} {what}, and tensors are there for {count}"
            raise _misfit(tensors, why)


def check_tensors(
    model: PaliGemmaForConditionalGeneration, tensors: dict[str, StoredTensor]
) -> None:
    """Raise a ValueError unless names and shapes of `tensors` are exactly the model's.

    One of embedding and output head may be absent: they are one matrix.
    """
    expected = {name: list(p.shape) for name, p in model.state_dict().items()}
    seen: dict[str, str] = {}
    problems = []
    for name, (file, shape, dtype) in tensors.items():
        ours, where = canonical_name(name), f"{name} in {file.name}"
        if ours not in expected:
            problems.append(f"unexpected {where}")
        elif ours in seen:
            problems.append(f"{where} repeats {seen[ours]}")
        elif shape not in (None, expected[ours]):
            problems.append(f"{where} has shape {shape}, not {expected[ours]}")
        elif dtype not in (None, *FLOAT_TYPES):
            problems.append(f"{where} has dtype {dtype}, not {', '.join(FLOAT_TYPES)}")
        seen[ours] = where
    may_miss = TIED if EMBEDDING in seen or TIED not in seen else EMBEDDING
    missing = [name for name in expected if name not in seen and name != may_miss]
    problems += [f"missing {name}" for name in missing]
    if problems:
        more = f"{len(problems)} tensors: " if len(problems) > 1 else ""
        raise _misfit(tensors, more + "; ".join(problems))


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device by name; "auto": CUDA if there is one, else Apple's MPS, else CPU.

    Raises ValueError for a device that isn't there.
    """
    if device != "auto":
        try:
            found = torch.empty(0, device=device).device
            if found.type == "meta":
                raise RuntimeError("it holds no numbers")
            return found
        except (RuntimeError, AssertionError, ImportError, TypeError) as error:
            raise ValueError(
                f"no device {device!r} on this machine, or none for this build of "
                "PyTorch: use 'auto' or 'cpu'"
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself: imitating it doesn't count."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return True


def choose_dtype(
    dtype: str | torch.dtype,
    stored: torch.dtype,
    device: torch.device,
    decoder: str = "gemma",
) -> torch.dtype:
    """The dtype by name; "auto": as stored, or the nearest that the device has.

    That is float16 for bfloat16 on a GPU without it, but float32 for the decoder
    "gemma2", whose numbers outgrow float16; and float32 for float64 on MPS. "16-bit"
    is "auto" for files in bfloat16, whatever the files.
    Raises ValueError for a type that weights can't be computed in.
    """
    if dtype == "16-bit":
        dtype, stored = "auto", torch.bfloat16
    if dtype == "auto":
        if stored == torch.bfloat16 and not has_bfloat16(device):
            return torch.float32 if decoder == "gemma2" else torch.float16
        if stored == torch.float64 and device.type == "mps":
            return torch.float32
        return stored
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in FLOAT_TYPES.values():
        raise ValueError(
            f"dtype={dtype!r} is not a type that the model computes in: "
            "use 'auto', '16-bit', 'float32', 'bfloat16', 'float16' or 'float64'"
        )
    return chosen


class _WithoutFirstNumbers(TorchFunctionMode):
    "Leaves out what torch.nn.init does: weights without memory can't be filled."

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs)


def empty_model(config: PaliGemmaConfig) -> PaliGemmaForConditionalGeneration:
    """A model with all its shapes and buffers, and no memory for its weights."""
    with init_empty_weights(include_buffers=False), _WithoutFirstNumbers():
        return PaliGemmaForConditionalGeneration(config)


def stored_dtype(tensors: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype of the embedding, the largest tensor; the others will follow it."""
    dtypes = {canonical_name(name): stored.dtype for name, stored in tensors.items()}
    return FLOAT_TYPES[dtypes.get(EMBEDDING) or dtypes[TIED]]


def check_tied(tensors: dict[str, StoredTensor]) -> None:
    """Raise a ValueError where files hold an output head that isn't the embedding."""
    pair = [name for name in tensors if canonical_name(name) in (EMBEDDING, TIED)]
    if len(pair) < 2:
        return
    numbers = []
    for name in pair:
        with safe_open(tensors[name].file, "pt") as file:
            numbers.append(file.get_tensor(name))
    if not torch.equal(*numbers):
        raise ValueError(
            f"{pair[0]} and {pair[1]} differ in {tensors[pair[0]].file.parent}: in "
            "PaliGemma they are one tensor. Give a checkpoint that was trained so"
        )


READ_AHEAD = 2**20  # bytes of one advice; Linux cuts a longer one short


def _read_ahead(file: Path) -> None:
    "Have the system read the whole file into its cache, where it takes such advice."
    if not hasattr(os, "posix_fadvise"):
        return
    with file.open("rb") as opened:
        for start in range(0, file.stat().st_size, READ_AHEAD):
            where = (opened.fileno(), start, READ_AHEAD)
            os.posix_fadvise(*where, os.POSIX_FADV_WILLNEED)


def read_weights(
    model: PaliGemmaForConditionalGeneration,
    tensors: dict[str, StoredTensor],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Put `tensors` into a model without memory, one at a time.

    On the CPU in the file's own dtype they stay mapped from the file, not copied.
    Elsewhere only one tensor is in memory twice, while it is converted or moved.
    """
    check_tied(tensors)
    state: dict[str, Tensor] = {}
    for file in sorted({stored.file for stored in tensors.values()}):
        _read_ahead(file)
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                ours = canonical_name(name)
                if ours == TIED:  # the embedding, by its other name
                    ours = EMBEDDING
                if ours in state:
                    continue
                tensor = opened.get_tensor(name)  # mapped: nothing is read yet
                if device.type != "cpu" or tensor.dtype != dtype:
                    with safe_open(file, "pt") as once:  # closed, its pages are gone
                        tensor = once.get_tensor(name).to(device, dtype)
                state[ours] = tensor
    model.load_state_dict({**state, TIED: state[EMBEDDING]}, strict=True, assign=True)
    model.tie_weights()


ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
_CONFIGS = ("config.json", ADAPTER_CONFIG)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside the weights; FileNotFoundError where there is none."""
    from transformers import AutoTokenizer  # slow to import, so only when needed

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of every kind: a broken tokenizer.json is Exception's
        reason = shorten(str(error).strip().partition("\n")[0] or repr(error), 100)
        raise FileNotFoundError(
            f"no tokenizer that can be read in {folder}: fetch its tokenizer.json, "
            f"or tokenizer.model, and tokenizer_config.json ({reason})"
        ) from error


def adapter_base(folder: Path) -> str | None:
    """The model that an adapter in peft's layout is for, as `load_hf_model` takes it.

    None where `folder` holds no adapter. Raises ValueError where it holds a model too,
    or where its adapter names no model.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    if any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        raise ValueError(f"{folder} holds a model and an adapter: keep only one there")
    try:
        values = json.loads(path.read_text("utf-8"))
        base, revision = values.get("base_model_name_or_path"), values.get("revision")
        base = Path(base or EMBEDDED).expanduser()
        if base.name == EMBEDDED.name and not base.is_dir():  # another machine's
            base = EMBEDDED
        if base.resolve() == folder.resolve():
            raise ValueError("an adapter can't be its own base model")
        return f"{base}@{revision}" if revision and not base.exists() else str(base)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} names no base model: {error}") from error


def read_config(folder: Path) -> PaliGemmaConfig:
    """A checkpoint's sizes; an adapter's are those of its base.

    Raises FileNotFoundError where there is no config.json, ValueError that names the
    file where it isn't a PaliGemma's in transformers' format.
    """
    if (base := adapter_base(folder)) is not None:
        return read_config(find_checkpoint(base, only=SMALL_FILES))
    path = folder / "config.json"
    if not path.is_file():
        raise _not_in(folder, path.name)
    config = PaliGemmaConfig.from_pretrained(folder)
    quantized = json.loads(path.read_text("utf-8")).get("quantization_config")
    if quantized is not None:
        raise ValueError(
            f"{path} says that the weights are quantized: give the checkpoint that "
            "they were made from"
        )
    return config


def apply_adapter(model: PaliGemmaForConditionalGeneration, folder: Path) -> None:
    """Merge the LoRA adapter in `folder`, in peft's layout, into the model's weights.

    Each of its tensors must be for a part that the model has, by its name in any of the
    three layouts. Raises FileNotFoundError and ValueError.
    Source: Hu et al. 2022, in peft's implementation.
    """
    from peft import LoraConfig, LoraModel, set_peft_model_state_dict  # slow to import

    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {folder}: a pickle isn't read")
    read_header(file)  # or says that it can't be read
    state = {
        canonical_name(name.removeprefix("base_model.model.")): tensor
        for name, tensor in load_file(file).items()
    }
    lora = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    whole = {name: tensor for name, tensor in state.items() if name not in lora}
    targets = {name.partition(".lora_")[0] for name in lora}
    own, parts = model.state_dict(), dict(model.named_modules())
    odd = {name for name in targets if not hasattr(parts.get(name), "weight")}
    odd |= {n for n, t in whole.items() if n not in own or own[n].shape != t.shape}
    if odd or not state:
        strange = shorten(f"it holds {min(odd, default='nothing')}", 100)
        raise ValueError(f"{file} isn't for its base model: {strange}")
    for name, tensor in whole.items():  # what was trained whole beside the adapters
        own[name].copy_(tensor)
    try:
        kind = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8")).get("peft_type")
        if kind != "LORA":
            raise ValueError(f"it is {kind}, and only LORA is read")
        config = LoraConfig.from_pretrained(folder)
        config.target_modules, config.modules_to_save = targets, None
        config.exclude_modules = config.layers_to_transform = None
        for pattern in ("rank_pattern", "alpha_pattern"):
            values = getattr(config, pattern).items()
            setattr(config, pattern, {canonical_name(n): v for n, v in values})
        adapters = LoraModel(model, config, "default")
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
        loaded = set_peft_model_state_dict(model, lora)
        missing = [name for name in loaded.missing_keys if ".lora_" in name]
        if missing or loaded.unexpected_keys:
            raise ValueError(f"odd tensors {missing + loaded.unexpected_keys}")
        adapters.merge_and_unload()
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        why = shorten(str(error), 160, placeholder=" …")
        raise ValueError(f"{folder}'s adapter can't be merged: {why}") from error
    model.requires_grad_(True)


def _fit_model(
    config: PaliGemmaConfig, tensors: dict[str, StoredTensor]
) -> PaliGemmaForConditionalGeneration:
    """A model without numbers, for which these tensors are: ValueError if not."""
    check_counts(config, tensors)
    model = empty_model(config)
    check_tensors(model, tensors)
    return model


def load_hf_model(
    model_path: str | os.PathLike | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
) -> tuple[PaliGemmaForConditionalGeneration, Any]:
    """Load (model, tokenizer) from a folder, a hub id, or None: the embedded one.

    A hub id may end in `@revision`, a branch, tag or commit; `revision` says the same.
    Three layouts of names are understood (hub files, transformers 5 in memory, and what
    it saves); safetensors only, one file or shards. Every name and shape is checked
    before a weight is read. The model comes in eval mode, and remembers where it came
    from: the folder in `name_or_path`, and which `COMPANIONS` lay there. Of an adapter
    (LoRA, in peft's layout) comes its base model, with the adapter merged into it.
    Raises FileNotFoundError and ValueError that name the file and the tensor.
    """
    device = choose_device(device)
    choose_dtype(dtype, torch.float32, device)  # a wrong name: before anything is read
    folder = find_checkpoint(model_path, revision, SMALL_FILES)
    is_fetched = model_path is not None and _hub_id(model_path)
    if (base := adapter_base(folder)) is not None:
        if is_fetched:
            folder = find_checkpoint(
                model_path, revision, (ADAPTER_CONFIG, ADAPTER_FILE)
            )
        model, tokenizer = load_hf_model(base, device, dtype)
        apply_adapter(model, folder)
        return model, tokenizer
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    if is_fetched:
        if (folder / INDEX_FILE).is_file() and not (folder / SINGLE_FILE).is_file():
            _fit_model(
                config, read_index(folder / INDEX_FILE)
            )  # names, without weights
        folder = find_checkpoint(model_path, revision)  # now the weights too
    tensors = find_tensors(folder)
    model = _fit_model(config, tensors)
    stored, decoder = stored_dtype(tensors), config.text_config.model_type
    dtype = choose_dtype(dtype, stored, device, decoder)
    read_weights(model, tensors, device, dtype)
    model.name_or_path, model.companions = str(folder.resolve()), _companions_in(folder)
    return model.to(device).eval(), tokenizer  # the buffers move too


def make_processor(
    model: PaliGemmaForConditionalGeneration, tokenizer: Any
) -> PaliGemmaProcessor:
    """The processor with the number of image tokens and the side that a model needs.

    Raises ValueError where the tokenizer belongs to another model.
    """
    vision = model.config.vision_config
    theirs = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if theirs != model.config.image_token_index:
        raise ValueError(
            f"{IMAGE_TOKEN} is {theirs} for the tokenizer and "
            f"{model.config.image_token_index} in the model's config: give each "
            "model its own tokenizer"
        )
    return PaliGemmaProcessor(tokenizer, vision.num_image_tokens, vision.image_size)


def preprocessor_config(config: PaliGemmaConfig) -> dict[str, Any]:
    """What transformers' image processor must do to match ours."""
    side = config.vision_config.image_size
    return {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_seq_length": config.vision_config.num_image_tokens,
    }


def generation_config(config: PaliGemmaConfig) -> dict[str, Any]:
    """The special ids that transformers' generate looks for."""
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


def require_space(folder: str | os.PathLike, num_bytes: int) -> None:
    """Raise OSError (ENOSPC) unless the disk of `folder` has so many bytes free."""
    place = Path(folder).expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        needs = f"needs {num_bytes / 1e9:.3g} GB, {free / 1e9:.3g} GB free in {folder}"
        raise OSError(errno.ENOSPC, needs)


@contextmanager
def _full_disk(folder: Path) -> Iterator[None]:
    "The libraries' errors for a full disk, which aren't OSErrors, become one."
    try:
        yield
    except Exception as error:
        if "No space left" in str(error):
            text = f"no space left while writing into {folder}: nothing was replaced"
            raise OSError(errno.ENOSPC, text) from error
        raise


def _tensors_to_save(
    model: nn.Module,
) -> tuple[PaliGemmaForConditionalGeneration, dict[str, Tensor]]:
    """(the model itself, its tensors by name), out of compile's and DDP's wrappers.

    Raises ValueError for what a checkpoint can't hold: adapters, other names or shapes
    than the config's, an output head that isn't the embedding.
    """
    inner = model
    while not isinstance(inner, PaliGemmaForConditionalGeneration):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            raise ValueError(
                f"a {type(model).__name__} of {type(model).__module__} isn't saved "
                "here: of peft's, save what merge_and_unload() returns, or the adapter "
                "by its own save_pretrained"
            )
    state = {canonical_name(name): t for name, t in inner.state_dict().items()}
    wanted = {n: t.shape for n, t in empty_model(inner.config).state_dict().items()}
    for name in sorted({*state, *wanted}):
        tensor = state.get(name)  # of its own class where it is one shard of several
        plain = type(tensor) is Tensor and tensor.dtype in FLOAT_TYPES.values()
        if not plain or tensor.is_meta or tensor.shape != wanted.get(name):
            raise ValueError(
                f"{name} isn't the plain tensor that the model's config promises: "
                "merge adapters (peft's merge_and_unload), gather shards, or save "
                "before quantizing"
            )
    head, embedding = state.pop(TIED), state[EMBEDDING]
    if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
        raise ValueError(f"{TIED} isn't {EMBEDDING} any more: call tie_weights first")
    return inner, state


def _companions_of(
    model: PaliGemmaForConditionalGeneration,
    folder: Path,
    companions_from: str | os.PathLike | None,
) -> list[Path]:
    """The mask tokens' files that go with a model into `folder`.

    Those of the folder that it was loaded from, all that were there then; or those in
    `companions_from`. Raises FileNotFoundError where they are gone, ValueError where
    `folder` holds another model's.
    """
    source = Path(companions_from or getattr(model, "name_or_path", ""))
    there, names = _companions_in(source), getattr(model, "companions", [])
    if companions_from is not None:
        names = there or COMPANIONS[:1]
    if gone := sorted({*names} - {*there}):
        raise FileNotFoundError(
            f"no {gone[0]} in {source}, and this model's masks need it: give the "
            "folder that holds it as companions_from"
        )
    others = sorted({*_companions_in(folder)} - {*names})
    if others and source.resolve() != folder.resolve():
        raise ValueError(
            f"{folder} holds another model's {others[0]}: save elsewhere, or give "
            "companions_from"
        )
    return [source / name for name in names]


def save_hf_model(
    model: nn.Module,
    tokenizer: Any,
    folder: str | os.PathLike,
    max_shard_size: str = "5GB",
    companions_from: str | os.PathLike | None = None,
) -> None:
    """Write a checkpoint in the hub's layout, which transformers loads as it is.

    Larger than `max_shard_size` (like "5GB") it becomes shards and an index. What reads
    its mask tokens comes along, from where the model was loaded or `companions_from`.
    Everything is checked, the space too, and written beside its place; it moves there
    when all of it is complete.
    Raises ValueError, FileNotFoundError or OSError; what was in `folder` is there then.
    """
    folder = Path(folder).expanduser()
    model, state = _tensors_to_save(model)
    companions = _companions_of(model, folder, companions_from)
    size = sum(tensor.nbytes for tensor in state.values())
    require_space(folder, size)  # nothing is begun that can't end well
    folder.mkdir(parents=True, exist_ok=True)
    _finish_save(folder)
    with tempfile.TemporaryDirectory(dir=folder) as scratch, _full_disk(folder):
        staged = Path(scratch, "complete")
        model.config.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        for name, values in (
            ("preprocessor_config.json", preprocessor_config(model.config)),
            ("generation_config.json", generation_config(model.config)),
        ):
            text = json.dumps(values, indent=2) + "\n"
            (staged / name).write_text(text, encoding="utf-8")
        for file in companions:
            shutil.copyfile(file, staged / file.name)
        require_space(folder, size)
        save_torch_state_dict(state, staged, max_shard_size=max_shard_size)
        for file in staged.glob("*.safetensors"):  # made readable for the owner alone
            shutil.copymode(staged / "config.json", file)
        os.replace(staged, folder / _STAGED)
    _finish_save(folder)


def describe_model(
    model: PaliGemmaForConditionalGeneration,
    model_path: str | os.PathLike | None = None,
) -> str:
    """A sentence for whoever reads the answers: which model made them, and how."""
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    kind = f"{millions:,.1f} M weights, {model.dtype}, {model.device}"
    if model_path is not None and Path(model_path).expanduser() != EMBEDDED:
        return f"{model_path}: {kind}"
    return (
        f"the embedded model {EMBEDDED.name}: {kind}. It knows about a hundred kinds "
        "of sticker and nothing else; in a photograph it sees stickers"
    )


def load_chosen_model() -> tuple[PaliGemmaForConditionalGeneration, Any, str]:
    """(model, tokenizer, `describe_model`'s sentence) for the variable VLM_MODEL.

    VLM_MODEL is a folder or a hub id, which may end in `@revision`; on an NVIDIA GPU
    the weights come in `choose_dtype`'s "16-bit". Unset, or where that model can't be
    had, which a printed line explains: the embedded model.
    """
    chosen = os.environ.get("VLM_MODEL", "").strip() or None
    device = choose_device()
    if chosen is not None:
        if _hub_id(chosen):
            print(
                f"VLM_MODEL={chosen}: a checkpoint of 3 billion weights takes 6 GB of "
                "disk and memory in 16-bit numbers, and 12 GB in float32. Google's ask "
                "you to accept a license on their page and to log in with "
                "`hf auth login`."
            )
        try:
            dtype = "16-bit" if device.type == "cuda" else "auto"
            model, tokenizer = load_hf_model(chosen, device, dtype)
            return model, tokenizer, describe_model(model, chosen)
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            reason = " ".join(str(error).split())
            print(f"VLM_MODEL={chosen} can't be used: {reason}")
            print("This page goes on with the embedded model.")
    model, tokenizer = load_hf_model(None, device)
    return model, tokenizer, describe_model(model)
