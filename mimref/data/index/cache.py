"""What was found out about a data set, kept in the cache folder for the next start."""

import hashlib
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimref.errors import OutputError
from mimref.files import atomic_write, cache_folder
from mimref.locks import one_at_a_time
from mimref.progress import LabelledProgress

Arrays = dict[str, NDArray[Any]]

SETTLED_NS = 2_000_000_000
"""What was changed less than this before it was looked at may change again within one tick of its file system's clock
(2 s on the coarsest), which its modification time would not show."""

SLOW_S = 1.0
"""What took longer to find out is kept however little it is, since other processes may be waiting for it, and told of
while it goes on."""


def settled(modified_ns: int, looked_ns: int) -> int:
    """A modification time to compare with later; -1, which nothing equals, where it might hide a change."""
    return modified_ns if modified_ns < looked_ns - SETTLED_NS else -1


def keep(kind: str, of: bytes, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Keep arrays under what they are of; where the cache cannot be written, the next start does without."""
    with suppress(OutputError), atomic_write(_file(kind, of)) as file:
        # numpy types its one option as if it could be among the arrays.
        np.savez(file, of=np.frombuffer(of, dtype=np.uint8), **arrays)  # type: ignore[arg-type]


def recall(kind: str, of: bytes) -> Arrays | None:
    """The arrays that were kept; None if there are none or they are damaged, which their checksums tell."""
    try:
        with np.load(_file(kind, of), allow_pickle=False) as kept:
            return dict(kept) if kept["of"].tobytes() == of else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def building_index(kind: str, of: bytes, progress: LabelledProgress | None) -> AbstractContextManager[None]:
    """Find out what is not kept yet while no other process does; those wait, and should then look again."""
    return one_at_a_time(
        _file(kind, of), lambda: progress("waiting for another process to list the images", 0, 1) if progress else None
    )


def delayed_progress(label: str, progress: LabelledProgress | None) -> Callable[[int, int], None]:
    """What takes the numbers of a look that begins now, and tells them once it has turned out to be a long one."""
    started = time.monotonic()

    def tell(done: int, total: int) -> None:
        if progress is not None and time.monotonic() - started > SLOW_S:
            progress(label, done, total)

    return tell


def listings_folder() -> Path:
    """Where all of it lies."""
    return cache_folder() / "listings"


def _file(kind: str, of: bytes) -> Path:
    return listings_folder() / f"{kind}-{hashlib.sha256(of).hexdigest()[:24]}.npz"
