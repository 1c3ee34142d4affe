"""Scans of data sets, saved in the cache folder for the next start."""

import hashlib
import time
import zipfile
from collections.abc import Callable, Sized
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mimref.data.labels import Indices
from mimref.errors import OutputError
from mimref.files import atomic_write, cache_folder
from mimref.locks import one_at_a_time
from mimref.progress import LabelledProgress, Progress

Arrays = dict[str, NDArray[Any]]
_T = TypeVar("_T", bound=Sized)

CLOCK_TICK_NS = 2_000_000_000
"""Clock tick of the coarsest file system. A file that changed less than this before a scan may change again within the
same tick, which its modification time would not show."""

SAVE_FROM_IMAGES = 10_000
LONG_SCAN_S = 1.0
"""A scan is saved if it finds at least `SAVE_FROM_IMAGES` images or takes longer than this: other processes may be
waiting for it. A long scan reports its progress."""


def comparable_times(modified_ns: Indices, scanned_ns: Indices | int) -> Indices:
    """Return modification times to compare with later ones; -1, which equals none, if a time might hide a change."""
    return np.where(modified_ns < scanned_ns - CLOCK_TICK_NS, modified_ns, -1)


def load_or_scan(
    kind: str,
    key: bytes,
    progress: LabelledProgress | None,
    *,
    unpack: Callable[[Arrays], _T | None],
    scan: Callable[[Progress], tuple[_T, Arrays]],
) -> _T:
    """Return the index of a data set from the cache, else by a scan. One process scans at a time; others wait and load.

    kind: `folder` or `shards`. key: identifies the data set. scan: returns the index, whose length is the number of
    images, and its arrays. unpack: turns the arrays into the index; returns None if the data set has changed since.
    If the cache cannot be written, the next start scans again.
    """
    file = _file(kind, key)
    label = f"listing images, {'folder by folder' if kind == 'folder' else 'shard by shard'}"

    def load() -> _T | None:
        try:
            with np.load(file, allow_pickle=False) as saved:
                return unpack(dict(saved)) if saved["of"].tobytes() == key else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # missing, damaged or out of date
            return None

    def report_waiting() -> None:
        if progress is not None:
            progress("waiting for another process to list the images", 0, 1)

    def report(done: int, total: int) -> None:
        if progress is not None and time.monotonic() - started > LONG_SCAN_S:
            progress(label, done, total)

    if (index := load()) is not None:
        return index
    with one_at_a_time(file, report_waiting):
        if (index := load()) is not None:
            return index
        started = time.monotonic()
        index, arrays = scan(report)
        if len(index) >= SAVE_FROM_IMAGES or time.monotonic() - started > LONG_SCAN_S:
            with suppress(OutputError), atomic_write(file) as opened:
                # numpy's type hints treat its one option as if it could be among the arrays.
                np.savez(opened, of=np.frombuffer(key, dtype=np.uint8), **arrays)  # type: ignore[arg-type]
    return index


def listings_folder() -> Path:
    """Return the folder of all saved scans."""
    return cache_folder() / "listings"


def _file(kind: str, key: bytes) -> Path:
    return listings_folder() / f"{kind}-{hashlib.sha256(key).hexdigest()[:24]}.npz"
