"""Pairs of images and masks: folder layouts, Hugging Face tables, mosaics, codings, and mistakes in the data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mimref.config.base import DataConfig
from mimref.config.masks import MasksConfig, MosaicsConfig
from mimref.data.masks.check import check_pairs
from mimref.data.masks.layouts import VOC_CLASSES
from mimref.data.masks.open import open_pairs
from mimref.data.masks.sources import UNLABELLED, Coding, Pairs, decode_mask
from mimref.data.sources import Split
from mimref.errors import Checks, ConfigError, DataError
from tests.pairs import read_pair, write_pair, write_pairs

SPLITS: tuple[Split, ...] = ("train", "val")


def pairs_of(spec: str | Path, split: Split = "train", *, limit: int | None = None, **masks: int) -> Pairs:
    data = DataConfig(spec=str(spec), train_limit=limit)
    return open_pairs(data, MasksConfig(**masks), MosaicsConfig(train=5, val=3), split)


def checked(root: Path | str, **masks: int) -> tuple[dict[Split, Pairs], list[str]]:
    """The pairs of both splits, and the mistakes that a check finds in them."""
    pairs: dict[Split, Pairs] = {split: pairs_of(root, split, **masks) for split in SPLITS}
    checks = Checks()
    check_pairs(pairs, checks)
    try:
        checks.finish()
    except DataError as error:
        return pairs, [str(error)]
    except Exception as error:
        return pairs, str(error).splitlines()
    return pairs, []


# --- layouts


def arrange(root: Path, layout: str) -> Path:
    """Write 12 training and 4 validation pairs in a layout."""
    for word, count in (("train", 12), ("val", 4)):
        folders = {
            "split first": (root / word / "images", root / word / "masks"),
            "split last": (root / "images" / word, root / "masks" / word),
            "labels": (root / word / "images", root / word / "labels"),
        }[layout]
        for number in range(count):
            write_pair(*folders, f"deep/{word}{number}")
    return root


@pytest.mark.parametrize("layout", ["split first", "split last", "labels"])
def test_folders_with_splits(layout: str, tmp_path: Path) -> None:
    arrange(tmp_path, layout)
    for split, count in (("train", 12), ("val", 4)):
        pairs = pairs_of(tmp_path, split)  # type: ignore[arg-type]
        assert len(pairs) == count and not pairs.notices
        for index in range(count):
            image, mask = read_pair(pairs, index)
            path = Path(pairs.images.path(index))
            assert torch.equal(image, torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1))
            own = Path(pairs.masks.path(index))
            assert own.name == path.name and np.array_equal(np.asarray(Image.open(own)), mask)
    found, mistakes = checked(tmp_path)
    assert mistakes == [] and [each.classes for each in found.values()] == [3, 3]


def test_pairs_without_splits_are_divided(tmp_path: Path) -> None:
    for number in range(11):
        write_pair(tmp_path / "images", tmp_path / "masks", f"{number:02}")
    paths = {
        split: {pairs.images.path(index) for index in range(len(pairs))}
        for split in SPLITS
        if (pairs := pairs_of(tmp_path, split))
    }
    assert len(paths["train"]) == 9 and len(paths["val"]) == 2 and not paths["train"] & paths["val"]
    assert "2 of the 11 pairs" in pairs_of(tmp_path).notices[0]
    assert [pairs_of(tmp_path).images.path(n) for n in range(9)] == sorted(paths["train"])


def test_ade20k(tmp_path: Path) -> None:
    for word, count in (("training", 3), ("validation", 2)):
        for number in range(count):
            write_pair(tmp_path / "images" / word, tmp_path / "annotations" / word, f"ADE_{number}", classes=151)
    train, val = (pairs_of(tmp_path, split) for split in SPLITS)
    assert (len(train), len(val)) == (3, 2) and train.classes == val.classes == 150
    mask = train.read(0)[1]
    stored = np.asarray(Image.open(train.masks.path(0))).astype(int)
    assert np.array_equal(mask, np.where(stored == 0, UNLABELLED, stored - 1))
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{n}\t0\t1\t1\t1\tname {n}, other" for n in range(1, 151))]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(lines))
    assert pairs_of(tmp_path).class_names[149] == "name 150"


def test_own_masks_in_folders_of_ade20ks_names(tmp_path: Path) -> None:
    for word in ("training", "validation"):
        write_pair(tmp_path / "images" / word, tmp_path / "annotations" / word, "a", classes=3)
    (notice,) = pairs_of(tmp_path).notices
    assert "ADE20K" in notice and pairs_of(tmp_path, classes=150).classes == 150
    stored = np.asarray(Image.open(tmp_path / "annotations/training/a.png"))
    own = [(pairs_of(tmp_path, classes=3), ["0", "1", "2"]), (pairs_of(tmp_path, first=0), [])]
    (tmp_path / "classes.txt").write_text("x\ny\nz")
    for pairs, names in (*own, (pairs_of(tmp_path), ["x", "y", "z"])):
        assert (pairs.class_names, pairs.notices) == (names, []) and np.array_equal(pairs.read(0)[1], stored)


def test_pascal_voc(tmp_path: Path) -> None:
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "SegmentationClass").mkdir()
    values = np.array([[0, 20], [7, 255]], dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    for name in ("a", "b", "c", "unused"):
        Image.new("RGB", (16, 16), "red").save(tmp_path / "JPEGImages" / f"{name}.jpg")
        mask = Image.fromarray(values, mode="P")
        mask.putpalette([255 - n // 3 for n in range(768)])
        mask.save(tmp_path / "SegmentationClass" / f"{name}.png")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a\nb\n")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("c\n")
    (train, val), mistakes = (found := checked(tmp_path))[0].values(), found[1]
    assert mistakes == [] and (len(train), len(val)) == (2, 1) and train.class_names == list(VOC_CLASSES)
    assert np.array_equal(train.read(1)[1], np.where(values == 255, UNLABELLED, values.astype(int)))
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("c\nd\n")
    with pytest.raises(DataError, match=r"1 of 2 images have no mask.*: d;"):
        pairs_of(tmp_path, "val")


@pytest.mark.parametrize("name", ["mask", "label", "chosen"])
def test_hugging_face(name: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write_pairs(tmp_path / "files")
    splits = {}
    for split, word in (("train", "train"), ("val", "validation")):
        folders = [tmp_path / "files" / split / part for part in ("images", "masks")]
        columns = {
            column: [str(path) for path in sorted(folder.iterdir())]
            for column, folder in zip(("image", name), folders, strict=True)
        }
        table = datasets.Dataset.from_dict(columns)
        splits[word] = table.cast_column("image", datasets.Image()).cast_column(name, datasets.Image())
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    spec = f"hf:{tmp_path / 'saved'}"
    if name == "chosen":
        with pytest.raises(DataError, match=r"data\.label"):
            pairs_of(spec)
    data = DataConfig(spec=spec, label="chosen" if name == "chosen" else None)
    for split in SPLITS:
        pairs = open_pairs(data, MasksConfig(), MosaicsConfig(), split)
        plain = pairs_of(tmp_path / "files", split)
        assert len(pairs) == len(plain)
        for index in range(len(plain)):
            assert all(map(torch.equal, read_pair(pairs, index), read_pair(plain, index)))


def test_train_limit_and_names(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    assert len(pairs_of(tmp_path, limit=5)) == 5
    with pytest.raises(ConfigError, match=r"data\.train_limit is 50.*12"):
        pairs_of(tmp_path, limit=50)
    (tmp_path / "classes.txt").write_text("sky\nsea\n\nsand\n")
    assert pairs_of(tmp_path).class_names == ["sky", "sea", "sand"]
    with pytest.raises(DataError, match=r"3 classes, masks\.classes is 4"):
        pairs_of(tmp_path, classes=4)


# --- values


def test_codings() -> None:
    values = np.array([[0, 1, 2], [3, 254, 255]], dtype=np.uint8)
    assert Coding().labels(values, "m").tolist() == [[0, 1, 2], [3, 254, -1]]
    assert Coding(first=2, ignore=3).labels(values, "m").tolist() == [[-1, -1, 0], [-1, 252, 253]]
    with pytest.raises(DataError, match="m: value 70000"):
        Coding().labels(np.array([[70000]]), "m")


@pytest.mark.parametrize(("mode", "kind"), [("1", bool), ("L", np.uint8), ("P", np.uint8), ("I;16", np.uint16)])
def test_masks_keep_their_values(mode: str, kind: type, tmp_path: Path) -> None:
    values = (
        (np.arange(12).reshape(3, 4) % 2).astype(kind) if kind is bool else np.arange(12).reshape(3, 4).astype(kind)
    )
    image = Image.fromarray(values) if mode in ("1", "I;16") else Image.frombytes(mode, (4, 3), values.tobytes())
    if mode == "P":
        image.putpalette([n * 7 % 256 for n in range(768)])
    image.save(tmp_path / "mask.png")
    assert np.array_equal(decode_mask(str(tmp_path / "mask.png"), "m"), values)


# --- what is wrong


def spoil_size(root: Path) -> list[str]:
    Image.new("L", (8, 9)).save(root / "train/masks/train03.png")
    return ["train03.png", "8 x 9", "20 x 16"]


def spoil_class(root: Path) -> list[str]:
    Image.new("L", (20, 16), 200).save(root / "val/masks/val01.png")
    return ["val01.png", "value 200", "3 classes"]


def spoil_colour(root: Path) -> list[str]:
    Image.new("RGB", (20, 16)).save(root / "train/masks/train01.png")
    return ["train01.png", "colour", "PNG"]


def spoil_file(root: Path) -> list[str]:
    (root / "val/masks/val00.png").write_bytes(b"\x89PNG damaged")
    return ["val00.png", "cannot be read"]


@pytest.mark.parametrize("spoil", [spoil_size, spoil_class, spoil_colour, spoil_file])
def test_mistakes_name_file_and_value(spoil: Callable[[Path], list[str]], tmp_path: Path) -> None:
    write_pairs(tmp_path)
    words = spoil(tmp_path)
    (mistake,) = checked(tmp_path)[1]
    assert all(word in mistake for word in words), mistake


def test_mistakes_are_listed_together(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    words = [*spoil_size(tmp_path), *spoil_class(tmp_path), *spoil_colour(tmp_path)]
    found = checked(tmp_path)[1]
    assert len(found) == 3 and all(word in "\n".join(found) for word in words)
    for path in (tmp_path / "train/masks").iterdir():
        Image.new("L", (5, 5)).save(path)
    assert [line for line in checked(tmp_path, classes=300)[1] if "7 more of the 12" in line]


def test_masks_without_classes(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    for path in (tmp_path / "val/masks").iterdir():
        Image.new("L", (20, 16), 255).save(path)
    (mistake,) = checked(tmp_path)[1]
    assert "none of the 4 masks" in mistake and "masks.ignore" in mistake
    for path in (tmp_path / "train/masks").iterdir():
        Image.new("L", (20, 16), 0).save(path)
    assert "one class" in checked(tmp_path)[1][0]


def test_missing_masks_and_folders(tmp_path: Path) -> None:
    write_pairs(tmp_path / "a")
    (tmp_path / "a/train/masks/train02.png").unlink()
    with pytest.raises(DataError, match=r"1 of 12 images have no mask in .*a/train/masks: train02\.png"):
        pairs_of(tmp_path / "a")
    write_pair(tmp_path / "a/val/masks", tmp_path / "a/val/masks", "spare")
    assert "1 masks without an image" in pairs_of(tmp_path / "a", "val").notices[0]
    write_pairs(tmp_path / "b", val=0)
    with pytest.raises(DataError, match="has train but no val"):
        pairs_of(tmp_path / "b", "val")
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match="no images with masks"):
        pairs_of(tmp_path / "c")
    with pytest.raises(DataError, match="no such folder"):
        pairs_of("nowhere")


# --- mosaics


def test_mosaics_are_fixed_and_apart() -> None:
    train, again, val = pairs_of("digits"), pairs_of("digits"), pairs_of("digits", "val")
    assert (len(train), len(val)) == (5, 3) and train.fingerprint == again.fingerprint != val.fingerprint
    assert train.class_names == [*map(str, range(10)), "ground"]
    image, mask = read_pair(train, 0)
    assert image.shape == (3, 32, 32) and mask.shape == (32, 32)
    assert torch.equal(image[0], image[1]) and 0 <= int(mask.min()) <= int(mask.max()) == 10
    # Objects cover the ground only with pixels brighter than their threshold.
    assert int(image[0][mask < 10].min()) > 48 and int(image[0][mask == 10].max()) < 160
    more = open_pairs(DataConfig(spec="digits"), MasksConfig(), MosaicsConfig(train=8), "train")
    assert torch.equal(read_pair(more, 4)[0], read_pair(train, 4)[0])
