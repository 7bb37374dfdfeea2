"""Pretraining: the one recipe that makes the embedded model from nothing.

Built in notebooks/21_pretraining.ipynb: edit it there, then run `make export`.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from .auxiliary import AuxiliaryHeads
from .hub import EMBEDDED
from .initialization import new_model
from .mask_tokens import Codebook, MaskDecoder, MaskVQVAE, mask_iou
from .masks import make_attn_mask
from .paligemma import PaliGemmaForConditionalGeneration
from .processing import NUM_LOCS, NUM_SEGS, PaliGemmaProcessor
from .questions import sample_question
from .runs import publish, run_command, setting
from .scene_dataset import TASKS, SceneDataset, collate
from .scenes import ASSETS, VALIDATION_SEEDS, make_scene
from .training import Objective, TrainingConfig, train
from .weights import load_hf_model, make_processor, save_hf_model


@dataclass(kw_only=True)
class PretrainingConfig(TrainingConfig):
    """The recipe; each trick has a value that turns it off. Raises ValueError."""

    # 384,000 pictures, none twice: what two CPU cores manage in a night.
    steps: int = setting(24_000, "updates of the weights")
    # For equal pictures, many small steps learn more than few large ones.
    batch_size: int = setting(16, "examples an update, all processes together")
    # Less padding than in 16 rows together, and less memory.
    micro_batch_size: int = setting(8, "images at once in a process; 0: all of them")
    # Muon's fixed at 0.02, 0.001 is worse at a fortieth of the pictures, 0.004 equal.
    learning_rate: float = setting(2e-3, "peak, after the warm-up; Muon's is ten times")
    # AdamW for everything is behind in every column of the ablation table.
    optimizer: str = setting(
        "muon", "of matrices between hidden states", choices=("muon", "adamw")
    )
    weight_decay: float = setting(0.05, "of matrices; vectors have none")
    num_workers: int = setting(2, "processes that draw scenes")
    # One of each task: a picture costs more than a question.
    questions_per_image: int = setting(
        len(TASKS), "packed into one row", choices=range(1, len(TASKS) + 1)
    )
    # So the two together are about a sixth of the whole loss.
    auxiliary_weight: float = setting(0.3, "of the auxiliary losses; 0: none of them")
    # Four of ten suffix tokens are seg tokens, and each of them matters little.
    seg_weight: float = setting(0.5, "of a seg token; any other token of a suffix: 1")
    # Many codes draw nearly the same outline.
    seg_targets: str = setting("soft", "of seg tokens", choices=("soft", "hard"))
    # Neighbors begin as neighbors.
    loc_init: str = setting("fourier", "of loc tokens", choices=("fourier", "random"))
    # PaliGemma's own number.
    num_key_value_heads: int = setting(1, "of the decoder", choices=(1, 2, 4))
    mask_tokens: str = setting("", "folder with other mask tokens than the embedded")
    evaluation_scenes: int = setting(500, "in the model card's table; 0: no table")


def soft_targets(codebook: Codebook) -> Float[Tensor, "128 128"]:
    """For each right code, a distribution over all codes that favors similar ones.

    A softmax of minus the squared distance, in units of the median squared distance
    from a code to its nearest neighbor.
    """
    distance = torch.cdist(codebook._embedding, codebook._embedding).square()
    nearest = distance.topk(2, largest=False).values[:, 1]  # the first is itself
    return (-distance / nearest.median()).softmax(dim=-1)


BOX_WEIGHT = 5.0  # distances are fractions of a picture; DETR has 5 on their sum


class PretrainingObjective(Objective):
    """Text loss and auxiliary losses, in one forward pass."""

    names = ("text", *AuxiliaryHeads.names)

    def __init__(
        self,
        model: PaliGemmaForConditionalGeneration,
        codebook: Codebook,
        first_seg: int,
        config: PretrainingConfig,
    ):
        """`first_seg`: the id of `<seg000>`."""
        super().__init__()
        self.model, self.heads = model, AuxiliaryHeads(model.config)
        vision, text = model.vision_tower.vision_model, model.language_model.model
        hidden = (vision.encoder.layers, model.multi_modal_projector, text.layers)
        if config.optimizer == "muon":  # between hidden states
            parameters = (p for part in hidden for p in part.parameters())
            self.matrices = [p for p in parameters if p.ndim == 2]
        weight = config.auxiliary_weight
        self.weights = (1.0, weight, weight * BOX_WEIGHT)
        self.first_seg, self.seg_weight = first_seg, config.seg_weight
        is_soft = config.seg_targets == "soft"
        targets = soft_targets(codebook) if is_soft else torch.eye(NUM_SEGS)
        self.register_buffer("seg_targets", targets)  # [128, 128]

    def _is_seg(self, ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        return (ids >= self.first_seg) & (ids < self.first_seg + NUM_SEGS)

    def _token_weights(self, batch: dict[str, Tensor]) -> Float[Tensor, "B T"]:
        "What each token weighs in the text loss: nothing, but for suffixes."
        weights = batch["token_type_ids"].float()
        is_seg = self._is_seg(batch["input_ids"])
        return torch.where(is_seg, self.seg_weight * weights, weights)

    def counts(self, batch: dict[str, Tensor]) -> Float[Tensor, "3"]:
        """The weight of all suffix tokens, then `AuxiliaryHeads.counts`."""
        text = self._token_weights(batch).sum()
        return torch.cat([text[None], self.heads.counts(batch["patch_classes"])])

    def text_loss(
        self, logits: Float[Tensor, "B n V"], batch: dict[str, Tensor]
    ) -> Float[Tensor, ""]:
        """Weighted sum of cross-entropies, each position predicting the next token."""
        n = logits.shape[1]
        log_probs = logits[:, :-1].float().log_softmax(dim=-1)  # [B, n - 1, V]
        ids = batch["input_ids"][:, 1 - n :]  # [B, n - 1]
        losses = -log_probs.gather(-1, ids[..., None])[..., 0]  # [B, n - 1]
        # At every position, and chosen afterwards: a GPU needn't wait for how many.
        columns = slice(self.first_seg, self.first_seg + NUM_SEGS)
        codes = (ids - self.first_seg).clamp(0, NUM_SEGS - 1)  # [B, n - 1]
        seg_losses = -(self.seg_targets[codes] * log_probs[..., columns]).sum(dim=-1)
        losses = torch.where(self._is_seg(ids), seg_losses, losses)
        return (losses * self._token_weights(batch)[:, 1 - n :]).sum()

    def forward(self, batch: dict[str, Tensor]) -> Float[Tensor, "3"]:
        """The sum of each loss; `counts` says what it will be divided by."""
        num_image_tokens = self.model.config.vision_config.num_image_tokens
        ids, segments = batch["input_ids"], batch["segment_ids"]  # -1: padding
        mask = make_attn_mask(
            segments >= 0, batch["token_type_ids"], segment_ids=segments
        )
        outputs = self.model(
            input_ids=ids,
            pixel_values=batch["pixel_values"],
            attention_mask=mask,
            position_ids=batch["position_ids"],
            logits_to_keep=ids.shape[1] - num_image_tokens,
            output_image_hidden_states=True,
        )
        text = self.text_loss(outputs["logits"], batch)
        features = outputs["image_hidden_states"]  # [B, N, D]
        return torch.cat([text[None], self.heads(features, batch)])


@torch.no_grad()
def validation_losses(
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    vqvae: MaskVQVAE,
    num_scenes: int = 100,
) -> dict[str, float]:
    """Mean cross-entropy of suffix tokens: of all, of words, of loc and seg tokens.

    A question of each task about each validation scene, each question alone. And the
    mean IoU of masks, each token the best after the right ones, with the right masks.
    """
    first_tokens = ["<loc0000>", "<seg000>"]
    first_loc, first_seg = processor.tokenizer.convert_tokens_to_ids(first_tokens)
    targets, losses, codes = [], [], []
    for seed in VALIDATION_SEEDS[:num_scenes]:
        scene = make_scene(seed, processor.image_size)
        rng = random.Random(f"questions {seed}")
        asked = (sample_question(scene, t, rng, vqvae.encode_masks) for t in TASKS)
        prompts, answers = zip(*[(q.prompt, q.answer) for q in asked])
        batch = processor(prompts, [scene.image], answers)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]  # [B, T - 1]
        logits = model(**batch)["logits"][:, :-1].float()  # [B, T - 1, V]
        is_suffix = labels != -100
        targets.append(labels[is_suffix])
        logits = logits[is_suffix]  # [suffix tokens, V]
        losses.append(F.cross_entropy(logits, targets[-1], reduction="none"))
        codes.append(logits[:, first_seg : first_seg + NUM_SEGS].argmax(dim=-1))
    parts = torch.cat(targets), torch.cat(losses), torch.cat(codes)
    targets, losses, codes = (part.cpu() for part in parts)  # [suffix tokens] each
    is_loc = (targets >= first_loc) & (targets < first_loc + NUM_LOCS)
    is_seg = (targets >= first_seg) & (targets < first_seg + NUM_SEGS)
    codes = torch.stack([codes, targets - first_seg])[:, is_seg]  # [2, seg tokens]
    masks = codes.view(2, -1, 16)  # 16 codes each
    drawn, wanted = (vqvae.decoder(part)[:, 0] > 0 for part in masks)
    return {
        "validation_loss": losses.mean().item(),
        "validation_loss_words": losses[~(is_loc | is_seg)].mean().item(),
        "validation_loss_locs": losses[is_loc].mean().item(),
        "validation_loss_segs": losses[is_seg].mean().item(),
        "validation_mask_iou": mask_iou(drawn, wanted).mean().item(),
    }


def write_card(folder: Path, name: str, config: PretrainingConfig) -> None:
    """Write the model card, README.md: what it is and the command that made it."""
    flags = [
        f" --{option.name} {getattr(config, option.name)}"
        for option in fields(config)
        if getattr(config, option.name) != option.default
    ]
    template = (ASSETS / "pretrained" / "card.md").read_text(encoding="utf-8")
    card = template.format(
        name=name,
        command=f"python -m vlm.pretraining --output runs/{name}{''.join(flags)}",
        images=config.steps * config.batch_size,
        batch_size=config.batch_size,
        steps=config.steps,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def run(
    config: PretrainingConfig,
    output: Path,
    resume: bool = False,
    stop_after: int | None = None,
    evaluate: Callable[[Path, int], None] | None = None,
) -> str | None:
    """Make the embedded model in `output`; returns what to tell the user.

    `evaluate(folder, scenes)` writes the model card's table. Raises as `train`, and
    FileNotFoundError for missing mask tokens.
    """
    masks = config.mask_tokens or EMBEDDED
    vqvae = MaskVQVAE.from_pretrained(masks)
    codebook = vqvae.decoder.codebook
    model, tokenizer = new_model(
        config.seed,
        num_key_value_heads=config.num_key_value_heads,
        loc_init=config.loc_init,
    )
    processor = make_processor(model, tokenizer)
    first_seg = tokenizer.convert_tokens_to_ids("<seg000>")
    objective = PretrainingObjective(model, codebook, first_seg, config)
    dataset = SceneDataset(processor, vqvae, config.questions_per_image)
    log = train(
        *(objective, dataset, collate, config, output, resume, stop_after),
        evaluate=lambda step: validation_losses(model, processor, vqvae),
        about={"codebook": hashlib.sha256(codebook._embedding.numpy()).hexdigest()},
        free=("mask_tokens", "evaluation_scenes"),
    )
    if log[-1]["step"] < config.steps:
        return None

    def write(folder: Path) -> None:
        save_hf_model(model, tokenizer, folder, companions_from=masks)
        write_card(folder, output.name, config)
        if evaluate and config.evaluation_scenes:
            evaluate(folder, config.evaluation_scenes)

    publish(output, log, write)
    return f"model, mask tokens, log and model card in {output}"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status, as `run_command`."""
    from .evaluation import evaluate  # later chapters'
    from .results import write_results

    def evaluate_folder(folder: Path, num_scenes: int) -> None:
        model, tokenizer = load_hf_model(folder)
        decoder = MaskDecoder.from_pretrained(folder)
        numbers = evaluate(model, tokenizer, decoder, num_scenes=num_scenes)
        write_results(folder, numbers)

    about = "Make the embedded model from nothing."
    command = partial(run, evaluate=evaluate_folder)
    return run_command(about, PretrainingConfig, command, argv)


if __name__ == "__main__":
    raise SystemExit(main())
