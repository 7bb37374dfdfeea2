"""Choose a device (CUDA, MPS or CPU) and a dtype that it computes in natively.

Built in notebooks/16_weights.ipynb: edit it there, then run `make export`.
"""

import torch

__all__ = ["FLOAT_TYPES", "choose_device", "choose_dtype"]

FLOAT_TYPES = {  # by their names in a safetensors header
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device by name; "auto": CUDA if there is one, else Apple's MPS, else CPU.

    Raises ValueError for a device that isn't there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=device)
        probe.item()  # fails on the meta device, which has no storage
        return probe.device
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        raise ValueError(
            f"no device {device!r} on this machine, or none for this build of PyTorch: "
            "use 'auto' or 'cpu'"
        ) from error


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 natively; emulation doesn't count."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def choose_dtype(
    dtype: str | torch.dtype,
    stored: torch.dtype,
    device: torch.device,
    decoder: str = "gemma",
) -> torch.dtype:
    """The dtype by name; "auto": as stored, or the nearest that the device has.

    That is float16 for bfloat16 on a GPU without it, but float32 for the decoder
    "gemma2", whose activations overflow float16; and float32 for float64 on MPS.
    "16-bit" is "auto" for weights in bfloat16, whatever the file holds.
    Raises ValueError for a type that the model can't compute in.
    """
    if dtype == "16-bit":
        dtype, stored = "auto", torch.bfloat16
    if dtype == "auto":
        if stored == torch.bfloat16 and not has_bfloat16(device):
            return torch.float32 if decoder == "gemma2" else torch.float16
        if stored == torch.float64 and device.type == "mps":
            return torch.float32
        return stored
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in FLOAT_TYPES.values():
        raise ValueError(
            f"dtype={dtype!r} is not a type that the model computes in: use 'auto', "
            "'16-bit', 'float32', 'bfloat16', 'float16' or 'float64'"
        )
    return chosen
