"""Tables as people save them: encodings, separators, blanks and types of columns."""

import unicodedata
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mimref.errors import DataError
from tests.list_tables import labelled, touch
from tests.sources import decode_image, opened

LINES = "path,label,split\na.png,café,train\nb.png,dog,train\nc.png,café,val\n"
WANTED = [("a.png", "café"), ("b.png", "dog")]


def written(folder: Path, content: bytes, name: str = "images.csv") -> str:
    touch(folder, "a.png", "b.png", "c.png")
    (folder / name).write_bytes(content)
    return f"list:{folder / name}"


def test_byte_order_marks_are_no_part_of_a_name(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "images.csv").write_bytes(b"\xef\xbb\xbfpath,note\r\na.png,\r\n")
    assert list(opened(f"list:{tmp_path / 'images.csv'}").files) == ["a.png"]


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode(),
        ("\ufeff" + LINES).encode(),
        LINES.replace("\n", "\r\n").encode(),
        LINES.rstrip().encode("utf-16"),
        LINES.encode("utf-16-le"),
        LINES.encode("utf-16-be"),
        b"\xfe\xff" + LINES.encode("utf-16-be"),
        LINES.encode("utf-16") + b"\0",  # cut within a character
        LINES.encode("utf-32"),
        LINES.replace("\n", "\r").encode(),  # from old Macs
        LINES.replace(",", ";").encode(),
        LINES.replace(",", "\t").encode("utf-16"),  # Excel's "Unicode text"
        LINES.replace(",", "|").encode(),
        ("sep=;\r\n" + LINES.replace(",", ";")).encode(),
        LINES.replace(",", ", ").encode(),
        LINES.replace(",", "  ,\t ").encode(),
        LINES.replace("dog", '"dog"').replace(",", ", ").encode(),
        LINES.replace("path,label,split", "Path,LABEL,Split").replace("train", "Train").encode(),
        (LINES + ",,\n,,\n").encode(),  # empty rows of a spreadsheet
        ("\n" + LINES.replace("\n", "\n\n")).encode(),
        LINES.replace("café", unicodedata.normalize("NFD", "café"), 1).encode(),  # two spellings of one class
        LINES.replace(",split", ",split,größe")
        .replace("\nb", ",9\nb")
        .replace("train\nc", "train,1\nc")
        .encode()
        .replace(b"val\n", b"val,3\n"),
    ],
)
def test_encodings_separators_and_blanks(tmp_path: Path, content: bytes) -> None:
    spec = written(tmp_path, content)
    train, val = opened(spec), opened(spec, "val")
    assert labelled(train) == WANTED and train.class_names == ["café", "dog"]
    assert labelled(val) == [("c.png", "café")]
    assert not train.notices


def test_western_encodings_are_guessed_and_told(tmp_path: Path) -> None:
    for encoding in ("latin-1", "cp1252"):
        source = opened(written(tmp_path, LINES.encode(encoding)))
        assert labelled(source) == WANTED
        assert len(source.notices) == 1 and "not UTF-8" in source.notices[0]


def test_files_with_names_in_another_encoding_are_not_blamed(tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_bytes("path\nпривет.png\n".encode("cp1251"))
    with pytest.raises(DataError, match=r"none of its files exists: .*not UTF-8, read as Windows-1252"):
        opened(f"list:{tmp_path / 'images.csv'}")


def test_tabs_and_commas_of_a_tsv(tmp_path: Path) -> None:
    spec = written(tmp_path, b"path\tlabel\nb.png\tdog, big\na.png\tcat\n", "images.tsv")
    assert labelled(opened(spec)) == [("b.png", "dog, big"), ("a.png", "cat")]


def test_quoted_cells_after_blanks(tmp_path: Path) -> None:
    touch(tmp_path, "a, b.png")
    spec = written(tmp_path, b'path, label\n"a, b.png", "dog, ""big"""\nb.png, cat\n')
    assert labelled(opened(spec)) == [("a, b.png", 'dog, "big"'), ("b.png", "cat")]
    spec = written(tmp_path, b'"path" , "note","label"\n"b.png","5"" by\n4 , "" ", "cat"  \na.png,5" by 4,dog\n')
    assert labelled(opened(spec)) == [("b.png", "cat"), ("a.png", "dog")]


def test_a_cell_may_be_longer_than_the_csv_module_allows(tmp_path: Path) -> None:
    spec = written(tmp_path, b'path, note,label\na.png, "' + b"x" * 200_000 + b'",cat\n')
    assert labelled(opened(spec)) == [("a.png", "cat")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("images.xlsx", b"PK\3\4", r"spreadsheet is not read; save it as CSV \(UTF-8\)"),
        ("images.csv", b"PK\3\4" + bytes(99), r"a spreadsheet in spite of its name; save it as CSV"),
        ("images.csv", b"path,label\na.png,x,\x00\x1b[31m\n", "cannot be read"),
        ("images.csv", b"file,class\na.png,x\n", r"--set data\.image=COLUMN"),
        ("images.csv", b'path,label\na.png, x\nb.png, "y\nc.png, z\n', "line 3 has a quote that nothing closes"),
        ("images.csv", b'sep=,\npath,label\na.png,"x\nb.png,y\n', "line 3 has a quote that nothing closes"),
        ("images.csv", b'path,label\na.png,"x\nb.png,"y"\n', "line 2 has .* text after a quoted cell"),
    ],
)
def test_refusals_are_one_line_without_raw_bytes(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        opened(written(tmp_path, content, name))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["large_string", "dictionary", "large dictionary", "index"])
def test_types_of_parquet_columns(tmp_path: Path, kind: str) -> None:
    touch(tmp_path, "a.png")
    frame = pd.DataFrame({"path": ["a.png", "b.png"], "label": ["x", "y"]})
    if kind == "index":
        frame.set_index("path").to_parquet(tmp_path / "t.parquet")
    else:
        text = pa.string() if kind == "dictionary" else pa.large_string()
        columns = {name: pa.array(frame[name].tolist(), text) for name in frame}
        if "dictionary" in kind:
            columns = {name: column.dictionary_encode() for name, column in columns.items()}
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert labelled(opened(f"list:{tmp_path / 't.parquet'}")) == [("a.png", "x"), ("b.png", "y")]


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_images_in_place_of_paths(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (8, 8), (9, 0, 0)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    images = [content if kind == "binary" else {"bytes": content, "path": "a.png"}] * 2
    pq.write_table(pa.table({"image": images, "label": ["x", "y"]}), tmp_path / "t.parquet")
    for chosen in (None, "image"):
        with pytest.raises(DataError, match=r"holds images in column 'image', .*hf:FOLDER"):
            opened(f"list:{tmp_path / 't.parquet'}", image=chosen)
    # Following the advice works.
    (tmp_path / "own").mkdir()
    (tmp_path / "t.parquet").rename(tmp_path / "own" / "train.parquet")
    source = opened(f"hf:{tmp_path / 'own'}")
    assert source.labels is not None and source.labels.tolist() == [0, 1]
    assert torch.equal(source.read(1), decode_image(str(tmp_path / "a.png")))
