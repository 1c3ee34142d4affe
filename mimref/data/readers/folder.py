"""Folders of images: which files, in which order, of which class.

Large folders are listed once. The listing is saved in the cache folder, with the modification time of every folder in
it: those change when an entry is added, removed or renamed, so that a later start checks folders only.
"""

import os
import time
from dataclasses import dataclass

import numpy as np

from mimref.data.decode import printable
from mimref.data.index.cache import Arrays, Scan, comparable_time, load_index, load_or_scan, save_index
from mimref.data.index.paths import PathList
from mimref.data.sources import FileSource, NoSplitError, Split
from mimref.data.splits import Indices
from mimref.errors import DataError
from mimref.progress import LabelledProgress

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"])


def open_folder(spec: str, split: Split, progress: LabelledProgress | None = None) -> FileSource:
    """A folder of images, with or without splits and classes (see `mimref.data.open`)."""
    root = os.path.expanduser(spec)
    shown = printable(spec)
    held = next((name for name in ("val", "test") if os.path.isdir(os.path.join(root, name))), None)
    train = "train" if os.path.isdir(os.path.join(root, "train")) else None
    if held is None and train is None:
        listing = list_folder(root, progress)
        classes = listing.class_folders() if split == "train" else None
        return _as_source(shown, root, listing, classes if classes is not None and len(classes) > 1 else None)
    part = train if split == "train" else held
    if part is None:
        present, missing = (f"{held}/", "train/") if split == "train" else ("train/", "val/ or test/")
        raise NoSplitError(
            f"--data {shown}: has {present} but no {missing}; make it, or name the folder of images itself"
        )
    folder = os.path.join(root, part)
    listing = list_folder(folder, progress)
    classes = listing.class_folders()
    reference = classes
    if train is not None and split == "val":
        reference = list_folder(os.path.join(root, train), progress).class_folders()
    if reference is None or len(reference) < 2:
        # The training images have no classes, so the validation images define their own, if any.
        reference = classes if classes is not None and len(classes) > 1 else None
    elif classes is not None and (unknown := sorted(set(classes) - set(reference))):
        raise DataError(
            f"--data {shown}: class {printable(unknown[0])!r} of {part}/ is not in train/; "
            "both need the same class folders"
        )
    return _as_source(shown, folder, listing, reference if classes is not None else None)


def _as_source(name: str, folder: str, listing: "Listing", classes: list[str] | None) -> FileSource:
    """All images below a folder; with classes, the first part of a path is the class."""
    if not len(listing.files):
        raise DataError(f"--data {name}: no images in {printable(folder)} (*{', *'.join(sorted(IMAGE_SUFFIXES))})")
    if classes is None:
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
    modified_ns: Indices
    """(folders,) modification times before they were listed; -1 for those that might change unnoticed."""

    def class_folders(self) -> list[str] | None:
        """Sorted names of the subfolders that hold images; None when images lie beside them."""
        if self.counts[0]:
            return None
        return sorted({self.folders[int(row)].split(os.sep, 1)[0] for row in np.flatnonzero(self.counts)})

    def is_current(self, root: str) -> bool:
        """Whether no folder has changed since."""
        for below, modified_ns in zip(self.folders, self.modified_ns.tolist(), strict=True):
            try:
                if os.stat(os.path.join(root, below)).st_mtime_ns != modified_ns:
                    return False
            except OSError:
                return False
        return True


def list_folder(root: str, progress: LabelledProgress | None = None) -> Listing:
    """The images below a folder, from the cache if no folder has changed since.

    Links to folders are followed, but no folder is entered twice: loops end. Raises DataError when one cannot be
    listed.
    """
    key = os.fsencode(os.path.abspath(root))

    def scan() -> Listing:
        timer = Scan("listing images, folder by folder", progress)
        listing = _scan(root, timer)
        if timer.is_worth_saving(len(listing.files)):
            _save(key, listing)
        return listing

    return load_or_scan("folder", key, lambda: _load(root, key), scan, progress)


def _scan(root: str, scan: Scan) -> Listing:
    """List a folder and all below it; reports the folders listed, of those known so far."""
    seen: set[tuple[int, int]] = set()
    # A list of bytes per folder, not of all files: the strings of one folder are freed before the next.
    content, folders = bytearray(), []
    lengths: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    counts, times = [], []
    pending = [""]
    while pending:
        relative = pending.pop()
        here = os.path.join(root, relative)
        scanned_ns = time.time_ns()
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
        lengths.append(np.array([len(path) for path in encoded], dtype=np.int64))
        folders.append(relative)
        counts.append(len(images))
        times.append(comparable_time(status.st_mtime_ns, scanned_ns))
        pending.extend(os.path.join(relative, name) for name in reversed(below))
        scan.report(len(folders), len(folders) + len(pending))
    ends = np.concatenate([np.zeros(1, dtype=np.int64), *lengths]).cumsum()
    return Listing(
        PathList(np.frombuffer(content, dtype=np.uint8), ends),
        PathList.pack(folders),
        np.array(counts, dtype=np.int64),
        np.array(times, dtype=np.int64),
    )


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """Names of a folder's images and of its subfolders, each sorted, without hidden ones. Raises OSError."""
    images, below = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                below.append(entry.name)
            elif _is_image(entry):
                images.append(entry.name)
    return sorted(images), sorted(below)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    """By name. Broken links count, and are reported when read; pipes and devices do not, since opening one may hang."""
    if os.path.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES:
        return False
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # a link to itself
        return True


# --- the listing in the cache


def _save(key: bytes, listing: Listing) -> None:
    arrays: Arrays = {
        "content": listing.files.content,
        "ends": listing.files.ends,
        "folders": listing.folders.content,
        "folder_ends": listing.folders.ends,
        "counts": listing.counts,
        "modified_ns": listing.modified_ns,
    }
    save_index("folder", key, arrays)


def _load(root: str, key: bytes) -> Listing | None:
    """The saved listing; None if there is none or a folder has changed since."""
    saved = load_index("folder", key, {"content", "ends", "folders", "folder_ends", "counts", "modified_ns"})
    if saved is None:
        return None
    files, folders = PathList(saved["content"], saved["ends"]), PathList(saved["folders"], saved["folder_ends"])
    listing = Listing(files, folders, saved["counts"], saved["modified_ns"])
    return listing if listing.is_current(root) else None
