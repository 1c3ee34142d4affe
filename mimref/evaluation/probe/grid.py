"""Linear probing by DINOv2's protocol (Appendix C.3): a grid of linear classifiers, of which the best one counts.

13 learning rates x {last block, last four blocks concatenated} x {CLS, CLS and mean of the patch tokens} are 52
classifiers, trained at once: here on cached features of centre crops, which is many times faster; as published, on
freshly augmented images, in `mimref.evaluation.probe.augmented`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimref.config.load import validated
from mimref.data.labels import stratified_split
from mimref.devices import resolve_device
from mimref.draws import permutation
from mimref.errors import ConfigError, DataError, DivergenceError
from mimref.evaluation.metrics import check_classes, check_features, class_indices, row_blocks
from mimref.evaluation.probe.config import LEARNING_RATES, ProbeTrainingConfig
from mimref.evaluation.probe.ensemble import Batch, Norm, ProbeEnsemble, Schedule, score
from mimref.evaluation.probe.training import ProbeJob
from mimref.features.matrix import Labels, Matrix
from mimref.progress import Progress
from mimref.results import Row

HELD_OUT = 0.1
"""Share of the training images that `val-split` chooses the classifier on."""
# Training features of one input below this size stay on the device.
HELD_BYTES = 2 << 30
# Most logits or input values that scoring holds at once: 128 MB in float32.
SCORE_ELEMENTS = 1 << 25
# Rows of every matrix that identify a saved state.
FINGERPRINT_ROWS = 256


class ProbeInput(NamedTuple):
    """Features that classifiers read."""

    blocks: str
    """`last` or `last4`."""
    pool: str
    """`cls`, `mean` or `cls+mean`."""


class ProbeRun:
    """One grid of classifiers: which images train it, choose from it and test it, wherever batches come from."""

    def __init__(
        self,
        settings: ProbeTrainingConfig,
        seed: int,
        train_y: Labels,
        test: Mapping[ProbeInput, Matrix],
        test_y: Labels,
        device: torch.device,
    ) -> None:
        """test: features (M, D) of every input, which also define the inputs and their widths.

        Raises DataError for features, labels or classes that cannot be used, ConfigError for too small a batch.
        """
        self.settings, self.seed, self.test = settings, seed, test
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
        self.batch = min(settings.batch_size or default_batch(len(train_y)), count)
        """Images per update; fewer training images than a batch are one smaller batch."""
        if settings.norm == "batch" and self.batch < 2:
            raise ConfigError("probe.norm 'batch' needs at least 2 images per update; raise probe.batch_size")
        self.per_epoch = count // self.batch
        """Updates per epoch; the last, partial batch is left out."""
        self.total = settings.epochs * self.per_epoch
        widths = [x.shape[1] for x in test.values()]
        rates = [lr * self.batch / 256 for lr in settings.lr]
        self.ensemble = ProbeEnsemble(widths, len(classes), rates, norm=settings.norm, seed=seed, device=device)
        self.score_rows = max(1, SCORE_ELEMENTS // max(len(self.ensemble) * len(classes), sum(widths)))
        """Images to score at once."""

    def train(
        self, batches: Callable[[int], Iterator[Batch]], images: str, state: Path | None, progress: Progress | None
    ) -> None:
        """Train all classifiers, with `state` from where an earlier run stopped.

        batches: gives all batches from an update (0-based) on. images: fingerprint of the training images.
        """
        settings = self.settings
        identity: dict[str, Any] = {
            "inputs": [f"{key.blocks} {key.pool} ({x.shape[1]} wide)" for key, x in self.test.items()],
            "lrs": list(settings.lr),
            "epochs": settings.epochs,
            "batch_size": self.batch,
            "norm": settings.norm,
            "select": settings.select,
            "seed": self.seed,
            "set of images or encoder": images,
        }
        schedule = Schedule(self.total, settings.norm)
        ProbeJob(self.ensemble, schedule, self.per_epoch, state, identity).run(batches, progress)

    def rows(self, protocol: Literal["cached", "augmented"], held: Iterable[Batch]) -> list[Row]:
        """The best classifier's row and one per classifier, see `probe_cached`. held: the held-out images.

        Raises DivergenceError when no classifier has finite weights.
        """
        finite = self.ensemble.finite().cpu().numpy()
        if not finite.any():
            raise DivergenceError(
                "every classifier of the probe has diverged; lower probe.lr, use probe.norm=batch or --precision fp32"
            )
        settings, keys = self.settings, list(self.test)
        honest = settings.select == "val-split"
        on_test = score(self.ensemble, self._test_batches(), "test")
        on_held = score(self.ensemble, held, "held-out part of train") if honest else on_test
        best = int(np.where(finite, on_held, -1.0).argmax())
        rates = len(settings.lr)

        def row(number: int, more: Row) -> Row:
            """Accuracy and settings of one classifier, counted from 0."""
            key = keys[number // rates]
            return {
                "metric": "probe_top1",
                "value": float(on_test[number]),
                **({"held_out_top1": float(on_held[number])} if honest else {}),
                **more,
                "blocks": key.blocks,
                "pool": key.pool,
                "lr": settings.lr[number % rates],
                "epochs": settings.epochs,
                "batch_size": self.batch,
                "norm": settings.norm,
                "protocol": protocol,
            }

        grid = [row(number, {"classifier": number + 1}) for number in range(len(self.ensemble))]
        return [row(best, {"select": settings.select}), *grid]

    def _test_batches(self) -> Iterator[Batch]:
        for start in range(0, len(self._truth), self.score_rows):
            rows = slice(start, start + self.score_rows)
            yield [_tensor(x[rows]) for x in self.test.values()], torch.from_numpy(self._truth[rows])


def probe_cached(
    train: Mapping[ProbeInput, Matrix],
    train_y: Labels,
    test: Mapping[ProbeInput, Matrix],
    test_y: Labels,
    *,
    lrs: Sequence[float] = LEARNING_RATES,
    epochs: int = 50,
    batch_size: int = 1024,
    norm: Norm = "none",
    select: Literal["test", "val-split"] = "test",
    seed: int = 0,
    device: str = "cpu",
    state: Path | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Top-1 accuracy in percent of the best of all classifiers, trained on features of unchanged images.

    train, test: (N, D) and (M, D) of every input, D its own; read by rows, and kept on the device if smaller than 2 GB.
    Labels are any whole numbers. lrs are scaled by batch / 256. The last, partial batch of an epoch is left out, and
    fewer images than a batch are one smaller batch. norm: "none" is DINOv2's probe, "batch" that of the paper's
    released code (see `Schedule`). select: "test" is the published choice, on the test images; "val-split" holds out a
    fixed, stratified tenth of the training images, chooses on them and trains on the rest.
    Rows, all `probe_top1`: first the best one's, with `select`; then one per classifier, numbered by `classifier` from
    1 (inputs in the order of `train`, lrs for each). Under "val-split" all have `held_out_top1`. Of equal classifiers
    the first counts; one that has diverged scores 0 and is never chosen.
    state: a file from which an interrupted probe continues, bit for bit on the CPU. It stays at the end, so that
    results that could not be written are not lost; the caller removes it.
    Raises ConfigError for settings, and for a state of other ones; DataError for features and labels that cannot be
    used; OutputError for a state that is damaged or cannot be written; DivergenceError when no classifier is left.
    """
    values = {"lr": [float(lr) for lr in lrs], "epochs": epochs, "batch_size": batch_size}
    settings = validated(ProbeTrainingConfig, values | {"norm": norm, "select": select})
    return probe_matrices(train, train_y, test, test_y, settings, seed, device, state, progress)


def probe_matrices(
    train: Mapping[ProbeInput, Matrix],
    train_y: Labels,
    test: Mapping[ProbeInput, Matrix],
    test_y: Labels,
    settings: ProbeTrainingConfig,
    seed: int,
    device: str,
    state: Path | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """`probe_cached` with the settings as one object."""
    for key, x in train.items():
        check_features(x, _named("train", key), train_y)
    _check_inputs(train, test)
    target = resolve_device(device)
    run = ProbeRun(settings, seed, train_y, {key: test[key] for key in train}, test_y, target)
    readers = [_reader(x, target) for x in train.values()]

    def read(rows: Labels) -> Batch:
        return [reader(rows) for reader in readers], torch.from_numpy(run.labels[rows])

    def batches(first: int) -> Iterator[Batch]:
        """In an order that depends on (seed, epoch) only."""
        for update in range(first, run.total):
            epoch, number = divmod(update, run.per_epoch)
            if number == 0 or update == first:
                order = run.train_rows[permutation(seed, epoch, len(run.train_rows)).numpy()]
            # Sorted, because a file is read faster in its own order.
            yield read(np.sort(order[number * run.batch : (number + 1) * run.batch]))

    run.train(batches, "" if state is None else fingerprint(train, run.labels), state, progress)
    held = (run.held_rows[start : start + run.score_rows] for start in range(0, len(run.held_rows), run.score_rows))
    return run.rows("cached", map(read, held))


def default_batch(images: int) -> int:
    """The published 1024 images per update; for fewer than 10,240 a power of two that gives ten updates per epoch."""
    return min(1024, 1 << max(images // 10, 1).bit_length() - 1)


def _check_inputs(train: Mapping[ProbeInput, Matrix], test: Mapping[ProbeInput, Matrix]) -> None:
    """Raise DataError unless both have the same inputs of the same widths."""
    if set(train) != set(test):
        ours, theirs = (", ".join(sorted(" ".join(key) for key in keys)) or "nothing" for keys in (train, test))
        raise DataError(f"train features are of {ours}, test features of {theirs}; give both of the same inputs")
    for key, x in train.items():
        widths = x.shape[-1], test[key].shape[-1]
        if widths[0] != widths[1]:
            raise DataError(f"{_named('train', key)}: features are {widths[0]} wide, test features {widths[1]}")


def fingerprint(features: Mapping[ProbeInput, Matrix], labels: Labels) -> str:
    """A short hash over labels (N,) and some rows of every matrix, which identifies a saved state."""
    digest = hashlib.sha256(np.ascontiguousarray(labels).data)
    for x in features.values():
        rows = np.unique(np.linspace(0, len(x) - 1, FINGERPRINT_ROWS).astype(np.int64))
        digest.update(f"{x.shape} {x.dtype}".encode())
        digest.update(np.ascontiguousarray(x[rows]).data)
    return digest.hexdigest()[:16]


def _named(split: str, key: ProbeInput) -> str:
    return f"{split} ({key.blocks} {key.pool})"


def _check_split(classes: Labels, labels: Labels) -> None:
    """Raise DataError when no stratified tenth can be held out."""
    counts = np.bincount(labels)
    if counts.min() < 2:
        raise DataError(
            f"class {classes[counts.argmin()]} has only one training image, so select = 'val-split' cannot hold one "
            "out; add images, or use select = 'test'"
        )
    held = int(np.ceil(HELD_OUT * len(labels)))
    if held < len(classes):
        raise DataError(
            f"select = 'val-split' would hold out {held} of {len(labels)} training images, fewer than the "
            f"{len(classes)} classes; add images, or use select = 'test'"
        )


def _tensor(rows: NDArray[Any]) -> Tensor:
    """Rows of a matrix as a floating-point tensor; those of a read-only array are copied."""
    dtype = rows.dtype if rows.dtype.kind == "f" else np.dtype(np.float32)
    return torch.from_numpy(rows.astype(dtype, order="C", copy=not rows.flags.writeable))


def _reader(x: Matrix, device: torch.device) -> Callable[[Labels], Tensor]:
    """Reads rows of a matrix, from a copy on the device if that is small enough."""
    dtype = x.dtype if x.dtype.kind == "f" else np.dtype(np.float32)
    if x.shape[0] * x.shape[1] * dtype.itemsize > HELD_BYTES:
        return lambda rows: _tensor(x[rows])
    held = torch.empty(x.shape, dtype=_tensor(np.empty(0, dtype)).dtype, device=device)
    for block in row_blocks(x):
        held[block] = _tensor(x[block]).to(device)
    return lambda rows: held[torch.from_numpy(rows).to(device, non_blocking=True)]
