"""Labels: from what people write to classes 0, 1, ..., and choices of images with equal shares of the classes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimref.data.decode import printable
from mimref.errors import ConfigError, DataError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class RawLabels:
    """Labels as they were found, before they become class numbers; each distinct one is stored once."""

    names: list[str]
    codes: Indices
    """(N,) index into `names` of every image."""

    @classmethod
    def from_strings(cls, labels: Iterable[str]) -> "RawLabels":
        """From one label per image."""
        known: dict[str, int] = {}
        codes = np.fromiter((known.setdefault(label, len(known)) for label in labels), dtype=np.int64)
        return cls(list(known), codes)

    @classmethod
    def from_column(cls, column: Any) -> "RawLabels":
        """From a pyarrow column without missing values."""
        encoded = column.cast("string").combine_chunks().dictionary_encode()
        if hasattr(encoded, "combine_chunks"):  # pyarrow before 17
            encoded = encoded.combine_chunks()
        return cls(encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64))

    def classes(self) -> list[str]:
        """The distinct labels in the order of their classes: by value if all are whole numbers, else by text.

        So 2 comes before 10. 007 is a name: numbers are not written that way.
        """
        return sorted(self.names, key=int) if all(_is_whole(name) for name in self.names) else sorted(self.names)

    def encode(self, classes: Sequence[str]) -> Indices:
        """(N,) index into `classes` of every image. Raises DataError for any other label."""
        if unknown := sorted(set(self.names) - set(classes)):
            raise DataError(
                f"class {printable(unknown[0])!r} of the validation images is not in the training images; "
                "both need the same classes"
            )
        number = {name: index for index, name in enumerate(classes)}
        return np.array([number[name] for name in self.names], dtype=np.int64)[self.codes]


def _is_whole(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and str(int(text)) == text


def stratified_split(labels: Indices, *, held_out: float) -> tuple[Indices, Indices]:
    """Split (N,) labels into training and held-out indices with equal class shares, each in data order.

    The draw is fixed (scikit-learn's `train_test_split` with random_state 0), so that results compare across runs.
    """
    from sklearn.model_selection import train_test_split

    everyone = np.arange(len(labels), dtype=np.int64)
    train, held = train_test_split(everyone, test_size=held_out, stratify=labels, random_state=0)
    return np.sort(train), np.sort(held)


def first_images(count: int, labels: Indices | None, *, limit: int) -> Indices:
    """Indices, in data order, of the training images that `data.train_limit` selects from `count`.

    With labels, classes take turns (first image of every class, then the second, ...), so class sizes differ by one at
    most until a class runs out. Raises ConfigError when the limit exceeds `count`.
    """
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
