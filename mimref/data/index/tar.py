"""The samples of one webdataset shard, a tar file, read from its headers."""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from mimref.data.decode import printable, reason_of
from mimref.data.index.remote import is_remote, no_parts, open_sequential, unreachable
from mimref.errors import DataError, UserError

IMAGES = ("jpg", "jpeg", "png", "webp")
# As in webdataset, a sample's name ends at the first dot of its last part, and a leading dot hides a member.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)


@dataclass
class Sample:
    """A run of members that share a name."""

    key: str
    parts: dict[str, tarfile.TarInfo]
    """By suffix, in lower case."""
    label: str | None = None

    @property
    def image(self) -> tarfile.TarInfo | None:
        """The member with its image; None for samples without one."""
        return next((self.parts[kind] for kind in IMAGES if kind in self.parts), None)


def samples_with_images(shard: str, where: str) -> list[Sample]:
    """The samples of one shard that have an image. `where` begins messages.

    Raises DataError for a shard that is truncated, damaged or not a tar file, and for members that are links or whose
    names lead out of it; UnreachableError for a server that does not answer.
    """
    try:
        return [sample for sample in _samples(shard, where) if sample.image is not None]
    except UserError:
        raise
    except Exception as error:
        # A remote file system's client raises anything; with a local file, other errors are bugs of our own.
        if is_remote(shard) and not isinstance(error, tarfile.TarError | EOFError):
            raise no_parts(shard) if isinstance(error, ValueError) else unreachable(shard, error) from error
        if not isinstance(error, OSError | tarfile.TarError | EOFError | ValueError):
            raise
        raise DataError(
            f"{where}: {printable(shard)} is not an intact, uncompressed tar file ({reason_of(error)}); "
            "get it again, or leave it out"
        ) from error


def _samples(shard: str, where: str) -> Iterator[Sample]:
    """The samples of one shard, with their labels."""
    shown = printable(shard)
    with (
        open_sequential(shard) if is_remote(shard) else open(shard, "rb") as file,
        tarfile.open(fileobj=file, mode="r:") as archive,
    ):
        sample = Sample("", {})
        for member in archive:
            _check(member, shown, where)
            match = _MEMBER.fullmatch(member.name) if member.isfile() else None
            if match is None:
                continue
            key, suffix = match.groups()
            if key != sample.key:
                yield sample
                sample = Sample(key, {})
            if (kind := suffix.lower()) in sample.parts:
                raise DataError(f"{where}: {shown} holds {printable(member.name)} twice")
            sample.parts[kind] = member
            if kind == "cls" or (kind == "json" and sample.label is None):
                sample.label = _label(archive, member, kind, f"{where}: {shown}/{printable(member.name)}")
        yield sample
        # tarfile takes anything but a header for the end of the archive.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end mark after {len(archive.getmembers())} members")
        # An archive is padded with zeros to full records.
        if any(file.read(2 * tarfile.RECORDSIZE)):
            raise tarfile.ReadError(f"something follows its end mark after {len(archive.getmembers())} members")


def _check(member: tarfile.TarInfo, shown: str, where: str) -> None:
    """Refuse members that a data set does not need, and that an attack would use."""
    name = printable(member.name)
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise DataError(f"{where}: {shown} is refused: its member {name} leads out of the archive")
    if not (member.isfile() or member.isdir()) or member.issparse():
        what = "a link" if member.issym() or member.islnk() else "not a regular file"
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
        raise DataError(f"{which} cannot be read ({reason_of(error)})") from error
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise DataError(f"{which}: label {label!r} is neither a whole number nor a class name")
    return str(label)
