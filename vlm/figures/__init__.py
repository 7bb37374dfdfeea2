"""Figures that work without a kernel; hand-written, one function each."""

from vlm.figures.architecture import architecture_map

__all__ = ["architecture_map"]
