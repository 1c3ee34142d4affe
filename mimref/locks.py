"""One process at a time: lock files, which the system releases when their process dies."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock
from filelock import Timeout as Timeout

from mimref.errors import OutputError

WAITING_S = 1.0


def acquire(file: Path, timeout_s: float) -> FileLock:
    """Hold a lock file, of which the system lets go when the process dies.

    Raises filelock's Timeout when another process holds it for longer, OSError where no lock can be had.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=timeout_s)
    except NotImplementedError as error:
        # So filelock calls a file system that has no locks; to us it is one more file that cannot be used.
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), str(file)) from error
    return lock


def release(lock: FileLock, file: Path) -> None:
    """Let go of a lock, and remove its file."""
    with suppress(OSError):
        file.unlink()  # before others can have it: they would hold a file that is no longer there
    lock.release()


@contextmanager
def one_at_a_time(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Make `path` while no other process does: those wait, and should then look whether it is there.

    waiting: called every second that another process takes.

    A lock file lies beside it meanwhile, of which the system lets go when the process dies. Where none can be made,
    nobody waits. Folders that are made for it stay: other processes may be waiting in them.
    """
    file = path.with_name(f".{path.name}.lock")
    lock = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        while lock is None:
            try:
                lock = acquire(file, WAITING_S)
            except Timeout:
                if waiting is not None:
                    waiting()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        release(lock, file)


# Loader processes of a run that was killed hold its files open until they notice, which takes them up to 5 s.
PATIENCE_S = 8.0


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `.lock` in the folder, which is made if need be; the system lets go of it when the process dies.

    Afterwards the lock file is gone, and so are the folders made for it if nothing else came into them. Raises
    OutputError when another process holds it for longer than loader processes survive a killed run, or when the folder
    cannot be written.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    file = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = acquire(file, PATIENCE_S)
    except Timeout as error:
        raise OutputError(
            f"{folder}: another process is at work in this folder; wait for it, or give another --out "
            f"(if there is none, remove {file})"
        ) from error
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); give another --out") from error
    try:
        yield
    finally:
        release(lock, file)
        for each in made:
            with suppress(OSError):
                each.rmdir()
