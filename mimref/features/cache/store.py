"""Features on disk: an encoder's pass over a data set runs once, and every later evaluation reads its result.

`pass_key` identifies a pass by everything that its numbers depend on. Its folder holds one file of raw numbers per
column, memory-mapped when read, and `entry.json`, which is written last and lists the complete files with checksums.
While a pass runs, its rows are appended below `partial/`: memory does not grow with the data set, and an interrupted
pass resumes. A lock makes a second process wait for the first one's result.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimref.data.decode import BadImage, none_readable
from mimref.data.sources import ImageSource
from mimref.distributed.group import world_size
from mimref.distributed.turns import keep_waiting
from mimref.errors import OutputError
from mimref.features.cache.partial import DTYPES, INDICES, PartialPass, UnusableFolder, checksum
from mimref.features.encode import Batch, Column, Features, gather
from mimref.features.matrix import Labels
from mimref.files import write_bytes
from mimref.locks import Timeout, acquire
from mimref.progress import Listener, Progress

# Interval at which rank 0 signals to the other ranks that it is still waiting for another process.
WAITING_EVERY_S = 60.0
# Increase this when the same settings produce different numbers than before.
FORMAT = 1
PASS_NAME = "[0-9a-f]{20}"
"""Pattern of the names that `pass_key` returns."""
_KEYS = {"spec", "about", "dtype", "rows", "bad", "indices", "columns"}

Pass = Callable[[list[Column], int], Iterator[Batch]]
"""Runs the encoder for some columns, starting at a position in the data set."""


class DamagedFile(Exception):
    """Name of a file that differs from its record in `entry.json`."""


@dataclass(frozen=True)
class FeatureCache:
    """A folder of passes."""

    folder: Path
    listener: Listener
    dtype: str = "fp32"

    def columns(
        self,
        spec: Mapping[str, Any],
        wanted: Sequence[Column],
        run_pass: Pass,
        *,
        also: Sequence[Column] = (),
        about: Mapping[str, Any] | None = None,
        source: ImageSource | None = None,
        notices: Callable[[], list[str]] = list,
        progress: Progress | None = None,
    ) -> Features:
        """Return the wanted columns of a pass, without labels, from disk or else from one run of the encoder.

        spec: everything that the numbers depend on, ready for JSON, with the number of `images`. also: columns that
        the same run caches as well. about: shown by `mimref cache list`. source: the images; if one that a cached or an
        interrupted pass could not read can be read now, the pass runs again. notices: called after a pass; its result
        is cached, too. If the folder cannot be written, this is reported and the features stay in memory.
        Raises OutputError when the disk is full (the next run resumes), ConfigError for features beyond the range of
        fp16, DataError if no image is readable.
        """
        about = about or {}
        entry, ran = Entry(self.folder / pass_key(spec, self.dtype)), False
        with suppress(DamagedFile):
            if (found := entry.read(wanted)) and not _readable_now(source, found.indices, found.bad):
                return found
        try:
            with self._locked(entry):
                # Another process may have written them meanwhile. New rows may not match those of older columns, which
                # are then computed again.
                while (found := self._read_intact(entry, wanted, None if ran else source)) is None:
                    known = (entry.facts() or {"columns": {}})["columns"]
                    missing = [column for column in dict.fromkeys([*wanted, *also]) if column.name not in known]
                    partial = PartialPass(entry.folder / "partial", missing, self.dtype, int(spec["images"]))
                    self._run(partial, missing, run_pass, source, progress)
                    entry.adopt(partial, spec, about, notices())
                    ran = True
        except UnusableFolder as reason:
            self.listener.note(f"cache folder {self.folder} cannot be written ({reason}); features stay in memory")
            name = str(about.get("data", "the data set"))
            found = gather(run_pass(list(wanted), 0), wanted, int(spec["images"]), name, progress)
            found.notices = notices()
        return found

    def _read_intact(self, entry: "Entry", wanted: Sequence[Column], source: ImageSource | None) -> Features | None:
        """Return what can be read after dropping damaged and outdated files; the caller holds the lock."""
        try:
            found = entry.read(wanted)
        except DamagedFile as damage:
            self.listener.note(f"cached features in {entry.folder} are damaged ({damage}); computing them again")
            entry.drop(str(damage))
            return self._read_intact(entry, wanted, source)
        if found is None or not _readable_now(source, found.indices, found.bad):
            return found
        self.listener.note("images that could not be read before can be read now; computing their features again")
        entry.drop("entry.json")
        return None

    def _run(
        self,
        partial: PartialPass,
        columns: list[Column],
        run_pass: Pass,
        source: ImageSource | None,
        progress: Progress | None,
    ) -> None:
        """Run the encoder for the rest of a pass; the caller holds the lock."""
        start = partial.resume()
        if start and source is not None:
            indices, traits = partial.rows()
            if _readable_now(source, indices, partial.reached.bad):
                partial.restart()
                start = 0
            else:
                source.record(indices.tolist(), traits.tolist())
        if start:
            self.listener.note(f"resuming an unfinished pass of the encoder at image {start:,} of {partial.total:,}")
        with partial.writing():
            for batch in run_pass(columns, start):
                partial.append(batch)
                if progress:
                    progress(batch.end, partial.total)

    @contextmanager
    def _locked(self, entry: "Entry") -> Iterator[None]:
        lock, timeout_s = None, 0.0
        while lock is None:
            try:
                entry.folder.mkdir(parents=True, exist_ok=True)
                lock = acquire(entry.lock_file, timeout_s)
            except Timeout:
                if timeout_s and world_size() > 1:
                    keep_waiting()
                elif not timeout_s:
                    self.listener.note(f"waiting for another process to compute these features ({entry.lock_file})")
                timeout_s = WAITING_EVERY_S
            except OSError as error:
                raise UnusableFolder(error.strerror or str(error)) from error
        try:
            yield
        finally:
            lock.release()


def _readable_now(source: ImageSource | None, indices: Labels, bad: Sequence[tuple[str, str]]) -> bool:
    """Return whether an image that a pass left out can be read now: neither its date nor its size need have changed.

    indices: positions of the images that the pass read, in data order. bad: path and reason of the others.
    """
    if source is None or not bad:
        return False
    paths = {path for path, _ in bad}
    missing = np.setdiff1d(np.arange(len(source)), indices).tolist()
    missing = [index for index in missing if source.path(index) in paths]  # not those that the pass has yet to reach
    source.fetch(missing)
    for index in missing:
        with suppress(BadImage):
            source.read(index)
            return True
    return False


def pass_key(spec: Mapping[str, Any], dtype: str) -> str:
    """Return the name of a pass's folder."""
    return sha256(json.dumps([spec, dtype], sort_keys=True, default=str).encode()).hexdigest()[:20]


class Entry:
    """The folder of one pass."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock_file = folder.parent / f"{folder.name}.lock"

    def read(self, wanted: Sequence[Column]) -> Features | None:
        """Return the columns, or None if one is missing. Raises DamagedFile for a file that differs from its record."""
        facts = self.facts()
        if facts is None or any(column.name not in facts["columns"] for column in wanted):
            return None
        rows, dtype = int(facts["rows"]), DTYPES[facts["dtype"]]
        indices = self._map(INDICES, facts["indices"], (rows,), np.dtype(np.int64))
        columns = {}
        for column in wanted:
            written = facts["columns"][column.name]
            columns[column] = self._map(column.name, written, (rows, int(written["width"])), dtype)
        bad = [(path, reason) for path, reason in facts["bad"]]
        return Features(columns, np.asarray(indices), bad=bad, notices=[str(line) for line in facts.get("notices", [])])

    def facts(self) -> dict[str, Any] | None:
        """Return the content of `entry.json`, or None if there is none. Raises DamagedFile if it is not valid."""
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
        """Return the names of the files that differ from what was written."""
        try:
            facts = self.facts()
        except DamagedFile as damage:
            return [str(damage)]
        files = {INDICES: facts["indices"], **facts["columns"]} if facts else {}
        return [name for name, written in files.items() if not self._is_intact(name, written)]

    def drop(self, name: str) -> None:
        """Remove a damaged file from the entry, and all others if they depend on it; the caller holds the lock."""
        facts = None if name in ("entry.json", INDICES) else self.facts()
        if facts:
            del facts["columns"][name]
        try:
            if facts and facts["columns"]:
                self._write_facts(facts)
            else:
                (self.folder / "entry.json").unlink(missing_ok=True)
        except (OSError, OutputError) as error:
            raise UnusableFolder(getattr(error, "strerror", None) or str(error)) from error

    def adopt(
        self, partial: PartialPass, spec: Mapping[str, Any], about: Mapping[str, Any], notices: Sequence[str] = ()
    ) -> None:
        """Make a finished pass part of the entry; the caller holds the lock."""
        found = partial.reached
        if not found.rows:
            shutil.rmtree(partial.folder, ignore_errors=True)
            raise none_readable(str(about.get("data", "the data set")), found.bad)
        old = self.facts()
        indices = {"crc32": found.crc[INDICES]}
        # An image that has since become unreadable shifts all rows; the older columns then do not match the new ones.
        columns = dict(old["columns"]) if old and old["indices"] == indices and old["rows"] == found.rows else {}
        for name in (INDICES, *partial.columns):
            os.replace(partial.folder / name, self.folder / name)
        columns |= {name: {"width": found.width[name], "crc32": found.crc[name]} for name in partial.columns}
        self._write_facts(
            {
                "spec": dict(spec),
                "about": {**about, "written": datetime.now(UTC).isoformat(timespec="seconds")},
                "dtype": partial.dtype,
                "rows": found.rows,
                "bad": found.bad,
                "notices": list(notices),
                "indices": indices,
                "columns": columns,
            }
        )
        shutil.rmtree(partial.folder, ignore_errors=True)

    def _write_facts(self, facts: Mapping[str, Any]) -> None:
        write_bytes(self.folder / "entry.json", json.dumps(facts, indent=1, default=str).encode(), "--cache")

    def _map(self, name: str, written: Mapping[str, Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        with suppress(OSError, ValueError):
            size = os.path.getsize(self.folder / name)
            if size == math.prod(shape) * dtype.itemsize and self._is_intact(name, written):
                return np.memmap(self.folder / name, dtype, "r", shape=shape)
        raise DamagedFile(name)

    def _is_intact(self, name: str, written: Mapping[str, Any]) -> bool:
        try:
            return checksum(self.folder / name) == int(written["crc32"])
        except (OSError, KeyError, TypeError):
            return False
