"""Training of the mask tokens: the VQ-VAE's objective, its data, its command.

Built in notebooks/20_training.ipynb: edit it there, then run `make export`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .mask_tokens import MaskVQVAE, crop_to_square, evaluate_reconstruction
from .runs import publish, run_command, setting
from .scenes import TRAINING_SEEDS, TRAINING_STYLES, VALIDATION_SEEDS, make_scene
from .training import Objective, TrainingConfig, train


class MaskObjective(Objective):
    """Reconstruction and commitment, each a mean over a mask, summed over masks."""

    names = ("reconstruction", "commitment")
    weights = (1.0, 0.25)  # van den Oord et al. 2017 find that 0.1 to 2 will do

    def __init__(self, vqvae: MaskVQVAE):
        super().__init__()
        self.vqvae = vqvae

    def counts(self, batch: Float[Tensor, "B 1 64 64"]) -> Float[Tensor, "2"]:
        """The number of masks, for both losses."""
        return batch.new_full((2,), len(batch))

    def forward(self, batch: Float[Tensor, "B 1 64 64"]) -> Float[Tensor, "2"]:
        """Masks of -1…1 → their summed losses; in training the codebook moves."""
        drawn, _, commitment = self.vqvae(batch)
        return len(batch) * torch.stack([F.mse_loss(drawn, batch), commitment])


class MaskDataset(Dataset):
    """The masks of a training scene, cut out along their boxes; index = seed."""

    def __len__(self) -> int:
        return len(TRAINING_SEEDS)

    def __getitem__(self, index: int) -> Float[Tensor, "n 1 64 64"]:
        size = (96, 128, 256)[index % 3]  # pixels: coarse and fine edges
        scene = make_scene(TRAINING_SEEDS[index], size, TRAINING_STYLES)
        return torch.stack([crop_to_square(o.cropped_mask) for o in scene.objects])


@dataclass(kw_only=True)
class MaskTrainingConfig(TrainingConfig):
    """The settings; ValueError for micro-batches: the codebook moves once a batch."""

    steps: int = setting(5000, "updates of the weights")
    batch_size: int = setting(8, "scenes an update, some three masks each")
    eval_every: int = setting(500, "steps between validations; 0: only at the end")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch_size:
            raise ValueError("micro_batch_size must be 0: the codebook needs a batch")


def train_mask_tokens(
    config: MaskTrainingConfig,
    output: Path,
    resume: bool = False,
    stop_after: int | None = None,
) -> str | None:
    """A mask encoder and decoder, made from nothing, in `output`; says where they are.

    The log has the mean IoU of validation masks and how many codes they use.
    """
    torch.manual_seed(config.seed)
    vqvae = MaskVQVAE()
    scenes = [make_scene(seed) for seed in VALIDATION_SEEDS[:50]]
    masks = [thing.cropped_mask for scene in scenes for thing in scene.objects]

    def evaluate(step: int) -> dict[str, float]:
        ious, codes = evaluate_reconstruction(vqvae, masks)
        return {"mean_iou": ious.mean().item(), "codes_used": codes.unique().numel()}

    run = (MaskObjective(vqvae), MaskDataset(), torch.cat, config, output)
    log = train(*run, resume, stop_after, evaluate=evaluate)
    if log[-1]["step"] < config.steps:
        return None
    publish(output, log, vqvae.save_pretrained)
    return f"mask encoder and decoder in {output}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, as `run_command`."""
    about = "Train the mask encoder and decoder of the seg tokens on masks of scenes."
    return run_command(about, MaskTrainingConfig, train_mask_tokens, argv)


if __name__ == "__main__":
    raise SystemExit(main())
