"""Hugging Face data sets on disk, `hf:FOLDER`, read with pyarrow alone.

FOLDER is what `save_to_disk` wrote, of one split or of several, or a clone of a data set's repository: parquet files in
it or in its `data/`, whose names (`train-00000-of-00002.parquet`) or folders (`train/`) tell their split. Training
images are those of train; validation images those of validation (valid, val, dev), else of test; other splits are left
alone. Files that tell no split serve both, and the validation images then stay unlabelled.

The image column is `image`, else the only one that is declared as images; it holds encoded files, bare or with a path
beside them. The label column is `label`, else the only one that is declared as classes. Declared classes keep their
names and order; -1 and missing values are no label.

Rows of arrow files are reached one by one in mapped memory. Parquet is compressed by groups of rows, and a whole group
is read for one of its rows; the last one stays in memory, so that reading in order costs little, while shuffled reading
costs a group per image. Training is faster from what `save_to_disk` wrote.
"""

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from glob import escape, glob
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from torch import Tensor

from mimref.data.decode import BadImage, Decoded, Reduce, decode_content, one_line, printable
from mimref.data.labels import Written
from mimref.data.sources import NoSplitError, Split
from mimref.data.splits import Indices
from mimref.errors import DataError

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "dev": "val",
    "test": "test",
}
OPEN_FILES = 32
"""Arrow files a process keeps open."""

ARROW_FILE = b"ARROW1"
"""How a file of arrow's other format, the one for random access, begins."""

Row = Callable[[int], Any]
"""From a row of a file to its cell of the image column."""


@dataclass(eq=False)
class TableSource:
    """Images in the cells of tables, decoded when read."""

    name: str
    folder: str
    files: list[str]
    """Paths relative to `folder`."""
    starts: Indices
    """(files + 1,) rows before each file, and of all."""
    column: str
    rows: Indices
    """(N,) row, counted over all files."""
    labels: Indices | None
    class_names: list[str] | None
    in_memory: bool = False
    _open: "OrderedDict[tuple[int, int], Row]" = field(default_factory=OrderedDict, repr=False)
    """By process and file: what one process has opened is not used in another."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def read(self, index: int) -> Tensor:
        """One image, uint8 (3, H, W). Raises BadImage when it cannot be read."""
        return self.read_reduced(index, None).image.contiguous()

    def read_reduced(self, index: int, reduce: Reduce | None) -> Decoded:
        """One image, a JPEG at a fraction of its size where `reduce` allows it. Raises BadImage as `read` does."""
        file, row = self._place(index)
        try:
            cell = self._rows_of(file)(row)
        except Exception as error:  # pyarrow's readers of damaged files raise many kinds
            raise BadImage(self.path(index), one_line(error)) from error
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if content is None:
            beside = cell.get("path") if isinstance(cell, dict) else None
            reason = f"not in the table, which names {printable(beside)} instead" if beside else "no image in this row"
            raise BadImage(self.path(index), reason)
        return decode_content(content, self.path(index), reduce)

    def path(self, index: int) -> str:
        """`FILE[ROW]`, rows counted from 0 in each file, with odd characters escaped."""
        file, row = self._place(index)
        return printable(f"{os.path.join(self.folder, self.files[file])}[{row}]")

    def keep(self, rows: Indices) -> None:
        """Forget all but these images."""
        self.rows = self.rows[rows]
        self.labels = None if self.labels is None else self.labels[rows]

    @cached_property
    def fingerprint(self) -> str:
        """Over names, sizes and modification times of the files, which rows of theirs, and labels."""
        digest = hashlib.sha256()
        for file in self.files:
            try:
                status = os.stat(os.path.join(self.folder, file))
                size, modified_ns = status.st_size, status.st_mtime_ns
            except OSError:
                size, modified_ns = -1, -1
            digest.update(os.fsencode(file) + f"\0{size}\0{modified_ns}\n".encode())
        digest.update(self.rows.tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def _place(self, index: int) -> tuple[int, int]:
        row = int(self.rows[index])
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        return file, row - int(self.starts[file])

    def _rows_of(self, file: int) -> Row:
        key = (os.getpid(), file)
        if key not in self._open:
            path = os.path.join(self.folder, self.files[file])
            # A parquet file comes with a group of rows in memory: one at a time is enough.
            while len(self._open) >= (1 if path.endswith(".parquet") else OPEN_FILES):
                self._open.popitem(last=False)
            self._open[key] = _open_rows(path, self.column)
        self._open.move_to_end(key)
        return self._open[key]


def open_tables(spec: str, split: Split) -> TableSource:
    """The images of a split, in the order of the files' names and then of their rows.

    Raises DataError when there are none, when files are missing or damaged, and for labels that some rows lack.
    """
    folder = os.path.expanduser(spec.removeprefix("hf:"))
    where = f"--data {printable(spec)}"
    parts = _parts(folder, where)
    if parts.keys() == {""}:
        files, train = parts[""], None
    else:
        files = parts.get("train", []) if split == "train" else parts.get("val") or parts.get("test") or []
        train = parts.get("train")
    if not files:
        raise NoSplitError(f"{where}: no {'train' if split == 'train' else 'validation or test'} images there")
    tables = _Tables(folder, files, where)
    labels, classes = None, None
    if split == "train" or "" not in parts:
        written = tables.labels()
        if written is not None:
            reference = _Tables(folder, train, where) if train and split == "val" else tables
            known = reference.labels() if reference is not tables else written
            classes = reference.declared_classes() or (known or written).classes()
            labels = written.numbered(classes, where)
    rows = np.arange(tables.starts[-1], dtype=np.int64)
    return TableSource(printable(spec), folder, files, tables.starts, tables.image, rows, labels, classes)


# --- which files


def _parts(folder: str, where: str) -> dict[str, list[str]]:
    """Files, relative to the folder, of train, val and test; or of the one split "" that serves for all."""
    if not os.path.isdir(folder):
        what = "is a file, not a folder" if os.path.exists(folder) else "no such folder"
        raise DataError(f"{where}: {what}")
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        names = _read_json(folder, "dataset_dict.json", where).get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{where}: dataset_dict.json lists no splits")
        return {SPLITS[name]: _saved(folder, name, where) for name in names if name in SPLITS}
    if os.path.isfile(os.path.join(folder, "state.json")):
        return {"": _saved(folder, "", where)}
    return _parquet(folder, where)


def _saved(folder: str, split: str, where: str) -> list[str]:
    """The arrow files of a split that `save_to_disk` wrote."""
    state = _read_json(folder, os.path.join(split, "state.json"), where)
    listed = state.get("_data_files")
    given = [each.get("filename") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    files = [name for name in given if isinstance(name, str)]
    if not files or len(files) < len(given):
        raise DataError(f"{where}: {os.path.join(split, 'state.json')} lists no files")
    if outside := [name for name in files if os.path.basename(name) != name or name in ("", ".", "..")]:
        raise DataError(
            f"{where}: {os.path.join(split, 'state.json')} leads out of its folder: {printable(outside[0])}"
        )
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{where}: a selection of rows that was never written out; save it again after flatten_indices()"
        )
    return [os.path.join(split, name) for name in files]


def _read_json(folder: str, file: str, where: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, file), encoding="utf-8") as text:
            table = json.load(text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise DataError(f"{where}: {file} cannot be read ({reason})") from error
    if not isinstance(table, dict):
        raise DataError(f"{where}: {file} is not a table")
    return table


def _parquet(folder: str, where: str) -> dict[str, list[str]]:
    """Parquet files by split; of a folder, those in it, in its `data/`, and in their folders of splits."""
    parts: dict[str, list[str]] = {}
    without: list[str] = []
    for base in ("data", ""):
        here = escape(os.path.join(folder, base))
        found = glob(os.path.join(here, "*.parquet")) + glob(os.path.join(here, "*", "*.parquet"))
        for path in sorted(found):
            file = os.path.relpath(path, folder)
            above = os.path.relpath(os.path.dirname(path), os.path.join(folder, base))
            if above != "." and above not in SPLITS:
                continue
            tokens = [above, *re.split(r"[-_.]", os.path.basename(file).lower())]
            split = next((SPLITS[token] for token in tokens if token in SPLITS), None)
            (without if split is None else parts.setdefault(split, [])).append(file)
        if parts or without:
            break
    if not parts and without:
        parts = {"": without}
    if not parts:
        below = sorted({os.path.dirname(path) for path in glob(os.path.join(escape(folder), "*", "*.parquet"))})
        hint = f"; name one of its folders: {', '.join(map(printable, below))}" if below else ""
        raise DataError(f"{where}: no data set saved by save_to_disk, and no .parquet files{hint}")
    for files in parts.values():
        _check_complete(files, where)
    return parts


def _check_complete(files: Sequence[str], where: str) -> None:
    """Files that say how many they are must all be there."""
    of_set: dict[tuple[str, int], int] = {}
    for file in files:
        if match := re.fullmatch(r"(.*)-\d+-of-(\d+)(?:-\w+)?\.parquet", file):
            key = (match[1], int(match[2]))
            of_set[key] = of_set.get(key, 0) + 1
    for (name, total), found in of_set.items():
        if found != total:
            raise DataError(f"{where}: {found} of {total} files {printable(name)}-*.parquet are there; get the others")


# --- what is in them


class _Tables:
    """The files of one split: their rows, columns and labels."""

    def __init__(self, folder: str, files: Sequence[str], where: str) -> None:
        self.where = where
        self.paths = [os.path.join(folder, file) for file in files]
        schemas, counts = zip(*(self._read(path, _describe) for path in self.paths), strict=True)
        self.schema: pa.Schema = schemas[0]
        self.features = _features(self.schema)
        self.image = self._image_column()
        for path, schema in zip(self.paths, schemas, strict=True):
            if self.image not in schema.names or not _holds_files(schema.field(self.image).type):
                raise DataError(f"{where}: {printable(path)} has no column {self.image!r} like that of the other files")
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if not self.starts[-1]:
            raise DataError(f"{where}: no rows in {printable(self.paths[0])}")

    def _read(self, path: str, read: Callable[[str], Any]) -> Any:
        try:
            return read(path)
        except (OSError, pa.ArrowException, ValueError, KeyError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
            raise DataError(f"{self.where}: {printable(path)} cannot be read ({reason}); get it anew") from error

    def _image_column(self) -> str:
        declared = [name for name, feature in self.features.items() if feature.get("_type") == "Image"]
        name = "image" if "image" in self.schema.names else declared[0] if len(declared) == 1 else None
        if name is None or name not in self.schema.names:
            columns = ", ".join(printable(each) for each in self.schema.names)
            raise DataError(f"{self.where}: no column 'image' (its columns: {columns})")
        kind = self.schema.field(name).type
        if not _holds_files(kind):
            raise DataError(f"{self.where}: column {name!r} holds {kind}, not the bytes of image files")
        return name

    def _label_column(self) -> str | None:
        declared = [name for name, feature in self.features.items() if feature.get("_type") == "ClassLabel"]
        if "label" in self.schema.names:
            return "label"
        return declared[0] if len(declared) == 1 and declared[0] in self.schema.names else None

    def declared_classes(self) -> list[str] | None:
        """Names of the label column's classes, where its schema has them."""
        names = self.features.get(self._label_column() or "", {}).get("names")
        return [str(name) for name in names] if isinstance(names, list) and names else None

    def labels(self) -> Written | None:
        """Labels of all rows; None if there are none."""
        name = self._label_column()
        if name is None:
            return None
        kind = self.schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{self.where}: column {name!r} holds {kind}; labels are whole numbers or class names")
        chunks = [chunk for path in self.paths for chunk in self._read(path, lambda p: _column(p, name)).chunks]
        column = pa.chunked_array(chunks, type=kind)
        missing = pc.is_null(column)
        if pa.types.is_integer(kind):
            missing = pc.or_(missing, pc.fill_null(pc.equal(column, -1), True))
        if pc.all(missing).as_py():
            return None
        if (row := pc.index(missing, True).as_py()) >= 0:
            raise DataError(f"{self.where}: row {row} of its split has no {name!r}, though others have")
        encoded = pa.concat_arrays(column.cast(pa.string()).chunks).dictionary_encode()
        names, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)
        classes = self.declared_classes()
        if classes is not None and pa.types.is_integer(kind):
            if outside := [number for number in names if not 0 <= int(number) < len(classes)]:
                raise DataError(
                    f"{self.where}: {name} {outside[0]} is none of the {len(classes)} classes of its schema"
                )
            names = [classes[int(number)] for number in names]
        return Written(names, codes)


def _holds_files(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_files(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """What the `datasets` library noted about each column."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _describe(path: str) -> tuple[pa.Schema, int]:
    if path.endswith(".parquet"):
        file = pa.parquet.ParquetFile(path)
        return file.schema_arrow, file.metadata.num_rows
    table = _map_table(path)
    return table.schema, table.num_rows


def _column(path: str, name: str) -> pa.ChunkedArray:
    if path.endswith(".parquet"):
        return pa.parquet.ParquetFile(path).read(columns=[name], use_threads=False).column(name)
    return _map_table(path).column(name)


def _map_table(path: str) -> pa.Table:
    """An arrow file in mapped memory: nothing is read until a cell is. `save_to_disk` writes the stream format."""
    file = pa.memory_map(path)
    if file.read_at(len(ARROW_FILE), 0) == ARROW_FILE:
        return pa.ipc.open_file(file).read_all()
    return pa.ipc.open_stream(file).read_all()


def _open_rows(path: str, name: str) -> Row:
    """What reads single rows of a file."""
    if not path.endswith(".parquet"):
        column = _map_table(path).column(name)
        return lambda row: column[row].as_py()
    file = pa.parquet.ParquetFile(path, memory_map=True, pre_buffer=False)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    last: tuple[int, pa.ChunkedArray | None] = (-1, None)

    def read(row: int) -> Any:
        """One value, from the row group that was read last where it holds the row."""
        nonlocal last
        group = int(np.searchsorted(starts, row, side="right")) - 1
        if last[0] != group:
            last = (-1, None)
            # Threads of the process that loader processes were forked from do not run in these.
            last = (group, file.read_row_group(group, columns=[name], use_threads=False).column(name))
        assert last[1] is not None
        return last[1][row - int(starts[group])].as_py()

    return read
