"""Webdataset shards: tar files whose members are samples, `wds:SHARDS`.

SHARDS is a folder with `train/` and `val/` (or `validation/`, `test/`) of `*.tar` files, or a pattern of paths with
`*`, `{000..009}` and `{a,b}`; `{split}` in it stands for train or val (else validation, else test). A folder without
splits and a pattern without `{split}` name the images of training and validation alike; the latter stay unlabelled.

A sample is the run of members that share a name up to the first dot of its last part. Its image is the member with the
suffix .jpg, .jpeg, .png or .webp (the first that exists, in this order); its label is the text of `.cls`, a whole
number or a class name, or `label` in `.json`. Samples without an image, such as notes, are ignored.

Shards are local files or, where SHARDS is a pattern of URLs, files on a server that serves parts of files. Each is read
once from end to end to index its images; the index is saved in the cache. Every image can then be read by itself, so
shards behave like single files: shuffled across all shards, every image exactly once per epoch over any number of
processes and workers, resumable at any step. Streams (`pipe:`) allow none of that exactly, and are not supported.
"""

import errno
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from glob import escape, glob, has_magic

import numpy as np
from braceexpand import braceexpand

from mimref.data.decode import BadImage, Decoded, Reduce, decode_content, printable, reason_of
from mimref.data.index.cache import Arrays, Scan, comparable_time, load_index, load_or_scan, save_index
from mimref.data.index.paths import PathList
from mimref.data.index.remote import MISSING, expand_stars, file_states, is_remote, map_concurrently, read_parts
from mimref.data.index.tar import IMAGES, samples_with_images
from mimref.data.labels import RawLabels
from mimref.data.sources import EncodedSource, NoSplitError, Split
from mimref.data.splits import Indices
from mimref.errors import DataError
from mimref.progress import LabelledProgress

HELD_OUT = ("val", "validation", "test")


@dataclass(eq=False)
class ShardIndex:
    """Where every image lies."""

    shards: PathList
    shard: Indices
    """(N,) index into `shards`."""
    offsets: Indices
    """(N,) byte of the shard at which the image begins."""
    sizes: Indices
    """(N,) bytes."""
    members: PathList
    """(N,) name in the shard."""
    labels: RawLabels | None
    """As the shards have them."""
    states: Indices
    """(number of shards, 2): size and time of modification when they were opened."""


class ShardSource(EncodedSource):
    """Images within tar files, decoded when read."""

    def __init__(self, name: str, index: ShardIndex, labels: Indices | None, class_names: list[str] | None) -> None:
        super().__init__(name, np.arange(len(index.members)), labels, class_names)
        self.index = index
        self._fetched: dict[int, bytes | FileNotFoundError] = {}

    def fetch(self, indices: Sequence[int]) -> None:
        """Request all of these images from a server at once. Raises DataError when it does not answer."""
        if not is_remote(self.index.shards[0]):
            return
        urls = [self._shard(index) for index in indices]
        starts = [self._place(index)[0] for index in indices]
        ends = [sum(self._place(index)) for index in indices]
        self._fetched = dict(zip(indices, read_parts(urls, starts, ends), strict=True))

    def read_reduced(self, index: int, reduce: Reduce | None) -> Decoded:
        """See `EncodedSource`."""
        try:
            content = self._content(index)
        except OSError as error:
            raise BadImage(self.path(index), reason_of(error).lower()) from error
        if len(content) < self._place(index)[1]:
            raise BadImage(self.path(index), "its shard has become shorter")
        return decode_content(content, self.path(index), reduce)

    def _content(self, index: int) -> bytes:
        """An image as stored in its shard. Raises OSError."""
        path = self._shard(index)
        if is_remote(path):
            if index not in self._fetched:
                self.fetch([index])
            content = self._fetched.pop(index)
            if isinstance(content, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, "no such file")
            return content
        # Opened for every image: there may be more shards than a process may keep open.
        with open(path, "rb") as shard:
            offset, size = self._place(index)
            shard.seek(offset)
            return shard.read(size)

    def _shard(self, index: int) -> str:
        return self.index.shards[self.index.shard[self.rows[index]]]

    def _place(self, index: int) -> tuple[int, int]:
        """Where an image begins in its shard, and its size, in bytes."""
        row = self.rows[index]
        return int(self.index.offsets[row]), int(self.index.sizes[row])

    def path(self, index: int) -> str:
        """`SHARD/MEMBER`, with odd characters escaped."""
        return printable(os.path.join(self._shard(index), self.index.members[self.rows[index]]))

    @cached_property
    def fingerprint(self) -> str:
        """Over the shards' names, sizes and modification times, the places of the images in them, and labels."""
        digest = hashlib.sha256()
        for shard, (size, modified_ns) in zip(self.index.shards, self.index.states.tolist(), strict=True):
            digest.update(os.fsencode(os.path.basename(shard)) + f"\0{size}\0{modified_ns}\n".encode())
        for array in (self.index.shard, self.index.offsets, self.index.sizes):
            digest.update(array[self.rows].tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()


def open_shards(spec: str, split: Split, progress: LabelledProgress | None = None) -> ShardSource:
    """The images of a split, in the order of the shards' names and then of their members.

    Raises DataError for shards that are missing, truncated or damaged, for members that are links or whose names lead
    out of the archive, when there is no image, and when a split is only partly labelled.
    """
    where = f"--data {printable(spec)}"
    shards, train_shards = _find_shards(os.path.expanduser(spec.removeprefix("wds:")), split, where)
    index = _index(shards, where, progress)
    labels, classes = None, None
    if index.labels is not None and (split == "train" or train_shards is not None):
        train = _index(train_shards, where, progress).labels if train_shards and split == "val" else None
        classes = (train or index.labels).classes()
        labels = index.labels.encode(classes, where)
    return ShardSource(printable(spec), index, labels, classes)


# --- which shards


def _find_shards(pattern: str, split: Split, where: str) -> tuple[list[str], list[str] | None]:
    """Shards of a split; and those of the training images where the splits are separate."""
    if pattern.startswith("pipe:"):
        raise DataError(f"{where}: shards from a pipe can only be read in sequence; give their URLs")
    if is_remote(pattern) and not has_magic(pattern) and not pattern.endswith(".tar") and "{" not in pattern:
        raise DataError(f"{where}: name the shards, such as {pattern.rstrip('/')}/train-{{000..127}}.tar")
    folder = os.path.isdir(pattern)
    inner = [name for name in ("train", *HELD_OUT) if folder and os.path.isdir(os.path.join(pattern, name))]
    if not inner and "{split}" not in pattern:
        found = _expand(os.path.join(escape(pattern), "*.tar") if folder else pattern, where)
        if not found:
            raise DataError(f"{where}: no shards there (*.tar)" if folder else f"{where}: no file has such a name")
        return found, None

    def of_split(name: str) -> list[str]:
        named = pattern.replace("{split}", name) if not inner else os.path.join(escape(pattern), name, "*.tar")
        return _expand(named, where, split=name)

    train = of_split("train")
    held = (of_split(name) for name in HELD_OUT if split == "val")
    chosen = train if split == "train" else next((found for found in held if found), [])
    if not chosen:
        raise NoSplitError(f"{where}: no shards of {'train' if split == 'train' else 'val, validation or test'}")
    return chosen, train


def _expand(pattern: str, where: str, *, split: str | None = None) -> list[str]:
    """Paths that match a pattern: in the order of its braces, and sorted where it has stars.

    Raises DataError for a path that braces name and that does not exist. A split may have no shard at all, and a
    held-out one, which is smaller, may lack the last ones.
    """
    try:
        paths = list(braceexpand(pattern, escape=False))
    except ValueError:  # unbalanced braces are part of a name
        paths = [pattern]
    literal = [path for path in paths if not has_magic(path)]
    exists = dict(zip(literal, _states(PathList.pack(literal))[:, 0] != MISSING[0], strict=True)) if literal else {}
    found: dict[str, None] = {}
    for path in paths:
        if path in exists:
            named = [path] if exists[path] else []
        else:
            named = expand_stars(path) if is_remote(path) else sorted(glob(path))
        found |= dict.fromkeys(named)
    missing = [path for path in literal if not exists[path]]
    at_the_end = literal[len(literal) - len(missing) :] == missing
    if missing and not (split and not found) and not (split in HELD_OUT and at_the_end):
        raise DataError(f"{where}: no such shard: {printable(missing[0])}")
    return list(found)


# --- where their images are


def _index(shards: list[str], where: str, progress: LabelledProgress | None) -> ShardIndex:
    """The index of all images, from the cache if no shard has changed."""
    key = b"\0".join(os.fsencode(shard if is_remote(shard) else os.path.abspath(shard)) for shard in shards)
    paths = PathList.pack(shards)

    def scan() -> ShardIndex:
        states, scanned_ns = _states(paths), time.time_ns()
        timer = Scan("listing images, shard by shard", progress)
        index = _scan(paths, states, where, timer)
        if timer.is_worth_saving(len(index.members)):
            times = [comparable_time(modified_ns, scanned_ns) for modified_ns in states[:, 1].tolist()]
            _save(key, index, np.stack([states[:, 0], np.array(times, dtype=np.int64)], axis=1))
        return index

    index = load_or_scan("shards", key, lambda: _load(key, paths), scan, progress)
    if not len(index.members):
        raise DataError(f"{where}: no images in these shards (*.{', *.'.join(IMAGES)})")
    return index


def _states(shards: PathList) -> Indices:
    states = file_states(list(shards)) if is_remote(shards[0]) else [_state(shard) for shard in shards]
    return np.array(states, dtype=np.int64)


def _state(shard: str) -> tuple[int, int]:
    try:
        status = os.stat(shard)
    except OSError:
        return MISSING
    return status.st_size, status.st_mtime_ns


def _scan(shards: PathList, states: Indices, where: str, scan: Scan) -> ShardIndex:
    """Read the headers of one shard after the other."""
    shard, offsets, sizes = [], [], []
    members: list[str] = []
    labels: list[str | None] = []
    read = partial(samples_with_images, where=where)
    for number, samples in enumerate(map_concurrently(read, shards) if is_remote(shards[0]) else map(read, shards)):
        for sample in samples:
            image = sample.image
            assert image is not None
            shard.append(number)
            offsets.append(image.offset_data)
            sizes.append(image.size)
            members.append(image.name)
            labels.append(sample.label)
        scan.report(number + 1, len(shards))
    given = [label for label in labels if label is not None]
    if given and len(given) < len(labels):
        first = labels.index(None)
        name = printable(os.path.join(shards[shard[first]], members[first]))
        raise DataError(f"{where}: {name} has no label (.cls, or label in .json), though other images have")
    shard_N, offset_N, size_N = (np.array(values, dtype=np.int64) for values in (shard, offsets, sizes))
    raw = RawLabels.from_strings(given) if given else None
    return ShardIndex(shards, shard_N, offset_N, size_N, PathList.pack(members), raw, states)


# --- the index in the cache


def _save(key: bytes, index: ShardIndex, states: Indices) -> None:
    arrays: Arrays = {
        "states": states,
        "shard": index.shard,
        "offsets": index.offsets,
        "sizes": index.sizes,
        "members": index.members.content,
        "member_ends": index.members.ends,
    }
    if index.labels is not None:
        arrays |= {"codes": index.labels.codes, "names": np.array(index.labels.names, dtype=np.str_)}
    save_index("shards", key, arrays)


def _load(key: bytes, shards: PathList) -> ShardIndex | None:
    """The saved index; None if there is none or a shard has changed since."""
    saved = load_index("shards", key, {"states", "shard", "offsets", "sizes", "members", "member_ends"})
    if saved is None:
        return None
    states = _states(shards)
    if not np.array_equal(saved["states"], states):
        return None
    labels = RawLabels([str(name) for name in saved["names"]], saved["codes"]) if "codes" in saved else None
    members = PathList(saved["members"], saved["member_ends"])
    return ShardIndex(shards, saved["shard"], saved["offsets"], saved["sizes"], members, labels, states)
