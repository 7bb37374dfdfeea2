"""Auxiliary losses: what each patch shows, read from its image feature.

Built in notebooks/21_pretraining.ipynb: edit it there, then run `make export`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .config import PaliGemmaConfig
from .scenes import all_classes

BACKGROUND_WEIGHT = 0.2  # in the class loss: most patches show nothing


class AuxiliaryHeads(nn.Module):
    """Three linear maps from an image feature to what its patch shows.

    They make the image encoder learn from every patch, and are thrown away afterwards.
    """

    names = ("class", "box", "mask")

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        width, num_classes = config.projection_dim, 1 + len(all_classes())
        self.class_head = nn.Linear(width, num_classes)
        self.box_head = nn.Linear(width, 4)
        self.mask_head = nn.Linear(width, config.vision_config.patch_size**2)
        weight = torch.ones(num_classes)
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
        classes, shown = targets["patch_classes"], targets["patch_classes"] > 0
        logits = self.class_head(features).float()  # [B, N, 1 + classes]
        class_loss = F.cross_entropy(
            logits.transpose(1, 2), classes, self.class_weight, reduction="sum"
        )
        features = features[shown]  # [n, D]
        boxes, masks = targets["patch_boxes"][shown], targets["patch_masks"][shown]
        box_loss = F.l1_loss(self.box_head(features).float(), boxes, reduction="none")
        mask_loss = F.binary_cross_entropy_with_logits(
            self.mask_head(features).float(), masks.float(), reduction="none"
        )
        sums = [loss.mean(dim=1).sum() for loss in (box_loss, mask_loss)]
        return torch.stack([class_loss, *sums])
