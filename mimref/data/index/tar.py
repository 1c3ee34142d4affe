"""Lists of the images in one webdataset shard, a tar file, read from its headers."""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from mimref.data.decode import printable, reason_of
from mimref.data.index.remote import is_remote, open_sequential
from mimref.data.labels import UnusableLabelsError
from mimref.data.suffixes import is_image, unused_kind
from mimref.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp")
"""Kinds of members that are preferred to other images of a sample, in this order."""
# As in webdataset, a sample's name ends at the first dot of its last part, and a leading dot hides a member.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
# Kinds of members that describe an image and are not images.
_DESCRIBING = "caption class cls height id idx index key label text transcript url width"
_WORDS = frozenset(_DESCRIBING.split())


class Choice(NamedTuple):
    """The members of a sample that the user names. None: those with the usual names."""

    image: str | None = None
    label: str | None = None


class Sample(NamedTuple):
    """An image in a shard."""

    member: str
    offset: int
    """Byte of the shard at which the image begins."""
    size: int
    """Number of bytes."""
    label: str | None


@dataclass
class Shard:
    """Contents of one shard."""

    samples: list[Sample] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)
    """Number of unused members by kind: those that could be images, and labels without an image or of a wrong type."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Number of other members of the samples by kind, which could be labels."""


def list_samples(choice: Choice, shard: str, *, arrays: bool = False) -> Shard:
    """List the samples of one shard that have an image, in the order of their first members.

    arrays: `.npy` and `.npz` members are images too.

    Raises DataError for a shard that is truncated, damaged or not a tar file, for members that are links, occur
    twice or have names that point outside it, and for samples with several images; UnreachableError for a server that
    does not answer.
    """
    shown = printable(shard)
    try:
        with open_sequential(shard) if is_remote(shard) else open(shard, "rb") as file:
            return _read(file, shown, choice, arrays)
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(
            f"{shown} is not an intact, uncompressed tar file ({reason_of(error)}); get it again, or leave it out"
        ) from error


def _read(file: IO[bytes], shard: str, choice: Choice, arrays: bool) -> Shard:
    """List the contents of an open shard. The members of a sample share a name, wherever in the shard they are."""
    parts: dict[str, dict[str, tarfile.TarInfo]] = {}
    labels: dict[str, dict[str, str | DataError]] = {}
    found = Shard()
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for name, kind, member in _members(archive, shard, found.unused):
            shown = printable(member.name)
            if kind in parts.setdefault(name, {}):
                raise DataError(f"{shard} holds {shown} twice; every sample needs a name of its own")
            parts[name][kind] = member
            # A label is read while its bytes pass by.
            is_label = kind in ("cls", "json") if choice.label is None else kind == choice.label.lower()
            if is_label and "cls" not in labels.get(name, {}):
                try:
                    label: str | DataError | None = _label(archive, member, kind, f"{shard}/{shown}")
                except DataError as error:
                    label = error
                if label is not None:
                    labels.setdefault(name, {})[kind] = label
        # tarfile treats anything but a header as the end of the archive.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end mark after {len(archive.getmembers())} members")
        # An archive is padded with zeros to full records.
        if any(file.read(2 * tarfile.RECORDSIZE)):
            raise tarfile.ReadError(f"data after its end mark, which follows {len(archive.getmembers())} members")
    for name, members in parts.items():
        of_sample = labels.get(name, {})
        image = _image(members, choice, f"{shard}/{printable(name)}", arrays)
        if image is None:
            found.unused["label without an image"] += bool(of_sample)
        else:
            of_image = of_sample.get("cls", next(iter(of_sample.values()), None))
            if isinstance(of_image, UnusableLabelsError) and choice.label is None:
                found.unused["label of a wrong type"] += 1
                of_image = None
            elif isinstance(of_image, DataError):
                raise of_image
            chosen = members[image]
            found.samples.append(Sample(chosen.name, chosen.offset_data, chosen.size, of_image))
            found.kinds.update(kind for kind in members if kind != image)
        for kind in members:
            if kind not in (image, (choice.label or "").lower()) and (other := _unused(kind, arrays)):
                found.unused[other] += 1
    return found


def _image(members: dict[str, tarfile.TarInfo], choice: Choice, sample: str, arrays: bool) -> str | None:
    """Return the kind of a sample's member that is its image; None if there is none. Raises DataError if ambiguous."""
    if choice.image is not None:
        wanted = choice.image.lower()
        return wanted if wanted in members else None
    known = (kind for kind in IMAGES if kind in members)
    images = [kind for kind in members if is_image(f"x.{kind}", arrays=arrays)]
    plain = [kind for kind in images if "." not in kind]
    if (first := next(known, None)) is not None:
        return first
    candidates = plain or images
    if len(candidates) > 1:
        named = ", ".join(map(printable, candidates))
        raise DataError(
            f"{sample} has several images (names of samples end at their first dot): {named}; choose with "
            f"--set data.image={printable(candidates[0])}"
        )
    return candidates[0] if candidates else None


def _unused(kind: str, arrays: bool) -> str | None:
    """Return the kind of an unused member, for a notice; None for one that is surely not an image."""
    last = kind.rpartition(".")[2]
    return f".{kind}" if is_image(f"x.{kind}", arrays=arrays) else None if last in _WORDS else unused_kind(f"x.{last}")


def _members(archive: tarfile.TarFile, shard: str, unused: Counter[str]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield sample, lower-case suffix and header of every file that belongs to a sample; count others as unused.

    Raises DataError for members that a data set does not need but an attack would use.
    """
    for member in archive:
        name = printable(member.name)
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise DataError(f"{shard} is refused: its member {name} points outside the archive")
        if not (member.isfile() or member.isdir()) or member.issparse():
            what = "a link" if member.issym() or member.islnk() else "not a regular file"
            raise DataError(f"{shard} is refused: its member {name} is {what}")
        if not member.isfile():
            continue
        if match := _MEMBER.fullmatch(member.name):
            yield match[1], match[2].lower(), member
        elif kind := unused_kind(member.name):
            unused[kind] += 1


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, kind: str, which: str) -> str | None:
    """Return the label in a member; None for a .json without one."""
    file = archive.extractfile(member)
    content = b"" if file is None else file.read()
    if len(content) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    try:
        label: object = content.decode().strip()
        if kind.rpartition(".")[2] == "json":
            table = json.loads(content)
            label = table.get("label") if isinstance(table, dict) else None
            if label is None:
                return None
    except ValueError as error:
        raise DataError(f"{which} cannot be read ({reason_of(error)})") from error
    wrong = f"{which}: label {label!r} is neither a whole number nor a class name"
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise UnusableLabelsError(wrong)
    if label == "":
        raise DataError(wrong)
    return str(label)
