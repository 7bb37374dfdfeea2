"""Pretraining: the one recipe that makes the embedded model from nothing.

Built in notebooks/18_pretraining.ipynb: edit it there, then run `make export`.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .auxiliary import PATCH_TARGETS, AuxiliaryHeads, patch_targets
from .initialization import new_model
from .mask_tokens import Codebook, MaskDecoder, MaskVQVAE, crop_to_square
from .packing import pack_questions, packed_mask
from .paligemma import PaliGemmaForConditionalGeneration
from .processing import NUM_SEGS, PaliGemmaProcessor, image_to_pixels, seg_token
from .runs import publish, run_command, run_folder, saved_state, setting
from .scenes import (
    ASSETS,
    TRAINING_PHOTO_PART,
    TRAINING_SEEDS,
    TRAINING_STYLES,
    VALIDATION_SEEDS,
    EncodeMask,
    Scene,
    make_scene,
    sample_question,
)
from .training import (
    Objective,
    SuffixLoss,
    TrainingConfig,
    learning_rate_at,
    make_accelerator,
    train,
)
from .weights import EMBEDDED, load_hf_model, make_processor, save_hf_model

__all__ = [
    "TASKS",
    "JITTER_PROB",
    "EMPTY_PROB",
    "BOX_WEIGHT",
    "PADDING",
    "Evaluate",
    "PretrainingConfig",
    "two_phase_schedule",
    "scene_mask_encoder",
    "SceneDataset",
    "collate",
    "soft_targets",
    "PretrainingObjective",
    "validation_loss",
    "write_card",
    "run",
    "main",
]

TASKS = ("caption", "detect", "segment", "count", "relation", "presence")
JITTER_PROB = 0.2  # of the stickers: a style never seen differs most in its colors
EMPTY_PROB = 0.05  # of the scenes: enough to learn that there may be nothing
BOX_WEIGHT = 5.0  # distances are about a fifth of the other losses; DETR has 5 too


@dataclass(kw_only=True)
class PretrainingConfig(TrainingConfig):
    """The recipe: 2,000 steps of the vision tower, then 16,000 of everything.

    Each trick has a flag that turns it off. Raises ValueError for what can't be.
    """

    steps: int = setting(18_000, "updates of the weights, the vision tower's included")
    vision_steps: int = setting(2000, "of them for the vision tower, before all else")
    micro_batch_size: int = setting(8, "images at once in a process; 0: all of them")
    weight_decay: float = setting(0.05, "of matrices; vectors have none")
    num_workers: int = setting(2, "processes that draw scenes")
    questions_per_image: int = setting(6, "packed in one row; 1: no packing")
    auxiliary_weight: float = setting(0.3, "of the auxiliary losses; 0: none")
    mask_weight: float = setting(1.0, "of masks among the auxiliary losses; 0: none")
    seg_weight: float = setting(0.5, "of a seg token; any other token weighs 1")
    seg_targets: str = setting("soft", "soft, or hard: one right code")
    loc_init: str = setting("fourier", "fourier or random")
    position_init: str = setting("sincos", "sincos or random")
    num_key_value_heads: int = setting(1, "of the decoder: 1, 2 or 4")
    mask_tokens: str = setting(
        "", "folder with mask encoder and decoder; empty: the embedded ones"
    )
    evaluation_scenes: int = setting(500, "in the model card's table; 0: no table")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("seg_targets", ("soft", "hard")),
            ("loc_init", ("fourier", "random")),
            ("position_init", ("sincos", "random")),
            ("questions_per_image", range(1, len(TASKS) + 1)),
        ):
            if getattr(self, name) not in known:
                expected = ", ".join(map(str, known))
                raise ValueError(f"{name} is {getattr(self, name)}, not of {expected}")
        if self.vision_steps >= self.steps:
            raise ValueError(
                f"vision_steps={self.vision_steps} must be below steps={self.steps}: "
                "the decoder needs some too"
            )
        if self.vision_steps and not self.auxiliary_weight:
            raise ValueError(
                "without auxiliary losses the vision tower can't learn alone: give "
                "--vision_steps 0 too"
            )


def two_phase_schedule(
    step: int, vision_steps: int, steps: int, learning_rate: float
) -> float:
    """The learning rate at `step` (from 0): warm-up and cosine, once in each phase."""
    if step < vision_steps:
        return learning_rate_at(step, vision_steps, learning_rate)
    return learning_rate_at(step - vision_steps, steps - vision_steps, learning_rate)


@torch.no_grad()
def scene_mask_encoder(scene: Scene, vqvae: MaskVQVAE) -> EncodeMask:
    """Encode all masks of a scene in one pass → the function that looks them up."""
    crops = [thing.cropped_mask for thing in scene.objects]
    if not crops:
        return vqvae.encode_mask
    features = vqvae.encoder(torch.stack([crop_to_square(crop) for crop in crops]))
    codes = vqvae.decoder.codebook.nearest(features).tolist()  # [objects, 16]
    known = {crop.tobytes(): code for crop, code in zip(crops, codes, strict=True)}
    return lambda crop: known[crop.tobytes()]


class SceneDataset(Dataset):
    """Scenes with patch targets and packed questions, drawn when they are asked for.

    An item depends on `seed` and its index alone. The items of the first
    `vision_steps` batches have no questions.
    """

    def __init__(
        self,
        processor: PaliGemmaProcessor,
        patch_size: int,
        vqvae: MaskVQVAE,
        config: PretrainingConfig,
    ):
        self.processor, self.patch_size = processor, patch_size
        self.vqvae, self.config = vqvae, config

    def __len__(self) -> int:
        return self.config.steps * self.config.batch_size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = random.Random(f"{self.config.seed} {index}")
        scene = make_scene(
            rng.choice(TRAINING_SEEDS),
            self.processor.image_size,
            TRAINING_STYLES,
            vary=JITTER_PROB,
            empty_prob=EMPTY_PROB,
            photo_part=TRAINING_PHOTO_PART,
        )
        item = patch_targets(scene, self.patch_size)
        item["pixel_values"] = image_to_pixels(scene.image, self.processor.image_size)
        if index < self.config.vision_steps * self.config.batch_size:
            return item
        tasks = rng.sample(TASKS, self.config.questions_per_image)
        return item | self._questions(scene, tasks, rng)

    def _questions(
        self, scene: Scene, tasks: Sequence[str], rng: random.Random
    ) -> dict[str, Int[Tensor, "T"]]:
        """A question of each task, packed in this order."""
        encode_mask = scene_mask_encoder(scene, self.vqvae)
        questions = [sample_question(scene, task, rng, encode_mask) for task in tasks]
        prefix, suffix = self.processor.encode_prefix, self.processor.encode_suffix
        rows = [(prefix(q.prompt), suffix(q.answer)) for q in questions]
        return pack_questions(rows, self.processor.num_image_tokens)


PADDING = {"input_ids": 0, "position_ids": 0, "token_type_ids": 0, "segment_ids": -1}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Items → one batch; packed rows are padded on the right."""
    batch = {
        name: torch.stack([item[name] for item in items])
        for name in ("pixel_values", *PATCH_TARGETS)
    }
    if "input_ids" in items[0]:
        for name, padding in PADDING.items():
            rows = [item[name] for item in items]
            batch[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
    return batch


def soft_targets(codebook: Codebook) -> Float[Tensor, "128 128"]:
    """For each right code, a distribution over all codes that favors similar ones.

    A softmax of minus the squared distance, in units of the median distance from a
    code to its nearest neighbor.
    """
    distance = torch.cdist(codebook._embedding, codebook._embedding).square()
    nearest = distance.topk(2, largest=False).values[:, 1]  # the first is itself
    return (-distance / nearest.median()).softmax(dim=-1)


class PretrainingObjective(Objective):
    """Text loss and auxiliary losses of one batch, in one forward pass.

    A batch without questions trains vision tower and projector alone.
    """

    names = ("text", *AuxiliaryHeads.names)

    def __init__(
        self,
        model: PaliGemmaForConditionalGeneration,
        codebook: Codebook,
        first_seg: int,
        config: PretrainingConfig,
    ):
        super().__init__()
        self.model, self.heads = model, AuxiliaryHeads(model.config)
        relative = torch.tensor([1.0, BOX_WEIGHT, config.mask_weight])
        self.weights = (1.0, *(config.auxiliary_weight * relative).tolist())
        self.first_seg, self.seg_weight = first_seg, config.seg_weight
        is_soft = config.seg_targets == "soft"
        targets = soft_targets(codebook) if is_soft else torch.eye(NUM_SEGS)
        self.register_buffer("seg_targets", targets)

    def _is_seg(self, ids: Int[Tensor, "B T"]) -> Tensor:
        return (ids >= self.first_seg) & (ids < self.first_seg + NUM_SEGS)  # [B, T]

    def _token_weights(self, batch: dict[str, Tensor]) -> Float[Tensor, "B T"]:
        "What each token weighs in the text loss: nothing, unless it is a suffix's."
        weights = batch["token_type_ids"].float()
        return weights.where(~self._is_seg(batch["input_ids"]), self.seg_weight)

    def counts(self, batch: dict[str, Tensor]) -> Float[Tensor, "4"]:
        """The weight of all suffix tokens, then `AuxiliaryHeads.counts`."""
        auxiliary = self.heads.counts(batch["patch_classes"])
        text = auxiliary.new_zeros(1)
        if "input_ids" in batch:
            text = self._token_weights(batch).sum()[None]
        return torch.cat([text, auxiliary])

    def _text_loss(
        self, logits: Float[Tensor, "B n V"], batch: dict[str, Tensor]
    ) -> Float[Tensor, ""]:
        "Summed cross-entropy of the last n - 1 tokens; seg tokens have soft targets."
        n = logits.shape[1]
        log_probs = logits[:, :-1].float().log_softmax(dim=-1)  # each predicts the next
        ids = batch["input_ids"][:, 1 - n :]  # [B, n - 1]
        losses = -log_probs.gather(-1, ids[..., None])[..., 0]  # [B, n - 1]
        is_seg = self._is_seg(ids)
        targets = self.seg_targets[ids[is_seg] - self.first_seg]  # [segs, 128]
        seg_ids = slice(self.first_seg, self.first_seg + NUM_SEGS)
        seg_losses = -(targets * log_probs[is_seg][:, seg_ids]).sum(dim=-1)
        losses = losses.masked_scatter(is_seg, seg_losses)
        return (losses * self._token_weights(batch)[:, 1 - n :]).sum()

    def forward(self, batch: dict[str, Tensor]) -> Float[Tensor, "4"]:
        """The sum of each loss; what it will be divided by is in `counts`."""
        if "input_ids" not in batch:
            features = self.model.encode_images(batch["pixel_values"])  # [B, N, D]
            text = features.new_zeros((), dtype=torch.float)
        else:
            ids, types = batch["input_ids"], batch["token_type_ids"]
            num_text = ids.shape[1] - self.model.config.vision_config.num_image_tokens
            outputs = self.model(
                input_ids=ids,
                pixel_values=batch["pixel_values"],
                attention_mask=packed_mask(batch["segment_ids"], types),
                position_ids=batch["position_ids"],
                logits_to_keep=num_text,
                output_image_hidden_states=True,
            )
            features = outputs["image_hidden_states"]  # [B, N, D]
            text = self._text_loss(outputs["logits"], batch)
        return torch.cat([text[None], self.heads(features, batch)])


@torch.no_grad()
def validation_loss(
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    vqvae: MaskVQVAE,
    num_scenes: int = 100,
) -> float:
    """Mean cross-entropy of a suffix token on validation scenes, each question alone.

    No weights, no soft targets, no packing: the same measure for every recipe.
    """
    objective, sums = SuffixLoss(model), torch.zeros(2)
    for seed in VALIDATION_SEEDS[:num_scenes]:
        scene, rng = make_scene(seed, processor.image_size), random.Random(seed)
        questions = [sample_question(scene, t, rng, vqvae.encode_mask) for t in TASKS]
        prompts, answers = zip(*((q.prompt, q.answer) for q in questions), strict=True)
        inputs = processor(prompts, [scene.image], answers)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        sums += torch.cat([objective(inputs), objective.counts(inputs)]).cpu()
    return (sums[0] / sums[1]).item()


def write_card(
    folder: Path, model: PaliGemmaForConditionalGeneration, config: PretrainingConfig
) -> None:
    """Write the model card, README.md: what it is and the command that made it."""
    changed = [
        f" --{option.name} {getattr(config, option.name)}"
        for option in fields(config)
        if getattr(config, option.name) != option.default
    ]
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["paligemma", "education"],
    )
    template = (ASSETS / "pretrained" / "card.md").read_text(encoding="utf-8")
    text = template.format(
        name=folder.parent.name.removesuffix(".unfinished"),
        command=f"python -m vlm.pretraining --output …{''.join(changed)}",
        millions=sum(weight.numel() for weight in model.parameters()) / 1e6,
        image_size=model.config.vision_config.image_size,
        vision_steps=config.vision_steps,
        steps=config.steps - config.vision_steps,
        batch_size=config.batch_size,
        pictures=config.steps * config.batch_size,
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(folder / "README.md")


Evaluate = Callable[[Path, int], None]  # a checkpoint's folder, number of scenes


def run(
    config: PretrainingConfig,
    output: Path,
    resume: bool = False,
    stop_after: int | None = None,
    evaluate: Evaluate | None = None,
) -> str:
    """Make the embedded model in `output`; returns what to tell the user.

    `evaluate` writes the model card's table. Raises as `train`, and FileNotFoundError
    for missing mask tokens.
    """
    masks = Path(config.mask_tokens).expanduser() if config.mask_tokens else EMBEDDED
    vqvae = MaskVQVAE.from_pretrained(masks)
    codebook = vqvae.decoder.codebook
    shape = (config.num_key_value_heads, config.loc_init, config.position_init)
    model, tokenizer = new_model(config.seed, None, *shape)
    processor = make_processor(model, tokenizer)
    first_seg = tokenizer.convert_tokens_to_ids(seg_token(0))
    accelerator = make_accelerator(config.mixed_precision)
    train(
        PretrainingObjective(model, codebook, first_seg, config),
        SceneDataset(processor, model.config.vision_config.patch_size, vqvae, config),
        collate,
        config,
        output,
        resume,
        stop_after,
        schedule=partial(
            two_phase_schedule,
            vision_steps=config.vision_steps,
            steps=config.steps,
            learning_rate=config.learning_rate,
        ),
        evaluate=lambda step: {
            "validation_loss": validation_loss(model, processor, vqvae)
        },
        about={"codebook": hashlib.sha256(codebook._embedding.numpy()).hexdigest()},
        accelerator=accelerator,
    )
    if not accelerator.is_main_process:
        return ""
    step = saved_state(output, mmap=True)["step"]
    if step < config.steps:
        return f"stopped after step {step}: --resume goes on"
    result = run_folder(output) / "result"
    save_hf_model(model.cpu(), tokenizer, result, companions_from=masks)
    write_card(result, model, config)
    if evaluate and config.evaluation_scenes:
        evaluate(result, config.evaluation_scenes)
    publish(output)
    return f"model, mask tokens, log and model card are in {output}"


def main(argv: list[str] | None = None) -> int:
    """The command line; see `run_command`."""
    from .evaluation import evaluate, write_results  # a later chapter's

    def evaluate_checkpoint(folder: Path, num_scenes: int) -> None:
        model, tokenizer = load_hf_model(folder)
        decoder = MaskDecoder.from_pretrained(folder)
        numbers = evaluate(model, tokenizer, decoder, num_scenes=num_scenes)
        write_results(folder, numbers)

    return run_command(
        "Make the embedded model from nothing.",
        PretrainingConfig,
        partial(run, evaluate=evaluate_checkpoint),
        argv,
    )


if __name__ == "__main__":
    raise SystemExit(main())
