"""What `--data SPEC` accepts, opened as a list of images.

- A folder with `train/` and `val/` (or `test/`), each with one folder per class, or with images and no classes.
- Any other folder: all images in it, at any depth, for training and validation alike, without labels. Where the images
  lie in two or more subfolders and none beside them, the training images take the subfolders as classes; the validation
  images are the same ones and stay unlabelled, so that nothing is ever scored on what it was fitted to.
- `digits`, `fashion-mnist`, `torchvision:NAME`. A folder of such a name is reached as `./digits`.

Hidden files are ignored, and so are files whose name does not end like an image's.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimref.config import DataConfig
from mimref.data.decode import (
    BadImage,
    BadImages,
    Decoded,
    Reduce,
    decode_image,
    decode_reduced,
    one_line,
    printable,
    read_idx,
)
from mimref.data.splits import Indices, first_images, stratified_split
from mimref.errors import ConfigError, DataError, did_you_mean

__all__ = ["ArraySource", "BadImage", "BadImages", "FileSource", "ImageSource", "decode_image", "open_source"]

Split = Literal["train", "val"]

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"])
TORCHVISION_NAMES = ("CIFAR10", "CIFAR100", "FashionMNIST", "MNIST", "STL10", "SVHN", "Flowers102", "OxfordIIITPet")
ACCEPTED = "a folder, digits, fashion-mnist or torchvision:NAME"


class ImageSource(Protocol):
    """A fixed list of N images, some of which may turn out to be unreadable."""

    @property
    def name(self) -> str:
        """The data set as the user named it."""

    @property
    def labels(self) -> Indices | None:
        """Class of every image, (N,) int64, or None."""

    @property
    def class_names(self) -> list[str] | None:
        """Names of classes 0, 1, ..., or None without labels."""

    @property
    def in_memory(self) -> bool:
        """Whether reading costs no decoding, so that loader processes would not pay."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over what identifies the images and their labels."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """One image, uint8 (3, H, W). Raises BadImage when it cannot be read."""

    def path(self, index: int) -> str:
        """A name of the image for messages and tables."""


@dataclass(eq=False)
class ArraySource:
    """Images in memory: uint8 (N, H, W) gray or (N, 3, H, W)."""

    name: str
    images: NDArray[np.uint8]
    labels: Indices | None
    class_names: list[str] | None
    split: str
    positions: Indices
    """(N,) index of every image in the data set's own order, for its name."""
    in_memory: bool = True

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        """One image, uint8 (3, H, W), a copy; gray is repeated for the three channels."""
        image = torch.from_numpy(self.images[index])
        if image.ndim == 2:
            return image.expand(3, -1, -1).clone(memory_format=torch.contiguous_format)
        return image.clone(memory_format=torch.contiguous_format)

    def path(self, index: int) -> str:
        """`NAME/SPLIT/POSITION`."""
        return f"{self.name}/{self.split}/{self.positions[index]}"

    @cached_property
    def fingerprint(self) -> str:
        """Over pixels and labels."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()


@dataclass(eq=False)
class FileSource:
    """Image files below one folder, decoded when read."""

    name: str
    folder: str
    files: list[str]
    """Paths relative to `folder`."""
    labels: Indices | None
    class_names: list[str] | None
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Tensor:
        """One image, uint8 (3, H, W). Raises BadImage when it cannot be read."""
        return decode_image(os.path.join(self.folder, self.files[index]))

    def read_reduced(self, index: int, reduce: Reduce | None) -> Decoded:
        """One image, a JPEG at a fraction of its size where `reduce` allows it. Raises BadImage as `read` does."""
        return decode_reduced(os.path.join(self.folder, self.files[index]), reduce)

    def path(self, index: int) -> str:
        """The file's path, as far as the user gave it, with odd characters escaped."""
        return printable(os.path.join(self.folder, self.files[index]))

    @cached_property
    def fingerprint(self) -> str:
        """Over relative paths, sizes, modification times and labels. Costs one look-up per file, at first use."""
        digest = hashlib.sha256()
        for file in self.files:
            try:
                status = os.stat(os.path.join(self.folder, file))
                size, modified_ns = status.st_size, status.st_mtime_ns
            except OSError:
                size, modified_ns = -1, -1  # a broken link: bad when read, and part of the list all the same
            digest.update(os.fsencode(file) + f"\0{size}\0{modified_ns}\n".encode())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()


def open_source(data: DataConfig, split: Split, *, need_labels: bool = False) -> ImageSource:
    """Find the images of `data.spec`, and apply `data.train_limit` to its training images.

    Raises DataError when there are none, when the spec is unknown, or when labels are needed and absent; ConfigError
    when `data.train_limit` exceeds what there is. No image file is opened here.
    """
    spec = data.spec
    if spec is None:
        raise ConfigError(f"no images named: give --data, {ACCEPTED}")
    source: ArraySource | FileSource
    if spec == "digits":
        source = _open_digits(split)
    elif spec == "fashion-mnist":
        source = _open_fashion_mnist(data, split)
    elif spec.startswith("torchvision:"):
        source = _open_torchvision(data, split)
    else:
        source = _open_folder(spec, split)
    if need_labels and source.labels is None:
        raise DataError(
            f"--data {printable(spec)}: the {split} images have no labels, which this needs; "
            "make train/ and val/ in it, each with one folder per class (two or more)"
        )
    if split == "train" and data.train_limit is not None:
        _keep(source, first_images(len(source), source.labels, limit=data.train_limit))
    return source


def _keep(source: ArraySource | FileSource, kept: Indices) -> None:
    """Cut a freshly opened source down to some of its images."""
    if isinstance(source, ArraySource):
        source.images, source.positions = source.images[kept], source.positions[kept]
    else:
        source.files = [source.files[index] for index in kept]
    if source.labels is not None:
        source.labels = source.labels[kept]


# --- data sets by name


def _open_digits(split: Split) -> ArraySource:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, 0..16 spread over 0..255; 1,437 for training, 360 held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    train, held = stratified_split(labels, held_out=0.2)
    kept = train if split == "train" else held
    images = np.rint(digits.images[kept] * (255 / 16)).astype(np.uint8)
    names = [str(name) for name in digits.target_names]
    return ArraySource("digits", images, labels[kept], names, split, kept)


FASHION_MNIST_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
FASHION_MNIST_FOLDERS = (
    "/usr/share/datasets/fashion-mnist",
    "~/.cache/mimref/fashion-mnist",
    "~/.cache/fashion-mnist",
    "data/FashionMNIST/raw",
)


def _open_fashion_mnist(data: DataConfig, split: Split) -> ArraySource:
    """60,000 training and 10,000 test images of 28 x 28 pixels (Xiao et al. 2017), from idx or idx.gz files."""
    if data.root is not None:
        folders = [os.path.join(os.path.expanduser(data.root), below) for below in ("", "FashionMNIST/raw")]
    else:
        folders = [os.path.expanduser(folder) for folder in FASHION_MNIST_FOLDERS]
    prefix = "train" if split == "train" else "t10k"
    stems = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    for folder in folders:
        found = [_either(os.path.join(folder, stem)) for stem in stems]
        if found[0] is not None and found[1] is not None:
            images, labels = read_idx(found[0], ndim=3), read_idx(found[1], ndim=1).astype(np.int64)
            break
    else:
        raise DataError(
            f"--data fashion-mnist: no {stems[0]}[.gz] with its labels in {', '.join(folders)}; "
            "install Debian's dataset-fashion-mnist, name their folder with --set data.root=FOLDER, or download with "
            "--data torchvision:FashionMNIST --set data.root=FOLDER --set data.download=true"
        )
    if len(images) != len(labels) or labels.max(initial=0) >= len(FASHION_MNIST_CLASSES):
        raise DataError(
            f"{found[1]}: {len(labels)} labels do not fit the {len(images)} images beside them; get the files anew"
        )
    positions = np.arange(len(images), dtype=np.int64)
    return ArraySource("fashion-mnist", images, labels, FASHION_MNIST_CLASSES, split, positions)


def _either(path: str) -> str | None:
    return next((name for name in (path, f"{path}.gz") if os.path.isfile(name)), None)


def _open_torchvision(data: DataConfig, split: Split) -> ArraySource | FileSource:
    """A torchvision data set; its test images are the validation images."""
    from torchvision import datasets

    asked = (data.spec or "").removeprefix("torchvision:")
    known = {name.lower(): name for name in TORCHVISION_NAMES}
    name = known.get(asked.lower())
    if name is None:
        near = did_you_mean(asked.lower(), known)
        raise DataError(f"--data torchvision:{asked}: unknown data set{near} (known: {', '.join(TORCHVISION_NAMES)})")
    if data.root is None:
        raise DataError(f"--data torchvision:{name} needs the folder of its files: --set data.root=FOLDER")
    root, train, download = os.path.expanduser(data.root), split == "train", data.download
    dataset: Any
    try:
        if name in ("CIFAR10", "CIFAR100", "FashionMNIST", "MNIST"):
            dataset = getattr(datasets, name)(root, train=train, download=download)
        elif name == "OxfordIIITPet":
            dataset = datasets.OxfordIIITPet(root, split="trainval" if train else "test", download=download)
        else:
            dataset = getattr(datasets, name)(root, split="train" if train else "test", download=download)
    except Exception as error:  # each class has its own: missing or corrupt files, no network, a missing package
        advice = "" if download else "; --set data.download=true fetches it"
        raise DataError(f"--data torchvision:{name} in {root}: {one_line(error)}{advice}") from error
    return _wrap_torchvision(f"torchvision:{name}", root, dataset, split)


def _wrap_torchvision(name: str, root: str, dataset: Any, split: Split) -> ArraySource | FileSource:
    """Take over a data set's arrays, or its list of files, rather than calling it image by image."""
    if hasattr(dataset, "data"):
        images = np.asarray(dataset.data)
        if images.ndim == 4 and images.shape[-1] == 3:  # CIFAR alone is (N, H, W, 3)
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        labels = np.asarray(dataset.targets if hasattr(dataset, "targets") else dataset.labels, dtype=np.int64)
    else:
        files = dataset._image_files if hasattr(dataset, "_image_files") else dataset._images
        labels = np.asarray(dataset._labels, dtype=np.int64)
    classes = [str(c) for c in getattr(dataset, "classes", range(int(labels.max()) + 1))]
    if hasattr(dataset, "data"):
        return ArraySource(name, images, labels, classes, split, np.arange(len(images), dtype=np.int64))
    return FileSource(name, root, [str(Path(file).relative_to(root)) for file in files], labels, classes)


# --- folders


def _open_folder(spec: str, split: Split) -> FileSource:
    """A folder of images, with or without splits and classes (see the top of this file)."""
    root = os.path.expanduser(spec)
    shown = printable(spec)
    if not os.path.isdir(root):
        near = did_you_mean(spec, ("digits", "fashion-mnist", "torchvision:"))
        what = "is a file, not a folder" if os.path.exists(root) else f"no such folder or data set{near}"
        raise DataError(f"--data {shown}: {what} (accepted: {ACCEPTED})")
    held = next((name for name in ("val", "test") if os.path.isdir(os.path.join(root, name))), None)
    train = "train" if os.path.isdir(os.path.join(root, "train")) else None
    if held is None and train is None:
        classes = _class_folders(root) if split == "train" else None
        return _list_files(shown, root, classes if classes is not None and len(classes) > 1 else None)
    part = train if split == "train" else held
    if part is None:
        there, missing = (f"{held}/", "train/") if split == "train" else ("train/", "val/ or test/")
        raise DataError(f"--data {shown}: has {there} but no {missing}; make it, or name the folder of images itself")
    folder = os.path.join(root, part)
    classes = _class_folders(folder)
    reference = classes if train is None or split == "train" else _class_folders(os.path.join(root, train))
    if reference is None or len(reference) < 2:
        # The training images know no classes; those of the validation images, if any, are their own.
        reference = classes if classes is not None and len(classes) > 1 else None
    elif classes is not None and (unknown := sorted(set(classes) - set(reference))):
        raise DataError(
            f"--data {shown}: class {printable(unknown[0])!r} of {part}/ is not in train/; "
            "both need the same class folders"
        )
    return _list_files(shown, folder, reference if classes is not None else None)


def _list_files(name: str, folder: str, classes: list[str] | None) -> FileSource:
    """All images below a folder; with classes, the first part of a path is the class."""
    files = list(_image_files(folder))
    if not files:
        raise DataError(f"--data {name}: no images in {printable(folder)} (*{', *'.join(sorted(IMAGE_SUFFIXES))})")
    if classes is None:
        return FileSource(name, folder, files, None, None)
    number = {name: index for index, name in enumerate(classes)}
    labels = np.fromiter((number[file.split(os.sep, 1)[0]] for file in files), dtype=np.int64, count=len(files))
    return FileSource(name, folder, files, labels, classes)


def _class_folders(folder: str) -> list[str] | None:
    """Sorted names of the subfolders that hold images; None when images lie beside them."""
    entries = _entries(folder)
    if any(_is_image(entry) for entry in entries):
        return None
    below = [entry.name for entry in entries if _is_folder(entry)]
    # The first image of each is enough: opening the validation images does not list all training images.
    return [name for name in below if next(_image_files(os.path.join(folder, name)), None) is not None]


def _image_files(folder: str) -> Iterator[str]:
    """Relative paths of the images below a folder: sorted, and those of a folder before those of its subfolders.

    Links to folders are followed, but no folder is entered twice: loops end.
    """
    seen: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        relative = pending.pop()
        here = os.path.join(folder, relative)
        entries = _entries(here)
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (os.path.join(relative, entry.name) for entry in entries if _is_image(entry))
        pending.extend(os.path.join(relative, entry.name) for entry in reversed(entries) if _is_folder(entry))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted by name, without hidden files."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"folder {printable(folder)} cannot be listed: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    """By name. Broken links count, to be reported when read; pipes and devices do not, since opening them may hang."""
    if os.path.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES or _is_folder(entry):
        return False
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # a link to itself
        return True
