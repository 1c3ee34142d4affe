"""Atomic writes, checks of output folders and files, and the cache folder."""

import errno
import getpass
import os
import secrets
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mimref.errors import OutputError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_DISK_BYTES = 1 << 20
"""A disk with less free space counts as full."""


def cache_folder() -> Path:
    """Return the folder of cached downloads and features: `$MIMREF_CACHE`, else `mimref` in the user's cache folder."""
    ensure_caches()
    return Path(os.environ.get("MIMREF_CACHE") or Path(_user_caches(), "mimref"))


def ensure_caches() -> Path | None:
    """Provide a cache folder in the temporary folder if the user has none, as in containers with an unknown user.

    Without one, libraries that compile code fail or write into a folder named `~`. If there is no home, the new folder
    becomes the home of this process. If only the caches cannot be written, just the folders that serve only as caches
    move there. Returns the folder if this process uses it.
    """
    global _caches
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user{os.getuid()}"  # libraries use it in file names
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = "/tmp"  # libraries ask for its name when they are imported, and most never write there
    home = os.path.expanduser("~")
    if (os.path.isabs(home) and _may_write(_user_caches())) or (folder := _private_folder()) is None:
        return _caches
    _caches = folder
    if not os.path.isdir(home) or home == os.path.sep:  # `/` is the home of an unknown user
        os.environ["HOME"] = str(folder)
        os.environ.pop("XDG_CACHE_HOME", None)
    else:
        for name in ("MIMREF_CACHE", "NUMBA_CACHE_DIR", "MPLCONFIGDIR", "TRITON_CACHE_DIR"):
            os.environ.setdefault(name, str(folder / name.lower()))
    return folder


_caches: Path | None = None


def _user_caches() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))


def _may_write(folder: Path) -> bool:
    """Return whether a folder can be written, or created."""
    existing = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)


def _private_folder() -> Path | None:
    """Return a folder in the temporary folder that only this user can write, since libraries run code they cache."""
    try:
        folder = Path(tempfile.gettempdir(), f"mimref-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
        return Path(tempfile.mkdtemp(prefix="mimref-"))
    except OSError:
        return None


def check_writable(folder: Path, option: str = "--out") -> None:
    """Raise OutputError if the folder clearly cannot be created or written. Writes nothing."""
    try:
        existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}; choose another {option}") from error
    if not existing.is_dir():
        raise OutputError(f"{folder}: {existing} is a file; choose another {option}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: {existing} cannot be written; choose another {option}")


def check_new_file(file: Path, endings: Sequence[str], force: bool, option: str = "--out") -> None:
    """Raise OutputError for a file that has another ending, exists (unless `force`) or cannot be written."""
    # timm and torch tell formats by endings in lower case.
    if file.suffix not in endings:
        raise OutputError(f"{option} {file}: the file's name must end in {' or '.join(endings)}")
    if file.is_dir():
        raise OutputError(f"{option} {file}: is a folder; choose the name of a file")
    if file.exists() and not force:
        raise OutputError(f"{option} {file}: exists; choose another name, or --force to replace it")
    check_writable(file.parent, option)


def check_new_folder(folder: Path, own: Sequence[str], force: bool, option: str = "--out") -> None:
    """Raise OutputError for a folder that cannot be written or is not empty.

    own: names of the files that `force` may replace, by replacing the folder.
    """
    check_writable(folder, option)
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if others := [name for name in names if name not in own]:
        raise OutputError(
            f"{option} {folder}: holds {others[0]!r}, which is not part of an export; choose another folder"
        )
    if names and not force:
        raise OutputError(f"{option} {folder}: exists; choose another name, or --force to replace it")


@contextmanager
def atomic_folder(folder: Path, option: str = "--out") -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that replaces it if the block ends without an error.

    Whatever interrupts the write, `folder` is never half-written. If it is a link, the folder that it points to is
    replaced. Raises OutputError like `atomic_path`.
    """
    folder = folder.resolve() if folder.is_symlink() else folder
    ending = secrets.token_hex(4)
    temporary, old = (folder.parent / f".{folder.name}.{ending}.{kind}" for kind in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        _sync(folder.parent)
    except OSError as error:
        advice = "free some space and run again" if error.errno in DISK_FULL else f"choose another {option}"
        raise OutputError(f"cannot write {folder}: {error.strerror or error}; {advice}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            if old.exists() and not folder.exists():
                os.replace(old, folder)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Replace `folder` by a folder of files that are on disk. A killed process leaves the old, the new, or neither."""
    old = folder.with_name(f".{folder.name}.old.tmp")
    _sync(temporary)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_path(path: Path, option: str = "--out") -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file written there replaces `path` if the block ends without an error.

    For libraries that need a file name. Creates missing folders. Whatever interrupts the write, `path` holds the old
    content or the new: the data is on disk before the name changes. Removes the temporary file after an error.
    option: name of the option that sets the path, for messages.
    Raises OutputError if the folder or the file cannot be written, or the disk is full.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        advice = "free some space and run again" if error.errno in DISK_FULL else f"choose another {option}"
        raise OutputError(f"cannot write {path}: {error.strerror or error}; {advice}") from error
    except Exception as error:
        # A library may report a full disk as an error of its own.
        if shutil.disk_usage(path.parent).free < FULL_DISK_BYTES:
            full = os.strerror(errno.ENOSPC)
            raise OutputError(f"cannot write {path}: {full}; free some space and run again") from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_write(path: Path, option: str = "--out") -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` if the block ends without an error; see `atomic_path`."""
    with atomic_path(path, option) as temporary, open(temporary, "wb") as file:
        yield file


def remove_halves(folder: Path, name: str) -> None:
    """Delete what killed processes left half-written of `name`, which may be a pattern; it can take up gigabytes."""
    for half in folder.glob(f".{name}.*.tmp"):
        if half.is_dir():
            shutil.rmtree(half)
        else:
            half.unlink(missing_ok=True)


def is_whole(file: BinaryIO) -> bool:
    """Return whether every member of a zip archive matches its stored CRC-32; `torch.load` checks none."""
    try:
        return zipfile.ZipFile(file).testzip() is None
    except Exception:  # zipfile raises many kinds of errors for damaged files
        return False


def write_bytes(path: Path, data: bytes, option: str = "--out") -> None:
    """Write `data` to `path` in one step; see `atomic_path`."""
    with atomic_write(path, option) as file:
        file.write(data)


def _sync(place: Path) -> None:
    """Make a file, or the new names in a folder, survive a power cut."""
    with suppress(OSError):  # not every system can synchronise folders
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
