"""Which device and which precision a run computes with."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

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


@contextmanager
def autocast(device: torch.device, precision: torch.dtype) -> Iterator[None]:
    """Mixed precision for bfloat16; a context that changes nothing for float32."""
    if precision is not torch.bfloat16:
        yield
        return
    # On CPUs the backward pass of torch's fused attention is several times slower in bfloat16 than in float32, and
    # slower than all the rest of a small encoder's step; plain matrix products are faster than either.
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with attention, torch.autocast(device.type, dtype=torch.bfloat16):
        yield
