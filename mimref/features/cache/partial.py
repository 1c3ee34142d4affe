"""A running pass on its way to the feature cache: rows are appended batch by batch and survive a kill."""

import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mimref.errors import ConfigError, OutputError
from mimref.features.encode import Batch, Column
from mimref.files import write_bytes

SAVE_EVERY_S = 10.0
DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
INDICES = "images"
"""File of every row's position in the data set."""
TRAITS = "traits"
"""File of every row's traits, see `mimref.data.traits`; only an unfinished pass needs it."""
_CHUNK = 1 << 20


class UnusableFolder(Exception):
    """The reason why a cache folder cannot be written."""


@dataclass(frozen=True)
class _Reached:
    """Progress of a pass. Replaced, never modified, so that it stays consistent at any interruption."""

    done: int
    """Position reached in the data set."""
    rows: int
    width: dict[str, int]
    crc: dict[str, int]
    bad: list[tuple[str, str]]


class PartialPass:
    """The files of a running pass; `progress.json` records how far they are valid."""

    def __init__(self, folder: Path, columns: Sequence[Column], dtype: str, total: int) -> None:
        self.folder, self.total = folder, total
        self.columns = [column.name for column in columns]
        self.names = [INDICES, TRAITS, *self.columns]
        self.dtype, self._numbers = dtype, DTYPES[dtype]
        self.reached = _Reached(0, 0, {}, dict.fromkeys(self.names, 0), [])
        self._files: dict[str, BinaryIO] = {}
        self._saved_s = 0.0

    def resume(self) -> int:
        """Continue an interrupted pass of the same columns if it is intact. Returns the position to continue at."""
        try:
            left = json.loads((self.folder / "progress.json").read_text())
            if left["names"] != self.names or left["dtype"] != self._numbers.name or left["total"] != self.total:
                raise ValueError
            width = {name: int(value) for name, value in left["width"].items()}
            for name in self.names:
                size = int(left["rows"]) * self._row_bytes(name, width)
                os.truncate(self.folder / name, min(size, os.path.getsize(self.folder / name)))
                if checksum(self.folder / name) != left["crc"][name]:
                    raise ValueError
            bad = [(path, reason) for path, reason in left["bad"]]
            self.reached = _Reached(int(left["done"]), int(left["rows"]), width, left["crc"], bad)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            shutil.rmtree(self.folder, ignore_errors=True)
        return self.reached.done

    def restart(self) -> None:
        """Discard what `resume` found."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.reached = _Reached(0, 0, {}, dict.fromkeys(self.names, 0), [])

    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return the positions and the traits of the images whose rows `resume` found."""
        return np.fromfile(self.folder / INDICES, np.int64), np.fromfile(self.folder / TRAITS, np.uint8)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep the files open. However the block ends, `resume` finds what was appended."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files = {name: open(self.folder / name, "ab", buffering=0) for name in self.names}  # noqa: SIM115
        except OSError as error:
            raise UnusableFolder(error.strerror or str(error)) from error
        self._saved_s = time.monotonic()
        try:
            yield
            try:
                for file in self._files.values():
                    os.fsync(file.fileno())
            except OSError as error:
                raise self._output_error(error) from error
        finally:
            with suppress(OutputError):
                self._save()
            for file in self._files.values():
                file.close()

    def append(self, batch: Batch) -> None:
        """Add a batch's rows to every file. Raises OutputError when the disk is full."""
        before = self.reached
        width, crc = before.width, dict(before.crc)
        if batch.indices:
            if not before.rows:
                width = {name: column.shape[1] for name, column in zip(self.columns, batch.columns, strict=True)}
                self._check_space(width)
            traits = np.asarray(batch.traits or [0] * len(batch.indices), dtype=np.uint8)
            files: list[NDArray[Any]] = [np.asarray(batch.indices, dtype=np.int64), traits, *batch.columns]
            for name, values in zip(self.names, files, strict=True):
                data = np.ascontiguousarray(self._converted(name, values)).data.cast("B")
                crc[name] = zlib.crc32(data, crc[name])
                self._write(name, data)
        rows = before.rows + len(batch.indices)
        self.reached = _Reached(batch.end, rows, width, crc, before.bad + batch.bad)
        if time.monotonic() - self._saved_s >= SAVE_EVERY_S:
            self._save()
            self._saved_s = time.monotonic()

    def _write(self, name: str, data: memoryview) -> None:
        try:
            while data:
                data = data[self._files[name].write(data) :]
        except OSError as error:
            raise self._output_error(error) from error

    def _converted(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        if values.dtype in (np.int64, np.uint8) or self.dtype == "fp32":
            return values
        if np.abs(values[np.isfinite(values)]).max(initial=0) > np.finfo(np.float16).max:
            raise ConfigError(f"features of {name} exceed the range of fp16; use --set cache.dtype=fp32")
        return values.astype(self._numbers)

    def _row_bytes(self, name: str, width: Mapping[str, int]) -> int:
        return {INDICES: 8, TRAITS: 1}.get(name) or width[name] * self._numbers.itemsize

    def _check_space(self, width: Mapping[str, int]) -> None:
        needed = self.total * sum(self._row_bytes(name, width) for name in self.names)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OutputError(
                f"cache folder {self.folder.parent.parent}: features need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB "
                "are free; choose another --cache DIR, --set cache.dtype=fp16 or --cache off"
            )

    def _save(self) -> None:
        progress = {"names": self.names, "dtype": self._numbers.name, "total": self.total, **asdict(self.reached)}
        write_bytes(self.folder / "progress.json", json.dumps(progress).encode(), "--cache")

    def _output_error(self, error: OSError) -> OutputError:
        return OutputError(
            f"cache folder {self.folder.parent.parent}: {error.strerror or error}; free some space and run again (it "
            "resumes), or choose another --cache DIR or --cache off"
        )


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            crc = zlib.crc32(data, crc)
    return crc
