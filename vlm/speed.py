"""int8 weights: linear layers quantized after training, a scale a channel.

Built in notebooks/23_speed.ipynb: edit it there, then run `make export`.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

FEW_ROWS = 32  # with more, converting first is faster (bfloat16 on AVX-512)
AT_ONCE = 2**20  # weights that a CPU converts at a time: a few MB stay in its cache


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and a scale for each output channel.

    About half the bytes of bfloat16, a quarter of float32's. For inference: no gradient
    reaches the weights. `.to(dtype)` changes the scales alone. On a CPU, a few rows of
    bfloat16 are faster than with `nn.Linear`; elsewhere it is smaller and slower.
    Source: the vector-wise scales of Dettmers et al. 2022, for weights alone.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, step = linear.weight.detach(), max(1, AT_ONCE // linear.in_features)
        integers, scales = torch.empty_like(weight, dtype=torch.int8), []
        for rows, quantized in zip(weight.split(step), integers.split(step)):
            rows = rows.float()  # [step, in]
            scale = torch.maximum(rows.amax(dim=1), -rows.amin(dim=1)) / 127  # [step]
            scale = torch.where(scale == 0, 1, scale).to(weight.dtype)  # a row of zeros
            # By the scale as rounded: what its dtype loses, the integers make good.
            quantized.copy_((rows / scale.float()[:, None]).round_().clamp_(-127, 127))
            scales.append(scale)
        self.register_buffer("weight", integers)  # [out, in]
        self.register_buffer("scales", torch.cat(scales))  # [out]
        self.bias = linear.bias

    def forward(self, states: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        """As the linear layer would: few rows without writing the weights out."""
        num_rows, (out, width) = states.shape[:-1].numel(), self.weight.shape
        few = num_rows <= FEW_ROWS and width % 16 == 0  # the kernel reads 16 at a time
        if few and states.is_cpu and states.dtype == torch.bfloat16:
            rows = states.reshape(num_rows, width).contiguous()  # [rows, in]
            outputs = torch._weight_int8pack_mm(rows, self.weight, self.scales)
            outputs = outputs.view(*states.shape[:-1], out)  # [..., out]
        else:
            step = max(1, AT_ONCE // width) if states.is_cpu else out
            parts = zip(self.weight.split(step), self.scales.split(step))
            outputs = [F.linear(states, part * s[:, None]) for part, s in parts]
            outputs = torch.cat(outputs, dim=-1)  # [..., out]
        return outputs if self.bias is None else outputs + self.bias


def quantize_int8(model: nn.Module) -> None:
    """Replace each linear layer of the decoder's blocks by an `Int8Linear`, in place.

    `model`: a PaliGemma, or its decoder alone. Embedding, output head, norms, projector
    and vision tower stay as they are. Raises ValueError where none is left to replace.
    """
    decoder = getattr(model, "language_model", model)
    found = [
        (parent, name, child)
        for parent in decoder.model.layers.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    if not found:
        raise ValueError(
            "the decoder has no plain linear layer left: it is quantized already, or "
            "has adapters (merge_and_unload first)"
        )
    while found:  # drops each old layer: one matrix at a time is there twice
        parent, name, child = found.pop()
        setattr(parent, name, Int8Linear(child))
