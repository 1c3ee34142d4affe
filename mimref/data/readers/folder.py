"""Folders of images: which files, in which order, of which class.

Large folders are listed once. The listing is saved in the cache folder, with the modification time of every folder in
it: those change when an entry is added, removed or renamed, so that a later start checks folders only.
"""

import os
import time
from dataclasses import dataclass

import numpy as np

from mimref.data.decode import printable
from mimref.data.index.cache import Arrays, comparable_times, load_or_scan
from mimref.data.labels import Indices
from mimref.data.sources import FileSource, NoSplitError, PathList, Split
from mimref.errors import DataError
from mimref.progress import LabelledProgress, Progress

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"])


def open_folder(spec: str, split: Split, progress: LabelledProgress | None = None) -> FileSource:
    """A folder of images, with or without splits and classes (see docs/data.md). Raises DataError without images."""
    root = os.path.expanduser(spec)
    shown = printable(spec)
    train, held = (
        next((name for name in names if os.path.isdir(os.path.join(root, name))), None)
        for names in (["train"], ["val", "test"])
    )
    if train is None and held is None:
        listing = list_folder(root, progress)
        return _as_source(shown, root, listing, listing.class_folders() if split == "train" else [])
    part = train if split == "train" else held
    if part is None:
        present, missing = (f"{held}/", "train/") if split == "train" else ("train/", "val/ or test/")
        raise NoSplitError(f"has {present} but no {missing}; create it, or name the folder of images itself")
    folder = os.path.join(root, part)
    listing = list_folder(folder, progress)
    own = classes = listing.class_folders()
    if train is not None and split == "val":
        classes = list_folder(os.path.join(root, train), progress).class_folders()
    if len(classes) < 2:
        classes = own  # the training images have no classes, so the validation images define their own, if any
    elif unknown := sorted(set(own) - set(classes)):
        raise DataError(
            f"class {printable(unknown[0])!r} of {part}/ is not in train/; both need the same class folders"
        )
    return _as_source(shown, folder, listing, classes if own else [])


def _as_source(name: str, folder: str, listing: "Listing", classes: list[str]) -> FileSource:
    """All images below a folder; with two or more classes, the first part of a path is the class."""
    if not len(listing):
        raise DataError(f"no images in {printable(folder)} (*{', *'.join(sorted(IMAGE_SUFFIXES))})")
    if len(classes) < 2:
        return FileSource(name, folder, listing.files, None, None)
    number = {name: index for index, name in enumerate(classes)}
    of_folder = [number.get(below.split(os.sep, 1)[0], -1) for below in listing.folders]
    labels = np.repeat(np.array(of_folder, dtype=np.int64), listing.counts)
    return FileSource(name, folder, listing.files, labels, classes)


@dataclass(eq=False)
class Listing:
    """The images below a folder: sorted, and those of a folder before those of its subfolders."""

    files: PathList
    """Relative paths, folder by folder, in the order of `folders`."""
    folders: PathList
    """Relative paths of all folders listed; the first is the folder itself, as an empty path."""
    counts: Indices
    """(folders,) images directly in each."""

    def __len__(self) -> int:
        return len(self.files)

    def class_folders(self) -> list[str]:
        """Sorted names of the subfolders that hold images; none when images lie beside them."""
        if self.counts[0]:
            return []
        return sorted({self.folders[int(row)].split(os.sep, 1)[0] for row in np.flatnonzero(self.counts)})


def list_folder(root: str, progress: LabelledProgress | None = None) -> Listing:
    """The images below a folder, from the cache if no folder has changed since.

    Links to folders are followed, but no folder is entered twice: loops end. Raises DataError when one cannot be
    listed.
    """

    def unpack(saved: Arrays) -> Listing | None:
        folders = PathList(saved["folders"], saved["folder_ends"])
        for below, modified_ns in zip(folders, saved["modified_ns"].tolist(), strict=True):
            if os.stat(os.path.join(root, below)).st_mtime_ns != modified_ns:
                return None
        return Listing(PathList(saved["content"], saved["ends"]), folders, saved["counts"])

    key = os.fsencode(os.path.abspath(root))
    return load_or_scan("folder", key, progress, unpack=unpack, scan=lambda report: _scan(root, report))


def _scan(root: str, report: Progress) -> tuple[Listing, Arrays]:
    """List a folder and all below it; reports the folders listed, of those known so far."""
    seen: set[tuple[int, int]] = set()
    # The bytes of all paths: the strings of one folder are freed before the next is listed.
    content, lengths = bytearray(), [0]
    folders, counts, modified_ns, scanned_ns = [], [], [], []
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
            images, below = _entries(here)
        except OSError as error:
            raise DataError(f"folder {printable(here)} cannot be listed: {error.strerror}") from error
        encoded = [os.fsencode(os.path.join(relative, name)) for name in images]
        content += b"".join(encoded)
        lengths.extend(map(len, encoded))
        folders.append(relative)
        counts.append(len(images))
        modified_ns.append(status.st_mtime_ns)
        scanned_ns.append(now_ns)
        pending.extend(os.path.join(relative, name) for name in reversed(below))
        report(len(folders), len(folders) + len(pending))
    files = PathList(np.frombuffer(content, dtype=np.uint8), np.cumsum(lengths, dtype=np.int64))
    listing = Listing(files, PathList.pack(folders), np.array(counts, dtype=np.int64))
    return listing, {
        "content": listing.files.content,
        "ends": listing.files.ends,
        "folders": listing.folders.content,
        "folder_ends": listing.folders.ends,
        "counts": listing.counts,
        "modified_ns": comparable_times(np.array(modified_ns), np.array(scanned_ns)),
    }


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """Names of a folder's images and of its subfolders, each sorted, without hidden ones. Raises OSError.

    Broken links count as images, and are reported when read; pipes and devices do not, since opening one may hang.
    """
    images, below = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself
                is_folder, is_file = False, True
            if is_folder:
                below.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and (
                is_file or (entry.is_symlink() and not os.path.exists(entry.path))
            ):
                images.append(entry.name)
    return sorted(images), sorted(below)
