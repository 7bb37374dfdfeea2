"""Auxiliary losses on image features: class, box and mask of what a patch shows.

Built in notebooks/21_pretraining.ipynb: edit it there, then run `make export`.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .config import PaliGemmaConfig
from .scenes import Scene, all_classes

__all__ = ["PATCH_TARGETS", "patch_targets", "AuxiliaryHeads"]

PATCH_TARGETS = ("patch_classes", "patch_boxes", "patch_masks")


def patch_targets(
    scene: Scene, side: int, min_fraction: float = 0.2
) -> dict[str, Tensor]:
    """What each of side × side patches shows, by the names in `PATCH_TARGETS`.

    A patch shows the object that covers most of it, if that is more than
    `min_fraction` of its pixels. Classes [N] count from 1 as in `all_classes`,
    0 is background. Boxes [N, 4] are (x0, y0, x1, y1) relative to the patch's center,
    in fractions of the picture's side. Masks [N, patch pixels], bool, say which pixels
    are the object's. Boxes and masks are zero for background.
    """
    size = scene.image.width
    patch_size = size // side
    owner = scene.owner.reshape(side, patch_size, side, patch_size)
    owner = owner.swapaxes(1, 2).reshape(side * side, -1)  # [N, patch pixels]
    index = np.arange(-1, len(scene.objects))  # background, then the objects
    covered = (owner[..., None] == index).mean(axis=1)  # [N, 1 + objects]
    covered[:, 0] = min_fraction  # what an object has to beat
    best = covered.argmax(axis=1)  # [N]
    is_object = best > 0
    ids = {name: number for number, name in enumerate(all_classes(), start=1)}
    classes = np.array([0, *(ids[thing.label] for thing in scene.objects)])
    boxes = np.array([(0.0,) * 4, *(thing.box for thing in scene.objects)]) / size
    x, y = np.meshgrid(*[(np.arange(side) + 0.5) / side] * 2)
    centers = np.stack([x, y, x, y], axis=-1).reshape(-1, 4)  # [N, 4]
    offsets = (boxes[best] - centers) * is_object[:, None]
    masks = (owner == index[best][:, None]) & is_object[:, None]
    targets = (classes[best], offsets.astype(np.float32), masks)
    return dict(zip(PATCH_TARGETS, map(torch.from_numpy, targets), strict=True))


BACKGROUND_WEIGHT = 0.2  # in the class loss: most patches show nothing


class AuxiliaryHeads(nn.Module):
    """Three linear maps from an image feature to what its patch shows.

    They make the image encoder learn from every patch, and are thrown away afterwards.
    """

    names = ("class", "box", "mask")

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        width = config.projection_dim
        self.class_head = nn.Linear(width, 1 + len(all_classes()))
        self.box_head = nn.Linear(width, 4)
        self.mask_head = nn.Linear(width, config.vision_config.patch_size**2)
        weight = torch.ones(1 + len(all_classes()))
        weight[0] = BACKGROUND_WEIGHT
        self.register_buffer("class_weight", weight)

    def counts(self, classes: Int[Tensor, "B N"]) -> Float[Tensor, "3"]:
        """What each loss is a mean over: weighted patches, then objects' patches."""
        num_shown = (classes > 0).sum()
        return torch.stack([self.class_weight[classes].sum(), num_shown, num_shown])

    def forward(
        self, features: Float[Tensor, "B N D"], targets: dict[str, Tensor]
    ) -> Float[Tensor, "3"]:
        """Sums of three losses: cross-entropy, L1 distance, cross-entropy a pixel.

        `targets`: as from `patch_targets`, each with a batch dimension.
        """
        classes, boxes, masks = (targets[name] for name in PATCH_TARGETS)
        logits = self.class_head(features).float()  # [B, N, 1 + classes]
        class_loss = F.cross_entropy(
            logits.transpose(1, 2), classes, self.class_weight, reduction="sum"
        )
        shown = classes > 0
        features = features[shown]  # [n, D]
        box_loss = F.l1_loss(
            self.box_head(features).float(), boxes[shown], reduction="none"
        )
        mask_loss = F.binary_cross_entropy_with_logits(
            self.mask_head(features).float(), masks[shown].float(), reduction="none"
        )
        sums = [loss.mean(dim=1).sum() for loss in (box_loss, mask_loss)]
        return torch.stack([class_loss, *sums])
