"""Hugging Face data sets, `hf:FOLDER` and `hf:NAME` (see docs/data.md), read with the library `datasets`.

Splits other than train, validation and test are reported but not used. Files without a split serve both training and
validation, which is then unlabelled. Image cells hold encoded files, bare or with a path beside them, or paths of files
in the folder.

Images stay encoded in memory-mapped arrow files, which loader processes share, and are decoded when read. Parquet
cannot be read row by row, so the library first writes its images and labels to arrow files in the cache folder.
"""

import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from glob import escape, glob
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from numpy.typing import NDArray

from mimref.config.base import DataConfig
from mimref.data.decode import (
    BadImage,
    Decoded,
    Reduce,
    decode_array,
    decode_content,
    decode_file,
    first_of,
    printable,
    read_content,
    reason_of,
)
from mimref.data.labels import UnusableLabelsError
from mimref.data.readers.hf_columns import Columns, choose_columns, is_array, is_list, is_text, read_cell, read_labels
from mimref.data.sources import EncodedSource, NoSplitError, Split, fingerprint_files
from mimref.errors import DataError
from mimref.files import cache_folder
from mimref.progress import LabelledProgress

SPLITS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("validation", "valid", "val", "dev"), "val")
SPLITS["test"] = "test"


@dataclass(eq=False)
class TableSource(EncodedSource):
    """Images in the cells of a table, decoded when read."""

    cells: Any
    """The image column, a `datasets.Dataset` in arrow format."""
    place: str
    """`FOLDER/SPLIT` or `NAME/SPLIT`, used in the names of images."""
    folder: str
    files: list[str]
    """Files from which the table was read, relative to `folder`."""
    chosen: str = ""
    """Name of the image column, if the user chose it."""

    def read_reduced(self, index: int, reduce: Reduce | None) -> Decoded:
        """See `ImageSource`."""
        if self.holds_arrays:
            return decode_array(self._array(index), self.path(index), self.decoding)
        content = self.content(index)
        if isinstance(content, bytes):
            return decode_content(content, self.path(index), reduce, self.decoding)
        return decode_file(content, reduce, self.decoding)

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        """See `ImageSource`."""
        if self.holds_arrays:
            return None
        if isinstance(content := self.content(index), bytes):
            return content, self.path(index)
        return read_content(content), printable(content)

    @cached_property
    def holds_arrays(self) -> bool:
        """Whether cells hold images as numbers, not as encoded files."""
        return is_array(self.cells.data.column(self.cells.format["columns"][0]).type)

    def _array(self, index: int) -> NDArray[Any]:
        """Return the numbers of an image. Raises BadImage if they are not an array."""
        try:
            cell = self.cells[int(self.rows[index])].column(0)[0]
            if not cell.is_valid:
                raise ValueError("no image in this row")
            return read_cell(cell)
        except Exception as error:  # pyarrow's readers of damaged files raise many kinds
            raise BadImage(self.path(index), reason_of(error)) from error

    def content(self, index: int) -> bytes | str:
        """Return the content of an image's file, or its path. Raises BadImage if a cell has neither."""
        try:
            cell = self.cells[int(self.rows[index])].column(0)[0].as_py()
        except Exception as error:  # pyarrow's readers of damaged files raise many kinds
            raise BadImage(self.path(index), reason_of(error)) from error
        if isinstance(cell, list):
            cell = cell[0] if cell else None
        if isinstance(cell, str):
            cell = {"path": cell}
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if content is not None:
            return bytes(content)
        if path and (file := self._file(path)):
            return file
        if not path:
            raise BadImage(self.path(index), "no image in this row")
        table = first_of(self.files, 1)
        raise BadImage(self.path(index), f"not in the table {table}, which names {printable(path)} instead")

    def file(self, index: int) -> str | io.BytesIO:
        """Return what Pillow opens: the path of an image's file, or its content. Raises BadImage as `content` does."""
        content = self.content(index)
        return io.BytesIO(content) if isinstance(content, bytes) else content

    def _file(self, path: str) -> str | None:
        """Return the file that a cell names: absolute, or in the folder and relative to it or to a table's folder."""
        if os.path.isabs(path):  # the library refers in this way to files that it has downloaded one by one
            return path
        inside = os.path.join(os.path.realpath(self.folder), "")
        for below in dict.fromkeys(["", *map(os.path.dirname, self.files)]):
            file = os.path.realpath(os.path.join(self.folder, below, path))
            if file.startswith(inside) and os.path.isfile(file):
                return file
        return None

    def path(self, index: int) -> str:
        """Return `FOLDER/SPLIT[ROW]`, with rows counted from 0 and unprintable characters escaped."""
        return printable(f"{self.place}[{self.rows[index]}]")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over names, sizes and modification times of the files, rows, labels, and a chosen column."""
        files = [*self.files, *(file for path in self._named_paths() if (file := self._file(path)))]
        column = np.frombuffer(self.chosen.encode(), np.uint8)
        return fingerprint_files(self.folder, map(os.fsencode, files), self.rows, self.labels, column)

    def _named_paths(self) -> list[str]:
        """Return the paths in cells without the bytes of an image."""
        (name,) = self.cells.format["columns"]
        column = self.cells.data.column(name)
        if is_list(column.type) and not is_array(column.type):
            column = pc.list_flatten(column)
        if is_text(column.type):
            return [path for path in column.to_pylist() if path]
        if not pa.types.is_struct(column.type) or column.type.get_field_index("path") < 0:
            return []
        without = pc.is_null(pc.struct_field(column, "bytes"))
        return [path for path in pc.struct_field(column.filter(without), "path").to_pylist() if path]


class _Part(NamedTuple):
    """One split, before it is loaded."""

    name: str
    load: Callable[[DataConfig], tuple[Any, Columns]]
    """Returns a `datasets.Dataset`, and its columns in use."""
    files: list[str] | None = None
    """Parquet files, relative to the folder; None: the arrow files of the loaded data set."""


def open_hugging_face(
    data: DataConfig, split: Split, *, on_hub: bool, progress: LabelledProgress | None = None
) -> TableSource:
    """Open the images of a split, in the order of the files' names and then of their rows.

    Raises DataError if there are none, if files are missing or damaged, if a split is only partly labelled, if columns
    are ambiguous, and if the `datasets` package is missing.
    """
    spec = data.spec or ""
    place = os.path.expanduser(spec.removeprefix("hf:"))
    with _quiet_datasets():
        if progress is not None:
            progress(f"reading {printable(spec)}", 0, 1)
        parts, unused = _hub_parts(place) if on_hub else _folder_parts(place)
        held = "val" if "val" in parts else "test"
        part = parts.get("") or parts.get("train" if split == "train" else held)
        if part is None:
            raise NoSplitError(f"no {'train' if split == 'train' else 'validation or test'} images")
        table, columns = part.load(data)
        if not len(table):
            raise DataError(f"no rows in split {part.name!r}")
        _check_lists(table, columns.image)
        labels, classes, labelled = None, None, split == "train" or "" not in parts
        how_to_label = columns.how_to_label if labelled else ""
        if labelled and columns.label is not None:
            try:
                raw, classes = read_labels(table, columns.label)
                if raw is not None:
                    if split == "val" and "train" in parts:
                        train, of_train = parts["train"].load(data)
                        classes = (of_train.label and read_labels(train, of_train.label)[1]) or classes
                    labels = raw.encode(classes or [])
            except UnusableLabelsError as error:
                if data.label is not None:
                    raise
                classes, how_to_label = None, str(error)
                unused = [*unused, f"no labels are used: {error}"]
    arrow = [each["filename"] for each in table.cache_files]
    folder = os.path.dirname(arrow[0]) if on_hub else place
    files = part.files or [os.path.relpath(file, folder) for file in arrow]
    if outside := next((file for file in files if file.startswith(os.pardir)), None):
        raise DataError(f"state.json of split {part.name!r} points outside the folder: {printable(outside)}")
    place = os.path.join(place, part.name) if part.name else place
    cells = table.with_format("arrow", columns=[columns.image])
    source = TableSource(
        printable(spec), np.arange(len(cells)), labels, classes, cells, place, folder, files, data.image or ""
    )
    source.notices = [f"{printable(spec)}: {notice}" for notice in [*unused, *columns.notices]]
    source.how_to_label = how_to_label
    return source


def _check_lists(table: Any, image: str) -> None:
    """Raise DataError for a column of images whose lists hold more than one image."""
    column = table.data.column(image)
    if not is_list(column.type) or is_array(column.type):
        return
    most = pc.max(pc.list_value_length(column)).as_py() or 0
    if most > 1:
        raise DataError(
            f"column {image!r} holds lists of up to {most} images; make a column of one image in each row, with the "
            f"library's map(lambda row: {{'image': row['{image}'][0]}}), and save the data set again"
        )


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Import `datasets`, and silence it and its downloads in the context: progress bars, and a warning per retry."""
    try:
        import datasets
        import huggingface_hub.utils as hub
    except ImportError as error:
        raise DataError("needs the package datasets; pip install 'mimref[hf]'") from error
    with ExitStack() as undo:
        for library in (datasets, hub):
            if not library.are_progress_bars_disabled():
                library.disable_progress_bars()
                undo.callback(library.enable_progress_bars)
        undo.callback(hub.logging.set_verbosity, hub.logging.get_verbosity())
        hub.logging.set_verbosity(logging.ERROR)
        yield


@contextmanager
def _reading(path: str, what: str = "cannot be read; get it again") -> Iterator[None]:
    """Raise DataError, naming the file or data set, for whatever the library, pyarrow and the hub's client raise."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        # The library hides the cause behind "An error occurred while generating the dataset".
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else error
        reason = " ".join(str(cause or error).split())
        raise DataError(f"{printable(path)} {what} ({reason})") from error


# --- which splits


def _hub_parts(name: str) -> tuple[dict[str, _Part], list[str]]:
    """Return the splits of a hub data set by role, train, val or test, and a notice of the others.

    name: `NAME`, `OWNER/NAME` or `OWNER/NAME/CONFIG`.
    """
    from datasets import load_dataset

    owner, *rest = name.split("/")
    repository, config = "/".join([owner, *rest[:1]]), rest[1:]
    with _reading(name, "is not a folder, and cannot be loaded from the hub"):
        try:
            loaded = load_dataset(repository, *config, keep_in_memory=False)
        except ValueError as error:
            if not (known := re.search(r"available configs: \[(.*?)\]", str(error))):
                raise
            raise DataError(
                f"has several configurations; name one: hf:{name}/CONFIG ({printable(known[1])})"
            ) from error
    return _by_role(loaded, lambda split: partial(_with_columns, partial(loaded.get, split)))


def _folder_parts(folder: str) -> tuple[dict[str, _Part], list[str]]:
    """Return a folder's splits by role, train, val, test or "" (one split that serves all), and a notice of others."""
    if not os.path.isdir(folder):
        raise DataError("is a file, not a folder" if os.path.exists(folder) else "no such folder")
    if os.path.isfile(path := os.path.join(folder, "dataset_dict.json")):
        with _reading(path), open(path) as file:
            names = [str(name) for name in json.load(file)["splits"]]
        return _by_role(names, lambda split: partial(_with_columns, partial(_saved, folder, split)))
    if os.path.isfile(os.path.join(folder, "state.json")):
        return {"": _Part("", partial(_with_columns, partial(_saved, folder, "")))}, []
    parquet, unused = _parquet_files(folder)
    return {part: _Part(part, partial(_parquet, folder, files), files) for part, files in parquet.items()}, unused


def _by_role(
    names: Iterable[str], load: Callable[[str], Callable[[DataConfig], tuple[Any, Columns]]]
) -> tuple[dict[str, _Part], list[str]]:
    """Return splits by role, and a notice of those that have none."""
    used = {SPLITS[name]: name for name in names if name in SPLITS}
    others = [printable(name) for name in names if name not in used.values()]
    notices = [f"splits that are not used: {', '.join(others)}"] if others else []
    return {role: _Part(name, load(name)) for role, name in used.items()}, notices


def _with_columns(load: Callable[[], Any], data: DataConfig) -> tuple[Any, Columns]:
    table = load()
    return table, choose_columns(table.features, data)


def _saved(folder: str, split: str) -> Any:
    """Load a split that `save_to_disk` wrote."""
    from datasets import load_from_disk

    folder = os.path.join(folder, split)
    with _reading(path := os.path.join(folder, "state.json")), open(path) as file:
        state = dict(json.load(file))
    if state.get("_indices_data_files") or state.get("_indices_files"):
        # Recent versions of the library ignore the selection.
        raise DataError("holds a selection of rows; save it again after flatten_indices()")
    with _reading(folder):
        return load_from_disk(folder, keep_in_memory=False)


def _parquet_files(folder: str) -> tuple[dict[str, list[str]], list[str]]:
    """Return parquet files by split, relative to the folder, and a notice of others.

    They lie in the folder's `data/`, else in the folder itself, directly or in subfolders named after splits. Else they
    are those of the folder's only configuration, a subfolder with the same layout.
    """
    parts: dict[str, list[str]] = {}
    for base in (os.path.join(folder, "data"), folder):
        for path in sorted(glob("*.parquet", root_dir=base) + glob("*/*.parquet", root_dir=base)):
            above, name = os.path.split(path)
            if not above or above in SPLITS:
                tokens = [above, *re.split(r"[-_.]", name.lower())]
                split = next((SPLITS[token] for token in tokens if token in SPLITS), "")
                parts.setdefault(split, []).append(os.path.relpath(os.path.join(base, path), folder))
        if parts:
            break
    if not parts:
        config = _only_configuration(folder)
        of_config, notices = _parquet_files(os.path.join(folder, config))
        return {role: [os.path.join(config, file) for file in files] for role, files in of_config.items()}, notices
    if len(parts) > 1:
        parts.pop("", None)
    for files in parts.values():
        _check_complete(files)
    used = {file for files in parts.values() for file in files}
    found = (path for stars in ("", "*/", "*/*/") for path in glob(f"{stars}*.parquet", root_dir=folder))
    others = sorted(set(found) - used)
    return parts, [f"{len(others)} of its .parquet files are not used: {first_of(others)}"] if others else []


def _only_configuration(folder: str) -> str:
    """Return the name of the only subfolder with parquet files. Raises DataError if there is none, or more than one."""
    found = (path for stars in ("*", "*/*") for path in glob(f"{stars}/*.parquet", root_dir=folder))
    names = sorted({path.split(os.sep)[0] for path in found})
    if len(names) == 1:
        return names[0]
    named = ", ".join(printable(os.path.join(folder, name)) for name in names)
    hint = f"; name one of its folders: {named}" if names else ""
    raise DataError(f"no data set saved by save_to_disk, and no .parquet files{hint}")


def _check_complete(files: Sequence[str]) -> None:
    """Raise DataError if names such as `train-00000-of-00003.parquet` state another number of files than exist."""
    stated = (re.fullmatch(r"(.*)-\d+-of-(\d+)(?:-\w+)?\.parquet", file) for file in files)
    for (name, total), found in Counter(match.groups() for match in stated if match).items():
        if found != int(total):
            raise DataError(f"only {found} of {int(total)} files {printable(name)}-*.parquet exist; get the others")


def _parquet(folder: str, files: Sequence[str], data: DataConfig) -> tuple[Any, Columns]:
    """Load the image and label columns of parquet files, as arrow files in the cache folder."""
    from datasets import Dataset, Features

    paths = [os.path.join(folder, file) for file in files]
    columns: Columns | None = None
    for path in paths:
        with _reading(path):
            schema = pa.parquet.read_schema(path)
        columns = columns or choose_columns(Features.from_arrow_schema(schema), data)
        wanted = [name for name in (columns.image, columns.label) if name is not None]
        if missing := [name for name in wanted if name not in schema.names]:
            raise DataError(f"{printable(path)} has no column {missing[0]!r}, unlike the other files")
    assert columns is not None
    cache = str(cache_folder() / "huggingface")
    with _reading(folder):
        return Dataset.from_parquet([escape(path) for path in paths], columns=wanted, cache_dir=cache), columns
