"""Lists of many file paths in little memory."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mimref.data.splits import Indices

CHUNK = 1 << 14
"""Paths copied per step of `take`: every byte of theirs takes 24 meanwhile."""


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
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), _ends(list(map(len, encoded))))

    def take(self, rows: Indices) -> "PathList":
        """Some of the paths, in the order of `rows`, each of which is 0 or more."""
        starts, lengths = self.ends[rows], self.ends[rows + 1] - self.ends[rows]
        ends = _ends(lengths)
        content = np.empty(ends[-1], dtype=np.uint8)
        for first in range(0, len(rows), CHUNK):
            part = slice(first, first + CHUNK)
            begin, end = ends[part][0], ends[1:][part][-1]
            # How far every byte moves.
            moved = np.repeat(starts[part] - ends[:-1][part], lengths[part])
            content[begin:end] = self.content[np.arange(begin, end) + moved]
        return PathList(content, ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        row = range(len(self))[index]
        return os.fsdecode(self.content[self.ends[row] : self.ends[row + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.encoded())

    def encoded(self) -> Iterator[bytes]:
        """The paths in the file system's encoding."""
        content = self.content.data
        return (bytes(content[start:end]) for start, end in itertools.pairwise(self.ends.tolist()))


def _ends(lengths: Sequence[int] | Indices) -> Indices:
    ends = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends
