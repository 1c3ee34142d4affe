"""Loader processes: how they read and send batches, and how their death is reported, with the image they were reading.

Batches travel through pipes, not shared memory: a container's /dev/shm is often too small for one batch, and a process
that exhausts it dies or waits forever. The main process watches a loader process whenever it waits for it.
"""

import atexit
import io
import os
import pickle
import select
import signal
import struct
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import cycle
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mimref.data.decode import BadImage, reason_of
from mimref.data.sources import ImageSource
from mimref.errors import DataError

DYING_S = 5.0
"""A pipe can break this long before the process at its other end is dead."""
CHECK_S = 1.0
"""Interval between checks of a process during a wait for it."""
STOPPED_CHECKS = 5
"""Number of consecutive checks that find a process stopped (SIGSTOP) before it is given up. A shell stops and continues
all processes at once."""
STALLED_CHECKS = 300
"""Number of checks (five minutes) without a report before a process is given up. It reports every image that it begins.
Other ranks wait for ten minutes."""

_T = TypeVar("_T")
_Batch = TypeVar("_Batch")

# A message consists of its kind, a number and, except for _AT, that many bytes.
_HEADER = struct.Struct("<cQ")
_AT, _TASK, _BATCH, _ERROR = b"@", b"T", b"B", b"E"


class DeadWorkerError(DataError):
    """A loader process that has died or hangs."""

    def __init__(self, death: str, advice: str = "try fewer --workers if memory ran out") -> None:
        super().__init__(f"{death}; {advice}")
        self.death, self.advice = death, advice
        """How it died or hangs, and at which image; and what to do."""


class BatchDataset(Dataset[_Batch]):
    """A data set whose items are batches. Loader processes report every image that they begin."""

    report: Callable[[int], None] | None = None
    """In a loader process: called with the index of every image before it is read."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def read(
        self, indices: Sequence[int], read: Callable[[int], _T]
    ) -> tuple[list[_T], list[int], list[tuple[str, str]]]:
        """Return `read` of every readable image, the indices of these images, and path and reason of the others."""
        images, good, bad = [], [], []
        self.source.fetch(indices)
        for index in indices:
            if self.report is not None:
                self.report(index)
            try:
                images.append(read(index))
                good.append(index)
            except BadImage as error:
                bad.append((error.path, error.reason))
        return images, good, bad


def load(
    dataset: BatchDataset[_Batch], batches: Iterable[Any], *, workers: int, pin_memory: bool = False
) -> Iterator[_Batch]:
    """Yield the items of a data set that `batches` lists, in order.

    Raises DeadWorkerError for a loader process that has died or hangs, once its next batch is missing, and DataError
    if loader processes cannot be started.
    """
    pinned: Callable[[Any], _Batch] = (lambda batch: batch.pin_memory()) if pin_memory else lambda batch: batch
    if workers == 0:
        for batch in batches:
            yield pinned(dataset[batch])
        return
    started: list[_Worker[_Batch]] = []

    def end() -> None:
        for worker in started:
            worker.end()

    # Loader processes ignore the signals with which Python ends its children at exit, so Python would wait for them.
    atexit.register(end)
    try:
        try:
            for _ in range(workers):
                started.append(_Worker(dataset))
        except OSError as error:
            raise DataError(
                f"cannot start {workers} loader processes ({reason_of(error)}); set fewer --workers, or --workers 0"
            ) from error
        asked: deque[_Worker[_Batch]] = deque()
        for worker, batch in zip(cycle(started), batches):  # `cycle` is endless
            # Receive a batch before the next task: both ends would wait if a list of images did not fit into the pipe.
            loaded = [asked.popleft().receive()] if len(asked) == workers else []
            worker.ask(batch)
            asked.append(worker)
            if loaded:
                yield pinned(loaded.pop())
        while asked:
            yield pinned(asked.popleft().receive())
    finally:
        end()  # now, as a traceback may keep the generator alive
        atexit.unregister(end)


class _Worker(Generic[_Batch]):
    """The main process's side of a loader process."""

    def __init__(self, dataset: BatchDataset[_Batch]) -> None:
        """Start the process. Raises OSError if the system refuses another process or pipe."""
        self.source = dataset.source
        self.at: int | None = None
        """Index of the last image that the process has reported."""
        theirs, self.tasks = Pipe(duplex=False)
        self.results, answers = Pipe(duplex=False)
        with theirs, answers:
            self.process = Process(target=_serve, args=(dataset, theirs, answers), daemon=True)
            self.process.start()
        for end in (self.tasks, self.results):
            os.set_blocking(end.fileno(), False)

    def ask(self, batch: Any) -> None:
        """Request a batch. Raises DeadWorkerError."""
        try:
            _send(self.tasks, _TASK, [pickle.dumps(batch)], self._watch())
        except BrokenPipeError as error:
            raise self._dead() from error

    def receive(self) -> _Batch:
        """Return the next requested batch. Raises DeadWorkerError, and whatever reading the batch raised."""
        watch = self._watch()
        try:
            while True:
                kind, number = _HEADER.unpack(_read(self.results, _HEADER.size, watch))
                if kind != _AT:
                    break
                self.at = number
                watch = self._watch()
            content = _read(self.results, number, watch)
            if kind == _ERROR:
                error, text = pickle.loads(content)
                raise self._failed(error, text)
            batch, sizes = pickle.loads(content)
            loaded: _Batch = pickle.loads(batch, buffers=[_read(self.results, size, watch) for size in sizes])
            return loaded
        except EOFError as error:
            raise self._dead() from error

    def end(self) -> None:
        """Kill the process, and close its pipes."""
        self.process.kill()
        self.process.join(DYING_S)
        self.tasks.close()
        self.results.close()

    def _watch(self) -> Callable[[], None]:
        """Return a function to call every CHECK_S of waiting. It raises DeadWorkerError if the process is given up."""
        looks = stopped = 0

        def look() -> None:
            """Count one check of the process; raise if the process is given up."""
            nonlocal looks, stopped
            looks, stopped = looks + 1, stopped + 1 if _is_stopped(self.process.pid) else 0
            if stopped == STOPPED_CHECKS:
                raise DeadWorkerError(f"a loader process was stopped (SIGSTOP){self._place()}", "start again")
            if looks == STALLED_CHECKS:
                raise DeadWorkerError(
                    f"a loader process has done nothing for {STALLED_CHECKS * CHECK_S / 60:g} minutes{self._place()}",
                    "check that this file can be read",
                )

        return look

    def _dead(self) -> DeadWorkerError:
        self.process.join(DYING_S)
        return DeadWorkerError(f"a loader process died ({_how(self.process.exitcode)}){self._place()}")

    def _failed(self, error: BaseException, text: str) -> BaseException:
        """Return the exception to raise for one of the process, whose traceback becomes the cause."""
        if isinstance(error, MemoryError):
            error = DeadWorkerError(f"a loader process ran out of memory{self._place()}", "set fewer --workers")
        error.__cause__ = RuntimeError(f"in a loader process:\n{text}")
        return error

    def _place(self) -> str:
        return "" if self.at is None else f" at {self.source.path(self.at)}, or just after it"


def _how(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"exit code {exit_code}"
    return signal.strsignal(-exit_code) or f"signal {-exit_code}"


def _is_stopped(pid: int | None) -> bool:
    """Return whether a process is stopped; False if the system does not report it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


# --- in the loader process


def _serve(dataset: BatchDataset[Any], tasks: Connection, results: Connection) -> None:
    """Read one batch after another, until the main process is gone."""
    # SIGTERM and Ctrl-C are left to the main process, which saves before it ends its loader processes: batch systems
    # and terminals signal the whole process group, and a run that has lost its loader processes cannot save.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = os.getppid()

    def watch() -> None:
        # Other loader processes hold copies of the main process's ends of the pipes, so the pipes do not break.
        if os.getppid() != parent:
            os._exit(1)

    def report(index: int) -> None:
        _write(results, _HEADER.pack(_AT, index), watch)

    dataset.report = report
    for end in (tasks, results):
        os.set_blocking(end.fileno(), False)
    with suppress(EOFError, BrokenPipeError):
        while True:
            _, size = _HEADER.unpack(_read(tasks, _HEADER.size, watch))
            batch = pickle.loads(_read(tasks, size, watch))
            try:
                parts = _packed(dataset[batch])
            except BaseException as error:
                _send(results, _ERROR, [_packed_error(error)], watch)
                return
            _send(results, _BATCH, parts, watch)


class _Pickler(pickle.Pickler):
    """Pickle tensors as arrays, whose content pickle can pass separately; torch would put it into shared memory."""

    def reducer_override(self, item: Any) -> Any:
        return (torch.from_numpy, (item.numpy(),)) if isinstance(item, Tensor) else NotImplemented


def _packed(batch: Any) -> list[Any]:
    """Return the parts of a message: the batch without the contents of its tensors, then these contents."""
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(batch)
    contents = [buffer.raw() for buffer in buffers]
    return [pickle.dumps((stream.getvalue(), [content.nbytes for content in contents])), *contents]


def _packed_error(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        packed = pickle.dumps((error, text))
        pickle.loads(packed)
        return packed
    except Exception:  # exceptions of any library, which may hold anything
        return pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), text))


# --- non-blocking pipes: `watch` is called every CHECK_S of waiting


def _send(pipe: Connection, kind: bytes, parts: Sequence[Any], watch: Callable[[], None]) -> None:
    """Write a message; its number is the size of its first part."""
    _write(pipe, _HEADER.pack(kind, len(parts[0])), watch)
    for part in parts:
        _write(pipe, part, watch)


def _write(pipe: Connection, content: Any, watch: Callable[[], None]) -> None:
    """Write some bytes. Raises BrokenPipeError."""
    left = memoryview(content)
    while left:
        _wait(pipe, select.POLLOUT, watch)
        left = left[os.write(pipe.fileno(), left) :]


def _read(pipe: Connection, size: int, watch: Callable[[], None]) -> Any:
    """Return `size` bytes, in memory of their own. Raises EOFError if the other end is closed."""
    content: Any = np.empty(size, dtype=np.uint8)
    left = memoryview(content)
    while left:
        _wait(pipe, select.POLLIN, watch)
        if not (count := os.readv(pipe.fileno(), [left])):
            raise EOFError
        left = left[count:]
    return content


def _wait(pipe: Connection, event: int, watch: Callable[[], None]) -> None:
    poll = select.poll()
    poll.register(pipe.fileno(), event)
    while not poll.poll(CHECK_S * 1000):
        watch()
