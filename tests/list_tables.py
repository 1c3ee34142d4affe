"""Shared by tests of tables of files: empty files to name, and what mimref reads from a table."""

from pathlib import Path
from typing import Any

import numpy as np

from mimref.config.base import DataConfig
from mimref.data.open import open_source
from mimref.data.sources import FileSource


def touch(folder: Path, *names: str) -> None:
    """Create empty files for tables to name; none of them is read."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():  # touching it would change its modification time
            (folder / name).touch()


def opened(spec: str, split: Any = "train", **settings: Any) -> FileSource:
    source = open_source(DataConfig(spec=spec, **settings), split)
    assert isinstance(source, FileSource)
    return source


def files(source: FileSource) -> list[str]:
    return [source.files[row] for row in source.rows]


def labelled(source: FileSource) -> list[tuple[str, str]]:
    assert source.labels is not None and source.class_names is not None
    assert source.labels.dtype == np.int64
    return [(file, source.class_names[label]) for file, label in zip(files(source), source.labels, strict=True)]
