"""Loader processes that die: how, and at which image."""

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

# A broken connection can be noticed before the process behind it is dead.
DYING_S = 2.0

_T = TypeVar("_T")


class DeadWorkerError(DataError):
    """A loader process that has died."""

    def __init__(self, death: str) -> None:
        super().__init__(f"{death}; try fewer --workers if memory ran out")
        self.death = death
        """How, and at which image."""


class Reading:
    """The image that every loader process is at, in memory which the processes share."""

    def __init__(self, source: ImageSource, workers: int) -> None:
        self._source = source
        # Process id and sample index of every worker.
        self._notes = RawArray("q", 2 * workers)

    def note(self, index: int) -> None:
        """Say in a loader process that this image comes now; anywhere else nothing happens."""
        worker = get_worker_info()
        if worker is not None:
            self._notes[2 * worker.id : 2 * worker.id + 2] = os.getpid(), index

    def paths(self) -> dict[int, str]:
        """The image that each process noted last, by process id."""
        pairs = zip(self._notes[::2], self._notes[1::2], strict=True)
        return {pid: self._source.path(index) for pid, index in pairs if pid}


def watched(loader: DataLoader[_T], reading: Reading) -> Iterator[_T]:
    """The batches of a loader whose processes note the images they are at in `reading`.

    Raises DeadWorkerError for a process that has died, once its next batch is missed. torch would raise from a signal
    handler at once, wherever the main process is, be it in the middle of a file.
    """
    return _watched(loader, reading) if loader.num_workers else iter(loader)


def _watched(loader: DataLoader[_T], reading: Reading) -> Iterator[_T]:
    # Before the watch: torch installs its handler with the first loader of a process, over any other.
    batches = iter(loader)
    # Loader processes leave signals to the main one, with which Python would end them at its exit, and wait.
    end_processes: Callable[[], None] = batches._shutdown_workers  # type: ignore[attr-defined]  # no public name
    atexit.register(end_processes)
    with _Watch(reading) as watch:
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
            # Before torch watches again, which would raise for a dead process; a traceback may keep the loader.
            end_processes()
            atexit.unregister(end_processes)
    raise DeadWorkerError(death)


class _Watch:
    """While this lasts, processes of a loader that die are remembered.

    Any number of watches may overlap, as those of an evaluation within training do, and end in any order. Outside the
    main thread Python lets nobody watch.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._deaths: dict[int, str] = {}

    def __enter__(self) -> "_Watch":
        if hasattr(signal, "SIGCHLD") and _in_main_thread():
            _watches.append(self)
            if (before := signal.getsignal(signal.SIGCHLD)) is not _look:
                _replaced[:] = [before]
                signal.signal(signal.SIGCHLD, _look)
        return self

    def __exit__(self, *_: object) -> None:
        if self not in _watches:
            return
        _watches.remove(self)
        # A loader that is dropped in another thread leaves the handler to the next watch that ends in the main one.
        if not _watches and _in_main_thread() and signal.getsignal(signal.SIGCHLD) is _look:
            before = _replaced.pop()
            if before is not None:  # one that was not installed from Python cannot be put back
                signal.signal(signal.SIGCHLD, before)

    def death_behind(self, error: Exception) -> str | None:
        """The death of a loader process that an error of the loader comes from; None for any other error."""
        missed = str(error).startswith(("DataLoader worker", "Pin memory thread"))
        if not missed and not isinstance(error, ConnectionError | EOFError | FileNotFoundError):
            return None
        deadline = time.monotonic() + DYING_S
        self.look()
        while not self._deaths and time.monotonic() < deadline:
            time.sleep(0.01)
            self.look()
        if self._deaths:
            return "; ".join(self._deaths.values())
        if not missed:
            return None
        named = map(int, re.findall(r"\d+", str(error)))
        paths = self._reading.paths()
        return "; ".join(_death(str(error), paths[pid]) for pid in named if pid in paths) or (
            f"a loader process died ({error})"
        )

    def look(self) -> None:
        """Remember the processes that have died and were not yet waited for."""
        for pid, path in self._reading.paths().items():
            how = _end_of(pid)
            if how:
                self._deaths[pid] = _death(how, path)


_watches: list[_Watch] = []
# The handler before the first of them.
_replaced: list[Any] = []


def _look(_number: int, _frame: FrameType | None) -> None:
    """The signal handler: a process has ended."""
    for watch in list(_watches):
        watch.look()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _death(how: str, path: str) -> str:
    return f"a loader process died ({how}) at {path}, or just after it"


def _end_of(pid: int) -> str | None:
    """How a child has died; None while it lives and when it has come to a regular end. It stays to be waited for."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    if ended is None or ended.si_status == 0:
        return None
    return f"exit code {ended.si_status}" if ended.si_code == os.CLD_EXITED else signal.strsignal(ended.si_status)
