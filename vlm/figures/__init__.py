"""Figures that work without a kernel; hand-written, one function each."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "architecture": ["architecture_map"],
        "attention": ["attention_over_picture"],
        "codes": ["mask_codes"],
    },
)
