"""Multimodal projector: one linear map from vision features to soft tokens.

Built in notebooks/10_projector.ipynb: edit it there, then run `make export`.
"""

from jaxtyping import Float
from torch import Tensor, nn

from .config import PaliGemmaConfig


class PaliGemmaMultiModalProjector(nn.Module):
    """One linear map, with bias and without activation, from vision to text width.

    Its outputs join the text stream as they are: only text embeddings are multiplied
    by √D. Source: Beyer et al. 2024 (PaliGemma), who found no clear gain in an MLP.
    """

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.projection_dim)

    def forward(self, features: Float[Tensor, "B N Dv"]) -> Float[Tensor, "B N D"]:
        """Image features, one a patch → soft tokens, one a patch."""
        return self.linear(features)
