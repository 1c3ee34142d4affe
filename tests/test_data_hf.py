"""Hugging Face data sets, on disk and (with a stand-in for the download) on the hub."""

import io
import json
import logging
import multiprocessing
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mimref.config.base import DataConfig
from mimref.data.decode import BadImage
from mimref.data.loader import view_batches
from mimref.data.open import absolute_spec, open_source
from mimref.data.sources import EncodedSource
from mimref.data.views import CropGroup
from mimref.errors import DataError
from tests.hf_tables import (
    CLASSES,
    STRUCT,
    labels_of,
    numbers,
    opened,
    png,
    refused,
    table,
    write_as,
    write_parquet,
    write_saved,
    write_splits,
)


@pytest.mark.parametrize(("kind", "struct", "held"), [("arrow", True, "validation"), ("parquet", False, "test")])
def test_splits_rows_and_labels(tmp_path: Path, kind: str, struct: bool, held: str) -> None:
    folder = tmp_path / "set[1]*"
    labels = [number % 3 for number in range(23)]
    train = [
        table(range(first, end), labels=labels[first:end], struct=struct)
        for first, end in ((0, 10), (10, 11), (11, 23))
    ]
    write_as(kind, folder, train, [table([300, 301], labels=[1, 1], struct=struct)], held)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    source, val = opened(folder), opened(folder, "val")
    assert numbers(source) == list(range(23)) and numbers(val) == [300, 301]
    assert source.class_names == val.class_names == CLASSES
    assert labels_of(source) == [CLASSES[label] for label in labels] and labels_of(val) == ["dog", "dog"]
    assert source.path(12) == f"{folder}/train[12]"
    assert not source.in_memory and isinstance(source, EncodedSource)
    # The library writes nothing beside the user's files.
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_one_set_for_both(tmp_path: Path, kind: str) -> None:
    content = table(range(5), labels=[0, 1, 2, 0, 1])
    if kind == "arrow":
        write_saved(tmp_path, content)
    else:
        write_parquet(tmp_path / "images.parquet", content)
    assert labels_of(opened(tmp_path)) == ["cat", "dog", "ant", "cat", "dog"]
    held = opened(tmp_path, "val")
    assert numbers(held) == list(range(5)) and held.labels is None and held.path(2) == f"{tmp_path}[2]"
    with pytest.raises(DataError, match="val images have no labels"):
        open_source(DataConfig(spec=f"hf:{tmp_path}"), "val", need_labels=True)


@pytest.mark.parametrize(
    "files",
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet", "extra-00000-of-00009.parquet"),
        ("train/0000.parquet", "validation/0000.parquet", "other/0000.parquet"),
        ("data/mnist_train.parquet", "data/mnist_test.parquet", "notes.parquet"),
        ("train-00000-of-00001-a0c1d2.parquet", "valid.parquet", ".hidden.parquet"),
    ],
)
def test_names_of_parquet_files(tmp_path: Path, files: tuple[str, str, str]) -> None:
    for number, file in enumerate(files):
        write_parquet(tmp_path / file, table([number]))
    assert numbers(opened(tmp_path)) == [0] and numbers(opened(tmp_path, "val")) == [1]


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_limit_processes_and_fingerprints(tmp_path: Path, kind: str) -> None:
    write_as(kind, tmp_path, [table(range(9), labels=[0] * 6 + [1] * 3)], [table([1])])
    source = opened(tmp_path, train_limit=4)
    assert numbers(source) == [0, 1, 6, 7] and labels_of(source) == ["cat", "cat", "dog", "dog"]
    copy = pickle.loads(pickle.dumps(source))
    assert numbers(copy) == numbers(source) and copy.fingerprint == source.fingerprint
    whole = opened(tmp_path)
    assert whole.fingerprint not in (source.fingerprint, opened(tmp_path, "val").fingerprint)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(numbers, (source,)) == numbers(source)
    changed = next(path for path in tmp_path.rglob("*train*") if path.is_file() or kind == "arrow")
    for file in changed.glob("*.arrow") if kind == "arrow" else [changed]:
        os.utime(file, (1, 1))
    assert opened(tmp_path).fingerprint != whole.fingerprint


def test_changed_parquet_files_are_read_again(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", table([1, 2]))
    assert numbers(opened(tmp_path)) == [1, 2]
    write_parquet(tmp_path / "train.parquet", table([3, 4]))
    assert numbers(opened(tmp_path)) == [3, 4]


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_every_row_once_per_epoch(tmp_path: Path, kind: str) -> None:
    write_as(kind, tmp_path, [table(range(7)), table(range(7, 24))], [table([0])])
    source = opened(tmp_path)
    source.read(3)
    batches = view_batches(source, [CropGroup(1, 8, (0.5, 1.0))], batch_size=6, seed=0, epochs=range(2), workers=2)
    seen = [batch.crops[0][:, 0, 0, 0, 0].tolist() for batch in batches]
    for epoch in (seen[:4], seen[4:]):
        assert sorted(number for batch in epoch for number in batch) == list(range(24))


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_images_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    none = [None] if kind == "parquet" else []  # save_to_disk refuses None
    write_as(kind, tmp_path, [table([b"", b"text", png(1)[:50], 5, *none])], [table([0])])
    source = opened(tmp_path)
    assert int(source.read(3)[0, 0, 0]) == 5
    for index, reason in enumerate(("empty file", "not an image", ".", "", r"4\.png")):
        if reason and index < len(source):
            with pytest.raises(BadImage, match=reason) as caught:
                source.read(index)
            assert caught.value.path == source.path(index) and "\n" not in str(caught.value)


# --- data sets on the hub


def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    write_splits(tmp_path / "cache", train=[table(range(4), labels=[0, 1, 2, 0])], test=[table([9], labels=[1])])
    Image.new("RGB", (4, 3), (5, 0, 0)).save(tmp_path / "downloaded.png")
    asked: list[str] = []

    def load_dataset(name: str, **_: Any) -> Any:
        asked.append(name)
        return datasets.load_from_disk(str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, val = opened("owner/cifar10"), opened("owner/cifar10", "val")
    assert asked == ["owner/cifar10"] * 2
    assert numbers(train) == [0, 1, 2, 3] and labels_of(train) == ["cat", "dog", "ant", "cat"]
    assert numbers(val) == [9] and labels_of(val) == ["dog"]
    assert (train.path(2), val.path(0)) == ("owner/cifar10/train[2]", "owner/cifar10/test[0]")
    assert train.fingerprint == opened("owner/cifar10").fingerprint != val.fingerprint
    # Cells that hold the paths of files that the library has downloaded one by one.
    cells = pa.array([{"bytes": None, "path": str(tmp_path / "downloaded.png")}], STRUCT)
    write_saved(tmp_path / "cache" / "train", pa.table({"image": cells}))
    assert numbers(opened("cifar10")) == [5]
    # Names stay unchanged, unless a folder of that name exists.
    assert absolute_spec("hf:owner/cifar10") == "hf:owner/cifar10"
    assert absolute_spec("hf:cache") == f"hf:{tmp_path}/cache"
    assert len(opened("cache")) == 1 and asked[-1] == "cifar10"


def test_configurations_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    write_splits(tmp_path / "cache", train=[table(range(2), labels=[0, 1])], extra=[table([9])])
    asked: list[tuple[str, ...]] = []

    def load_dataset(*names: str, **_: Any) -> Any:
        asked.append(names)
        if len(names) == 1:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nExample"
            )
        return datasets.load_from_disk(str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    refused("owner/set", r"has several configurations; name one: hf:owner/set/CONFIG \('a', 'b'\)")
    source = opened("owner/set/a")
    assert asked == [("owner/set",), ("owner/set", "a")] and numbers(source) == [0, 1]
    assert source.notices == ["hf:owner/set/a: splits that are not used: extra"]


def test_a_hub_that_cannot_be_reached() -> None:
    refused("cifar10", "cifar10 .*hub")


def test_retries_of_downloads_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    logger = logging.getLogger("huggingface_hub.utils._http")
    shown: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]

    def load_dataset(name: str, **_: Any) -> Any:
        logger.warning("Retrying in 8s")
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    logger.addHandler(handler)
    try:
        refused("cifar10", "no route")
        logger.warning("after")
    finally:
        logger.removeHandler(handler)
    assert shown == ["after"]


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "train.parquet", table([0]))
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(tmp_path, r"pip install 'mimref\[hf\]'")


# --- what is refused


def test_folders_without_a_data_set(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path, r"no \.parquet files$")
    (tmp_path / "file").write_text("text")
    refused(tmp_path / "file", "is a file, not a folder")
    write_parquet(tmp_path / "cropped" / "train.parquet", table([0]))
    write_parquet(tmp_path / "full" / "train.parquet", table([0]))
    refused(tmp_path, f"name one of its folders: {tmp_path}/cropped, {tmp_path}/full")


def test_splits_that_are_missing(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", table([0], labels=[1]))
    refused(tmp_path, "no train images")
    assert labels_of(opened(tmp_path, "val")) == ["dog"]
    (tmp_path / "test.parquet").rename(tmp_path / "train.parquet")
    refused(tmp_path, "no validation or test images", "val")


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00003.parquet", table([0]))
    write_parquet(tmp_path / "train-00002-of-00003.parquet", table([0]))
    refused(tmp_path, r"2 of 3 files train-\*\.parquet")
    path = tmp_path / "train-00001-of-00003.parquet"
    write_parquet(path, table(range(40)), rows=10)
    content = path.read_bytes()
    for damaged in (content[:-30], b"", b"text"):
        path.write_bytes(damaged)
        refused(tmp_path, r"train-00001-of-00003\.parquet cannot be read")
    middle = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(2).column(1).data_page_offset
    path.write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])
    refused(tmp_path, "cannot be read")
    write_parquet(path, table([0], image="picture", features=None))
    refused(tmp_path, "has no column 'image'")


def test_saved_data_sets_that_are_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_splits(folder, train=[table(range(9)), table(range(9))])
    path = folder / "train" / "data-00001-of-00002.arrow"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:10], b"", b"text" * 9):
        path.write_bytes(damaged)
        refused(folder, "train cannot be read")
    path.unlink()
    refused(folder, r"data-00001-of-00002\.arrow")
    state = folder / "train" / "state.json"
    saved = json.loads(state.read_text())
    write_saved(tmp_path / "elsewhere", table([0]))
    outside = "../../elsewhere/data-00000-of-00001.arrow"
    for change, message in (
        ("{", r"state\.json cannot be read"),
        ("{}", "cannot be read"),
        ({"_data_files": [{"filename": outside}]}, f"train.*{outside[3:]}"),
        ({"_indices_data_files": [{"filename": "b"}]}, "flatten_indices"),
    ):
        state.write_text(change if isinstance(change, str) else json.dumps(saved | change))
        refused(folder, message)
    (folder / "dataset_dict.json").write_text('{"splits": 3}')
    refused(folder, "cannot be read")


# --- where files lie


@pytest.mark.parametrize(
    "files",
    [
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"),
        ("data/small/train.parquet", "data/small/validation.parquet"),
    ],
)
def test_the_only_configuration_is_used(tmp_path: Path, files: tuple[str, str]) -> None:
    for number, file in enumerate(files):
        write_parquet(tmp_path / file, table([number], labels=[number]))
    train, val = opened(tmp_path), opened(tmp_path, "val")
    assert numbers(train) == [0] and numbers(val) == [1] and len({train.fingerprint, val.fingerprint}) == 2
    config = tmp_path / files[0].split("/")[0]
    assert numbers(opened(config)) == [0]
    other = config.parent / ("data/other" if config.name == "data" else "other") / "train.parquet"
    write_parquet(other, table([7]))
    refused(tmp_path, "name one of its folders: ")
    assert numbers(opened(other.parent)) == [7]


def test_splits_and_files_that_are_not_used(tmp_path: Path) -> None:
    write_splits(tmp_path / "a", train=[table([0])], test=[table([1])], unsupervised=[table([2])])
    for split in ("train", "val"):
        assert opened(tmp_path / "a", split).notices == [f"hf:{tmp_path}/a: splits that are not used: unsupervised"]
    for name in ("data/train-0.parquet", "data/extra-0.parquet", "other/train.parquet"):
        write_parquet(tmp_path / "b" / name, table([0]))
    source = opened(tmp_path / "b")
    assert source.notices == [
        f"hf:{tmp_path}/b: 2 of its .parquet files are not used: data/extra-0.parquet, other/train.parquet"
    ]


@pytest.mark.parametrize("text", [True, False])
def test_paths_in_place_of_bytes(tmp_path: Path, text: bool) -> None:
    folder = tmp_path / "set"
    paths = ["images/0.png", "1.png", "../outside.png", "images/gone.png", "images/link.png"]
    for path in ("images/0.png", "data/1.png", "../outside.png"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(png(9))
    (folder / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    column = pa.array(paths) if text else pa.array([{"bytes": None, "path": path} for path in paths], STRUCT)
    write_parquet(folder / "data" / "train.parquet", pa.table({"image": column}))
    source = opened(folder)
    before = source.fingerprint
    for index in (0, 1):
        assert int(source.read(index)[0, 0, 0]) == 9
    for index in (2, 3, 4):
        with pytest.raises(BadImage, match=r"not in the table data.train\.parquet, which names"):
            source.read(index)
    (folder / "images" / "0.png").write_bytes(png(300))
    assert opened(folder).fingerprint != before
