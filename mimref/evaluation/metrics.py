"""Checks of features and labels, and functions that several protocols share."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimref.data.decode import printable
from mimref.errors import Checks, DataError
from mimref.features.encode import Column, Features
from mimref.features.matrix import Labels, Matrix
from mimref.features.opening import Opened
from mimref.results import Row

UNSEEN = int(np.iinfo(np.int64).min)
"""Label of test images whose class has no training images: every prediction is wrong."""
# Values per block when an array is read in pieces: 32 MB in float64.
BLOCK_ELEMENTS = 1 << 22
# Relative rounding error of the features of equal images: an encoder's products accumulate many roundings.
_ROUNDING = 1e-6


def row_blocks(x: Matrix) -> list[slice]:
    """Return slices of rows that cover x (N, D), with at most about BLOCK_ELEMENTS values each."""
    rows = max(1, BLOCK_ELEMENTS // max(1, x.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(x), rows)]


def unit_rows(
    x: Matrix, mean: NDArray[np.float64] | None = None, std: NDArray[np.float64] | None = None
) -> NDArray[np.float32]:
    """Return the rows of x (N, D) scaled to unit length, as a new float32 array; a row of zeros stays zero.

    mean, std (D,): if given, subtract `mean` first and divide by `std`. Computed in float64, block by block.
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


def unit_tensor(x: Matrix, mean: NDArray[np.float64] | None = None, std: NDArray[np.float64] | None = None) -> Tensor:
    """Return `unit_rows` in memory from torch: the rounding of small products depends on their factors' alignment."""
    return torch.from_numpy(unit_rows(x, mean, std)).clone()


def mean_and_std(x: Matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean and standard deviation (D,) of every feature of x (N, D), in one float64 pass over blocks.

    Blocks are combined by Chan's formula (sums of squares would lose precision). A feature that varies by less than
    float32 resolves gets a standard deviation of 1, so that rounding errors are not amplified.
    """
    count = 0
    mean, m2 = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for rows in row_blocks(x):
        block = x[rows].astype(np.float64)
        block_mean = block.mean(axis=0)
        delta = block_mean - mean
        total = count + len(block)
        m2 += np.square(block - block_mean).sum(axis=0) + np.square(delta) * (count * len(block) / total)
        mean += delta * (len(block) / total)
        count = total
    std = np.sqrt(m2 / count)
    return mean, np.where(std > np.finfo(np.float32).eps * np.abs(mean), std, 1.0)


def check_features(x: Matrix, name: str, y: Labels | None = None) -> None:
    """Raise DataError unless x is (N, D) and finite, and y, if given, holds (N,) whole numbers.

    x is read in blocks, so that a memory-mapped array never has to fit in memory. name: the array's name in messages.
    """
    if len(x.shape) != 2 or 0 in x.shape or x.dtype.kind not in "fiu":
        raise DataError(f"{name}: features have shape {x.shape} and type {x.dtype}; give (images, width) real numbers")
    if y is not None and (np.shape(y) != (len(x),) or np.asarray(y).dtype.kind not in "iu"):
        given = f"{len(x)} rows of features, but labels of shape {np.shape(y)} and type {np.asarray(y).dtype}"
        raise DataError(f"{name}: {given}; give one whole number per row")
    for rows in row_blocks(x):
        bad = ~np.isfinite(x[rows]).all(axis=1)
        if bad.any():
            first = rows.start + int(bad.argmax())
            raise DataError(f"{name}: features of image {first} (counted from 0) are not finite; check the encoder")


def vary(x: Matrix) -> bool:
    """Return whether the rows of x (N, D) differ by more than float32 rounding; only then are distances meaningful."""
    first = x[:1].astype(np.float64)
    tolerance = _ROUNDING * np.sqrt(np.mean(np.square(first)))
    return any(bool((np.abs(x[rows] - first) > tolerance).any()) for rows in row_blocks(x))


def check_splits(train_x: Matrix, train_y: Labels, test_x: Matrix, test_y: Labels) -> tuple[Labels, Labels, Labels]:
    """Check both splits and return the result of `number_labels`. Raises DataError for unusable features or labels."""
    check_features(train_x, "train", train_y)
    check_features(test_x, "test", test_y)
    if train_x.shape[1] != test_x.shape[1]:
        raise DataError(f"train features are {train_x.shape[1]} wide, test features {test_x.shape[1]}; use one encoder")
    return number_labels(train_y, test_y)


def number_labels(train_y: Labels, test_y: Labels, names: Sequence[str] | None = None) -> tuple[Labels, Labels, Labels]:
    """Return the training classes (C,), ascending, and the labels of both splits as positions in them, 0 to C-1.

    `UNSEEN` becomes C. names: see `name_classes`. Raises DataError for a single class, and for another test class
    without training images.
    """
    classes, train = number_classes(train_y, "train", names)
    missing = np.setdiff1d(test_y, [*classes, UNSEEN])
    if len(missing):
        raise DataError(f"test: class {show_class(missing[0], names)} has no training image; add some or leave it out")
    return classes, train, np.where(np.equal(test_y, UNSEEN), len(classes), np.searchsorted(classes, test_y))


def unseen_marked(train_y: Labels, test_y: Labels, *, lacks_classes: bool) -> Labels:
    """Return the test labels, with `UNSEEN` for classes without training images if the published splits lack them."""
    return np.where(np.isin(test_y, train_y), test_y, UNSEEN) if lacks_classes else test_y


def number_classes(y: Labels, name: str, names: Sequence[str] | None = None) -> tuple[Labels, Labels]:
    """Return the classes (C,) of y (N,), ascending, and y as positions in them. Raises DataError for a single class.

    name: the images' name, for the message. names: see `name_classes`.
    """
    classes, numbers = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        only = show_class(classes[0], names)
        raise DataError(f"{name}: all images are of class {only}; give images of at least two classes")
    return classes, numbers


def check_labels(opened: Opened, checks: Checks) -> Labels | None:
    """Check the training and validation labels as `number_labels` does, and return the training labels."""
    train_y, test_y = opened.labels("train"), opened.labels("val")
    if train_y is not None and test_y is not None:
        lacks_classes = "val" in opened.sources and opened.sources["val"].lacks_classes
        marked_y = unseen_marked(train_y, test_y, lacks_classes=lacks_classes)
        checks.run("data.spec", lambda: number_labels(train_y, marked_y, opened.class_names("train")))
    return train_y


def name_classes(labels: Labels, names: Sequence[str] | None) -> list[str] | list[int]:
    """Return the classes as results name them: by name, or by label if names are missing or equal to the labels.

    names: names of classes 0, 1, ..., or None.
    """
    numbers = [int(label) for label in labels]
    found = [names[label] if names and 0 <= label < len(names) else str(label) for label in numbers]
    if found == list(map(str, numbers)):
        return numbers
    # Folder names may hold bytes that no text file can, and csv writers do not quote \r.
    sound = (name.encode(errors="replace").decode() == name and not {"\r", "\0"} & set(name) for name in found)
    return [name if fits else printable(name) for name, fits in zip(found, sound, strict=True)]


def show_class(label: int | np.integer, names: Sequence[str] | None) -> str:
    """Return a class as messages show it."""
    return printable(str(name_classes(np.array([label]), names)[0]))


def labelled(features: Features, columns: Sequence[Column]) -> tuple[Matrix, Labels]:
    """Return the features (N, D) of labelled images, and the labels (N,)."""
    assert features.y is not None
    return features.matrix(columns), features.y


def labelled_pair(train: Features, test: Features, columns: Sequence[Column]) -> tuple[Matrix, Labels, Matrix, Labels]:
    """Return features and labels of the training images, then of the test images, see `unseen_marked`."""
    (train_x, train_y), (test_x, test_y) = labelled(train, columns), labelled(test, columns)
    return train_x, train_y, test_x, unseen_marked(train_y, test_y, lacks_classes=test.lacks_classes)


def progress_label(work: str, where: Row) -> str:
    """Return the work's name, followed by the block if blocks are evaluated one by one."""
    blocks = str(where.get("blocks", "last"))
    return f"{work} of block {blocks}" if blocks.isdigit() else work


def percent(fraction: float | np.floating) -> float:
    """Return a fraction as a percentage."""
    return 100.0 * float(fraction)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (ddof 1) of repeated measurements; the latter is 0 for a single one."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
