"""Webdataset shards: tar files whose members are samples, `wds:SHARDS`.

SHARDS is a folder with `train/` and `val/` (or `validation/`, `test/`) of `*.tar` files, or a pattern of paths with
`*`, `{000..009}` and `{a,b}`; `{split}` in it stands for train or val (else validation, else test). A folder without
splits and a pattern without `{split}` name the images of training and validation alike; the latter stay unlabelled.

A sample is the run of members that share a name up to the first dot of its last part. Its image is the member that goes
on with .jpg, .jpeg, .png or .webp (the first there is, in this order); its label is the text of `.cls`, a whole number
or a class name, or `label` in `.json`. Samples without an image, such as notes, are no part of the data.

Shards are local files or, where SHARDS is a pattern of URLs, lie on a server that gives parts of files. They are read
once from end to end for the place of every image, which is kept in the cache, and every image is then reached by
itself. So shards are as good as single files: shuffled as a whole rather than shard by shard, every image exactly once
per epoch over any number of processes and workers, resumable at any step. A stream that can only be read on (`pipe:`)
gives none of that exactly, and is not supported.
"""

import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from glob import escape, glob, has_magic

import numpy as np
from torch import Tensor

from mimref.data.decode import BadImage, Decoded, Reduce, decode_content, one_line, printable
from mimref.data.index.cache import SLOW_S, Arrays, building_index, delayed_progress, keep, recall, settled
from mimref.data.index.paths import PathList
from mimref.data.index.remote import GONE, at_once, expand, is_remote, read_parts, states
from mimref.data.index.tar import IMAGES, Sample, samples_with_images
from mimref.data.labels import Written
from mimref.data.sources import NoSplitError, Split
from mimref.data.splits import Indices
from mimref.errors import DataError
from mimref.progress import LabelledProgress

HELD_OUT = ("val", "validation", "test")
CACHED_FROM = 10_000
"""Images from which on the places are kept."""


@dataclass(eq=False)
class ShardSource:
    """Images within tar files, decoded when read."""

    name: str
    places: "Places"
    labels: Indices | None
    class_names: list[str] | None
    in_memory: bool = False
    _fetched: dict[int, bytes | FileNotFoundError] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.places.members)

    def fetch(self, indices: Sequence[int]) -> None:
        """Ask a server for all of these images at once, to be read next. Raises DataError when it does not answer."""
        places = self.places
        if not is_remote(places.shards[0]):
            return
        urls = [places.shards[int(places.shard[index])] for index in indices]
        starts = [int(places.offsets[index]) for index in indices]
        ends = [start + int(places.sizes[index]) for start, index in zip(starts, indices, strict=True)]
        self._fetched = dict(zip(indices, read_parts(urls, starts, ends), strict=True))

    def read(self, index: int) -> Tensor:
        """One image, uint8 (3, H, W). Raises BadImage when it cannot be read."""
        return self.read_reduced(index, None).image.contiguous()

    def read_reduced(self, index: int, reduce: Reduce | None) -> Decoded:
        """One image, a JPEG at a fraction of its size where `reduce` allows it. Raises BadImage as `read` does."""
        try:
            content = self._content(index)
        except OSError as error:
            raise BadImage(self.path(index), (error.strerror or one_line(error)).lower()) from error
        if len(content) < self.places.sizes[index]:
            raise BadImage(self.path(index), "its shard has become shorter")
        return decode_content(content, self.path(index), reduce)

    def _content(self, index: int) -> bytes:
        """An image as it lies in its shard. Raises OSError."""
        places = self.places
        path = places.shards[int(places.shard[index])]
        if is_remote(path):
            if index not in self._fetched:
                self.fetch([index])
            content = self._fetched.pop(index)
            if isinstance(content, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, "no such file")
            return content
        # Opened anew each time, as files of a folder are: there may be more shards than a process may keep open.
        with open(path, "rb") as shard:
            shard.seek(int(places.offsets[index]))
            return shard.read(int(places.sizes[index]))

    def path(self, index: int) -> str:
        """`SHARD/MEMBER`, with odd characters escaped."""
        shard = self.places.shards[int(self.places.shard[index])]
        return printable(os.path.join(shard, self.places.members[index]))

    def keep(self, rows: Indices) -> None:
        """Forget all but these images."""
        self.places = self.places.take(rows)
        self.labels = None if self.labels is None else self.labels[rows]

    @cached_property
    def fingerprint(self) -> str:
        """Over names, sizes and modification times of the shards, which images of theirs, and labels."""
        places = self.places
        digest = hashlib.sha256()
        for shard, (size, modified_ns) in zip(places.shards, places.states.tolist(), strict=True):
            digest.update(os.fsencode(os.path.basename(shard)) + f"\0{size}\0{modified_ns}\n".encode())
        for array in (places.shard, places.offsets, places.sizes):
            digest.update(array.tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()


@dataclass(eq=False)
class Places:
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
    written: Written | None
    """Labels, as the shards have them."""
    states: Indices
    """(number of shards, 2): size and time of modification when they were opened."""

    def take(self, rows: Indices) -> "Places":
        """Those of some images."""
        written = None if self.written is None else self.written.take(rows)
        members = self.members.take(rows)
        shard, offsets, sizes = self.shard[rows], self.offsets[rows], self.sizes[rows]
        return Places(self.shards, shard, offsets, sizes, members, written, self.states)


def open_shards(spec: str, split: Split, progress: LabelledProgress | None = None) -> ShardSource:
    """The images of a split, in the order of the shards' names and then of their members.

    Raises DataError for shards that are missing, cut off or damaged, for members that are links or whose names lead out
    of the archive, when there is no image, and for labels that some samples lack.
    """
    where = f"--data {printable(spec)}"
    shards, reference = _shards(os.path.expanduser(spec.removeprefix("wds:")), split, where)
    places = _find(shards, where, progress)
    labels, classes = None, None
    if places.written is not None and (split == "train" or reference is not None):
        known = _find(reference, where, progress).written if reference and split == "val" else None
        classes = (known or places.written).classes()
        labels = places.written.numbered(classes, where)
    return ShardSource(printable(spec), places, labels, classes)


# --- which shards


def _shards(pattern: str, split: Split, where: str) -> tuple[list[str], list[str] | None]:
    """Shards of a split; and those of the training images where the splits are apart."""
    if pattern.startswith("pipe:"):
        raise DataError(f"{where}: shards that come through a pipe can only be read on; give their URLs")
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
        return _expand(named, where, of=name)

    train = of_split("train")
    held = (of_split(name) for name in HELD_OUT if split == "val")
    chosen = train if split == "train" else next((found for found in held if found), [])
    if not chosen:
        raise NoSplitError(f"{where}: no shards of {'train' if split == 'train' else 'val, validation or test'}")
    return chosen, train


def _expand(pattern: str, where: str, *, of: str | None = None) -> list[str]:
    """Paths that a pattern stands for: in the order of its braces, and sorted where it has stars.

    Raises DataError for paths that braces name and that are missing. Of a split, `of`, all may be, and of held-out
    images, which are fewer, the last ones.
    """
    named: list[list[str]] = []
    literal = [path for path in _unbrace(pattern) if not has_magic(path)]
    there = dict(zip(literal, _states(PathList.pack(literal))[:, 0] != GONE[0], strict=True)) if literal else {}
    for path in _unbrace(pattern):
        if path in there:
            named.append([path] if there[path] else [])
        else:
            named.append(expand(path) if is_remote(path) else sorted(glob(path)))
    found = list(dict.fromkeys(path for paths in named for path in paths))
    missing = [path for path in literal if not there[path]]
    at_the_end = literal[len(literal) - len(missing) :] == missing
    if missing and not (of and not found) and not (of in HELD_OUT and at_the_end):
        raise DataError(f"{where}: no such shard: {printable(missing[0])}")
    return found


def _unbrace(pattern: str) -> Iterator[str]:
    """`a{01..03}` gives a01, a02, a03; `{a,b}` gives a, b; several braces give every combination, the last fastest."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, names = match.groups()
    if names is not None:
        parts: Sequence[str] = names.split(",")
    else:
        parts = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    for part in parts:
        for rest in _unbrace(pattern[match.end() :]):
            yield pattern[: match.start()] + part + rest


# --- what is in them


def _find(shards: list[str], where: str, progress: LabelledProgress | None) -> Places:
    """Places of all images, from the cache if no shard has changed."""
    of = b"\0".join(os.fsencode(shard if is_remote(shard) else os.path.abspath(shard)) for shard in shards)
    paths = PathList.pack(shards)
    places = _load(of, paths)
    if places is None:
        with building_index("shards", of, progress):
            # Another process may have found them out meanwhile.
            places = _load(of, paths) or _look_and_keep(of, paths, where, progress)
    if not len(places.members):
        raise DataError(f"{where}: no images in these shards (*.{', *.'.join(IMAGES)})")
    return places


def _look_and_keep(of: bytes, shards: PathList, where: str, progress: LabelledProgress | None) -> Places:
    found, looked_ns = _states(shards), time.time_ns()
    started = time.monotonic()
    places = _look(shards, found, where, delayed_progress("listing images, shard by shard", progress))
    if len(places.members) >= CACHED_FROM or time.monotonic() - started > SLOW_S:
        times = [settled(modified_ns, looked_ns) for modified_ns in found[:, 1].tolist()]
        _save(of, places, np.stack([found[:, 0], np.array(times, dtype=np.int64)], axis=1))
    return places


def _states(shards: PathList) -> Indices:
    remote = is_remote(shards[0])
    return np.array(states(list(shards)) if remote else [_state(shard) for shard in shards], dtype=np.int64)


def _state(shard: str) -> tuple[int, int]:
    try:
        status = os.stat(shard)
    except OSError:
        return GONE
    return status.st_size, status.st_mtime_ns


def _look(shards: PathList, found: Indices, where: str, tell: Callable[[int, int], None]) -> Places:
    """Read the shards' headers, one shard after the other; `tell` how many are done, of how many."""
    shard, offsets, sizes = [], [], []
    members: list[str] = []
    labels: list[str | None] = []
    look: Callable[[str], list[Sample]] = partial(samples_with_images, where=where)
    for number, samples in enumerate(at_once(look, shards) if is_remote(shards[0]) else map(look, shards)):
        for sample in samples:
            image = sample.image
            assert image is not None
            shard.append(number)
            offsets.append(image.offset_data)
            sizes.append(image.size)
            members.append(image.name)
            labels.append(sample.label)
        tell(number + 1, len(shards))
    written = None
    if any(label is not None for label in labels):
        given = [label for label in labels if label is not None]
        if len(given) < len(labels):
            first = labels.index(None)
            name = printable(os.path.join(shards[shard[first]], members[first]))
            raise DataError(f"{where}: {name} has no label (.cls, or label in .json), though other images have")
        written = Written.of(given)
    shard_N, offset_N, size_N = (np.array(values, dtype=np.int64) for values in (shard, offsets, sizes))
    return Places(shards, shard_N, offset_N, size_N, PathList.pack(members), written, found)


# --- the places in the cache


def _save(of: bytes, places: Places, states: Indices) -> None:
    arrays: Arrays = {
        "states": states,
        "shard": places.shard,
        "offsets": places.offsets,
        "sizes": places.sizes,
        "members": places.members.content,
        "member_ends": places.members.ends,
    }
    if places.written is not None:
        arrays |= {"codes": places.written.codes, "names": np.array(places.written.names, dtype=np.str_)}
    keep("shards", of, arrays)


def _load(of: bytes, shards: PathList) -> Places | None:
    """The places that were kept; None if there are none or a shard has changed since."""
    kept = recall("shards", of)
    if kept is None or not kept.keys() >= {"states", "shard", "offsets", "sizes", "members", "member_ends"}:
        return None
    found = _states(shards)
    if not np.array_equal(kept["states"], found):
        return None
    written = Written([str(name) for name in kept["names"]], kept["codes"]) if "codes" in kept else None
    members = PathList(kept["members"], kept["member_ends"])
    return Places(shards, kept["shard"], kept["offsets"], kept["sizes"], members, written, found)
