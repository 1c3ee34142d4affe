"""Features on disk: one pass of an encoder over a data set is done once, and read by every later evaluation.

A pass is identified by what its numbers depend on (`pass_spec`); its folder holds one file of raw numbers per column,
which is memory-mapped when read, and `entry.json`, which is written last and names what is complete, with checksums.
While a pass goes on, its rows are appended below `partial/`, so memory does not grow with the data set and a killed
pass goes on where it stopped. A lock lets a second process wait for the first one's result.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from mimref.errors import DataError, OutputError
from mimref.features.cache.partial import DTYPES, INDICES, PartialPass, UnusableFolder, checksum
from mimref.features.encode import Batch, Column
from mimref.files import write_bytes
from mimref.locks import acquire
from mimref.progress import Progress

# While another process computes what is wanted, other ranks are told so now and then.
TELL_EVERY_S = 60.0
# To be raised when the same settings give other numbers than before.
FORMAT = 1
_KEYS = {"spec", "about", "dtype", "rows", "bad", "indices", "columns"}

Pass = Callable[[list[Column], int], Iterator[Batch]]
"""Runs the encoder for some columns, from a position in the data set on."""
Notice = Callable[[str], None]


@dataclass
class Stored:
    """Columns of a pass, memory-mapped or in memory: rows are the readable images, in data order."""

    columns: dict[Column, NDArray[Any]]
    """(N, D) each, float32 or float16."""
    indices: NDArray[np.int64]
    """(N,) position of every row in the data set."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of every image that could not be read."""


class DamagedFile(Exception):
    """A file that is not what `entry.json` says."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def pass_spec(
    *,
    weights: str,
    architecture: Mapping[str, Any],
    data: str,
    images: int,
    transform: Mapping[str, Any],
    precision: str,
) -> dict[str, Any]:
    """What a pass's numbers depend on, for JSON.

    weights, data: fingerprints of the weights and of the images. precision: of the encoder's arithmetic.
    """
    return {
        "format": FORMAT,
        "weights": weights,
        "architecture": dict(architecture),
        "data": data,
        "images": images,
        "transform": dict(transform),
        "precision": precision,
    }


class FeatureCache:
    """A folder of passes; with `folder` None, features live in memory alone."""

    def __init__(
        self,
        folder: Path | None,
        *,
        dtype: str = "fp32",
        note: Notice | None = None,
        waiting: Callable[[], None] | None = None,
    ) -> None:
        """waiting: called every minute while another process computes what is wanted."""
        self.folder, self.dtype, self._waiting = folder, dtype, waiting
        self.note: Notice = note or (lambda message: None)

    def columns(
        self,
        spec: Mapping[str, Any],
        wanted: Sequence[Column],
        run_pass: Pass,
        *,
        also: Sequence[Column] = (),
        about: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Stored:
        """The wanted columns of a pass, from disk where they are complete and sound, else from one run of the encoder.

        That run stores `also` as well. about: what `mimref cache list` tells of the pass. progress: images done.
        A folder that cannot be written is told, and the features are kept in memory. Raises OutputError when the disk
        is full (what is there is used by the next try), ConfigError for features beyond fp16, DataError without any
        readable image.
        """
        total = int(spec["images"])
        if self.folder is None:
            return _in_memory(wanted, run_pass(list(wanted), 0), total, progress)
        entry = Entry(self.folder / pass_key(spec, self.dtype), self.dtype)
        with suppress(DamagedFile):
            stored = entry.read(wanted)
            if stored is not None:
                return stored
        try:
            with self._locked(entry):
                # Another process may have written them while this one waited.
                stored = self._read_sound(entry, wanted)
                if stored is None:
                    known = entry.known()
                    missing = list(dict.fromkeys(c for c in [*wanted, *also] if c.name not in known))
                    entry.extend(missing, run_pass, spec, about or {}, progress=progress, note=self.note)
                    stored = entry.read(wanted)
        except UnusableFolder as reason:
            self.note(f"cache folder {self.folder} cannot be written ({reason}); features are kept in memory")
            return _in_memory(wanted, run_pass(list(wanted), 0), total, progress)
        assert stored is not None
        return stored

    def _read_sound(self, entry: "Entry", wanted: Sequence[Column]) -> Stored | None:
        """What can be read after damaged files are dropped; the lock is held."""
        try:
            return entry.read(wanted)
        except DamagedFile as damage:
            self.note(f"cached features in {entry.folder} are damaged ({damage}); they are computed again")
            entry.forget(damage.name)
            return self._read_sound(entry, wanted)

    @contextmanager
    def _locked(self, entry: "Entry") -> Iterator[None]:
        with ExitStack() as stack:
            try:
                entry.folder.mkdir(parents=True, exist_ok=True)
                stack.callback(self._wait_for(entry.lock_file).release)
            except OSError as error:
                raise UnusableFolder(error.strerror or str(error)) from error
            yield

    def _wait_for(self, file: Path) -> FileLock:
        try:
            return acquire(file, 0)
        except Timeout:
            self.note(f"another process computes these features; waiting for it ({file})")
        while True:
            try:
                return acquire(file, TELL_EVERY_S)
            except Timeout:
                if self._waiting:
                    self._waiting()


def pass_key(spec: Mapping[str, Any], dtype: str) -> str:
    """Name of a pass's folder."""
    return sha256(json.dumps([spec, dtype], sort_keys=True, default=str).encode()).hexdigest()[:20]


class Entry:
    """The folder of one pass."""

    def __init__(self, folder: Path, dtype: str | None = None) -> None:
        self.folder = folder
        self.lock_file = folder.parent / f"{folder.name}.lock"
        self._dtype = dtype

    def read(self, wanted: Sequence[Column]) -> Stored | None:
        """The columns, or None when one is missing. Raises DamagedFile for a file that is not what was written."""
        facts = self.facts()
        if facts is None or any(column.name not in facts["columns"] for column in wanted):
            return None
        rows = int(facts["rows"])
        indices = self._map(INDICES, facts["indices"], (rows,), np.dtype(np.int64))
        dtype = DTYPES[facts["dtype"]]
        columns = {}
        for column in wanted:
            kept = facts["columns"][column.name]
            columns[column] = self._map(column.name, kept, (rows, int(kept["width"])), dtype)
        return Stored(columns, np.asarray(indices), [(path, reason) for path, reason in facts["bad"]])

    def known(self) -> set[str]:
        """Names of the complete columns."""
        facts = self.facts()
        return set() if facts is None else set(facts["columns"])

    def facts(self) -> dict[str, Any] | None:
        """What `entry.json` says; None where there is none. Raises DamagedFile when it cannot be understood."""
        try:
            facts: dict[str, Any] = json.loads((self.folder / "entry.json").read_text())
            if facts["rows"] > 0 and facts["dtype"] in DTYPES and facts.keys() >= _KEYS and facts["columns"].keys():
                return facts
            raise ValueError
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFile("entry.json") from error

    def damaged(self) -> list[str]:
        """Names of the files that are not what was written."""
        try:
            facts = self.facts()
        except DamagedFile as damage:
            return [damage.name]
        if facts is None:
            return []
        found = []
        for name, kept in [(INDICES, facts["indices"]), *facts["columns"].items()]:
            try:
                self._check(name, kept, None)
            except DamagedFile as damage:
                found.append(damage.name)
        return found

    def forget(self, name: str) -> None:
        """Drop a damaged file; all of them when it is one that all depend on."""
        try:
            facts = self.facts()
        except DamagedFile:
            facts = None
        if facts is not None:
            facts["columns"].pop(name, None)
        try:
            if facts is None or name == INDICES or not facts["columns"]:
                (self.folder / "entry.json").unlink(missing_ok=True)
            else:
                self._write_facts(facts)
        except (OSError, OutputError) as error:
            raise UnusableFolder(getattr(error, "strerror", None) or str(error)) from error

    def extend(
        self,
        columns: list[Column],
        run_pass: Pass,
        spec: Mapping[str, Any],
        about: Mapping[str, Any],
        *,
        progress: Progress | None,
        note: Notice,
    ) -> None:
        """Run the encoder and add `columns`; the lock is held by the caller."""
        assert self._dtype is not None
        partial = PartialPass(self.folder / "partial", columns, self._dtype, int(spec["images"]))
        start = partial.resume()
        if start:
            note(f"an unfinished pass of the encoder goes on at image {start:,} of {spec['images']:,}")
        with partial.writing():
            for batch in run_pass(columns, start):
                partial.append(batch)
                if progress:
                    progress(batch.end, int(spec["images"]))
        self._adopt(partial, spec, about)

    def _adopt(self, partial: PartialPass, spec: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Make a finished pass part of the entry."""
        found = partial.reached
        if not found.rows:
            shutil.rmtree(partial.folder, ignore_errors=True)
            raise DataError(f"{about.get('data', 'the data set')}: no readable image")
        old = self.facts()
        indices = {"crc32": found.crc[INDICES]}
        # An image that has become unreadable since shifts all rows: what was stored before does not go with the new.
        columns = dict(old["columns"]) if old and old["indices"] == indices and old["rows"] == found.rows else {}
        for name in partial.names:
            os.replace(partial.folder / name, self.folder / name)
        columns |= {name: {"width": found.width[name], "crc32": found.crc[name]} for name in partial.names[1:]}
        self._write_facts(
            {
                "spec": dict(spec),
                "about": {**about, "written": datetime.now(UTC).isoformat(timespec="seconds")},
                "dtype": self._dtype,
                "rows": found.rows,
                "bad": found.bad,
                "indices": indices,
                "columns": columns,
            }
        )
        shutil.rmtree(partial.folder, ignore_errors=True)

    def _write_facts(self, facts: Mapping[str, Any]) -> None:
        write_bytes(self.folder / "entry.json", json.dumps(facts, indent=1, default=str).encode())

    def _map(self, name: str, kept: Mapping[str, Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        self._check(name, kept, int(np.prod(shape)) * dtype.itemsize)
        try:
            return np.memmap(self.folder / name, dtype, "r", shape=shape)
        except (OSError, ValueError) as error:
            raise DamagedFile(name) from error

    def _check(self, name: str, kept: Mapping[str, Any], size: int | None) -> None:
        try:
            if size is not None and os.path.getsize(self.folder / name) != size:
                raise DamagedFile(name)
            if checksum(self.folder / name) != kept["crc32"]:
                raise DamagedFile(name)
        except (OSError, KeyError, TypeError) as error:
            raise DamagedFile(name) from error


def _in_memory(columns: Sequence[Column], batches: Iterator[Batch], total: int, progress: Progress | None) -> Stored:
    kept: list[NDArray[Any]] = []
    indices: list[int] = []
    bad: list[tuple[str, str]] = []
    for batch in batches:
        bad += batch.bad
        if batch.indices:
            # Made once at full size: joining batches at the end would hold everything twice.
            kept = kept or [np.empty((total, values.shape[1]), dtype=np.float32) for values in batch.columns]
            for array, values in zip(kept, batch.columns, strict=True):
                array[len(indices) : len(indices) + len(values)] = values
            indices += batch.indices
        if progress:
            progress(batch.end, total)
    if not indices:
        raise DataError("no readable image")
    rows = {column: array[: len(indices)] for column, array in zip(columns, kept, strict=True)}
    return Stored(rows, np.asarray(indices, dtype=np.int64), bad)
