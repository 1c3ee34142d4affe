"""Features computed elsewhere, in .npz files."""

import zipfile
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimref.config.base import DataConfig
from mimref.data.sources import Split
from mimref.errors import Checks, DataError
from mimref.features.encode import Column, Features


class FeatureFiles:
    """Features from two .npz files with `x`, (N, D) or (N, blocks, D), `y`, (N,), and optionally `class_names`."""

    data: DataConfig | None = None

    def __init__(self, train_file: str, val_file: str) -> None:
        self.name = Path(val_file).stem
        checks = Checks()
        read = {file: checks.run("features", partial(read_features, file)) for file in (train_file, val_file)}
        self._features = {"train": checks.finished(read[train_file]), "val": checks.finished(read[val_file])}
        depths = {len(features.columns) for features in self._features.values()}
        if len(depths) > 1:
            raise DataError(f"{train_file} and {val_file} have features of different numbers of blocks")
        self.depth = depths.pop()
        names = [features.class_names for features in self._features.values()]
        if None not in names and names[0] != names[1]:
            raise DataError(f"{train_file} and {val_file} have different class_names; extract both from one data set")
        self.bad: list[tuple[str, str]] = []

    def prepare(self, wanted: Sequence[Column], splits: Sequence[Split] = ("train", "val")) -> None:
        """Do nothing, as everything is in memory."""

    def features(self, split: Split) -> Features:
        """Return all features of a split: columns `cls` of blocks 1, 2, ..."""
        return self._features[split]


def read_features(path: str) -> Features:
    """Read one file. Raises DataError for a file that is damaged or has other content."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile) or not {"x", "y"} <= set(file.files):
            raise DataError(f"{path}: has no arrays x (features) and y (labels); write it with np.savez")
        with file:
            x, y = file["x"], file["y"]
            names = file["class_names"] if "class_names" in file.files else None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as .npz ({error})") from error
    if x.ndim not in (2, 3) or y.ndim != 1 or len(x) != len(y) or y.dtype.kind not in "iu" or x.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: x has shape {x.shape} and type {x.dtype}, y {y.shape} and {y.dtype}; x must be real numbers "
            "(N, D) or (N, blocks, D), and y integers (N,)"
        )
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise DataError(
            f"{path}: class_names has shape {names.shape} and type {names.dtype}; give one string per class, or none"
        )
    x = x if x.dtype in (np.float16, np.float32) else x.astype(np.float32)
    blocks: list[NDArray[Any]] = [x] if x.ndim == 2 else list(x.swapaxes(0, 1))
    columns = {Column(number, "cls"): block for number, block in enumerate(blocks, 1)}
    class_names = None if names is None else [str(name) for name in names]
    return Features(columns, np.arange(len(x)), y.astype(np.int64), class_names)
