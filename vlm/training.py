"""Teach the model: prefix-LM loss, dense labels for the eyes, AdamW, a long cosine.

Built in notebooks/17_training.ipynb: edit it there, then run `make export`.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import (
    Accelerator,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
)
from accelerate.state import AcceleratorState
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from .config import PaliGemmaConfig
from .mask_tokens import (
    CODES_PER_MASK,
    ENCODER_FILE,
    MASK_SIDE,
    Codebook,
    MaskDecoder,
    MaskVQVAE,
    crop_to_square,
)
from .paligemma import PaliGemmaForConditionalGeneration
from .processing import (
    NUM_LOCS,
    NUM_SEGS,
    PaliGemmaProcessor,
    image_to_pixels,
    loc_token,
    seg_token,
)
from .sampling import generate
from .scenes import (
    TRAINING_STYLES,
    EncodeMask,
    Scene,
    all_kinds,
    make_scene,
    sample_question,
    train_tokenizer,
    world_sentences,
)
from .weights import (
    find_checkpoint,
    load_hf_model,
    make_processor,
    require_space,
    save_hf_model,
)

__all__ = [
    "LOSSES",
    "PATCH_TARGETS",
    "OUTLINE_SIDE",
    "VALIDATION_SEEDS",
    "FREE",
    "SAVED",
    "Evaluate",
    "TrainingConfig",
    "sincos_positions",
    "fourier_locs",
    "initialize",
    "embedded_config",
    "make_tokenizer",
    "new_model",
    "to_outline",
    "patch_targets",
    "drawing_loss",
    "Teacher",
    "pack_questions",
    "packed_mask",
    "seg_codes",
    "run_starts",
    "label_weights",
    "SceneDataset",
    "collate",
    "code_likeness",
    "token_losses",
    "mask_plans",
    "overhear",
    "Lesson",
    "learning_rate_at",
    "loss_weights",
    "make_optimizer",
    "save_training_state",
    "saved_run",
    "check_run_folder",
    "load_teacher",
    "load_training_state",
    "run_settings",
    "saved_settings",
    "check_settings",
    "refuse_what_is_no_number",
    "TrainingLog",
    "validate",
    "make_accelerator",
    "training_step",
    "train",
    "build_parser",
    "main",
]

LOSSES = ("text", "kinds", "boxes", "shapes", "outlines", "plans")
PATCH_TARGETS = ("patch_kinds", "patch_boxes", "patch_shapes", "patch_outlines")
OUTLINE_SIDE = 16  # an outline is a mask in 16 × 16 cells on its box


VALIDATION_SEEDS = range(2 * 10**9, 2 * 10**9 + 500)  # neither trained on nor reported


# What may change when a run goes on: when it writes and who draws, not what it learns.
FREE = ("log_every", "eval_every", "save_every", "num_workers")


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingConfig:
    """One run's settings; the command line has a flag for each.

    First `patch_steps` of the eyes alone on patch labels, then `steps` of everything,
    each with its own warm-up and cosine. A batch is `batch_size` pictures, over all
    processes together. The first of every `1 + silent_pictures` brings
    `questions_per_picture` questions in one row. Raises ValueError where that doesn't
    divide a batch, and for counts below 1.
    """

    steps: int = _setting(1000, "steps with questions")
    patch_steps: int = _setting(0, "steps before them in which only the eyes learn")
    batch_size: int = _setting(64, "pictures in a batch, all processes together")
    questions_per_picture: int = _setting(6, "questions packed behind a picture")
    silent_pictures: int = _setting(0, "for the eyes alone, behind each asked about")
    max_row_tokens: int = _setting(
        256, "questions that would make it longer are left out"
    )
    first_loc_weight: float = _setting(3.0, "of a box's first token in the text loss")
    loc_weight: float = _setting(1.0, "of a box's other tokens there")
    seg_weight: float = _setting(0.25, "of each token of a mask in the text loss")
    first_seg_weight: float = _setting(3.0, "times that, of a mask's first two tokens")
    caption_weight: float = _setting(1.0, "of each token of a caption in the text loss")
    learning_rate: float = _setting(1e-3, "peak of the cosine")
    patch_learning_rate: float = _setting(1.5e-3, "peak while only the eyes learn")
    warmup_steps: int = _setting(200, "steps from zero to the peak")
    final_share: float = _setting(0.02, "share of the peak at which the cosine ends")
    weight_decay: float = _setting(0.05, "on matrices; vectors and norms have none")
    max_grad_norm: float = _setting(1.0, "gradients longer than this are shortened")
    patch_loss_weight: float = _setting(0.3, "of the teacher beside the text loss")
    max_objects: int = _setting(6, "stickers in a picture, at most")
    patch_max_objects: int = _setting(10, "the same where only the eyes learn")
    styles: str = _setting(
        ",".join(TRAINING_STYLES), "of the stickers; named twice, drawn twice as often"
    )
    vary: float = _setting(0.5, "share of stickers with another look")
    questions: str = _setting(
        "caption,detect,segment,count,relation", "tasks asked about every picture"
    )
    more_questions: str = _setting(
        "detect,segment,count,relation,presence", "tasks that the rest is drawn from"
    )
    seed: int = _setting(0, "of scenes, questions and starting values")
    num_workers: int = _setting(0, "processes that draw scenes")
    mixed_precision: str = _setting("no", "no, bf16 or fp16")
    log_every: int = _setting(20, "steps between lines of the log")
    eval_every: int = _setting(500, "steps between evaluations")
    save_every: int = _setting(500, "steps between saves")

    def __post_init__(self) -> None:
        for name in ("all_steps", "batch_size", "questions_per_picture", *FREE[:3]):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, not at least 1")
        if self.silent_pictures < 0 or self.batch_size % (1 + self.silent_pictures):
            raise ValueError(
                f"silent_pictures={self.silent_pictures} must be at least 0, and "
                f"batch_size={self.batch_size} divisible by 1 + silent_pictures"
            )

    @property
    def all_steps(self) -> int:
        return self.patch_steps + self.steps


def sincos_positions(side: int, width: int) -> Float[Tensor, "N D"]:
    """2-D sine–cosine vectors of a side × side grid, row by row; half x, half y."""
    quarter = width // 4
    frequencies = 100.0 ** (-torch.arange(quarter) / quarter)  # [D/4]
    angles = torch.arange(side)[:, None] * frequencies  # [side, D/4]
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, D/2]
    rows = waves[:, None].expand(side, side, -1)  # y
    columns = waves[None].expand(side, side, -1)  # x
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # [N, ≤ D]
    return F.pad(grid, (0, width - grid.shape[1]))


def fourier_locs(width: int) -> Float[Tensor, "1024 D"]:
    """Vectors of length 1 for the loc tokens in which neighbors are alike.

    Waves of their coordinate, from half a period over the picture to nearly 64, and a
    part common to all of them that says "I am a coordinate".
    """
    coordinate = torch.linspace(0, 1, NUM_LOCS)[:, None]  # [1024, 1]
    half = width // 2
    periods = 0.5 * 128 ** (torch.arange(half) / half)  # [D/2]
    angles = 2 * math.pi * coordinate * periods  # [1024, D/2]
    fade = periods**-0.5  # coarse waves weigh most: far apart must look far apart
    waves = torch.cat([angles.sin() * fade, angles.cos() * fade], dim=1)  # [1024, D]
    waves = F.normalize(F.pad(waves, (0, width - waves.shape[1])), dim=1)
    return F.normalize(waves + 0.5 * F.normalize(torch.randn(width), dim=0), dim=1)


@torch.no_grad()
def initialize(model: PaliGemmaForConditionalGeneration, tokenizer: Any) -> None:
    """Starting values that give learning a head start.

    Embedding vectors have length 1: scaled by √D they enter the stream with unit
    variance. Loc embeddings are Fourier features of their coordinate; positions of
    patches are sine–cosine vectors. Everything else keeps PyTorch's own start.
    """
    embedding = model.language_model.model.embed_tokens.weight  # [V, D]
    width = embedding.shape[1]
    embedding.normal_(std=width**-0.5)
    first = tokenizer.convert_tokens_to_ids(loc_token(0))
    embedding[first : first + NUM_LOCS] = fourier_locs(width)
    vision = model.vision_tower.vision_model.embeddings
    side = (
        model.config.vision_config.image_size // model.config.vision_config.patch_size
    )
    vision.position_embedding.weight.copy_(
        0.5 * sincos_positions(side, model.config.vision_config.hidden_size)
    )


def embedded_config(tokenizer: Any) -> PaliGemmaConfig:
    """The shape of the model that ships with the book: small enough for a laptop."""
    vocabulary = -(-len(tokenizer) // 64) * 64
    return PaliGemmaConfig(
        vision_config={
            "hidden_size": 160,
            "intermediate_size": 640,
            "num_hidden_layers": 6,
            "num_attention_heads": 5,
            "image_size": 128,
            "patch_size": 16,
        },
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 512,
        },
        projection_dim=128,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def make_tokenizer(num_scenes: int = 3000) -> PreTrainedTokenizerFast:
    """The world's tokenizer in transformers' clothes."""
    return PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(world_sentences(num_scenes)),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )


def new_model(
    seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None
) -> tuple[PaliGemmaForConditionalGeneration, PreTrainedTokenizerFast]:
    """An untrained embedded model and its tokenizer, a new one if none is given."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or make_tokenizer()
    model = PaliGemmaForConditionalGeneration(embedded_config(tokenizer))
    initialize(model, tokenizer)
    return model, tokenizer


def to_outline(mask: Float[Tensor, "*B 64 64"]) -> Float[Tensor, "*B 256"]:
    """A mask of values 0…1 on its box → the covered share of each of 16 × 16 cells."""
    cut = (OUTLINE_SIDE, MASK_SIDE // OUTLINE_SIDE)  # 16 cells of 4
    cells = mask.unflatten(-1, cut).unflatten(-3, cut)  # [*B, 16, 4, 16, 4]
    return cells.mean(dim=(-3, -1)).flatten(-2)


def patch_targets(
    scene: Scene, patch_size: int, share: float = 0.2
) -> tuple[
    Int[np.ndarray, "N"],
    Float[np.ndarray, "N 4"],
    Bool[np.ndarray, "N patch_pixels"],
    Float[np.ndarray, "N 256"],
]:
    """What each patch shows: a kind's index (0 background), its box, shape and outline.

    A patch shows the thing that covers more of it than any other, if that is at least
    `share` of its pixels. Boxes are (x0, y0, x1, y1) as offsets from the patch's
    center, in shares of the side. Shapes say which of the patch's pixels, row by row,
    belong to its thing; outlines, as `to_outline`, of all that is visible of it.
    All but kinds are zero for background.
    """
    size = scene.image.width
    side = size // patch_size
    kinds = np.zeros(side * side, dtype=np.int64)
    boxes = np.zeros((side * side, 4), dtype=np.float32)
    index = np.arange(len(scene.objects))
    shown = scene.owner[..., None] == index  # [S, S, objects]
    shown = shown.reshape(side, patch_size, side, patch_size, -1)
    shown = shown.mean(axis=(1, 3))  # [side, side, objects]
    shown = shown.reshape(side * side, -1)  # [N, objects]
    best = shown.argmax(axis=1)
    visible = shown.max(axis=1) >= share
    names = {name: i + 1 for i, name in enumerate(all_kinds())}
    thing_kinds = np.array([names[thing.kind] for thing in scene.objects])
    thing_boxes = np.array([thing.box for thing in scene.objects], np.float32) / size
    middle = (np.arange(side, dtype=np.float32) + 0.5) / side
    x, y = np.meshgrid(middle, middle)
    centers = np.stack([x, y, x, y], axis=-1).reshape(side * side, 4)
    kinds[visible] = thing_kinds[best[visible]]
    boxes[visible] = thing_boxes[best[visible]] - centers[visible]
    owner = scene.owner.reshape(side, patch_size, side, patch_size).swapaxes(1, 2)
    owner = owner.reshape(side * side, -1)  # [N, patch pixels]
    shapes = (owner == best[:, None]) & visible[:, None]
    squares = [(crop_to_square(thing.cropped_mask) + 1) / 2 for thing in scene.objects]
    outlines = to_outline(torch.cat(squares)).numpy()  # [objects, 256]
    outlines = np.where(visible[:, None], outlines[best], 0)  # [N, 256]
    return kinds, boxes, shapes, outlines


def drawing_loss(
    logits: Float[Tensor, "*B cells"], wanted: Tensor
) -> Float[Tensor, "*B"]:
    """Mean cross-entropy of a drawing's cells, each covered or not, or by a share."""
    losses = F.binary_cross_entropy_with_logits(
        logits.float(), wanted.float(), reduction="none"
    )
    return losses.mean(dim=-1)


class Teacher(nn.Module):
    """Linear heads that ask the eyes and the language model what they know.

    Of each patch: the kind, box, shape and outline of the thing in it. Of the language
    model, where the first code of a mask is due: its plan, the outline that the sixteen
    will draw. Only a teacher: it is thrown away after training.
    """

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        width, cells = config.vision_config.hidden_size, OUTLINE_SIDE**2
        self.kind_head = nn.Linear(width, len(all_kinds()) + 1)
        self.box_head = nn.Linear(width, 4)
        self.shape_head = nn.Linear(width, config.vision_config.patch_size**2)
        self.outline_head = nn.Linear(width, cells)
        self.plan_head = nn.Linear(config.text_config.hidden_size, cells)
        weight = torch.ones(len(all_kinds()) + 1)
        weight[0] = 0.2  # background is everywhere
        self.register_buffer("kind_weight", weight)

    def forward(
        self,
        features: Float[Tensor, "B N D"],
        kinds: Int[Tensor, "B N"],
        boxes: Float[Tensor, "B N 4"],
        shapes: Bool[Tensor, "B N patch_pixels"],
        outlines: Float[Tensor, "B N 256"],
        states: Float[Tensor, "n Dt"],
        plans: Float[Tensor, "n 256"],
    ) -> tuple[Float[Tensor, "5"], Float[Tensor, "5"]]:
        """Totals and counts of five losses: four over patches, the last over masks.

        `states` are the language model's where n masks begin. Kinds (cross-entropy),
        boxes (distance), shapes, outlines and plans (`drawing_loss`).
        """
        shown = kinds > 0  # [B, N]
        logits = self.kind_head(features).flatten(0, 1).float()  # [B * N, kinds + 1]
        kind_total = F.cross_entropy(
            logits, kinds.flatten(), weight=self.kind_weight, reduction="sum"
        )
        box_loss = (self.box_head(features).float() - boxes).abs().mean(dim=-1)
        shape_loss = drawing_loss(self.shape_head(features), shapes)  # [B, N]
        outline_loss = drawing_loss(self.outline_head(features), outlines)  # [B, N]
        plan_loss = drawing_loss(self.plan_head(states), plans)  # [n]
        totals = [
            kind_total,
            5 * (box_loss * shown).sum(),
            (shape_loss * shown).sum(),
            2 * (outline_loss * shown).sum(),
            2 * plan_loss.sum(),
        ]
        count = shown.float().sum()
        masks = count.new_tensor(len(states))
        counts = [self.kind_weight[kinds].sum(), count, count, count, masks]
        return torch.stack(totals), torch.stack(counts)


def pack_questions(
    questions: list[tuple[list[int], list[int]]], num_image_tokens: int
) -> dict[str, Int[Tensor, "T"]]:
    """Several questions about one picture in one row: image, then all of them.

    `questions`: (prefix ids, image tokens first; suffix ids) of each. Returns
    `input_ids`, `position_ids`, `token_type_ids` and `question_ids` (0 image, 1, 2, …).
    Each question counts its positions on from the image, as if it stood alone.
    """
    input_ids = questions[0][0][:num_image_tokens]
    position_ids = list(range(num_image_tokens))
    token_type_ids = [0] * num_image_tokens
    question_ids = [0] * num_image_tokens
    for number, (prefix, suffix) in enumerate(questions, start=1):
        prefix = prefix[num_image_tokens:]
        length = len(prefix) + len(suffix)
        input_ids += prefix + suffix
        position_ids += range(num_image_tokens, num_image_tokens + length)
        token_type_ids += [0] * len(prefix) + [1] * len(suffix)
        question_ids += [number] * length
    return {
        "input_ids": torch.tensor(input_ids),
        "position_ids": torch.tensor(position_ids),
        "token_type_ids": torch.tensor(token_type_ids),
        "question_ids": torch.tensor(question_ids),
    }


def packed_mask(
    question_ids: Int[Tensor, "B T"], token_type_ids: Int[Tensor, "B T"]
) -> Bool[Tensor, "B 1 T T"]:
    """Who sees whom in packed rows (padding has question -1).

    Everyone sees the image. A question sees itself by the prefix-LM rule, and no other
    question. The image and the first question's prompt see each other, as they will
    when a question stands alone; if it saw the other prompts, they would meet in it.
    """
    block = token_type_ids.cumsum(dim=1)  # [B, T]
    query, key = question_ids[:, :, None], question_ids[:, None, :]
    earlier = block[:, None, :] <= block[:, :, None]  # [B, T, T]
    mask = (query == key) & earlier
    mask = mask | ((key == 0) & (query >= 0))
    first_prompt = (key == 1) & (token_type_ids == 0)[:, None, :]
    return (mask | ((query == 0) & first_prompt))[:, None]  # [B, 1, T, T]


def seg_codes(
    ids: Int[Tensor, "*B"], first_seg: int
) -> tuple[Int[Tensor, "*B"], Bool[Tensor, "*B"]]:
    """(codes, which ids are seg tokens at all); `first_seg` is the id of `<seg000>`."""
    codes = ids - first_seg
    return codes, (codes >= 0) & (codes < NUM_SEGS)


def run_starts(flags: Bool[Tensor, "*B T"], length: int = 1) -> Bool[Tensor, "*B T"]:
    """The first `length` places of each run of True; runs lie as far apart or more."""
    return flags & ~F.pad(flags, (length, 0))[..., :-length]


def label_weights(
    input_ids: Int[Tensor, "T"],
    token_type_ids: Int[Tensor, "T"],
    tokenizer: Any,
    config: TrainingConfig,
) -> Float[Tensor, "T"]:
    """How much each token counts in the text loss: 0 where nothing is to be learned.

    `first_loc_weight` for a loc token that doesn't follow another, `loc_weight` for one
    that does, `seg_weight` for a seg token, `first_seg_weight` times that for the first
    two of a mask, 1 for the rest of the answers.
    """
    loc, seg = tokenizer.convert_tokens_to_ids([loc_token(0), seg_token(0)])
    is_loc = (input_ids >= loc) & (input_ids < loc + NUM_LOCS)
    _, is_seg = seg_codes(input_ids, seg)
    opens_box = run_starts(is_loc)
    weights = token_type_ids.float()
    weights[opens_box] *= config.first_loc_weight
    weights[is_loc & ~opens_box] *= config.loc_weight
    weights[is_seg] *= config.seg_weight
    weights[run_starts(is_seg, 2)] *= config.first_seg_weight
    return weights


class SceneDataset(Dataset):
    """Pictures with questions, made up as they are asked for; the index is the seed.

    An item's scene and questions depend on `seed` and the index alone, so a run that
    resumes at index i sees what it would have seen. Silent pictures have patch targets
    and no questions. Without `encode_mask` (the crop of a mask → sixteen codes) each
    `segment` becomes a `detect`.
    """

    def __init__(
        self,
        processor: PaliGemmaProcessor,
        patch_size: int,
        config: TrainingConfig,
        encode_mask: EncodeMask | None = None,
    ):
        self.processor = processor
        self.patch_size = patch_size
        self.config = config
        self.encode_mask = encode_mask
        self.patch_items = config.patch_steps * config.batch_size
        self.length = self.patch_items + config.steps * config.batch_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(f"{self.config.seed} {index}")
        place = index - self.patch_items
        silent = place < 0 or place % (1 + self.config.silent_pictures) > 0
        scene = make_scene(
            rng.randrange(10**9),
            self.processor.image_size,
            max_objects=(
                self.config.patch_max_objects if silent else self.config.max_objects
            ),
            styles=self.config.styles.split(","),
            vary=self.config.vary,
        )
        targets = map(torch.from_numpy, patch_targets(scene, self.patch_size))
        item = dict(zip(PATCH_TARGETS, targets, strict=True))
        item["pixel_values"] = image_to_pixels(scene.image, self.processor.image_size)
        if silent:
            return item
        tasks = self.config.questions.split(",")
        more = self.config.more_questions.split(",")
        while len(tasks) < self.config.questions_per_picture:
            tasks.append(rng.choice(more))
        if self.encode_mask is None:
            tasks = ["detect" if task == "segment" else task for task in tasks]
        rng.shuffle(tasks)
        tasks = tasks[: self.config.questions_per_picture]
        questions = [
            sample_question(scene, task, rng, self.encode_mask) for task in tasks
        ]
        answers = [
            (
                self.processor.encode_prefix(question.prompt),
                self.processor.encode_suffix(question.answer),
            )
            for question in questions
        ]
        num_image_tokens = self.processor.num_image_tokens
        room = self.config.max_row_tokens - num_image_tokens
        fitting, caption = [], -1  # no question has this number
        for task, (prefix, suffix) in zip(tasks, answers, strict=True):
            length = len(prefix) - num_image_tokens + len(suffix)
            if length <= room or not fitting:
                fitting.append((prefix, suffix))
                room -= length
                caption = len(fitting) if task == "caption" else caption
        row = pack_questions(fitting, num_image_tokens)
        row["label_weights"] = label_weights(
            row["input_ids"],
            row["token_type_ids"],
            self.processor.tokenizer,
            self.config,
        )
        row["label_weights"][row["question_ids"] == caption] *= (
            self.config.caption_weight
        )
        return item | row


def collate(items: list[dict[str, Tensor]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Items → one batch; packed rows are padded on the right.

    Pictures with questions come first, so that row i is about picture i.
    """
    asked = [item for item in items if "input_ids" in item]
    silent = [item for item in items if "input_ids" not in item]
    batch = {
        name: torch.stack([item[name] for item in asked + silent])
        for name in ("pixel_values", *PATCH_TARGETS)
    }
    if not asked:
        return batch
    for name, padding in (
        ("input_ids", pad_token_id),
        ("position_ids", 0),
        ("token_type_ids", 0),
        ("question_ids", -1),
        ("label_weights", 0.0),
    ):
        rows = [item[name] for item in asked]
        batch[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
    return batch


def code_likeness(codebook: Codebook) -> Float[Tensor, "128 128"]:
    """How a right code shares its lesson with the codes like it: rows sum to 1.

    Shares fall with the squared distance of the vectors; its unit is that of a typical
    code to its nearest neighbor.
    """
    distance = torch.cdist(codebook._embedding, codebook._embedding).square()
    nearest = distance.topk(2, largest=False).values[:, 1]  # the first is itself
    return (-distance / nearest.median()).softmax(dim=-1)


def token_losses(
    logits: Float[Tensor, "B T V"],
    targets: Int[Tensor, "B T"],
    likeness: Float[Tensor, "128 128"] | None = None,
    first_seg: int = 0,
) -> Float[Tensor, "B T"]:
    """Cross-entropy of each target; with `likeness`, seg tokens share theirs.

    `first_seg` is the id of `<seg000>`.
    """
    log_p = logits.float().log_softmax(dim=-1)  # [B, T, V]
    losses = -log_p.gather(-1, targets[..., None])[..., 0]  # [B, T]
    if likeness is None:
        return losses
    codes, is_seg = seg_codes(targets, first_seg)
    shares = likeness[codes[is_seg]]  # [n, 128]
    seg_log_p = log_p[is_seg][:, first_seg : first_seg + NUM_SEGS]  # [n, 128]
    return losses.masked_scatter(is_seg, -(shares * seg_log_p).sum(dim=-1))


@torch.no_grad()
def mask_plans(
    targets: Int[Tensor, "B T"], first_seg: int, mask_decoder: MaskDecoder | None
) -> tuple[Bool[Tensor, "B T"], Float[Tensor, "n 256"]]:
    """Where the first code of a mask is due, and the outline that its sixteen draw.

    `first_seg` is the id of `<seg000>`. Without a mask decoder there are no plans.
    """
    if mask_decoder is None:
        no_outline = torch.zeros(0, OUTLINE_SIDE**2, device=targets.device)
        return torch.zeros_like(targets, dtype=torch.bool), no_outline
    codes, is_seg = seg_codes(targets, first_seg)
    starts = run_starts(is_seg)
    row, place = starts.nonzero(as_tuple=True)  # [n] each
    places = place[:, None] + torch.arange(CODES_PER_MASK, device=targets.device)
    drawn = mask_decoder(codes[row[:, None], places])[:, 0] > 0  # [n, 64, 64]
    return starts, to_outline(drawn.float())


@contextmanager
def overhear(module: nn.Module) -> Iterator[list[Any]]:
    """Collect what a module returns, call by call, while the block lasts."""
    heard: list[Any] = []
    hook = module.register_forward_hook(lambda _, args, output: heard.append(output))
    try:
        yield heard
    finally:
        hook.remove()


class Lesson(nn.Module):
    """Model and teacher as one module: a batch in, every loss out.

    The teacher overhears what the vision tower and the language model say in the
    model's own forward pass. With `vqvae`, the seg tokens from the id `first_seg` on
    share their lessons, and the language model is asked for plans.
    """

    def __init__(
        self,
        model: PaliGemmaForConditionalGeneration,
        teacher: Teacher,
        vqvae: MaskVQVAE | None = None,
        first_seg: int = 0,
    ):
        super().__init__()
        self.model = model
        self.teacher = teacher
        self.first_seg = first_seg
        self.mask_decoder = likeness = None
        if vqvae is not None:
            likeness = code_likeness(vqvae.decoder.codebook)
            # A copy: it moves with the lesson, and the caller's may stay.
            self.mask_decoder = copy.deepcopy(vqvae.decoder).requires_grad_(False)
        self.register_buffer("likeness", likeness, persistent=False)

    def _ask(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        "The text loss, total and count; states where masks begin, and their plans."
        num_image = self.model.config.vision_config.num_image_tokens
        input_ids = batch["input_ids"]
        with overhear(self.model.language_model.model) as heard:
            logits = self.model(
                input_ids=input_ids,
                pixel_values=batch["pixel_values"][: len(input_ids)],
                attention_mask=packed_mask(
                    batch["question_ids"], batch["token_type_ids"]
                ),
                position_ids=batch["position_ids"],
                logits_to_keep=input_ids.shape[1] - num_image,
            )["logits"]  # [B, T - N, V]
        targets = input_ids[:, num_image + 1 :]  # [B, T - N - 1]: the next tokens
        weights = batch["label_weights"][:, num_image + 1 :]
        losses = token_losses(
            logits[:, :-1], targets, self.likeness, self.first_seg
        )  # [B, T - N - 1]
        starts, plans = mask_plans(targets, self.first_seg, self.mask_decoder)
        states = heard[0][0][:, num_image:-1][starts]  # [n, Dt]
        return (losses * weights).sum(), weights.sum(), states, plans

    def forward(
        self, batch: dict[str, Tensor]
    ) -> tuple[Float[Tensor, "6"], Float[Tensor, "6"]]:
        """(totals, counts) of the losses in `LOSSES`; a loss is total / count.

        Kept apart so that several processes can divide by the count of all of them.
        A batch without questions leaves the text's and the plans' at zero.
        """
        pixel_values = batch["pixel_values"]
        asked = len(batch.get("input_ids", ()))
        with overhear(self.model.vision_tower) as features:
            if asked:
                text_total, text_count, states, plans = self._ask(batch)
            else:
                text_total = text_count = pixel_values.new_zeros(())
                width = self.model.config.text_config.hidden_size
                states = pixel_values.new_zeros(0, width)
                plans = pixel_values.new_zeros(0, OUTLINE_SIDE**2)
            if asked < len(pixel_values):
                self.model.vision_tower(pixel_values[asked:])
        targets = [batch[name] for name in PATCH_TARGETS]
        totals, counts = self.teacher(torch.cat(features), *targets, states, plans)
        totals = torch.cat([text_total[None], totals])  # [6]
        return totals, torch.cat([text_count[None], counts])


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Warm-up, then half a cosine down, once for the eyes and once for everything.

    A warm-up takes `warmup_steps`, or a quarter of the steps where that is less.
    Source: Loshchilov & Hutter 2017.
    """
    if step < config.patch_steps:
        peak, total = config.patch_learning_rate, config.patch_steps
    else:
        peak, total = config.learning_rate, config.steps
        step -= config.patch_steps
    warmup = min(config.warmup_steps, max(total // 4, 1))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    wave = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return peak * (config.final_share + (1 - config.final_share) * wave)


def loss_weights(step: int, config: TrainingConfig) -> Float[Tensor, "6"]:
    """How much each of the losses in `LOSSES` counts at a step."""
    text, teacher = 1.0, config.patch_loss_weight
    if step < config.patch_steps:
        text, teacher = 0.0, 1.0
    return torch.tensor([text] + [teacher] * (len(LOSSES) - 1))


def make_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW for what isn't frozen; weight decay on matrices only.

    Source: Loshchilov & Hutter 2019.
    """
    learning = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in learning if p.ndim >= 2]
    vectors = [p for p in learning if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))


def _replace_folder(staged: Path, place: Path) -> None:
    "Move a complete folder to its place; the former one is there until it is."
    former = place.with_name(place.name + ".old")
    if place.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.replace(place, former)
    os.replace(staged, place)
    shutil.rmtree(former, ignore_errors=True)


def save_training_state(
    folder: Path,
    step: int,
    lesson: Lesson,
    optimizer: torch.optim.Optimizer,
    tokenizer: Any,
    settings: dict[str, Any],
    vqvae: MaskVQVAE | None = None,
) -> None:
    """Write `folder/last`: the model in Hugging Face layout, teacher, moments, step.

    With `vqvae`, what reads and writes its masks lies beside the model. The folder
    appears when it is complete; OSError where it can't be, and the former stays. No
    pickle: tensors are safetensors.
    """
    staged = folder / "last.new"
    shutil.rmtree(staged, ignore_errors=True)
    tensors = {f"teacher.{n}": t for n, t in lesson.teacher.state_dict().items()}
    for name, parameter in lesson.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value).clone()
    text = json.dumps({"step": step, "config": settings}, indent=2)
    try:
        if vqvae is not None:
            vqvae.save_pretrained(staged)
        companions = None if vqvae is None else staged
        save_hf_model(lesson.model, tokenizer, staged, companions_from=companions)
        save_file(tensors, staged / "training_state.safetensors")
        (staged / "training_state.json").write_text(text + "\n", encoding="utf-8")
        _replace_folder(staged, folder / "last")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise OSError(
            f"step {step} can't be saved in {folder} ({error}): make room, then resume "
            "from the last save"
        ) from error


SAVED = ("last", "last.old")  # .old: the machine stopped between two renames


def saved_run(folder: Path) -> Path:
    """Where the last state of a run lies; FileNotFoundError where there is none."""
    for name in SAVED:
        if (folder / name / "training_state.json").is_file():
            return folder / name
    raise FileNotFoundError(f"no saved run in {folder}: start one without --resume")


def check_run_folder(folder: Path | None, resume: bool) -> None:
    """Raise FileExistsError where a saved run would be written over.

    And ValueError where one is to be resumed from nowhere.
    """
    if resume and folder is None:
        raise ValueError("resume needs an output: the folder of the run to go on with")
    if folder and not resume and any((folder / name).exists() for name in SAVED):
        raise FileExistsError(
            f"{folder} holds a run already: resume it, or choose another folder"
        )


def load_teacher(folder: Path, teacher: Teacher) -> None:
    """Read the teacher that `save_training_state` wrote beside a model.

    A checkpoint without one leaves the teacher as it is. Raises ValueError for a
    teacher that asks other questions.
    """
    path = folder / "training_state.safetensors"
    if path.is_file():
        tensors = load_file(path)
        saved = {name: tensors.get(f"teacher.{name}") for name in teacher.state_dict()}
        if None in saved.values():
            raise ValueError(
                f"{path} holds an earlier version's teacher: start a new run, with the "
                "model of that folder but without this file"
            )
        teacher.load_state_dict(saved)


def load_training_state(
    folder: Path, lesson: Lesson, optimizer: torch.optim.Optimizer
) -> int:
    """Put a saved run back into lesson and optimizer; returns the step reached."""
    place = saved_run(folder)
    trained, _ = load_hf_model(place, "cpu")
    lesson.model.load_state_dict(trained.state_dict())
    load_teacher(place, lesson.teacher)
    parameters = dict(lesson.named_parameters())
    for key, value in load_file(place / "training_state.safetensors").items():
        kind, _, name = key.partition(".")
        if kind != "teacher":
            optimizer.state[parameters[name]][kind] = value
    return json.loads((place / "training_state.json").read_text())["step"]


def run_settings(
    config: TrainingConfig,
    init: str | os.PathLike | None,
    vqvae: MaskVQVAE | None,
) -> dict[str, Any]:
    """All that decides what a run learns: settings, start, the code of its masks."""
    start = os.path.abspath(init) if init and os.path.exists(init) else init
    settings = asdict(config) | {"init": start and str(start), "mask_tokens": None}
    if vqvae is not None:
        table = vqvae.decoder.codebook._embedding.cpu().numpy()
        settings["mask_tokens"] = hashlib.sha256(table.tobytes()).hexdigest()
    return settings


def saved_settings(place: Path) -> dict[str, Any]:
    """The `run_settings` of the run saved in `place`."""
    return json.loads((place / "training_state.json").read_text("utf-8"))["config"]


def check_settings(
    saved: dict[str, Any], settings: dict[str, Any], free: tuple[str, ...] = FREE
) -> None:
    """Raise a ValueError that names what differs from a saved run's settings.

    Only those in `free` may.
    """
    other = [
        f"{name} {saved.get(name)!r}, not {value!r}"
        for name, value in settings.items()
        if saved.get(name) != value and name not in free
    ]
    if other:
        raise ValueError(
            f"the saved run has {'; '.join(other)}: resume it with its own "
            "settings, or start a new one with another output"
        )


def refuse_what_is_no_number(step: int, values: dict[str, float]) -> None:
    """Raise a FloatingPointError where a value of that step is NaN or infinite."""
    if not all(math.isfinite(value) for value in values.values()):
        raise FloatingPointError(
            f"a loss is no longer a number at step {step} ({values}): lower the "
            "learning rate, or train in float32"
        )


class TrainingLog:
    """Losses averaged from line to line, kept in memory and in `log.jsonl`."""

    def __init__(self, folder: Path | None, first_step: int = 0):
        """Continue at `first_step`: later lines of a former run are dropped."""
        self.path = folder / "log.jsonl" if folder else None
        self.entries: list[dict[str, float]] = []
        self._sums: dict[str, float] = {}
        self._steps = 0
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if first_step and self.path.is_file():
                # Without what stands after the last line's end: a full disk cuts lines.
                lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
                former = [json.loads(line) for line in lines]
                self.entries = [e for e in former if e["step"] <= first_step]
            text = "".join(json.dumps(entry) + "\n" for entry in self.entries)
            whole = self.path.with_name("log.jsonl.new")
            whole.write_text(text, encoding="utf-8")
            os.replace(whole, self.path)

    def add(self, step: int, **losses: float) -> None:
        """Count a step's losses, the same names every step; they must be numbers."""
        refuse_what_is_no_number(step, losses)
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss
        self._steps += 1

    def write(self, step: int, **values: float) -> None:
        """Add a line: the mean losses since the last one, and `values`, numbers too."""
        refuse_what_is_no_number(step, values)
        means = {name: total / self._steps for name, total in self._sums.items()}
        entry = {"step": step, **values, **means}
        entry = {k: v if k == "step" else float(f"{v:.4g}") for k, v in entry.items()}
        self.entries.append(entry)
        self._sums.clear()
        self._steps = 0
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


@torch.no_grad()
def validate(
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    num_scenes: int = 50,
) -> dict[str, float]:
    """Share of answers that are right to the letter, a task, on validation scenes.

    Detection isn't judged here: a box needn't be right to the pixel.
    """
    right: dict[str, list[bool]] = {}
    for seed in VALIDATION_SEEDS[:num_scenes]:
        scene = make_scene(seed, processor.image_size)
        rng = random.Random(seed)
        tasks = ("caption", "count", "relation", "presence")
        questions = [sample_question(scene, task, rng) for task in tasks]
        inputs = processor([q.prompt for q in questions], [scene.image])
        texts = generate(model, processor.tokenizer, inputs, max_new_tokens=48)
        for question, text in zip(questions, texts, strict=True):
            right.setdefault(question.task, []).append(text == question.answer)
    return {task: sum(marks) / len(marks) for task, marks in right.items()}


Evaluate = Callable[[PaliGemmaForConditionalGeneration, int], dict[str, float]]


def make_accelerator(
    mixed_precision: str = "no", cpu: bool = False, **settings: Any
) -> Accelerator:
    """An `Accelerator` with whole batches, whatever runs came before in this process.

    Under a launcher with several processes the device stays that of the first run.
    """
    # Accelerate keeps number format and device for the life of a process, refuses
    # another format, and takes another device without a word. Forgetting both is the
    # only way to a second run; a group of processes can't be forgotten.
    alone = not torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=alone)
    return Accelerator(
        mixed_precision=mixed_precision,
        cpu=cpu,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        **settings,
    )


def _make_loader(dataset: SceneDataset, first: int) -> DataLoader:
    "All batches after the first `first` steps."
    config = dataset.config
    return DataLoader(
        Subset(dataset, range(first * config.batch_size, len(dataset))),
        batch_size=config.batch_size,
        collate_fn=collate,
        num_workers=config.num_workers,
        prefetch_factor=4 if config.num_workers else None,
    )


def training_step(
    accelerator: Accelerator,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    step: int,
    config: TrainingConfig,
) -> Float[Tensor, "6"]:
    """Forward, backward, update; returns this process's part of each loss.

    Each loss is divided by the count of all processes together, times their number,
    because gradients are averaged over processes.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, config)
    totals, counts = learner(batch)
    counts = accelerator.reduce(counts, "sum").clamp(min=1)
    losses = totals * accelerator.num_processes / counts  # [6]
    accelerator.backward((losses * loss_weights(step, config).to(losses)).sum())
    accelerator.clip_grad_norm_(learner.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return losses.detach()


def train(
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    config: TrainingConfig,
    output: str | os.PathLike | None = None,
    init: str | os.PathLike | None = None,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    vqvae: MaskVQVAE | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place on scenes; returns the log, one dict a line.

    - `output`: folder for `log.jsonl` and `last` (None keeps everything in memory).
    - `init`: the folder that `model` came from; a teacher saved there is taken along.
    - `evaluate`: gets (model, step) every `eval_every` steps and last; it is logged.
    - `resume`: continue the run in `output`. `stop_after`: end early, at this step.
    - `vqvae`: makes the codes of `segment`'s answers, which then share lessons and are
      planned; None asks `detect` instead.

    Raises FileExistsError where `output` holds a run and `resume` is False,
    FileNotFoundError where it holds none to resume, ValueError where that one has other
    settings, OSError where its disk is full (before the first step, as far as that can
    be known), and FloatingPointError when a loss is no longer a number.
    Under `accelerate launch` or `torchrun`, several processes have the loss of one.
    """
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = make_accelerator(config.mixed_precision, kwargs_handlers=[ddp])
    torch.manual_seed(config.seed)
    folder = Path(output) if output is not None else None
    check_run_folder(folder, resume)
    settings = run_settings(config, init, vqvae)
    if resume:
        check_settings(saved_settings(saved_run(folder)), settings)
    first_seg = processor.tokenizer.convert_tokens_to_ids(seg_token(0))
    lesson = Lesson(model, Teacher(model.config), vqvae, first_seg)
    if init is not None:
        load_teacher(Path(init), lesson.teacher)
    optimizer = make_optimizer(lesson, config)
    first = load_training_state(folder, lesson, optimizer) if resume else 0
    if stop_after is not None and stop_after <= first:
        raise ValueError(f"stop_after={stop_after}: the run is at step {first} already")
    if folder:  # weights and two moments, and room for the next save beside the last
        size = 3 * sum(parameter.nbytes for parameter in lesson.parameters())
        require_space(folder, size if resume else 2 * size)
    patch_size = model.config.vision_config.patch_size
    encode_mask = None if vqvae is None else vqvae.encode_mask
    dataset = SceneDataset(processor, patch_size, config, encode_mask)
    loader = _make_loader(dataset, first)
    learner, optimizer, loader = accelerator.prepare(lesson, optimizer, loader)
    log = TrainingLog(folder if accelerator.is_main_process else None, first)
    bar = tqdm(
        total=config.all_steps,
        initial=first,
        desc="training",
        unit="step",
        disable=None if accelerator.is_main_process else True,
    )
    learner.train()
    for step, batch in enumerate(loader, start=first + 1):
        losses = training_step(accelerator, learner, optimizer, batch, step - 1, config)
        losses = accelerator.reduce(losses, "mean").tolist()
        log.add(step, **dict(zip(LOSSES, losses, strict=True)))
        bar.update()
        last = step in (config.all_steps, stop_after)
        if step % config.log_every == 0 or last:
            log.write(step, learning_rate=learning_rate_at(step - 1, config))
            bar.set_postfix(log.entries[-1], refresh=False)
        if evaluate and (step % config.eval_every == 0 or last):
            model.eval()
            log.write(step, **evaluate(model, step))
            model.train()
        if folder and (step % config.save_every == 0 or last):
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                save_training_state(
                    folder,
                    step,
                    lesson,
                    optimizer.optimizer,
                    processor.tokenizer,
                    settings,
                    vqvae,
                )
        if last:
            break
    bar.close()
    model.eval()
    return log.entries


def build_parser() -> argparse.ArgumentParser:
    """A flag for every field of TrainingConfig, and where to read and write.

    Only what was given is in the result: a run that goes on has settings of its own.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vlm.training",
        description="Train the embedded model, or go on with a checkpoint, on scenes.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--output", required=True, help="folder for log and checkpoint")
    parser.add_argument(
        "--init", help="checkpoint to start from (default: a new model)"
    )
    parser.add_argument(
        "--mask_tokens",
        help="folder with the mask encoder and decoder (default: those of the "
        "checkpoint to start from, or else the embedded ones)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in output, with its own settings; others are refused, "
        f"but for {', '.join(FREE)}",
    )
    parser.add_argument("--stop_after", type=int, help="end early, at this step")
    for setting in fields(TrainingConfig):
        parser.add_argument(
            f"--{setting.name}",
            type=type(setting.default),
            help=f"{setting.metadata['help']} (default: {setting.default})",
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; 2 and one clear line for what a user can get wrong.

    130, as shells expect, when it was interrupted.
    """
    given = vars(build_parser().parse_args(argv))
    output, mask_tokens = Path(given.pop("output")), given.pop("mask_tokens", None)
    resume, stop_after = given.pop("resume", False), given.pop("stop_after", None)
    try:
        start = saved_run(output) if resume else given.get("init")
        if resume:
            given = saved_settings(start) | given
            del given["mask_tokens"]  # the files are in the folder
        init = given.pop("init", None)
        config = TrainingConfig(**given)
        if start:
            model, tokenizer = load_hf_model(start, "cpu")
            if ENCODER_FILE in model.companions:
                mask_tokens = mask_tokens or model.name_or_path
        else:
            model, tokenizer = new_model(config.seed)
        processor = make_processor(model, tokenizer)
        vqvae = MaskVQVAE.from_pretrained(mask_tokens or find_checkpoint(None))
        train(
            model,
            processor,
            config,
            output,
            init,
            evaluate=lambda model, step: validate(model, processor),
            resume=resume,
            stop_after=stop_after,
            vqvae=vqvae,
        )
    except KeyboardInterrupt:
        print("stopped: --resume goes on from the last save, if any", file=sys.stderr)
        return 130
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"checkpoint in {output / 'last'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
