"""Benchmarks of the evaluations: neighbour search against alternatives, and the probe's classifiers."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray

from mimref.benchmarks.evaluations import Sizes, blobs, probe_speedup
from mimref.benchmarks.measure import median_seconds
from mimref.benchmarks.suite.lines import Found
from mimref.devices import resolve_device
from mimref.evaluation.knn.protocol import Neighbours, find_neighbours, knn_accuracy

K = 20
TAU = 0.07
_CLASSES = 100


def knn_exact(device: str, *, line: str, train: int, test: int, width: int) -> Iterator[Found]:
    """Measure by how many points of accuracy k-NN on the device differs from a NumPy search in float64."""
    (train_x, train_y), (test_x, test_y) = (
        blobs(images, width, _CLASSES, seed=seed) for seed, images in enumerate((train, test))
    )
    found = knn_accuracy(train_x, train_y, test_x, test_y, k=K, tau=TAU, device=device)
    expected = _plain_accuracy(train_x, train_y, test_x, test_y)
    note = f"{found:.2f}% and {expected:.2f}% of {test:,} queries among {train:,} x {width}"
    yield Found(line, abs(found - expected), note, _setting(train, test, width))


def _plain_accuracy(
    train_x: NDArray[np.float32], train_y: NDArray[np.int64], test_x: NDArray[np.float32], test_y: NDArray[np.int64]
) -> float:
    mean, std = train_x.mean(0, dtype=np.float64), train_x.std(0, dtype=np.float64)
    unit = [(x - mean) / std for x in (train_x, test_x)]
    keys, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in unit)
    similarity = queries @ keys.T
    nearest = np.argpartition(-similarity, K, axis=1)[:, :K]
    weight = np.exp(np.take_along_axis(similarity, nearest, 1) / TAU)
    votes = np.zeros((len(test_y), _CLASSES))
    np.add.at(votes, (np.arange(len(test_y))[:, None], train_y[nearest]), weight)
    return 100 * float(np.mean(votes.argmax(1) == test_y))


def knn_speedup(device: str, *, line: str, train: int, test: int, width: int) -> Iterator[Found]:
    """Measure how many times as fast the search is on the device as on the CPU."""
    ways, target = _searches(train, test, width, ("cpu", device)), resolve_device(device)
    on_cpu_s, on_device_s = median_seconds(ways, torch.device("cpu"), turns=2)
    note = f"{on_device_s:.2f} s on {target.type}, {on_cpu_s:.2f} s on the CPU with {torch.get_num_threads()} threads"
    yield Found(line, on_cpu_s / on_device_s, note, _setting(train, test, width))


def knn_faiss(device: str, *, line: str, train: int, test: int, width: int) -> Iterator[Found]:
    """Measure how many times as fast the search is as faiss's exact one on the same device, if installed."""
    if find_spec("faiss") is None:
        yield Found(line, None, "faiss is not installed (pip install faiss-cpu, or faiss-gpu-cu12)")
        return
    import faiss  # type: ignore[import-not-found,unused-ignore]

    keys, queries = (blobs(images, width, _CLASSES, seed=seed)[0] for seed, images in enumerate((train, test)))
    on_gpu = device == "cuda" and getattr(faiss, "get_num_gpus", lambda: 0)() > 0

    def search() -> None:
        index = faiss.IndexFlatIP(width)
        if on_gpu:
            index = faiss.index_cpu_to_all_gpus(index)
        index.add(keys)
        index.search(queries, K)

    (ours,) = _searches(train, test, width, (device,))
    ours_s, theirs_s = median_seconds([ours, search], torch.device("cpu"), turns=2)
    note = f"{ours_s:.2f} s, faiss {theirs_s:.2f} s on the {'GPU' if on_gpu else 'CPU'}"
    yield Found(line, theirs_s / ours_s, note, _setting(train, test, width))


def _searches(train: int, test: int, width: int, devices: tuple[str, ...]) -> list["partial[Neighbours]"]:
    """Return a search for K neighbours on each device, without standardising; each waits for its result."""
    keys, queries = (blobs(images, width, _CLASSES, seed=seed)[0] for seed, images in enumerate((train, test)))
    return [partial(find_neighbours, keys, queries, k=K, standardize=False, device=device) for device in devices]


def _setting(train: int, test: int, width: int) -> dict[str, str | int | float]:
    return {"train": train, "test": test, "width": width, "k": K}


def probes(device: str, *, line: str, width: int, classes: int, steps: int) -> Iterator[Found]:
    """Measure how many times as fast 52 classifiers are in one module as in 52 modules."""
    sizes = replace(Sizes(), probe_width=width, probe_classes=classes, probe_steps=steps)
    row = probe_speedup(sizes, resolve_device(device))
    note = f"{1e3 * float(row['together_s']):.2f} ms together, {1e3 * float(row['separate_s']):.2f} ms one by one"
    yield Found(
        line, float(row["value"]), note, {key: row[key] for key in ("classifiers", "batch", "width", "classes")}
    )
