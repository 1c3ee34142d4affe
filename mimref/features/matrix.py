"""Feature arrays that are read by rows, so that several can be combined into one without copying."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
"""(N,) classes."""


class Matrix(Protocol):
    """Features (N, D): a numpy array, memory-mapped or not, or several as one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | NDArray[np.int64], /) -> NDArray[Any]: ...


class SideBySide:
    """Several (N, D_i) matrices as one (N, sum of D_i). Reading rows concatenates only those rows."""

    def __init__(self, parts: Sequence[Matrix]) -> None:
        self.parts = list(parts)
        self.shape = (len(parts[0]), sum(part.shape[1] for part in parts))
        self.dtype = np.result_type(*(part.dtype for part in parts))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | NDArray[np.int64], /) -> NDArray[Any]:
        return np.concatenate([part[rows] for part in self.parts], axis=1)


class OneAfterAnother:
    """Several (N_i, D) matrices as one (sum of N_i, D). Reading rows copies only those rows."""

    def __init__(self, parts: Sequence[Matrix]) -> None:
        self.parts = list(parts)
        self.shape = (sum(len(part) for part in parts), parts[0].shape[1])
        self.dtype = np.result_type(*(part.dtype for part in parts))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | NDArray[np.int64], /) -> NDArray[Any]:
        wanted = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.arange(len(self))[rows]
        out, start = np.empty((len(wanted), self.shape[1]), self.dtype), 0
        for part in self.parts:
            here = (wanted >= start) & (wanted < start + len(part))
            out[here] = part[wanted[here] - start]
            start += len(part)
        return out
