"""VTAB's natural data sets with the splits of the paper's Table 8, `vtab:NAME`, and VTAB-1K's lists, `vtab1k:NAME`.

`vtab:NAME` trains on the full training set. torchvision's readers are used for data sets with the same splits there;
the others are read from the original folders.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mimref.config.base import DataConfig
from mimref.data.decode import printable, reason_of
from mimref.data.readers.named import known_name, root_folder, torchvision_source
from mimref.data.sources import ArraySource, FileSource, Split
from mimref.errors import DataError

# Name to torchvision's class, and the arguments of its splits.
_TORCHVISION: dict[str, tuple[str, Mapping[Split, list[dict[str, Any]]]]] = {
    "cifar100": ("CIFAR100", {"train": [{"train": True}], "val": [{"train": False}]}),
    "dtd": ("DTD", {"train": [{"split": "train"}, {"split": "val"}], "val": [{"split": "test"}]}),
    "flowers102": ("Flowers102", {"train": [{"split": "train"}, {"split": "val"}], "val": [{"split": "test"}]}),
    "pets": ("OxfordIIITPet", {"train": [{"split": "trainval"}], "val": [{"split": "test"}]}),
    "svhn": ("SVHN", {"train": [{"split": "train"}], "val": [{"split": "test"}]}),
}
VTAB_NAMES = ("caltech101", "cifar100", "dtd", "flowers102", "pets", "sun397", "svhn")
VTAB_1K_NAMES = (
    *("caltech101", "cifar", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397"),
    *("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
    *("clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc", "dsprites_ori", "smallnorb_azi", "smallnorb_ele"),
)
"""Folders of VTAB-1K as it is distributed: 7 natural, 4 specialised and 8 structured data sets."""
CALTECH_SHOTS = 30
SUN_SHARE = 0.8


def open_vtab(data: DataConfig, split: Split) -> ArraySource | FileSource:
    """Open one of VTAB's natural data sets: all its training images, and its test images for validation.

    The files are below `data.root`, where torchvision expects them: Caltech101 in `101_ObjectCategories`, which may lie
    in `caltech101` or `caltech-101`, and Sun397 in `SUN397`. Raises DataError for an unknown name, and for files that
    are missing or damaged.
    """
    name = known_name((data.spec or "").removeprefix("vtab:"), VTAB_NAMES)
    if name in _TORCHVISION:
        of_torchvision, parts = _TORCHVISION[name]
        return torchvision_source(f"vtab:{name}", data, of_torchvision, parts[split], split)
    return _open_caltech(data, split) if name == "caltech101" else _open_sun(data, split)


def _open_caltech(data: DataConfig, split: Split) -> FileSource:
    """Open Caltech101: 30 images per class for training, including the background class."""
    places = [os.path.join(place, "101_ObjectCategories") for place in ("", "caltech101", "caltech-101")]
    folder = _find(data, [*places, ""], "BACKGROUND_Google")
    try:
        classes = sorted(each.name for each in os.scandir(folder) if each.is_dir())
    except OSError as error:
        raise _unreadable(folder, error) from error
    images = _images(folder, classes)
    source = _seeded("vtab:caltech101", folder, images, [CALTECH_SHOTS] * len(images), split)
    return _check_size(source, images, "9,144 of 102")


def _open_sun(data: DataConfig, split: Split) -> FileSource:
    """Open Sun397: four fifths of every class's images for training; classes in the order of ClassName.txt."""
    folder = _find(data, ["SUN397", ""], "ClassName.txt")
    try:
        with open(os.path.join(folder, "ClassName.txt"), encoding="utf-8", errors="surrogateescape") as lines:
            # Such as /b/balcony/exterior.
            classes = [line.strip().lstrip("/") for line in lines if line.strip()]
    except OSError as error:
        raise _unreadable(folder, error) from error
    images = _images(folder, classes)
    source = _seeded("vtab:sun397", folder, images, [round(SUN_SHARE * len(each)) for each in images.values()], split)
    return _check_size(source, images, "108,754 of 397")


def _find(data: DataConfig, places: Sequence[str], mark: str) -> str:
    """Return the first of some places below `data.root` that holds `mark`. Raises DataError if none does."""
    folders = [os.path.normpath(os.path.join(root_folder(data), place)) for place in places]
    folder = next((each for each in folders if os.path.exists(os.path.join(each, mark))), None)
    if folder is None:
        raise DataError(f"no {mark} in {', '.join(map(printable, folders))}; unpack the original archive there")
    return folder


def _images(folder: str, classes: Sequence[str]) -> dict[str, list[str]]:
    """Return each class's JPEGs, relative to `folder` and in the order of their names."""
    found = {}
    for name in classes:
        try:
            files = sorted(each for each in os.listdir(os.path.join(folder, name)) if each.lower().endswith(".jpg"))
        except OSError as error:
            raise _unreadable(os.path.join(folder, name), error) from error
        found[name] = [os.path.join(name, each) for each in files if not each.startswith(".")]
    return found


def _unreadable(folder: str, error: OSError) -> DataError:
    return DataError(f"{printable(folder)} cannot be read ({reason_of(error)}); unpack the original archive again")


def _seeded(name: str, folder: str, images: Mapping[str, list[str]], counts: Sequence[int], split: Split) -> FileSource:
    """Draw a split class by class with one generator of seed 0; training takes the first `counts` of a permutation."""
    draw = torch.Generator().manual_seed(0)
    files, labels = [], []
    for label, (of_class, count) in enumerate(zip(images.values(), counts, strict=True)):
        order = torch.randperm(len(of_class), generator=draw).numpy()
        chosen = np.sort(order[:count] if split == "train" else order[count:])
        files += [of_class[index] for index in chosen]
        labels += [label] * len(chosen)
    if not files:
        raise DataError(f"{printable(folder)} holds too few .jpg files; unpack the original archive again")
    return FileSource(name, folder, files, np.array(labels, dtype=np.int64), list(images))


def _check_size(source: FileSource, images: Mapping[str, list[str]], original: str) -> FileSource:
    """Add a notice if a folder is not the original: other files lead to another split."""
    found = f"{sum(map(len, images.values())):,} of {len(images)}"
    if found != original:
        size = f"images and classes: {found} where the original has {original}"
        source.notices = [f"{source.name}: {size}, so the split is not the paper's"]
    return source


def open_vtab1k(data: DataConfig, split: Split) -> FileSource:
    """Open a VTAB-1K data set in its usual layout: `NAME` has 1,000 training images, and test images for validation.

    `NAME/tune` splits the 1,000 into 800 and 200, to choose settings. Below `data.root`, or `vtab-1k` in it, the folder
    NAME holds the lists `train800val200.txt`, `test.txt`, `train800.txt` and `val200.txt`. Each line is a file's path
    in the folder and its label, a whole number from 0. Raises DataError for an unknown name, and for lists that are
    missing or damaged.
    """
    asked, slash, part = (data.spec or "").removeprefix("vtab1k:").partition("/")
    name, root = known_name(asked, VTAB_1K_NAMES), root_folder(data)
    if slash and part != "tune":
        raise DataError(f"{printable(part)!r} is not a part of {name}; write vtab1k:{name} or vtab1k:{name}/tune")
    lists = ("train800.txt", "val200.txt") if part else ("train800val200.txt", "test.txt")
    folders = [os.path.join(root, place) for place in (name, f"vtab-1k/{name}")]
    folder = next((each for each in folders if os.path.isfile(os.path.join(each, lists[0]))), None)
    if folder is None:
        raise DataError(f"no {lists[0]} in {' or '.join(map(printable, folders))}; unpack vtab-1k.zip there")
    train, test = (_read_list(os.path.join(folder, each)) for each in lists)
    files, labels = train if split == "train" else test
    classes = [str(label) for label in range(max(train[1] + test[1]) + 1)]
    spec = f"vtab1k:{name}" + slash + part
    source = FileSource(spec, folder, files, np.array(labels, dtype=np.int64), classes)
    source.lacks_classes = True
    return source


def _read_list(file: str) -> tuple[list[str], list[int]]:
    """Read paths and labels."""
    try:
        with open(file, encoding="utf-8", errors="surrogateescape") as lines:
            return _parsed(file, lines)
    except OSError as error:
        raise DataError(f"{printable(file)} cannot be read ({reason_of(error)}); unpack vtab-1k.zip again") from error


def _parsed(file: str, lines: Iterable[str]) -> tuple[list[str], list[int]]:
    paths, labels = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal() or len(label) > 6:
            raise DataError(f"{printable(file)}: line {number} is not a path and a label: {printable(line.strip())!r}")
        paths.append(path.rstrip())
        labels.append(int(label))
    if not paths:
        raise DataError(f"{printable(file)} is empty; unpack vtab-1k.zip again")
    return paths, labels
