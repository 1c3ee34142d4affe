"""The cache as a whole: features and listings of images, whether they are sound, and getting rid of them."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from mimref.data.index.cache import listings_folder
from mimref.errors import ConfigError, OutputError
from mimref.features.cache.store import DamagedFile, Entry
from mimref.files import cache_folder
from mimref.locks import acquire, release


@dataclass(frozen=True)
class CacheEntry:
    """One pass of an encoder over one data set."""

    key: str
    model: str
    data: str
    """With its split."""
    rows: int
    """Images."""
    columns: str
    bytes: int
    written: str
    """Date and time, UTC."""


def feature_folder(chosen: str | None = None) -> Path:
    """The folder of the feature cache: the one chosen, else the user's."""
    return Path(chosen).expanduser() if chosen else cache_folder() / "features"


def list_entries(folder: Path) -> list[CacheEntry]:
    """What the cache holds, in order of writing; unfinished and damaged passes are among it."""
    return sorted((_describe(path) for path in _folders(folder)), key=lambda entry: entry.written)


def clear(folder: Path, keys: Sequence[str] = ()) -> tuple[int, list[str]]:
    """Delete the passes of these keys (or beginnings of keys), or all; bytes freed, and passes left as they are in use.

    Raises ConfigError for a key that is not there, OutputError for files that cannot be deleted.
    """
    chosen = list(_folders(folder))
    for key in keys:
        if not any(path.name.startswith(key) for path in chosen):
            raise ConfigError(f"cache entry {key!r} is not in {folder}; `mimref cache list` tells what is")
    chosen = [path for path in chosen if not keys or any(path.name.startswith(key) for key in keys)]
    freed, busy = 0, []
    for path in chosen:
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
    """What is known of folders and sets of shards, so that they need not be gone through at every start."""

    folder: Path
    count: int
    """Folders, and sets of shards."""
    bytes: int


def listings() -> Listings:
    """The user's kept listings; there is one place for them, wherever features are kept."""
    folder = listings_folder()
    sizes = [path.stat().st_size for path in folder.glob("*.npz")]
    return Listings(folder, len(sizes), sum(sizes))


def clear_listings() -> int:
    """Delete the kept listings; bytes freed. Raises OutputError for files that cannot be deleted."""
    kept = listings()
    for path in kept.folder.glob("*"):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{path} cannot be deleted: {error.strerror or error}") from error
    return kept.bytes


def damaged_files(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Key of every pass and the names of its damaged files, one pass after the other."""
    for path in _folders(folder):
        yield path.name, Entry(path).damaged()


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _describe(path: Path) -> CacheEntry:
    size = _bytes(path)
    try:
        facts = Entry(path).facts()
    except DamagedFile:
        return CacheEntry(path.name, "", "", 0, "damaged", size, "")
    if facts is None:
        return CacheEntry(path.name, "", "", 0, "unfinished", size, "")
    about = {key: str(value) for key, value in facts["about"].items()}
    data = f"{about.get('data', '')} {about.get('split', '')}".strip()
    names = f"{len(facts['columns'])} x {facts['dtype']}" + (", more under way" if (path / "partial").is_dir() else "")
    return CacheEntry(
        path.name, about.get("model", ""), data, int(facts["rows"]), names, size, about.get("written", "")
    )


def _bytes(path: Path) -> int:
    return sum(os.path.getsize(os.path.join(root, name)) for root, _, names in os.walk(path) for name in names)
