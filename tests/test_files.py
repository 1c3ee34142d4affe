"""Files are complete or not there."""

import errno
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock

from mimref.errors import OutputError
from mimref.features.cache.store import FeatureCache
from mimref.features.encode import Batch, Column
from mimref.files import atomic_path, atomic_write, write_bytes
from mimref.locks import folder_lock, one_at_a_time
from tests.tiny import Watcher


def test_writes_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.bin"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("three")
        assert path.read_bytes() == b"two"
    assert path.read_text() == "three"
    assert os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    write_bytes(tmp_path / "atomic", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"^cannot write .*results\.csv: .*; choose another --out$"):
        write_bytes(tmp_path / "file" / "results.csv", b"")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            write_bytes(tmp_path / "file", b"")
    finally:
        tmp_path.chmod(0o700)


def test_a_write_that_runs_out_of_room_keeps_the_old_file(tmp_path: Path) -> None:
    """A limit on file size fails the write itself, as a full disk does."""
    path = tmp_path / "file"
    write_bytes(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            write_bytes(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        write_bytes(tmp_path / "file", b"x")
    assert os.listdir(tmp_path) == []


def test_a_library_error_on_a_full_disk_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="writer failed"), atomic_path(tmp_path / "file"):
        raise RuntimeError("writer failed")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="No space left"), atomic_path(tmp_path / "file"):
        raise RuntimeError("writer failed")


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        # What filelock itself raises there.
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with one_at_a_time(tmp_path / "a"):
        pass  # nobody waits
    with pytest.raises(OutputError, match="cannot be written"), folder_lock(tmp_path / "run"):
        pytest.fail("a folder that cannot be locked is not to be used")
    listener = Watcher()
    cache = FeatureCache(tmp_path / "cache", listener)
    batch = Batch(1, [0], [], [np.ones((1, 3), dtype=np.float32)])
    stored = cache.columns({"images": 1}, [Column(1, "cls")], lambda columns, start: iter([batch]))
    assert stored.columns[Column(1, "cls")].tolist() == [[1, 1, 1]]
    assert len(listener.notes) == 1 and "cannot be written" in listener.notes[0]
