"""Loader processes that die: how, and at which image."""

import os
import signal
import threading
import time
from contextlib import ExitStack
from multiprocessing import RawArray
from types import FrameType
from weakref import WeakSet

from torch.utils.data import get_worker_info

from mimref.data.sources import ImageSource

# A broken connection can be noticed before the process behind it is dead.
DYING_S = 2.0


class Reading:
    """The image that every loader process is at, in memory which the processes share."""

    def __init__(self, source: ImageSource, workers: int) -> None:
        self._source = source
        # Process id and sample index of every worker.
        self._notes = RawArray("q", 2 * workers)
        _current.add(self)

    def note(self, index: int) -> None:
        """Say in a loader process that this image comes now; anywhere else nothing happens."""
        worker = get_worker_info()
        if worker is not None:
            self._notes[2 * worker.id : 2 * worker.id + 2] = os.getpid(), index

    def paths(self) -> dict[int, str]:
        """The image that each process noted last, by process id."""
        pairs = zip(self._notes[::2], self._notes[1::2], strict=True)
        return {pid: self._source.path(index) for pid, index in pairs if pid}


_current: WeakSet[Reading] = WeakSet()


class WorkerWatch:
    """While this lasts, loader processes that die are remembered, to be told when their next batch is missed.

    torch would raise from a signal handler at once, wherever the main process is, be it in the middle of a file.
    Outside the main thread Python cannot watch.
    """

    def __init__(self) -> None:
        self._deaths: dict[int, str] = {}
        self._previous = ExitStack()

    def __enter__(self) -> "WorkerWatch":
        if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            handler = signal.signal(signal.SIGCHLD, self._look)
            if handler is not None:  # one that was not installed from Python cannot be put back
                self._previous.callback(signal.signal, signal.SIGCHLD, handler)
        return self

    def __exit__(self, *_: object) -> None:
        self._previous.close()

    def death_behind(self, error: Exception) -> str | None:
        """The death of a loader process that an error of the loader comes from; None for any other error."""
        missed = str(error).startswith(("DataLoader worker", "Pin memory thread"))
        if not missed and not isinstance(error, ConnectionError | EOFError | FileNotFoundError):
            return None
        deadline = time.monotonic() + DYING_S
        while not self._deaths and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._deaths:
            return "; ".join(self._deaths.values())
        return f"a loader process died ({error})" if missed else None

    def _look(self, _number: int, _frame: FrameType | None) -> None:
        """The signal handler: a process has ended."""
        for reading in list(_current):
            for pid, path in reading.paths().items():
                how = _end_of(pid)
                if how:
                    self._deaths[pid] = f"a loader process died ({how}) at {path}, or just after it"


def _end_of(pid: int) -> str | None:
    """How a child has died; None while it lives and when it has come to a regular end. It stays to be waited for."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    if ended is None or ended.si_status == 0:
        return None
    return f"exit code {ended.si_status}" if ended.si_code == os.CLD_EXITED else signal.strsignal(ended.si_status)
