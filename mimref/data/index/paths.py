"""Lists of many file paths in little memory."""

import os
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from mimref.data.splits import Indices


class PathList:
    """Paths as one block of bytes: 8 bytes and the path's length each, where a list of strings takes 60 and more.

    Loader processes share the block: reading a path writes nothing. Reading a list's strings would write their
    reference counts, and so copy page after page of the main process's memory into each worker.
    """

    def __init__(self, content: NDArray[np.uint8], ends: Indices) -> None:
        self.content = content
        """All paths without separators, in the file system's encoding."""
        self.ends = ends
        """(N + 1,) where each path starts, and the last one ends."""

    @classmethod
    def pack(cls, paths: Iterable[str]) -> "PathList":
        """The same paths; a PathList as it is."""
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
        """Some of the paths in the file system's encoding."""
        content = self.content.data
        starts, ends = self.ends[rows].tolist(), self.ends[rows + 1].tolist()
        return (bytes(content[start:end]) for start, end in zip(starts, ends, strict=True))
