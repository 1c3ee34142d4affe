import io
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mimref.config.base import DataConfig
from mimref.data.decode import BadImage, BadImages
from mimref.data.open import open_source
from mimref.errors import DataError
from tests.sources import decode_image


@pytest.fixture(autouse=True)
def no_warnings() -> object:
    """Reading reports faults only by BadImage, never by warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def colours(height: int = 20, width: int = 30) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels_of(image: Image.Image) -> list[object]:
    listed: list[object] = np.asarray(image).transpose(2, 0, 1).tolist()
    return listed


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


# --- kinds that are converted


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tif", "tiff", "webp"])
def test_exact_kinds_come_back_as_they_were(tmp_path: Path, suffix: str) -> None:
    image = colours()
    path = str(tmp_path / f"image.{suffix}")
    image.save(path, lossless=True) if suffix == "webp" else image.save(path)
    decoded = decode_image(path)
    assert decoded.shape == (3, 20, 30) and decoded.dtype == torch.uint8 and decoded.is_contiguous()
    assert decoded.tolist() == pixels_of(image)
    decoded[0, 0, 0] = 1  # writable


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "1", "CMYK", "P", "YCbCr"])
def test_modes_become_rgb_as_torchvision_does(tmp_path: Path, mode: str) -> None:
    from torchvision.datasets.folder import pil_loader

    path = str(tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.png"))
    colours().convert(mode).save(path)
    with Image.open(path) as stored:
        assert stored.mode == ("RGB" if mode == "YCbCr" else mode)
    assert decode_image(path).tolist() == pixels_of(pil_loader(path))


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    path = str(tmp_path / "image.png")
    Image.fromarray(np.eye(5, dtype=bool)).save(path)
    assert decode_image(path).tolist() == [(np.eye(5, dtype=int) * 255).tolist()] * 3


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])])
def test_transparent_palette_keeps_its_colours(tmp_path: Path, transparency: int | bytes) -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.putdata([0, 1, 2])
    path = str(tmp_path / "image.png")
    palette.save(path, transparency=transparency)
    assert decode_image(path).tolist() == [[[10, 40, 70]], [[20, 50, 80]], [[30, 60, 90]]]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257, 300], [32768, 65278, 65406, 65407, 65535]], dtype=np.uint16)
    path = str(tmp_path / f"image.{suffix}")
    if suffix == "pgm":  # only newer versions of Pillow write it
        Path(path).write_bytes(b"P5 5 2 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    expected = [[round(value * 255 / 65535) for value in row] for row in values.tolist()]
    assert expected[0][:3] == [0, 0, 1]
    assert decode_image(path).tolist() == [expected] * 3


def test_thirty_two_bits_within_sixteen(tmp_path: Path) -> None:
    path = str(tmp_path / "image.tif")
    Image.fromarray(np.array([[0, 65535]], dtype=np.int32)).save(path)
    assert decode_image(path).tolist() == [[[0, 255]]] * 3
    Image.fromarray(np.array([[0, 65536]], dtype=np.int32)).save(path)
    with pytest.raises(BadImage, match="32-bit pixels outside"):
        decode_image(path)
    Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32)).save(path)
    with pytest.raises(BadImage, match="floating-point"):
        decode_image(path)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations_show_their_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (6, 5), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    path = str(tmp_path / f"image.{suffix}")
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    with Image.open(path) as stored:
        assert getattr(stored, "n_frames", 1) == 3
    assert decode_image(path).tolist() == pixels_of(frames[0])


def test_orientation_is_left_as_stored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    path = str(tmp_path / "image.jpg")
    colours(20, 30).save(path, exif=exif)
    assert decode_image(path).shape == (3, 20, 30)


def test_the_suffix_need_not_be_right(tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    content = io.BytesIO()
    colours().save(content, "png")
    path.write_bytes(content.getvalue())
    assert decode_image(str(path)).shape == (3, 20, 30)


# --- files that cannot be read


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "ppm", "tif", "gif", "webp"])
@pytest.mark.parametrize("share", [0.02, 0.8])
def test_truncated_files(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"image.{suffix}"
    colours(64, 64).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BadImage) as caught:
        decode_image(str(path))
    assert caught.value.path == str(path)
    assert caught.value.reason and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_empty_and_foreign_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    path.write_bytes(b"")
    with pytest.raises(BadImage, match="empty file"):
        decode_image(str(path))
    path.write_text("<html>404 not found</html>")
    with pytest.raises(BadImage, match="not an image"):
        decode_image(str(path))


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    path = tmp_path / "image"
    for kind in ("png", "jpeg", "gif", "webp", "tiff", "bmp", "ppm"):
        content = io.BytesIO()
        colours(16, 16).save(content, kind)
        for _ in range(15):
            damaged = bytearray(content.getvalue())
            for position in draw.integers(0, min(len(damaged), 200), 4):
                damaged[position] = draw.integers(0, 256)
            path.write_bytes(damaged)
            try:
                assert decode_image(str(path)).shape[0] == 3
            except BadImage as error:
                assert error.reason


def test_missing_and_dangling_files(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="no such file"):
        decode_image(str(tmp_path / "gone.png"))
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(BadImage, match="no such file"):
        decode_image(str(tmp_path / "link.png"))


def test_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    colours().save(path)
    path.chmod(0)
    if os.access(path, os.R_OK):  # the superuser can read everything

        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(BadImage, match="permission denied"):
        decode_image(str(path))


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (30_000, 30_000)])
def test_decompression_bombs(tmp_path: Path, width: int, height: int) -> None:
    # Pillow warns about the first and refuses the second.
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path = tmp_path / "bomb.png"
    rows = zlib.compress(b"\0" * 1000)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    with pytest.raises(BadImage, match=r"more than \d+ pixels"):
        decode_image(str(path))


def test_bad_images_cross_process_borders() -> None:
    error = pickle.loads(pickle.dumps(BadImage("a.png", "empty file")))
    assert (error.path, error.reason, str(error)) == ("a.png", "empty file", "a.png (empty file)")


# --- the record of bad images


def test_more_than_max_bad_is_an_error_that_names_them() -> None:
    bad = BadImages(max_bad=3)
    for name in ("b.png", "a.png", "c.png"):
        bad.add(name, "empty file")
        bad.add(name, "empty file")  # the next epoch encounters it again
    assert bad.items == [("a.png", "empty file"), ("b.png", "empty file"), ("c.png", "empty file")]
    with pytest.raises(DataError) as caught:
        bad.add("d.png", "not an image")
    message = str(caught.value)
    assert message.startswith("4 images") and "data.max_bad=3" in message
    assert "b.png (empty file), a.png (empty file), c.png (empty file), ..." in message


def test_no_bad_image_is_allowed() -> None:
    with pytest.raises(DataError, match=r"^1 image .*data\.max_bad=0: a\.png \(empty file\)"):
        BadImages(max_bad=0).add("a.png", "empty file")


def test_account_is_picklable() -> None:
    bad = BadImages(max_bad=2)
    bad.add("a.png", "empty file")
    assert pickle.loads(pickle.dumps(bad)).items == [("a.png", "empty file")]


def test_folder_with_every_kind_of_file(tmp_path: Path) -> None:
    colours().save(tmp_path / "good.png")
    colours().convert("CMYK").save(tmp_path / "cmyk.jpg")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "notes.txt").write_text("text")
    source = open_source(DataConfig(spec=str(tmp_path)), "train")
    bad, good = BadImages(max_bad=2), 0
    for index in range(len(source)):
        try:
            good += source.read(index).shape == (3, 20, 30)
        except BadImage as error:
            assert error.path == source.path(index)
            bad.add(error.path, error.reason)
    assert good == 2
    assert bad.items == [(str(tmp_path / "empty.jpg"), "empty file"), (str(tmp_path / "text.png"), "not an image")]
