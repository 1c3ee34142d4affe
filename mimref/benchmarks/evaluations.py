"""Speed of the evaluations on synthetic features; each number compares two methods measured in the same run."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from mimref.benchmarks.measure import Ticks, median_seconds
from mimref.devices import own_cores, resolve_device
from mimref.evaluation.cluster.protocol import cluster
from mimref.evaluation.knn.protocol import knn
from mimref.evaluation.probe.config import LEARNING_RATES
from mimref.evaluation.probe.ensemble import MOMENTUM, ProbeEnsemble
from mimref.progress import Progress
from mimref.results import Row

SWEEP = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200)
ONE_K = 10
# Input widths of the probes in multiples of the encoder's: last and last4, without and with the mean of each block.
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
    """Width of the encoder; the classifiers' inputs are up to 8 times as wide."""
    probe_classes: int = 10
    probe_steps: int = 20
    """Steps per measurement; a single step is too short to time."""
    repeats: int = 3
    """Measurements of each method, taken in turns after one warm-up."""


def benchmark_evaluations(
    *, sizes: Sizes | None = None, device: str = "cpu", progress: Progress | None = None
) -> list[Row]:
    """Measure how much time the evaluations save; the rows record the sizes measured.

    device: where k-NN and the probe run; k-means always runs on the CPU.
    """
    sizes = sizes or Sizes()
    tick = Ticks(progress, 3 * 2 * (sizes.repeats + 1))
    target = resolve_device(device)
    return [_knn_sweep_ratio(sizes, target, tick), _kmeans_speedup(sizes, tick), probe_speedup(sizes, target, tick)]


def _knn_sweep_ratio(sizes: Sizes, device: torch.device, tick: Ticks) -> Row:
    """Time k-NN for ten values of k up to 200, relative to k = 10 alone; each runs its own search."""
    train = blobs(sizes.knn_train, sizes.knn_width, sizes.knn_classes, seed=0)
    test = blobs(sizes.knn_test, sizes.knn_width, sizes.knn_classes, seed=1)
    ways = [partial(knn, *train, *test, k=k, device=str(device)) for k in ((ONE_K,), SWEEP)]
    one_s, ten_s = median_seconds(ways, device, turns=sizes.repeats, tick=tick)
    row: Row = {"metric": "benchmark_knn_sweep_ratio", "value": ten_s / one_s, "one_s": one_s, "ten_s": ten_s}
    row |= {"train": sizes.knn_train, "test": sizes.knn_test}
    return row | {"width": sizes.knn_width, "classes": sizes.knn_classes}


def _kmeans_speedup(sizes: Sizes, tick: Ticks) -> Row:
    """Time many k-means runs in one process, relative to one process per core.

    Starting the processes, which happens once, is not counted.
    """
    x, y = blobs(sizes.kmeans_images, sizes.kmeans_width, sizes.kmeans_classes, seed=0)
    ways = [partial(cluster, x, y, runs=sizes.kmeans_runs, workers=workers) for workers in (1, own_cores())]
    one_s, all_s = median_seconds(ways, torch.device("cpu"), turns=sizes.repeats, tick=tick)
    row: Row = {"metric": "benchmark_kmeans_speedup", "value": one_s / all_s, "one_s": one_s, "all_s": all_s}
    row |= {"workers": own_cores(), "runs": sizes.kmeans_runs, "images": sizes.kmeans_images}
    return row | {"width": sizes.kmeans_width, "classes": sizes.kmeans_classes}


def probe_speedup(sizes: Sizes, device: torch.device, tick: Ticks | None = None) -> Row:
    """Time a step of 52 separate `nn.Linear`, each with its own SGD, relative to one ensemble of all of them.

    The ensemble saves the overhead of many small operations. It saves little where a few large ones take most of the
    time, as with many classes on a CPU.
    """
    generator = torch.Generator().manual_seed(0)
    widths = [factor * sizes.probe_width for factor in PROBE_WIDTHS]
    inputs = [torch.randn(sizes.probe_batch, width, generator=generator).to(device) for width in widths]
    labels = torch.randint(sizes.probe_classes, (sizes.probe_batch,), generator=generator).to(device)
    ensemble = ProbeEnsemble(widths, sizes.probe_classes, LEARNING_RATES, device=device)
    separate = [
        (x, linear, torch.optim.SGD(linear.parameters(), lr=lr, momentum=MOMENTUM))
        for x in inputs
        for lr in LEARNING_RATES
        for linear in (nn.Linear(x.shape[1], sizes.probe_classes).to(device),)
    ]

    def train_ensemble() -> None:
        for _ in range(sizes.probe_steps):
            ensemble.step(inputs, labels, 1.0)

    def train_separate() -> None:
        for _ in range(sizes.probe_steps):
            for x, linear, optimizer in separate:
                optimizer.zero_grad()
                F.cross_entropy(linear(x), labels).backward()
                optimizer.step()

    medians = median_seconds((train_ensemble, train_separate), device, turns=sizes.repeats, tick=tick)
    together_s, separate_s = (seconds / sizes.probe_steps for seconds in medians)
    row: Row = {"metric": "benchmark_probe_speedup", "value": separate_s / together_s}
    row |= {"together_s": together_s, "separate_s": separate_s, "classifiers": len(separate)}
    return row | {"batch": sizes.probe_batch, "width": sizes.probe_width, "classes": sizes.probe_classes}


def blobs(images: int, width: int, classes: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Draw overlapping classes around centres that do not depend on the seed."""
    centres = np.random.default_rng(0).standard_normal((classes, width), dtype=np.float32)
    rng = np.random.default_rng([1, seed])
    y = np.arange(images, dtype=np.int64) % classes
    return 0.3 * centres[y] + rng.standard_normal((images, width), dtype=np.float32), y
