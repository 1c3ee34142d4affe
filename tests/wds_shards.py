"""Shards of tiny images, and what mimref reads from them."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mimref.config.base import DataConfig
from mimref.data.open import open_source
from mimref.data.readers.wds import ShardSource
from mimref.errors import DataError

Members = list[tuple[str, bytes]]


def png(shade: int = 0, size: tuple[int, int] = (4, 3), kind: str = "png") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (shade % 256, shade // 256, 7)).save(content, kind)
    return content.getvalue()


def write_shard(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(first: int, count: int, *, classes: int | None = None) -> Members:
    """Return images whose colour is their number, with labels that cycle through the classes."""
    members: Members = []
    for number in range(first, first + count):
        members.append((f"{number:05}.png", png(number)))
        if classes is not None:
            members.append((f"{number:05}.cls", str(number % classes).encode()))
    return members


def opened(spec: object, split: Any = "train", **settings: Any) -> ShardSource:
    source = open_source(DataConfig(spec=f"wds:{spec}", **settings), split)
    assert isinstance(source, ShardSource)
    return source


def numbers(source: ShardSource) -> list[int]:
    """Return the number with which each image was made, from its pixels."""
    return [int(image[0, 0, 0]) + 256 * int(image[1, 0, 0]) for image in map(source.read, range(len(source)))]


def labels_of(source: ShardSource) -> list[str]:
    assert source.labels is not None and source.class_names is not None
    return [source.class_names[label] for label in source.labels]


def refused(spec: object, message: str, split: Any = "train") -> None:
    with pytest.raises(DataError, match=message) as caught:
        opened(spec, split)
    assert "\n" not in str(caught.value)
