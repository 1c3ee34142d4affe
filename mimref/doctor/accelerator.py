"""GPUs, their driver, and the libraries that torch uses on them."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from mimref.devices import resolve_device
from mimref.doctor.checks import Check, gib

STATE_BYTES = int(2.4 * 2**30)
"""Weights, gradients, moments, average and queue of the smallest encoder of the paper's presets, ViT-B/16, without
activations (`mimref benchmark cost --preset mae_b16`)."""
USED_SHARE = 0.1
"""Share of a GPU's memory; if more is in use, another process is likely to compute there, too."""
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_SMI_S = 20


class Gpu(NamedTuple):
    """A CUDA device."""

    name: str
    capability: tuple[int, int]
    free_bytes: int
    total_bytes: int


class Build(NamedTuple):
    """What torch was built for."""

    version: str
    cuda: str | None
    architectures: tuple[str, ...]
    """Such as `sm_90`; `compute_90` is code that the driver compiles for that and later devices."""
    cudnn: int | None
    nccl: str | None


def accelerator_checks() -> Iterator[Check]:
    """Check devices, driver, CUDA, cuDNN and NCCL, and the capability and memory of every GPU."""
    found, driver, build = gpus(), driver_version(), torch_build()
    yield _device(found, driver, build)
    yield Check("driver", driver or "no NVIDIA driver")
    yield Check("CUDA of torch", build.cuda or "none: a build for CPUs")
    if not found:
        return
    yield _cudnn(build)
    yield _nccl(build, len(found))
    for number, gpu in enumerate(found):
        yield _capability(f"GPU {number} capability", gpu, build)
        yield _memory(f"GPU {number} memory", gpu)


def gpus() -> list[Gpu]:
    """Return the GPUs that torch can use."""
    if not torch.cuda.is_available():
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        major, minor = torch.cuda.get_device_capability(number)
        found.append(Gpu(torch.cuda.get_device_name(number), (major, minor), free, total))
    return found


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, whether torch can use it or not."""
    with suppress(OSError):
        if match := re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _DRIVER_FILE.read_text()):
            return match[1]
    if (command := shutil.which("nvidia-smi")) is None:
        return None
    with suppress(OSError, subprocess.TimeoutExpired):
        told = subprocess.run([command], capture_output=True, text=True, timeout=_SMI_S).stdout
        if match := re.search(r"Driver Version:\s*(\S+)", told):
            return match[1]
    return None


def torch_build() -> Build:
    """Return what this torch was built for."""
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    nccl = None
    if torch.cuda.is_available() and dist.is_available() and dist.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return Build(torch.__version__, torch.version.cuda, tuple(torch.cuda.get_arch_list()), cudnn, nccl)


def _device(found: list[Gpu], driver: str | None, build: Build) -> Check:
    if found:
        return Check("device", ", ".join(gpu.name for gpu in found))
    name = str(resolve_device("auto"))
    if driver is None:
        return Check("device", name, todo="" if name != "cpu" else "no GPU: for small encoders only")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Check("device", name, "advice", "CUDA_VISIBLE_DEVICES hides all GPUs; unset it")
    if build.cuda is None:
        todo = f"torch {build.version} is built for CPUs; install a build for CUDA, see pytorch.org/get-started"
    else:
        todo = f"torch for CUDA {build.cuda} cannot use driver {driver}: update the driver, or install a torch for an "
        todo += "older CUDA; in a container, start it with GPUs"
    return Check("device", f"{name}, though there is an NVIDIA driver", "problem", todo)


def _cudnn(build: Build) -> Check:
    if build.cudnn is None:
        return Check("cuDNN", "missing", "problem", "patch embeddings need it; install torch again")
    return Check("cuDNN", str(build.cudnn))


def _nccl(build: Build, devices: int) -> Check:
    if build.nccl is not None:
        return Check("NCCL", build.nccl)
    todo = "torchrun cannot use the GPUs together; install a build of torch with NCCL"
    return Check("NCCL", "missing", "problem" if devices > 1 else "advice", todo)


def _capability(name: str, gpu: Gpu, build: Build) -> Check:
    value = f"{gpu.capability[0]}.{gpu.capability[1]}"
    if any(_runs(architecture, gpu.capability) for architecture in build.architectures):
        return Check(name, value, todo=gpu.name)
    todo = f"torch {build.version} has no code for {gpu.name}, only for {', '.join(build.architectures)}; "
    return Check(name, value, "problem", todo + "install another build of torch")


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Return whether code for an architecture runs on a device.

    Machine code runs on devices of the same major and an equal or higher minor capability, but code for `sm_90a` on
    that one alone; `compute_` code also runs on all later devices.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if match is None:
        return False
    built = int(match[2]), int(match[3])
    if match[4] == "a":
        return built == capability
    return built <= capability and (match[1] == "compute" or built[0] == capability[0])


def _memory(name: str, gpu: Gpu) -> Check:
    value = f"{gib(gpu.free_bytes)} free of {gib(gpu.total_bytes)}"
    if gpu.free_bytes < STATE_BYTES:
        todo = f"a ViT-B/16 needs {gib(STATE_BYTES)} without activations; end what uses the GPU (nvidia-smi lists it)"
        return Check(name, value, "problem", todo)
    if gpu.total_bytes - gpu.free_bytes > USED_SHARE * gpu.total_bytes:
        return Check(name, value, "advice", "another process uses the GPU; nvidia-smi lists it")
    return Check(name, value)
