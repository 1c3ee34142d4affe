"""Several processes that start at once on the same data and weights: one scans or fetches, the others reuse its result.

Locks apply between open files, so threads with open files of their own can stand in for processes here.
"""

import os
import struct
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from mimref.config.base import DataConfig
from mimref.data.index import cache as index_cache
from mimref.data.open import open_source
from mimref.data.readers import folder as folders
from mimref.data.readers import wds as shards
from mimref.data.sources import ImageSource
from mimref.encoders import published as known
from mimref.encoders.published import PublishedWeights, fetch
from mimref.files import cache_folder
from mimref.locks import one_at_a_time
from tests.tiny import write_images

T = TypeVar("T")


def at_once(work: Callable[[], T], count: int = 4) -> list[T]:
    """The results of several threads that start at the same time."""
    begin, found = threading.Barrier(count), []

    def run() -> None:
        begin.wait()
        found.append(work())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == count
    return found


class Counted:
    """Counts the calls of a function, and delays each."""

    def __init__(self, function: Callable[..., Any], seconds: float = 0.3) -> None:
        self.function, self.seconds, self.calls, self.most, self.under_way = function, seconds, 0, 0, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        time.sleep(self.seconds)
        try:
            return self.function(*arguments, **options)
        finally:
            self.under_way -= 1


def age(folder: Path) -> None:
    """Date everything back a minute, because what has just changed is scanned again."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (time.time() - 60, time.time() - 60))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", per_class=3)
    age(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def pattern(images: Path) -> str:
    folder = images.parent / "shards"
    folder.mkdir()
    for name in ("a", "b"):
        with tarfile.open(folder / f"{name}.tar", "w") as shard:
            shard.add(images / name, name)
    age(folder)
    return f"wds:{folder}/*.tar"


def opened(spec: object, **settings: Any) -> ImageSource:
    return open_source(DataConfig(spec=str(spec), **settings), "train")


def test_a_folder_is_listed_once(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Counted(folders._scan)
    monkeypatch.setattr(folders, "_scan", look)
    monkeypatch.setattr(index_cache, "SAVE_FROM_IMAGES", 1)
    found = at_once(lambda: opened(images))
    assert look.calls == 1 and [len(source) for source in found] == [6] * 4
    assert [path.suffix for path in (cache_folder() / "listings").iterdir()] == [".npz"]


def test_shards_are_read_once(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Counted(shards._scan)
    monkeypatch.setattr(shards, "_scan", look)
    monkeypatch.setattr(index_cache, "SAVE_FROM_IMAGES", 1)
    found = at_once(lambda: opened(pattern))
    assert look.calls == 1 and [len(source) for source in found] == [6] * 4


@pytest.mark.parametrize("module", [folders, shards])
def test_a_long_scan_of_few_images_is_saved(
    module: Any, images: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Counted(module._scan, seconds=0.05)
    monkeypatch.setattr(module, "_scan", look)
    spec = images if module is folders else pattern
    opened(spec)
    opened(spec)
    assert look.calls == 2
    monkeypatch.setattr(index_cache, "LONG_SCAN_S", 0.01)
    opened(spec)
    opened(spec)
    assert look.calls == 3


def test_without_locks_every_process_scans(images: Path, pattern: str) -> None:
    cache_folder().write_text("a file, not a folder")
    assert [len(source) for source in at_once(lambda: opened(images))] == [6] * 4
    assert len(opened(pattern)) == 6


def test_locks_that_were_left_behind_stop_nobody(images: Path) -> None:
    file = index_cache._file("folder", folders.listing_key(str(images)))
    file.parent.mkdir(parents=True)
    (lock := file.with_name(f".{file.name}.lock")).touch()
    assert len(opened(images)) == 6
    assert not lock.exists()


def test_one_at_a_time(tmp_path: Path) -> None:
    turns = Counted(lambda: None, seconds=0.02)

    def work() -> None:
        with one_at_a_time(tmp_path / "new/file"):
            turns()

    at_once(work, 8)
    assert (turns.calls, turns.most) == (8, 1)
    with pytest.raises(ZeroDivisionError), one_at_a_time(tmp_path / "new/file"):
        _ = 1 / 0
    work()
    assert list((tmp_path / "new").iterdir()) == []


def test_weights_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = tmp_path / "published.pth"
    published.write_bytes(b"weights")
    download = Counted(known._download)
    monkeypatch.setattr(known, "_download", download)
    found = at_once(lambda: fetch(PublishedWeights("maws_b16", published.as_uri(), "maws")))
    assert download.calls == 1 and {file.read_bytes() for file in found} == {b"weights"}


def test_torchvision_downloads_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import MNIST

    def download(self: MNIST) -> None:
        """Download as torchvision does: files have their final names before they are complete."""
        if self._check_exists():
            return
        folder = Path(self.raw_folder)
        folder.mkdir(parents=True, exist_ok=True)
        for prefix in ("train", "t10k"):
            for name, shape in (("images-idx3", (5, 28, 28)), ("labels-idx1", (5,))):
                with open(folder / f"{prefix}-{name}-ubyte", "wb") as file:
                    file.write(bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape))
                    file.flush()
                    time.sleep(0.1)
                    file.write(bytes(int(np.prod(shape))))

    counted = Counted(download, seconds=0.0)
    monkeypatch.setattr(MNIST, "download", lambda self: counted(self))
    found = at_once(lambda: opened("torchvision:MNIST", root=str(tmp_path / "root"), download=True))
    assert [len(source) for source in found] == [5] * 4
    assert counted.most == 1
    # No lock can be made, as in someone else's folder that already holds all files.
    (tmp_path / "root/.MNIST.lock").mkdir()
    assert len(opened("torchvision:MNIST", root=str(tmp_path / "root"), download=True)) == 5
