"""RMSNorm in Gemma's form: divide by the root mean square, times (1 + weight).

Built in notebooks/04_rmsnorm.ipynb: edit it there, then run `make export`.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class GemmaRMSNorm(nn.Module):
    """Divide each vector by its root mean square, then multiply by (1 + weight).

    The weight starts at 0, so a new norm only rescales. Everything, the product with
    (1 + weight) included, happens in float32 and is rounded to the input's dtype once.
    Source: Zhang and Sennrich 2019; the (1 + weight) is Gemma's own.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, hidden_states: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Normalize over the last axis; shape and dtype stay."""
        factors = 1.0 + self.weight.float()  # [D]
        states = F.rms_norm(hidden_states.float(), factors.shape, factors, self.eps)
        return states.to(hidden_states.dtype)  # [..., D]
