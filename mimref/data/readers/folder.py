"""Folders of images: their files, the order of these, and their classes.

Large folders are listed once. The listing is saved in the cache folder, with the modification time of every folder in
it. These times change when an entry is added, removed or renamed, so a later start checks only the folders.
"""

import hashlib
import os
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from mimref.data.decode import first_of, printable
from mimref.data.index.cache import Arrays, comparable_times, load_or_scan
from mimref.data.labels import Indices, class_name, nearest_class, order_classes
from mimref.data.sources import FileSource, NoSplitError, PathList, Split
from mimref.data.suffixes import count_kinds, image_suffixes, is_image, unused_files, unused_kind
from mimref.errors import DataError
from mimref.progress import LabelledProgress, Progress

_SPLIT_WORDS = frozenset(["train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"])
_LEFTOVERS = (
    "__MACOSX",
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
    "__pycache__",
)
"""Folders in which systems keep thumbnails, deleted files and other things that belong to no data set."""
_SEARCHED_FOLDERS = 50
"""Number of folders searched for an image before a folder beside the splits counts as one without images."""


def open_folder(
    spec: str, split: Split, progress: LabelledProgress | None = None, *, arrays: bool = False
) -> FileSource:
    """Open a folder of images, with or without splits and classes (see docs/data.md). Raises DataError without images.

    arrays: `.npy` and `.npz` files are images too.
    """
    root = os.path.expanduser(spec)
    shown = printable(spec)
    train, held = (
        next((name for name in names if os.path.isdir(os.path.join(root, name))), None)
        for names in (["train"], ["val", "test"])
    )
    if train is None and held is None:
        listing = list_folder(root, progress, arrays=arrays)
        return _as_source(shown, root, listing, listing.classes() if split == "train" else [])
    part = train if split == "train" else held
    beside, notices = _beside_splits(root, arrays)
    if part is None:
        present, missing = (f"{held}/", "train/") if split == "train" else ("train/", "val/ or test/")
        others = f" (it has {first_of(beside, 5)})" if beside else ""
        raise NoSplitError(f"has {present} but no {missing}{others}; create it, or name the folder of images itself")
    folder = os.path.join(root, part)
    listing = list_folder(folder, progress, arrays=arrays)
    own = classes = listing.classes()
    if train is not None and split == "val":
        classes = list_folder(os.path.join(root, train), progress, arrays=arrays).classes()
    if len(classes) < 2:
        classes = own  # the training images have no classes, so the validation images define their own, if any
    elif unknown := sorted(set(own) - set(classes)):
        empty = os.path.isdir(os.path.join(root, "train", unknown[0]))
        what = "has no images in train/" if empty else f"is not in train/{nearest_class(unknown[0], classes)}"
        raise DataError(f"class {printable(unknown[0])!r} of {part}/ {what}; both need the same class folders")
    source = _as_source(shown, folder, listing, classes if own else [])
    source.notices = [*source.notices, *notices]
    return source


def _as_source(name: str, folder: str, listing: "Listing", classes: list[str]) -> FileSource:
    """Return all images below a folder as a source; with two or more classes, the first part of a path is the class."""
    where = printable(folder)
    if not len(listing):
        unused = f"; it holds {count_kinds(listing.unused)}; convert images to a format that Pillow reads"
        raise DataError(f"no images in {where} (*.jpg, *.png and others{unused if listing.unused else ''})")
    notices = unused_files(where, listing.unused)
    beside, below = int(listing.counts[0]), listing.subfolders()
    how_to_label = ""
    if beside and len(below) > 1:
        what = f"{beside} {'image lies' if beside == 1 else 'images lie'} beside its {len(below)} folders of images"
        how_to_label = f"{where}: {what}; move {'it' if beside == 1 else 'them'} into class folders"
        notices.append(f"{where}: {what}, which are therefore not classes")
    labels = None
    if len(classes) > 1:
        number = {name: index for index, name in enumerate(classes)}
        of_folder = [number.get(class_name(below.split(os.sep, 1)[0]), -1) for below in listing.folders]
        labels = np.repeat(np.array(of_folder, dtype=np.int64), listing.counts)
        if _SPLIT_WORDS.issuperset(name.lower() for name in classes):
            named = ", ".join(f"{name}/" for name in classes)
            notices.append(f"{where}: {named} are taken for classes; splits are named train/ and val/ (or test/)")
        spellings = Counter(map(class_name, below))
        if twice := [name for name, count in spellings.items() if count > 1]:
            alone = "folders whose names differ only in Unicode spelling are one class"
            notices.append(f"{where}: {alone}: {first_of(twice)}")
    source = FileSource(name, folder, listing.files, labels, classes if labels is not None else None)
    source.notices, source.how_to_label = notices, how_to_label
    return source


def _beside_splits(root: str, arrays: bool) -> tuple[list[str], list[str]]:
    """Return the folders with images beside train/, val/ and test/, and notices of all images beside the splits."""
    try:
        images, folders, unused = _entries(root, arrays)
    except OSError:  # the splits' own folders may still be readable
        return [], []
    others = (name for name in folders if name not in ("train", "val", "test"))
    beside = [f"{name}/" for name in others if _holds_images(root, name, arrays)]
    where, notices = printable(root), []
    if images:
        what = "image beside its splits is" if len(images) == 1 else "images beside its splits are"
        notices.append(f"{where}: {len(images)} {what} not used")
    if beside:
        notices.append(f"{where}: images in {first_of(beside, 5)} are not used, only those in train/ and val/ or test/")
    return beside, notices + unused_files(where, unused)


def _holds_images(root: str, name: str, arrays: bool) -> bool:
    """Return whether there is an image in a folder or the first folders below it."""
    pending = [os.path.join(root, name)]
    for _ in range(_SEARCHED_FOLDERS):
        if not pending:
            return False
        here = pending.pop()
        try:
            images, below, _ = _entries(here, arrays)
        except OSError:
            continue
        if images:
            return True
        pending.extend(os.path.join(here, each) for each in reversed(below))
    return False


@dataclass(eq=False)
class Listing:
    """The images below a folder, sorted, with those of a folder before those of its subfolders."""

    files: PathList
    """Relative paths, folder by folder, in the order of `folders`."""
    folders: PathList
    """Relative paths of all folders listed; the first is the folder itself, as an empty path."""
    counts: Indices
    """(folders,) number of images directly in each."""
    unused: dict[str, int]
    """Number of unused files by kind, in all folders, that could be images."""

    def __len__(self) -> int:
        return len(self.files)

    def subfolders(self) -> list[str]:
        """Return the sorted names of the direct subfolders that hold images, at any depth."""
        return sorted({self.folders[int(row)].split(os.sep, 1)[0] for row in np.flatnonzero(self.counts)} - {""})

    def classes(self) -> list[str]:
        """Return the names of the classes in order: those of the subfolders; none if images lie beside them."""
        return [] if self.counts[0] else order_classes(map(class_name, self.subfolders()))


def list_folder(root: str, progress: LabelledProgress | None = None, *, arrays: bool = False) -> Listing:
    """Return the images below a folder, from the cache if no folder has changed since.

    Links to folders are followed, but no folder is entered twice, so loops end. Raises DataError if a folder cannot be
    listed.
    """

    def unpack(saved: Arrays) -> Listing | None:
        folders = PathList(saved["folders"], saved["folder_ends"])
        for below, modified_ns in zip(folders, saved["modified_ns"].tolist(), strict=True):
            if os.stat(os.path.join(root, below)).st_mtime_ns != modified_ns:
                return None
        unused = dict(zip(saved["unused"].tolist(), saved["unused_counts"].tolist(), strict=True))
        return Listing(PathList(saved["content"], saved["ends"]), folders, saved["counts"], unused)

    key = listing_key(root, arrays=arrays)
    return load_or_scan("folder", key, progress, unpack=unpack, scan=lambda report: _scan(root, report, arrays))


def listing_key(root: str, *, arrays: bool = False) -> bytes:
    """Return what identifies a folder's saved listing: its path, and the formats, which depend on Pillow's version."""
    formats = hashlib.sha256(" ".join(sorted(image_suffixes(arrays=arrays))).encode()).digest()
    return os.fsencode(os.path.abspath(root)) + b"\0" + formats


def _scan(root: str, report: Progress, arrays: bool) -> tuple[Listing, Arrays]:
    """List a folder and all folders below it; report the number listed, out of those known so far."""
    seen: set[tuple[int, int]] = set()
    # Paths are collected as bytes: the strings of one folder are freed before the next is listed.
    content, lengths = bytearray(), [0]
    folders, counts, modified_ns, scanned_ns = [], [], [], []
    unused: Counter[str] = Counter()
    pending = [""]
    while pending:
        relative = pending.pop()
        here = os.path.join(root, relative)
        now_ns = time.time_ns()
        try:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            images, below, others = _entries(here, arrays)
        except OSError as error:
            raise DataError(f"folder {printable(here)} cannot be listed: {error.strerror}") from error
        encoded = [os.fsencode(os.path.join(relative, name)) for name in images]
        content += b"".join(encoded)
        lengths.extend(map(len, encoded))
        folders.append(relative)
        counts.append(len(images))
        unused += others
        modified_ns.append(status.st_mtime_ns)
        scanned_ns.append(now_ns)
        pending.extend(os.path.join(relative, name) for name in reversed(below))
        report(len(folders), len(folders) + len(pending))
    files = PathList(np.frombuffer(content, dtype=np.uint8), np.cumsum(lengths, dtype=np.int64))
    listing = Listing(files, PathList.pack(folders), np.array(counts, dtype=np.int64), unused)
    return listing, {
        "content": listing.files.content,
        "ends": listing.files.ends,
        "folders": listing.folders.content,
        "folder_ends": listing.folders.ends,
        "counts": listing.counts,
        "unused": np.array(list(unused), dtype=np.str_),
        "unused_counts": np.array(list(unused.values()), dtype=np.int64),
        "modified_ns": comparable_times(np.array(modified_ns), np.array(scanned_ns)),
    }


def _entries(folder: str, arrays: bool) -> tuple[list[str], list[str], Counter[str]]:
    """Return the names of a folder's images and of its subfolders, each sorted, and kinds of unused files.

    Hidden entries are ignored, except for files that iCloud has not downloaded. Broken links count as images, and are
    reported when read; pipes and devices do not, since opening one may hang. Raises OSError.
    """
    images, below, unused = [], [], Counter[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in _LEFTOVERS or (entry.name.startswith(".") and not unused_kind(entry.name)):
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                is_folder, is_file = False, True
            if is_folder:
                below.append(entry.name)
            elif not (is_file or (entry.is_symlink() and not os.path.exists(entry.path))):
                unused["pipe or device"] += is_image(entry.name)
            elif is_image(entry.name, arrays=arrays):
                images.append(entry.name)
            elif kind := unused_kind(entry.name):
                unused[kind] += 1
    return sorted(images), sorted(below), +unused
