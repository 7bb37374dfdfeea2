"""Choose a device (CUDA, MPS or CPU) and a dtype that it computes in natively.

Built in notebooks/16_weights.ipynb: edit it there, then run `make export`.
"""

import torch

FLOAT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
        what = f"no device {device!r} on this machine or in this build of PyTorch"
        raise ValueError(f"{what}: use 'auto' or 'cpu'") from error


def choose_dtype(
    dtype: str | torch.dtype,
    stored: torch.dtype,
    device: torch.device,
    decoder: str = "gemma",
) -> torch.dtype:
    """The dtype by name; "auto": as stored, or the nearest that the device has.

    "16-bit" is "auto" for weights in bfloat16, whatever the file holds. Without
    bfloat16 that is float16, but float32 for "gemma2", whose activations overflow it.
    Raises ValueError for a type that the model can't compute in.
    """
    if dtype == "16-bit":
        dtype, stored = "auto", torch.bfloat16
    if dtype == "auto":
        is_mps = device.type == "mps"
        native = not is_mps or torch.backends.mps.is_macos_or_newer(14, 0)
        if device.type == "cuda":  # emulation doesn't count
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        if stored == torch.bfloat16 and not native:
            return torch.float32 if decoder == "gemma2" else torch.float16
        return torch.float32 if is_mps and stored == torch.float64 else stored
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in FLOAT_TYPES or (chosen, device.type) == (torch.float64, "mps"):
        names = "'auto', '16-bit', 'float32', 'bfloat16', 'float16' or 'float64'"
        raise ValueError(f"the model can't compute in dtype={dtype!r}: use {names}")
    return chosen
