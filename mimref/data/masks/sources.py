"""Pairs of an image and its mask, a class for every pixel, in files, in the cells of a table, or in memory.

Masks are images of one channel whose values are class numbers; a palette only colours them.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mimref.data.decode import BadImage, Decoded, reason_of
from mimref.data.labels import Indices
from mimref.data.readers.hf import TableSource
from mimref.data.sources import ArraySource, FileSource
from mimref.errors import DataError

UNLABELLED = -1
"""Class of a pixel without a label, which counts nowhere."""
_MODES = ("1", "L", "P", "I", "I;16", "I;16B")


@dataclass(frozen=True)
class Coding:
    """Mapping from the values of a mask to classes."""

    first: int = 0
    """Value of class 0; lower values have no label."""
    ignore: int = 255
    """Value of pixels without a label."""

    def labels(self, values_HW: NDArray[np.integer | np.bool_], name: str) -> Tensor:
        """Return classes (H, W) int16, `UNLABELLED` where there is none. Raises DataError for values beyond 16 bits."""
        whole = values_HW.astype(np.int64)
        labels = np.where((whole < self.first) | (whole == self.ignore), UNLABELLED, whole - self.first)
        if labels.max(initial=0) > np.iinfo(np.int16).max:
            raise DataError(f"{name}: value {whole.max()} is not a class number")
        return torch.from_numpy(labels.astype(np.int16))


@dataclass(eq=False)
class EncodedMasks:
    """Masks in files below one folder, or in the cells of a table."""

    source: FileSource | TableSource
    coding: Coding

    def read(self, index: int) -> Tensor:
        """Return the classes (H, W) int16 of one image. Raises DataError for a mask that cannot be used."""
        try:
            file = self.source.file(index)
        except BadImage as error:
            raise DataError(f"mask {error}") from error
        return self.coding.labels(decode_mask(file, self.path(index)), self.path(index))

    def path(self, index: int) -> str:
        """Return the source's name of the file or cell."""
        return self.source.path(index)

    def select(self, rows: Indices) -> None:
        """Drop all but these masks."""
        self.source.select(rows)

    @property
    def fingerprint(self) -> str:
        """The source's fingerprint."""
        return self.source.fingerprint


@dataclass(eq=False)
class ArrayMasks:
    """Classes in memory, int16 (N, H, W)."""

    masks: NDArray[np.int16]
    name: str
    coding: Coding = Coding()

    def read(self, index: int) -> Tensor:
        """Return the classes (H, W) int16 of one image."""
        return torch.from_numpy(self.masks[index].copy())

    def path(self, index: int) -> str:
        """Return `NAME/INDEX`."""
        return f"{self.name}/{index}"

    def select(self, rows: Indices) -> None:
        """Drop all but these masks."""
        self.masks = self.masks[rows]

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the classes of all pixels."""
        return hashlib.sha256(np.ascontiguousarray(self.masks).data).hexdigest()


def decode_mask(file: str | io.BytesIO, name: str) -> NDArray[np.integer | np.bool_]:
    """Read the values (H, W) of a mask. Raises DataError for a file that is unreadable or no map of class numbers."""
    try:
        with Image.open(file) as image:
            kind, mode = image.format, image.mode
            values = np.asarray(image) if mode in _MODES and kind != "JPEG" else None
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything
        raise DataError(f"mask {name} cannot be read ({reason_of(error)})") from error
    if values is None:
        what = "a JPEG, which changes class numbers" if kind == "JPEG" else f"a colour image ({mode})"
        raise DataError(f"mask {name} is {what}; save the class of every pixel as a PNG of one channel")
    return values


@dataclass(eq=False)
class Pairs:
    """Images with a class for every pixel."""

    images: ArraySource | FileSource | TableSource
    masks: EncodedMasks | ArrayMasks
    class_names: list[str]
    """Names of classes 0, 1, ...; empty until their number is known."""
    notices: Sequence[str] = field(default=())
    """Lines on parts of the data set that are not used, and on what was decided."""
    are_mosaics: bool = False

    def __len__(self) -> int:
        return len(self.images)

    @property
    def name(self) -> str:
        """The data set as the user named it."""
        return self.images.name

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the fingerprints of images and masks."""
        return hashlib.sha256(f"{self.images.fingerprint} {self.masks.fingerprint}".encode()).hexdigest()

    def select(self, rows: Indices) -> None:
        """Drop all but these pairs."""
        self.images.select(rows)
        self.masks.select(rows)

    def read(self, index: int) -> tuple[Decoded, Tensor]:
        """Return an image, uint8 (3, H, W), and its classes, int16 (H, W).

        Raises BadImage for an image that cannot be read, DataError for a mask that cannot be used or does not fit it.
        """
        decoded = self.images.read_reduced(index, None)
        return decoded, self.mask(index, (decoded.image.shape[2], decoded.image.shape[1]))

    def mask(self, index: int, size: tuple[int, int] | None) -> Tensor:
        """Return the classes of an image, int16 (H, W). size: its width and height, if known. Raises DataError."""
        labels, path = self.masks.read(index), self.masks.path(index)
        height, width = labels.shape
        if size is not None and size != (width, height):
            image = f"its image {self.images.path(index)} {size[0]} x {size[1]}"
            raise DataError(f"mask {path} has {width} x {height} pixels, {image}; both need the same size")
        largest = int(labels.max()) if labels.numel() else UNLABELLED
        if self.class_names and largest >= self.classes:
            raise DataError(
                f"mask {path}: value {largest + self.masks.coding.first} is beyond the {self.classes} classes; fix it, "
                "set masks.classes, or set masks.ignore to the value of pixels without a label"
            )
        return labels
