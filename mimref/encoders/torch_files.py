"""Plain tensors from files of `torch.save`, in the current format and the one before torch 1.6, and `torch.jit.save`.

This module reads them instead of `torch.load`, which either runs what a file asks for or refuses the whole file, and
which passes TorchScript on to a separate loader.

A file is a zip archive with the pickle `data.pkl` and one member per storage or, before torch 1.6, several pickles
followed by the storages, one after the other. A TorchScript archive also holds its code as text.
"""

import io
import mmap
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import torch

from mimref.encoders.contents import Content, find_tensors
from mimref.encoders.pickles import unpickle
from mimref.encoders.values import LoadStorage, Unreadable, Values

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_MOST_DIRECTORY, _MOST_ARGUMENT, _MOST_TEXT = 2**24, 2**30, 2**26
_FREE_BYTES = 2**28


def read_torch_file(file: Path) -> tuple[Content, list[str]]:
    """Return the tensors by name, mapped into memory where the format allows it, and the names of what was left out.

    These are names of classes and functions of which no tensors were read. Raises Unreadable with the reason, OSError,
    and whatever Python's decoders raise for damaged numbers and strings.
    """
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        if memory[:2] == b"PK":
            archive = _Archive(file, memory)
            return find_tensors(archive.load(), archive.module_tensors())
        return find_tensors(_read_old(memory, stream), {})


def _values(load_storage: LoadStorage, size: int) -> Values:
    # Tied weights, views and expanded tensors count the same bytes several times.
    return Values(load_storage, 8 * size + _FREE_BYTES)


class _Window(io.RawIOBase):
    """A part of the file as a stream; reading more than `most` bytes at once raises Unreadable."""

    def __init__(self, memory: mmap.mmap, start: int, end: int, most: int) -> None:
        super().__init__()
        self._memory, self._start, self._end, self._most = memory, start, end, most
        self._position = start

    def read(self, size: int = -1) -> bytes:
        end = self._end if size < 0 else min(self._end, self._position + size)
        if end - self._position > self._most:
            raise Unreadable(f"a part that is not a tensor takes more than {self._most:,} bytes")
        part = self._memory[self._position : end] if end > self._position else b""
        self._position += len(part)
        return part

    def readline(self, size: int | None = -1) -> bytes:
        found = self._memory.find(b"\n", self._position, min(self._end, self._position + self._most))
        return self.read((found + 1 if found >= 0 else self._end) - self._position)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: self._start, io.SEEK_CUR: self._position, io.SEEK_END: self._end}[whence]
        if base + offset < self._start:
            raise OSError("position before the start")
        self._position = base + offset
        return self.tell()

    def tell(self) -> int:
        return self._position - self._start

    def seekable(self) -> bool:
        return True


# --- zip


class _Archive:
    """A zip archive with uncompressed members, so that tensors are parts of the mapped file."""

    def __init__(self, file: Path, memory: mmap.mmap) -> None:
        self._memory, self._storages = memory, dict[str, torch.UntypedStorage]()
        # Members may overlap, so a small file could ask for many large copies.
        self._copies_left, self._text_left = len(memory), _MOST_TEXT
        # In memory, a zip file's directory takes 20 times its size.
        with ZipFile(_Window(memory, 0, len(memory), _MOST_DIRECTORY)) as archive:
            members = archive.infolist()
        folder = members[0].filename.partition("/")[0] if members else ""
        self._members = {member.filename.removeprefix(f"{folder}/"): member for member in members}
        if "data.pkl" not in self._members:
            raise Unreadable("a zip archive without data.pkl")
        self._all = torch.UntypedStorage.from_file(str(file), False, len(memory))
        self._swapped = self._text("byteorder", b"little").decode("ascii") != sys.byteorder

    def load(self) -> Any:
        """Return the value of data.pkl."""
        start, end = self._find("data.pkl")
        window = _Window(self._memory, start, end, _MOST_ARGUMENT)
        return unpickle(window, _values(self._storage, len(self._memory)))

    def module_tensors(self) -> dict[str, frozenset[str]]:
        """Map the name of each TorchScript class, as in pickles, to the names of its parameters and buffers."""
        found: dict[str, frozenset[str]] = {}
        for path in self._members:
            if not path.startswith("code/") or not path.endswith(".py"):
                continue
            module = path.removeprefix("code/").removesuffix(".py").replace("/", ".")
            for name, *names in _MODULES.findall(self._text(path).decode("utf-8", "replace")):
                found[f"{module} {name}"] = frozenset(re.findall(r'"([^"]*)"', "".join(names)))
        return found

    def _storage(self, key: str, count: int, dtype: torch.dtype) -> torch.UntypedStorage:
        start, end = self._find(f"data/{key}")
        size = count * dtype.itemsize
        if size > end - start:
            raise Unreadable("its pickle refers to a storage larger than the one saved")
        if key not in self._storages:
            storage = self._all[start:end]
            if start % 8 or self._swapped:
                self._copies_left -= end - start
                if self._copies_left < 0:
                    raise Unreadable("its storages overlap")
            if start % 8:
                storage = storage.clone()  # saved by another program; torch aligns all storages
            if self._swapped:
                storage.byteswap(dtype)
            self._storages[key] = storage
        return self._storages[key]

    def _find(self, name: str) -> tuple[int, int]:
        """Return the start and the end of a member's bytes."""
        member = self._members.get(name)
        if member is None:
            raise Unreadable(f"its zip archive lacks {name[:80]!r}")
        if member.compress_type != ZIP_STORED or member.flag_bits & 1:
            raise Unreadable("its zip archive is compressed; unpack it and save it again with torch.save")
        return self._span(member)

    def _span(self, member: ZipInfo) -> tuple[int, int]:
        header = self._memory[member.header_offset : member.header_offset + 30]
        signature, name_length, extra_length = struct.unpack("<4s22xHH", header)
        start = member.header_offset + 30 + name_length + extra_length
        end = start + member.compress_size
        if signature != b"PK\3\4" or member.header_offset < 0 or end > len(self._memory):
            raise Unreadable("its zip archive ends too early")
        return start, end

    def _text(self, name: str, default: bytes = b"") -> bytes:
        """Return a short member, which may be compressed."""
        if name not in self._members:
            return default
        start, end = self._span(self._members[name])
        text = self._memory[start : min(end, start + self._text_left)]
        if self._members[name].compress_type == ZIP_DEFLATED:
            text = zlib.decompressobj(-15).decompress(text, max(1, self._text_left))
        self._text_left = max(0, self._text_left - len(text))
        return text


_MODULES = re.compile(r"^class (\w+)\(Module\):\n  __parameters__ = \[(.*)\]\n(?:  __buffers__ = \[(.*)\]\n)?", re.M)


# --- before zip


def _read_old(memory: mmap.mmap, stream: io.BufferedReader) -> Any:
    """Return the value of a file from before torch 1.6, with its storages read into memory."""
    window = _Window(memory, 0, len(memory), _MOST_ARGUMENT)
    storages: dict[str, tuple[torch.UntypedStorage, torch.dtype]] = {}
    left = len(memory)

    def allocate(key: str, count: int, dtype: torch.dtype) -> torch.UntypedStorage:
        """Allocate a storage, filled once the pickles have been read. Raises Unreadable beyond the file's size."""
        nonlocal left
        if key not in storages:
            left -= count * dtype.itemsize
            if left < 0:
                raise Unreadable("its pickle refers to storages larger than the file")
            storages[key] = torch.UntypedStorage(count * dtype.itemsize), dtype
        elif storages[key][0].nbytes() < count * dtype.itemsize:
            raise Unreadable("its pickle refers to one storage in two sizes")
        return storages[key][0]

    values = _values(allocate, len(memory))
    if unpickle(window, values) != _MAGIC:
        raise Unreadable("not a file of torch.save")
    if unpickle(window, values) != _VERSION:
        raise Unreadable("of an unknown version of torch.save")
    unpickle(window, values)  # the machine that wrote it
    content, keys = unpickle(window, values), unpickle(window, values)
    if not isinstance(keys, list) or any(type(key) is not str for key in keys) or sorted(keys) != sorted(storages):
        raise Unreadable("its list of storages is damaged")
    stream.seek(window.tell())
    for key in keys:
        storage, dtype = storages[key]
        length = stream.read(8)
        if len(length) < 8 or struct.unpack("<q", length)[0] * dtype.itemsize != storage.nbytes():
            raise Unreadable("its storages end too early, or have other lengths than its pickle says")
        bytes_ = torch.empty(0, dtype=torch.uint8).set_(storage)
        if stream.readinto(bytes_.numpy().data) < storage.nbytes():
            raise Unreadable("its storages end too early")
        if sys.byteorder == "big":
            storage.byteswap(dtype)
    return content
