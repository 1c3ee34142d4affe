"""Loader processes: how they start, and how their deaths are reported, with the image they were at."""

import atexit
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import RawArray
from typing import Any, TypeVar

from torch.utils.data import DataLoader, _utils, get_worker_info

from mimref.data.sources import ImageSource
from mimref.errors import DataError, UserError

DYING_S = 2.0
"""A broken connection can be noticed this long before the process behind it is dead."""

_T = TypeVar("_T")


class DeadWorkerError(DataError):
    """A loader process that has died."""

    def __init__(self, death: str) -> None:
        super().__init__(f"{death}; try fewer --workers if memory ran out")
        self.death = death
        """How, and at which image."""


class WorkerPositions:
    """The image that every loader process is at, in memory that the processes share."""

    def __init__(self, source: ImageSource, workers: int) -> None:
        self._source = source
        # Process id and sample index of every worker.
        self._positions = RawArray("q", 2 * workers)

    def record(self, index: int) -> None:
        """In a loader process: record that this image is next. No effect elsewhere."""
        worker = get_worker_info()
        if worker is not None:
            self._positions[2 * worker.id : 2 * worker.id + 2] = os.getpid(), index

    def paths(self) -> dict[int, str]:
        """The image that each process recorded last, by process id."""
        pairs = zip(self._positions[::2], self._positions[1::2], strict=True)
        return {pid: self._source.path(index) for pid, index in pairs if pid}


def ignore_signals(_worker: int) -> None:
    """Leave SIGTERM and Ctrl-C to the main process, which saves before it stops its workers (`worker_init_fn`).

    Batch systems and terminals signal the whole process group, and a run that has lost its workers cannot save.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def watched(loader: DataLoader[_T], positions: WorkerPositions) -> Iterator[_T]:
    """The batches of a loader whose processes record the images they are at.

    Raises DeadWorkerError for a process that has died, once its next batch is missing.
    """
    batches: Any = iter(loader)
    if loader.num_workers == 0:
        yield from batches
        return
    # torch's handler of SIGCHLD would raise wherever the main process is, even while it writes a file.
    _utils.signal_handling._remove_worker_pids(id(batches))  # type: ignore[attr-defined]  # no public name
    batches._worker_pids_set = False
    # Loader processes ignore the signals by which Python ends its children at exit, so it would wait for them.
    atexit.register(batches._shutdown_workers)
    try:
        yield from batches
    except UserError as error:
        # torch puts the traceback of the process before the message.
        kind = type(error)
        raise kind(str(error).rpartition(f"{kind.__name__}: ")[2].strip()) from error
    except (RuntimeError, OSError, EOFError) as error:
        death = _death_behind(error, batches._workers, positions)
        if death is None:
            raise
        raise DeadWorkerError(death) from error
    finally:
        batches._shutdown_workers()  # now: a traceback may hold the loader
        atexit.unregister(batches._shutdown_workers)


def _death_behind(error: Exception, processes: Any, positions: WorkerPositions) -> str | None:
    """The death of a loader process that caused an error of the loader; None for any other error."""
    missed = str(error).startswith(("DataLoader worker", "Pin memory thread"))
    if not missed and not isinstance(error, ConnectionError | EOFError | FileNotFoundError):
        return None
    deadline = time.monotonic() + DYING_S
    while not (dead := [process for process in processes if process.exitcode]) and time.monotonic() < deadline:
        time.sleep(0.01)
    paths = positions.paths()
    deaths = [
        f"a loader process died ({_how(process.exitcode)}) at {paths[process.pid]}, or just after it"
        for process in dead
        if process.pid in paths
    ]
    if deaths:
        return "; ".join(deaths)
    return f"a loader process died ({error})" if missed or dead else None


def _how(exit_code: int) -> str:
    return f"exit code {exit_code}" if exit_code > 0 else signal.strsignal(-exit_code) or f"signal {-exit_code}"
