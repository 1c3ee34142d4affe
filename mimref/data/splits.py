"""Fixed subsets: the held-out part of a data set, and its first N training images."""

import numpy as np
from numpy.typing import NDArray

from mimref.errors import ConfigError

Indices = NDArray[np.int64]


def stratified_split(labels: Indices, *, held_out: float) -> tuple[Indices, Indices]:
    """Split (N,) labels into training and held-out indices with equal class shares, each in data order.

    The draw is fixed (scikit-learn's `train_test_split` with random_state 0), so that results compare across runs.
    """
    from sklearn.model_selection import train_test_split

    everyone = np.arange(len(labels), dtype=np.int64)
    train, held = train_test_split(everyone, test_size=held_out, stratify=labels, random_state=0)
    return np.sort(train), np.sort(held)


def first_images(count: int, labels: Indices | None, *, limit: int | None) -> Indices:
    """Indices, in data order, of the training images that `data.train_limit` selects from `count`.

    With labels, classes take turns (first image of every class, then the second, ...), so class sizes differ by one at
    most until a class runs out. Raises ConfigError when the limit exceeds `count`.
    """
    if limit is None:
        return np.arange(count, dtype=np.int64)
    if limit > count:
        raise ConfigError(
            f"data.train_limit is {limit}, but there are {count} training images; lower it or leave it out"
        )
    if labels is None:
        return np.arange(limit, dtype=np.int64)
    by_class = np.argsort(labels, kind="stable")
    _, class_sizes = np.unique(labels, return_counts=True)
    turn = np.empty(count, dtype=np.int64)
    turn[by_class] = np.concatenate([np.arange(size) for size in class_sizes])
    return np.sort(np.lexsort((labels, turn))[:limit]).astype(np.int64)
