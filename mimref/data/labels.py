"""From labels as people write them to classes 0, 1, ..."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimref.data.decode import printable
from mimref.data.splits import Indices
from mimref.errors import DataError


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
