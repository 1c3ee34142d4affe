"""Lock files, each held by one process at a time. The system releases a lock when its process dies."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock
from filelock import Timeout as Timeout

from mimref.errors import OutputError

WAITING_S = 1.0
# Loader processes of a killed run hold its lock until they notice, which takes up to 5 s.
PATIENCE_S = 8.0


def acquire(file: Path, timeout_s: float) -> FileLock:
    """Acquire a lock file; raises Timeout if another process holds it for longer, OSError if it cannot be locked."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=timeout_s)
    except NotImplementedError as error:  # how filelock reports a file system without locks
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), str(file)) from error
    return lock


def release(lock: FileLock, file: Path) -> None:
    """Release a lock and remove its file."""
    with suppress(OSError):
        file.unlink()  # before the release; otherwise another process could lock a file that is about to be removed
    lock.release()


@contextmanager
def one_at_a_time(path: Path, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold a lock while creating `path`. Other processes wait, and should then check whether it exists.

    waiting: called every second while another process holds the lock, a file beside `path`. If that file cannot be
    created, no process waits. Folders created for it are kept: other processes may be waiting in them.
    """
    file = path.with_name(f".{path.name}.lock")
    lock = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        while lock is None:
            try:
                lock = acquire(file, WAITING_S)
            except Timeout:
                waiting()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        release(lock, file)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `.lock` in the folder, which is created if missing; afterwards remove the lock and empty created folders.

    Raises OutputError if another process holds the lock, or the folder cannot be written.
    """
    created = [each for each in (folder, *folder.parents) if not each.exists()]
    file = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = acquire(file, PATIENCE_S)
    except Timeout as error:
        raise OutputError(
            f"{folder}: another process is using this folder; wait for it, or choose another --out "
            f"(if there is none, remove {file})"
        ) from error
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error
    try:
        yield
    finally:
        release(lock, file)
        for each in created:
            with suppress(OSError):
                each.rmdir()
