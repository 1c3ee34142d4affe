"""Seconds, memory and matrix products of a device, for benchmarks."""

import ctypes
import re
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

# Rows and columns of the matrices whose product stands for what the device can do.
_MATMUL_SIZE = {"cpu": 1024, "mps": 4096, "cuda": 8192}
_MATMUL_REPEATS = 5


def seconds_of(work: Callable[[], object], times: int, device: torch.device) -> list[float]:
    """Seconds of each of `times` calls; on CUDA by events, so that the CPU may run ahead as it does in training."""
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        torch.cuda.synchronize(device)
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]
    instants = [time.perf_counter()]
    for _ in range(times):
        work()
        if device.type == "mps":
            torch.mps.synchronize()
        instants.append(time.perf_counter())
    return [after - before for before, after in pairwise(instants)]


class MatrixProducts:
    """Rate of a large square matrix product, which `utilisation` is measured against: hardly anything is faster."""

    def __init__(self, device: torch.device, precision: torch.dtype, *, size: int | None = None) -> None:
        self._device, self._size = device, size or _MATMUL_SIZE[device.type]
        shape = (self._size, self._size)
        self._left, self._right = (torch.randn(shape, device=device).to(precision) for _ in range(2))
        self._product = torch.empty_like(self._left)
        self._seconds: list[float] = []
        self._multiply()  # chooses the kernel

    def _multiply(self) -> None:
        torch.mm(self._left, self._right, out=self._product)

    def measure(self) -> None:
        """Measure a few more products."""
        self._seconds += seconds_of(self._multiply, _MATMUL_REPEATS, self._device)

    @property
    def flops_per_second(self) -> float:
        """2 size**3 by the median time of all that were measured."""
        return float(2 * self._size**3 / statistics.median(self._seconds))


class PeakMemory:
    """The most memory in use, beyond what was in use when this was made.

    CUDA: torch's allocations. CPU: the process's resident memory, where Linux and the C library tell. Elsewhere nothing
    does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._restart()

    def restart(self) -> None:
        """Forget the most that was in use so far, not what was in use at first."""
        self._restart()

    def growth(self) -> int | None:
        """Bytes, or None where nothing tells."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        peak = _resident("VmHWM")
        return None if peak is None else max(0, peak - self._before)

    def _restart(self) -> int | None:
        """Bytes in use now."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        return _reset_resident_peak() if self._device.type == "cpu" else None


def device_bytes(device: torch.device) -> int:
    """Memory of a CUDA device."""
    return torch.cuda.get_device_properties(device).total_memory


def _reset_resident_peak() -> int | None:
    """Let Linux count the process's peak anew; bytes resident now, or None where that cannot be done."""
    try:
        # What was freed stays with the process otherwise, and the next use of it would count for nothing.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    return _resident("VmRSS")


def _resident(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None
