"""Checks of features and labels, and the scores that several protocols share."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment

from mimref.errors import DataError
from mimref.features.inputs import Inputs
from mimref.features.matrix import Labels, Matrix
from mimref.results import Row

# Elements per block when an array is read in pieces: 32 MB in float64.
BLOCK_ELEMENTS = 1 << 22


def row_blocks(x: Matrix, elements: int | None = None) -> list[slice]:
    """Slices of rows that cover x (N, D), with about `elements` (None: BLOCK_ELEMENTS) values each at most."""
    rows = max(1, (BLOCK_ELEMENTS if elements is None else elements) // max(1, x.shape[1]))
    return [slice(start, min(start + rows, len(x))) for start in range(0, len(x), rows)]


def unit_rows(
    x: Matrix, mean: NDArray[np.float64] | None = None, std: NDArray[np.float64] | None = None
) -> NDArray[np.float32]:
    """Rows of x (N, D) scaled to unit length, as a new float32 array; a row of zeros stays zero.

    mean, std (D,): subtract and divide by these first. Computed in float64, block by block.
    """
    out = np.empty(x.shape, dtype=np.float32)
    for rows in row_blocks(x):
        block = x[rows].astype(np.float64)
        if mean is not None:
            block -= mean
        if std is not None:
            block /= std
        norm = np.linalg.norm(block, axis=1, keepdims=True)
        out[rows] = block / np.where(norm > 0, norm, 1.0)
    return out


def check_features(x: Matrix, name: str, y: ArrayLike | None = None) -> None:
    """Raise DataError unless x is (N, D) and finite, and y, if given, (N,) whole numbers.

    x is read in blocks, so that a memory-mapped array never has to fit in memory. name: of the array, for the message.
    """
    if len(x.shape) != 2 or 0 in x.shape:
        raise DataError(f"{name}: features have shape {x.shape}; they must be (images, width) and not empty")
    if x.dtype.kind not in "fiu":
        raise DataError(f"{name}: features are of type {x.dtype}; give real numbers")
    if y is not None:
        labels = np.asarray(y)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise DataError(
                f"{name}: labels have shape {labels.shape} and type {labels.dtype}; give (images,) whole numbers"
            )
        if len(labels) != len(x):
            raise DataError(f"{name}: {len(x)} feature rows but {len(labels)} labels; give one label per row")
    if x.dtype.kind != "f":
        return
    for rows in row_blocks(x):
        bad = ~np.isfinite(x[rows]).all(axis=1)
        if bad.any():
            first = rows.start + int(bad.argmax())
            raise DataError(f"{name}: features of image {first} (counted from 0) are not finite; check the encoder")


def check_classes(y: NDArray[np.generic], name: str) -> NDArray[np.int64]:
    """The distinct labels of y (N,), ascending. Raises DataError when there is only one."""
    classes = np.unique(np.asarray(y)).astype(np.int64)
    if len(classes) < 2:
        raise DataError(f"{name}: all images are of class {classes[0]}; give images of at least two classes")
    return classes


def class_indices(classes: NDArray[np.int64], y: NDArray[np.generic], name: str) -> NDArray[np.int64]:
    """Positions in `classes` (ascending) of the labels y (N,): labels with gaps become 0..C-1.

    Raises DataError for a label that `classes` lacks.
    """
    labels = np.asarray(y).astype(np.int64)
    missing = np.setdiff1d(labels, classes)
    if len(missing):
        raise DataError(f"{name}: class {missing[0]} has no training image; add some or leave the class out")
    return np.searchsorted(classes, labels).astype(np.int64)


def split_labels(inputs: Inputs) -> tuple[Labels, Labels]:
    """Labels of training and validation images. Raises DataError when there is one class, or unknown ones."""
    train_y, test_y = inputs.labels("train"), inputs.labels("val")
    assert train_y is not None and test_y is not None  # the inputs were opened to have labels
    class_indices(check_classes(train_y, "train"), test_y, "test")
    return train_y, test_y


def progress_label(work: str, where: Row) -> str:
    """The work's name, with its block when blocks are evaluated one by one."""
    blocks = str(where.get("blocks", "last"))
    return f"{work} of block {blocks}" if blocks.isdigit() else work


def percent(fraction: float | np.floating) -> float:
    """A fraction as a percentage."""
    return 100.0 * float(fraction)


def accuracy(hits: ArrayLike) -> float:
    """Percentage of true entries."""
    return percent(np.mean(np.asarray(hits), dtype=np.float64))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (ddof 1) of repeated measurements; the latter is 0 for a single one."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else 0.0


def cluster_accuracy(y: NDArray[np.generic], assignment: NDArray[np.generic]) -> float:
    """Clustering accuracy in percent: images explained by the best one-to-one map of clusters to classes.

    y (N,): classes. assignment (N,): clusters. The Hungarian method finds the map on the contingency matrix. Surplus
    clusters or classes stay unmapped, and their images count as errors.
    """
    _, class_of = np.unique(y, return_inverse=True)
    _, cluster_of = np.unique(assignment, return_inverse=True)
    counts = np.zeros((class_of.max() + 1, cluster_of.max() + 1), dtype=np.int64)
    np.add.at(counts, (class_of, cluster_of), 1)
    return percent(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(class_of))
