"""Measure time and memory of work on a device, and compare several ways to the same result."""

import ctypes
import re
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from mimref.progress import Progress
from mimref.results import Row

Work = Callable[[], object]
Facts = list[tuple[str, str]]
"""Measurements in words: pairs of what was measured and the result."""

# Rows and columns of the square matrices whose product shows the rate that the device can reach.
_MATMUL_SIZE = {"cpu": 1024, "mps": 4096, "cuda": 8192}
_MATMUL_REPEATS = 5


class Ticks:
    """Counts the finished parts of a benchmark and reports them to `progress`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def __call__(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def seconds_of(work: Work, calls: int, device: torch.device) -> list[float]:
    """Return the seconds of each call; on CUDA, events are timed, so that the CPU can run ahead as in training."""
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        stream = torch.cuda.current_stream(device)
        marks[0].record(stream)
        for mark in marks[1:]:
            work()
            mark.record(stream)
        torch.cuda.synchronize(device)
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]
    instants = [time.perf_counter()]
    for _ in range(calls):
        work()
        if device.type == "mps":
            torch.mps.synchronize()
        instants.append(time.perf_counter())
    return [after - before for before, after in pairwise(instants)]


def median_seconds(
    ways: Sequence[Work],
    device: torch.device,
    *,
    turns: int,
    warm_up: int = 1,
    calls: int = 1,
    tick: Callable[[], None] | None = None,
) -> list[float]:
    """Return the median seconds of a call of each way.

    The ways take turns of `calls` calls, so that other load on the machine slows all of them down. The first `warm_up`
    turns are discarded; `turns` more are counted. tick: called after each turn of each way.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(warm_up + turns):
        for way, own in zip(ways, seconds, strict=True):
            own += seconds_of(way, calls, device)
            if tick is not None:
                tick()
    return [statistics.median(own[warm_up * calls :]) for own in seconds]


class MatrixProducts:
    """A few large square matrix products in one call; hardly any other work reaches a higher rate."""

    def __init__(self, device: torch.device, precision: torch.dtype) -> None:
        self.flops = 2 * _MATMUL_SIZE[device.type] ** 3 * _MATMUL_REPEATS
        shape = (_MATMUL_SIZE[device.type],) * 2
        self._left, self._right = (torch.randn(shape, device=device).to(precision) for _ in range(2))
        self._product = torch.empty_like(self._left)
        self()  # chooses the kernel

    def __call__(self) -> None:
        for _ in range(_MATMUL_REPEATS):
            torch.mm(self._left, self._right, out=self._product)


class PeakMemory:
    """Peak memory in use, beyond what was in use when the object was created.

    CUDA: torch's allocations. CPU: the process's resident memory, where Linux and glibc report it. Unknown elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self.restart()

    def restart(self) -> int | None:
        """Reset the peak. Returns the bytes in use now, or None if unknown."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return torch.cuda.memory_allocated(self._device)
        return _reset_resident_peak() if self._device.type == "cpu" else None

    def growth(self) -> int | None:
        """Return the peak in bytes beyond the start, or None if unknown."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        peak = _resident("VmHWM")
        return None if peak is None else max(0, peak - self._before)


def device_setting(device: torch.device, precision: torch.dtype) -> Row:
    """Return what a row records about the device: its name, the precision and, for a CPU, the threads."""
    setting: Row = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}
    setting["precision"] = "bf16" if precision is torch.bfloat16 else "fp32"
    return setting | ({"threads": torch.get_num_threads()} if device.type == "cpu" else {})


def _reset_resident_peak() -> int | None:
    """Make Linux count the process's peak from now on. Returns the bytes resident now, or None if not supported."""
    try:
        # Otherwise the process keeps freed memory, and using it again would not count.
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
