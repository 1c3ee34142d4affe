"""How fast the evaluations are, on synthetic features: each number compares two ways measured in the same run."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from mimref.devices import own_cores, resolve_device
from mimref.evaluation.cluster.protocol import cluster
from mimref.evaluation.knn.protocol import knn
from mimref.evaluation.probe.config import LEARNING_RATES
from mimref.evaluation.probe.ensemble import MOMENTUM, ProbeEnsemble
from mimref.progress import Progress
from mimref.results import Row

SWEEP = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200)
ONE_K = 10
# Widths of a probe's inputs, in widths of the encoder: last and last4, with CLS alone and with the mean of patches.
PROBE_WIDTHS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the synthetic features; the three measurements together take about half a minute on two cores."""

    knn_train: int = 20_000
    knn_test: int = 5_000
    knn_width: int = 256
    knn_classes: int = 100
    kmeans_images: int = 4_000
    kmeans_width: int = 128
    kmeans_classes: int = 20
    kmeans_runs: int = 100
    probe_batch: int = 256
    probe_width: int = 96
    """Of the encoder; the classifiers' inputs have up to 8 times this."""
    probe_classes: int = 10
    probe_steps: int = 20
    """Per measurement; a single step is too short to time."""
    repeats: int = 3
    """Measurements of each way, taken in turns after one that does not count."""


def benchmark_evaluations(
    *, sizes: Sizes | None = None, device: str = "cpu", workers: int | None = None, progress: Progress | None = None
) -> list[Row]:
    """Measure what the evaluations save; see the three functions below. Rows have the sizes measured.

    device: of k-NN and of the probe; k-means runs on the CPU, in `workers` processes (None: one per core).
    """
    sizes = sizes or Sizes()
    calls = 3 * 2 * (sizes.repeats + 1)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, calls)

    return [
        knn_sweep_ratio(sizes, device=device, tick=tick),
        kmeans_speedup(sizes, workers=workers, tick=tick),
        probe_speedup(sizes, device=device, tick=tick),
    ]


def knn_sweep_ratio(sizes: Sizes, *, device: str = "cpu", tick: Callable[[], None] | None = None) -> Row:
    """Time of k-NN for ten values of k up to 200, divided by that for k = 10 alone; each with a search of its own."""
    train_x, train_y = _blobs(sizes.knn_train, sizes.knn_width, sizes.knn_classes, seed=0)
    test_x, test_y = _blobs(sizes.knn_test, sizes.knn_width, sizes.knn_classes, seed=1)
    one_s, ten_s = _medians(
        (
            lambda: knn(train_x, train_y, test_x, test_y, k=(ONE_K,), device=device),
            lambda: knn(train_x, train_y, test_x, test_y, k=SWEEP, device=device),
        ),
        sizes,
        tick,
    )
    measured: Row = {"train": len(train_x), "test": len(test_x), "width": sizes.knn_width, "classes": sizes.knn_classes}
    ratio = ten_s / one_s
    return {"metric": "benchmark_knn_sweep_ratio", "value": ratio, "one_s": one_s, "ten_s": ten_s, **measured}


def kmeans_speedup(sizes: Sizes, *, workers: int | None = None, tick: Callable[[], None] | None = None) -> Row:
    """Time of many k-means runs in one process, divided by that in `workers` (None: one per core).

    Starting the processes, which happens once, does not count.
    """
    x, y = _blobs(sizes.kmeans_images, sizes.kmeans_width, sizes.kmeans_classes, seed=0)
    workers = workers or own_cores()
    one_s, all_s = _medians(
        (
            lambda: cluster(x, y, runs=sizes.kmeans_runs, workers=1),
            lambda: cluster(x, y, runs=sizes.kmeans_runs, workers=workers),
        ),
        sizes,
        tick,
    )
    measured: Row = {"workers": workers, "runs": sizes.kmeans_runs, "images": len(x)}
    measured |= {"width": sizes.kmeans_width, "classes": sizes.kmeans_classes}
    return {"metric": "benchmark_kmeans_speedup", "value": one_s / all_s, "one_s": one_s, "all_s": all_s, **measured}


def probe_speedup(sizes: Sizes, *, device: str = "cpu", tick: Callable[[], None] | None = None) -> Row:
    """Time of a step of 52 separate `nn.Linear`, each with its own SGD, divided by that of all in one ensemble.

    It is the cost of many small operations that the ensemble saves: where few large ones take the time, as with many
    classes on a CPU, little is saved.
    """
    target = resolve_device(device)
    generator = torch.Generator().manual_seed(0)
    widths = [factor * sizes.probe_width for factor in PROBE_WIDTHS]
    inputs = [torch.randn(sizes.probe_batch, width, generator=generator).to(target) for width in widths]
    labels = torch.randint(sizes.probe_classes, (sizes.probe_batch,), generator=generator).to(target)
    ensemble = ProbeEnsemble(widths, sizes.probe_classes, LEARNING_RATES, device=target)
    alone = [
        (x, linear, torch.optim.SGD(linear.parameters(), lr=lr, momentum=MOMENTUM))
        for x in inputs
        for lr in LEARNING_RATES
        for linear in (nn.Linear(x.shape[1], sizes.probe_classes).to(target),)
    ]

    def together() -> None:
        for _ in range(sizes.probe_steps):
            ensemble.step(inputs, labels, 1.0)
        _finish(target)

    def separate() -> None:
        for _ in range(sizes.probe_steps):
            for x, linear, optimizer in alone:
                optimizer.zero_grad()
                F.cross_entropy(linear(x), labels).backward()
                optimizer.step()
        _finish(target)

    together_s, separate_s = (seconds / sizes.probe_steps for seconds in _medians((together, separate), sizes, tick))
    measured: Row = {"together_s": together_s, "separate_s": separate_s, "classifiers": len(alone)}
    measured |= {"batch": sizes.probe_batch, "width": sizes.probe_width, "classes": sizes.probe_classes}
    return {"metric": "benchmark_probe_speedup", "value": separate_s / together_s, **measured}


def _medians(ways: Sequence[Callable[[], object]], sizes: Sizes, tick: Callable[[], None] | None) -> list[float]:
    """Median time in seconds of each way. They take turns, so that whatever else the machine does slows down both."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(sizes.repeats + 1):
        for way, own in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            own.append(time.perf_counter() - start)
            if tick is not None:
                tick()
    return [statistics.median(own[1:]) for own in times]


def _blobs(images: int, width: int, classes: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Overlapping classes around centres that do not depend on the seed."""
    centres = np.random.default_rng(0).standard_normal((classes, width), dtype=np.float32)
    rng = np.random.default_rng([1, seed])
    y = np.arange(images, dtype=np.int64) % classes
    return 0.3 * centres[y] + rng.standard_normal((images, width), dtype=np.float32), y


def _finish(device: torch.device) -> None:
    """Wait for what a GPU has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
