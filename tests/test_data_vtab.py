"""VTAB's splits and VTAB-1K's lists: folders in the original layouts, against independent plain loops."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch

from mimref.data.open import absolute_spec
from mimref.data.readers.vtab import VTAB_1K_NAMES, VTAB_NAMES
from mimref.errors import DataError
from tests.sources import classes_of, names, opened, write_images

SPLITS = ("train", "val")


def drawn(folder: Path, classes: list[str], count: str) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Training and test files with their labels, drawn as the splits are specified."""
    generator = torch.Generator()
    generator.manual_seed(0)
    train, test = [], []
    for label in range(len(classes)):
        files = [path.name for path in (folder / classes[label]).iterdir() if path.suffix == ".jpg"]
        files.sort()
        order = torch.randperm(len(files), generator=generator).tolist()
        last = 30 if count == "30" else round(len(files) * 0.8)
        for place in range(len(files)):
            part = train if order.index(place) < last else test
            part.append((f"{classes[label]}/{files[place]}", label))
    return train, test


def found(spec: str, split: str, root: Path, folder: Path) -> list[tuple[str, int]]:
    source = opened(spec, split, root=str(root), need_labels=True)
    assert source.labels is not None and source.labels.dtype == np.int64
    return list(zip(names(source, folder), source.labels.tolist(), strict=True))


@pytest.mark.parametrize("place", ["", "caltech101", "caltech-101"])
def test_caltech101(tmp_path: Path, place: str) -> None:
    folder = tmp_path / place / "101_ObjectCategories"
    sizes = {"Faces": 33, "BACKGROUND_Google": 40, "ant": 31, "Faces_easy": 35}
    for name, count in sizes.items():
        write_images(folder / name, *(f"image_{number:04}.jpg" for number in range(count)))
    (folder / "BACKGROUND_Google" / "tmp").write_text("what the archive holds as well")
    (folder / "Faces" / ".DS_Store").touch()
    classes = ["BACKGROUND_Google", "Faces", "Faces_easy", "ant"]
    expected = drawn(folder, classes, "30")
    assert len(expected[0]) == 120 and len(expected[1]) == 3 + 10 + 1 + 5
    for split, part in zip(SPLITS, expected, strict=True):
        assert found("vtab:Caltech101", split, tmp_path, folder) == part
    source = opened("vtab:caltech101", root=str(tmp_path))
    assert source.class_names == classes and source.read(0).shape == (3, 3, 4)
    (notice,) = source.notices
    assert "139 of 4" in notice and "9,144 of 102" in notice


def test_sun397(tmp_path: Path) -> None:
    folder = tmp_path / "SUN397"
    listed = ["/b/balcony/exterior", "/a/abbey", "/b/balcony/interior"]  # file order counts, not the alphabet
    for number, name in enumerate(listed):
        write_images(folder / name[1:], *(f"sun_{file:03}.jpg" for file in range((7, 10, 13)[number])))
    (folder / "ClassName.txt").write_text("\n".join(listed) + "\n")
    classes = [name[1:] for name in listed]
    for split, part in zip(SPLITS, drawn(folder, classes, "0.8"), strict=True):
        assert found("vtab:sun397", split, tmp_path, folder) == part
    # 5.6, 8 and 10.4 images, rounded.
    assert np.bincount(opened("vtab:sun397", root=str(tmp_path)).labels).tolist() == [6, 8, 10]
    assert opened("vtab:sun397", root=str(folder)).class_names == classes


def test_dtd(tmp_path: Path) -> None:
    base = tmp_path / "dtd" / "dtd"
    parts = {"train1": ["dotted/a", "banded/b"], "val1": ["banded/c", "dotted/d"], "test1": ["banded/e", "dotted/f"]}
    (base / "labels").mkdir(parents=True)
    for part, files in parts.items():
        write_images(base / "images", *(f"{file}.jpg" for file in files))
        (base / "labels" / f"{part}.txt").write_text("".join(f"{file}.jpg\n" for file in files))
    expected = [("dotted/a.jpg", 1), ("banded/b.jpg", 0), ("banded/c.jpg", 0), ("dotted/d.jpg", 1)]
    assert found("vtab:dtd", "train", tmp_path, base / "images") == expected
    assert found("vtab:dtd", "val", tmp_path, base / "images") == [("banded/e.jpg", 0), ("dotted/f.jpg", 1)]
    (base / "labels" / "val1.txt").write_text("banded/c.jpg\n")
    with pytest.raises(DataError, match="classes are missing"):
        opened("vtab:dtd", root=str(tmp_path))


def test_flowers102(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import Flowers102

    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    base = tmp_path / "flowers-102"
    write_images(base / "jpg", *(f"image_{number:05}.jpg" for number in range(1, 7)))
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array([5, 77, 102, 8, 1, 5])})
    ids = {"trnid": np.array([3, 1]), "valid": np.array([5, 6]), "tstid": np.array([2, 4])}
    scipy.io.savemat(base / "setid.mat", ids)
    train = [("image_00003.jpg", 101), ("image_00001.jpg", 4), ("image_00005.jpg", 0), ("image_00006.jpg", 4)]
    assert found("vtab:flowers102", "train", tmp_path, base / "jpg") == train
    assert found("vtab:flowers102", "val", tmp_path, base / "jpg") == [("image_00002.jpg", 76), ("image_00004.jpg", 7)]
    assert list(opened("vtab:flowers102", root=str(tmp_path)).notices) == []


def test_pets(tmp_path: Path) -> None:
    base = tmp_path / "oxford-iiit-pet"
    write_images(base / "images", "Abyssinian_1.jpg", "beagle_7.jpg", "beagle_8.jpg")
    (base / "annotations").mkdir()
    (base / "annotations" / "trainval.txt").write_text("Abyssinian_1 1 1 1\nbeagle_7 2 2 1\n")
    (base / "annotations" / "test.txt").write_text("Abyssinian_1 1 1 1\nbeagle_8 2 2 1\n")
    assert found("vtab:pets", "train", tmp_path, base / "images") == [("Abyssinian_1.jpg", 0), ("beagle_7.jpg", 1)]
    assert found("vtab:pets", "val", tmp_path, base / "images")[1] == ("beagle_8.jpg", 1)


def test_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR100, "_load_meta", lambda self: setattr(self, "classes", [f"c{i}" for i in range(100)]))
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    pixels = {}
    for name, labels in (("train", [99, 3, 5]), ("test", [7])):
        pixels[name] = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels[name], "fine_labels": labels}))
    train, test = (opened("vtab:cifar100", split, root=str(tmp_path)) for split in SPLITS)
    assert classes_of(train) == ["c99", "c3", "c5"] and classes_of(test) == ["c7"] and train.name == "vtab:cifar100"
    assert train.read(2).flatten().tolist() == pixels["train"][2].tolist()


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import SVHN

    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    for name, labels in (("train", [10, 1, 2]), ("test", [9, 10])):
        images = np.zeros((32, 32, 3, len(labels)), dtype=np.uint8)
        scipy.io.savemat(tmp_path / f"{name}_32x32.mat", {"X": images, "y": np.array(labels)[:, None]})
    train, test = (opened("vtab:svhn", split, root=str(tmp_path)) for split in SPLITS)
    assert classes_of(train) == ["0", "1", "2"] and classes_of(test) == ["9", "0"]


# --- VTAB-1K


def write_lists(folder: Path, lists: dict[str, list[int]]) -> None:
    for name, labels in lists.items():
        files = [f"images/{name}/{number:06}.jpg" for number in range(len(labels))]
        write_images(folder, *files)
        lines = [f"{file} {label}" for file, label in zip(files, labels, strict=True)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


LISTS = {"train800": [0, 2, 2, 0], "val200": [1, 0], "train800val200": [0, 2, 2, 0, 1, 0], "test": [2, 2, 1]}


@pytest.mark.parametrize("place", ["", "vtab-1k"])
def test_vtab_1k(tmp_path: Path, place: str) -> None:
    folder = tmp_path / place / "clevr_count"
    write_lists(folder, LISTS)
    for spec, parts in (("vtab1k:clevr_count", ("train800val200", "test")),
                        ("vtab1k:clevr_count/tune", ("train800", "val200"))):  # fmt: skip
        for split, part in zip(SPLITS, parts, strict=True):
            expected = [(f"images/{part}/{number:06}.jpg", label) for number, label in enumerate(LISTS[part])]
            assert found(spec, split, tmp_path, folder) == expected
            assert opened(spec, split, root=str(tmp_path)).class_names == ["0", "1", "2"]


def test_the_sets_of_vtab() -> None:
    assert len(VTAB_NAMES) == 7 and len(set(VTAB_1K_NAMES)) == 19
    assert absolute_spec("vtab:pets") == "vtab:pets" and absolute_spec("vtab1k:dtd/tune") == "vtab1k:dtd/tune"


@pytest.mark.parametrize(
    ("spec", "root", "said"),
    [
        ("vtab:calltech101", True, ("calltech101", "did you mean 'caltech101'", "svhn")),
        ("vtab:caltech101", True, ("BACKGROUND_Google", "101_ObjectCategories")),
        ("vtab:sun397", True, ("ClassName.txt", "SUN397")),
        ("vtab:dtd", True, ("data.download=true",)),
        ("vtab:pets", False, ("--set data.root=",)),
        ("vtab:sun397", False, ("--set data.root=",)),
        ("vtab1k:cifar100", True, ("did you mean 'cifar'",)),
        ("vtab1k:cifar", True, ("train800val200.txt", "vtab-1k/cifar")),
        ("vtab1k:cifar/tone", True, ("'tone'", "vtab1k:cifar/tune")),
    ],
)
def test_what_is_not_there(tmp_path: Path, spec: str, root: bool, said: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        opened(spec, root=str(tmp_path) if root else None)
    message = str(caught.value)
    assert all(part in message for part in (f"--data {spec}", *said)) and "\n" not in message, message


@pytest.mark.parametrize("line", ["images/a.jpg", "images/a.jpg one", "images/a.jpg -1", "images/a.jpg 9999999"])
def test_damaged_lists(tmp_path: Path, line: str) -> None:
    write_lists(tmp_path / "svhn", LISTS)
    (tmp_path / "svhn" / "test.txt").write_text(f"images/b.jpg 1\n\n{line}\n")
    with pytest.raises(DataError, match=r"test\.txt: line 3 .*images/a\.jpg"):
        opened("vtab1k:svhn", root=str(tmp_path))
    (tmp_path / "svhn" / "test.txt").write_text("\n")
    with pytest.raises(DataError, match=r"test\.txt is empty"):
        opened("vtab1k:svhn", root=str(tmp_path))


def test_a_class_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "SUN397").mkdir()
    (tmp_path / "SUN397" / "ClassName.txt").write_text("/a/abbey\n")
    with pytest.raises(DataError, match="a/abbey cannot be read"):
        opened("vtab:sun397", root=str(tmp_path))
    (tmp_path / "SUN397" / "a" / "abbey").mkdir(parents=True)
    with pytest.raises(DataError, match="too few"):
        opened("vtab:sun397", root=str(tmp_path))
