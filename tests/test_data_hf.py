import io
import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mimref.config.base import DataConfig
from mimref.data.decode import BadImage
from mimref.data.loader import view_batches
from mimref.data.open import open_source
from mimref.data.readers import hf as huggingface
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
    columns: dict[str, Any] = {"id": pa.array(range(len(contents))), image: cells}
    if labels is not None:
        columns["label"] = pa.array(labels)
    made = pa.table(columns)
    if features is not None:
        return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return made


def write_parquet(path: Path, content: pa.Table, rows: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path, row_group_size=rows)


def write_saved(folder: Path, *contents: pa.Table, rows: int = 3) -> None:
    """One split as `save_to_disk` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{number:05}-of-{len(contents):05}.arrow" for number in range(len(contents))]
    for name, content in zip(names, contents, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, content.schema) as stream:
            stream.write_table(content, max_chunksize=rows)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))


def write_splits(folder: Path, **splits: list[pa.Table]) -> None:
    for name, contents in splits.items():
        write_saved(folder / name, *contents)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))


def opened(folder: Path, split: Any = "train", **settings: Any) -> TableSource:
    source = open_source(DataConfig(spec=f"hf:{folder}", **settings), split)
    assert isinstance(source, TableSource)
    return source


def numbers(source: Any) -> list[int]:
    return [int(image[0, 0, 0]) + 256 * int(image[1, 0, 0]) for image in map(source.read, range(len(source)))]


def labels_of(source: TableSource) -> list[str]:
    assert source.labels is not None and source.class_names is not None
    return [source.class_names[label] for label in source.labels]


def refused(folder: Path, message: str, split: Any = "train") -> None:
    with pytest.raises(DataError, match=message) as caught:
        opened(folder, split)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"--data hf:{folder}: ")


def write_as(kind: str, folder: Path, train: list[pa.Table], held: list[pa.Table], name: str = "validation") -> None:
    if kind == "arrow":
        write_splits(folder, train=train, **{name: held})
        return
    for split, contents in (("train", train), (name, held)):
        for number, content in enumerate(contents):
            write_parquet(folder / "data" / f"{split}-{number:05}-of-{len(contents):05}.parquet", content)


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("held", ["validation", "test"])
def test_splits_rows_and_labels(tmp_path: Path, kind: str, struct: bool, held: str) -> None:
    labels = [number % 3 for number in range(23)]
    train = [
        table(range(10), labels=labels[:10], struct=struct),
        table(range(10, 11), labels=labels[10:11], struct=struct),
        table(range(11, 23), labels=labels[11:], struct=struct),
    ]
    write_as(kind, tmp_path, train, [table([300, 301], labels=[1, 1], struct=struct)], held)
    source, val = opened(tmp_path), opened(tmp_path, "val")
    assert numbers(source) == list(range(23)) and numbers(val) == [300, 301]
    assert source.class_names == val.class_names == CLASSES
    assert labels_of(source) == [CLASSES[label] for label in labels] and labels_of(val) == ["dog", "dog"]
    order = np.random.default_rng(0).permutation(23)
    assert [int(source.read(int(index))[0, 0, 0]) for index in order] == order.tolist()
    file = "train/data-00002-of-00003.arrow" if kind == "arrow" else "data/train-00002-of-00003.parquet"
    assert source.path(12) == f"{tmp_path}/{file}[1]"
    assert not source.in_memory and isinstance(source, EncodedSource)


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_one_set_for_both(tmp_path: Path, kind: str) -> None:
    content = table(range(5), labels=[0, 1, 2, 0, 1])
    if kind == "arrow":
        write_saved(tmp_path, content)
    else:
        write_parquet(tmp_path / "images.parquet", content)
    assert labels_of(opened(tmp_path)) == ["cat", "dog", "ant", "cat", "dog"]
    held = opened(tmp_path, "val")
    assert numbers(held) == list(range(5)) and held.labels is None
    with pytest.raises(DataError, match="no labels, which this needs; give its files a column label, and save train"):
        open_source(DataConfig(spec=f"hf:{tmp_path}"), "val", need_labels=True)


@pytest.mark.parametrize(
    "files",
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet", "extra-00000-of-00009.parquet"),
        ("train/0000.parquet", "validation/0000.parquet", "other/0000.parquet"),
        ("data/train/0.parquet", "data/val/0.parquet", "data/unsupervised.parquet"),
        ("data/mnist_train.parquet", "data/mnist_test.parquet", "notes.parquet"),
        ("train-00000-of-00001-a0c1d2.parquet", "valid.parquet", ".hidden.parquet"),
    ],
)
def test_names_of_parquet_files(tmp_path: Path, files: tuple[str, str, str]) -> None:
    for number, file in enumerate(files):
        write_parquet(tmp_path / file, table([number]))
    assert numbers(opened(tmp_path)) == [0] and numbers(opened(tmp_path, "val")) == [1]


def test_names_of_columns(tmp_path: Path) -> None:
    features = {"img": {"_type": "Image"}, "label": {"_type": "Value"}}
    write_parquet(tmp_path / "train.parquet", table(range(3), labels=[10, 9, 10], features=features, image="img"))
    assert labels_of(opened(tmp_path)) == ["10", "9", "10"]
    assert opened(tmp_path).class_names == ["9", "10"]
    content = table(range(2), labels=["b", "a"], features=None)
    write_parquet(tmp_path / "train.parquet", content)
    assert labels_of(opened(tmp_path)) == ["b", "a"]
    fine = {"image": {"_type": "Image"}, "fine": {"names": CLASSES, "_type": "ClassLabel"}}
    content = table([0], labels=[2], features=fine)
    renamed = content.rename_columns(["id", "image", "fine"]).replace_schema_metadata(content.schema.metadata)
    write_parquet(tmp_path / "train.parquet", renamed)
    assert labels_of(opened(tmp_path)) == ["ant"]


def test_unlabelled_splits(tmp_path: Path) -> None:
    write_splits(tmp_path, train=[table(range(3), labels=[0, 1, 2])], test=[table(range(3), labels=[-1, -1, -1])])
    assert opened(tmp_path, "val").labels is None and opened(tmp_path).labels is not None
    write_splits(tmp_path, train=[table(range(3), labels=[0, -1, 2])])
    refused(tmp_path, "row 1 of its split has no 'label', though others have")
    write_splits(tmp_path, train=[table(range(3), labels=[0, 3, 2])])
    refused(tmp_path, "label 3 is none of the 3 classes of its schema")
    write_splits(tmp_path, train=[table(range(3), labels=[0.5, 1, 2])])
    refused(tmp_path, "column 'label' holds double; labels are whole numbers or class names")


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_limit_processes_and_fingerprints(tmp_path: Path, kind: str) -> None:
    write_as(kind, tmp_path, [table(range(9), labels=[0] * 6 + [1] * 3)], [table([1])])
    source = opened(tmp_path, train_limit=4)
    assert numbers(source) == [0, 1, 6, 7] and labels_of(source) == ["cat", "cat", "dog", "dog"]
    copy = pickle.loads(pickle.dumps(source))
    assert numbers(copy) == numbers(source) and copy.fingerprint == source.fingerprint
    assert opened(tmp_path).fingerprint not in (source.fingerprint, opened(tmp_path, "val").fingerprint)
    # Forked after the parent has read: the child opens the files for itself.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(numbers, (source,)) == numbers(source)


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_once_per_epoch(tmp_path: Path, kind: str, workers: int) -> None:
    write_as(kind, tmp_path, [table(range(7)), table(range(7, 24))], [table([0])])
    source = opened(tmp_path)
    source.read(3)
    batches = view_batches(
        source, [CropGroup(1, 8, (0.5, 1.0))], batch_size=6, seed=0, epochs=range(2), workers=workers
    )
    seen = [batch.crops[0][:, 0, 0, 0, 0].to(torch.int64).tolist() for batch in batches]
    for epoch in (seen[:4], seen[4:]):
        assert sorted(number for batch in epoch for number in batch) == list(range(24))


@pytest.mark.parametrize(("kind", "most"), [("arrow", 2), ("parquet", 1)])
def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, most: int) -> None:
    monkeypatch.setattr(huggingface, "OPEN_FILES", 2)
    write_as(kind, tmp_path, [table(range(4 * part, 4 * part + 4)) for part in range(4)], [table([0])])
    source = opened(tmp_path)
    assert numbers(source) == list(range(16)) == numbers(source)
    assert len(source._open) == most


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_images_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    write_as(kind, tmp_path, [table([b"", b"text", png(1)[:50], None, 5])], [table([0])])
    source = opened(tmp_path)
    for index, reason in enumerate(
        ("empty file", "not an image", ".", r"not in the table, which names 3\.png instead")
    ):
        with pytest.raises(BadImage, match=reason) as caught:
            source.read(index)
        assert caught.value.path == source.path(index) and "\n" not in str(caught.value)
    assert int(source.read(4)[0, 0, 0]) == 5


def test_rows_that_are_damaged_or_gone_are_bad_images(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", table(range(40)), rows=10)
    content = (tmp_path / "train.parquet").read_bytes()
    source = opened(tmp_path)
    middle = pq.ParquetFile(tmp_path / "train.parquet").metadata.row_group(2).column(1).data_page_offset
    (tmp_path / "train.parquet").write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])
    bad = 0
    for index in range(40):
        try:
            source.read(index)
        except BadImage as error:
            assert "\n" not in str(error)
            bad += 1
    assert bad == 10
    source = opened(tmp_path)
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(BadImage):
        source.read(0)


# --- what is refused


def test_folders_that_hold_no_data_set(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")
    refused(tmp_path, r"no data set saved by save_to_disk, and no \.parquet files$")
    (tmp_path / "file").write_text("text")
    refused(tmp_path / "file", "is a file, not a folder")
    write_parquet(tmp_path / "cropped" / "train.parquet", table([0]))
    write_parquet(tmp_path / "full" / "train.parquet", table([0]))
    refused(tmp_path, f"name one of its folders: {tmp_path}/cropped, {tmp_path}/full")


def test_splits_that_are_missing(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", table([0], labels=[1]))
    refused(tmp_path, "no train images there")
    assert labels_of(opened(tmp_path, "val")) == ["dog"]
    (tmp_path / "test.parquet").rename(tmp_path / "train.parquet")
    refused(tmp_path, "no validation or test images there", "val")


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00003.parquet", table([0]))
    write_parquet(tmp_path / "train-00002-of-00003.parquet", table([0]))
    refused(tmp_path, r"2 of 3 files train-\*\.parquet are there; get the others")
    write_parquet(tmp_path / "train-00001-of-00003.parquet", table([0]))
    path = tmp_path / "train-00001-of-00003.parquet"
    for content in (path.read_bytes()[:-30], b"", b"text"):
        path.write_bytes(content)
        refused(tmp_path, r"train-00001-of-00003\.parquet cannot be read \(.*\); get it anew")
    write_parquet(path, table([0], image="picture", features=None))
    refused(tmp_path, "has no column 'image' like that of the other files")


def test_saved_data_sets_that_are_damaged(tmp_path: Path) -> None:
    write_splits(tmp_path, train=[table(range(9)), table(range(9))])
    path = tmp_path / "train" / "data-00001-of-00002.arrow"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:10], b"", b"text" * 9):
        path.write_bytes(damaged)
        refused(tmp_path, r"data-00001-of-00002\.arrow (cannot be read \(.*\); get it anew|has no column)")
    path.unlink()
    refused(tmp_path, r"cannot be read \(.*[Nn]o such file")
    state = tmp_path / "train" / "state.json"
    for text, message in (
        ("{", r"state\.json cannot be read"),
        ("[]", "is not a table"),
        ("{}", "lists no files"),
        ('{"_data_files": [{"filename": "../x.arrow"}]}', r"leads out of its folder: \.\./x\.arrow"),
        ('{"_data_files": [{"filename": "/etc/passwd"}]}', "leads out of its folder: /etc/passwd"),
        ('{"_data_files": [{"filename": "a"}], "_indices_data_files": [{"filename": "b"}]}', "flatten_indices"),
    ):
        state.write_text(text)
        refused(tmp_path, message)
    (tmp_path / "dataset_dict.json").write_text('{"splits": 3}')
    refused(tmp_path, "lists no splits")


def test_columns_that_are_no_images(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", table([0], image="picture", features=None))
    refused(tmp_path, r"no column 'image' \(its columns: id, picture\)")
    write_parquet(tmp_path / "train.parquet", pa.table({"image": pa.array([[1, 2]])}))
    refused(tmp_path, r"column 'image' holds list<.*>, not the bytes of image files")
    write_parquet(tmp_path / "train.parquet", table([]))
    refused(tmp_path, "no rows in")
