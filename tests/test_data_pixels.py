"""Settings for the conversion of stored images to 8-bit RGB: orientation, alpha, range."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from mimref.config.base import DataConfig
from mimref.config.load import load_config
from mimref.data.decode import BadImage, Decoded, decode_content, decode_file
from mimref.data.loader import view_batches
from mimref.data.pixels import USUAL, Decoding
from mimref.data.traits import FLAT, NARROW, TRANSPARENT, TURNED, WIDE
from mimref.data.views import CropGroup
from mimref.errors import ConfigError
from mimref.evaluation.knn.config import KnnConfig
from tests.sources import opened

EXIF = Decoding(orientation="exif")


@pytest.fixture(autouse=True)
def no_warnings() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def colours(height: int = 16, width: int = 24) -> NDArray[np.uint8]:
    """Smooth pixels, with a different colour in every corner."""
    down, right = np.mgrid[:height, :width]
    channels = (255 * down / height, 255 * right / width, 120 + 120 * np.sin((down + 2 * right) / 25))
    return np.stack(channels, axis=2).astype(np.uint8)


def content(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def decoded(image: Image.Image, kind: str = "png", decoding: Decoding = USUAL, **options: Any) -> Decoded:
    return decode_content(content(image, kind, **options), "image", None, decoding)


def gray_of(values: NDArray[Any], window: str, kind: str = "tiff") -> list[Any]:
    if kind == "pgm":  # not every version of Pillow writes it
        data = b"P5 %d %d 65535\n" % values.shape[::-1] + values.astype(">u2").tobytes()
    else:
        data = content(Image.fromarray(values), kind)
    found = decode_content(data, "image", None, Decoding(range=window)).image
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    listed: list[Any] = found[0].tolist()
    return listed


# --- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_exif_turns_as_pillow_does(kind: str, orientation: int) -> None:
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {"quality": 95} if kind == "jpeg" else {}
    data = content(Image.fromarray(colours()), kind, exif=oriented(orientation), **options)
    stored = decode_content(data, "image")
    assert stored.image.shape == (3, 16, 24)
    assert bool(stored.traits & TURNED) == (orientation > 1)
    turned = decode_content(data, "image", None, EXIF)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(turned.image.permute(1, 2, 0), expected)
    assert (turned.height, turned.width) == expected.shape[:2]
    assert turned.image[None].is_contiguous(memory_format=torch.channels_last)
    assert not turned.traits & TURNED


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_is_turned_by_pillow_and_not_twice(orientation: int) -> None:
    data = content(Image.fromarray(colours()), "tiff", tiffinfo={0x0112: orientation})
    found = [decode_content(data, "image", None, decoding) for decoding in (Decoding(), EXIF)]
    assert torch.equal(found[0].image, found[1].image)
    assert found[0].image.shape == (3, 24, 16) if orientation >= 5 else (3, 16, 24)
    assert [(each.height, each.width) for each in found] == [tuple(each.image.shape[1:]) for each in found]
    assert not found[0].traits & TURNED


@pytest.mark.parametrize("orientation", range(2, 9))
def test_reduced_jpeg_is_turned(orientation: int) -> None:
    data = content(Image.fromarray(colours(160, 240)), "jpeg", quality=95, exif=oriented(orientation))
    asked: list[tuple[int, int]] = []

    def reduce(height: int, width: int) -> int:
        asked.append((height, width))
        return 4

    whole, reduced = decode_content(data, "image", None, EXIF), decode_content(data, "image", reduce, EXIF)
    assert asked == [(whole.height, whole.width)] == [(reduced.height, reduced.width)]
    assert reduced.image.shape[1:] == (whole.height // 4, whole.width // 4)
    means = torch.nn.functional.avg_pool2d(whole.image.float(), 4)
    assert (reduced.image - means).abs().mean() < 2


def test_turned_jpeg_is_reduced_by_what_divides_its_sides() -> None:
    data = content(Image.fromarray(colours(60, 100)), "jpeg", exif=oriented(3))
    assert decode_content(data, "image", lambda *_: 8, EXIF).image.shape == (3, 15, 25)


def test_crops_of_turned_files_are_those_of_upright_ones(tmp_path: Path) -> None:
    upright = Image.fromarray(colours(96, 128))
    for orientation, turn in ((6, Image.Transpose.ROTATE_90), (3, Image.Transpose.ROTATE_180)):
        for name, image, exif in (("a", upright, 1), ("b", upright.transpose(turn), orientation)):
            (tmp_path / f"{orientation}{name}").mkdir()
            image.save(tmp_path / f"{orientation}{name}" / "0.png", exif=oriented(exif))
        sources = [opened(tmp_path / f"{orientation}{name}", orientation="exif") for name in "ab"]
        groups = [CropGroup(3, 16, (0.1, 0.5))]
        crops = [next(view_batches(each, groups, batch_size=1, seed=1, epochs=range(1))).crops[0] for each in sources]
        assert torch.equal(*crops)


def test_orientation_in_xmp() -> None:
    notes = PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>')
    data = content(Image.fromarray(colours()), "png", pnginfo=notes)
    assert np.array_equal(decode_content(data, "image", None, EXIF).image.permute(1, 2, 0), colours()[::-1, ::-1])
    assert decode_content(data, "image").traits & TURNED


def test_damaged_exif_costs_no_image() -> None:
    data = content(Image.fromarray(colours()), "png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f\x12\x01\x03\0")
    assert decode_content(data, "image", None, EXIF).image.shape == (3, 16, 24)


# --- alpha


def test_alpha_is_composited() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, :3], rgba[0, :, 3] = (200, 100, 0), (255, 128, 0)
    image = Image.fromarray(rgba)
    for ground, level in (("white", 255), ("black", 0)):
        found = decoded(image, decoding=Decoding(alpha=ground))
        expected = [[round((c * a + level * (255 - a)) / 255) for a in (255, 128, 0)] for c in (200, 100, 0)]
        assert found.image[:, 0].tolist() == expected
        assert not found.traits & TRANSPARENT
    dropped = decoded(image)
    assert dropped.image[:, 0].tolist() == [[200] * 3, [100] * 3, [0] * 3]
    assert dropped.traits & TRANSPARENT and dropped.traits & FLAT


def test_checker_shows_black_and_white_shapes() -> None:
    rgba = np.zeros((16, 16, 4), np.uint8)
    found = decoded(Image.fromarray(rgba), decoding=Decoding(alpha="checker")).image
    assert torch.equal(found[0], found[2])
    assert found[0, :8, :8].unique().tolist() == found[0, 8:, 8:].unique().tolist() == [102]
    assert found[0, :8, 8:].unique().tolist() == found[0, 8:, :8].unique().tolist() == [153]


def palette(mode: str) -> tuple[Image.Image, dict[str, Any]]:
    """An image of 2 x 1 pixels, the first of which is transparent."""
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putdata([0, 1])
        return image, {"transparency": 0}
    if mode == "LA":
        return Image.fromarray(np.array([[[10, 0], [40, 255]]], np.uint8)), {}
    gray = Image.fromarray(np.array([[10, 40]], np.uint8))
    return (gray, {"transparency": 10}) if mode == "L" else (gray.convert("RGB"), {"transparency": (10, 10, 10)})


@pytest.mark.parametrize("mode", ["P", "LA", "L", "RGB"])
def test_every_kind_of_transparency(mode: str) -> None:
    image, options = palette(mode)
    dropped = decoded(image, **options)
    assert dropped.image[0].tolist() == [[10, 40]] and dropped.traits & TRANSPARENT
    assert decoded(image, decoding=Decoding(alpha="white"), **options).image[0].tolist() == [[255, 40]]


def test_opaque_alpha_is_nothing_peculiar() -> None:
    image = Image.fromarray(colours()).convert("RGBA")
    for alpha in ("drop", "white"):
        found = decoded(image, decoding=Decoding(alpha=alpha))
        assert np.array_equal(found.image.permute(1, 2, 0), colours()) and not found.traits


# --- range

SCAN = np.array([[900, 1000, 1155]], np.uint16)


@pytest.mark.parametrize("kind", ["tiff", "png", "pgm"])
def test_windows_of_sixteen_bits(kind: str) -> None:
    assert gray_of(SCAN, "type", kind) == [[4, 4, 4]]
    assert gray_of(SCAN, "image", kind) == [[0, 100, 255]]
    assert gray_of(SCAN, "1000,1010", kind) == [[0, 0, 255]]
    assert gray_of(SCAN, "800,1310", kind) == [[50, 100, 178]]


def test_percentiles_leave_outliers_out() -> None:
    values = np.arange(1000, dtype=np.uint16)[None] + 100
    values[0, 0], values[0, -1] = 0, 65535
    low, high = np.percentile(values, (0.5, 99.5))
    expected = np.rint(255 * ((values - low) / (high - low)).clip(0, 1)).astype(int)
    assert gray_of(values, "percentile") == expected.tolist()
    assert expected[0, 500] in range(120, 135)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_other_wide_pixels(dtype: type) -> None:
    values = np.array([[-1000, 0, 3000]], dtype)
    assert gray_of(values, "image") == [[0, 64, 255]]
    assert gray_of(values, "0,6000") == [[0, 0, 128]]
    with pytest.raises(BadImage, match=r"data\.range"):
        gray_of(values, "type")


def test_pixels_that_are_no_numbers() -> None:
    values = np.array([[np.nan, 1, 2, np.inf, -np.inf]], np.float32)
    assert gray_of(values, "image") == [[0, 0, 255, 255, 0]]
    with pytest.raises(BadImage, match="finite"):
        gray_of(np.full((2, 2), np.nan, np.float32), "image")


def test_constant_images_are_black() -> None:
    assert gray_of(np.full((1, 2), 7, np.uint16), "image") == [[0, 0]]


def test_eight_bits_keep_their_range() -> None:
    image = Image.fromarray(np.array([[100, 110]], np.uint8))
    assert decoded(image, decoding=Decoding(range="image")).image[0].tolist() == [[100, 110]]


def deep_png(values: NDArray[np.uint16]) -> bytes:
    """A PNG of 16-bit colours, which Pillow cannot write."""
    height, width, channels = values.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def deep_tiff(values: NDArray[np.uint16], order: str = "<") -> bytes:
    """A TIFF of uncompressed 16-bit RGB in one strip."""
    height, width, channels = values.shape
    pixels, count = values.astype(f"{order}u2").tobytes(), 10
    place = 8 + 2 + 12 * count + 4
    entries = [
        *((256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, place), (259, 3, 1, 1), (262, 3, 1, 2)),
        *((273, 4, 1, place + 2 * channels), (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(pixels))),
        (284, 3, 1, 1),
    ]
    listed = b""
    for tag, kind, number, value in entries:
        short = kind == 3 and number == 1
        listed += struct.pack(f"{order}HHI", tag, kind, number) + struct.pack(
            f"{order}{'HH' if short else 'I'}", *((value, 0) if short else (value,))
        )
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    bits = struct.pack(f"{order}{channels}H", *[16] * channels)
    return start + struct.pack(f"{order}H", count) + listed + bytes(4) + bits + pixels


@pytest.mark.parametrize("kind", ["png", "png with alpha", "tiff", "big-endian tiff"])
def test_windows_of_colours_of_sixteen_bits(kind: str) -> None:
    values: NDArray[np.uint16] = np.random.default_rng(0).integers(1000, 1256, (5, 7, 3)).astype(np.uint16)
    values[0, 0] = (1000, 1100, 1255)
    if kind == "png with alpha":
        alpha = np.full((5, 7, 1), 65535, np.uint16)
        alpha[0, 1] = 0
        data = deep_png(np.concatenate([values, alpha], axis=2))
    else:
        data = deep_png(values) if kind == "png" else deep_tiff(values, ">" if "big" in kind else "<")
    usual = decode_content(data, "image")
    assert np.array_equal(usual.image.permute(1, 2, 0), values >> 8)
    assert usual.traits & (WIDE | NARROW) == WIDE | NARROW
    found = decode_content(data, "image", None, Decoding(range="image", alpha="white"))
    expected = values - 1000
    if kind == "png with alpha":
        expected[0, 1] = 255
    assert np.array_equal(found.image.permute(1, 2, 0), expected)
    assert not found.traits
    assert not decode_content(deep_png(values * 50), "image").traits & NARROW


@pytest.mark.parametrize("text", ["5,1", "1,1", "a,b", "1", "1,2,3", "nan,1", "0,inf", "all"])
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.range"):
        load_config(KnnConfig, sets=[f"data.range={text}"])


# --- traits


def test_traits_of_wide_pixels() -> None:
    wide = (np.arange(4096, dtype=np.uint16) * 16).reshape(64, 64)
    assert decoded(Image.fromarray(wide), "tiff").traits == WIDE
    narrow = decoded(Image.fromarray(wide // 256 + 900), "tiff").traits
    assert narrow == WIDE | NARROW | FLAT
    assert decoded(Image.fromarray(wide // 256 + 900), "tiff", Decoding(range="image")).traits == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (32, 32), (640, 480)])
def test_flat_images(size: tuple[int, int]) -> None:
    red = Image.new("RGB", size, (255, 0, 0))
    assert decoded(red).traits == FLAT
    # Stripes in every other pixel column are not flat, even if a look at some of the pixels misses them.
    width, height = size
    if width > 1:
        stripes = np.repeat((np.arange(width) % 2 * 255).astype(np.uint8)[None], height, axis=0)
        assert decoded(Image.fromarray(stripes)).traits == 0


def test_settings_reach_every_reader(tmp_path: Path) -> None:
    Image.fromarray(colours()).save(tmp_path / "0.jpg", exif=oriented(6))
    (tmp_path / "list.csv").write_text("path\n0.jpg\n")
    for spec in (tmp_path, f"list:{tmp_path}/list.csv"):
        assert opened(spec).read(0).shape == (3, 16, 24)
        assert opened(spec, orientation="exif").read(0).shape == (3, 24, 16)
        assert opened(spec, orientation="exif", alpha="white", range="1,2").decoding.changes() == {
            "orientation": "exif",
            "alpha": "white",
            "range": "1,2",
        }
    assert opened("digits", range="image").read(0).shape == (3, 8, 8)
    assert DataConfig().range is None


def test_decoding_a_file_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "scan.tif"
    Image.fromarray(SCAN).save(path)
    assert decode_file(str(path), None, Decoding(range="image")).image[0].tolist() == [[0, 100, 255]]
