"""Data sets that `--data SPEC` accepts (see docs/data.md), opened as lists of images."""

import os
import re
from glob import escape

from mimref.config.base import DataConfig
from mimref.data.decode import printable
from mimref.data.index.remote import is_remote
from mimref.data.labels import first_images
from mimref.data.pixels import Decoding
from mimref.data.readers.folder import open_folder
from mimref.data.readers.hf import open_hugging_face
from mimref.data.readers.named import open_digits, open_fashion_mnist, open_torchvision
from mimref.data.readers.table import open_table
from mimref.data.readers.vtab import open_vtab, open_vtab1k
from mimref.data.readers.wds import open_shards
from mimref.data.sources import ArraySource, EncodedSource, ImageSource, Split
from mimref.errors import ConfigError, DataError, did_you_mean
from mimref.progress import LabelledProgress

ACCEPTED = (
    "a folder, digits, fashion-mnist, torchvision:NAME, vtab:NAME, vtab1k:NAME, list:FILE, hf:FOLDER, hf:NAME or "
    "wds:SHARDS"
)
NAMES = ("digits", "fashion-mnist")
"""Specs that are not paths, even where a folder has the same name."""
_NAMED = ("torchvision:", "vtab:", "vtab1k:")
"""Prefixes of named data sets, whose files are below `data.root`."""
COLUMNED = ("list:", "hf:", "wds:")
"""Prefixes of data sets in which `data.image` and `data.label` name columns or members."""
_HOW_TO_LABEL = {
    "list:": "give the list the columns label and split (train, val)",
    "hf:": "give it a column label, and splits train and validation",
    "wds:": "give every image a .cls, and keep shards of train and val apart (folders, or {split} in the pattern)",
    "": "sort the images into train/CLASS/ and val/CLASS/ below this folder, with two classes or more",
}
"""Advice by the prefix of a spec that is not a name."""
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*){0,2}", re.ASCII)


def is_hub_name(path: str) -> bool:
    """Return whether the part after `hf:` names a hub data set, `[OWNER/]NAME` or `OWNER/NAME/CONFIG`, and no file."""
    return _HUB_NAME.fullmatch(path) is not None and not os.path.exists(path)


def absolute_spec(spec: str) -> str:
    """Return the spec with its path, if it has one, made absolute, so that it means the same images from any folder."""
    if spec in NAMES or spec.startswith(_NAMED):
        return spec
    prefix = _prefix(spec)
    path = os.path.expanduser(spec.removeprefix(prefix))
    if is_remote(path) or (prefix == "hf:" and is_hub_name(path)):
        return spec
    absolute = os.path.abspath(path)
    if prefix == "wds:" and not os.path.isabs(path) and not os.path.isdir(path):
        # A pattern: the current folder's name is escaped, as it is not part of the pattern.
        absolute = os.path.normpath(os.path.join(escape(os.getcwd()), path))
    return prefix + absolute


def open_source(
    data: DataConfig, split: Split, *, need_labels: bool = False, progress: LabelledProgress | None = None
) -> ImageSource:
    """Find the images of `data.spec`, and apply `data.train_limit` to its training images.

    No image is decoded here; the source's `notices` report what is not used. progress: reports the first scan of a
    large folder or of shards, which can take minutes.
    Raises DataError if there are no images, if the spec is unknown, or if labels are needed and missing; ConfigError if
    there is no spec, or `data.train_limit` exceeds the number of images.
    """
    spec = data.spec
    if spec is None:
        raise ConfigError(f"no images: pass --data ({ACCEPTED})")
    try:
        source = _open(spec, data, split, progress)
        if need_labels and source.labels is None:
            advice = f"{how_to_label(source, spec)}; mimref assess compares encoders without labels"
            raise DataError(f"the {split} images have no labels, which this command needs; {advice}")
    except DataError as error:
        raise type(error)(f"--data {printable(spec)}: {error}") from error
    source.decoding = Decoding.of(data)
    if split == "train" and data.train_limit is not None:
        source.select(first_images(len(source), source.labels, limit=data.train_limit))
    return source


def how_to_label(source: ImageSource, spec: str) -> str:
    """Return advice on how to label the images."""
    return source.how_to_label or _HOW_TO_LABEL[_prefix(spec)]


def _prefix(spec: str) -> str:
    return next(each for each in _HOW_TO_LABEL if spec.startswith(each))


def _open(spec: str, data: DataConfig, split: Split, progress: LabelledProgress | None) -> ArraySource | EncodedSource:
    for name in ("image", "label"):
        if getattr(data, name) is not None and not spec.startswith(COLUMNED):
            raise ConfigError(f"data.{name} names a column of list: and hf:, or a member of wds:; leave it out")
    if spec == "digits":
        return open_digits(split)
    if spec == "fashion-mnist":
        return open_fashion_mnist(data, split)
    if spec.startswith("torchvision:"):
        return open_torchvision(data, split)
    if spec.startswith("vtab:"):
        return open_vtab(data, split)
    if spec.startswith("vtab1k:"):
        return open_vtab1k(data, split)
    if spec.startswith("list:"):
        return open_table(data, split)
    if spec.startswith("hf:"):
        return open_hugging_face(data, split, on_hub=is_hub_name(spec.removeprefix("hf:")), progress=progress)
    if spec.startswith("wds:"):
        return open_shards(data, split, progress)
    root = os.path.expanduser(spec)
    if not os.path.isdir(root):
        near = did_you_mean(spec, (*NAMES, *_NAMED))
        what = "is a file, not a folder" if os.path.exists(root) else f"no such folder or data set{near}"
        raise DataError(f"{what} (accepted: {ACCEPTED})")
    return open_folder(spec, split, progress, arrays=data.channels is not None)
