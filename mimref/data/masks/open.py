"""Data sets that `mimref segment --data SPEC` accepts (see docs/segment.md), opened as pairs of images and masks."""

import os
from collections.abc import Callable
from contextlib import suppress

from mimref.config.base import DataConfig
from mimref.config.masks import MasksConfig, MosaicsConfig
from mimref.data.decode import printable
from mimref.data.labels import first_images
from mimref.data.masks.layouts import hold_out, open_folder_pairs
from mimref.data.masks.mosaics import make_mosaics
from mimref.data.masks.sources import Coding, EncodedMasks, Pairs
from mimref.data.open import is_hub_name
from mimref.data.pixels import Decoding
from mimref.data.readers.hf import TableSource, open_hugging_face
from mimref.data.readers.hf_columns import NoColumnError
from mimref.data.readers.named import open_digits, open_fashion_mnist
from mimref.data.sources import Split
from mimref.errors import ConfigError, DataError
from mimref.progress import LabelledProgress

ACCEPTED = "a folder of images/ and masks/, ADE20K, Pascal VOC, hf:FOLDER, hf:NAME, digits or fashion-mnist (mosaics)"
MOSAICS = ("digits", "fashion-mnist")
_MASK_COLUMNS = ("mask", "annotation", "label", "segmentation", "segmentation_mask", "semantic_mask")
"""Usual names of mask columns."""


def open_pairs(
    data: DataConfig, masks: MasksConfig, mosaics: MosaicsConfig, split: Split, progress: LabelledProgress | None = None
) -> Pairs:
    """Find the images and masks of `data.spec`, and apply `data.train_limit`; no image or mask is decoded here.

    `class_names` is empty if only the masks show how many classes there are. Raises DataError if there are no pairs or
    the spec is unknown, ConfigError for settings that do not fit.
    """
    spec = data.spec
    if spec is None:
        raise ConfigError(f"no images with masks: pass --data ({ACCEPTED})")
    try:
        if spec in MOSAICS:
            objects = open_digits(split) if spec == "digits" else open_fashion_mnist(data, split)
            pairs = make_mosaics(objects, split, mosaics)
        elif spec.startswith("hf:"):
            pairs = _open_hugging_face(data, masks, split, progress)
        elif os.path.isdir(os.path.expanduser(spec)):
            pairs = open_folder_pairs(spec, masks, split, progress)
        else:
            raise DataError(f"no such folder (accepted: {ACCEPTED})")
    except DataError as error:
        raise type(error)(f"--data {printable(spec)}: {error}") from error
    pairs.images.decoding = Decoding.of(data)
    if split == "train" and data.train_limit is not None:
        pairs.select(first_images(len(pairs), None, limit=data.train_limit))
    return pairs


def _open_hugging_face(data: DataConfig, masks: MasksConfig, split: Split, progress: LabelledProgress | None) -> Pairs:
    """Open a Hugging Face data set. `data.label` names its mask column; by default the first with a usual name."""
    on_hub = is_hub_name((data.spec or "").removeprefix("hf:"))

    def column(name: str | None, part: Split) -> TableSource:
        named = data.model_copy(update={"image": name, "label": None})
        return open_hugging_face(named, part, on_hub=on_hub, progress=progress)

    images = column(data.image, split)
    table = column(data.label, split) if data.label else _usual_masks(column, split)
    names = list(map(str, range(masks.classes or 0)))
    pairs = Pairs(images, EncodedMasks(table, Coding(masks.first or 0, masks.ignore)), names, images.notices)
    if column(data.image, "train" if split == "val" else "val").place == images.place:
        hold_out(pairs, split)
    return pairs


def _usual_masks(column: Callable[[str, Split], TableSource], split: Split) -> TableSource:
    """Return the first column with a usual name. Raises DataError if there is none."""
    for name in _MASK_COLUMNS:
        with suppress(NoColumnError):
            return column(name, split)
    raise DataError(f"no column of masks ({', '.join(_MASK_COLUMNS)}); --set data.label=COLUMN names another")
