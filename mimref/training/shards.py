"""Saved states of sharded runs: one folder per state, whose tensors all ranks write by torch.distributed.checkpoint.

A folder holds a file of tensors per rank, torch's index of them (`.metadata`), everything else as a plain state
(`rest.pt`), and `manifest.json` with the size and CRC-32 of every file, since torch verifies none. Any number of ranks
can read it.
"""

import errno
import json
import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import empty as empty_sharded
from torch.futures import Future

from mimref.distributed.collectives import max_over_ranks
from mimref.distributed.group import own_rank, world_size
from mimref.distributed.sharding import joined, local
from mimref.errors import OutputError
from mimref.files import DISK_FULL, FULL_DISK_BYTES, write_bytes
from mimref.training.checkpoint import read_state, write_state

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

MANIFEST = "manifest.json"
_REST, _INDEX = "rest.pt", ".metadata"
_CHUNK_BYTES = 1 << 24
Checksums = dict[str, tuple[int, int]]
"""Size and CRC-32 of files by name."""


def staged(sharded: Mapping[tuple[Any, ...], Tensor], mesh: "DeviceMesh") -> dict[str, Tensor]:
    """Copy this rank's parts to the CPU, by their names in the files. mesh: a mesh of CPUs."""
    return {json.dumps(path): _on_cpu(tensor, mesh) for path, tensor in sharded.items()}


def _on_cpu(tensor: Tensor, mesh: "DeviceMesh") -> Tensor:
    part = local(tensor).to("cpu", copy=True)
    shape, stride = tensor.shape, tensor.stride()
    found: Tensor = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
    return found


class _Writer(FileSystemWriter):
    """torch's writer, but with a full disk always raised as OSError: torch reports it in many ways."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            if not isinstance(error, OSError) and shutil.disk_usage(self.path).free < FULL_DISK_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise


def write_shards(
    folder: Path, sharded: dict[str, Tensor], rest: Mapping[str, Any], group: dist.ProcessGroup
) -> Checksums:
    """Write a state's files into its folder; return the checksums of the files that this rank has written.

    Call this on all ranks. Only the group's collectives are shared with what the ranks do meanwhile. Raises OutputError
    if the files cannot be written: on all ranks, or on rank 0 alone if it fails to write `rest.pt`.
    """
    rank = dist.get_rank(group)
    try:
        save(sharded, storage_writer=_Writer(folder, overwrite=True), process_group=group)
    except CheckpointException as error:
        raise OutputError(f"cannot write {folder}: {_reason(error)}") from error
    names = [file.name for file in folder.glob(f"__{rank}_*")]
    if rank == 0:
        write_state(folder / _REST, rest)
        names += [_INDEX, _REST]
    return {name: _checksum(folder / name) for name in names}


def _reason(error: CheckpointException) -> str:
    """Describe what failed, for people: the first rank's OSError, else the first rank's error."""
    causes = [cause for _, (cause, _) in sorted(error.failures.items())]
    first = next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
    if not isinstance(first, OSError):
        return str(first).partition("\n")[0] or type(first).__name__
    advice = "; free some space and run again" if first.errno in DISK_FULL else ""
    return f"{first.strerror or first}{advice}"


def write_manifest(folder: Path, checksums: Sequence[Checksums]) -> None:
    """Write the manifest of the files of all ranks, which makes the folder complete.

    Raises OutputError if it cannot be written, or if this rank does not see another rank's file.
    """
    files = {name: entry for found in checksums for name, entry in found.items()}
    for name, (size, _) in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise OutputError(
                f"{folder}: lacks {name}, which another process has written; sharded runs need an --out that all "
                "processes share"
            )
    write_bytes(folder / MANIFEST, json.dumps(files).encode())


def _checksum(file: Path) -> tuple[int, int]:
    size, found = 0, 0
    with open(file, "rb") as opened:
        while part := opened.read(_CHUNK_BYTES):
            size, found = size + len(part), zlib.crc32(part, found)
    return size, found


def read_shards(folder: Path, mesh: "DeviceMesh | None") -> dict[Any, Any] | None:
    """Return a state; None if one of its files is damaged. Call this on all ranks, which share the check of the files.

    mesh: mesh of a sharded run's ranks, which then read their own parts; None: read all tensors completely, on the CPU.
    Raises OutputError if the state cannot be read.
    """
    verdict = max_over_ranks(_damage(folder))
    if verdict == _UNREADABLE:
        raise OutputError(f"{folder}: cannot be read by every process")
    rest = None if verdict else read_state(folder / _REST)
    if max_over_ranks(int(rest is None)) or rest is None:
        return None
    try:
        reader = _Reader(folder)
        tensors = {name: _target(entry, mesh) for name, entry in reader.read_metadata().state_dict_metadata.items()}
        with warnings.catch_warnings():
            # In a single process this is intended.
            warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")
            load(tensors, storage_reader=reader)
    except (Exception, CheckpointException) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise OutputError(f"{folder}: cannot be read ({reason})") from error
    return joined(rest, ((json.loads(name), tensor) for name, tensor in tensors.items()))


def _target(entry: Any, mesh: "DeviceMesh | None") -> Tensor:
    size, dtype = entry.size, entry.properties.dtype
    if mesh is None:
        return torch.empty(size, dtype=dtype)
    found: Tensor = empty_sharded(size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
    return found


_UNREADABLE = 2


def _damage(folder: Path) -> int:
    """Return whether this rank's share of the files is intact (0), damaged (1) or unreadable (2)."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())
        for name in sorted(files)[own_rank() :: world_size()]:
            if list(_checksum(folder / name)) != files[name]:
                return 1
        return int(not {_INDEX, _REST} <= files.keys())
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        return 1
    except OSError:
        return _UNREADABLE


class _Reader(FileSystemReader):
    """torch's reader, but with a safe unpickler: torch would run whatever code its index names."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        with open(Path(self.path) / _INDEX, "rb") as file:
            found: Metadata = _Unpickler(file).load()
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Unpickler(pickle.Unpickler):
    """Unpickler that allows only the types found in torch's index."""

    def find_class(self, module: str, name: str) -> Any:
        plain = (module, name) in _PLAIN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        if plain or (module == metadata.__name__ and isinstance(vars(metadata).get(name), type)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index of a state names {module}.{name}")


_PLAIN = {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}
