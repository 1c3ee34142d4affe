"""Loader processes: what they read, how they start, and how their deaths are reported, with the image they were at."""

import atexit
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import RawArray
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset, _utils, get_worker_info

from mimref.data.decode import BadImage
from mimref.data.sources import ImageSource
from mimref.errors import DataError, UserError

DYING_S = 2.0
"""A broken connection can be noticed this long before the process behind it is dead."""

_T = TypeVar("_T")
_Batch = TypeVar("_Batch")


class DeadWorkerError(DataError):
    """A loader process that has died."""

    def __init__(self, death: str) -> None:
        super().__init__(f"{death}; try fewer --workers if memory ran out")
        self.death = death
        """How, and at which image."""


class BatchDataset(Dataset[_Batch]):
    """A data set whose items are batches. Loader processes record in shared memory which image they are at."""

    def __init__(self, source: ImageSource, workers: int) -> None:
        self.source = source
        # Process id and sample index of every worker.
        self._positions = RawArray("q", 2 * workers)

    def read(
        self, indices: Sequence[int], read: Callable[[int], _T]
    ) -> tuple[list[_T], list[int], list[tuple[str, str]]]:
        """`read` of every readable image, the indices of these images, and path and reason of the others."""
        images, good, bad = [], [], []
        worker = get_worker_info()
        self.source.fetch(indices)
        for index in indices:
            if worker is not None:
                self._positions[2 * worker.id : 2 * worker.id + 2] = os.getpid(), index
            try:
                images.append(read(index))
                good.append(index)
            except BadImage as error:
                bad.append((error.path, error.reason))
        return images, good, bad

    def positions(self) -> dict[int, str]:
        """The path of the image that each process recorded last, by process id."""
        pairs = zip(self._positions[::2], self._positions[1::2], strict=True)
        return {pid: self.source.path(index) for pid, index in pairs if pid}


def load(
    dataset: BatchDataset[_Batch], batches: Iterable[Any], *, workers: int, pin_memory: bool = False
) -> Iterator[_Batch]:
    """The items of a data set that `batches` lists, in order.

    Raises DeadWorkerError for a loader process that has died, once its next batch is missing.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
    )
    items: Any = iter(loader)
    if workers == 0:
        yield from items
        return
    # torch's handler of SIGCHLD would raise wherever the main process is, even while it writes a file.
    _utils.signal_handling._remove_worker_pids(id(items))  # type: ignore[attr-defined]  # no public name
    items._worker_pids_set = False
    # Loader processes ignore the signals by which Python ends its children at exit, so it would wait for them.
    atexit.register(items._shutdown_workers)
    try:
        yield from items
    except UserError as error:
        # torch puts the traceback of the process before the message.
        kind = type(error)
        raise kind(str(error).rpartition(f"{kind.__name__}: ")[2].strip()) from error
    except (RuntimeError, OSError, EOFError) as error:
        death = _death_behind(error, items._workers, dataset.positions())
        if death is None:
            raise
        raise DeadWorkerError(death) from error
    finally:
        items._shutdown_workers()  # now: a traceback may hold the loader
        atexit.unregister(items._shutdown_workers)


def _ignore_signals(_worker: int) -> None:
    """Leave SIGTERM and Ctrl-C to the main process, which saves before it stops its workers.

    Batch systems and terminals signal the whole process group, and a run that has lost its workers cannot save.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _death_behind(error: Exception, processes: Any, positions: dict[int, str]) -> str | None:
    """The death of a loader process that caused an error of the loader; None for any other error."""
    missed = str(error).startswith(("DataLoader worker", "Pin memory thread"))
    if not missed and not isinstance(error, ConnectionError | EOFError | FileNotFoundError):
        return None
    deadline = time.monotonic() + DYING_S
    while not (dead := [process for process in processes if process.exitcode]) and time.monotonic() < deadline:
        time.sleep(0.01)
    deaths = [
        f"a loader process died ({_how(process.exitcode)}) at {positions[process.pid]}, or just after it"
        for process in dead
        if process.pid in positions
    ]
    if deaths:
        return "; ".join(deaths)
    return f"a loader process died ({error})" if missed or dead else None


def _how(exit_code: int) -> str:
    return f"exit code {exit_code}" if exit_code > 0 else signal.strsignal(-exit_code) or f"signal {-exit_code}"
