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
from mimref.data.readers.hf import TableSource
from mimref.data.sources import EncodedSource
from mimref.data.views import CropGroup
from mimref.errors import DataError

CLASSES = ["cat", "dog", "ant"]
FEATURES = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(number: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 3), (number % 256, number // 256, 7)).save(content, "png")
    return content.getvalue()


def table(
    numbers: Any, *, labels: Any = None, features: Any = FEATURES, image: str = "image", struct: bool = True
) -> pa.Table:
    """Images whose colour is their number."""
    contents = [number if isinstance(number, bytes | None) else png(number) for number in numbers]
    if struct:
        cells = pa.array([{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents)], STRUCT)
    else:
        cells = pa.array(contents, pa.binary())
    columns: dict[str, Any] = {"id": pa.array(range(len(contents)), pa.int64()), image: cells}
    if labels is not None:
        columns["label"] = pa.array(labels)
    made = pa.table(columns)
    if features is None:
        return made
    known = {name: feature for name, feature in features.items() if name in columns}
    known |= {name: {"dtype": "int64", "_type": "Value"} for name in columns if name not in known}
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": known}})})


def write_parquet(path: Path, content: pa.Table, rows: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path, row_group_size=rows)


def write_saved(folder: Path, *contents: pa.Table, split: str = "train") -> None:
    """One split as `save_to_disk` writes it, in several files."""
    from datasets import Dataset, concatenate_datasets

    whole = concatenate_datasets([Dataset(content) for content in contents])
    whole.save_to_disk(folder, num_shards=len(contents))


def write_splits(folder: Path, **splits: list[pa.Table]) -> None:
    for name, contents in splits.items():
        write_saved(folder / name, *contents)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))


def write_as(kind: str, folder: Path, train: list[pa.Table], held: list[pa.Table], name: str = "validation") -> None:
    if kind == "arrow":
        write_splits(folder, train=train, **{name: held})
        return
    for split, contents in (("train", train), (name, held)):
        for number, content in enumerate(contents):
            write_parquet(folder / "data" / f"{split}-{number:05}-of-{len(contents):05}.parquet", content)


def opened(folder: object, split: Any = "train", **settings: Any) -> TableSource:
    source = open_source(DataConfig(spec=f"hf:{folder}", **settings), split)
    assert isinstance(source, TableSource)
    return source


def numbers(source: Any) -> list[int]:
    return [int(image[0, 0, 0]) + 256 * int(image[1, 0, 0]) for image in map(source.read, range(len(source)))]


def labels_of(source: TableSource) -> list[str]:
    assert source.labels is not None and source.class_names is not None
    return [source.class_names[label] for label in source.labels]


def refused(folder: object, message: str, split: Any = "train") -> None:
    with pytest.raises(DataError, match=message) as caught:
        opened(folder, split)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"--data hf:{folder}: ")


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


def test_names_of_columns(tmp_path: Path) -> None:
    features = {"img": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
    write_parquet(tmp_path / "train.parquet", table(range(3), labels=[10, 9, 10], features=features, image="img"))
    assert labels_of(opened(tmp_path)) == ["10", "9", "10"]
    assert opened(tmp_path).class_names == ["9", "10"]
    write_parquet(tmp_path / "train.parquet", table(range(2), labels=["b", "a"], features=None))
    assert labels_of(opened(tmp_path)) == ["b", "a"]
    content = table([0], labels=[2])
    metadata = {"huggingface": content.schema.metadata[b"huggingface"].replace(b'"label"', b'"fine"')}
    renamed = content.rename_columns(["id", "image", "fine"]).replace_schema_metadata(metadata)
    write_parquet(tmp_path / "train.parquet", renamed)
    assert labels_of(opened(tmp_path)) == ["ant"]


def test_unlabelled_splits(tmp_path: Path) -> None:
    write_splits(tmp_path / "a", train=[table(range(3), labels=[0, 1, 2])], test=[table(range(3), labels=[-1] * 3)])
    assert opened(tmp_path / "a", "val").labels is None and opened(tmp_path / "a").labels is not None
    for name, labels, message in (
        ("b", [0, -1, 2], "row 1 of its split has no 'label'"),
        ("c", [0, 3, 2], "label 3 .* 3 classes"),
    ):
        write_splits(tmp_path / name, train=[table(range(3), labels=labels)])
        refused(tmp_path / name, message)
    write_splits(tmp_path / "d", train=[table(range(3), labels=[0.5, 1, 2], features=None)])
    refused(tmp_path / "d", "column 'label' holds double")


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
    none = [None] if kind == "parquet" else []  # which save_to_disk refuses
    write_as(kind, tmp_path, [table([b"", b"text", png(1)[:50], 5, *none])], [table([0])])
    source = opened(tmp_path)
    assert int(source.read(3)[0, 0, 0]) == 5
    for index, reason in enumerate(("empty file", "not an image", ".", "", r"4\.png")):
        if reason and index < len(source):
            with pytest.raises(BadImage, match=reason) as caught:
                source.read(index)
            assert caught.value.path == source.path(index) and "\n" not in str(caught.value)


# --- data sets of the hub


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
    # Files that the library has downloaded one by one.
    cells = pa.array([{"bytes": None, "path": str(tmp_path / "downloaded.png")}], STRUCT)
    write_saved(tmp_path / "cache" / "train", pa.table({"image": cells}))
    assert numbers(opened("cifar10")) == [5]
    # Names stay as they are, unless a folder has that name.
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


def test_columns_without_images(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", pa.table({"id": [0], "picture": ["a.png"]}))
    refused(tmp_path, r"no column of images \(its columns: id, picture\); --set data\.image=COLUMN")
    write_parquet(tmp_path / "train.parquet", pa.table({"image": pa.array([[1, 2]])}))
    refused(tmp_path, "column 'image' holds list<.*>")
    write_parquet(tmp_path / "train.parquet", table([]))
    refused(tmp_path, "no rows in|cannot be read")


# --- columns

IMAGE: dict[str, Any] = {"_type": "Image"}
COARSE = {"names": ["pet", "insect"], "_type": "ClassLabel"}


def cells(numbers: Any) -> list[dict[str, Any]]:
    return [{"bytes": png(number), "path": None} for number in numbers]


def declared(content: pa.Table, **features: Any) -> pa.Table:
    """With the notes of the library for some of the columns."""
    types = {name: {"dtype": "int64", "_type": "Value"} for name in content.column_names} | features
    return content.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": types}})})


def cifar100(**more: Any) -> pa.Table:
    content = pa.table({"img": cells([0, 1, 2]), "fine_label": [0, 1, 2], "coarse_label": [0, 0, 1], **more})
    return declared(content, img=IMAGE, fine_label=FEATURES["label"], coarse_label=COARSE)


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_columns_of_labels_are_chosen_by_name(tmp_path: Path, kind: str) -> None:
    write_as(kind, tmp_path, [cifar100()], [cifar100()])
    assert opened(tmp_path).labels is None
    assert "fine_label, coarse_label" in opened(tmp_path).notices[0]
    for split in ("train", "val"):
        with pytest.raises(DataError, match=r"fine_label, coarse_label: --set data\.label=fine_label$"):
            open_source(DataConfig(spec=f"hf:{tmp_path}"), split, need_labels=True)  # type: ignore[arg-type]
        source = opened(tmp_path, split, label="fine_label")
        assert labels_of(source) == CLASSES and numbers(source) == [0, 1, 2] and not source.notices
        assert labels_of(opened(tmp_path, split, label="coarse_label")) == ["pet", "pet", "insect"]
    with pytest.raises(DataError, match=r"no column 'fine_labels', which data\.label names; did you mean 'fine_label'"):
        opened(tmp_path, label="fine_labels")


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_several_columns_of_images(tmp_path: Path, kind: str) -> None:
    content = pa.table({"left": cells([1, 2]), "right": cells([3, 4])})
    write_as(kind, tmp_path / "a", [declared(content, left=IMAGE, right=IMAGE)], [table([0])])
    refused(tmp_path / "a", r"several columns of images: left, right; --set data\.image=left")
    for side, found in (("left", [1, 2]), ("right", [3, 4])):
        assert numbers(opened(tmp_path / "a", image=side)) == found
    content = pa.table({"image": cells([1, 2]), "mask": cells([3, 4])})
    write_as(kind, tmp_path / "b", [declared(content, image=IMAGE, mask=IMAGE)], [table([0])])
    source = opened(tmp_path / "b")
    assert numbers(source) == [1, 2] and "'image', not of mask" in source.notices[0]
    assert numbers(opened(tmp_path / "b", image="mask")) == [3, 4]
    with pytest.raises(DataError, match=r"no column 'masks', which data\.image names; did you mean 'mask'"):
        opened(tmp_path / "b", image="masks")


@pytest.mark.parametrize("struct", [True, False])
def test_images_without_notes_are_found_by_their_type(tmp_path: Path, struct: bool) -> None:
    write_parquet(tmp_path / "train.parquet", table([5, 6], labels=[1, 0], features=None, image="img", struct=struct))
    assert numbers(opened(tmp_path)) == [5, 6] and labels_of(opened(tmp_path)) == ["1", "0"]
    both = pa.table({"a": cells([1]), "b": cells([2])})
    write_parquet(tmp_path / "train.parquet", both)
    refused(tmp_path, r"several columns of images: a, b; --set data\.image=a")


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
@pytest.mark.parametrize("notes", [True, False])
def test_images_in_lists(tmp_path: Path, kind: str, notes: bool) -> None:
    def lists(*groups: list[int]) -> pa.Table:
        content = pa.table({"images": [cells(group) for group in groups], "label": [0] * len(groups)})
        return declared(content, images={"feature": IMAGE, "_type": "List"}) if notes else content

    write_as(kind, tmp_path / "one", [lists([3], [4])], [lists([5])])
    assert numbers(opened(tmp_path / "one")) == [3, 4] and numbers(opened(tmp_path / "one", "val")) == [5]
    write_as(kind, tmp_path / "more", [lists([3], [4, 5])], [lists([5])])
    refused(tmp_path / "more", r"'images' holds lists of up to 2 images; .*row\['images'\]\[0\]")
    write_as(kind, tmp_path / "none", [lists([3], [])], [lists([5])])
    with pytest.raises(BadImage, match="no image in this row"):
        opened(tmp_path / "none").read(1)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["b", "a", "b"]),
        (pa.array(["b", "a", "b"], pa.large_string()), ["b", "a", "b"]),
        (pa.array([True, False, True]), ["true", "false", "true"]),
        (pa.array([10, 9, 10], pa.uint8()), ["10", "9", "10"]),
        (pa.array(["e\u0301", "\u00e9", "e\u0301"]), ["\u00e9"] * 3),
        (pa.array([0.5, 1, 2]), None),
        (pa.array([[1], [2], [3]]), None),
    ],
)
def test_types_of_labels(tmp_path: Path, labels: Any, found: list[str] | None) -> None:
    write_parquet(tmp_path / "train.parquet", pa.table({"image": cells([0, 1, 2]), "label": labels}))
    if found is None:
        refused(tmp_path, "column 'label' holds")
    else:
        assert labels_of(opened(tmp_path)) == found


def test_class_lists_in_two_spellings(tmp_path: Path) -> None:
    def of(*names: str) -> pa.Table:
        return declared(
            pa.table({"image": cells([0, 1]), "label": [0, 1]}),
            image=IMAGE,
            label={"names": list(names), "_type": "ClassLabel"},
        )

    write_as("parquet", tmp_path, [of("e\u0301", "a")], [of("a", "\u00e9")])
    assert opened(tmp_path).class_names == opened(tmp_path, "val").class_names == ["\u00e9", "a"]
    assert labels_of(opened(tmp_path)) == ["\u00e9", "a"] and labels_of(opened(tmp_path, "val")) == ["a", "\u00e9"]


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
