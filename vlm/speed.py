"""int8 weights: linear layers quantized after training, a scale a channel.

Built in notebooks/23_speed.ipynb: edit it there, then run `make export`.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

FEW_ROWS = 32  # with more, dequantizing first is faster (bfloat16 on AVX-512)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and a scale for each output channel.

    About half the bytes of bfloat16, a quarter of float32's. For inference: no gradient
    reaches the weights. `.to(dtype)` changes the scales alone. On a CPU, a few rows of
    bfloat16 are faster than with `nn.Linear`; elsewhere it is smaller and slower.
    Source: the vector-wise scales of Dettmers et al. 2022, for weights alone.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()  # [out, in]
        scales = weight.abs().amax(dim=1) / 127  # [out]
        scales = torch.where(scales == 0, 1, scales)  # a row of zeros
        # By the scale as rounded: what its dtype loses, the integers make good.
        steps = (weight / scales.float()[:, None]).round_().clamp_(-127, 127)
        self.register_buffer("weight", steps.to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The weights in floating point, in the dtype of the scales."""
        return self.weight.to(self.scales.dtype) * self.scales[:, None]

    def forward(self, states: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        """As the linear layer would: few rows without writing the weights out."""
        num_rows = states.shape[:-1].numel()
        has_kernel = states.device.type == "cpu" and states.dtype == torch.bfloat16
        if num_rows > FEW_ROWS or not has_kernel:
            return F.linear(states, self.dequantize(), self.bias)
        rows = states.reshape(num_rows, -1).contiguous()  # [rows, in]
        outputs = torch._weight_int8pack_mm(rows, self.weight, self.scales)
        outputs = outputs.view(*states.shape[:-1], -1)  # [..., out]
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
