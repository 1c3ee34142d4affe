"""Tables of image files, `list:FILE.csv` and `list:FILE.parquet` (see docs/data.md).

A path is opened as written, `..` and links included: unlike an archive, a table is the user's own list of files.
"""

import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from mimref.data.decode import printable, reason_of
from mimref.data.labels import Indices, RawLabels
from mimref.data.sources import FileSource, NoSplitError, PathList, Split
from mimref.errors import DataError, did_you_mean

COLUMNS = ("path", "label", "split")
SPLITS = ("train", "val", "test")


def open_table(spec: str, split: Split) -> FileSource:
    """The images of a split, in the table's order.

    Classes are the distinct labels of the training rows, in the order of `RawLabels.classes`; without any, those of the
    validation rows. No image file is opened. Raises DataError for a table that is unreadable, incomplete or without an
    image of the split.
    """
    file = os.path.expanduser(spec.removeprefix("list:"))
    columns = _read(file)
    paths = _paths(columns["path"])
    rows = train = np.arange(len(paths), dtype=np.int64)
    if "split" in columns:
        rows, train = _rows_of(columns["split"], split)
    labels, classes = None, None
    if "label" in columns and ("split" in columns or split == "train"):
        own = _labels(columns["label"], rows)
        if own is not None:
            reference = own if split == "train" else _labels(columns["label"], train)
            classes = (reference or own).classes()
            labels = own.encode(classes)
    return FileSource(printable(spec), os.path.dirname(file), paths, labels, classes, rows)


def _read(file: str) -> dict[str, pa.ChunkedArray]:
    """The known columns; those of a .csv as text, so that a class 007 keeps its name."""
    kind = os.path.splitext(file)[1].lower()
    if kind not in (".csv", ".parquet"):
        raise DataError(f"a list is a .csv or .parquet file, not {kind or 'one without a suffix'!r}")
    try:
        if kind == ".csv":
            text = dict.fromkeys(COLUMNS, pa.string())
            table = pa.csv.read_csv(
                file,
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),
                # Only empty cells are missing values.
                convert_options=pa.csv.ConvertOptions(column_types=text, strings_can_be_null=True, null_values=[""]),
            )
            names = table.column_names
        else:
            names = pa.parquet.read_schema(file).names
            table = pa.parquet.read_table(file, columns=[name for name in names if name in COLUMNS])
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"the list cannot be read ({reason_of(error)})") from error
    if twice := next((name for name in COLUMNS if names.count(name) > 1), None):
        raise DataError(f"has two columns {twice!r}; keep one")
    if "path" not in names:
        near = did_you_mean("path", names)
        raise DataError(
            f"has no column 'path'{near} (its columns: {', '.join(map(printable, names)) or 'none'}; "
            "a .csv separates them by commas)"
        )
    if not table.num_rows:
        raise DataError("has no rows")
    return {name: table.column(name) for name in COLUMNS if name in names}


def _paths(column: pa.ChunkedArray) -> PathList:
    """Raises DataError for rows without a path, and for addresses."""
    if not _is_text(column.type):
        raise DataError(f"column 'path' holds {column.type}, not text")
    column = column.cast(pa.string())
    for bad, what in (
        (pc.fill_null(pc.equal(column, ""), True), "has no path"),
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
    """Rows of a split, and those of train."""
    if not _is_text(column.type):
        raise DataError(f"column 'split' holds {column.type}, not {', '.join(SPLITS)}")
    names = pc.fill_null(column.cast(pa.string()), "")
    if unknown := sorted(set(pc.unique(names).to_pylist()) - set(SPLITS)):
        row = pc.index(names, unknown[0]).as_py() + 1
        near = did_you_mean(unknown[0], SPLITS)
        raise DataError(f"row {row} has split {printable(unknown[0])!r}{near} (known: {', '.join(SPLITS)})")
    train, val, test = (np.flatnonzero(pc.equal(names, name).to_numpy()) for name in SPLITS)
    chosen = train if split == "train" else val if len(val) else test
    if not len(chosen):
        raise NoSplitError(f"no row has split {'train' if split == 'train' else 'val or test'}")
    return chosen, train


def _labels(column: pa.ChunkedArray, rows: Indices) -> RawLabels | None:
    """Labels of some rows; None if no row has any. Raises DataError if only some have."""
    kind = column.type
    if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        raise DataError(f"column 'label' holds {kind}; labels are class names or whole numbers")
    column = column.take(rows)
    missing = pc.is_null(column)
    if pc.all(missing).as_py():
        return None
    if (first := pc.index(missing, True).as_py()) >= 0:
        raise DataError(
            f"row {rows[first] + 1} has no label, although others of its split have; fill it in or drop the row"
        )
    raw = RawLabels.from_strings(column.cast("string").to_pandas())
    if all(re.fullmatch(r"[-+]?\d*\.\d*", name) for name in raw.names):
        raise DataError(f"labels such as {raw.names[0]} are neither class names nor whole numbers")
    return raw


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))
