"""Patch embeddings: one linear map of each square patch, plus a learned position.

Built in notebooks/02_patch_embeddings.ipynb: edit it there, then run `make export`.
"""

from jaxtyping import Float
from torch import Tensor, nn

from .config import SiglipVisionConfig


class SiglipVisionEmbeddings(nn.Module):
    """Cut pictures into patches, project each, add a learned position.

    The convolution's stride is its kernel size, so that it sees each patch once: it is
    one linear map of every patch. Follows ViT (Dosovitskiy et al. 2021), without a
    class token, as SigLIP does.
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(
            config.num_channels, width, kernel_size=patch, stride=patch
        )
        self.position_embedding = nn.Embedding(config.num_image_tokens, width)

    def forward(self, pixel_values: Float[Tensor, "B C S S"]) -> Float[Tensor, "B N D"]:
        """Pixels in [-1, 1] → one vector a patch, row by row from the top left.

        Raises ValueError for a shape other than the config's, and for integers: pixels
        of 0…255 must be scaled first.
        """
        channels, side = self.config.num_channels, self.config.image_size
        fits = pixel_values.shape[1:] == (channels, side, side)
        if not (fits and pixel_values.is_floating_point()):
            raise ValueError(
                f"pixel_values are {pixel_values.dtype} of shape "
                f"{list(pixel_values.shape)}, but this model takes [batch, {channels}, "
                f"{side}, {side}], floats: use a processor with image_size={side}"
            )
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(pixel_values)  # [B, D, S/P, S/P]
        patches = patches.flatten(2).transpose(1, 2)  # [B, N, D]
        return patches + self.position_embedding.weight  # one row a patch, in order
