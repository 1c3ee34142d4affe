import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimref.config import DataConfig
from mimref.data import folders
from mimref.data.folders import CACHED_FROM, list_folder
from mimref.data.paths import PathList
from mimref.data.sources import FileSource, open_source
from mimref.files import cache_folder

YEAR_2001 = 978_307_200


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def settle(root: Path) -> None:
    """Make the folders look as if nothing had changed for years."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, (YEAR_2001, YEAR_2001))


def plain_listing(root: str, below: str = "") -> list[str]:
    """Image files in the order of a folder's own first, by recursion; for folders without links."""
    names = sorted(name for name in os.listdir(os.path.join(root, below)) if not name.startswith("."))
    paths = [os.path.join(below, name) for name in names]
    files = [
        path for path in paths if os.path.isfile(os.path.join(root, path)) and path.lower().endswith((".jpg", ".png"))
    ]
    inner = [plain_listing(root, path) for path in paths if os.path.isdir(os.path.join(root, path))]
    return files + [path for each in inner for path in each]


class Scans:
    """Counts the folders that are listed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        scandir = os.scandir

        def note(path: str) -> Any:
            self.paths.append(path)
            return scandir(path)

        monkeypatch.setattr(folders.os, "scandir", note)

    def during(self, act: Callable[[], object]) -> int:
        before = len(self.paths)
        act()
        return len(self.paths) - before


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> Scans:
    monkeypatch.setattr(folders, "CACHED_FROM", 1)
    return Scans(monkeypatch)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    touch(root, "b/2.png", "b/10.png", "a/deep/er/x.JPG", "a/y.jpg", "c.png/inner.png", "notes.txt", "b/.hidden.png")
    settle(root)
    return root


# --- path lists


def test_path_lists_are_the_lists_they_were_made_of() -> None:
    paths = ["a/b.png", "", "ünï/two\nlines.png", "\udcff.png", "x" * 300]
    packed = PathList.pack(paths)
    assert list(packed) == paths and len(packed) == 5
    assert [packed[index] for index in range(-5, 5)] == paths + paths
    assert packed[1:4] == paths[1:4] and packed[::-2] == paths[::-2]
    assert list(packed.take(np.array([4, 0, 0]))) == [paths[4], paths[0], paths[0]]
    assert PathList.pack(packed) is packed
    for index in (5, -6):
        with pytest.raises(IndexError):
            packed[index]
    assert list(PathList.pack([])) == [] and len(PathList.pack([])) == 0


def private_kib() -> int:
    """Memory of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Private_Clean")))


def growth_in_a_child(read: Callable[[int], object], count: int) -> int:
    """KiB by which a forked process grows when it reads all of something that its parent holds."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        before = private_kib()
        for index in range(count):
            read(index)
        os.write(theirs, str(private_kib() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(theirs)
    with open(ours) as pipe:
        return int(pipe.read())


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="Linux tells the memory of a process")
def test_worker_memory_does_not_grow_with_the_number_of_files() -> None:
    count = 300_000
    paths = [f"n{index // 1300:08}/n{index // 1300:08}_{index}.JPEG" for index in range(count)]
    source = FileSource("many", "/nowhere", paths, None, None)
    assert growth_in_a_child(source.path, count) < 1024
    assert growth_in_a_child(lambda index: paths[index], count) > 8 * 1024  # what the list itself would cost


# --- the kept listing


def test_a_second_start_lists_no_folder(images: Path, scans: Scans) -> None:
    first = list_folder(str(images))
    assert list(first.files) == plain_listing(str(images))
    assert scans.during(lambda: list_folder(str(images))) == 0
    again = list_folder(str(images))
    assert list(again.files) == list(first.files) and again.counts.tolist() == first.counts.tolist()
    assert again.class_folders() == first.class_folders() == ["a", "b", "c.png"]
    for split in ("train", "val"):
        cached = open_source(DataConfig(spec=str(images)), split)  # type: ignore[arg-type]
        assert [cached.path(index) for index in range(len(cached))] == [str(images / name) for name in first.files]
        assert (cached.labels is not None) == (split == "train")


def changes() -> Iterator[Any]:
    yield pytest.param(lambda root: touch(root, "b/3.png"), id="file added")
    yield pytest.param(lambda root: touch(root, "a/deep/er/y.png"), id="file added deep below")
    yield pytest.param(lambda root: (root / "b" / "2.png").unlink(), id="file removed")
    yield pytest.param(lambda root: (root / "b" / "2.png").rename(root / "b" / "0.png"), id="file renamed")
    yield pytest.param(lambda root: touch(root, "new/0.png"), id="folder added")
    yield pytest.param(lambda root: (root / "b").rename(root / "z"), id="folder renamed")
    yield pytest.param(lambda root: shutil.rmtree(root / "a"), id="folder removed")


@pytest.mark.parametrize("change", list(changes()))
def test_changed_folders_are_listed_again(images: Path, scans: Scans, change: Callable[[Path], object]) -> None:
    before = list(list_folder(str(images)).files)
    change(images)
    after = list(list_folder(str(images)).files)
    assert after == plain_listing(str(images)) != before


def test_what_lies_behind_links_is_watched_too(images: Path, tmp_path: Path, scans: Scans) -> None:
    touch(tmp_path / "elsewhere", "1.png")
    settle(tmp_path / "elsewhere")
    (images / "linked").symlink_to(tmp_path / "elsewhere")
    (images / "linked_again").symlink_to(tmp_path / "elsewhere")
    (images / "loop").symlink_to(images)
    settle(images)
    assert [name for name in list_folder(str(images)).files if "link" in name] == ["linked/1.png"]
    assert scans.during(lambda: list_folder(str(images))) == 0
    touch(tmp_path / "elsewhere", "2.png")
    assert [name for name in list_folder(str(images)).files if "link" in name] == ["linked/1.png", "linked/2.png"]


def test_folders_that_have_just_changed_are_not_trusted(images: Path, scans: Scans) -> None:
    # Two changes within one tick of the file system's clock leave the same modification time.
    now = time.time_ns()
    os.utime(images / "b", ns=(now, now))
    list_folder(str(images))
    touch(images, "b/3.png")
    os.utime(images / "b", ns=(now, now))
    assert "b/3.png" in list(list_folder(str(images)).files)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "other root", "other arrays"])
def test_damaged_listings_are_made_again(images: Path, scans: Scans, damage: str) -> None:
    before = list(list_folder(str(images)).files)
    (file,) = (cache_folder() / "listings").iterdir()
    content = bytearray(file.read_bytes())
    if damage == "other root":
        with np.load(file) as kept:
            np.savez(file, **{**kept, "of": np.frombuffer(b"/other", dtype=np.uint8)})
    elif damage == "other arrays":
        np.savez(file, of=np.frombuffer(os.fsencode(images), dtype=np.uint8))
    else:
        at = bytes(content).index(b"deep")
        flipped = content[:at] + b"peed" + content[at + 4 :]
        file.write_bytes({"cut": content[:-100], "flipped": flipped, "empty": b"", "text": b"text"}[damage])
    assert scans.during(lambda: list_folder(str(images))) > 0
    assert list(list_folder(str(images)).files) == before
    assert scans.during(lambda: list_folder(str(images))) == 0


def test_a_cache_that_cannot_be_written_only_costs_time(
    images: Path, tmp_path: Path, scans: Scans, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MIMREF_CACHE", str(tmp_path / "file"))
    assert list(list_folder(str(images)).files) == plain_listing(str(images))


def test_small_folders_leave_nothing_in_the_cache(images: Path) -> None:
    list_folder(str(images))
    assert not cache_folder().exists()


def test_twenty_thousand_files_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "images"
    for split, count in (("train", 1800), ("val", 200)):
        for name in range(10):
            (root / split / f"{name}").mkdir(parents=True)
            for index in range(count):
                os.close(os.open(root / split / f"{name}" / f"{index}.jpg", os.O_CREAT))
    settle(root)
    assert CACHED_FROM < 18_000
    scans = Scans(monkeypatch)
    data = DataConfig(spec=str(root))
    assert scans.during(lambda: open_source(data, "train")) == 11
    first = open_source(data, "train")
    assert scans.during(lambda: open_source(data, "train")) == 0
    assert scans.during(lambda: open_source(data, "val")) == 11  # few enough to be listed every time; train/ is not
    assert first.labels is not None and np.bincount(first.labels).tolist() == [1800] * 10
    assert isinstance(first, FileSource)
    assert all(int(path.split("/")[0]) == label for path, label in zip(first.files, first.labels, strict=True))


@pytest.mark.slow
def test_a_folder_as_large_as_imagenet_opens_within_ten_seconds(tmp_path: Path) -> None:
    root = tmp_path / "images"
    try:
        for name in range(1000):
            (root / "train" / f"n{name:08}").mkdir(parents=True)
            for index in range(1300):
                os.close(os.open(root / "train" / f"n{name:08}" / f"n{name:08}_{index}.JPEG", os.O_CREAT))
        settle(root)
        open_source(DataConfig(spec=str(root)), "train")
        start = time.monotonic()
        source = open_source(DataConfig(spec=str(root)), "train")
        assert source.fingerprint
        assert time.monotonic() - start < 10
        assert len(source) == 1_300_000
        assert growth_in_a_child(source.path, len(source)) < 1024
    finally:
        shutil.rmtree(root)
