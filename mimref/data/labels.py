"""Labels: conversion of labels as written to classes 0, 1, ..., and choices of images with equal class shares."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mimref.data.decode import printable
from mimref.errors import ConfigError, DataError, did_you_mean

Indices = NDArray[np.int64]
_WHOLE = re.compile("0|-?[1-9][0-9]*")


class UnusableLabelsError(DataError):
    """Labels of a type that cannot name classes."""


def class_name(text: str) -> str:
    """Return a label in composed Unicode (NFC): macOS decomposes folder names, which then look the same but differ."""
    return unicodedata.normalize("NFC", text)


def nearest_class(unknown: str, classes: Sequence[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest class. Non-ASCII is escaped too, as letters can look alike."""
    near = did_you_mean(unknown, classes)
    return f"{near} (it is written {unknown!a})" if near and not unknown.isascii() else near


def order_classes(names: Iterable[str]) -> list[str]:
    """Return the distinct names in the order of their classes: by value if all are whole numbers, else by text.

    So 2 comes before 10. 007 counts as text: whole numbers are not written that way.
    """
    distinct = set(names)
    return sorted(distinct, key=int if all(map(_WHOLE.fullmatch, distinct)) else None)


@dataclass(frozen=True)
class RawLabels:
    """Labels as found, before they become class numbers; each distinct label is stored once."""

    names: list[str]
    codes: Indices
    """(N,) index into `names` for every image."""

    @classmethod
    def from_strings(cls, labels: Any) -> "RawLabels":
        """Build from one label per image, in a list or a pandas Series; spellings of the same name are merged."""
        codes, names = pd.factorize(pd.Series(labels, dtype=object))
        return cls.merged(list(names), codes)

    @classmethod
    def merged(cls, names: Sequence[str], codes: NDArray[Any]) -> "RawLabels":
        """Build from names, some of which may be spellings of the same name, and the index of every image's name."""
        merged, distinct = pd.factorize(pd.Series(list(map(class_name, names)), dtype=object))
        return cls(list(distinct), merged[codes].astype(np.int64))

    def classes(self) -> list[str]:
        """Return the distinct labels in the order of their classes."""
        return order_classes(self.names)

    def encode(self, classes: Sequence[str]) -> Indices:
        """Return the index into `classes` for every image, (N,). Raises DataError for any other label."""
        if unknown := sorted(set(self.names) - set(classes)):
            raise DataError(
                f"class {printable(unknown[0])!r} of the validation images is not in the training images"
                f"{nearest_class(unknown[0], classes)}; both need the same classes"
            )
        number = {name: index for index, name in enumerate(classes)}
        return np.array([number[name] for name in self.names], dtype=np.int64)[self.codes]


def stratified_split(labels: Indices, *, held_out: float) -> tuple[Indices, Indices]:
    """Split (N,) labels into training and held-out indices with equal class shares, each in data order.

    The draw is fixed (scikit-learn's `train_test_split` with random_state 0) to make results comparable across runs.
    """
    from sklearn.model_selection import train_test_split

    everyone = np.arange(len(labels), dtype=np.int64)
    train, held = train_test_split(everyone, test_size=held_out, stratify=labels, random_state=0)
    return np.sort(train), np.sort(held)


def first_images(count: int, labels: Indices | None, *, limit: int) -> Indices:
    """Return the indices, in data order, of the training images that `data.train_limit` selects from `count`.

    With labels, classes take turns (first image of every class, then the second, ...), so class sizes differ by one at
    most until a class runs out. Raises ConfigError if the limit exceeds `count`.
    """
    if limit > count:
        raise ConfigError(
            f"data.train_limit is {limit}, but there are {count} training images; lower it or leave it out"
        )
    if labels is None:
        return np.arange(limit, dtype=np.int64)
    turn = pd.Series(labels).groupby(labels).cumcount()
    return np.sort(np.lexsort((labels, turn))[:limit])


def fixed_choice(count: int, labels: Indices | None, *, most: int) -> Indices:
    """Return at most `most` of `count` indices, in data order: classes in turn; without labels, every n-th image."""
    if labels is None:
        return np.arange(0, count, max(1, -(-count // most)), dtype=np.int64)
    return first_images(count, labels, limit=min(most, count))
