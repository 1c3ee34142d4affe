"""A grid of classifiers, of which the best one counts, with a state file from which interrupted training resumes.

In DINOv2's protocol (Appendix C.3), 13 learning rates x {last block, last four blocks concatenated} x {CLS, CLS and
mean of the patch tokens} make 52 linear classifiers, trained at once: as published, on freshly augmented images, in
`augmented`; or on features of centre crops, which is many times faster, in `cached`. Attentive probes are a grid of
learning rates x inputs x numbers of queries.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimref.data.decode import BadImages
from mimref.data.labels import stratified_split
from mimref.distributed.group import world_size
from mimref.errors import ConfigError, DataError, DivergenceError
from mimref.evaluation.metrics import check_features, number_labels, show_class
from mimref.evaluation.probe.attentive import AttentiveEnsemble, TokenShape, attentive_schedule
from mimref.evaluation.probe.config import ATTENTIVE_ONLY, ProbeTrainingConfig
from mimref.evaluation.probe.ensemble import Batch, ProbeEnsemble, count_hits, schedule
from mimref.features.matrix import Labels, Matrix
from mimref.progress import Progress, ProgressOnly
from mimref.results import Row
from mimref.training.checkpoint import damaged_state, matching_state, write_state
from mimref.training.job import Job
from mimref.training.job import train as run_job
from mimref.training.signals import stop_signal

HELD_OUT = 0.1
"""Share of the training images on which `val-split` chooses the classifier."""
# Most logits or input values held at once while scoring: 128 MB in float32.
SCORE_ELEMENTS = 1 << 25


class ProbeInput(NamedTuple):
    """Features that classifiers read."""

    blocks: str
    """`last` or `last4`."""
    pool: str
    """`cls`, `mean` or `cls+mean`; for attentive probes `patch` or `cls+patch`."""

    def __str__(self) -> str:
        return f"{self.blocks} {self.pool}"


@dataclass(frozen=True)
class TestStream:
    """Test images that the encoder reads for scoring, because their features are too large to cache."""

    widths: Mapping[ProbeInput, int]
    """Values per image of every input."""
    batches: Callable[[Labels], Iterator[Batch]]
    """Returns batches of all images, given their labels (M,) as 0, 1, ..."""
    identity: Mapping[str, Any]
    """Everything that their features depend on."""


class ProbeGrid(Job[Batch]):
    """Trains classifiers and scores them, on batches that the caller supplies."""

    def __init__(
        self,
        settings: ProbeTrainingConfig,
        seed: int,
        train_y: Labels,
        test: Mapping[ProbeInput, Matrix] | TestStream,
        test_y: Labels,
        device: torch.device,
        *,
        shapes: Sequence[TokenShape] = (),
        state: Path | None = None,
        bad: BadImages | None = None,
    ) -> None:
        """test: features (M, D) of every input, or a stream of them, which also define the inputs and their widths.

        shapes: token shapes of the inputs of attentive probes. state: file from which interrupted training resumes.
        bad: records the training images that could not be read. Raises DataError for features, labels or classes that
        cannot be used, ConfigError for too small a batch.
        """
        self.settings, self.seed, self.test, self.file = settings, seed, test, state
        self.bad = bad or BadImages(0)
        self.label = f"{settings.kind} probes"
        if not test:
            raise DataError("test: there are no features; give those of at least one input")
        for key, x in () if isinstance(test, TestStream) else test.items():
            check_features(x, f"test ({key})", test_y)
        classes, self.labels, self._truth = number_labels(train_y, test_y)
        self.train_rows, self.held_rows = np.arange(len(train_y)), np.empty(0, dtype=np.int64)
        if settings.select == "val-split":
            check_held_out(classes, self.labels)
            self.train_rows, self.held_rows = stratified_split(self.labels, held_out=HELD_OUT)
        derived = max(default_batch(len(train_y)), 2 if settings.norm == "batch" else 1)
        self.batch = min(settings.batch_size or derived, len(self.train_rows))
        """Images per update; fewer training images than a batch form one smaller batch."""
        if settings.norm == "batch" and self.batch < 2:
            raise ConfigError("probe.norm 'batch' needs at least 2 images per update; raise probe.batch_size")
        # The last, partial batch of an epoch is left out.
        self.steps_per_epoch = len(self.train_rows) // self.batch
        self.total = settings.epochs * self.steps_per_epoch
        # In a group, rank 0 trains while the others encode for it: a signal cannot stop all of them at the same step.
        self.saves_every_epoch = world_size() > 1
        self.widths = dict(test.widths) if isinstance(test, TestStream) else widths_of(test)
        self.ensemble = self._build(len(classes), shapes, device)
        self.score_rows = max(1, SCORE_ELEMENTS // self.ensemble.elements)
        """Images scored at once."""

    def _build(
        self, classes: int, shapes: Sequence[TokenShape], device: torch.device
    ) -> ProbeEnsemble | AttentiveEnsemble:
        settings, seed = self.settings, self.seed
        rates = [lr * self.batch / 256 for lr in settings.lr]
        if settings.kind == "linear":
            widths = list(self.widths.values())
            return ProbeEnsemble(widths, classes, rates, norm=settings.norm, seed=seed, device=device)
        return AttentiveEnsemble(shapes, settings.queries, classes, rates, norm=settings.norm, seed=seed, device=device)

    def train(
        self, batches: Callable[[int], Iterator[Batch]], images: Callable[[], str], progress: Progress | None
    ) -> None:
        """Train on all batches, or resume where an earlier run stopped, with the same result bit for bit.

        batches: returns all batches from an update (0-based) on. images: returns the fingerprint of the training
        images, which identifies the state file. progress: receives the updates done and their total.
        """
        if self.file is not None:
            # Everything that the result depends on.
            unused = set(ATTENTIVE_ONLY) | {"kind"} if self.settings.kind == "linear" else None
            self.identity = self.settings.model_dump(exclude=unused) | {
                "inputs": described(self.widths),
                "batch_size": self.batch,
                "seed": self.seed,
                "set of images or encoder": images(),
            }
            self.load(self.file)
        if self.step == self.total:
            return
        with nullcontext() if self.file is None or world_size() > 1 else stop_signal() as stop:
            run_job(self, batches(self.step), ProgressOnly(progress), stop=stop)

    def update(self, batch: Batch) -> None:
        """Train on one batch; skip it if unreadable images leave fewer than batch statistics need."""
        inputs, labels = batch
        if len(labels) >= self.ensemble.smallest_batch:
            settings = self.settings
            if settings.kind == "linear":
                rates = schedule(self.step, self.total, settings.norm)
            else:
                rates = attentive_schedule(self.step, self.total)
            self.ensemble.step(inputs, labels, *rates)

    def save(self) -> None:
        """Write the state, if there is a file for it. The caller removes the file once the results are written."""
        if self.file is not None:
            tensors = self.ensemble.state_dict()
            content = {"settings": self.identity, "step": self.step, "ensemble": tensors, "bad": self.bad.items}
            write_state(self.file, content)

    def load(self, file: Path) -> None:
        """Resume from a state file, if it exists.

        Raises ConfigError for a file from other settings or images, OutputError for a damaged one.
        """
        try:
            if (saved := matching_state(file, self.identity, "probe")) is None:
                return
            step = int(saved["step"])
            self.ensemble.load_state_dict(saved["ensemble"])
            self.bad.add_all(saved.get("bad", []))  # missing in states of older versions
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise damaged_state(file, "probe") from error
        self.step = step

    def rows(self, protocol: Literal["cached", "streamed", "augmented"], held: Iterable[Batch]) -> list[Row]:
        """Return the best classifier's row, then one per classifier; see `probe_cached`. held: the held-out images.

        Raises DivergenceError if no classifier has finite weights.
        """
        finite = self.ensemble.finite().cpu().numpy()
        if not finite.any():
            raise DivergenceError(
                "every classifier of the probe has diverged; lower probe.lr, use probe.norm=batch or --precision fp32"
            )
        settings = self.settings
        attentive = settings.kind == "attentive"
        counts = [{"queries": count} for count in settings.queries] if attentive else [Row()]
        members = [(key, count, lr) for key in self.widths for count in counts for lr in settings.lr]
        honest = settings.select == "val-split"
        on_test = score(self.ensemble, self._test_batches(), "test")
        on_held = score(self.ensemble, held, "held-out part of train") if honest else on_test
        best = int(np.where(finite, on_held, -1.0).argmax())

        def row(number: int, more: Row) -> Row:
            """Return the accuracy and settings of one classifier, counted from 0."""
            key, count, lr = members[number]
            return {
                "metric": "attentive_top1" if attentive else "probe_top1",
                "value": float(on_test[number]),
                **({"held_out_top1": float(on_held[number])} if honest else {}),
                **more,
                "blocks": key.blocks,
                "pool": key.pool,
                **count,
                "lr": lr,
                "epochs": settings.epochs,
                "batch_size": self.batch,
                "norm": settings.norm,
                "protocol": protocol,
            }

        grid = [row(number, {"classifier": number + 1}) for number in range(len(self.ensemble))]
        return [row(best, {"select": settings.select}), *grid]

    def _test_batches(self) -> Iterator[Batch]:
        if isinstance(self.test, TestStream):
            yield from self.test.batches(self._truth)
            return
        for start in range(0, len(self._truth), self.score_rows):
            rows = slice(start, start + self.score_rows)
            yield [to_tensor(x[rows]) for x in self.test.values()], torch.from_numpy(self._truth[rows])


def default_batch(images: int) -> int:
    """Return 1024 images per update, as published; below 10,240, a power of two with ten or more updates per epoch."""
    return min(1024, 1 << max(images // 10, 1).bit_length() - 1)


def widths_of(features: Mapping[ProbeInput, Matrix]) -> dict[ProbeInput, int]:
    """Return the number of values per image of every input."""
    return {key: x.shape[-1] for key, x in features.items()}


def described(widths: Mapping[ProbeInput, int]) -> list[str]:
    """Return descriptions of the inputs with their widths."""
    return [f"{key} ({width} wide)" for key, width in widths.items()]


def fingerprint(features: Mapping[ProbeInput, Matrix], labels: Labels) -> str:
    """Return a short hash of labels (N,) and 256 rows of every matrix, which identifies a saved state."""
    digest = hashlib.sha256(np.ascontiguousarray(labels).data)
    for x in features.values():
        rows = np.unique(np.linspace(0, len(x) - 1, 256).astype(np.int64))
        digest.update(f"{x.shape} {x.dtype}".encode())
        digest.update(np.ascontiguousarray(x[rows]).data)
    return digest.hexdigest()[:16]


def to_tensor(rows: NDArray[Any]) -> Tensor:
    """Return rows of a matrix as a floating-point tensor; rows of a read-only array are copied."""
    dtype = rows.dtype if rows.dtype.kind == "f" else np.dtype(np.float32)
    return torch.from_numpy(rows.astype(dtype, order="C", copy=not rows.flags.writeable))


def check_held_out(classes: Labels, labels: Labels, names: Sequence[str] | None = None) -> None:
    """Raise DataError if no stratified tenth can be held out. names: class names by label, for the message."""
    counts = np.bincount(labels)
    if counts.min() < 2:
        rare = show_class(classes[counts.argmin()], names)
        raise DataError(
            f"class {rare} has only one training image, so select = 'val-split' cannot hold one out; add images, or "
            "use select = 'test'"
        )
    held = int(np.ceil(HELD_OUT * len(labels)))
    if held < len(classes):
        raise DataError(
            f"select = 'val-split' would hold out {held} of {len(labels)} training images, fewer than the "
            f"{len(classes)} classes; add images, or use select = 'test'"
        )


def score(ensemble: ProbeEnsemble | AttentiveEnsemble, batches: Iterable[Batch], name: str) -> NDArray[np.float64]:
    """Return the top-1 accuracy of every classifier in percent, (K,); that of a diverged one is 0.

    name: the images' name, for the message. Raises DataError if there are no images.
    """
    hits = torch.zeros(len(ensemble), dtype=torch.int64, device=ensemble.device)
    count = 0
    for inputs, labels in batches:
        hits += count_hits(ensemble.logits(inputs), labels)
        count += len(labels)
    if not count:
        raise DataError(f"{name}: no readable image")
    accuracy: NDArray[np.float64] = np.where(ensemble.finite().cpu().numpy(), 100.0 * hits.cpu().numpy() / count, 0.0)
    return accuracy
