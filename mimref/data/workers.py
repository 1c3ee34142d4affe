"""Loader processes that die, and the image that each was at."""

import os
import re
from multiprocessing import RawArray
from weakref import WeakSet

from torch.utils.data import get_worker_info

from mimref.data.sources import ImageSource


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

    def path(self, pid: int) -> str | None:
        """The image that the process noted last; None when it noted none."""
        for at, index in zip(self._notes[::2], self._notes[1::2], strict=True):
            if at == pid:
                return self._source.path(index)
        return None


_current: WeakSet[Reading] = WeakSet()

_DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.+)", re.DOTALL)


def dead_worker(error: BaseException) -> str | None:
    """What torch's error says about a loader process that died, and the image it was at; None for any other error."""
    match = _DEATH.match(str(error))
    if match is None:
        # Raised by a signal handler, in the middle of a file it comes out as that file's error.
        return dead_worker(error.__context__) if error.__context__ else None
    pids = [int(pid) for pid in match[1].split(",")]
    paths = [path for pid in pids for reading in list(_current) if (path := reading.path(pid))]
    image = f"the image it was at, or had just read: {', '.join(paths)}" if paths else "it had read no image yet"
    how = " ".join(match[2].split()).rstrip(".")
    return f"a loader process (pid {match[1]}) {how}; {image}"
