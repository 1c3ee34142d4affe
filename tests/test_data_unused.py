"""Nothing is dropped silently: formats, leftovers, folders beside the splits, spellings of classes."""

import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from mimref.data.index import cache as index_cache
from mimref.data.sources import ImageSource
from mimref.data.suffixes import image_suffixes, unused_kind
from mimref.errors import Checks, ConfigError, DataError
from mimref.features.opening import open_encoders
from tests.sources import classes_of, names, opened, write_images

NFC, NFD = unicodedata.normalize("NFC", "Übung"), unicodedata.normalize("NFD", "Übung")


def write(folder: Path, *files: str, content: bytes = b"content") -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def notices(source: ImageSource, root: Path) -> list[str]:
    return [notice.replace(str(root), "ROOT") for notice in source.notices]


# --- formats


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (".jfif", "JPEG"),
        (".JPE", "JPEG"),
        (".tga", "TGA"),
        (".pbm", "PPM"),
        (".pnm", "PPM"),
        (".dib", "DIB"),
        (".apng", "PNG"),
        (".ico", "ICO"),
        (".pcx", "PCX"),
        (".mpo", "MPO"),
        pytest.param(".jp2", "JPEG2000", marks=pytest.mark.skipif(not features.check("jpg_2000"), reason="no codec")),
        pytest.param(
            ".avif",
            "AVIF",
            marks=pytest.mark.skipif("AVIF" not in Image.OPEN and not features.check("avif"), reason="no codec"),
        ),
    ],
)
def test_what_pillow_opens_is_used(tmp_path: Path, suffix: str, kind: str) -> None:
    shade = 255 if suffix == ".pbm" else 200
    pixels = np.full((16, 16, 3), shade, dtype=np.uint8)
    mode = "1" if suffix == ".pbm" else "RGB"
    Image.fromarray(pixels).convert(mode).save(tmp_path / f"a{suffix}", format=kind)
    source = opened(tmp_path)
    assert names(source, tmp_path) == [f"a{suffix}"] and not source.notices
    assert abs(source.read(0).float().mean().item() - shade) < 3


def test_formats_that_are_no_still_images_are_left_out() -> None:
    suffixes = image_suffixes()
    assert suffixes >= {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
    assert not suffixes & {".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".h5", ".grib", ".wmf", ".svg", ".txt", ""}


def test_files_that_could_be_images_are_counted_by_kind(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "a/0.png", "b/0.png")
    write_images(tmp_path / "val", "a/0.png", "b/0.png")
    write(tmp_path / "train", "a/1.HEIC", "a/2.heic", "b/3.svg", "b/deep/photo", "b/4.jpg~", "b/5.npy", "b/6.dcm")
    source = opened(tmp_path)
    (notice,) = notices(source, tmp_path)
    kinds = "2 .heic, 1 .dcm, 1 .jpg~, 1 .npy, 1 .svg, 1 of other kinds"
    assert notice == f"ROOT/train: 7 files are not used: {kinds}"
    assert len(source) == 2 and not opened(tmp_path, "val").notices


def test_leftovers_are_no_images_and_not_worth_a_word(tmp_path: Path) -> None:
    write_images(tmp_path, "a/0.png", "b/0.png", ".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/a/0.png")
    write_images(tmp_path, "a/@eaDir/0.png/THUMB.jpg", "$RECYCLE.BIN/0.png", "lost+found/0.png", ".hidden/0.png")
    write(tmp_path, "a/.DS_Store", "a/._0.png", "a/Thumbs.db", "b/desktop.ini", "b/notes.TXT", "b/0.json", "README")
    write(tmp_path, "Icon\r", "b/LICENSE", "b/0.xml")
    source = opened(tmp_path)
    assert source.notices == [] and classes_of(source) == ["a", "b"]


def test_a_folder_of_other_files_alone_says_which(tmp_path: Path) -> None:
    write(tmp_path, "a/1.heic", "a/2.heic", "b/3.cr2")
    with pytest.raises(DataError, match=r"no images in .*; it holds 2 \.heic, 1 \.cr2; convert"):
        opened(tmp_path)


def test_listings_are_saved_with_what_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "SAVE_FROM_IMAGES", 1)
    write_images(tmp_path, "a/0.png", "b/0.png")
    write(tmp_path, "b/1.heic", "b/2.jp2")
    for folder, _, _ in os.walk(tmp_path):
        os.utime(folder, (978_307_200, 978_307_200))
    first = opened(tmp_path)
    assert opened(tmp_path).notices == first.notices != []
    # With another Pillow, which reads fewer formats, the folder is listed again.
    from mimref.data import suffixes
    from mimref.data.readers import folder as reader

    fewer = frozenset([".png"])
    for module in (suffixes, reader):
        monkeypatch.setattr(module, "image_suffixes", lambda **_: fewer)
    assert len(first) == 3 and len(opened(tmp_path)) == 2
    assert "2 files are not used" in opened(tmp_path).notices[0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.heic", ".heic"),
        ("A.Jxl", ".jxl"),
        ("a/b.c/photo", "without a suffix"),
        ("photo.", "without a suffix"),
        ("v1.some words that are no suffix", "without a suffix"),
        ("x.\x1b[31m", ".\x1b[31m"),
        ("README", None),
        ("README.md", None),
        (".hidden.heic", None),
        (".photo.jpg.icloud", ".icloud"),
        ("labels.csv", None),
    ],
)
def test_kinds_of_files(name: str, kind: str | None) -> None:
    assert unused_kind(name) == kind


def test_odd_suffixes_are_escaped(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    write(tmp_path, "b.\x1b[31m", os.fsdecode(b"c.\xff"))
    (notice,) = opened(tmp_path).notices
    assert "\x1b" not in notice and notice.isprintable()


# --- images beside splits and classes


def test_images_beside_the_splits(tmp_path: Path) -> None:
    for name in ("train/a/0.png", "train/b/0.png", "test/a/0.png", "val/a/0.png", "extra/deep/er/0.png", "top.png"):
        write_images(tmp_path, name)
    write(tmp_path, "annotations/0.xml", "1.heic")
    assert notices(opened(tmp_path), tmp_path) == [
        "ROOT: 1 image beside its splits is not used",
        "ROOT: images in extra/ are not used, only those in train/ and val/ or test/",
        "ROOT: 1 file is not used: 1 .heic",
    ]
    write_images(tmp_path / "two" / "train", "a/0.png", "b/0.png")
    write_images(tmp_path / "two" / "valid", "a/0.png", "b/0.png")
    with pytest.raises(DataError, match=r"no val/ or test/ \(it has valid/\)"):
        opened(tmp_path / "two", "val")


def test_images_beside_class_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "a/0.png", "b/0.png", "stray.png", "other.png")
    source = opened(tmp_path)
    (notice,) = notices(source, tmp_path)
    assert source.labels is None and len(source) == 4
    assert "2 images lie beside its 2 folders" in notice
    with pytest.raises(DataError, match=r"2 images lie beside its 2 folders of images; move them into class folders"):
        opened(tmp_path, need_labels=True)


def test_classes_named_like_splits(tmp_path: Path) -> None:
    write_images(tmp_path, "Train/0.png", "validation/0.png")
    source = opened(tmp_path)
    assert classes_of(source) == ["Train", "validation"]
    assert notices(source, tmp_path)[0].startswith("ROOT: Train/, validation/ are taken for classes; splits are named")


def test_notices_are_given_once_per_data_set(tmp_path: Path, weights: Path) -> None:
    from mimref.config.base import DataConfig
    from mimref.evaluation.knn.config import KnnConfig
    from mimref.progress import Silent

    write_images(tmp_path / "data", "0.png", "1.png")
    write(tmp_path / "data", "2.heic")
    heard: list[str] = []

    class Heard(Silent):
        def warn(self, message: str) -> None:
            heard.append(message)

    config = KnnConfig(checkpoint=str(weights), data=DataConfig(spec=str(tmp_path / "data")), device="cpu")
    shutil.copy(weights, tmp_path / "other.safetensors")
    both = [config.checkpoint, str(tmp_path / "other.safetensors")]
    open_encoders(config, both, Heard(), Checks(), "checkpoints", need_labels=False)
    assert heard == [f"{tmp_path}/data: 1 file is not used: 1 .heic"]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    from tests.tiny import write_weights

    return write_weights(tmp_path / "base.safetensors")


# --- classes


def test_numbered_folders_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    write_images(tmp_path / "train", *(f"{name}/0.png" for name in ("0", "1", "2", "10")))
    write_images(tmp_path / "val", "10/0.png", "2/0.png")
    train, val = opened(tmp_path), opened(tmp_path, "val")
    assert train.class_names == ["0", "1", "2", "10"]
    assert classes_of(train) == [Path(name).parent.name for name in names(train, tmp_path)]
    assert classes_of(val) == ["10", "2"]


@pytest.mark.parametrize(("of_train", "of_val"), [(NFC, NFD), (NFD, NFC)])
def test_spellings_of_one_folder_are_one_class(tmp_path: Path, of_train: str, of_val: str) -> None:
    write_images(tmp_path / "train", f"{of_train}/0.png", "a/0.png", shade=10)
    write_images(tmp_path / "val", f"{of_val}/0.png", "a/0.png", shade=20)
    train, val = opened(tmp_path), opened(tmp_path, "val")
    assert train.class_names == val.class_names == ["a", NFC]
    for source, shade in ((train, 10), (val, 20)):  # files keep their own names
        of_shade = dict(zip(classes_of(source), (source.read(index)[0, 0, 0].item() for index in (0, 1)), strict=True))
        assert of_shade == {NFC: shade, "a": shade + 1}


def test_two_spellings_in_one_split_are_one_class(tmp_path: Path) -> None:
    write_images(tmp_path, f"{NFC}/0.png", f"{NFD}/1.png", "a/0.png")
    source = opened(tmp_path)
    assert sorted(classes_of(source)) == ["a", NFC, NFC]
    (notice,) = source.notices
    assert NFC in notice and "spelling" in notice


def test_unknown_classes_are_refused_with_the_nearest(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "cat/0.png", "dog/0.png")
    write_images(tmp_path / "val", "Cat/0.png")
    with pytest.raises(DataError, match=r"class 'Cat' of val/ is not in train/; did you mean 'cat'\?"):
        opened(tmp_path, "val")


def test_letters_that_look_alike_are_told_apart(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "cat/0.png", "dog/0.png")
    write_images(tmp_path / "val", "c\u0430t/0.png")
    with pytest.raises(DataError, match=r"did you mean 'cat'\? \(it is written 'c\\u0430t'\)"):
        opened(tmp_path, "val")


def test_classes_whose_images_cannot_be_used_are_not_called_missing(tmp_path: Path) -> None:
    write_images(tmp_path / "train", "cat/0.png", "dog/0.png")
    write_images(tmp_path / "val", "gnu/0.png")
    write(tmp_path / "train", "gnu/0.heic")
    with pytest.raises(DataError, match="class 'gnu' of val/ has no images in train/"):
        opened(tmp_path, "val")


@pytest.mark.parametrize("setting", ["image", "label"])
def test_columns_of_a_folder(tmp_path: Path, setting: str) -> None:
    write_images(tmp_path, "0.png")
    settings: dict[str, Any] = {setting: "x"}
    with pytest.raises(ConfigError, match=f"data.{setting} names a column of list: and hf:"):
        opened(tmp_path, **settings)
