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

from mimref.config.recipe import Recipe
from mimref.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Return the device; `auto` is the best of CUDA, MPS and CPU. Raises ConfigError if it is unknown or missing."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps)}
    try:
        device = torch.device(name)
        available = counts[device.type]
    except (RuntimeError, KeyError) as error:
        raise ConfigError(f"device {name!r} is unknown; use auto, cpu, cuda or mps") from error
    if (device.index or 0) >= available:
        raise ConfigError(f"device {name!r} is not available on this machine; use --device cpu or --device auto")
    return device


@dataclass(frozen=True)
class Machine:
    """The hardware for which settings are derived."""

    cuda: bool
    memory_bytes: int | None = None
    """Total memory of a GPU, used or not; None on other devices."""
    processes: int = 1
    """Number of processes; on CUDA each has its own GPU."""


def machine_of(device: torch.device, processes: int = 1) -> Machine:
    """Describe the hardware that `device` offers to this many processes."""
    cuda = device.type == "cuda"
    memory_bytes = torch.cuda.get_device_properties(device).total_memory if cuda else None
    return Machine(cuda, memory_bytes, processes)


ACTIVATION_BYTES = 34
"""Bytes per token and channel that a transformer block saves for the backward pass, in 16-bit training with fused
attention (Korthikanti et al. 2022, Eq. 1)."""


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype; `auto` is bfloat16 on CUDA if supported, else float32. Raises ConfigError if unsupported."""
    if name not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"precision {name!r}: choose from auto, fp32, bf16")
    if name == "bf16" and not supports_bf16(device):
        raise ConfigError("precision 'bf16' is not supported by this GPU; use --precision fp32")
    chosen = name == "bf16" or (name == "auto" and device.type == "cuda" and supports_bf16(device))
    return torch.bfloat16 if chosen else torch.float32


def supports_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 may be chosen; not on a GPU that emulates it, which is slower than float32."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether a CPU has instructions for bfloat16 products (AVX512-BF16 or AMX); False for other devices."""
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return device.type == "cpu" and any(supported() for supported in known if supported is not None)


def derive_precision(recipe: Recipe[Any]) -> None:
    """Derive bfloat16 on a CPU with instructions for it, which makes training faster."""
    if multiplies_bf16(resolve_device(recipe.config.device)):
        recipe.derive("precision", "bf16", "faster: this CPU has instructions for it")


def adapt_precision(recipe: Recipe[Any]) -> None:
    """Replace a preset's bfloat16 on a device without instructions for it, where it is slower than float32."""
    device = resolve_device(recipe.config.device)
    on_cpu = device.type == "cpu"
    lacking = not multiplies_bf16(device) if on_cpu else not supports_bf16(device)
    if recipe.config.precision == "bf16" and lacking:
        where = "CPU" if on_cpu else "GPU"
        recipe.adapt("precision", "fp32", f"faster: this {where} has no instructions for bf16")


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for the copy."""
    # CUDA copies asynchronously only from page-locked memory.
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def keep_freed_memory() -> None:
    """Make this process keep the large buffers that it frees, if the C library is glibc.

    Otherwise every large tensor is mapped and unmapped again, and on a CPU the page faults take up to a tenth of a
    training step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, which stops the automatic growth of M_MMAP_THRESHOLD
        if not mallopt(-3, 1 << 30):  # M_MMAP_THRESHOLD
            mallopt(-3, 1 << 25)  # the most that older versions accept


def own_cores() -> int:
    """Return how many cores this process may use, at least 1.

    The cores that affinity and container allow are shared evenly among the group's processes on this machine.
    """
    from joblib import cpu_count  # slow to import

    in_group = dist.is_available() and dist.is_initialized()
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if in_group else 1
    return max(1, int(cpu_count()) // sharing)


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[Any]:
    """Return a context for mixed precision in bfloat16; it changes nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision is torch.bfloat16 else nullcontext()


def choose_attention(module: nn.Module, device: torch.device, precision: torch.dtype) -> None:
    """Choose the fastest attention for a module that will be trained on this device.

    On CPUs, the backward pass of torch's fused attention is several times slower in bfloat16 than in float32; plain
    matrix products are faster than both. Without gradients, and on CUDA, fused attention is the fastest.
    """
    if device.type == "cpu" and precision is torch.bfloat16:
        parts: Iterable[Any] = module.modules()
        for part in parts:
            if hasattr(part, "fused_attn"):  # timm's name, in all of its families
                part.fused_attn = False
