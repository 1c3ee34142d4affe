"""Which columns of a Hugging Face data set hold its images and labels, and of what types."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from mimref.config.base import DataConfig
from mimref.data.decode import BadImage
from mimref.data.open import open_source
from mimref.data.readers.hf_columns import read_cell
from mimref.errors import DataError
from tests.hf_tables import (
    CLASSES,
    FEATURES,
    labels_of,
    numbers,
    opened,
    png,
    refused,
    table,
    write_as,
    write_parquet,
    write_splits,
)


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


def test_columns_without_images(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", pa.table({"id": [0], "picture": ["a.png"]}))
    refused(tmp_path, r"no column of images \(its columns: id, picture\); --set data\.image=COLUMN")
    write_parquet(tmp_path / "train.parquet", pa.table({"image": pa.array([[1, 2]])}))
    refused(tmp_path, "column 'image' holds list<.*>")
    write_parquet(tmp_path / "train.parquet", table([]))
    refused(tmp_path, "no rows in|cannot be read")


IMAGE: dict[str, Any] = {"_type": "Image"}
COARSE = {"names": ["pet", "insect"], "_type": "ClassLabel"}


def cells(numbers: Any) -> list[dict[str, Any]]:
    return [{"bytes": png(number), "path": None} for number in numbers]


def declared(content: pa.Table, **features: Any) -> pa.Table:
    """The table with the library's metadata: `features` declares some columns, all others are int64."""
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
        with pytest.raises(DataError, match=r"fine_label, coarse_label: --set data\.label=fine_label;"):
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
    sides = {side: opened(tmp_path / "a", image=side) for side in ("left", "right")}
    assert {side: numbers(source) for side, source in sides.items()} == {"left": [1, 2], "right": [3, 4]}
    # Cached features of one column are not those of the other.
    assert sides["left"].fingerprint != sides["right"].fingerprint
    assert sides["left"].fingerprint == opened(tmp_path / "a", image="left").fingerprint
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


def test_files_that_lists_name_are_part_of_the_key(tmp_path: Path) -> None:
    for number in (1, 2):
        Image.new("L", (4, 4), number).save(tmp_path / f"{number}.png")
    write_parquet(tmp_path / "train.parquet", pa.table({"image": [["1.png"], ["2.png"]], "label": [0, 1]}))
    before = opened(tmp_path).fingerprint
    assert before == opened(tmp_path).fingerprint
    Image.new("L", (5, 4), 3).save(tmp_path / "2.png")
    assert before != opened(tmp_path).fingerprint


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
    if found is not None:
        assert labels_of(opened(tmp_path)) == found
        return
    # Labels that nobody chose are left out.
    source = opened(tmp_path)
    assert source.labels is None and source.class_names is None
    assert len(source.notices) == 1 and "no labels are used: column 'label' holds" in source.notices[0]
    with pytest.raises(DataError, match="no labels, which this command needs; column 'label' holds"):
        open_source(DataConfig(spec=f"hf:{tmp_path}"), "train", need_labels=True)
    with pytest.raises(DataError, match="column 'label' holds"):
        open_source(DataConfig(spec=f"hf:{tmp_path}", label="label"), "train")


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


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        ([[1, 2, 3], [4, 5, 6, 7, 8]], "different lengths: 3, 5"),  # 8 numbers, as in two rows of 4
        ([[1, 2], None], "missing"),
        ([[1, 2], [3, None]], "missing"),
    ],
)
def test_lists_that_are_no_rectangle_are_refused(lists: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_cell(pa.scalar(lists, pa.list_(pa.list_(pa.int64()))))
