"""Hugging Face data sets, `hf:FOLDER` and `hf:NAME` (see docs/data.md), read with the library `datasets`.

Splits other than train, validation and test are ignored. Files without a split serve both, and the validation images
are then unlabelled. Image cells hold encoded files, bare or with a path beside them.

Images stay encoded in memory-mapped arrow files, which loader processes share, and are decoded when read. Parquet
cannot be read row by row, so the library first writes its images and labels to arrow files in the cache folder.
"""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from glob import escape, glob
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from mimref.data.decode import BadImage, Decoded, Reduce, decode_content, decode_file, printable, reason_of
from mimref.data.labels import RawLabels
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
    """`FOLDER/SPLIT` or `NAME/SPLIT`, for names of images."""
    folder: str
    files: list[str]
    """What the table was read from, relative to `folder`."""

    def read_reduced(self, index: int, reduce: Reduce | None) -> Decoded:
        """See `ImageSource`."""
        try:
            cell = self.cells[int(self.rows[index])].column(0)[0].as_py()
        except Exception as error:  # pyarrow's readers of damaged files raise many kinds
            raise BadImage(self.path(index), reason_of(error)) from error
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if content is not None:
            return decode_content(content, self.path(index), reduce)
        if path and os.path.isabs(path):  # how the library refers to files that it has downloaded one by one
            return decode_file(path, reduce)
        reason = f"not in the table, which names {printable(path)} instead" if path else "no image in this row"
        raise BadImage(self.path(index), reason)

    def path(self, index: int) -> str:
        """`FOLDER/SPLIT[ROW]`, with rows counted from 0 and odd characters escaped."""
        return printable(f"{self.place}[{self.rows[index]}]")

    @cached_property
    def fingerprint(self) -> str:
        """Over names, sizes and modification times of the files, the rows used, and their labels."""
        return fingerprint_files(self.folder, map(os.fsencode, self.files), self.rows, self.labels)


class _Part(NamedTuple):
    """One split, before it is loaded."""

    name: str
    load: Callable[[], Any]
    """Returns a `datasets.Dataset`."""
    files: list[str] | None = None
    """Parquet files, relative to the folder; None: the arrow files of the loaded data set."""


def open_hugging_face(
    spec: str, split: Split, *, on_hub: bool, progress: LabelledProgress | None = None
) -> TableSource:
    """The images of a split, in the order of the files' names and then of their rows.

    Raises DataError when there are none, when files are missing or damaged, when a split is only partly labelled, and
    when the `datasets` package is missing.
    """
    place = os.path.expanduser(spec.removeprefix("hf:"))
    with _quiet_datasets():
        if progress is not None:
            progress(f"reading {printable(spec)}", 0, 1)
        parts = _hub_parts(place) if on_hub else _folder_parts(place)
        held = "val" if "val" in parts else "test"
        part = parts.get("") or parts.get("train" if split == "train" else held)
        if part is None:
            raise NoSplitError(f"no {'train' if split == 'train' else 'validation or test'} images")
        table = part.load()
        if not len(table):
            raise DataError(f"no rows in split {part.name!r}")
        image, _ = _columns(table.features)
        labels, classes = None, None
        if split == "train" or "" not in parts:
            raw, classes = _labels(table)
            if raw is not None:
                if split == "val" and "train" in parts:
                    classes = _labels(parts["train"].load())[1] or classes
                labels = raw.encode(classes or [])
    arrow = [each["filename"] for each in table.cache_files]
    folder = os.path.dirname(arrow[0]) if on_hub else place
    files = part.files or [os.path.relpath(file, folder) for file in arrow]
    if outside := next((file for file in files if file.startswith(os.pardir)), None):
        raise DataError(f"state.json of split {part.name!r} points outside the folder: {printable(outside)}")
    place = os.path.join(place, part.name) if part.name else place
    cells = table.with_format("arrow", columns=[image])
    return TableSource(printable(spec), np.arange(len(cells)), labels, classes, cells, place, folder, files)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Import `datasets`, and silence it and its downloads meanwhile: progress bars, and a warning per retry."""
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


def _hub_parts(name: str) -> dict[str, _Part]:
    """The splits of a data set of the hub, by their role: train, val and test."""
    from datasets import load_dataset

    with _reading(name, "is not a folder, and cannot be loaded from the hub"):
        loaded = load_dataset(name, keep_in_memory=False)
    return {SPLITS[split]: _Part(split, partial(loaded.get, split)) for split in loaded if split in SPLITS}


def _folder_parts(folder: str) -> dict[str, _Part]:
    """The splits of a folder, by their role: train, val and test, or "" for a single split that serves all."""
    if not os.path.isdir(folder):
        raise DataError("is a file, not a folder" if os.path.exists(folder) else "no such folder")
    if os.path.isfile(path := os.path.join(folder, "dataset_dict.json")):
        with _reading(path), open(path) as file:
            names = [str(name) for name in json.load(file)["splits"]]
        return {SPLITS[name]: _Part(name, partial(_saved, folder, name)) for name in names if name in SPLITS}
    if os.path.isfile(os.path.join(folder, "state.json")):
        return {"": _Part("", partial(_saved, folder, ""))}
    parquet = _parquet_files(folder)
    return {part: _Part(part, partial(_parquet, folder, files), files) for part, files in parquet.items()}


def _saved(folder: str, split: str) -> Any:
    """A split that `save_to_disk` wrote."""
    from datasets import load_from_disk

    folder = os.path.join(folder, split)
    with _reading(path := os.path.join(folder, "state.json")), open(path) as file:
        state = dict(json.load(file))
    if state.get("_indices_data_files") or state.get("_indices_files"):
        # Recent versions of the library ignore the selection.
        raise DataError("holds a selection of rows; save it again after flatten_indices()")
    with _reading(folder):
        return load_from_disk(folder, keep_in_memory=False)


def _parquet_files(folder: str) -> dict[str, list[str]]:
    """Parquet files by split: those in the folder's `data/`, else in itself, and in their folders of splits."""
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
    if len(parts) > 1:
        parts.pop("", None)
    if not parts:
        below = sorted({os.path.dirname(path) for path in glob(os.path.join(escape(folder), "*", "*.parquet"))})
        hint = f"; name one of its folders: {', '.join(map(printable, below))}" if below else ""
        raise DataError(f"no data set saved by save_to_disk, and no .parquet files{hint}")
    for files in parts.values():
        _check_complete(files)
    return parts


def _check_complete(files: Sequence[str]) -> None:
    """Raise DataError where names such as `train-00000-of-00003.parquet` state more files than exist."""
    stated = (re.fullmatch(r"(.*)-\d+-of-(\d+)(?:-\w+)?\.parquet", file) for file in files)
    for (name, total), found in Counter(match.groups() for match in stated if match).items():
        if found != int(total):
            raise DataError(f"only {found} of {int(total)} files {printable(name)}-*.parquet exist; get the others")


def _parquet(folder: str, files: Sequence[str]) -> Any:
    """The image and label columns of parquet files, as arrow files in the cache folder."""
    from datasets import Dataset, Features

    paths = [os.path.join(folder, file) for file in files]
    columns: list[str] = []
    for path in paths:
        with _reading(path):
            schema = pa.parquet.read_schema(path)
        columns = columns or [name for name in _columns(Features.from_arrow_schema(schema)) if name]
        if missing := [name for name in columns if name not in schema.names]:
            raise DataError(f"{printable(path)} has no column {missing[0]!r}, unlike the other files")
    cache = str(cache_folder() / "huggingface")
    with _reading(folder):
        return Dataset.from_parquet([escape(path) for path in paths], columns=columns, cache_dir=cache)


# --- columns and labels


def _columns(features: Any) -> tuple[str, str | None]:
    """Names of the image column and, if there is one, of the label column."""
    from datasets import ClassLabel, Image

    def column(usual: str, kind: type) -> str | None:
        declared = [name for name, feature in features.items() if isinstance(feature, kind)]
        return usual if usual in features else declared[0] if len(declared) == 1 else None

    image = column("image", Image)
    if image is None:
        raise DataError(f"no column 'image' (its columns: {', '.join(map(printable, features))})")
    held = kind = features.arrow_schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        held = kind.field("bytes").type
    if not (pa.types.is_binary(held) or pa.types.is_large_binary(held)):
        raise DataError(f"column {image!r} holds {kind}, not the bytes of image files")
    return image, column("label", ClassLabel)


def _labels(table: Any) -> tuple[RawLabels | None, list[str] | None]:
    """Labels of all rows, and the names of all classes; None and None if no row has a label."""
    _, name = _columns(table.features)
    if name is None:
        return None, None
    column = table.with_format("arrow", columns=[name])[:].column(name)
    kind = column.type
    whole = pa.types.is_integer(kind)
    if not (whole or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"column {name!r} holds {kind}; labels are whole numbers or class names")
    missing = pc.fill_null(pc.equal(column, -1), True) if whole else pc.is_null(column)
    if pc.all(missing).as_py():
        return None, None
    if (row := pc.index(missing, True).as_py()) >= 0:
        raise DataError(f"row {row} of its split has no {name!r}, although others have")
    raw = RawLabels.from_strings(column.cast("string").to_pandas())
    classes = getattr(table.features[name], "names", None)
    if classes and whole:
        if outside := [number for number in raw.names if not 0 <= int(number) < len(classes)]:
            raise DataError(f"{name} {outside[0]} is not one of the {len(classes)} classes of its schema")
        raw = RawLabels([classes[int(number)] for number in raw.names], raw.codes)
    return raw, list(classes) if classes else raw.classes()
