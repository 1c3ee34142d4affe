"""Webdataset shards: tar files whose members are samples, `wds:SHARDS`.

SHARDS is a folder with `train/` and `val/` (or `validation/`, `test/`) of `*.tar` files, or a pattern of paths with
`*`, `{000..009}` and `{a,b}`; `{split}` in it stands for train or val (else validation, else test). A folder without
splits and a pattern without `{split}` name the images of training and validation alike; the latter stay unlabelled.

A sample is the run of members that share a name up to the first dot of its last part. Its image is the member that goes
on with .jpg, .jpeg, .png or .webp (the first there is, in this order); its label is the text of `.cls`, a whole number
or a class name, or `label` in `.json`. Samples without an image, such as notes, are no part of the data.

Shards are local files. They are read once from end to end for the place of every image, which is kept in the cache, and
every image is then reached by itself. So shards are as good as single files: shuffled as a whole rather than shard by
shard, every image exactly once per epoch over any number of processes and workers, resumable at any step. A stream,
which can only be read on, gives none of that exactly, and is not supported.
"""

import hashlib
import json
import os
import re
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import escape, glob, has_magic

import numpy as np
from torch import Tensor

from mimref.data.decode import BadImage, Decoded, Reduce, decode_content, one_line, printable
from mimref.data.images import NoSplitError, Split
from mimref.data.kept import SLOW_S, Arrays, Progress, finding_out, keep, recall, settled, told_late
from mimref.data.labels import Written
from mimref.data.paths import PathList
from mimref.data.splits import Indices
from mimref.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp")
HELD_OUT = ("val", "validation", "test")
CACHED_FROM = 10_000
"""Images from which on the places are kept."""

# A sample's name ends at the first dot of the last part; names that begin with a dot are hidden (as webdataset has it).
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


@dataclass(eq=False)
class ShardSource:
    """Images within tar files, decoded when read."""

    name: str
    places: "Places"
    labels: Indices | None
    class_names: list[str] | None
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.places.members)

    def read(self, index: int) -> Tensor:
        """One image, uint8 (3, H, W). Raises BadImage when it cannot be read."""
        return self.read_reduced(index, None).image.contiguous()

    def read_reduced(self, index: int, reduce: Reduce | None) -> Decoded:
        """One image, a JPEG at a fraction of its size where `reduce` allows it. Raises BadImage as `read` does."""
        places = self.places
        offset, size = int(places.offsets[index]), int(places.sizes[index])
        try:
            # Opened anew each time, as files of a folder are: there may be more shards than a process may keep open.
            with open(places.shards[int(places.shard[index])], "rb") as shard:
                shard.seek(offset)
                content = shard.read(size)
        except OSError as error:
            raise BadImage(self.path(index), (error.strerror or one_line(error)).lower()) from error
        if len(content) < size:
            raise BadImage(self.path(index), "its shard has become shorter")
        return decode_content(content, self.path(index), reduce)

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
        for shard in places.shards:
            size, modified_ns = _state(shard)
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

    def take(self, rows: Indices) -> "Places":
        """Those of some images."""
        written = None if self.written is None else self.written.take(rows)
        members = self.members.take(rows)
        return Places(self.shards, self.shard[rows], self.offsets[rows], self.sizes[rows], members, written)


def open_shards(spec: str, split: Split, progress: Progress | None = None) -> ShardSource:
    """The images of a split, in the order of the shards' names and then of their members.

    Raises DataError for shards that are missing, cut off or damaged, for members that are links or whose names lead out
    of the archive, when there is no image, and for labels that some samples lack.
    """
    where = f"--data {printable(spec)}"
    shards, reference = _shards(os.path.expanduser(spec.removeprefix("wds:")), split, where)
    places = _find(shards, where, progress)
    labels, classes = None, None
    if places.written is not None and (split == "train" or reference is not None):
        known = _find(reference, where, progress).written if reference else None
        classes = (known or places.written).classes()
        labels = places.written.numbered(classes, where)
    return ShardSource(printable(spec), places, labels, classes)


# --- which shards


def _shards(pattern: str, split: Split, where: str) -> tuple[list[str], list[str] | None]:
    """Shards of a split; and those of the training images where the splits are apart."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise DataError(f"{where}: shards are local files; download them first")
    folder = os.path.isdir(pattern)
    inner = [name for name in ("train", *HELD_OUT) if folder and os.path.isdir(os.path.join(pattern, name))]
    if not inner and "{split}" not in pattern:
        found = _expand(os.path.join(escape(pattern), "*.tar") if folder else pattern, where)
        if not found:
            raise DataError(f"{where}: no shards there (*.tar)" if folder else f"{where}: no file has such a name")
        return found, None
    of_split = {}
    for name in ("train", *HELD_OUT):
        named = pattern.replace("{split}", name) if not inner else os.path.join(escape(pattern), name, "*.tar")
        of_split[name] = _expand(named, where, missing_ok=True)
    held = next((of_split[name] for name in HELD_OUT if of_split[name]), [])
    chosen = of_split["train"] if split == "train" else held
    if not chosen:
        raise NoSplitError(f"{where}: no shards of {'train' if split == 'train' else 'val, validation or test'}")
    return chosen, of_split["train"]


def _expand(pattern: str, where: str, *, missing_ok: bool = False) -> list[str]:
    """Paths that a pattern stands for: in the order of its braces, and sorted where it has stars.

    Raises DataError when some of the paths that braces name are missing; when all are, unless `missing_ok`.
    """
    found: list[str] = []
    missing: list[str] = []
    for path in _unbrace(pattern):
        if has_magic(path):
            found += sorted(glob(path))
        else:
            (found if os.path.exists(path) else missing).append(path)
    if missing and (found or not missing_ok):
        raise DataError(f"{where}: no such shard: {printable(missing[0])}")
    return list(dict.fromkeys(found))


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


def _find(shards: list[str], where: str, progress: Progress | None) -> Places:
    """Places of all images, from the cache if no shard has changed."""
    of = b"\0".join(os.fsencode(os.path.abspath(shard)) for shard in shards)
    paths = PathList.pack(shards)
    places = _load(of, paths)
    if places is None:
        with finding_out("shards", of, progress):
            # Another process may have found them out meanwhile.
            places = _load(of, paths) or _look_and_keep(of, paths, where, progress)
    if not len(places.members):
        raise DataError(f"{where}: no images in these shards (*.{', *.'.join(IMAGES)})")
    return places


def _look_and_keep(of: bytes, shards: PathList, where: str, progress: Progress | None) -> Places:
    states, looked_ns = _states(shards), time.time_ns()
    started = time.monotonic()
    places = _look(shards, where, told_late("listing images, shard by shard", progress))
    if len(places.members) >= CACHED_FROM or time.monotonic() - started > SLOW_S:
        states[:, 1] = [settled(modified_ns, looked_ns) for modified_ns in states[:, 1].tolist()]
        _save(of, places, states)
    return places


def _states(shards: PathList) -> Indices:
    return np.array([_state(shard) for shard in shards], dtype=np.int64)


def _state(shard: str) -> tuple[int, int]:
    try:
        status = os.stat(shard)
    except OSError:
        return -2, -2
    return status.st_size, status.st_mtime_ns


def _look(shards: PathList, where: str, tell: Callable[[int, int], None]) -> Places:
    """Read the shards' headers, one shard after the other; `tell` how many are done, of how many."""
    shard, offsets, sizes = [], [], []
    members: list[str] = []
    labels: list[str | None] = []
    for number, path in enumerate(shards):
        for sample in _samples(path, where):
            image = next((sample.parts[kind] for kind in IMAGES if kind in sample.parts), None)
            if image is None:
                continue
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
    return Places(shards, shard_N, offset_N, size_N, PathList.pack(members), written)


@dataclass
class _Sample:
    key: str
    parts: dict[str, tarfile.TarInfo]
    """By ending, in lower case."""
    label: str | None = None


def _samples(shard: str, where: str) -> Iterator[_Sample]:
    """The samples of one shard, with their labels."""
    shown = printable(shard)
    try:
        with tarfile.open(shard, "r:") as archive:
            sample = _Sample("", {})
            for member in archive:
                _check(member, shown, where)
                match = _MEMBER.fullmatch(member.name) if member.isfile() else None
                if match is None:
                    continue
                key, ending = match.groups()
                if key != sample.key:
                    yield sample
                    sample = _Sample(key, {})
                if (kind := ending.lower()) in sample.parts:
                    raise DataError(f"{where}: {shown} holds {printable(member.name)} twice")
                sample.parts[kind] = member
                if kind == "cls" or (kind == "json" and sample.label is None):
                    sample.label = _label(archive, member, kind, f"{where}: {shown}/{printable(member.name)}")
            yield sample
            # tarfile takes whatever is no header for the end of the archive.
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end mark after {len(archive.getmembers())} members")
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise DataError(
            f"{where}: {shown} is no whole, uncompressed tar file ({reason}); get it anew, or leave it out"
        ) from error


def _check(member: tarfile.TarInfo, shown: str, where: str) -> None:
    """Refuse what no shard needs, and what a shard from somewhere might be used for."""
    name = printable(member.name)
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise DataError(f"{where}: {shown} is refused: its member {name} leads out of the archive")
    if not (member.isfile() or member.isdir()) or member.issparse():
        what = "a link" if member.issym() or member.islnk() else "no ordinary file"
        raise DataError(f"{where}: {shown} is refused: its member {name} is {what}")


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, kind: str, which: str) -> str | None:
    """The label in a member; None where a .json has none."""
    file = archive.extractfile(member)
    content = b"" if file is None else file.read()
    if len(content) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    try:
        text = content.decode()
        if kind == "cls":
            label: object = text.strip()
        else:
            table = json.loads(text)
            label = table.get("label") if isinstance(table, dict) else None
            if label is None:
                return None
    except ValueError as error:
        raise DataError(f"{which} cannot be read ({one_line(error)})") from error
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise DataError(f"{which}: label {label!r} is neither a whole number nor a class name")
    return str(label)


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
    if not np.array_equal(kept["states"], _states(shards)):
        return None
    written = Written([str(name) for name in kept["names"]], kept["codes"]) if "codes" in kept else None
    members = PathList(kept["members"], kept["member_ends"])
    return Places(shards, kept["shard"], kept["offsets"], kept["sizes"], members, written)
