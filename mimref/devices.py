"""Which device and which precision a run computes with."""

from contextlib import AbstractContextManager

import torch

from mimref.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then CPU. Raises ConfigError for a device this machine lacks."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise ConfigError(f"device {name!r} is not available on this machine; use --device cpu or --device auto")
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA, float32 elsewhere. Raises ConfigError when the device cannot compute in bfloat16."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("precision 'bf16' is not supported by this GPU; use --precision fp32")
    return torch.bfloat16 if name == "bf16" else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[None]:
    """Mixed precision for bfloat16; a context that changes nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision is torch.bfloat16)
