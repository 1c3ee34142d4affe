"""Features made elsewhere, in .npz files."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimref.config.base import DataConfig
from mimref.data.sources import Split
from mimref.errors import DataError
from mimref.features.encode import Column
from mimref.features.matrix import Labels, Matrix, side_by_side


@dataclass
class FeatureFiles:
    """Features made elsewhere: .npz files with `x`, (N, D) or (N, blocks, D), and `y`, (N,)."""

    train_file: str
    val_file: str
    bad: list[tuple[str, str]] = field(default_factory=list)
    data: DataConfig | None = None

    def __post_init__(self) -> None:
        self._arrays = {"train": _read_npz(self.train_file), "val": _read_npz(self.val_file)}
        self.name = Path(self.val_file).stem
        shapes = [x.shape[1:-1] for x, _ in self._arrays.values()]
        if shapes[0] != shapes[1]:
            raise DataError(f"{self.train_file} and {self.val_file} hold features of different numbers of blocks")
        self.depth = int(shapes[0][0]) if shapes[0] else 1

    def prepare(self, wanted: Sequence[Column], splits: Sequence[Split] = ("train", "val")) -> None:
        """Nothing to do."""

    def matrix(self, split: Split, columns: Sequence[Column]) -> Matrix:
        """Features (N, D) of the blocks that the columns name."""
        x = self._arrays[split][0]
        blocks = list(dict.fromkeys(column.block for column in columns))
        return x if x.ndim == 2 else side_by_side([x[:, block - 1] for block in blocks])

    def labels(self, split: Split) -> Labels | None:
        """`y`."""
        return self._arrays[split][1]


def _read_npz(path: str) -> tuple[NDArray[Any], Labels]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile) or not {"x", "y"} <= set(file.files):
            raise DataError(f"{path}: has no arrays x (features) and y (labels); write it with np.savez")
        with file:
            x, y = file["x"], file["y"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as .npz ({error})") from error
    if x.ndim not in (2, 3) or y.ndim != 1 or len(x) != len(y) or y.dtype.kind not in "iu" or x.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: x has shape {x.shape} and type {x.dtype}, y {y.shape} and {y.dtype}; they must be (N, D) or "
            "(N, blocks, D) real numbers and (N,) whole numbers"
        )
    return x.astype(np.float32) if x.dtype not in (np.float16, np.float32) else x, y.astype(np.int64)
