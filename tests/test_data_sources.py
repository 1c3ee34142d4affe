import gzip
import multiprocessing
import os
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from numpy.typing import NDArray
from PIL import Image

from mimref.config import DataConfig
from mimref.data import named, sources
from mimref.data.sources import ArraySource, FileSource, ImageSource, open_source
from mimref.errors import ConfigError, DataError

Pixels = NDArray[np.uint8]


def write_images(folder: Path, *names: str, shade: int = 0) -> None:
    for offset, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (shade + offset, 1, 2)).save(path)


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


def opened(spec: object, split: Any = "train", *, need_labels: bool = False, **settings: Any) -> ImageSource:
    return open_source(DataConfig(spec=str(spec), **settings), split, need_labels=need_labels)


def names(source: ImageSource, root: Path) -> list[str]:
    return [Path(source.path(index)).relative_to(root).as_posix() for index in range(len(source))]


def classes_of(source: ImageSource) -> list[str]:
    assert source.labels is not None and source.class_names is not None
    return [source.class_names[label] for label in source.labels]


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


def test_changing_a_read_image_leaves_the_source_alone() -> None:
    source = opened("digits")
    before = source.read(0).clone()
    image = source.read(0)
    image[0] = 77
    assert (image[1] == before[1]).all()  # the three channels do not share memory
    assert torch.equal(source.read(0), before)


# --- fashion-mnist


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
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


# --- torchvision


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "mnist"])
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
    assert source.labels is not None and source.labels.tolist() == [0, 1, 2, 9]  # the files say 10 for the digit 0
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


# --- folders


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
    assert classes_of(val) == ["cat", "dog"]  # in train's numbers: cat-big has no validation image
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
    write_images(tmp_path / "val", "images/d.png")  # a single subfolder is no set of classes
    train, val = opened(tmp_path), opened(tmp_path, "val")
    assert names(train, tmp_path) == ["train/a.png", "train/b.png", "train/more/c.png"]
    assert names(val, tmp_path) == ["val/images/d.png"]
    assert train.labels is val.labels is None and train.class_names is None
    with pytest.raises(DataError, match=r"train images have no labels.*train/ and val/"):
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
    with pytest.raises(DataError, match=r"val images have no labels.*make train/ and val/"):
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
    with pytest.raises(sources.BadImage, match=r"self\.png"):
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


@pytest.mark.skipif(os.name == "nt", reason="file names are Unicode there")
def test_odd_file_names(tmp_path: Path) -> None:
    write_images(tmp_path, "two\nlines.png", "ünï.png")
    try:
        os.rename(tmp_path / "ünï.png", os.fsencode(tmp_path) + b"/\xff.png")
    except OSError:
        pytest.skip("this file system wants UTF-8")
    source = opened(tmp_path)
    assert [os.path.basename(source.path(i)) for i in range(2)] == ["two\\nlines.png", "\\udcff.png"]
    assert source.read(0).shape == source.read(1).shape == (3, 3, 4)
    assert source.fingerprint


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_images(tmp_path / "pictures", "a.png")
    assert len(opened("~/pictures")) == 1


def test_fingerprint_follows_names_sizes_and_times(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    first = opened(tmp_path).fingerprint
    assert opened(tmp_path).fingerprint == first
    os.utime(tmp_path / "a.png", (1, 1))
    touched = opened(tmp_path).fingerprint
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert len({first, touched, opened(tmp_path).fingerprint}) == 3


def test_fingerprint_does_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    write_images(tmp_path / "one", "a.png")
    first = opened(tmp_path / "one").fingerprint
    (tmp_path / "one").rename(tmp_path / "two")
    assert opened(tmp_path / "two").fingerprint == first


def test_sources_cross_process_borders(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    for spec in ("digits", tmp_path):
        source = opened(spec)
        copy = multiprocessing.reduction.ForkingPickler.loads(multiprocessing.reduction.ForkingPickler.dumps(source))
        assert torch.equal(copy.read(0), source.read(0))
        assert copy.fingerprint == source.fingerprint


# --- data.train_limit


def take_turns(labels: list[int], limit: int) -> list[int]:
    """One image of every class in turn, in data order: a plain loop."""
    waiting = {label: [i for i, each in enumerate(labels) if each == label] for label in sorted(set(labels))}
    taken: list[int] = []
    while len(taken) < limit:
        for queue in waiting.values():
            if queue and len(taken) < limit:
                taken.append(queue.pop(0))
    return sorted(taken)


@pytest.mark.parametrize("limit", [1, 4, 10, 99, 100, 1436, 1437])
def test_limit_takes_classes_in_turn(limit: int) -> None:
    whole, cut = opened("digits"), opened("digits", train_limit=limit)
    assert whole.labels is not None and cut.labels is not None
    kept = take_turns(whole.labels.tolist(), limit)
    assert cut.labels.tolist() == whole.labels[kept].tolist()
    assert [cut.path(i) for i in range(limit)] == [whole.path(i) for i in kept]
    assert all(torch.equal(cut.read(i), whole.read(k)) for i, k in enumerate(kept[:20]))


def test_limit_with_a_class_that_runs_out(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "a/1.png", *(f"b/{i}.png" for i in range(5)), *(f"c/{i}.png" for i in range(3)))
    write_images(tmp_path / "val", *(f"a/{i}.png" for i in range(9)))
    assert names(opened(tmp_path, train_limit=6), tmp_path / "train") == [
        "a/1.png",
        "b/0.png",
        "b/1.png",
        "b/2.png",
        "c/0.png",
        "c/1.png",
    ]
    assert len(opened(tmp_path, "val", train_limit=6)) == 9


def test_limit_without_labels_is_the_first_images(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"{i}.png" for i in range(5)))
    assert names(opened(tmp_path, train_limit=2), tmp_path) == ["0.png", "1.png"]


def test_limit_beyond_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"data\.train_limit is 1438, but there are 1437 training images"):
        opened("digits", train_limit=1438)


# --- specs that are wrong


def test_no_spec() -> None:
    with pytest.raises(ConfigError, match="give --data"):
        open_source(DataConfig(), "train")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digts", "did you mean 'digits'"),
        ("fashion_mnist", "did you mean 'fashion-mnist'"),
        ("/no/such/folder", r"/no/such/folder: no such folder or data set \(accepted: a folder, digits, fashion-mnist"),
        ("wds:shards.tar", "no such shard: shards.tar"),
        ("hf:folder", "no such folder"),
        ("list:a.csv", "cannot be read"),
        ("", "no such folder"),
        ("torchvision:cifar11", "cifar11: unknown data set; did you mean 'cifar10'.*known: CIFAR10, CIFAR100"),
        ("torchvision:MNIST", r"needs the folder of its files: --set data\.root=FOLDER"),
    ],
)
def test_wrong_spec(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        opened(spec)
    assert "\n" not in str(caught.value)


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
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*get the file anew") as caught:
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


def test_torchvision_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not found.*--set data\.download=true fetches it") as caught:
        opened("torchvision:CIFAR10", root=str(tmp_path))
    assert "\n" not in str(caught.value)
    write_mnist(tmp_path / "MNIST" / "raw")
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    with pytest.raises(DataError, match="torchvision:MNIST in"):
        opened("torchvision:MNIST", root=str(tmp_path))
