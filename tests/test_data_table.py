"""Tables of files: their paths, labels and splits, and what is refused."""

import os
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from mimref.config.base import DataConfig
from mimref.data.decode import BadImage
from mimref.data.open import open_source
from mimref.errors import DataError
from tests.list_tables import files, labelled, opened, touch

ROWS = [
    ("a.png", "dog", "train"),
    ("sub/b.png", "cat", "val"),
    ("c.png", "cat", "train"),
    ("d.png", "dog", "test"),
    ("e.png", "ant", "train"),
]


def write_table(path: Path, rows: list[tuple[Any, ...]], columns: str = "path,label,split") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows, columns=columns.split(","))
    touch(path.parent, *(str(row[0]) for row in rows if row[0] and "://" not in row[0]))
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    return f"list:{path}"


@pytest.fixture(params=[".csv", ".parquet"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / "lists" / f"images{request.param}"


def test_splits_and_labels(file: Path) -> None:
    spec = write_table(file, ROWS)
    train, val = opened(spec), opened(spec, "val")
    assert labelled(train) == [("a.png", "dog"), ("c.png", "cat"), ("e.png", "ant")]
    assert labelled(val) == [("sub/b.png", "cat")]
    assert train.class_names == val.class_names == ["ant", "cat", "dog"]
    assert train.name == spec and train.path(0) == str(file.parent / "a.png")
    assert not train.in_memory


def test_test_stands_in_for_val(file: Path) -> None:
    spec = write_table(file, [row for row in ROWS if row[2] != "val"])
    assert labelled(opened(spec, "val")) == [("d.png", "dog")]


def test_without_splits_validation_is_the_same_and_unlabelled(file: Path) -> None:
    spec = write_table(file, [row[:2] for row in ROWS], "path,label")
    assert labelled(opened(spec)) == [row[:2] for row in ROWS]
    held = opened(spec, "val")
    assert files(held) == [row[0] for row in ROWS] and held.labels is None and held.class_names is None


def test_paths_alone(file: Path) -> None:
    spec = write_table(file, [row[:1] for row in ROWS], "path")
    for split in ("train", "val"):
        assert opened(spec, split).labels is None
    with pytest.raises(
        DataError, match="no labels, which this command needs; give the list the columns label and split"
    ):
        open_source(DataConfig(spec=spec), "train", need_labels=True)


def test_paths_are_opened_as_written(file: Path, tmp_path: Path) -> None:
    paths = ["near.png", "../beside.png", str(tmp_path / "elsewhere" / "two\nlines, ünï.png"), "gone.png"]
    spec = write_table(file, [(path,) for path in paths], "path")
    for place in (file.parent / "near.png", tmp_path / "beside.png", tmp_path / "elsewhere" / "two\nlines, ünï.png"):
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (10, 20, 30)).save(place)
    source = opened(spec)
    for index in range(3):
        assert source.read(index)[:, 0, 0].tolist() == [10, 20, 30]
    assert len(source.fingerprint) == 64
    (file.parent / "gone.png").unlink()
    with pytest.raises(BadImage, match=r"gone\.png \(no such file or directory\)"):
        source.read(3)


def test_relative_to_the_table_wherever_it_is_opened_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    write_table(tmp_path / "list.csv", [("a.png",)], "path")
    monkeypatch.chdir(tmp_path)
    assert opened("list:list.csv").read(0).shape == (3, 3, 4)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    assert opened("list:~/list.csv").read(0).shape == (3, 3, 4)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 2, 2, -1], ["-1", "2", "10"]),
        (["10", "2", "2", "b"], ["10", "2", "b"]),
        (["007", "08", "10", "08"], ["007", "08", "10"]),
        (["NA", "null", "nan", "None"], ["NA", "None", "nan", "null"]),
        ([True, False, False, True], None),
    ],
)
def test_order_of_classes(file: Path, labels: list[Any], classes: list[str] | None) -> None:
    spec = write_table(file, [(f"{i}.png", label) for i, label in enumerate(labels)], "path,label")
    source = opened(spec)
    if classes is None:  # pandas writes True, Arrow true
        assert source.labels is not None and source.labels.tolist() == [1, 0, 0, 1]
    else:
        assert source.class_names == classes
        assert [name for _, name in labelled(source)] == [str(label) for label in labels]


def test_category_columns(tmp_path: Path) -> None:
    table = pd.DataFrame(ROWS, columns=["path", "label", "split"]).astype({"label": "category", "split": "category"})
    table.to_parquet(tmp_path / "images.parquet")
    touch(tmp_path, "a.png")
    assert labelled(opened(f"list:{tmp_path / 'images.parquet'}"))[2] == ("e.png", "ant")


def test_validation_labels_alone_number_their_own_classes(file: Path) -> None:
    spec = write_table(file, [("a.png", None, "train"), ("b.png", "x", "val"), ("c.png", "y", "val")])
    assert opened(spec).labels is None
    assert labelled(opened(spec, "val")) == [("b.png", "x"), ("c.png", "y")]


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_list_of_validation_rows_only_is_labelled(file: Path, split: str) -> None:
    spec = write_table(file, [("b.png", "x", split), ("c.png", "y", split)])
    assert labelled(opened(spec, "val")) == [("b.png", "x"), ("c.png", "y")]


def test_limit_takes_classes_in_turn(file: Path) -> None:
    source = opened(write_table(file, [*ROWS, ("f.png", "dog", "train")]), train_limit=3)
    assert labelled(source) == [("a.png", "dog"), ("c.png", "cat"), ("e.png", "ant")]


def test_fingerprint_follows_labels_and_files(file: Path) -> None:
    first = opened(write_table(file, ROWS)).fingerprint
    assert opened(write_table(file, ROWS)).fingerprint == first
    relabelled = [("a.png", "cat", "train"), *ROWS[1:]]
    other = opened(write_table(file, relabelled)).fingerprint
    Image.new("RGB", (4, 3)).save(file.parent / "a.png")
    assert len({first, other, opened(write_table(file, ROWS)).fingerprint}) == 3


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("a.png", "x")], "file,label", r"has no column 'path' \(its first row names file, label"),
        ([("a.png", "x")], "paths,label", r"has no column 'path'; did you mean 'paths'\?"),
        ([], "path,label,split", "has no rows"),
        ([("a.png", "x", "training")], "path,label,split", r"row 1 has split 'training'; did you mean 'train'\?"),
        ([("a.png", "train"), ("b.png", None)], "path,split", r"row 2 has split '' \(known: train, val, test\)"),
        ([("a.png", "x"), ("b.png", None)], "path,label", "row 2 has no label"),
        ([("a.png", "x"), (None, "y")], "path,label", "row 2 has no path"),
        ([("a.png", "x"), ("", "y")], "path,label", "row 2 has no path"),
        ([("https://x.org/a.png",)], "path", "row 1 is an address, not a file; download"),
        ([("file:///tmp/a.png",)], "path", "row 1 has a path that starts with file://"),
        ([("a.png", "x", "val")], "path,label,split", "no row has split train"),
    ],
)
def test_wrong_tables(file: Path, rows: list[tuple[Any, ...]], columns: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        opened(write_table(file, rows, columns))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"--data list:{file}: ")


def test_labels_that_nobody_chose_and_nothing_can_use_are_left_out(file: Path) -> None:
    spec = write_table(file, [("a.png", 0.5), ("b.png", 1.0)], "path,label")
    source, reason = opened(spec), r"column 'label' holds .*; labels are|column 'label' .*, which are neither"
    assert source.labels is None and source.class_names is None
    assert len(source.notices) == 1 and re.search(f"list:{file}: no labels are used: {reason}", source.notices[0])
    with pytest.raises(DataError, match=f"no labels, which this command needs; ({reason})"):
        open_source(DataConfig(spec=spec), "train", need_labels=True)
    with pytest.raises(DataError, match=reason):
        opened(spec, label="label")


def test_classes_and_splits_that_do_not_meet(file: Path) -> None:
    spec = write_table(file, [*ROWS, ("z.png", "zebra", "val")])
    with pytest.raises(DataError, match="class 'zebra' of the validation images is not in the training images"):
        opened(spec, "val")
    assert len(opened(spec)) == 3
    with pytest.raises(DataError, match="no row has split val or test"):
        opened(write_table(file, ROWS[:1]), "val")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.csv", None, "cannot be read"),
        ("empty.csv", b"", "cannot be read"),
        ("text.parquet", b"path\na.png\n", "cannot be read"),
        ("uneven.csv", b"path,label\na.png,x\nb.png\n", "cannot be read"),
        (
            "lines.csv",
            b"a.png;x\n",
            r"no column 'path' \(its first row names a\.png, x\); rename .* --set data\.image=COLUMN",
        ),
        ("twice.csv", b"path,path\na.png,b.png\n", "has two columns 'path'"),
        ("list.txt", b"a.png\n", r"a list is a \.csv, \.tsv or \.parquet file, not '\.txt'"),
        ("list", b"a.png\n", r"a list is a \.csv, \.tsv or \.parquet file"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        opened(f"list:{tmp_path / name}")
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_folder_and_a_damaged_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        opened(f"list:{tmp_path / 'folder.csv'}")
    spec = write_table(tmp_path / "images.parquet", ROWS)
    content = (tmp_path / "images.parquet").read_bytes()
    for damaged in (content[:-20], content[:40], content[:10] + bytes(60) + content[70:]):
        (tmp_path / "images.parquet").write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            opened(spec)
        assert "\n" not in str(caught.value)


def test_many_rows(tmp_path: Path) -> None:
    rows = 20_000
    lines = (f"{index % 1000:03}/{index}.jpg,{index % 1000}\n" for index in range(rows))
    (tmp_path / "images.csv").write_text("path,label\n" + "".join(lines))
    touch(tmp_path, "999/19999.jpg")
    source = opened(f"list:{tmp_path / 'images.csv'}")
    assert source.labels is not None and source.labels.tolist() == [index % 1000 for index in range(rows)]
    assert source.files[12_345] == "345/12345.jpg"
    assert os.path.basename(source.path(rows - 1)) == f"{rows - 1}.jpg"


# --- columns named by settings, files that exist


def test_columns_that_settings_name(file: Path) -> None:
    rows = [("a.png", "x", "cat", "train"), ("b.png", "y", "dog", "train"), ("c.png", "z", "cat", "val")]
    spec = write_table(file, rows, "File,label,species,split")
    source = opened(spec, image="file", label="species")
    assert labelled(source) == [("a.png", "cat"), ("b.png", "dog")]
    assert labelled(opened(spec, image="File")) == [("a.png", "x"), ("b.png", "y")]
    for setting, message in (
        ({"image": "Fill"}, "'Fill', which data.image names; did you mean 'File'"),
        ({"image": "File", "label": "kind"}, "'kind', which data.label names"),
    ):
        with pytest.raises(DataError, match=message):
            opened(spec, **setting)
    spec = write_table(file, [row[::3] for row in rows], "path,species")
    with pytest.raises(DataError, match=r"--set data\.label=COLUMN .*species"):
        open_source(DataConfig(spec=spec), "train", need_labels=True)


@pytest.mark.parametrize(
    ("paths", "advice"),
    [
        (["sub/1.png", "sub/2.png", "sub/3.png", "sub/4.png"], "relative paths begin at the table's folder, {folder}"),
        (["/data/1.png", "/data/2.png"], "as they are on this machine"),
        (["D:\\data\\1.png"], "as they are on this machine"),
        (["sub\\1.png"], "write / in place of"),
    ],
)
def test_files_that_do_not_exist(tmp_path: Path, paths: list[str], advice: str) -> None:
    (tmp_path / "images.csv").write_text("path\n" + "\n".join(paths))
    with pytest.raises(DataError) as caught:
        opened(f"list:{tmp_path / 'images.csv'}")
    message = str(caught.value)
    assert "none of its files exists" in message and advice.format(folder=tmp_path) in message
    assert message.isprintable() and all(path in message for path in paths[:3]) and "4.png" not in message


@pytest.mark.parametrize(("of_table", "of_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_files_are_found_in_either_spelling(file: Path, of_table: Any, of_disk: Any) -> None:
    spec = write_table(file, [("a.png",), (unicodedata.normalize(of_table, "Übung/ö.png"),)], "path")
    shutil.rmtree(next(path for path in file.parent.iterdir() if path.is_dir()))
    place = file.parent / unicodedata.normalize(of_disk, "Übung/ö.png")
    place.parent.mkdir()
    Image.new("RGB", (4, 3), (10, 20, 30)).save(place)
    source = opened(spec)
    assert source.read(1)[:, 0, 0].tolist() == [10, 20, 30] and files(source)[0] == "a.png"


def test_rows_of_a_split_all_missing(file: Path) -> None:
    spec = write_table(file, ROWS)
    (file.parent / "sub" / "b.png").unlink()
    assert len(opened(spec)) == 3
    with pytest.raises(DataError, match=r"none of its files exists: sub/b\.png;"):
        opened(spec, "val")
