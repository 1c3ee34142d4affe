"""Lists of images as the rest of the package uses them: in memory, or encoded in files and decoded when read."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimref.data.bands import WrongChannels, as_pixels, check_channels
from mimref.data.decode import Decoded, Reduce, decode_file, printable, read_content
from mimref.data.labels import Indices, fixed_choice
from mimref.data.pixels import USUAL, Decoding
from mimref.data.traits import READ
from mimref.data.traits import notices as trait_notices
from mimref.distributed.collectives import gather_lists
from mimref.distributed.group import world_size
from mimref.errors import DataError

Split = Literal["train", "val"]


class NoSplitError(DataError):
    """Images exist, but none in the requested split."""


class ImageSource(ABC):
    """A fixed list of N images, some of which may turn out to be unreadable."""

    name: str
    """The data set as the user named it."""
    labels: Indices | None
    """Class of every image, (N,) int64, or None."""
    class_names: list[str] | None
    """Names of classes 0, 1, ..., or None without labels."""
    lacks_classes: bool = False
    """Whether some of `class_names` may lack training images, as in the data set's published splits."""
    notices: Sequence[str] = ()
    """Lines on parts of the data set that are not used but could be images or labels, and on what had to be guessed."""
    how_to_label: str = ""
    """What to do if there are no labels, if more specific advice is known than for the kind of data set."""
    in_memory: bool = False
    """Whether images are read without decoding, so that loader processes would not pay off."""
    decoding: Decoding = USUAL
    """How encoded images become pixels."""
    _traits: NDArray[np.uint8] | None = None

    @property
    def channels(self) -> int:
        """Number of channels of every image as it is read."""
        return self.decoding.channels or 3

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 in hex over what identifies the images and their labels."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Tensor:
        """Return one image, (C, H, W) as in `Decoded.image`. Raises BadImage if it cannot be read."""

    @abstractmethod
    def path(self, index: int) -> str:
        """Return a name of the image for messages and tables."""

    def find(self, names: Sequence[str]) -> list[int | None]:
        """Return, for every name, the first image whose `path` or file it is; None if there is none."""
        wanted, found = set(names), dict[str, int]()
        for index in range(len(self) if wanted else 0):
            if (name := self.path(index)) in wanted:
                found.setdefault(name, index)
        return [found.get(name) for name in names]

    def read_reduced(self, index: int, reduce: Reduce | None) -> Decoded:
        """Return one image, a JPEG at a fraction of its size if `reduce` allows it. Raises BadImage as `read` does."""
        image = self.read(index)
        return Decoded(image[None].contiguous(memory_format=torch.channels_last)[0], *image.shape[1:])

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        """Return an image's file as stored, and its name for `decode_content`. Raises BadImage as `read` does.

        Returns None if the image is not the content of a file, or not only that.
        """
        return None

    def record(self, indices: Sequence[int], traits: Sequence[int]) -> None:
        """Record the traits of images that a loader has read, see `mimref.data.traits`."""
        if self._traits is None:
            self._traits = np.zeros(len(self), dtype=np.uint8)
        self._traits[indices] |= np.array(traits, dtype=np.uint8) | READ

    def share_traits(self) -> None:
        """Record what every rank has recorded; call this on all ranks."""
        if world_size() > 1:
            own = np.zeros(len(self), dtype=np.uint8) if self._traits is None else self._traits
            self._traits = np.bitwise_or.reduce(gather_lists([own]))

    def peculiarities(self, what: str = "images") -> list[str]:
        """Return a line for each peculiarity of the images read so far. what: name of these images."""
        return [] if self._traits is None else trait_notices(self._traits, self.path, what)

    def fetch(self, indices: Sequence[int]) -> None:  # noqa: B027
        """Request the images to be read next from a server, all at once. Raises DataError if the server fails."""


@dataclass(eq=False)
class EncodedSource(ImageSource):
    """Base class of sources whose images are stored encoded, as JPEG, PNG and so on, and decoded when read."""

    name: str
    rows: Indices
    """(N,) position of every image in the list from which the source was made."""
    labels: Indices | None
    class_names: list[str] | None

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Indices) -> None:
        """Drop all but these images."""
        self.rows = self.rows[indices]
        self.labels = None if self.labels is None else self.labels[indices]

    def read(self, index: int) -> Tensor:
        """See `ImageSource`."""
        return self.read_reduced(index, None).image.contiguous()

    @abstractmethod
    def read_reduced(self, index: int, reduce: Reduce | None) -> Decoded:
        """See `ImageSource`."""


@dataclass(eq=False)
class ArraySource(ImageSource):
    """Images in memory: uint8 (N, H, W) gray or (N, 3, H, W); with `data.channels` (N, C, H, W) of any numbers."""

    name: str
    images: NDArray[Any]
    labels: Indices | None
    class_names: list[str] | None
    split: str
    positions: Indices
    """(N,) index of every image in the data set's original order, used in its name."""

    in_memory = True

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        """Return a copy of one image; gray is repeated for three channels unless `data.channels` is set.

        Raises DataError if `data.channels` is not the images' number of channels.
        """
        stored = self.images[index]
        if (channels := self.decoding.channels) is not None:
            stored = stored[None] if stored.ndim == 2 else stored
            try:
                check_channels(stored.transpose(1, 2, 0), channels)
                stored = as_pixels(stored, self.decoding.range)
            except (WrongChannels, ValueError) as error:
                raise DataError(f"{self.path(index)} {error}") from error
        image = torch.from_numpy(stored)
        if image.ndim == 2:
            image = image.expand(3, -1, -1)
        return image.clone(memory_format=torch.contiguous_format)

    def path(self, index: int) -> str:
        """Return `NAME/SPLIT/POSITION`."""
        return f"{self.name}/{self.split}/{self.positions[index]}"

    def select(self, rows: Indices) -> None:
        """Drop all but these images."""
        self.images, self.positions = self.images[rows], self.positions[rows]
        self.labels = None if self.labels is None else self.labels[rows]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over pixels and labels."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class PathList:
    """Paths as one block of bytes: each takes 8 bytes more than its length, but 60 and more in a list of strings.

    Loader processes share the block, as reading a path writes nothing. Reading the strings of a list would write their
    reference counts, and so copy page after page of the main process's memory into each worker.
    """

    content: NDArray[np.uint8]
    """All paths without separators, in the file system's encoding."""
    ends: Indices
    """(N + 1,) start of each path, and the end of the last one."""

    @classmethod
    def pack(cls, paths: Iterable[str]) -> "PathList":
        """Return the paths as a PathList; a PathList is returned unchanged."""
        if isinstance(paths, PathList):
            return paths
        encoded = [os.fsencode(path) for path in paths]
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), np.cumsum([0, *map(len, encoded)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        row = range(len(self))[index]
        return os.fsdecode(self.content[self.ends[row] : self.ends[row + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.encoded(np.arange(len(self))))

    def encoded(self, rows: Indices) -> Iterator[bytes]:
        """Iterate over some of the paths, in the file system's encoding."""
        content = self.content.data
        starts, ends = self.ends[rows].tolist(), self.ends[rows + 1].tolist()
        return (bytes(content[start:end]) for start, end in zip(starts, ends, strict=True))


class FileSource(EncodedSource):
    """Image files below one folder.

    files: paths relative to it. rows: the positions of the source's images in `files`; None: all of them.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        files: Iterable[str],
        labels: Indices | None,
        class_names: list[str] | None,
        rows: Indices | None = None,
    ) -> None:
        self.folder, self.files = folder, PathList.pack(files)
        super().__init__(name, np.arange(len(self.files)) if rows is None else rows, labels, class_names)

    def read_reduced(self, index: int, reduce: Reduce | None) -> Decoded:
        """See `ImageSource`."""
        return decode_file(self.file(index), reduce, self.decoding)

    def encoded(self, index: int) -> tuple[bytes, str]:
        """See `ImageSource`."""
        return read_content(self.file(index)), self.path(index)

    def file(self, index: int) -> str:
        """Return the path of an image's file."""
        return os.path.join(self.folder, self.files[self.rows[index]])

    def path(self, index: int) -> str:
        """Return the file's path, below the folder as the user gave it, with unprintable characters escaped."""
        return printable(self.file(index))

    def find(self, names: Sequence[str]) -> list[int | None]:
        """See `ImageSource`. A link counts as its file if the link's or the file's name is that of an image."""
        by_end: dict[bytes, list[tuple[str, os.stat_result]]] = {}
        for name in set(names):
            with suppress(OSError, ValueError):
                status = os.stat(name)
                for end in {os.path.basename(name), os.path.basename(os.path.realpath(name))}:
                    by_end.setdefault(os.fsencode(end), []).append((name, status))
        found, root = dict[str, int](), os.fsencode(self.folder)
        for index, file in enumerate(self.files.encoded(self.rows) if by_end else ()):
            for name, status in by_end.get(os.path.basename(file), ()):
                with suppress(OSError):
                    if name not in found and os.path.samestat(status, os.stat(os.path.join(root, file))):
                        found[name] = index
        # Names with escaped characters are not files.
        others = [name for name in names if not os.path.lexists(name)]
        by_path = dict(zip(others, super().find(others), strict=True))
        return [found.get(name, by_path.get(name)) for name in names]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over relative paths, sizes, modification times and labels.

        Costs one stat call per file, at first use.
        """
        return fingerprint_files(self.folder, self.files.encoded(self.rows), self.labels)


class Subset(ImageSource):
    """Some of a source's images, as a source; `rows` are their positions in it, (N,)."""

    def __init__(self, source: ImageSource, rows: Indices) -> None:
        self.source, self.rows = source, rows
        self.name, self.in_memory, self.class_names = source.name, source.in_memory, source.class_names
        self.decoding, self.lacks_classes = source.decoding, source.lacks_classes
        self.labels = None if source.labels is None else source.labels[rows]

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the source's fingerprint and the positions."""
        return hashlib.sha256(self.source.fingerprint.encode() + self.rows.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, indices: Sequence[int]) -> None:
        """See `ImageSource`."""
        self.source.fetch([int(self.rows[index]) for index in indices])

    def read(self, index: int) -> Tensor:
        """See `ImageSource`."""
        return self.source.read(int(self.rows[index]))

    def read_reduced(self, index: int, reduce: Reduce | None) -> Decoded:
        """See `ImageSource`."""
        return self.source.read_reduced(int(self.rows[index]), reduce)

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        """See `ImageSource`."""
        return self.source.encoded(int(self.rows[index]))

    def record(self, indices: Sequence[int], traits: Sequence[int]) -> None:
        """See `ImageSource`."""
        self.source.record(self.rows[indices].tolist(), traits)

    def share_traits(self) -> None:
        """See `ImageSource`."""
        self.source.share_traits()

    def peculiarities(self, what: str = "images") -> list[str]:
        """Return the peculiarities of the whole source."""
        return self.source.peculiarities(what)

    def path(self, index: int) -> str:
        """Return the image's name in the source."""
        return self.source.path(int(self.rows[index]))


def fingerprint_files(folder: str, files: Iterable[bytes], *arrays: NDArray[Any] | None) -> str:
    """Return the SHA-256 in hex over names relative to `folder`, sizes and modification times of files, and arrays."""
    digest = hashlib.sha256()
    base = os.fsencode(folder)
    for file in files:
        try:
            status = os.stat(os.path.join(base, file))
            size, modified_ns = status.st_size, status.st_mtime_ns
        except (OSError, ValueError):
            size, modified_ns = -1, -1  # a broken link: unreadable, but still part of the list
        digest.update(b"%s\0%d\0%d\n" % (file, size, modified_ns))
    for array in arrays:
        if array is not None:
            digest.update(array.tobytes())
    return digest.hexdigest()


def fixed_subset(source: ImageSource, most: int) -> Subset:
    """Return the images that `fixed_choice` selects: classes in turn; without labels, every n-th image."""
    return Subset(source, fixed_choice(len(source), source.labels, most=most))
