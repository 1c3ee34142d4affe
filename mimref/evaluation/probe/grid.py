"""Linear probing by DINOv2's protocol (Appendix C.3): a grid of linear classifiers, of which the best one counts.

13 learning rates x {last block, last four blocks concatenated} x {CLS, CLS and mean of the patch tokens} are 52
classifiers, trained at once: here on cached features of centre crops, which is many times faster; as published, on
freshly augmented images, in `mimref.evaluation.probe.augmented`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimref.data.splits import stratified_split
from mimref.devices import resolve_device
from mimref.draws import permutation
from mimref.errors import ConfigError, DataError, DivergenceError
from mimref.evaluation.metrics import check_classes, check_features, class_indices, row_blocks
from mimref.evaluation.probe.ensemble import (
    Batch,
    Norm,
    ProbeEnsemble,
    ProbeState,
    Schedule,
    Setting,
    check_lrs,
    score,
    train_probe,
)
from mimref.features.matrix import Matrix
from mimref.progress import Progress
from mimref.results import Row

LEARNING_RATES = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""DINOv2's grid, for a batch of 256 images."""
HELD_OUT = 0.1
"""Share of the training images that `val-split` chooses the classifier on."""
# Training features of one input below this size stay on the device.
HELD_BYTES = 2 << 30
# Logits or inputs that scoring holds at once: 128 MB in float32.
SCORE_ELEMENTS = 1 << 25
# Rows of every matrix that a state is recognised by.
FINGERPRINT_ROWS = 256

Select = Literal["test", "val-split"]
Indices = NDArray[np.int64]


class ProbeInput(NamedTuple):
    """Features that classifiers read."""

    blocks: str
    """`last` or `last4`."""
    pool: str
    """`cls`, `mean` or `cls+mean`."""


@dataclass(frozen=True)
class ProbeSettings:
    """How a grid of classifiers is trained and which of them counts. Raises ConfigError for what cannot be."""

    lrs: tuple[float, ...] = LEARNING_RATES
    """Learning rates, scaled by batch / 256."""
    epochs: int = 50
    batch_size: int = 1024
    norm: Norm = "none"
    """See `ProbeEnsemble` and `Schedule`."""
    select: Select = "test"
    """Images that the best classifier is chosen on: the test images, or a tenth of the training images."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_lrs(self.lrs)
        if self.norm not in ("none", "batch"):
            raise ConfigError(f"norm = {self.norm!r}: expected none or batch")
        if self.select not in ("test", "val-split"):
            raise ConfigError(f"select = {self.select!r}: expected test or val-split")
        if self.epochs < 1:
            raise ConfigError(f"epochs = {self.epochs}: give at least 1")
        smallest = 2 if self.norm == "batch" else 1
        if self.batch_size < smallest:
            raise ConfigError(f"batch_size = {self.batch_size}: with norm = {self.norm!r} give at least {smallest}")


class ProbeRun:
    """One grid of classifiers: which images train it, choose from it and test it. Where batches come from is open."""

    def __init__(
        self,
        settings: ProbeSettings,
        train_y: Indices,
        test: Mapping[ProbeInput, Matrix],
        test_y: Indices,
        device: torch.device,
    ) -> None:
        """test: features (M, D) of every input, which is also what tells the inputs and their widths.

        Raises DataError for features, labels or classes that cannot be used.
        """
        self.settings, self.test = settings, test
        if not test:
            raise DataError("test: there are no features; give those of at least one input")
        for key, x in test.items():
            check_features(x, _named("test", key), test_y)
        classes = check_classes(train_y, "train")
        self.labels = class_indices(classes, train_y, "train")
        """(N,) of all training images, counted from 0 without gaps."""
        self._truth = class_indices(classes, test_y, "test")
        self.train_rows, self.held_rows = np.arange(len(train_y)), np.empty(0, dtype=np.int64)
        if settings.select == "val-split":
            _check_split(classes, self.labels)
            self.train_rows, self.held_rows = stratified_split(self.labels, held_out=HELD_OUT)
        count = len(self.train_rows)
        self.batch = min(settings.batch_size, count)
        """Images per update: fewer training images than a batch are one smaller batch."""
        self.per_epoch = count // self.batch
        """Updates per epoch; the last, partial batch is left out."""
        self.ensemble = ProbeEnsemble(
            self.widths,
            len(classes),
            [lr * self.batch / 256 for lr in settings.lrs],
            norm=settings.norm,
            seed=settings.seed,
            device=device,
        )
        self.score_rows = max(1, SCORE_ELEMENTS // max(len(self.ensemble) * len(classes), sum(self.widths)))
        """Images to score at once."""

    @property
    def widths(self) -> list[int]:
        """D of every input."""
        return [x.shape[1] for x in self.test.values()]

    @property
    def total(self) -> int:
        """Updates."""
        return self.settings.epochs * self.per_epoch

    def train(
        self, batches: Callable[[int], Iterator[Batch]], images: str, state: Path | None, progress: Progress | None
    ) -> None:
        """Train all classifiers; see `train_probe`. images: fingerprint of the training images."""
        file = None if state is None else ProbeState(state, self._identity(images))
        schedule = Schedule(self.total, self.settings.norm)
        train_probe(self.ensemble, batches, schedule, state=file, progress=progress)

    def rows(self, protocol: Literal["cached", "augmented"], held: Iterable[Batch]) -> list[Row]:
        """The best classifier's row and one per classifier, as `probe_cached` says. held: the held-out images.

        Raises DivergenceError when no classifier has finite weights.
        """
        finite = self.ensemble.finite().cpu().numpy()
        if not finite.any():
            raise DivergenceError(
                "every classifier of the probe has diverged; lower lrs, use norm = 'batch' or --precision fp32"
            )
        honest = self.settings.select == "val-split"
        on_test = score(self.ensemble, self._test_batches(), "test")
        on_held = score(self.ensemble, held, "held-out part of train") if honest else on_test
        best = int(np.where(finite, on_held, -1.0).argmax())
        shared: Row = {"epochs": self.settings.epochs, "batch_size": self.batch, "norm": self.settings.norm}

        def row(number: int, more: Row) -> Row:
            key = list(self.test)[number // len(self.settings.lrs)]
            where: Row = {"blocks": key.blocks, "pool": key.pool}
            where["lr"] = self.settings.lrs[number % len(self.settings.lrs)]
            values: Row = {"metric": "probe_top1", "value": float(on_test[number])}
            held_out: Row = {"held_out_top1": float(on_held[number])} if honest else {}
            return values | held_out | more | where | shared | {"protocol": protocol}

        grid = [row(number, {"classifier": number + 1}) for number in range(len(self.ensemble))]
        return [row(best, {"select": self.settings.select}), *grid]

    def _test_batches(self) -> Iterator[Batch]:
        for start in range(0, len(self._truth), self.score_rows):
            rows = slice(start, start + self.score_rows)
            yield [_tensor(x[rows]) for x in self.test.values()], torch.from_numpy(self._truth[rows])

    def _identity(self, images: str) -> dict[str, Setting]:
        """What the trained classifiers depend on."""
        settings = self.settings
        names = [f"{key.blocks} {key.pool} ({x.shape[1]} wide)" for key, x in self.test.items()]
        identity: dict[str, Setting] = {"inputs": names, "lrs": list(settings.lrs), "epochs": settings.epochs}
        identity |= {"batch_size": self.batch, "norm": settings.norm, "select": settings.select, "seed": settings.seed}
        return identity | {"set of images or encoder": images}


def probe_cached(
    train: Mapping[ProbeInput, Matrix],
    train_y: Indices,
    test: Mapping[ProbeInput, Matrix],
    test_y: Indices,
    *,
    lrs: Sequence[float] = LEARNING_RATES,
    epochs: int = 50,
    batch_size: int = 1024,
    norm: Norm = "none",
    select: Select = "test",
    seed: int = 0,
    device: str = "cpu",
    state: Path | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Top-1 accuracy in percent of the best of all classifiers, trained on features of unchanged images.

    train, test: (N, D) and (M, D) of every input, D its own; read by rows, and kept on the device where smaller than
    2 GB. Labels are any whole numbers. lrs are scaled by batch / 256; the last, partial batch of an epoch is left out,
    and fewer images than a batch are one smaller batch. norm: "none" is DINOv2's probe, "batch" that of the paper's
    released code (see `Schedule`). select: "test" is the published choice, on the test images; "val-split" holds out a
    fixed, stratified tenth of the training images, chooses on them and trains on the rest.
    Rows, all `probe_top1`: first the best one's, with `select`; then one per classifier, numbered by `classifier` from
    1 (inputs in the order of `train`, lrs for each). Under "val-split" all have `held_out_top1`. Of equal classifiers
    the first counts; one that has diverged scores 0 and is never chosen.
    state: a file to continue from after an interruption, bit for bit on the CPU. It is kept at the end, so that results
    that could not be written are not lost; the caller removes it.
    Raises ConfigError for settings, and for a state of other ones; DataError for features and labels that cannot be
    used; OutputError for a state that is damaged or cannot be written; DivergenceError when no classifier is left.
    """
    settings = ProbeSettings(tuple(lrs), epochs, batch_size, norm, select, seed)
    for key, x in train.items():
        check_features(x, _named("train", key), train_y)
    check_inputs({key: x.shape[1] for key, x in train.items()}, test)
    target = resolve_device(device)
    run = ProbeRun(settings, train_y, {key: test[key] for key in train}, test_y, target)
    source = _Cached(run, train, target)
    run.train(source.batches, "" if state is None else fingerprint(train, run.labels), state, progress)
    return run.rows("cached", source.held_out())


class _Cached:
    """Batches of cached training features."""

    def __init__(self, run: ProbeRun, features: Mapping[ProbeInput, Matrix], device: torch.device) -> None:
        self.run = run
        self._readers = [_reader(x, device) for x in features.values()]

    def _read(self, rows: Indices) -> Batch:
        return [reader(rows) for reader in self._readers], torch.from_numpy(self.run.labels[rows])

    def batches(self, first: int) -> Iterator[Batch]:
        """All training batches from an update on, in an order that depends on (seed, epoch) alone."""
        run, settings = self.run, self.run.settings
        first_epoch, skip = divmod(first, run.per_epoch)
        for epoch in range(first_epoch, settings.epochs):
            order = run.train_rows[permutation(settings.seed, epoch, len(run.train_rows)).numpy()]
            for number in range(skip if epoch == first_epoch else 0, run.per_epoch):
                # Sorted, because a file is read faster in its own order.
                yield self._read(np.sort(order[number * run.batch : (number + 1) * run.batch]))

    def held_out(self) -> Iterator[Batch]:
        """The held-out images."""
        rows, size = self.run.held_rows, self.run.score_rows
        for start in range(0, len(rows), size):
            yield self._read(rows[start : start + size])


def default_batch(images: int) -> int:
    """The published 1024 images per update; for fewer than 10,240 a power of two that gives ten updates per epoch."""
    return min(1024, 1 << max(images // 10, 1).bit_length() - 1)


def check_inputs(widths: Mapping[ProbeInput, int], test: Mapping[ProbeInput, Matrix]) -> None:
    """Raise DataError unless the test features are of the same inputs, of the same widths, as the training ones."""
    if set(widths) != set(test):
        ours, theirs = (", ".join(sorted(" ".join(key) for key in keys)) or "nothing" for keys in (widths, test))
        raise DataError(f"train features are of {ours}, test features of {theirs}; give both of the same inputs")
    for key, width in widths.items():
        if width != test[key].shape[-1]:
            raise DataError(
                f"{_named('train', key)}: features are {width} wide, test features {test[key].shape[-1]}; "
                "use one encoder"
            )


def fingerprint(features: Mapping[ProbeInput, Matrix], labels: Indices) -> str:
    """A short hash over labels (N,) and some rows of every matrix, to tell that a state is of other ones."""
    digest = hashlib.sha256(np.ascontiguousarray(labels).data)
    for x in features.values():
        rows = np.unique(np.linspace(0, len(x) - 1, FINGERPRINT_ROWS).astype(np.int64))
        digest.update(f"{x.shape} {x.dtype}".encode())
        digest.update(np.ascontiguousarray(x[rows]).data)
    return digest.hexdigest()[:16]


def _named(split: str, key: ProbeInput) -> str:
    return f"{split} ({key.blocks} {key.pool})"


def _check_split(classes: Indices, labels: Indices) -> None:
    """Raise DataError when no stratified tenth can be held out."""
    counts = np.bincount(labels)
    if counts.min() < 2:
        raise DataError(
            f"class {classes[counts.argmin()]} has only one training image, so select = 'val-split' can hold none out; "
            "add images, or use select = 'test'"
        )
    held = int(np.ceil(HELD_OUT * len(labels)))
    if held < len(classes):
        raise DataError(
            f"select = 'val-split' would hold out {held} of {len(labels)} training images, fewer than the "
            f"{len(classes)} classes; add images, or use select = 'test'"
        )


def _tensor(rows: NDArray[Any]) -> Tensor:
    """Rows of a matrix as a tensor of float type; those of a read-only array are copied."""
    dtype = rows.dtype if rows.dtype.kind == "f" else np.dtype(np.float32)
    return torch.from_numpy(rows.astype(dtype, order="C", copy=not rows.flags.writeable))


def _reader(x: Matrix, device: torch.device) -> Callable[[Indices], Tensor]:
    """Reads rows of a matrix: from a copy on the device where that is small enough, else from the matrix itself."""
    dtype = x.dtype if x.dtype.kind == "f" else np.dtype(np.float32)
    if x.shape[0] * x.shape[1] * dtype.itemsize > HELD_BYTES:
        return lambda rows: _tensor(x[rows])
    held = torch.empty(x.shape, dtype=_tensor(np.empty(0, dtype)).dtype, device=device)
    for block in row_blocks(x):
        held[block] = _tensor(x[block]).to(device)
    return lambda rows: held[torch.from_numpy(rows).to(device, non_blocking=True)]
