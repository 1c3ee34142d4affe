"""Which files a device decodes, and which ones the CPU."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimref.data.decode import BadImage, Decoded, decode_content
from mimref.data.jpegs import Jpeg, as_jpeg, read_jpeg
from mimref.data.pixels import USUAL, Decoding
from mimref.data.sources import FileSource, ImageSource, Subset
from mimref.data.traits import ON_CPU, TURNED
from mimref.data.transforms import EvalTransform
from mimref.transfer.robustness.corruptions import CorruptedSource
from tests import hf_tables, wds_shards
from tests.sources import opened

EXIF = Decoding(orientation="exif")


def picture(mode: str = "RGB", height: int = 24, width: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(image: Image.Image, form: str = "JPEG", orientation: int = 1, **options: Any) -> bytes:
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(stream, form, **options, **({"exif": exif} if orientation > 1 else {}))
    return stream.getvalue()


def header_changed(content: bytes, offset: int, value: int) -> bytes:
    """Replace the byte at an offset from the frame header's marker (FF C0)."""
    changed = bytearray(content)
    changed[content.index(b"\xff\xc0") + offset] = value
    return bytes(changed)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_usual_jpegs_are_for_the_device(subsampling: str, progressive: bool) -> None:
    content = saved(picture(), subsampling=subsampling, progressive=progressive)
    assert as_jpeg(content, "a.jpg", None, USUAL) == Jpeg(content, "a.jpg", 24, 40, 1, 0)


def test_gray_and_tiny_jpegs_are_too() -> None:
    content = saved(picture("L", 1, 1))
    assert as_jpeg(content, "a", None, USUAL) == Jpeg(content, "a", 1, 1, 1, 0)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_orientation_is_a_trait_or_turns_the_size(orientation: int) -> None:
    content = saved(picture(), orientation=orientation)
    size = (40, 24) if orientation >= 5 else (24, 40)
    assert as_jpeg(content, "a", None, USUAL) == Jpeg(content, "a", 24, 40, 1, TURNED)
    assert as_jpeg(content, "a", None, EXIF) == Jpeg(content, "a", *size, orientation, 0)


def test_what_the_cpu_decodes() -> None:
    usual = saved(picture(), subsampling="4:2:0")
    others = {
        "png": saved(picture(), "PNG"),
        "cmyk": saved(picture("CMYK")),
        "stored as RGB": usual[:2] + bytes.fromhex("ffee000e") + b"Adobe" + bytes([0, 100, 0, 0, 0, 0, 0]) + usual[2:],
        "more behind it": usual + b"\0",
        "cut short": usual[:-30],
        "no picture": b"\xff\xd8\xff\xd9",
        "empty": b"",
        # In the frame header: bits per sample, sampling factors and names of components.
        "12 bits": header_changed(usual, 4, 12),
        "odd sampling": header_changed(usual, 14, 0x21),
        "odd luma": header_changed(usual, 11, 0x31),
        "named RGB": header_changed(header_changed(header_changed(usual, 10, 82), 13, 71), 16, 66),
    }
    assert [name for name, content in others.items() if as_jpeg(content, name, None, USUAL) is not None] == []


def test_bombs_are_left_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved(picture())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 40 - 1)
    assert as_jpeg(content, "a", None, USUAL) is None


def test_a_jpeg_that_is_decoded_smaller_is_the_cpus() -> None:
    content = saved(picture(height=40, width=64), orientation=6)
    asked: list[tuple[int, int]] = []

    def reduce(height: int, width: int) -> int:
        asked.append((height, width))
        return 2

    assert as_jpeg(content, "a", reduce, USUAL) is None and as_jpeg(content, "a", reduce, EXIF) is None
    assert as_jpeg(content, "a", lambda *_: 1, USUAL) is not None
    assert asked == [(40, 64), (64, 40)]
    # As on the CPU, a turned image whose sides would be cut is not reduced.
    odd = saved(picture(height=41, width=64), orientation=6)
    assert as_jpeg(odd, "a", reduce, EXIF) is not None and as_jpeg(odd, "a", reduce, USUAL) is None


def test_sources_hand_over_files_or_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(saved(picture()))
    picture().save(tmp_path / "b.png")
    source = opened(tmp_path)
    jpeg, png = (read_jpeg(source, index, None) for index in range(2))
    assert isinstance(jpeg, Jpeg) and jpeg.name == source.path(0)
    assert isinstance(png, Decoded) and png.traits == ON_CPU
    assert np.array_equal(png.image.permute(1, 2, 0).numpy(), np.asarray(picture()))
    digits = read_jpeg(opened("digits"), 0, None)
    assert isinstance(digits, Decoded) and digits.traits == ON_CPU


def same_as_decoded(source: ImageSource, index: int) -> None:
    """Check that `encoded` returns the file that `read_reduced` decodes, under the same name."""
    found = source.encoded(index)
    assert found is not None
    decoded = decode_content(*found, None, source.decoding)
    assert torch.equal(decoded.image, source.read_reduced(index, None).image) and found[1] == source.path(index)


def test_files_of_shards_and_tables(tmp_path: Path) -> None:
    shard = wds_shards.write_shard(
        tmp_path / "a.tar", [("0.jpg", saved(picture())), ("1.png", saved(picture(), "PNG"))]
    )
    source = wds_shards.opened(shard)
    for index, kind in enumerate((Jpeg, Decoded)):
        same_as_decoded(source, index)
        assert isinstance(read_jpeg(source, index, None), kind)
        same_as_decoded(Subset(source, np.array([1, 0])), index)
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(BadImage, match=r"a\.tar/0\.jpg \(its shard is shorter than when it was listed\)"):
        read_jpeg(source, 0, None)
    features = {"image": {"_type": "Image"}}
    hf_tables.write_parquet(tmp_path / "t" / "train.parquet", hf_tables.table([saved(picture())], features=features))
    table = opened(f"hf:{tmp_path / 't'}")
    same_as_decoded(table, 0)
    assert isinstance(read_jpeg(table, 0, None), Jpeg)


@pytest.mark.parametrize("name", ["gone.jpg", "folder.jpg", "pipe.jpg", "empty.jpg"])
def test_what_cannot_be_read_has_the_same_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "empty.jpg").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    source = FileSource("x", str(tmp_path), [name], None, None)
    with pytest.raises(BadImage) as usual:
        source.read_reduced(0, None)
    with pytest.raises(BadImage) as found:
        read_jpeg(source, 0, None)
    assert str(found.value) == str(usual.value)


def test_corrupted_images_are_in_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(saved(picture()))
    source = CorruptedSource(opened(tmp_path), EvalTransform(16), "gaussian_noise", 1, 0)
    assert source.encoded(0) is None
