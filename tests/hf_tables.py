"""Tables of tiny images as Hugging Face data sets hold them, and what mimref reads from them."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mimref.config.base import DataConfig
from mimref.data.open import open_source
from mimref.data.readers.hf import TableSource
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
    """Return a table of images whose colour is their number."""
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
    """Write one split as `save_to_disk` does, in several files."""
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
