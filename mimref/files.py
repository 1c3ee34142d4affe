"""Files that are either complete or absent, checks of where they go, and the folder of cached ones."""

import errno
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mimref.errors import OutputError

# A library that writes by itself may report a full disk as an error of its own kind; less than this is full.
FULL_DISK_BYTES = 1 << 20


def cache_folder() -> Path:
    """The folder of downloads and features: `$MIMREF_CACHE`, else `mimref` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("MIMREF_CACHE") or os.path.join(home, "mimref"))


def check_writable(folder: Path) -> None:
    """Raise OutputError when the folder clearly cannot be made or written. Writes nothing."""
    try:
        existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}; choose another --out") from error
    if not existing.is_dir():
        raise OutputError(f"{folder}: {existing} is a file; choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: {existing} cannot be written; choose another --out")


def check_new_file(file: Path, endings: Sequence[str], force: bool, option: str = "--out") -> None:
    """Raise OutputError for a file of another ending, one that exists (unless `force`) or cannot be written."""
    if file.suffix.lower() not in endings:
        raise OutputError(f"{option} {file}: the file's name must end in {' or '.join(endings)}")
    if file.is_dir():
        raise OutputError(f"{option} {file}: is a folder; choose the name of a file")
    if file.exists() and not force:
        raise OutputError(f"{option} {file}: exists; choose another name, or --force to replace it")
    check_writable(file.parent)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, which takes its place when the block ends without an error.

    For libraries that want a file name. Missing folders are made. The data is on disk before the name changes, so
    whatever interrupts the write, `path` holds the old content or the new. After an error the temporary file is gone.
    Raises OutputError when the folder or the file cannot be written, or the disk is full.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _output_error(path, error) from error
    except Exception as error:
        if _disk_is_full(path.parent):
            raise _output_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends without an error; see `atomic_path`."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def remove_halves(folder: Path, name: str) -> None:
    """Delete what kills have left of writing `name`, which may have stars; it may be gigabytes."""
    for half in folder.glob(f".{name}.*.tmp"):
        half.unlink(missing_ok=True)


def is_whole(file: BinaryIO) -> bool:
    """Whether every member of a zip archive, such as `torch.save` writes, has the CRC-32 that was written with it.

    torch checks none when it reads.
    """
    try:
        return zipfile.ZipFile(file).testzip() is None
    except Exception:  # whatever damage makes zipfile raise
        return False


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` in one step; see `atomic_path`."""
    with atomic_write(path) as file:
        file.write(data)


def _sync_folder(folder: Path) -> None:
    """The new name itself must survive a power cut; not every system lets a folder be synchronised."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _disk_is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < FULL_DISK_BYTES
    except OSError:
        return False


def _output_error(path: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"cannot write {path}: {reason}; free some space and run again")
    return OutputError(f"cannot write {path}: {reason}; choose another --out")
