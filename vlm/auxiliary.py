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
    """Two linear maps from an image feature to what its patch shows.

    They make the image encoder learn from every patch, and are thrown away afterwards.
    """

    names = ("class", "box")

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        width, num_classes = config.projection_dim, 1 + len(all_classes())
        self.class_head = nn.Linear(width, num_classes)
        self.box_head = nn.Linear(width, 4)
        weight = torch.ones(num_classes)
        weight[0] = BACKGROUND_WEIGHT
        self.register_buffer("class_weight", weight)

    def counts(self, classes: Int[Tensor, "B N"]) -> Float[Tensor, "2"]:
        """What each loss is a mean over: weighted patches, and objects' patches."""
        return torch.stack([self.class_weight[classes].sum(), (classes > 0).sum()])

    def forward(
        self, features: Float[Tensor, "B N D"], targets: dict[str, Tensor]
    ) -> Float[Tensor, "2"]:
        """Sums of two losses: weighted cross-entropy, and mean L1 distance of boxes.

        `targets`: as from `patch_targets`, each with a batch dimension.
        """
        classes, shown = targets["patch_classes"], targets["patch_classes"] > 0
        logits = self.class_head(features).float()  # [B, N, 1 + classes]
        class_loss = F.cross_entropy(
            logits.transpose(1, 2), classes, self.class_weight, reduction="sum"
        )
        boxes = self.box_head(features).float()  # [B, N, 4]
        distance = (boxes - targets["patch_boxes"]).abs().mean(dim=-1)  # [B, N]
        return torch.stack([class_loss, (distance * shown).sum()])
