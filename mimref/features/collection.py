"""Images of one or both splits with their features, as one list."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mimref.data.decode import printable
from mimref.data.sources import ImageSource, Split
from mimref.features.encode import Column, Features
from mimref.features.inputs import EncoderInputs
from mimref.features.matrix import Matrix, OneAfterAnother


def chosen_splits(choice: Literal["train", "val", "all"]) -> tuple[Split, ...]:
    """Return the splits that `all` or the name of a split stands for."""
    return ("train", "val") if choice == "all" else (choice,)


@dataclass(frozen=True)
class Part:
    """The readable images of one split, in data order."""

    split: Split
    source: ImageSource
    features: Features

    def path(self, row: int) -> str:
        """Return the name of the image in a row of the features."""
        return self.source.path(int(self.features.indices[row]))

    def class_name(self, row: int) -> str | None:
        """Return the name of a row's class, or the label if classes have no names; None without labels."""
        y, names = self.features.y, self.features.class_names
        if y is None:
            return None
        return printable(names[y[row]]) if names is not None and 0 <= y[row] < len(names) else str(y[row])


class Collection:
    """N readable images: those of the first split, followed by those of the second."""

    def __init__(self, inputs: EncoderInputs, splits: Sequence[Split]) -> None:
        """Collect prepared splits; in a process group every rank may have its own collection."""
        self.parts = [Part(split, inputs.source(split), inputs.features(split)) for split in splits]

    def __len__(self) -> int:
        return sum(len(part.features) for part in self.parts)

    def matrix(self, columns: Sequence[Column]) -> Matrix:
        """Return some columns side by side, (N, D)."""
        return OneAfterAnother([part.features.matrix(columns) for part in self.parts])

    def locate(self, position: int) -> tuple[Part, int]:
        """Return the part that contains an image, and its row there."""
        for part in self.parts:
            if position < len(part.features):
                return part, position
            position -= len(part.features)
        raise IndexError(position)

    def position(self, split: Split, index: int) -> int | None:
        """Return the position of an image given by its index in its split; None if it could not be read."""
        start = 0
        for part in self.parts:
            if part.split == split:
                row = int(part.features.indices.searchsorted(index))
                known = row < len(part.features) and part.features.indices[row] == index
                return start + row if known else None
            start += len(part.features)
        return None
