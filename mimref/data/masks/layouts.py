"""Folders of images and masks: `images/` and `masks/` with or without splits, ADE20K's layout, and Pascal VOC's."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mimref.config.masks import MasksConfig
from mimref.data.decode import first_of, printable
from mimref.data.masks.sources import Coding, EncodedMasks, Pairs
from mimref.data.readers.folder import list_folder
from mimref.data.sources import FileSource, NoSplitError, Split
from mimref.draws import permutation
from mimref.errors import DataError
from mimref.progress import LabelledProgress

HELD_OUT = 5
"""If there are no splits, one pair in this many is held out for validation."""
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
ADE20K_CLASSES = 150
_SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train", "training"), "val": ("val", "validation", "test")}
_MASKS = ("masks", "annotations", "labels")
_LAYOUTS = (
    "images/ and masks/ (PNGs of class numbers), both with train/ and val/ in them, or both in train/ and val/, or "
    "without splits; ADE20K's images/training and annotations/training; Pascal VOC's JPEGImages and SegmentationClass"
)


class _Folders(NamedTuple):
    """Folders of a split's images and masks."""

    images: str
    masks: str
    has_splits: bool
    is_ade20k: bool = False
    """Whether they have ADE20K's names."""


def open_folder_pairs(spec: str, masks: MasksConfig, split: Split, progress: LabelledProgress | None = None) -> Pairs:
    """Open the images and masks of a folder's split (see docs/segment.md); an image and its mask share a relative path.

    Raises DataError for a folder with another layout, and for images without masks.
    """
    root, shown = os.path.expanduser(spec), printable(spec)
    if os.path.isdir(os.path.join(root, "JPEGImages")) and os.path.isdir(os.path.join(root, "SegmentationClass")):
        return _open_voc(root, shown, masks, split)
    folders = _find(root, split)
    if masks.first is not None or masks.classes not in (None, ADE20K_CLASSES) or read_names(root):
        folders = folders._replace(is_ade20k=False)
    images, files, notices = _paired(folders, progress)
    coding = Coding((1 if folders.is_ade20k else 0) if masks.first is None else masks.first, masks.ignore)
    if folders.is_ade20k and not _ade20k_names(root):
        notices.append(
            f"{shown} has the folders of ADE20K: its masks are read as {ADE20K_CLASSES} classes from 1, where 0 is "
            "unlabelled; for other masks set masks.first or masks.classes, or add classes.txt"
        )
    source = FileSource(shown, folders.images, images, None, None)
    decoded = EncodedMasks(FileSource(shown, folders.masks, files, None, None), coding)
    pairs = Pairs(source, decoded, _names(root, masks, folders), notices)
    if not folders.has_splits:
        hold_out(pairs, split)
    return pairs


def hold_out(pairs: Pairs, split: Split) -> None:
    """Split pairs that have no splits, and keep one: a fixed fifth is held out for validation. Raises DataError."""
    if len(pairs) < 2:
        raise DataError("there are no splits, and one pair cannot be divided; add pairs, or train/ and val/")
    order, held = permutation(0, 0, len(pairs)).numpy(), max(1, len(pairs) // HELD_OUT)
    total = len(pairs)
    pairs.select(np.sort(order[held:] if split == "train" else order[:held]))
    pairs.notices = [*pairs.notices, f"there are no splits: a fixed {held} of the {total} pairs are held out"]


def _find(root: str, split: Split) -> _Folders:
    """Return the folders of a split. Raises DataError for an unknown layout, NoSplitError if the split is missing."""

    def folder(*parts: str) -> str | None:
        path = os.path.join(root, *parts)
        return path if os.path.isdir(path) else None

    for words in (_SPLITS[split], *(other for name, other in _SPLITS.items() if name != split)):
        for word in words:
            for name in _MASKS:
                for images, masks in (
                    (folder("images", word), folder(name, word)),
                    (folder(word, "images"), folder(word, name)),
                ):
                    if not (images and masks):
                        continue
                    if word not in _SPLITS[split]:
                        raise NoSplitError(f"has {word} but no {' or '.join(_SPLITS[split])}; both are needed")
                    return _Folders(images, masks, True, name == "annotations" and word in ("training", "validation"))
    images = folder("images")
    masks = next((path for name in _MASKS if (path := folder(name))), None)
    if images and masks:
        return _Folders(images, masks, False)
    raise DataError(f"no images with masks; accepted: {_LAYOUTS}")


def _paired(folders: _Folders, progress: LabelledProgress | None) -> tuple[list[str], list[str], list[str]]:
    """Return the files of images and of their masks, each relative to their folder, and notices."""
    images, masks = (list(list_folder(path, progress).files) for path in (folders.images, folders.masks))
    where = printable(folders.masks)
    if not images:
        raise DataError(f"no images in {printable(folders.images)}")
    of_stem: dict[str, str] = {}
    for file in masks:
        stem = os.path.splitext(file)[0]
        if stem in of_stem:
            raise DataError(f"{where} has two masks of one image: {first_of([of_stem[stem], file])}; remove one")
        of_stem[stem] = file
    stems = [os.path.splitext(file)[0] for file in images]
    if lacking := [file for file, stem in zip(images, stems, strict=True) if stem not in of_stem]:
        raise DataError(_without_masks(lacking, len(images), where))
    spare = sorted(of_stem.keys() - set(stems))
    notices = [f"{where}: {len(spare)} masks without an image are not used: {first_of(spare)}"] if spare else []
    return images, [of_stem[stem] for stem in stems], notices


def _without_masks(lacking: Sequence[str], images: int, where: str) -> str:
    count = f"{len(lacking)} of {images} images have" if images > 1 else "the image has"
    return f"{count} no mask in {where}: {first_of(lacking)}; a mask has its image's name, such as a.png for a.jpg"


def _names(root: str, masks: MasksConfig, folders: _Folders) -> list[str]:
    """Return the names of the classes; empty if their number is known only from the masks."""
    if folders.is_ade20k:
        return _ade20k_names(root) or list(map(str, range(ADE20K_CLASSES)))
    return read_names(root, masks.classes) or list(map(str, range(masks.classes or 0)))


def read_names(root: str, classes: int | None = None) -> list[str]:
    """Return the lines of a folder's `classes.txt`, if it exists. Raises DataError unless their number is `classes`."""
    path = os.path.join(root, "classes.txt")
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        names = [line.strip() for line in file if line.strip()]
    if classes is not None and len(names) != classes:
        raise DataError(f"{printable(path)} names {len(names)} classes, masks.classes is {classes}; make them agree")
    return names


def _ade20k_names(root: str) -> list[str]:
    """Return the first name of every class in `objectInfo150.txt`, in the order of the class numbers."""
    path = os.path.join(root, "objectInfo150.txt")
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1:]
    names = [row[-1].split(",")[0].strip() for row in rows if row[0].strip().isdigit()]
    return names if len(names) == ADE20K_CLASSES else []


def _open_voc(root: str, shown: str, masks: MasksConfig, split: Split) -> Pairs:
    """Open Pascal VOC: the images that `ImageSets/Segmentation/{train,val}.txt` lists; 255 means no label."""
    listed = os.path.join(root, "ImageSets", "Segmentation", f"{split}.txt")
    try:
        with open(listed, encoding="utf-8") as file:
            names = [line.strip() for line in file if line.strip()]
    except OSError as error:
        raise NoSplitError(f"{printable(listed)} cannot be read ({error.strerror}); it lists the images") from error
    folder = os.path.join(root, "SegmentationClass")
    images, files = ([f"{name}{suffix}" for name in names] for suffix in (".jpg", ".png"))
    present = set(os.listdir(folder))
    if lacking := [name for name, file in zip(names, files, strict=True) if file not in present]:
        raise DataError(_without_masks(lacking, len(images), printable(folder)))
    if not names:
        raise DataError(f"{printable(listed)} lists no image")
    source = FileSource(shown, os.path.join(root, "JPEGImages"), images, None, None)
    known = list(VOC_CLASSES) if masks.classes in (None, len(VOC_CLASSES)) else []
    known = known or list(map(str, range(masks.classes or 0)))
    decoded = EncodedMasks(FileSource(shown, folder, files, None, None), Coding(masks.first or 0, masks.ignore))
    return Pairs(source, decoded, known)
