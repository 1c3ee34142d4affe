"""Choice of the image and label columns of a Hugging Face data set, by settings, usual names and types."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mimref.config.base import DataConfig
from mimref.data.decode import printable
from mimref.data.labels import RawLabels, UnusableLabelsError, class_name
from mimref.errors import DataError, did_you_mean

_OTHER_MEDIA = ("Audio", "Video", "Pdf", "Nifti")
"""Other features whose cells are files."""


class NoColumnError(DataError):
    """A setting names a column that does not exist."""


class Columns(NamedTuple):
    """The columns in use."""

    image: str
    label: str | None
    how_to_label: str
    """What to do if `label` is None."""
    notices: list[str]


def choose_columns(features: Any, data: DataConfig) -> Columns:
    """Choose the image and label columns among a data set's `features`. Raises DataError if images are ambiguous."""
    for setting, wanted in (("data.image", data.image), ("data.label", data.label)):
        if wanted is not None and wanted not in features:
            near = did_you_mean(wanted, features)
            raise NoColumnError(f"no column {wanted!r}, which {setting} names{near} (its columns: {_list(features)})")
    schema = features.arrow_schema
    declared = [name for name, feature in features.items() if _declares_image(feature)]
    by_type = [name for name in features if _holds_files(schema.field(name).type, features[name])]
    if data.channels is not None:
        by_type += [name for name in features if is_array(schema.field(name).type)]
    image = data.image or ("image" if "image" in features else None)
    if image is None:
        candidates = declared or by_type
        if not candidates:
            advice = "; --set data.image=COLUMN names one of paths" if features else ""
            raise DataError(f"no column of images (its columns: {_list(features)}){advice}")
        if len(candidates) > 1:
            raise DataError(
                f"several columns of images: {_list(candidates)}; --set data.image={printable(candidates[0])}"
            )
        (image,) = candidates
    held = cell_type(schema.field(image).type)
    if not (is_binary(held) or is_text(held) or (data.channels is not None and is_array(held))):
        raise DataError(f"column {image!r} holds {schema.field(image).type}, not the bytes or paths of image files")
    notices = []
    # Bare bytes may be anything.
    others = [name for name in by_type if name != image and not is_binary(schema.field(name).type)]
    if data.image is None and others:
        notices.append(f"images are those of column {image!r}, not of {_list(others)}")
    label, how_to_label, about_labels = _choose_label(features, data, image)
    return Columns(image, label, how_to_label, notices + about_labels)


def _choose_label(features: Any, data: DataConfig, image: str) -> tuple[str | None, str, list[str]]:
    """Return the label column or None, what to do if it is None, and notices."""
    from datasets import ClassLabel

    if data.label is not None:
        return data.label, "", []
    declared = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    # A column of masks may have this name as well.
    usual = "label" in features and not _declares_image(features["label"])
    if usual or len(declared) == 1:
        label = "label" if usual else declared[0]
        others = [name for name in declared if name != label]
        return label, "", [f"labels are those of column {label!r}, not of {_list(others)}"] if others else []
    if declared:
        choose = f"choose one of its columns of classes, {_list(declared)}: --set data.label={printable(declared[0])}"
        return None, choose, [f"no labels are used; {choose}"]
    others = [name for name in features if name != image and _may_be_label(features.arrow_schema.field(name).type)]
    if not others:
        return None, "", []
    return None, f"name its column of labels with --set data.label=COLUMN (columns: {_list(others)})", []


def cell_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of what is decoded: the bytes within a struct, within a list."""
    if is_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return kind


def is_list(kind: pa.DataType) -> bool:
    """Return whether cells are lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_array(kind: pa.DataType) -> bool:
    """Return whether cells are numbers in rows and columns, with or without channels."""
    kind, depth = _storage(kind), 0
    while is_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth in (2, 3) and bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def read_cell(cell: pa.Scalar) -> NDArray[Any]:
    """Return the numbers of such a cell. Raises ValueError for rows of unequal length and for missing numbers."""
    values, shape = (cell.value if isinstance(cell, pa.ExtensionScalar) else cell).values, list[int]()
    while True:
        if values.null_count:
            raise ValueError("numbers are missing")
        shape.append(len(values) // math.prod(shape) if len(values) else 0)
        if not is_list(values.type):
            break
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) > 1:
            raise ValueError(f"its rows have different lengths: {', '.join(map(str, sorted(lengths)))}")
        values = values.flatten()
    return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(shape)


def _storage(kind: pa.DataType) -> pa.DataType:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def is_binary(kind: pa.DataType) -> bool:
    """Return whether cells are bytes."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def is_text(kind: pa.DataType) -> bool:
    """Return whether cells are text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def read_labels(table: Any, name: str) -> tuple[RawLabels | None, list[str] | None]:
    """Return the labels of a data set's rows, and the names of all classes; None and None if no row has a label."""
    column = table.with_format("arrow", columns=[name])[:].column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind, shown = column.type, printable(name)
    whole = pa.types.is_integer(kind)
    if not (whole or is_text(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        raise UnusableLabelsError(f"column {shown!r} holds {kind}; labels are whole numbers or class names")
    missing = pc.fill_null(pc.equal(column, -1), True) if whole else pc.is_null(column)
    if pc.all(missing, min_count=0).as_py():  # true without rows
        return None, None
    if (row := pc.index(missing, True).as_py()) >= 0:
        raise DataError(f"row {row} of its split has no {shown!r}, although others have")
    raw = RawLabels.from_strings(column.cast("string").to_pandas())
    classes = getattr(table.features[name], "names", None)
    if classes and whole:
        if outside := [number for number in raw.names if not 0 <= int(number) < len(classes)]:
            raise DataError(f"{shown} {outside[0]} is not one of the {len(classes)} classes of its schema")
        raw = RawLabels.merged([classes[int(number)] for number in raw.names], raw.codes)
    return raw, list(dict.fromkeys(map(class_name, classes))) if classes else raw.classes()


def _declares_image(feature: Any) -> bool:
    """Return whether a feature is an image, or a list of images."""
    from datasets import Image

    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)
    return isinstance(inner, Image)


def _holds_files(kind: pa.DataType, feature: Any) -> bool:
    """Return whether cells hold bytes, which are taken for images if no column is declared to hold images."""
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)
    return type(inner).__name__ not in _OTHER_MEDIA and is_binary(cell_type(kind))


def _may_be_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names)) or "none"
