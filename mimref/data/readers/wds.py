"""Webdataset shards, `wds:SHARDS` (see docs/data.md): tar files whose members are samples.

A sample consists of the members of a shard that share a name up to the first dot of its last part; samples without an
image are not used. Folders and patterns without splits serve both training and validation, which is then unlabelled.

Each shard is read once from start to end to index its images. Every image can then be read by itself, so shards behave
like single files: images are shuffled across all shards, read exactly once per epoch, and training is resumable at any
step. Streams (`pipe:`) allow none of that exactly, and are not supported.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from glob import escape, glob, has_magic

import numpy as np
from braceexpand import braceexpand

from mimref.config.base import DataConfig
from mimref.data.decode import BadImage, Decoded, Reduce, decode_content, first_of, printable, reason_of
from mimref.data.index import remote
from mimref.data.index.cache import Arrays, comparable_times, load_or_scan
from mimref.data.index.tar import Choice, Sample, Shard, list_samples
from mimref.data.labels import Indices, RawLabels
from mimref.data.sources import EncodedSource, NoSplitError, PathList, Split
from mimref.data.suffixes import count_kinds, image_suffixes, unused_files, unused_kind
from mimref.errors import DataError, did_you_mean
from mimref.progress import LabelledProgress, Progress

HELD_OUT = ("val", "validation", "test")
_NO_IMAGES = "no images in these shards (*.jpg, *.png and others that Pillow reads)"
_FORMAT = 2
"""Version of the cached index: 2 joins a sample's separated members, and accepts all formats that Pillow reads."""


@dataclass(eq=False)
class ShardIndex:
    """The position of every image in its shard."""

    shards: PathList
    shard: Indices
    """(N,) index into `shards`."""
    offsets: Indices
    """(N,) byte of the shard at which the image begins."""
    sizes: Indices
    """(N,) size in bytes."""
    members: PathList
    """(N,) name in the shard."""
    labels: RawLabels | None
    """Labels as stored in the shards."""
    states: Indices
    """(number of shards, 2): their `remote.file_state` when they were opened."""
    unused: dict[str, int]
    """Number of unused members by kind that could be images, and of labels without an image."""
    kinds: list[str]
    """Most frequent kinds of the samples' other members."""

    def __len__(self) -> int:
        return len(self.members)


@dataclass(eq=False)
class ShardSource(EncodedSource):
    """Images within tar files, decoded when read."""

    index: ShardIndex
    _fetched: dict[int, bytes | FileNotFoundError] = field(default_factory=dict)

    def fetch(self, indices: Sequence[int]) -> None:
        """See `ImageSource`."""
        if len(indices) and remote.is_remote(self.index.shards[0]):
            threads = min(remote.PART_THREADS, len(indices))
            parts = remote.map_concurrently(remote.read_part, map(self._place, indices), threads=threads)
            self._fetched = dict(zip(indices, parts, strict=True))

    def read_reduced(self, index: int, reduce: Reduce | None) -> Decoded:
        """See `ImageSource`."""
        return decode_content(*self.encoded(index), reduce, self.decoding)

    def encoded(self, index: int) -> tuple[bytes, str]:
        """See `ImageSource`."""
        shard, start, size = self._place(index)
        try:
            if remote.is_remote(shard):
                if index not in self._fetched:
                    self.fetch([index])
                if isinstance(content := self._fetched.pop(index), FileNotFoundError):
                    raise content
            else:
                # The shard is opened for every image: there may be more shards than a process may keep open.
                with open(shard, "rb") as file:
                    file.seek(start)
                    content = file.read(size)
        except OSError as error:
            raise BadImage(self.path(index), reason_of(error).lower()) from error
        if len(content) < size:
            raise BadImage(self.path(index), "its shard is shorter than when it was listed")
        return content, self.path(index)

    def _place(self, index: int) -> tuple[str, int, int]:
        """Return the shard of an image, its first byte in the shard, and its number of bytes."""
        row = self.rows[index]
        return self.index.shards[self.index.shard[row]], int(self.index.offsets[row]), int(self.index.sizes[row])

    def path(self, index: int) -> str:
        """Return `SHARD/MEMBER`, with unprintable characters escaped."""
        return printable(os.path.join(self._place(index)[0], self.index.members[self.rows[index]]))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the shards' names, sizes and modification times, the images' positions, and labels."""
        digest = hashlib.sha256()
        for shard, (size, modified_ns) in zip(self.index.shards, self.index.states.tolist(), strict=True):
            digest.update(os.fsencode(os.path.basename(shard)) + f"\0{size}\0{modified_ns}\n".encode())
        for array in (self.index.shard, self.index.offsets, self.index.sizes):
            digest.update(array[self.rows].tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()


def open_shards(data: DataConfig, split: Split, progress: LabelledProgress | None = None) -> ShardSource:
    """Open the images of a split, in the order of the shards and then of their members.

    Raises DataError for shards that are missing, truncated or damaged, for members that are links or whose names point
    outside the archive, if there is no image, and if a split is only partly labelled.
    """
    spec, choice = data.spec or "", Choice(data.image, data.label)
    pattern = os.path.expanduser(spec.removeprefix("wds:"))
    shards, train_shards = _find_shards(pattern, split)
    as_arrays = data.channels is not None
    index = _index(shards, choice, progress, as_arrays)
    train = index.labels
    if split == "val" and train_shards and (train is not None or choice.label is not None):
        train = _index(train_shards, choice, progress, as_arrays).labels
    if choice.label is not None and index.labels is None and train is None:
        others = [kind for kind in index.kinds if kind != choice.label.lower()]
        raise DataError(
            f"no image has a label in a member .{printable(choice.label)}, which data.label names"
            f"{did_you_mean(choice.label, others)} (other members: {first_of(others, 5) or 'none'})"
        )
    labels, classes = None, None
    if index.labels is not None and (split == "train" or train_shards is not None):
        classes = (train or index.labels).classes()
        labels = index.labels.encode(classes)
    source = ShardSource(printable(spec), np.arange(len(index)), labels, classes, index)
    source.notices = unused_files(_shown(shards), index.unused) + _not_shards(pattern, split)
    if index.labels is None and (kinds := [kind for kind in index.kinds if kind != "json"]):
        source.how_to_label = (
            "no .cls, and no usable label in .json; name their member with --set data.label=MEMBER "
            f"({first_of(kinds, 5)})"
        )
    return source


def _shown(shards: list[str]) -> str:
    return printable(shards[0]) + (f" and {len(shards) - 1} other shards" if len(shards) > 1 else "")


def _not_shards(folder: str, split: Split) -> list[str]:
    """Return notices of files beside the shards in a folder that could be images, and of unused shards."""
    if not os.path.isdir(folder):
        return []
    splits = [name for name in ("train", *HELD_OUT) if os.path.isdir(os.path.join(folder, name))]
    here = folder
    if splits:
        here = os.path.join(folder, next(name for name in splits if (name == "train") == (split == "train")))
    with os.scandir(here) as entries:
        files = [entry.name for entry in entries if entry.is_file() and not entry.name.endswith(".tar")]
    notices = unused_files(printable(here), Counter(kind for name in files if (kind := unused_kind(name))))
    others = sorted({os.path.dirname(path) for path in glob("*/*.tar", root_dir=folder)} - set(splits))
    if splits:
        others += sorted(glob("*.tar", root_dir=folder))
    if others:
        notices.append(f"{printable(folder)}: shards that are not used: {first_of(others)}")
    return notices


# --- which shards


def _find_shards(pattern: str, split: Split) -> tuple[list[str], list[str] | None]:
    """Return the shards of a split, and those of the training images if the splits are separate."""
    if pattern.startswith("pipe:"):
        raise DataError("shards from a pipe can only be read in sequence; give their URLs")
    if remote.is_remote(pattern) and not has_magic(pattern) and not pattern.endswith(".tar") and "{" not in pattern:
        raise DataError(f"name the shards, such as {pattern.rstrip('/')}/train-{{000..127}}.tar")
    if folder := os.path.isdir(pattern):
        splits = any(os.path.isdir(os.path.join(pattern, name)) for name in ("train", *HELD_OUT))
        pattern = os.path.join(escape(pattern), "{split}" if splits else "", "*.tar")
    if "{split}" not in pattern:
        found = _expand(pattern)
        if not found:
            raise DataError("no shards (*.tar) in this folder" if folder else "no file matches this pattern")
        return found, None
    train = _expand(pattern, split="train")
    held = (_expand(pattern, split=name) for name in HELD_OUT)
    chosen = train if split == "train" else next(filter(None, held), [])
    if not chosen:
        raise NoSplitError(f"no shards of {'train' if split == 'train' else 'val, validation or test'}")
    return chosen, train


def _expand(pattern: str, *, split: str = "") -> list[str]:
    """Return the paths of a split that match a pattern: in the order of its braces, and sorted where it has stars.

    Raises DataError for a path that the braces name but that does not exist. A split may have no shard at all, and a
    held-out split, which is smaller, may lack the last ones.
    """
    pattern = pattern.replace("{split}", split)
    try:
        paths = list(braceexpand(pattern, escape=False))
    except ValueError:  # unbalanced braces are part of a name
        paths = [pattern]
    literal = [path for path in paths if not has_magic(path)]
    exists = dict(zip(literal, _states(literal)[:, 0] != remote.MISSING[0], strict=True))
    found: dict[str, None] = {}
    for path in paths:
        if path not in exists:
            found |= dict.fromkeys(remote.expand_stars(path) if remote.is_remote(path) else sorted(glob(path)))
        elif exists[path]:
            found[path] = None
    missing = [path for path in literal if not exists[path]]
    at_the_end = literal[len(literal) - len(missing) :] == missing
    if missing and not (split and not found) and not (split in HELD_OUT and at_the_end):
        raise DataError(f"no such shard: {printable(missing[0])}")
    return list(found)


# --- where their images are


def _index(shards: list[str], choice: Choice, progress: LabelledProgress | None, as_arrays: bool) -> ShardIndex:
    """Return the index of all images, from the cache if no shard has changed."""
    key = b"\0".join(os.fsencode(shard if remote.is_remote(shard) else os.path.abspath(shard)) for shard in shards)
    key += repr((_FORMAT, choice, sorted(image_suffixes(arrays=as_arrays)))).encode()
    paths = PathList.pack(shards)

    def unpack(saved: Arrays) -> ShardIndex | None:
        """Return the saved index; None if a shard has changed."""
        states = _states(shards)
        if not np.array_equal(saved["states"], states):
            return None
        labels = RawLabels([str(name) for name in saved["names"]], saved["codes"]) if "codes" in saved else None
        members = PathList(saved["members"], saved["member_ends"])
        unused = dict(zip(saved["unused"].tolist(), saved["unused_counts"].tolist(), strict=True))
        places = saved["shard"], saved["offsets"], saved["sizes"]
        return ShardIndex(paths, *places, members, labels, states, unused, saved["kinds"].tolist())

    def scan(report: Progress) -> tuple[ShardIndex, Arrays]:
        """Return a new index, and the arrays to save."""
        states, scanned_ns = _states(shards), time.time_ns()
        index = _scan(paths, states, choice, partial(list_samples, choice, arrays=as_arrays), report)
        arrays: Arrays = {
            "states": np.stack([states[:, 0], comparable_times(states[:, 1], scanned_ns)], axis=1),
            "shard": index.shard,
            "offsets": index.offsets,
            "sizes": index.sizes,
            "members": index.members.content,
            "member_ends": index.members.ends,
            "unused": np.array(list(index.unused), dtype=np.str_),
            "unused_counts": np.array(list(index.unused.values()), dtype=np.int64),
            "kinds": np.array(index.kinds, dtype=np.str_),
        }
        if index.labels is not None:
            arrays |= {"codes": index.labels.codes, "names": np.array(index.labels.names, dtype=np.str_)}
        return index, arrays

    index = load_or_scan("shards", key, progress, unpack=unpack, scan=scan)
    if not len(index):
        what = f"no .{choice.image} in these shards, which data.image names" if choice.image else _NO_IMAGES
        unused = f"; they hold {count_kinds(index.unused)}" if index.unused else ""
        raise DataError(f"{what}{unused}")
    return index


def _states(shards: Sequence[str]) -> Indices:
    """Return the `remote.file_state` of each shard, (number of shards, 2)."""
    states = list(remote.map_concurrently(remote.file_state, shards))
    return np.array(states, dtype=np.int64).reshape(-1, 2)


def _scan(
    shards: PathList, states: Indices, choice: Choice, read: Callable[[str], Shard], report: Progress
) -> ShardIndex:
    """Build the index of all shards, whose headers `read` lists."""
    shard: list[int] = []
    found: list[Sample] = []
    unused, kinds = Counter[str](), Counter[str]()
    for number, each in enumerate(remote.map_concurrently(read, shards)):
        shard += [number] * len(each.samples)
        found += each.samples
        unused += each.unused
        kinds += each.kinds
        report(number + 1, len(shards))
    labels = [sample.label for sample in found if sample.label is not None]
    if labels and len(labels) < len(found):
        first = next(number for number, sample in enumerate(found) if sample.label is None)
        name = printable(os.path.join(shards[shard[first]], found[first].member))
        what = f"no .{choice.label}" if choice.label else "no label (.cls, or label in .json)"
        raise DataError(f"{name} has {what}, although other images have")
    return ShardIndex(
        shards,
        np.array(shard, dtype=np.int64),
        np.array([sample.offset for sample in found], dtype=np.int64),
        np.array([sample.size for sample in found], dtype=np.int64),
        PathList.pack(sample.member for sample in found),
        RawLabels.from_strings(labels) if labels else None,
        states,
        dict(+unused),
        [kind for kind, _ in kinds.most_common(10)],
    )
