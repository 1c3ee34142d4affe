"""Files are complete or do not exist."""

import errno
import getpass
import os
import resource
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock

from mimref import files
from mimref.errors import OutputError
from mimref.features.cache.store import FeatureCache
from mimref.features.encode import Batch, Column
from mimref.files import (
    atomic_folder,
    atomic_path,
    atomic_write,
    cache_folder,
    check_new_folder,
    ensure_caches,
    write_bytes,
)
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


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "folder"

    def write(content: str, error: type[BaseException] | None = None) -> None:
        with atomic_folder(folder) as temporary:
            (temporary / content).write_text(content)
            if error:
                raise error

    write("one")
    write("two")
    assert os.listdir(folder) == ["two"] and os.listdir(folder.parent) == ["folder"]
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            write("three", error)
        assert os.listdir(folder) == ["two"] and os.listdir(folder.parent) == ["folder"]
    replace = os.replace

    def fails(source: Path, target: Path) -> None:
        """Fail where the new folder would get its name."""
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "broken")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", fails)
    with pytest.raises(OutputError, match=str(folder)):
        write("four")
    assert os.listdir(folder) == ["two"] and os.listdir(folder.parent) == ["folder"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_to_a_folder_stays_one(exists: bool, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    if exists:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "old").touch()
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink() and sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["new"]


def test_folders_for_new_files(tmp_path: Path) -> None:
    check_new_folder(tmp_path / "new", ["a"], force=False)
    check_new_folder(tmp_path, ["a"], force=False)
    (tmp_path / "a").write_text("")
    with pytest.raises(OutputError, match="--force"):
        check_new_folder(tmp_path, ["a"], force=False)
    check_new_folder(tmp_path, ["a"], force=True)
    (tmp_path / "b").write_text("")
    with pytest.raises(OutputError, match="'b'"):
        check_new_folder(tmp_path, ["a"], force=True)
    with pytest.raises(OutputError, match="is a file"):
        check_new_folder(tmp_path / "b", ["a"], force=True)


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
        # What filelock itself raises on such file systems.
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with one_at_a_time(tmp_path / "a"):
        pass  # without a lock, nobody waits
    with pytest.raises(OutputError, match="cannot be written"), folder_lock(tmp_path / "run"):
        pytest.fail("a folder that cannot be locked is not to be used")
    listener = Watcher()
    cache = FeatureCache(tmp_path / "cache", listener)
    batch = Batch(1, [0], [], [np.ones((1, 3), dtype=np.float32)])
    stored = cache.columns({"images": 1}, [Column(1, "cls")], lambda columns, start: iter([batch]))
    assert stored.columns[Column(1, "cls")].tolist() == [[1, 1, 1]]
    assert len(listener.notes) == 1 and "cannot be written" in listener.notes[0]


# --- users without folders


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A user without any of the variables that name folders; the temporary folder is `tmp_path`."""
    names = ("HOME", "XDG_CACHE_HOME", "MIMREF_CACHE", "NUMBA_CACHE_DIR", "MPLCONFIGDIR", "TRITON_CACHE_DIR")
    for name in (*names, "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "of the test")  # so that changes made meanwhile are undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(files, "_caches", None)
    return monkeypatch


def test_an_unknown_user_gets_a_private_home(user: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    user.setattr("pwd.getpwuid", unknown)
    folder = ensure_caches()
    assert folder == tmp_path / f"mimref-{os.getuid()}" == Path.home()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder / ".cache" / "mimref"
    assert getpass.getuser() == f"user{os.getuid()}"
    assert ensure_caches() == folder  # the same however often it is called


@pytest.mark.parametrize("home", ["missing", "of root", "cache of root"])
def test_a_home_that_cannot_be_written(home: str, user: pytest.MonkeyPatch, tmp_path: Path) -> None:
    access = os.access
    place = tmp_path / "home"
    (place / ".cache").mkdir(parents=True)
    forbidden = {"missing": tmp_path, "of root": place / ".cache", "cache of root": place / ".cache"}[home]
    user.setattr(os, "access", lambda path, mode: access(path, mode) and Path(path) != forbidden)
    user.setenv("HOME", str(tmp_path / "gone" if home == "missing" else place))
    folder = ensure_caches()
    assert folder == tmp_path / f"mimref-{os.getuid()}"
    if home == "missing":
        assert Path.home() == folder
    else:
        # The home folder stays in use for everything else.
        assert Path.home() == place
        assert cache_folder().is_relative_to(folder) and os.environ["NUMBA_CACHE_DIR"].startswith(str(folder))


def test_a_usable_home_is_left_alone(user: pytest.MonkeyPatch, tmp_path: Path) -> None:
    user.setenv("HOME", str(tmp_path))
    before = dict(os.environ)
    assert ensure_caches() is None and cache_folder() == tmp_path / ".cache" / "mimref"
    assert {name for name in os.environ if os.environ[name] != before.get(name)} <= {"USER"}


def test_a_folder_that_another_could_write_is_not_used(user: pytest.MonkeyPatch, tmp_path: Path) -> None:
    user.setenv("HOME", "/")
    user.setattr(files, "_may_write", lambda folder: False)
    foreign = tmp_path / f"mimref-{os.getuid()}"
    foreign.mkdir()
    foreign.chmod(0o777)
    folder = ensure_caches()
    assert folder is not None and folder != foreign and folder.stat().st_mode & 0o777 == 0o700


def test_without_a_temporary_folder_nothing_changes(user: pytest.MonkeyPatch) -> None:
    user.setenv("HOME", "/")
    user.setattr(files, "_may_write", lambda folder: False)
    user.setattr(tempfile, "gettempdir", _no_folder)
    user.setattr(tempfile, "tempdir", None)
    assert ensure_caches() is None and os.environ["HOME"] == "/"
    assert tempfile.tempdir == "/tmp"


def _no_folder() -> str:
    raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")
