"""Data sets known by name: scikit-learn's digits, Fashion-MNIST and torchvision's."""

import gzip
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimref.config.base import DataConfig
from mimref.data.decode import reason_of
from mimref.data.labels import stratified_split
from mimref.data.sources import ArraySource, FileSource, Split
from mimref.errors import DataError, did_you_mean
from mimref.locks import one_at_a_time

# Splits whose images serve neither training nor validation.
_UNUSED_SPLITS = {"STL10": "unlabeled", "SVHN": "extra", "Flowers102": "val"}
TORCHVISION_NAMES = ("CIFAR10", "CIFAR100", "FashionMNIST", "MNIST", "STL10", "SVHN", "Flowers102", "OxfordIIITPet")


def open_digits(split: Split) -> ArraySource:
    """Open scikit-learn's 1,797 digits of 8 x 8 pixels, 0..16 scaled to 0..255; 1,437 for training, 360 held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    train, held = stratified_split(labels, held_out=0.2)
    rows = train if split == "train" else held
    images = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    names = [str(name) for name in digits.target_names]
    return ArraySource("digits", images, labels[rows], names, split, rows)


FASHION_MNIST_FOLDERS = (
    "/usr/share/datasets/fashion-mnist",
    "~/.cache/mimref/fashion-mnist",
    "~/.cache/fashion-mnist",
    "data/FashionMNIST/raw",
)


def open_fashion_mnist(data: DataConfig, split: Split) -> ArraySource:
    """Open 60,000 training or 10,000 test images of 28 x 28 pixels (Xiao et al. 2017), from idx or idx.gz files."""
    if data.root is not None:
        folders = [os.path.join(os.path.expanduser(data.root), below) for below in ("", "FashionMNIST/raw")]
    else:
        folders = [os.path.expanduser(folder) for folder in FASHION_MNIST_FOLDERS]
    from torchvision.datasets import FashionMNIST

    prefix = "train" if split == "train" else "t10k"
    stems = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    candidates = ([_either(os.path.join(folder, stem)) for stem in stems] for folder in folders)
    found = next((paths for paths in candidates if all(paths)), None)
    if found is None:
        raise DataError(
            f"no {stems[0]}[.gz] with its labels in {', '.join(folders)}; "
            "install Debian's dataset-fashion-mnist, name their folder with --set data.root=FOLDER, or download with "
            "--data torchvision:FashionMNIST --set data.root=FOLDER --set data.download=true"
        )
    images, labels = _read_idx(found[0], ndim=3), _read_idx(found[1], ndim=1).astype(np.int64)
    if len(images) != len(labels) or labels.max(initial=0) >= len(FashionMNIST.classes):
        raise DataError(
            f"{found[1]}: {len(labels)} labels do not fit the {len(images)} images beside them; get the files again"
        )
    positions = np.arange(len(images), dtype=np.int64)
    return ArraySource("fashion-mnist", images, labels, list(FashionMNIST.classes), split, positions)


def _either(path: str) -> str:
    return next((name for name in (path, f"{path}.gz") if os.path.isfile(name)), "")


def _read_idx(path: str, *, ndim: int) -> NDArray[np.uint8]:
    """Read a (gzipped) idx file of unsigned bytes with `ndim` dimensions; the array is writable.

    Raises DataError if the file is damaged, or its header or size is not as expected.
    """
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            content = bytearray(file.read())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({reason_of(error)}); get the file again") from error
    start = 4 + 4 * ndim
    if len(content) < start or content[:4] != bytes([0, 0, 8, ndim]):
        raise DataError(f"{path} is not an idx file of bytes with {ndim} dimensions; get the file again")
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    expected = start + int(np.prod(shape, dtype=object))
    if len(content) != expected or shape[0] == 0:
        raise DataError(f"{path} holds {len(content)} bytes, but its header states {expected}; get the file again")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def open_torchvision(data: DataConfig, split: Split) -> ArraySource | FileSource:
    """Open a torchvision data set; its test images are the validation images."""
    asked = (data.spec or "").removeprefix("torchvision:")
    name = known_name(asked, TORCHVISION_NAMES)
    train = split == "train"
    part: dict[str, Any] = {"split": "train" if train else "test"}
    if name in ("CIFAR10", "CIFAR100", "FashionMNIST", "MNIST"):
        part = {"train": train}
    elif name == "OxfordIIITPet" and train:
        part = {"split": "trainval"}
    source = torchvision_source(f"torchvision:{name}", data, name, [part], split)
    if name in _UNUSED_SPLITS:
        source.notices = [f"torchvision:{name}: the images of its split {_UNUSED_SPLITS[name]!r} are not used"]
    return source


def known_name(asked: str, names: Sequence[str]) -> str:
    """Return the name as written in `names`, whatever the case of `asked`. Raises DataError for an unknown name."""
    known = {name.lower(): name for name in names}
    if asked.lower() not in known:
        near = did_you_mean(asked.lower(), known)
        raise DataError(f"unknown data set{near} (known: {', '.join(names)})")
    return known[asked.lower()]


def root_folder(data: DataConfig) -> str:
    """Return `data.root` with `~` expanded. Raises DataError if it is not set."""
    if data.root is None:
        raise DataError("needs the folder of its files: --set data.root=FOLDER")
    return os.path.expanduser(data.root)


def torchvision_source(
    name: str, data: DataConfig, of_torchvision: str, parts: Sequence[Mapping[str, Any]], split: Split
) -> ArraySource | FileSource:
    """Open a torchvision data set as a source with this name; parts: arguments of its class, one part after another.

    Raises DataError if files are missing or damaged. Only data sets of files have several parts.
    """
    from torchvision import datasets

    root = root_folder(data)
    try:
        # torchvision unpacks under the files' final names, so another process would read incomplete ones.
        with one_at_a_time(Path(root, of_torchvision)) if data.download else nullcontext():
            found = [getattr(datasets, of_torchvision)(root, download=data.download, **part) for part in parts]
    except Exception as error:  # each class raises its own: missing or corrupt files, no network, a missing package
        advice = "" if data.download else "; --set data.download=true fetches it"
        raise DataError(f"{root}: {reason_of(error)}{advice}") from error
    first = found[0]
    if any(getattr(each, "classes", None) != getattr(first, "classes", None) for each in found):
        raise DataError(f"{root}: images of some classes are missing in one of its splits; get the files again")
    held = next(each for each in ("targets", "labels", "_labels") if hasattr(first, each))
    labels = np.concatenate([np.asarray(getattr(each, held), dtype=np.int64) for each in found])
    classes = [str(c) for c in getattr(first, "classes", range(int(labels.max()) + 1))]
    if not hasattr(first, "data"):
        # Take its list of files rather than load it image by image.
        files = [file for each in found for file in getattr(each, "_image_files", None) or each._images]
        return FileSource(name, root, [str(Path(file).relative_to(root)) for file in files], labels, classes)
    images = np.asarray(first.data)
    if images.ndim == 4 and images.shape[-1] == 3:  # only CIFAR is (N, H, W, 3)
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return ArraySource(name, images, labels, classes, split, np.arange(len(images), dtype=np.int64))
