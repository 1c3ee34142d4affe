"""Devices and precisions of a run."""

import ctypes
import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimref.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """`auto` is the best available: CUDA, then MPS, then CPU. Raises ConfigError for one unknown or missing."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise ConfigError(f"device {name!r} is not available on this machine; use --device cpu or --device auto")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown; use auto, cpu, cuda or mps") from error


@dataclass(frozen=True)
class Machine:
    """What settings are derived for."""

    cuda: bool
    memory_bytes: int | None = None
    """Of a GPU, used or not; None on other devices."""
    processes: int = 1
    """On CUDA each has a GPU of its own."""


def machine_of(device: torch.device, processes: int = 1) -> Machine:
    """What `device` offers to this many processes."""
    cuda = device.type == "cuda"
    memory_bytes = torch.cuda.get_device_properties(device).total_memory if cuda else None
    return Machine(cuda, memory_bytes, processes)


ACTIVATION_BYTES = 34
"""That a transformer's block keeps of every token and channel for the backward pass, in 16-bit training with fused
attention (Korthikanti et al. 2022, Eq. 1)."""


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA, float32 elsewhere. Raises ConfigError if the device cannot compute in bfloat16."""
    if name not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"precision {name!r}: choose from auto, fp32, bf16")
    # Emulated bfloat16 is slower than float32.
    supported = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bf16" and not supported:
        raise ConfigError("precision 'bf16' is not supported by this GPU; use --precision fp32")
    chosen = name == "bf16" or (name == "auto" and device.type == "cuda" and supported)
    return torch.bfloat16 if chosen else torch.float32


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a CPU has instructions for products of bfloat16 (AVX512-BF16 or AMX); False for other devices."""
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return device.type == "cpu" and any(supported() for supported in known if supported is not None)


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for the copy."""
    # CUDA copies asynchronously only from page-locked memory.
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def keep_freed_memory() -> None:
    """Let this process keep the large buffers that it frees, if the C library is glibc.

    Otherwise every large tensor is mapped and unmapped again, and on a CPU the page faults take up to a tenth of a
    training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def own_cores() -> int:
    """How many cores this process may use, at least 1.

    The processes of its group on this machine share evenly the cores that affinity and container allow.
    """
    from joblib import cpu_count  # slow to import

    in_group = dist.is_available() and dist.is_initialized()
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if in_group else 1
    return max(1, int(cpu_count()) // sharing)


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Mixed precision for bfloat16; no change for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision is torch.bfloat16 else nullcontext()


def choose_attention(module: nn.Module, device: torch.device, precision: torch.dtype) -> None:
    """Let the attention of a module that will be trained be computed in the way that is fastest there.

    Of torch's fused attention on CPUs, the backward pass in bfloat16 is several times slower than in float32; plain
    matrix products are faster than both. Without gradients, and on CUDA, the fused one is.
    """
    if device.type == "cpu" and precision is torch.bfloat16:
        parts: Iterable[Any] = module.modules()
        for part in parts:
            if hasattr(part, "fused_attn"):  # timm's name, in all of its families
                part.fused_attn = False
