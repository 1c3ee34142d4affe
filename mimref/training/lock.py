"""One process at a time in an output folder."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import Timeout

from mimref.errors import OutputError
from mimref.files import acquire, release

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
