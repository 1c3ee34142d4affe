"""List, verify and delete the contents of the cache: features and listings of images."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mimref.data.index.cache import listings_folder
from mimref.errors import ConfigError, OutputError
from mimref.features.cache.store import PASS_NAME, DamagedFile, Entry
from mimref.files import cache_folder
from mimref.locks import Timeout, acquire, release


@dataclass(frozen=True)
class CacheEntry:
    """One pass of an encoder over one data set."""

    key: str
    model: str
    data: str
    """Name of the data set, with its split."""
    rows: int
    """Number of images."""
    columns: str
    bytes: int
    written: str
    """Date and time, UTC."""


def feature_folder(chosen: str | None = None) -> Path:
    """Return the folder of the feature cache: the chosen one, else the user's."""
    return Path(chosen).expanduser() if chosen else cache_folder() / "features"


def list_entries(folder: Path) -> list[CacheEntry]:
    """List all passes in the cache, including unfinished and damaged ones, in the order they were written."""
    return sorted((_describe(path) for path in _folders(folder)), key=lambda entry: entry.written)


def clear(folder: Path, keys: Sequence[str] = ()) -> tuple[int, list[str]]:
    """Delete the passes with these keys (or key prefixes), or all. Returns the bytes freed, and the passes in use.

    Raises ConfigError for a key that does not exist, OutputError for files that cannot be deleted.
    """
    entries = _folders(folder)
    for key in keys:
        if not any(path.name.startswith(key) for path in entries):
            raise ConfigError(f"cache entry {key!r} is not in {folder}; `mimref cache list` shows all entries")
    freed, busy = 0, []
    for path in entries:
        if keys and not path.name.startswith(tuple(keys)):
            continue
        lock_file = Entry(path).lock_file
        try:
            lock = acquire(lock_file, 0)
            try:
                size = _bytes(path)
                shutil.rmtree(path)
                freed += size
            finally:
                release(lock, lock_file)
        except Timeout:
            busy.append(path.name)
        except OSError as error:
            raise OutputError(f"{path} cannot be deleted: {error.strerror or error}") from error
    return freed, busy


@dataclass(frozen=True)
class Listings:
    """Cached listings of folders and sets of shards, which save scanning them at every start."""

    folder: Path
    count: int
    """Number of folders and sets of shards."""
    bytes: int


def listings() -> Listings:
    """Find the user's cached listings; they are always in the same folder, wherever features are cached."""
    folder = listings_folder()
    sizes = [path.stat().st_size for path in folder.glob("*.npz")]
    return Listings(folder, len(sizes), sum(sizes))


def clear_listings() -> int:
    """Delete the cached listings. Returns bytes freed. Raises OutputError for files that cannot be deleted."""
    cached = listings()
    for path in cached.folder.glob("*"):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{path} cannot be deleted: {error.strerror or error}") from error
    return cached.bytes


def damaged_files(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the key of each pass with the names of its damaged files."""
    for path in _folders(folder):
        yield path.name, Entry(path).damaged()


def _folders(folder: Path) -> list[Path]:
    """Return the folders of passes. A folder chosen by the user may hold other things, which are not touched."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(PASS_NAME, path.name) and path.is_dir())


def _describe(path: Path) -> CacheEntry:
    size = _bytes(path)
    try:
        facts, state = Entry(path).facts(), "unfinished"
    except DamagedFile:
        facts, state = None, "damaged"
    if facts is None:
        return CacheEntry(path.name, "", "", 0, state, size, "")
    about = {key: str(value) for key, value in facts["about"].items()}
    data = f"{about.get('data', '')} {about.get('split', '')}".strip()
    more = ", more in progress" if (path / "partial").is_dir() else ""
    columns = f"{len(facts['columns'])} x {facts['dtype']}{more}"
    rows = int(facts["rows"])
    return CacheEntry(path.name, about.get("model", ""), data, rows, columns, size, about.get("written", ""))


def _bytes(path: Path) -> int:
    return sum(os.path.getsize(os.path.join(root, name)) for root, _, names in os.walk(path) for name in names)
