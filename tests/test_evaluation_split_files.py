"""Files that list the labelled images of low-shot splits."""

from pathlib import Path

import numpy as np
import pytest

from mimref.errors import DataError
from mimref.evaluation.lowshot.split_files import read_split_files

NAMES = [
    "/data/in1k/train/n01440764/n01440764_10026.JPEG",
    "/data/in1k/train/n01440764/n01440764_10027.JPEG",
    "/data/in1k/train/n01443537/n01443537_2.JPEG",
    "/data/in1k/train/n01443537/same.JPEG",
    "/data/in1k/train/n01440764/same.JPEG",
    "in1k/n01440764/same.JPEG",
]


def write(folder: Path, text: str, name: str = "1imgs_class.txt") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_names_and_paths_in_the_order_of_the_file(tmp_path: Path) -> None:
    lines = ["n01443537_2.JPEG", "", "n01440764/n01440764_10026.JPEG ", "train/n01443537/same.JPEG", NAMES[1]]
    rows = read_split_files([write(tmp_path, "\r\n".join(lines))], NAMES)[0]
    assert rows.dtype == np.int64
    assert rows.tolist() == [2, 0, 3, 1]
    # An exact path takes precedence over a path with the same ending.
    assert read_split_files([write(tmp_path, NAMES[5])], [*NAMES, "/x/" + NAMES[5]])[0].tolist() == [5]
    assert read_split_files([write(tmp_path, "./n01443537/same.JPEG\n")], NAMES)[0].tolist() == [3]


def test_one_pass_over_the_names_serves_all_files(tmp_path: Path) -> None:
    class Once(list[str]):
        passes = 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            self.passes += 1
            return super().__iter__()

    names = Once(NAMES)
    files = [write(tmp_path, f"{Path(name).name}\n", f"{i}.txt") for i, name in enumerate(NAMES[:3])]
    assert [rows.tolist() for rows in read_split_files(files, names)] == [[0], [1], [2]]
    assert names.passes == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01440764_10026.JPEG\nn02.JPEG", r"line 2: 'n02.JPEG' is none of the 6 training images.*10026\.JPEG'"),
        ("n02/n01440764_10026.JPEG", "line 1: 'n02/n01440764_10026.JPEG' is none of"),
        ("0764/n01440764_10026.JPEG", "is none of"),
        ("\nsame.JPEG", r"line 2: 'same.JPEG' names 3 training images.*add the folder"),
        ("n01440764/same.JPEG", "names 2 training images"),
        (
            "n01440764_10026.JPEG\n\nn01440764/n01440764_10026.JPEG",
            r"line 3: 'n01440764/n01440764_10026.JPEG' is already listed in line 1",
        ),
        (" \n\n", "lists no images"),
        ("", "lists no images"),
    ],
)
def test_refuses_lists_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=message) as caught:
        read_split_files([path], NAMES)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_refuses_what_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: No such file"):
        read_split_files([tmp_path / "none.txt"], NAMES)
    with pytest.raises(DataError, match="directory"):
        read_split_files([tmp_path], NAMES)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(DataError, match=r"image\.png: not a text file"):
        read_split_files([tmp_path / "image.png"], NAMES)
