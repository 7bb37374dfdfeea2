"""Figures that work without a kernel; hand-written, one function each."""

from vlm.figures.architecture import architecture_map
from vlm.figures.attention import attention_over_picture
from vlm.figures.mask_codes import mask_codes

__all__ = ["architecture_map", "attention_over_picture", "mask_codes"]
