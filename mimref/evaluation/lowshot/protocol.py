"""Low-shot classification: logistic regression on a few labelled images per class (Appendix C.5)."""

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from mimref.data.decode import printable
from mimref.data.sources import ImageSource
from mimref.distributed.group import end_group
from mimref.errors import Checks, ConfigError, DataError
from mimref.evaluation.lowshot.config import LowshotConfig
from mimref.evaluation.lowshot.split_files import read_split_files
from mimref.evaluation.metrics import (
    check_labels,
    check_splits,
    labelled_pair,
    name_classes,
    percent,
    progress_label,
    row_blocks,
    show_class,
    spread,
)
from mimref.features.inputs import column_groups, prepare_groups
from mimref.features.matrix import Labels, Matrix
from mimref.features.opening import open_inputs
from mimref.progress import Listener, Progress, Silent
from mimref.results import EvaluationResult, Row, named

# The protocol of MSN and DINO: lambda = LAMBDA / (number of training images).
LAMBDA = 0.00025
TOLERANCE = 1e-3
METRIC = "lowshot_top1"


def evaluate_lowshot(
    config: LowshotConfig, *, listener: Listener | None = None, checks: Checks | None = None
) -> EvaluationResult:
    """Evaluate the chosen blocks by low-shot logistic regression.

    Rows are those of `lowshot`, with `model`, `blocks` and `pool`. Raises UserError subclasses as `evaluate_knn` does,
    and also for more shots than a class has images and for split files that do not fit.
    """
    started, listener, checks = time.monotonic(), listener or Silent(), checks or Checks()
    opened = open_inputs(config, listener, checks)
    groups = column_groups(config, opened.inputs, checks)
    checks.run("shots", load_solver)
    if (train_y := check_labels(opened, checks)) is not None:
        if config.split_files:
            checks.run("split_files", lambda: _listed(config, opened.sources.get("train"), np.arange(len(train_y))))
        else:
            checks.run("shots", lambda: check_shots(config.shots, train_y, opened.class_names("train")))
    inputs = opened.checked(checks)
    prepare_groups(groups, inputs)
    if not end_group():
        return EvaluationResult([], time.monotonic() - started)
    train, test = inputs.features("train"), inputs.features("val")
    splits: int | list[Labels] = config.splits or default_splits(len(train))
    if config.split_files:
        splits = _listed(config, opened.sources.get("train"), train.indices)
    rows: list[Row] = []
    for where, columns in groups:
        found = lowshot(
            *labelled_pair(train, test, columns),
            shots=config.shots,
            splits=splits,
            seed=config.seed,
            class_names=opened.class_names("train"),
            progress=partial(listener.progress, progress_label("logistic regressions", where)),
        )
        rows += named(found, inputs.name, where)
    return EvaluationResult(rows, time.monotonic() - started, inputs.bad, inputs.data)


def _listed(config: LowshotConfig, source: ImageSource | None, images: Labels) -> list[Labels]:
    """Return which of the training images (positions in the data set) each split file lists."""
    if source is None:
        raise ConfigError("--split-file names images, but --features contains none; leave one of them out")
    return read_split_files(config.split_files, [source.path(int(index)) for index in images])


def default_splits(images: int) -> int:
    """Return the number of draws: 3, or 20 as in DINO below 10,000 images, where results depend on the draw."""
    return 3 if images >= 10_000 else 20


def check_shots(shots: Sequence[int], y: Labels, names: Sequence[str] | None = None) -> None:
    """Raise DataError if a class has fewer images than shots. names: class names by label, for the message."""
    classes, counts = np.unique(y, return_counts=True)
    if counts.min() < max(shots):
        raise DataError(
            f"class {show_class(classes[counts.argmin()], names)} has only {counts.min()} training images, too few for "
            f"{max(shots)} shots; use fewer shots"
        )


def lowshot(
    train_x: Matrix,
    train_y: Labels,
    test_x: Matrix,
    test_y: Labels,
    *,
    shots: Sequence[int] = (1, 2, 5),
    splits: int | Sequence[Sequence[int] | Labels] = 3,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Return the top-1 accuracy in percent of logistic regression on `shots` training images per class (Appendix C.5).

    train_x (N, D), test_x (M, D); labels are any whole numbers. splits: number of draws per number of shots, which
    depend only on `seed`, the split's number, the shots and the labels, so that different encoders see the same images;
    or lists of training indices (see `read_split_files`), whose rounded mean number of images per class then replaces
    `shots`. The test rows are read in blocks, once per split. Rows, all `lowshot_top1` with `protocol` (the low-shot
    results of MIM models in Table 2 are fine-tuned, and not comparable): for each number of shots, first one with
    `value` = `mean`, `std` (ddof 1; 0 for one split) and `splits` (see `main_rows`), then one per `split`.
    class_names: names of labels 0, 1, ..., for messages.
    Raises DataError for a class with too few images and for features or labels that cannot be used.
    """
    classes, labels, truth = check_splits(train_x, train_y, test_x, test_y)
    if isinstance(splits, int):
        groups = _drawn_splits(train_y, shots, splits, seed, class_names)
    else:
        groups = _given_splits(labels, name_classes(classes, class_names), splits)
    total = sum(map(len, groups.values()))
    rows: list[Row] = []
    done = 0
    for count, group in groups.items():
        common: Row = {"shots": count, "protocol": "logistic regression"}
        scores: list[float] = []
        for index in group:
            weights = fit_logistic(_unit_rows(train_x[index]), labels[index], len(classes))
            scores.append(percent(np.mean(_predict(test_x, weights) == truth)))
            done += 1
            if progress is not None:
                progress(done, total)
        mean, std = spread(scores)
        rows.append({"metric": METRIC, "value": mean, **common, "mean": mean, "std": std, "splits": len(scores)})
        rows += [{"metric": METRIC, "value": score, **common, "split": split} for split, score in enumerate(scores)]
    return rows


def draw_split(y: Labels, shots: int, *, split: int, seed: int) -> Labels:
    """Draw the indices (C * shots,) of `shots` images per class, class by class, without replacement.

    y (N,): labels; of a class with fewer images, all are drawn. The draw is a function of (seed, split, shots) and the
    labels.
    """
    rng = np.random.default_rng([seed, split, shots])
    classes = [np.flatnonzero(y == label) for label in np.unique(y)]
    return np.concatenate([rng.choice(rows, min(shots, len(rows)), replace=False) for rows in classes])


def fit_logistic(x: NDArray[np.float64], y: Labels, classes: int) -> NDArray[np.float64]:
    """Return the weights (D, classes) of multinomial logistic regression without intercept, fitted by cyanure.

    x (n, D): normalised rows. y (n,): labels 0..classes-1, all present. The objective is
    mean cross-entropy + LAMBDA / (2 n) * |W|^2, solved to a relative duality gap of TOLERANCE or for 300 epochs.
    Two classes use the binary logistic loss with one weight vector w, returned as (-w, w) / 2. Raises ConfigError if
    cyanure cannot be imported.
    """
    binary = classes == 2
    model = load_solver()(
        # For two classes, cyanure replaces `multiclass-logistic` by the square loss, and only prints a line about it.
        loss="logistic" if binary else "multiclass-logistic",
        penalty="l2",
        lambda_1=LAMBDA / len(x),
        max_iter=300,
        tol=TOLERANCE,
        # Epochs between two checks of the duality gap, which decides when the solver stops; cyanure's default is 5.
        duality_gap_interval=10,
        fit_intercept=False,
        verbose=False,
        # The number of threads changes the order of sums, and with it the epoch at which the solver stops.
        n_threads=1,
        random_state=0,
    )
    with warnings.catch_warnings(), _silent_stderr(), ThreadPoolExecutor(1) as pool:
        # Reaching the last epoch is part of the protocol.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # In its own thread: cyanure leaves OpenMP with dynamic teams and a single thread in the thread that calls it,
        # where torch's matrix products then become wrong, up to NaN.
        pool.submit(model.fit, x, 2 * y - 1 if binary else y).result()
    coef = np.asarray(model.coef_, dtype=np.float64).reshape(x.shape[1], -1)
    return np.concatenate([-coef, coef], axis=1) / 2 if binary else coef


def _predict(x: Matrix, weights: NDArray[np.float64]) -> Labels:
    """Predict classes (M,) of x (M, D). Normalising again for every split costs less than holding all in float64."""
    return np.concatenate([(_unit_rows(x[rows]) @ weights).argmax(axis=1) for rows in row_blocks(x)])


def _unit_rows(x: NDArray[np.number]) -> NDArray[np.float64]:
    """Return the rows centred to mean 0 and scaled to unit length, in float64; a constant row becomes zero.

    On float32, cyanure stops early with a warning of numerical instability.
    """
    rows = x.astype(np.float64)
    rows -= rows.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(norm > 0, norm, 1.0)
    return rows


def _drawn_splits(
    y: Labels, shots: Sequence[int], splits: int, seed: int, class_names: Sequence[str] | None
) -> dict[int, list[Labels]]:
    if splits < 1:
        raise ConfigError(f"splits = {splits}: give at least 1")
    if not len(shots) or min(shots) < 1:
        raise ConfigError(f"shots = {list(shots)}: give one or more numbers of images per class, each at least 1")
    check_shots(shots, y, class_names)
    return {count: [draw_split(y, count, split=number, seed=seed) for number in range(splits)] for count in shots}


def _given_splits(
    labels: Labels, classes: Sequence[str | int], splits: Sequence[Sequence[int] | Labels]
) -> dict[int, list[Labels]]:
    if not len(splits):
        raise ConfigError("splits: the list is empty; give at least one split")
    groups: dict[int, list[Labels]] = {}
    for number, split in enumerate(splits):
        index = np.asarray(split, dtype=np.int64)
        outside = index[(index < 0) | (index >= len(labels))]
        if len(outside):
            raise DataError(f"split {number}: index {outside[0]} is outside the {len(labels)} training images")
        if len(np.unique(index)) < len(index):
            raise DataError(f"split {number}: a training image is listed twice; list each once")
        missing = np.setdiff1d(np.arange(len(classes)), labels[index])
        if len(missing):
            name = printable(str(classes[missing[0]]))
            raise DataError(f"split {number}: class {name} has no image; every class needs at least one")
        groups.setdefault(round(len(index) / len(classes)), []).append(index)
    return groups


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard what cyanure's compiled code writes to file descriptor 2, which bypasses Python's sys.stderr."""
    try:
        saved = os.dup(2)
    except OSError:  # the process has no standard error
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def load_solver() -> type[Any]:
    """Return cyanure's `Classifier`, imported late because the other protocols do not need it.

    Raises ConfigError if it cannot be imported: on Python 3.13, cyanure has no wheel and must be built.
    """
    try:
        from cyanure.estimators import Classifier
    except ImportError as error:
        raise ConfigError(
            f"low-shot classification needs cyanure ({error}): use Python 3.11 or 3.12, where pip installs it with "
            "mimref, or build it with a C++ compiler and OpenBLAS (Debian: libopenblas-dev), by "
            "pip install setuptools && pip install --no-build-isolation cyanure"
        ) from error
    return Classifier  # type: ignore[no-any-return]
