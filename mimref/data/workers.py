"""Loader processes: how they start, and how their deaths are reported, with the image they were at."""

import atexit
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import RawArray
from types import FrameType
from typing import Any, TypeVar

from torch.utils.data import DataLoader, get_worker_info

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

    Raises DeadWorkerError for a process that has died, once its next batch is missing. torch would raise from a signal
    handler at once, wherever the main process is, even while it writes a file.
    """
    return _watched(loader, positions) if loader.num_workers else iter(loader)


def _watched(loader: DataLoader[_T], positions: WorkerPositions) -> Iterator[_T]:
    # Before the watch: torch installs its handler with the first loader of a process, over any other.
    batches = iter(loader)
    # Loader processes ignore the signals by which Python ends its children at exit, so it would wait for them.
    end_processes: Callable[[], None] = batches._shutdown_workers  # type: ignore[attr-defined]  # no public name
    atexit.register(end_processes)
    with _Watch(positions) as watch:
        try:
            yield from batches
            return
        except UserError as error:
            # torch puts the traceback of the process before the message.
            kind = type(error)
            raise kind(str(error).rpartition(f"{kind.__name__}: ")[2].strip()) from error
        except (RuntimeError, OSError, EOFError) as error:
            death = watch.death_behind(error)
            if death is None:
                raise
        finally:
            # Before torch's own handler is back, which would raise for a dead process; a traceback may hold the loader.
            end_processes()
            atexit.unregister(end_processes)
    raise DeadWorkerError(death)


class _Watch:
    """Records the deaths of a loader's processes while it is active.

    Any number of watches may overlap, as those of an evaluation within training do, and end in any order. Python allows
    signal handlers in the main thread only; elsewhere, deaths are found when a batch is missing.
    """

    def __init__(self, positions: WorkerPositions) -> None:
        self._positions = positions
        self._deaths: dict[int, str] = {}

    def __enter__(self) -> "_Watch":
        if hasattr(signal, "SIGCHLD") and _in_main_thread():
            _watches.append(self)
            if (before := signal.getsignal(signal.SIGCHLD)) is not _on_child_exit:
                _replaced[:] = [before]
                signal.signal(signal.SIGCHLD, _on_child_exit)
        return self

    def __exit__(self, *_: object) -> None:
        if self not in _watches:
            return
        _watches.remove(self)
        # A loader that is dropped in another thread leaves the handler to the next watch that ends in the main one.
        if not _watches and _in_main_thread() and signal.getsignal(signal.SIGCHLD) is _on_child_exit:
            before = _replaced.pop()
            if before is not None:  # one that was not installed from Python cannot be restored
                signal.signal(signal.SIGCHLD, before)

    def death_behind(self, error: Exception) -> str | None:
        """The death of a loader process that caused an error of the loader; None for any other error."""
        missed = str(error).startswith(("DataLoader worker", "Pin memory thread"))
        if not missed and not isinstance(error, ConnectionError | EOFError | FileNotFoundError):
            return None
        deadline = time.monotonic() + DYING_S
        self.poll()
        while not self._deaths and time.monotonic() < deadline:
            time.sleep(0.01)
            self.poll()
        if self._deaths:
            return "; ".join(self._deaths.values())
        if not missed:
            return None
        named = map(int, re.findall(r"\d+", str(error)))
        paths = self._positions.paths()
        return "; ".join(_death(str(error), paths[pid]) for pid in named if pid in paths) or (
            f"a loader process died ({error})"
        )

    def poll(self) -> None:
        """Record the processes that have died and were not yet waited for."""
        for pid, path in self._positions.paths().items():
            how = _end_of(pid)
            if how:
                self._deaths[pid] = _death(how, path)


_watches: list[_Watch] = []
# The handler that the first of them replaced.
_replaced: list[Any] = []


def _on_child_exit(_number: int, _frame: FrameType | None) -> None:
    """The signal handler for SIGCHLD."""
    for watch in list(_watches):
        watch.poll()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _death(how: str, path: str) -> str:
    return f"a loader process died ({how}) at {path}, or just after it"


def _end_of(pid: int) -> str | None:
    """How a child died; None while it lives and when it exited normally. It stays to be waited for."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    if ended is None or ended.si_status == 0:
        return None
    return f"exit code {ended.si_status}" if ended.si_code == os.CLD_EXITED else signal.strsignal(ended.si_status)
