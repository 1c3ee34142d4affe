"""Folders of images: splits, classes, links and odd entries; and the saved listing, against a plain recursion."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimref.config.base import DataConfig
from mimref.data.decode import BadImage
from mimref.data.index import cache as index_cache
from mimref.data.open import open_source
from mimref.data.readers import folder as folders
from mimref.data.readers.folder import list_folder
from mimref.data.sources import FileSource
from mimref.errors import DataError
from mimref.files import cache_folder
from tests.sources import classes_of, growth_in_a_child, names, opened, write_images

YEAR_2001 = 978_307_200


# --- splits and classes


@pytest.mark.parametrize("held", ["val", "test"])
def test_folder_with_splits_and_classes(tmp_path: Path, held: str) -> None:
    write_images(
        tmp_path / "train", "dog/b.png", "cat/2.jpg", "cat/1.JPEG", "cat-big/deep/er/x.webp", "empty/.hidden.jpg"
    )
    write_images(tmp_path / held, "dog/z.bmp", "cat/y.tiff")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "readme.md").write_text("not an image")
    train, val = opened(tmp_path, need_labels=True), opened(tmp_path, "val", need_labels=True)
    assert names(train, tmp_path) == [
        "train/cat/1.JPEG",
        "train/cat/2.jpg",
        "train/cat-big/deep/er/x.webp",
        "train/dog/b.png",
    ]
    assert train.class_names == val.class_names == ["cat", "cat-big", "dog"]
    assert classes_of(train) == ["cat", "cat", "cat-big", "dog"]
    assert classes_of(val) == ["cat", "dog"]  # numbered as in train: cat-big has no validation image
    assert val.labels is not None and val.labels.tolist() == [0, 2]
    assert names(val, tmp_path) == [f"{held}/cat/y.tiff", f"{held}/dog/z.bmp"]
    assert train.name == str(tmp_path) and not train.in_memory


def test_labels_and_classes_agree_with_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    write_images(tmp_path / "train", *(f"{name}/{i}.png" for name in ("b", "a", "B", "a b") for i in range(3)))
    write_images(tmp_path / "val", "b/0.png")
    reference = ImageFolder(str(tmp_path / "train"))
    source = opened(tmp_path)
    assert source.class_names == reference.classes
    assert source.labels is not None and source.labels.tolist() == reference.targets
    assert [source.path(i) for i in range(len(source))] == [path for path, _ in reference.samples]


def test_val_comes_before_test(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        write_images(tmp_path / part, f"{part}.png")
    assert names(opened(tmp_path, "val"), tmp_path) == ["val/val.png"]


def test_folder_with_splits_and_no_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "b.png", "a.png", "more/c.png")
    write_images(tmp_path / "val", "images/d.png")  # a single subfolder does not define classes
    train, val = opened(tmp_path), opened(tmp_path, "val")
    assert names(train, tmp_path) == ["train/a.png", "train/b.png", "train/more/c.png"]
    assert names(val, tmp_path) == ["val/images/d.png"]
    assert train.labels is val.labels is None and train.class_names is None
    with pytest.raises(DataError, match=r"train images have no labels.*train/CLASS/ and val/CLASS/"):
        opened(tmp_path, need_labels=True)


def test_classes_of_val_alone_are_its_own(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "a.png")
    write_images(tmp_path / "val", "cat/d.png", "dog/e.png")
    assert opened(tmp_path).labels is None
    assert classes_of(opened(tmp_path, "val")) == ["cat", "dog"]


def test_folder_with_only_one_split(tmp_path: Path) -> None:
    write_images(tmp_path / "only_val" / "val", "cat/d.png", "dog/e.png")
    assert classes_of(opened(tmp_path / "only_val", "val")) == ["cat", "dog"]
    with pytest.raises(DataError, match="has val/ but no train/"):
        opened(tmp_path / "only_val")
    write_images(tmp_path / "only_train" / "train", "cat/d.png", "dog/e.png")
    with pytest.raises(DataError, match="has train/ but no val/ or test/"):
        opened(tmp_path / "only_train", "val")


def test_class_of_val_that_train_does_not_know(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "cat/a.png", "dog/a.png")
    write_images(tmp_path / "val", "cat/a.png", "gnu/a.png")
    with pytest.raises(DataError, match=r"class 'gnu' of val/ is not in train/"):
        opened(tmp_path, "val")


def test_val_without_classes_beside_train_with_them(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "cat/a.png", "dog/a.png")
    write_images(tmp_path / "val", "a.png")
    assert opened(tmp_path, "val").labels is None
    with pytest.raises(DataError, match="val images have no labels"):
        opened(tmp_path, "val", need_labels=True)


def test_folder_of_images_is_train_and_val(tmp_path: Path) -> None:
    write_images(tmp_path, "b.png", "a.jpg", "sub/dir/c.gif", ".hidden/d.png", ".e.png", "sub/f.PGM".lower())
    for split in ("train", "val"):
        source = opened(tmp_path, split)
        assert names(source, tmp_path) == ["a.jpg", "b.png", "sub/f.pgm", "sub/dir/c.gif"]
        assert source.labels is None and source.class_names is None


def test_class_folders_without_splits_label_the_training_images_only(tmp_path: Path) -> None:
    write_images(tmp_path, "dog/a.png", "cat/a.png")
    assert classes_of(opened(tmp_path, need_labels=True)) == ["cat", "dog"]
    held = opened(tmp_path, "val")
    assert len(held) == 2 and held.labels is None
    with pytest.raises(DataError, match=r"val images have no labels.*train/CLASS/ and val/CLASS/"):
        opened(tmp_path, "val", need_labels=True)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    write_images(tmp_path / "elsewhere", "x.png")
    write_images(tmp_path / "images", "a.png", "sub/b.png")
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "sub" / "up").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "self.png").symlink_to(tmp_path / "images" / "self.png")
    (tmp_path / "images" / "self").symlink_to(tmp_path / "images" / "self")
    source = opened(tmp_path / "images")
    assert names(source, tmp_path / "images") == ["a.png", "self.png", "linked/x.png", "sub/b.png"]
    with pytest.raises(BadImage, match=r"self\.png"):
        source.read(1)
    assert len(source.fingerprint) == 64


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
def test_pipes_are_no_images(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    assert names(opened(tmp_path), tmp_path) == ["a.png"]


def test_a_folder_named_like_an_image_is_a_folder(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png/c.png")
    assert names(opened(tmp_path), tmp_path) == ["a.png", "b.png/c.png"]


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_images(tmp_path / "pictures", "a.png")
    assert len(opened("~/pictures")) == 1


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    with pytest.raises(DataError, match="is a file, not a folder"):
        opened(tmp_path / "a.png")


@pytest.mark.parametrize("below", ["", "train", "train/cat"])
def test_folder_without_images(tmp_path: Path, below: str) -> None:
    (tmp_path / below).mkdir(parents=True, exist_ok=True)
    (tmp_path / below / "notes.txt").write_text("text")
    with pytest.raises(DataError, match=r"no images in .*\*\.jpg"):
        opened(tmp_path)


def test_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, "a.png", "sub/b.png")
    list_folder = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="sub cannot be listed: Permission denied"):
        opened(tmp_path)


# --- the saved listing


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
    """Image files by recursion, a folder's own files first; for folders without links."""
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
    monkeypatch.setattr(index_cache, "SAVE_FROM_IMAGES", 1)
    return Scans(monkeypatch)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    touch(root, "b/2.png", "b/10.png", "a/deep/er/x.JPG", "a/y.jpg", "c.png/inner.png", "notes.txt", "b/.hidden.png")
    settle(root)
    return root


def test_a_second_start_lists_no_folder(images: Path, scans: Scans) -> None:
    first = list_folder(str(images))
    assert list(first.files) == plain_listing(str(images))
    assert scans.during(lambda: list_folder(str(images))) == 0
    again = list_folder(str(images))
    assert list(again.files) == list(first.files) and again.counts.tolist() == first.counts.tolist()
    assert again.classes() == first.classes() == ["a", "b", "c.png"]
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
    assert not list((cache_folder() / "listings").iterdir())


def test_large_folders_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "images"
    for split, count in (("train", 180), ("val", 20)):
        for name in range(10):
            (root / split / f"{name}").mkdir(parents=True)
            for index in range(count):
                os.close(os.open(root / split / f"{name}" / f"{index}.jpg", os.O_CREAT))
    settle(root)
    monkeypatch.setattr(index_cache, "SAVE_FROM_IMAGES", 1000)
    scans = Scans(monkeypatch)
    data = DataConfig(spec=str(root))
    # The folder itself is listed every time, to find images beside the splits.
    assert scans.during(lambda: open_source(data, "train")) == 1 + 11
    first = open_source(data, "train")
    assert scans.during(lambda: open_source(data, "train")) == 1
    assert scans.during(lambda: open_source(data, "val")) == 1 + 11  # val/ is small and always listed; train/ is not
    assert first.labels is not None and np.bincount(first.labels).tolist() == [180] * 10
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
