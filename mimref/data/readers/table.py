"""Tables of image files, `list:FILE.csv`, `.tsv` or `.parquet` (see docs/data.md).

A path is opened as written, `..` and links included: unlike an archive, a table is the user's own list of files.
"""

import os
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from mimref.config.base import DataConfig
from mimref.data.decode import first_of, printable, reason_of
from mimref.data.labels import Indices, RawLabels, UnusableLabelsError
from mimref.data.readers.delimited import read_text_table, without_blanks
from mimref.data.sources import FileSource, NoSplitError, PathList, Split
from mimref.errors import DataError, did_you_mean

SPLITS = ("train", "val", "test")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


class Columns(NamedTuple):
    """Names of a table's columns by role; None for a role that no column has."""

    path: str
    label: str | None
    split: str | None


def open_table(data: DataConfig, split: Split) -> FileSource:
    """Open the images of a split, in the table's order.

    Classes are the distinct labels of the training rows, in the order of `RawLabels.classes`; without any, those of the
    validation rows. No image file is opened. Raises DataError for a table that is unreadable, incomplete or without an
    image of the split, and if none of its files exists.
    """
    spec = data.spec or ""
    file = os.path.expanduser(spec.removeprefix("list:"))
    table, columns, others, notices = _read(file, data)
    paths = _paths(table.column(columns.path), columns.path)
    rows = train = np.arange(len(paths), dtype=np.int64)
    if columns.split is not None:
        rows, train = _rows_of(table.column(columns.split), split)
    paths = _as_spelled(os.path.dirname(file), paths, rows)
    labels, classes, how_to_label = None, None, ""
    if columns.label is not None and (columns.split is not None or split == "train"):
        column = table.column(columns.label)
        try:
            if (own := _labels(column, rows, columns.label)) is not None:
                reference = own if split == "train" else _labels(column, train, columns.label)
                classes = (reference or own).classes()
                labels = own.encode(classes)
        except UnusableLabelsError as error:
            if data.label is not None:
                raise
            how_to_label = str(error)
            notices.append(f"{printable(spec)}: no labels are used: {error}")
    elif columns.label is None and others:
        how_to_label = f"name the column of labels with --set data.label=COLUMN (other columns: {first_of(others, 5)})"
    source = FileSource(printable(spec), os.path.dirname(file), paths, labels, classes, rows)
    source.notices, source.how_to_label = notices, how_to_label
    _check_files(source)
    return source


def _read(file: str, data: DataConfig) -> tuple[pa.Table, Columns, list[str], list[str]]:
    """Return the columns in use as a table, their roles, the names of the other columns, and notices.

    The columns of a text table stay text, so that a class 007 keeps its name.
    """
    kind = os.path.splitext(file)[1].lower()
    if kind in (".xlsx", ".xlsm", ".xls", ".ods"):
        raise DataError("a spreadsheet is not read; save it as CSV (UTF-8), and name that file")
    if kind not in (".csv", ".tsv", ".parquet"):
        raise DataError(f"a list is a .csv, .tsv or .parquet file, not {kind or 'one without a suffix'!r}")
    notices: list[str] = []
    try:
        if kind == ".parquet":
            schema = pa.parquet.read_schema(file)
            names = schema.names
            _refuse_images(schema, data.image or "path")
            columns = _columns(names, data)
            table = pa.parquet.read_table(file, columns=[name for name in names if name in columns])
        else:
            table, notices = read_text_table(file, data.image or "path")
            names = table.column_names
            columns = _columns(names, data)
            table = without_blanks(table.select([name for name in names if name in columns]))
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"the list cannot be read ({printable(reason_of(error))})") from error
    if not table.num_rows:
        raise DataError("has no rows")
    return table, columns, [name for name in names if name not in columns], notices


def _refuse_images(schema: pa.Schema, wanted: str) -> None:
    """Raise DataError for a table that holds images, not paths."""
    holding = [field.name for field in schema if pa.types.is_struct(field.type) or _is_binary(field.type)]
    if holding and wanted not in set(schema.names) - set(holding):
        raise DataError(
            f"holds images in column {printable(holding[0])!r}, not their paths; put it into a folder of its own, with "
            "a name that starts with train or validation, and name that as hf:FOLDER"
        )


def _is_binary(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _columns(names: Sequence[str], data: DataConfig) -> Columns:
    """Return the columns by role; names may differ in case. Raises DataError without paths, and for duplicates."""

    def find(wanted: str) -> str | None:
        near = [name for name in names if name == wanted] or [name for name in names if name.lower() == wanted.lower()]
        if len(near) > 1:
            raise DataError(f"has two columns {printable(near[0])!r}; keep one")
        return near[0] if near else None

    shown = ", ".join(map(printable, names)) or "none"
    for setting, wanted in (("data.image", data.image), ("data.label", data.label)):
        if wanted is not None and find(wanted) is None:
            raise DataError(
                f"has no column {wanted!r}, which {setting} names{did_you_mean(wanted, names)} (its columns: {shown})"
            )
    path = find(data.image or "path")
    if path is None:
        near = did_you_mean("path", names)
        raise DataError(
            f"has no column 'path'{near} (its first row names {shown}); rename the column of files, or name it with "
            "--set data.image=COLUMN"
        )
    return Columns(path, find(data.label or "label"), find("split"))


def _paths(column: pa.ChunkedArray, name: str) -> PathList:
    """Return the paths. Raises DataError for rows without a path, and for URLs."""
    if not _is_text(column.type):
        raise DataError(f"column {printable(name)!r} holds {column.type}, not text")
    column = column.cast(pa.string())
    for bad, what in (
        (pc.fill_null(pc.equal(column, ""), True), "has no path"),
        (pc.starts_with(column, "file://"), "has a path that starts with file://; leave that out"),
        (pc.match_substring(column, "://"), "is an address, not a file; download the images first"),
        (pc.match_substring(column, "\0"), "has a path with a zero byte"),
    ):
        if (row := pc.index(bad, True).as_py()) >= 0:
            raise DataError(f"row {row + 1} {what}")
    packed = pa.concat_arrays([pa.array([], pa.large_binary()), *column.cast(pa.large_binary()).chunks])
    _, ends, content = packed.buffers()
    return PathList(
        np.frombuffer(content, dtype=np.uint8),
        np.frombuffer(ends, dtype=np.int64)[packed.offset : packed.offset + len(packed) + 1],
    )


def _rows_of(column: pa.ChunkedArray, split: Split) -> tuple[Indices, Indices]:
    """Return the rows of a split, and those of train."""
    if not _is_text(column.type):
        raise DataError(f"column 'split' holds {column.type}, not {', '.join(SPLITS)}")
    names = pc.utf8_lower(pc.fill_null(column.cast(pa.string()), ""))
    if unknown := sorted(set(pc.unique(names).to_pylist()) - set(SPLITS)):
        row = pc.index(names, unknown[0]).as_py() + 1
        near = did_you_mean(unknown[0], SPLITS)
        raise DataError(f"row {row} has split {printable(unknown[0])!r}{near} (known: {', '.join(SPLITS)})")
    train, val, test = (np.flatnonzero(pc.equal(names, name).to_numpy()) for name in SPLITS)
    chosen = train if split == "train" else val if len(val) else test
    if not len(chosen):
        raise NoSplitError(f"no row has split {'train' if split == 'train' else 'val or test'}")
    return chosen, train


def _labels(column: pa.ChunkedArray, rows: Indices, name: str) -> RawLabels | None:
    """Return the labels of some rows; None if no row has one. Raises DataError if only some rows have one."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise UnusableLabelsError(f"column {printable(name)!r} holds {kind}; labels are class names or whole numbers")
    column = column.take(rows)
    missing = pc.is_null(column)
    if pc.all(missing, min_count=0).as_py():  # true without rows
        return None
    if (first := pc.index(missing, True).as_py()) >= 0:
        raise DataError(
            f"row {rows[first] + 1} has no label, although others of its split have; fill it in or drop the row"
        )
    raw = RawLabels.from_strings(column.cast("string").to_pandas())
    if all(re.fullmatch(r"[-+]?\d*\.\d*", each) for each in raw.names):
        what = f"column {printable(name)!r} holds labels such as {raw.names[0]}"
        raise UnusableLabelsError(f"{what}, which are neither class names nor whole numbers")
    return raw


def _as_spelled(folder: str, paths: PathList, rows: Indices) -> PathList:
    """Return the paths; those of `rows` in the Unicode spelling, composed or decomposed, in which their files exist."""
    if not (paths.content >= 0x80).any():
        return paths
    respelled: dict[int, str] = {}
    for row, path in zip(rows.tolist(), map(os.fsdecode, paths.encoded(rows)), strict=True):
        if not path.isascii() and not os.path.lexists(os.path.join(folder, path)):
            others = [unicodedata.normalize(form, path) for form in ("NFC", "NFD")]
            if found := [each for each in others if os.path.lexists(os.path.join(folder, each))]:
                respelled[row] = found[0]
    return PathList.pack(respelled.get(row, path) for row, path in enumerate(paths)) if respelled else paths


def _check_files(source: FileSource) -> None:
    """Raise DataError if no file of the split exists, as for paths of another folder or machine."""
    # Usually the first file exists.
    if any(os.path.lexists(os.path.join(source.folder, source.files[int(row)])) for row in source.rows):
        return
    first = [source.files[int(row)] for row in source.rows[:3]]
    if any(os.path.isabs(path) or _DRIVE.match(path) for path in first):
        advice = "write them as they are on this machine, or relative to the table's folder"
    elif os.sep not in "".join(first) and "\\" in first[0]:
        advice = "write / in place of \\"
    else:
        advice = f"relative paths begin at the table's folder, {printable(os.path.abspath(source.folder))}"
    more = ", ..." if len(source) > len(first) else ""
    raise DataError("; ".join([f"none of its files exists: {first_of(first)}{more}", advice, *source.notices]))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))
