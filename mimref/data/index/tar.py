"""The images of one webdataset shard, a tar file, read from its headers."""

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import IO, NamedTuple

from mimref.data.decode import printable, reason_of
from mimref.data.index.remote import is_remote, open_sequential
from mimref.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp")
# As in webdataset, a sample's name ends at the first dot of its last part, and a leading dot hides a member.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


class Sample(NamedTuple):
    """An image in a shard."""

    member: str
    offset: int
    """Byte of the shard at which the image begins."""
    size: int
    """Bytes."""
    label: str | None


def list_samples(shard: str) -> list[Sample]:
    """The samples of one shard that have an image.

    Raises DataError for a shard that is truncated, damaged or not a tar file, and for members that are links or whose
    names point outside it; UnreachableError for a server that does not answer.
    """
    shown = printable(shard)
    try:
        with open_sequential(shard) if is_remote(shard) else open(shard, "rb") as file:
            return list(_samples(file, shown))
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(
            f"{shown} is not an intact, uncompressed tar file ({reason_of(error)}); get it again, or leave it out"
        ) from error


def _samples(file: IO[bytes], shard: str) -> Iterator[Sample]:
    """The samples of an open shard: runs of members that share a name."""
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for _, run in groupby(_members(archive, shard), key=lambda found: found[0]):
            parts: dict[str, tarfile.TarInfo] = {}
            label = None
            for _, kind, member in run:
                shown = printable(member.name)
                if kind in parts:
                    raise DataError(f"{shard} holds {shown} twice")
                parts[kind] = member
                if kind == "cls" or (kind == "json" and label is None):
                    label = _label(archive, member, kind, f"{shard}/{shown}")
            if image := next((parts[kind] for kind in IMAGES if kind in parts), None):
                yield Sample(image.name, image.offset_data, image.size, label)
        # tarfile takes anything but a header for the end of the archive.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end mark after {len(archive.getmembers())} members")
        # An archive is padded with zeros to full records.
        if any(file.read(2 * tarfile.RECORDSIZE)):
            raise tarfile.ReadError(f"data after its end mark, which follows {len(archive.getmembers())} members")


def _members(archive: tarfile.TarFile, shard: str) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Sample, suffix in lower case, and header of every file that belongs to a sample.

    Refuses members that a data set does not need, and that an attack would use.
    """
    for member in archive:
        name = printable(member.name)
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise DataError(f"{shard} is refused: its member {name} points outside the archive")
        if not (member.isfile() or member.isdir()) or member.issparse():
            what = "a link" if member.issym() or member.islnk() else "not a regular file"
            raise DataError(f"{shard} is refused: its member {name} is {what}")
        if member.isfile() and (match := _MEMBER.fullmatch(member.name)):
            yield match[1], match[2].lower(), member


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, kind: str, which: str) -> str | None:
    """The label in a member; None where a .json has none."""
    file = archive.extractfile(member)
    content = b"" if file is None else file.read()
    if len(content) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    try:
        label: object = content.decode().strip()
        if kind == "json":
            table = json.loads(content)
            label = table.get("label") if isinstance(table, dict) else None
            if label is None:
                return None
    except ValueError as error:
        raise DataError(f"{which} cannot be read ({reason_of(error)})") from error
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise DataError(f"{which}: label {label!r} is neither a whole number nor a class name")
    return str(label)
