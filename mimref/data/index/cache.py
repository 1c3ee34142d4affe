"""Scans of data sets, saved in the cache folder for the next start."""

import hashlib
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mimref.errors import OutputError
from mimref.files import atomic_write, cache_folder
from mimref.locks import one_at_a_time
from mimref.progress import LabelledProgress

Arrays = dict[str, NDArray[Any]]
_T = TypeVar("_T")

CLOCK_TICK_NS = 2_000_000_000
"""Of the coarsest file system. A file that changed less than this before a scan may change again within one tick, which
its modification time would not show."""

SAVE_FROM_IMAGES = 10_000
LONG_SCAN_S = 1.0
"""A scan is saved when it found at least so many images, or took at least so long: other processes may be waiting for
it. A long one reports its progress."""


def comparable_time(modified_ns: int, scanned_ns: int) -> int:
    """A modification time to compare with later; -1, which equals none, where it might hide a change."""
    return modified_ns if modified_ns < scanned_ns - CLOCK_TICK_NS else -1


class Scan:
    """A scan that begins now: whether it is long enough to report its progress, and worth saving."""

    def __init__(self, label: str, progress: LabelledProgress | None) -> None:
        self._label, self._progress, self._started = label, progress, time.monotonic()

    def report(self, done: int, total: int) -> None:
        """Report progress, once the scan has turned out to be long."""
        if self._progress is not None and self._is_long():
            self._progress(self._label, done, total)

    def is_worth_saving(self, images: int) -> bool:
        """Whether the next start should not repeat it."""
        return images >= SAVE_FROM_IMAGES or self._is_long()

    def _is_long(self) -> bool:
        return time.monotonic() - self._started > LONG_SCAN_S


def save_index(kind: str, key: bytes, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Save arrays under a key; where the cache cannot be written, the next start scans again."""
    with suppress(OutputError), atomic_write(_file(kind, key)) as file:
        # numpy types its one option as if it could be among the arrays.
        np.savez(file, of=np.frombuffer(key, dtype=np.uint8), **arrays)  # type: ignore[arg-type]


def load_index(kind: str, key: bytes, names: set[str]) -> Arrays | None:
    """The saved arrays; None if there are none, if one of `names` is missing, or if a checksum does not match."""
    try:
        with np.load(_file(kind, key), allow_pickle=False) as saved:
            return dict(saved) if saved["of"].tobytes() == key and saved.keys() >= names else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def load_or_scan(
    kind: str, key: bytes, load: Callable[[], _T | None], scan: Callable[[], _T], progress: LabelledProgress | None
) -> _T:
    """What `load` returns or else `scan`, in one process at a time: the others wait, and load its result."""

    def report_waiting() -> None:
        if progress is not None:
            progress("waiting for another process to list the images", 0, 1)

    index = load()
    if index is None:
        with one_at_a_time(_file(kind, key), report_waiting):
            index = load()
            if index is None:
                index = scan()
    return index


def listings_folder() -> Path:
    """The folder of all saved scans."""
    return cache_folder() / "listings"


def _file(kind: str, key: bytes) -> Path:
    return listings_folder() / f"{kind}-{hashlib.sha256(key).hexdigest()[:24]}.npz"
