"""Load real checkpoints and save your own, strictly: no tensor missing, none left over.

Built in notebooks/14_weights.ipynb: edit it there, then run `make export`.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

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
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .config import PaliGemmaConfig
from .paligemma import PaliGemmaForConditionalGeneration
from .processing import IMAGE_TOKEN, PaliGemmaProcessor

__all__ = [
    "EMBEDDED",
    "SINGLE_FILE",
    "INDEX_FILE",
    "SHARDS",
    "RENAMES",
    "EMBEDDING",
    "TIED",
    "SMALL_FILES",
    "COMPANIONS",
    "ALL_FILES",
    "STAGED",
    "FLOAT_TYPES",
    "READ_AHEAD",
    "canonical_name",
    "explain_hub_error",
    "finish_save",
    "find_checkpoint",
    "tensor_names",
    "read_index",
    "find_tensors",
    "check_tensors",
    "check_index",
    "choose_device",
    "has_bfloat16",
    "choose_dtype",
    "empty_model",
    "stored_dtype",
    "check_tied",
    "read_weights",
    "load_tokenizer",
    "read_config",
    "load_hf_model",
    "make_processor",
    "preprocessor_config",
    "generation_config",
    "require_space",
    "tensors_to_save",
    "find_companions",
    "save_hf_model",
    "describe_model",
    "load_chosen_model",
]

EMBEDDED = Path(str(package_files("vlm"))) / "checkpoints" / "paligemma-stickers"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"

# Other layouts' names → ours, which are those of the hub's files.
RENAMES = (
    (r"(^|(?<=\.))(_orig_mod|module)\.", ""),  # torch.compile, data parallel
    (r"^model\.", ""),  # transformers 5 in memory
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
EMBEDDING = "language_model.model.embed_tokens.weight"
TIED = "language_model.lm_head.weight"  # the embedding again; files may leave it out


def canonical_name(name: str) -> str:
    """A tensor's name in any of the three layouts → its name in our model."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _hub_id(model_path: str | os.PathLike) -> tuple[str, str | None] | None:
    "(owner/name, revision or None) for `owner/name@revision`; None for what is no id."
    found = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:@(\S+))?", str(model_path))
    return (found[1], found[2]) if found and not Path(model_path).exists() else None


def _http_answer(error: BaseException | None) -> Any:
    "The hub's answer behind an error, or None where it gave none."
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__ or error.__context__
    return None if error is None else error.response


def explain_hub_error(name: str, revision: str | None, error: Exception) -> str:
    """Why the hub didn't give us `name`, and what to click or set: one sentence."""
    page = f"{constants.ENDPOINT}/{name}"
    answer = _http_answer(error)
    log_in = "run `hf auth login`, or set HF_TOKEN to a token of your account"
    reason = str(error).strip().partition("\n")[0].rstrip(".") or repr(error)
    if isinstance(error, GatedRepoError):  # it is a RepositoryNotFoundError too
        return (
            f"{name} is behind a license: accept it on {page} with your account on "
            f"the hub, then {log_in}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"the hub has no {name}, or it is private: look for it at {page}; if it "
            f"is private, {log_in}"
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{name} has no revision {revision or 'main'}: {page}/tree/main lists its "
            "branches and tags"
        )
    if answer is not None and answer.status_code in (401, 403):
        said = answer.headers.get("X-Error-Message", "no reason given").rstrip(".")
        return (
            f"the hub refuses {name} ({answer.status_code}: {said}): {log_in}. A "
            "fine-grained token must be allowed to read gated repositories"
        )
    if answer is not None and (answer.status_code == 429 or answer.status_code >= 500):
        return f"the hub answered {answer.status_code} for {name}: try again later"
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


def _companions_in(folder: Path) -> list[str]:
    return [name for name in COMPANIONS if (folder / name).is_file()]


STAGED = ".complete-save"  # where a save lies between "all written" and "all in place"


def finish_save(folder: Path) -> None:
    """Move a complete save to its place: its weights' entry, file or index, last.

    Interrupted, it can go on: a load calls it too. Until the entry moves, the former
    weights' is there; what isn't a part of the new ones goes.
    """
    staged = folder / STAGED
    if not staged.is_dir():
        return
    entry, weights = SINGLE_FILE, {SINGLE_FILE}
    if (staged / INDEX_FILE).is_file():
        shards = json.loads((staged / INDEX_FILE).read_text("utf-8"))["weight_map"]
        entry, weights = INDEX_FILE, {INDEX_FILE, *shards.values()}
    former = {SINGLE_FILE, INDEX_FILE, *(f.name for f in folder.glob(SHARDS))}
    for file in sorted(staged.iterdir(), key=lambda file: file.name == entry):
        for name in former - weights if file.name == entry else ():
            (folder / name).unlink(missing_ok=True)
        with suppress(FileNotFoundError):  # another process was quicker
            os.replace(file, folder / file.name)
    with suppress(OSError):
        staged.rmdir()


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
        finish_save(folder)
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{folder} is a file: give the folder that holds it")
    if hub_id is None:
        raise FileNotFoundError(
            f"no folder {folder}: give a checkpoint's folder, or a hub id like "
            "google/paligemma-3b-mix-224"
        )
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


def tensor_names(file: Path) -> list[str]:
    """The names in one safetensors file; ValueError where it can't be read."""
    try:
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{file} can't be read (truncated?): delete {file.resolve()} and fetch "
            f"it again ({error})"
        ) from error


def _what_instead(folder: Path) -> str:
    "What lies in a folder without the file of weights, and what to do about it."
    if list(folder.glob(SHARDS)):
        return f", only shards without their index: fetch {INDEX_FILE} too"
    if list(folder.glob("*.bin*")):
        return (
            ", only .bin files, which are pickles and could run code: load them with "
            "transformers, and save_pretrained writes safetensors"
        )
    return (
        f" and no {INDEX_FILE}: fetch the weights too, or choose a repository whose "
        "weights are safetensors"
    )


def read_index(index: Path) -> dict[str, str]:
    """An index of shards: every tensor's name and its shard's. Or a ValueError."""
    try:
        weight_map = dict(json.loads(index.read_text("utf-8"))["weight_map"])
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("a shard's name must be text")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{index} is not an index of shards: {error!r}. Fetch it again"
        ) from error
    return weight_map


def find_tensors(folder: Path) -> dict[str, Path]:
    """Every tensor's name and the safetensors file in `folder` that holds it.

    One file, or shards with an index. Raises FileNotFoundError where a file is missing,
    ValueError where one can't be read or the index and the shards disagree.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return dict.fromkeys(tensor_names(single), single)
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has no {SINGLE_FILE}{_what_instead(folder)}")
    weight_map = read_index(index)
    shards = sorted(set(weight_map.values()))
    for file in folder.glob(SHARDS):
        if file.name not in shards:
            raise ValueError(
                f"{index} names no tensor of {file.name}, a shard beside it: fetch the "
                "index again, or move the shard away"
            )
    found = {}
    for name in shards:
        shard = folder / name
        if not shard.is_file():
            raise FileNotFoundError(
                f"{INDEX_FILE} names {name}, which is missing in {folder}: fetch it too"
            )
        found |= dict.fromkeys(tensor_names(shard), shard)
    for name, shard in weight_map.items():
        if found.get(name) != folder / shard:
            raise ValueError(
                f"{INDEX_FILE} promises {name} in {shard}, and it isn't there: fetch "
                f"both files again, into {folder}"
            )
    return found


FLOAT_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def _refuse(
    folder: Path | str,
    problems: Sequence[str],
    expected: Collection[str],
    seen: Collection[str],
) -> None:
    "Raise a ValueError that lists the problems and what is missing, if anything is."
    missing = [name for name in expected if name not in seen and name != TIED]
    problems = [*problems, *(f"missing {name}" for name in missing)]
    if problems:
        rest = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"{folder} doesn't fit the model of its config.json: "
            f"{'; '.join(problems[:8])}{rest}. Fetch it again, or give the config.json "
            "that belongs to these tensors"
        )


def check_tensors(
    model: PaliGemmaForConditionalGeneration, files: dict[str, Path]
) -> None:
    """Raise a ValueError unless names and shapes in `files` are exactly the model's.

    Reads headers only. `files`: name in the file → file, from `find_tensors`.
    """
    expected = {name: list(p.shape) for name, p in model.state_dict().items()}
    seen: dict[str, str] = {}
    problems = []
    for file in sorted(set(files.values())):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                ours, header = canonical_name(name), tensors.get_slice(name)
                shape, kind = list(header.get_shape()), header.get_dtype()
                where = f"{name} in {file.name}"
                if ours not in expected:
                    problems.append(f"unexpected {where}")
                elif ours in seen:
                    problems.append(f"{where} repeats {seen[ours]}")
                elif shape != expected[ours]:
                    wanted = expected[ours]
                    problems.append(f"{where} has shape {shape}, not {wanted}")
                elif kind not in FLOAT_TYPES:
                    allowed = ", ".join(FLOAT_TYPES)
                    problems.append(f"{where} has dtype {kind}, not one of {allowed}")
                seen[ours] = where
    folder = next(iter(files.values())).parent if files else "the checkpoint"
    _refuse(folder, problems, expected, seen)


def check_index(model: PaliGemmaForConditionalGeneration, folder: Path) -> None:
    """`check_tensors`' check of names for an index, before its shards are fetched."""
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() or not index.is_file():
        return
    weight_map, expected = read_index(index), model.state_dict().keys()
    seen = {canonical_name(name) for name in weight_map}
    odd = [name for name in weight_map if canonical_name(name) not in expected]
    problems = [f"unexpected {name} in {INDEX_FILE}" for name in odd]
    _refuse(folder, problems, expected, seen)


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device by name; "auto": CUDA if there is one, else Apple's MPS, else CPU.

    Raises ValueError for a device that isn't there.
    """
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"no device {device!r} here ({reason}): use 'auto' or 'cpu'"
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


def stored_dtype(files: dict[str, Path]) -> torch.dtype:
    """The dtype of the embedding, the largest tensor; the others will follow it."""
    name = next(name for name in files if canonical_name(name) == EMBEDDING)
    with safe_open(files[name], "pt") as tensors:
        return FLOAT_TYPES[tensors.get_slice(name).get_dtype()]


def check_tied(files: dict[str, Path]) -> None:
    """Raise a ValueError where files hold an output head that isn't the embedding."""
    pair = {canonical_name(name): name for name in files}
    if TIED not in pair:
        return
    tensors = []
    for name in (pair[TIED], pair[EMBEDDING]):
        with safe_open(files[name], "pt") as file:
            tensors.append(file.get_tensor(name))
    if not torch.equal(*tensors):
        raise ValueError(
            f"{pair[TIED]} in {files[pair[TIED]]} differs from {pair[EMBEDDING]}: in "
            "PaliGemma they are one tensor. This was trained with two, or is damaged: "
            "fetch it again"
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
    files: dict[str, Path],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Put the tensors of `files` into a model without memory, one at a time.

    On the CPU in the file's own dtype they stay mapped from the file, not copied.
    Elsewhere only one tensor is in memory twice, while it is converted or moved.
    """
    check_tied(files)
    state: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        _read_ahead(file)
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if canonical_name(name) == TIED:
                    continue
                tensor = tensors.get_tensor(name)  # mapped: nothing is read yet
                if device.type != "cpu" or tensor.dtype != dtype:
                    with safe_open(file, "pt") as once:  # closed, its pages are gone
                        tensor = once.get_tensor(name).to(device, dtype)
                state[canonical_name(name)] = tensor
    state[TIED] = state[EMBEDDING]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside the weights; FileNotFoundError where there is none."""
    from transformers import AutoTokenizer  # slow to import, so only when needed

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"no tokenizer that can be read in {folder}: fetch its tokenizer.json, "
            f"or tokenizer.model, and tokenizer_config.json ({reason})"
        ) from error


def read_config(folder: Path) -> PaliGemmaConfig:
    """A checkpoint's sizes.

    Raises FileNotFoundError where there is no config.json, ValueError that names the
    file where it isn't a PaliGemma's in transformers' format.
    """
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds an adapter, not a model: merge it into its base model "
            "with peft's merge_and_unload, save that, and give its folder"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"no config.json in {folder}: only checkpoints in transformers' format are "
            "read, not JAX's, Keras' or GGUF files. Give one like "
            "google/paligemma-3b-mix-224"
        )
    try:
        config = PaliGemmaConfig.from_pretrained(folder)
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a PaliGemma's in transformers' format: {error}. Give the "
            "folder or the hub id of one, like google/paligemma-3b-mix-224"
        ) from error
    if "quantization_config" in values:
        raise ValueError(
            f"{path} says that the weights are quantized: give the checkpoint that "
            "they were made from"
        )
    return config


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
    from: the folder in `name_or_path`, and which `COMPANIONS` lay there.
    Raises FileNotFoundError and ValueError that name the file and the tensor.
    """
    device = choose_device(device)
    choose_dtype(dtype, torch.float32, device)  # a wrong name: before anything is read
    folder = find_checkpoint(model_path, revision, SMALL_FILES)
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    model = empty_model(config)
    if model_path is not None and _hub_id(model_path):
        check_index(model, folder)
        folder = find_checkpoint(model_path, revision)  # now the weights too
    files = find_tensors(folder)
    check_tensors(model, files)
    stored, decoder = stored_dtype(files), config.text_config.model_type
    dtype = choose_dtype(dtype, stored, device, decoder)
    read_weights(model, files, device, dtype)
    model.name_or_path = str(folder.resolve())
    model.companions = _companions_in(folder)
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


def tensors_to_save(
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
    plain = {
        (name, tensor.shape)
        for name, tensor in state.items()
        if type(tensor) is Tensor and tensor.dtype in FLOAT_TYPES.values()
    }
    if odd := sorted({*state, *wanted} - dict(plain & wanted.items()).keys()):
        raise ValueError(
            f"{odd[0]} isn't a plain tensor like the model's config says, and nobody "
            "could load it: merge adapters (peft's merge_and_unload), gather shards, "
            "save before quantizing"
        )
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError("a model on the meta device has no weights to save")
    head = state.pop(TIED)
    if head is not state[EMBEDDING] and not torch.equal(head, state[EMBEDDING]):
        raise ValueError(f"{TIED} isn't {EMBEDDING} any more: call tie_weights first")
    return inner, state


def find_companions(
    model: PaliGemmaForConditionalGeneration,
    folder: Path,
    companions_from: str | os.PathLike | None,
) -> list[Path]:
    """The mask tokens' files that go with a model into `folder`.

    Those of the folder that it was loaded from, all that were there then; or those in
    `companions_from`. Raises FileNotFoundError where they are gone, ValueError where
    `folder` holds another model's.
    """
    names = getattr(model, "companions", [])
    source = Path(companions_from or getattr(model, "name_or_path", ""))
    if companions_from is not None:
        names = _companions_in(source) or COMPANIONS[:1]
    for name in names:
        if not (source / name).is_file():
            raise FileNotFoundError(
                f"no {name} in {source}, and this model's masks need it: give the "
                "folder that holds it as companions_from"
            )
    others = set(_companions_in(folder)) - set(names)
    if others and source.resolve() != folder.resolve():
        raise ValueError(
            f"{folder} holds another model's {others.pop()}: save elsewhere, or give "
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
    model, state = tensors_to_save(model)
    companions = find_companions(model, folder, companions_from)
    size = sum(tensor.nbytes for tensor in state.values())
    require_space(folder, size)  # nothing is begun that can't end well
    folder.mkdir(parents=True, exist_ok=True)
    finish_save(folder)
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
        os.replace(staged, folder / STAGED)
    finish_save(folder)


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
