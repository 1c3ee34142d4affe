"""Data sets known by name, against scikit-learn, torchvision and files written here; damaged and missing files."""

import gzip
import os
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from numpy.typing import NDArray

from mimref.data.readers import named
from mimref.data.sources import ArraySource, FileSource
from mimref.errors import DataError
from tests.sources import classes_of, names, opened, write_images

Pixels = NDArray[np.uint8]


def write_idx(path: Path, array: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        file.write(content)


def write_mnist(folder: Path, suffix: str = "") -> dict[str, tuple[Pixels, Pixels]]:
    draw = np.random.default_rng(0)
    written = {}
    for split, prefix, count in (("train", "train", 20), ("val", "t10k", 10)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) * 3 % 10).astype(np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
        written[split] = (images, labels)
    return written


# --- digits


def test_digits_are_sklearns_digits_split_by_class() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen = []
    for split, size in (("train", 1437), ("val", 360)):
        source = opened("digits", split, need_labels=True)
        assert isinstance(source, ArraySource)
        assert (len(source), source.name, source.in_memory) == (size, "digits", True)
        assert source.class_names == [str(digit) for digit in range(10)]
        assert source.labels is not None and source.labels.dtype == np.int64
        for index in range(size):
            position = int(source.path(index).rsplit("/", 1)[1])
            seen.append(position)
            assert source.labels[index] == digits.target[position]
            image = source.read(index)
            assert image.shape == (3, 8, 8) and image.dtype == torch.uint8
            expected = [[round(value * 255 / 16) for value in row] for row in digits.images[position]]
            assert image.tolist() == [expected] * 3
        share = np.bincount(source.labels) / np.bincount(digits.target)
        assert np.abs(share - size / 1797).max() < 0.01
    assert sorted(seen) == list(range(1797))


def test_digits_are_the_same_every_time_and_differ_by_split() -> None:
    first, again, held = opened("digits"), opened("digits"), opened("digits", "val")
    assert first.fingerprint == again.fingerprint != held.fingerprint
    assert [first.path(i) for i in range(5)] == [again.path(i) for i in range(5)]


# --- fashion-mnist


@pytest.mark.parametrize(("suffix", "below"), [("", "FashionMNIST/raw"), (".gz", "")])
def test_fashion_mnist_from_a_root(tmp_path: Path, suffix: str, below: str) -> None:
    written = write_mnist(tmp_path / below, suffix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns about arrays that are not writable
        for split, (images, labels) in written.items():
            source = opened("fashion-mnist", split, root=str(tmp_path), need_labels=True)
            assert source.labels is not None and source.labels.dtype == np.int64
            assert source.labels.tolist() == labels.tolist()
            assert source.class_names is not None and source.class_names[9] == "Ankle boot"
            assert len(source) == len(images)
            for index, image in enumerate(images):
                assert source.read(index).tolist() == [image.tolist()] * 3


def test_fashion_mnist_is_found_in_a_known_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "here", ".gz")
    monkeypatch.setattr(named, "FASHION_MNIST_FOLDERS", (str(tmp_path / "nowhere"), str(tmp_path / "here")))
    assert len(opened("fashion-mnist")) == 20


@pytest.mark.skipif(
    not os.path.isdir("/usr/share/datasets/fashion-mnist"), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_debians_fashion_mnist() -> None:
    source = opened("fashion-mnist", "val")
    assert isinstance(source, ArraySource) and source.labels is not None
    assert len(source) == 10_000
    assert source.images.shape == (10_000, 28, 28)
    assert np.bincount(source.labels).tolist() == [1000] * 10
    assert classes_of(source)[:4] == ["Ankle boot", "Pullover", "Trouser", "Trouser"]


def test_fashion_mnist_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "FASHION_MNIST_FOLDERS", ("/nowhere/a", "/nowhere/b"))
    with pytest.raises(
        DataError, match=r"/nowhere/a, /nowhere/b.*dataset-fashion-mnist.*data\.download=true"
    ) as caught:
        opened("fashion-mnist")
    assert "\n" not in str(caught.value)
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="train-images"):
        opened("fashion-mnist", root=str(tmp_path))
    assert len(opened("fashion-mnist", "val", root=str(tmp_path))) == 10


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("damage", ["cut", "cut in the header", "empty", "longer", "other kind", "flipped"])
def test_damaged_idx_files(tmp_path: Path, suffix: str, damage: str) -> None:
    write_mnist(tmp_path, suffix)
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    content = path.read_bytes()
    if damage == "longer" and suffix:
        content = gzip.compress(gzip.decompress(content) + b"\0")
    broken = {
        "cut": content[: len(content) // 2],
        "cut in the header": content[:7],
        "empty": b"",
        "longer": content if suffix else content + b"\0",
        "other kind": (tmp_path / f"train-labels-idx1-ubyte{suffix}").read_bytes(),
        "flipped": content[:2] + bytes(255 - byte for byte in content[2:]),
    }
    path.write_bytes(broken[damage])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*get the file again") as caught:
        opened("fashion-mnist", root=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_idx_files_that_do_not_fit_each_other(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(19, dtype=np.uint8))
    with pytest.raises(DataError, match="19 labels do not fit the 20 images"):
        opened("fashion-mnist", root=str(tmp_path))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.full(20, 10, dtype=np.uint8))
    with pytest.raises(DataError, match="do not fit"):
        opened("fashion-mnist", root=str(tmp_path))


# --- torchvision


@pytest.mark.parametrize("name", ["FashionMNIST", "mnist"])
def test_torchvision_mnist(tmp_path: Path, name: str) -> None:
    proper = "FashionMNIST" if name == "FashionMNIST" else "MNIST"
    written = write_mnist(tmp_path / proper / "raw")
    for split, (images, labels) in written.items():
        source = opened(f"torchvision:{name}", split, root=str(tmp_path), need_labels=True)
        assert source.name == f"torchvision:{proper}"
        assert source.labels is not None and source.labels.tolist() == labels.tolist()
        assert source.class_names is not None and len(source.class_names) == 10
        assert source.read(3).tolist() == [images[3].tolist()] * 3


def test_torchvision_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: setattr(self, "classes", [f"c{i}" for i in range(10)]))
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    draw = np.random.default_rng(0)
    for file, _ in CIFAR10.train_list + CIFAR10.test_list:
        batch = {"data": draw.integers(0, 256, (2, 3 * 32 * 32), dtype=np.uint8), "labels": [4, 7]}
        (folder / file).write_bytes(pickle.dumps(batch))
    source = opened("torchvision:CIFAR10", "train", root=str(tmp_path))
    assert len(source) == 10
    assert len(opened("torchvision:CIFAR10", "val", root=str(tmp_path))) == 2
    assert source.labels is not None and source.labels.tolist() == [4, 7] * 5
    reference = CIFAR10(str(tmp_path), train=True)
    assert torch.equal(source.read(5), torch.from_numpy(np.array(reference[5][0])).permute(2, 0, 1))


def test_torchvision_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import SVHN

    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    scipy.io.savemat(tmp_path / "test_32x32.mat", {"X": images, "y": np.array([[10], [1], [2], [9]])})
    source = opened("torchvision:svhn", "val", root=str(tmp_path))
    assert source.labels is not None and source.labels.tolist() == [0, 1, 2, 9]  # the files label the digit 0 as 10
    assert source.class_names == [str(digit) for digit in range(10)]
    assert torch.equal(source.read(1), torch.from_numpy(images[..., 1]).permute(2, 0, 1))


def test_torchvision_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import STL10

    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    folder = tmp_path / STL10.base_folder
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    images.transpose(0, 1, 3, 2).tofile(folder / "train_X.bin")  # stored column by column
    np.array([2, 10], dtype=np.uint8).tofile(folder / "train_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"c{i}" for i in range(10)))
    source = opened("torchvision:STL10", root=str(tmp_path))
    assert source.notices == ["torchvision:STL10: the images of its split 'unlabeled' are not used"]
    assert classes_of(source) == ["c1", "c9"]
    assert torch.equal(source.read(1), torch.from_numpy(images[1]))


def test_torchvision_pets_are_decoded_when_read(tmp_path: Path) -> None:
    base = tmp_path / "oxford-iiit-pet"
    write_images(base / "images", "Abyssinian_1.jpg", "beagle_7.jpg")
    (base / "annotations").mkdir()
    (base / "annotations" / "trainval.txt").write_text("Abyssinian_1 1 1 1\nbeagle_7 2 2 1\n")
    source = opened("torchvision:OxfordIIITPet", root=str(tmp_path))
    assert isinstance(source, FileSource) and not source.in_memory
    assert classes_of(source) == ["Abyssinian", "Beagle"]
    assert names(source, tmp_path)[1] == "oxford-iiit-pet/images/beagle_7.jpg"
    assert source.read(1).shape == (3, 3, 4)


def test_torchvision_flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import Flowers102

    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    base = tmp_path / "flowers-102"
    write_images(base / "jpg", "image_00001.jpg", "image_00002.jpg", "image_00003.jpg", "image_00004.jpg")
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array([5, 77, 102, 8])})
    scipy.io.savemat(base / "setid.mat", {"trnid": np.array([3, 1]), "valid": np.array([9]), "tstid": np.array([2, 4])})
    source = opened("torchvision:Flowers102", root=str(tmp_path))
    assert source.labels is not None and source.labels.tolist() == [101, 4]
    assert names(source, tmp_path) == ["flowers-102/jpg/image_00003.jpg", "flowers-102/jpg/image_00001.jpg"]
    assert names(opened("torchvision:Flowers102", "val", root=str(tmp_path)), tmp_path) == [
        "flowers-102/jpg/image_00002.jpg",
        "flowers-102/jpg/image_00004.jpg",
    ]


def test_torchvision_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not found.*--set data\.download=true fetches it") as caught:
        opened("torchvision:CIFAR10", root=str(tmp_path))
    assert "\n" not in str(caught.value)
    write_mnist(tmp_path / "MNIST" / "raw")
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    with pytest.raises(DataError, match=f"torchvision:MNIST: {tmp_path}"):
        opened("torchvision:MNIST", root=str(tmp_path))
