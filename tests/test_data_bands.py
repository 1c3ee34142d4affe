"""Images of any number of channels: values from every kind of file, the rule for axes, ranges, and refusals."""

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from mimref.config.base import DataConfig
from mimref.config.load import validated
from mimref.data.bands import WrongChannels, as_pixels, channels_last
from mimref.data.decode import BadImage, decode_array, decode_content, decode_file
from mimref.data.given import GivenSource
from mimref.data.loader import crop_batches, view_batches
from mimref.data.open import open_source
from mimref.data.pixels import Decoding
from mimref.data.sample import check_readable, look_at
from mimref.data.statistics import channel_statistics
from mimref.data.traits import NARROW, WIDE
from mimref.data.transforms import EvalTransform, resize
from mimref.data.views import CropGroup
from mimref.errors import ConfigError, DataError

tifffile = pytest.importorskip("tifffile")


def values(channels: int, dtype: Any = np.uint8, height: int = 11, width: int = 9) -> NDArray[Any]:
    """Random pixels (H, W, C): the whole range of 8 bits, or 12 bits of 16."""
    top = {np.uint8: 256, np.uint16: 4096}[dtype]
    return np.random.default_rng(channels).integers(0, top, (height, width, channels)).astype(dtype)


def write(path: Path, pixels: NDArray[Any]) -> Path:
    """Write a TIFF, an `.npy` with the channels first or an `.npz`, depending on the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, pixels.transpose(2, 0, 1))
    elif path.suffix == ".npz":
        np.savez(path, pixels)
    elif pixels.shape[2] == 1:
        tifffile.imwrite(path, pixels[:, :, 0])
    else:
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    return path


def expected(pixels: NDArray[Any]) -> NDArray[Any]:
    """Expected pixels (C, H, W): 8 bits unchanged, 16 bits scaled to the range from 0 to 255."""
    found = pixels.transpose(2, 0, 1)
    return found if pixels.dtype == np.uint8 else (found.astype(np.float64) / 65535 * 255).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("suffix", [".tif", ".npy", ".npz"])
def test_files_keep_their_values(suffix: str, channels: int, dtype: Any, tmp_path: Path) -> None:
    pixels = values(channels, dtype)
    path = write(tmp_path / f"x{suffix}", pixels)
    for decoded in (
        decode_file(str(path), None, Decoding(channels=channels)),
        decode_content(path.read_bytes(), "x", None, Decoding(channels=channels)),
    ):
        assert decoded.image.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
        assert (decoded.height, decoded.width) == (11, 9)
        np.testing.assert_allclose(decoded.image.numpy(), expected(pixels), rtol=1e-6, atol=0)


def test_all_values_of_16_bits_stay_different() -> None:
    found = as_pixels(np.arange(65536, dtype=np.uint16), "type")
    assert found.dtype == np.float32 and len(np.unique(found)) == 65536 and (found[0], found[-1]) == (0, 255)


@pytest.mark.parametrize(("window", "low", "high"), [("-5,5", -5, 5), ("image", -8, 7.5), ("percentile", None, None)])
def test_floats_need_a_range(window: str, low: float | None, high: float | None) -> None:
    floats = np.linspace(-8, 7.5, 60, dtype=np.float32).reshape(3, 4, 5)
    with pytest.raises(ValueError, match=r"data\.range"):
        as_pixels(floats, "type")
    if low is None or high is None:
        low, high = map(float, np.percentile(floats, (0.5, 99.5)))
    wanted = 255 * np.clip((floats.astype(np.float64) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(as_pixels(floats, window), wanted, atol=1e-4)


def test_missing_numbers_are_black() -> None:
    found = as_pixels(np.array([[np.nan, 0.0], [1.0, np.inf]]), "0,1")
    assert found.tolist() == [[0, 0], [255, 255]]


def test_signed_and_wide_integers_outside_of_16_bits_need_a_range(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((2, 2, 2), -1000, np.int16))
    with pytest.raises(BadImage, match=r"data\.range"):
        decode_file(str(tmp_path / "x.npy"), None, Decoding(channels=2))
    windowed = decode_file(str(tmp_path / "x.npy"), None, Decoding(channels=2, range="-1000,1000"))
    assert windowed.image.unique().tolist() == [0]


def test_channels_are_last_where_that_fits_else_first() -> None:
    def shape(*sizes: int, channels: int, prefer_first: bool = False) -> tuple[int, ...]:
        return channels_last(np.zeros(sizes), channels, prefer_first=prefer_first).shape

    assert shape(5, 6, channels=1) == (5, 6, 1)
    assert shape(5, 6, 4, channels=4) == (5, 6, 4)
    assert shape(4, 5, 6, channels=4) == (5, 6, 4)
    assert shape(4, 5, 4, channels=4) == (4, 5, 4)
    assert shape(4, 5, 4, channels=4, prefer_first=True) == (5, 4, 4)
    for sizes in ((5, 6), (5, 6, 3), (13, 6)):
        with pytest.raises(WrongChannels):
            shape(*sizes, channels=13)
    with pytest.raises(ValueError, match=r"\(2, 2, 2, 2\)"):
        shape(2, 2, 2, 2, channels=2)


def test_tiff_of_pages_planes_and_many_kinds(tmp_path: Path) -> None:
    pixels = values(5, np.uint16)
    tifffile.imwrite(tmp_path / "pages.tif", pixels.transpose(2, 0, 1), photometric="minisblack")
    planes = {"photometric": "minisblack", "planarconfig": "separate"}
    tifffile.imwrite(tmp_path / "planes.tif", pixels.transpose(2, 0, 1), **planes)
    zipped = {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}
    tifffile.imwrite(tmp_path / "deflate.tif", pixels, **zipped)
    for name in ("pages", "planes", "deflate"):
        found = decode_file(str(tmp_path / f"{name}.tif"), None, Decoding(channels=5)).image
        np.testing.assert_allclose(found.numpy(), expected(pixels), rtol=1e-6)
    tifffile.imwrite(tmp_path / "4d.tif", np.zeros((2, 3, 8, 8), np.uint8), photometric="minisblack")
    with pytest.raises(BadImage, match="axes"):
        decode_file(str(tmp_path / "4d.tif"), None, Decoding(channels=3))
    # Pillow would drop the fifth byte of each pixel, and the lower byte of each 16-bit value.
    tifffile.imwrite(tmp_path / "rgb+1.tif", values(5), photometric="rgb", planarconfig="contig")
    assert decode_file(str(tmp_path / "rgb+1.tif"), None, Decoding(channels=5)).image.shape == (5, 11, 9)
    four = values(4, np.uint16)
    tifffile.imwrite(tmp_path / "rgbx.tif", four, photometric="rgb", planarconfig="contig", extrasamples=[0])
    found = decode_file(str(tmp_path / "rgbx.tif"), None, Decoding(channels=4)).image
    np.testing.assert_allclose(found.numpy(), expected(four), rtol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_is_turned_alike_by_both_readers(orientation: int, tmp_path: Path) -> None:
    """Pillow reads one channel, tifffile five copies of it. From bytes: by path, Pillow 13.0 scrambles 5 to 8."""
    pixels, found = np.arange(6, dtype=np.uint8).reshape(2, 3), []
    for channels in (1, 5):
        stored = pixels if channels == 1 else np.stack([pixels] * channels, axis=2)
        tags, path = [(274, "H", 1, orientation, True)], tmp_path / f"{channels}.tif"
        layout = None if channels == 1 else "contig"
        tifffile.imwrite(path, stored, photometric="minisblack", planarconfig=layout, extratags=tags)
        found.append(decode_content(path.read_bytes(), "x", None, Decoding(channels=channels)).image)
    assert torch.equal(found[0].expand(5, -1, -1), found[1])


def test_what_pillow_reads_keeps_its_channels(tmp_path: Path) -> None:
    rgba = values(4)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    found = decode_file(str(tmp_path / "rgba.png"), None, Decoding(channels=4)).image
    assert np.array_equal(found.numpy(), expected(rgba))
    wide = values(1, np.uint16)[:, :, 0]
    Image.fromarray(wide).save(tmp_path / "wide.png")
    found = decode_file(str(tmp_path / "wide.png"), None, Decoding(channels=1)).image
    np.testing.assert_allclose(found.numpy(), expected(wide[:, :, None]), rtol=1e-6)
    palette = Image.fromarray(values(3)).quantize(7)
    palette.save(tmp_path / "palette.png")
    found = decode_file(str(tmp_path / "palette.png"), None, Decoding(channels=3)).image
    assert np.array_equal(found.numpy(), np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    Image.fromarray(values(1)[:, :, 0]).save(tmp_path / "gray.jpg", quality=95)
    assert decode_file(str(tmp_path / "gray.jpg"), None, Decoding(channels=1)).image.shape == (1, 11, 9)


@pytest.mark.parametrize("name", ["x.png", "x.npy", "x.tif"])
def test_another_number_of_channels_names_file_and_both(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "x.png":
        Image.fromarray(values(3)).save(path)
    else:
        write(path, values(3))
    with pytest.raises(DataError, match=rf"{name} has 3 channels, not 4 .*--channels 3"):
        decode_file(str(path), None, Decoding(channels=4))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.tif", values(5))
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(BadImage, match=r"pip install 'mimref\[bands\]'"):
        decode_file(str(path), None, Decoding(channels=5))


def test_damaged_files_are_bad_images(tmp_path: Path) -> None:
    for name, content in (
        ("x.npy", b"\x93NUMPY\x01\x00rubbish"),
        ("x.npz", b"PK\x03\x04rubbish"),
        ("x.tif", b"II*\0abc"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadImage, match=name):
            decode_file(str(tmp_path / name), None, Decoding(channels=4))
    np.save(tmp_path / "objects.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    with pytest.raises(BadImage):
        decode_file(str(tmp_path / "objects.npy"), None, Decoding(channels=4))


# --- data sets


def folder_of(root: Path, channels: int, dtype: Any, suffix: str = ".npy", count: int = 6) -> DataConfig:
    for split in ("train", "val"):
        for number in range(count):
            pixels = np.random.default_rng(number + len(split)).integers(0, 200, (12, 10, channels)).astype(dtype)
            write(root / split / f"c{number % 2}" / f"{number}{suffix}", pixels)
    return DataConfig(spec=str(root), channels=channels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_crops_equal_numpy(dtype: Any, tmp_path: Path) -> None:
    """Crops without resizing are the middle of the image, and each channel has its own mean and standard deviation."""
    data = folder_of(tmp_path, 4, dtype)
    source = open_source(data, "train")
    assert source.channels == 4 and source.labels is not None and len(source) == 6
    batch = next(crop_batches(source, EvalTransform(10, 1.0), batch_size=6))
    for place, index in enumerate(batch.indices):
        stored = np.load(source.path(index)).transpose(1, 2, 0)
        np.testing.assert_allclose(batch.crops[place].numpy(), expected(stored)[:, 1:11], rtol=1e-6)
    transform = EvalTransform(10, 1.0, (0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8))
    normalised = transform.normalize(batch.crops)
    mean, std = (np.array(each)[:, None, None] for each in (transform.mean, transform.std))
    np.testing.assert_allclose(normalised.numpy(), (batch.crops.numpy() / 255.0 - mean) / std, rtol=1e-5, atol=1e-6)


def test_views_are_the_same_for_every_number_of_workers(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path, 5, np.uint16), "train")
    groups = [CropGroup(2, 8, (0.3, 1.0))]

    def crops(workers: int) -> torch.Tensor:
        found = view_batches(source, groups, batch_size=3, seed=1, epochs=range(2), workers=workers)
        return torch.cat([batch.crops[0] for batch in found])

    first = crops(0)
    assert first.shape == (12, 2, 5, 8, 8) and first.dtype == torch.float32 and first.max() < 1
    assert torch.equal(first, crops(2))


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_channels_are_resized_as_single_ones_by_pillow(channels: int) -> None:
    pixels = values(channels, height=40, width=31)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    found = resize(image, [16, 16])
    wide = resize(image.float(), [16, 16])
    for channel in range(channels):
        plain = Image.fromarray(pixels[:, :, channel]).resize((16, 16), Image.Resampling.BICUBIC)
        assert np.abs(found[channel].numpy().astype(int) - np.asarray(plain)).max() <= 1
        # Pillow rounds between its row and column passes for bytes, but not for floats.
        floats = Image.fromarray(pixels[:, :, channel].astype(np.float32)).resize((16, 16), Image.Resampling.BICUBIC)
        assert np.abs(wide[channel].numpy() - np.asarray(floats).clip(0, 255)).max() < 1e-2


def test_statistics_equal_numpy(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path, 3, np.uint16), "train")
    mean, std = channel_statistics(source)
    pixels = np.stack([np.load(source.path(index)) for index in range(len(source))]).astype(np.float64) / 65535
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), rtol=1e-5)
    assert channel_statistics(source) == (mean, std)
    few = channel_statistics(source, most=2)
    chosen = pixels[[0, 5]]
    np.testing.assert_allclose(few[0], chosen.mean(axis=(0, 2, 3)), rtol=1e-5)


def test_a_constant_channel_is_not_divided_by(tmp_path: Path) -> None:
    write(tmp_path / "x.npy", np.stack([np.full((4, 4), 51), np.arange(16).reshape(4, 4)], axis=2).astype(np.uint8))
    mean, std = channel_statistics(open_source(DataConfig(spec=str(tmp_path), channels=2), "train"))
    assert mean[0] == 0.2 and std[0] == 1 and 0 < std[1] < 0.1


def test_mixed_folders_are_refused_at_the_start(tmp_path: Path) -> None:
    data = folder_of(tmp_path, 4, np.uint8)
    write(tmp_path / "train/c1/5.npy", values(3))
    with pytest.raises(DataError, match=r"5\.npy has 3 channels, not 4"):
        check_readable(open_source(data, "train"), max_bad=100)
    wrong = validated(DataConfig, {"spec": str(tmp_path), "channels": 7})
    with pytest.raises(DataError, match=r"0\.npy has 4 channels, not 7"):
        check_readable(open_source(wrong, "train"), max_bad=100)


def test_arrays_are_images_only_with_channels(tmp_path: Path) -> None:
    data = folder_of(tmp_path, 3, np.uint8)
    assert len(open_source(data, "train")) == 6
    with pytest.raises(DataError, match=r"6 \.npy"):
        open_source(DataConfig(spec=str(tmp_path)), "train")


def test_images_without_colours(tmp_path: Path) -> None:
    seen = look_at(open_source(folder_of(tmp_path, 4, np.uint8), "train"))
    assert seen.gray and seen.channels == 4 and seen.colored == 0


def test_shards_hold_arrays_and_tiff(tmp_path: Path) -> None:
    pixels = values(4, np.uint16)
    contents = {"npy": io.BytesIO(), "tif": io.BytesIO()}
    np.save(contents["npy"], pixels)
    tifffile.imwrite(contents["tif"], pixels, photometric="minisblack", planarconfig="contig")
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for number, (suffix, stream) in enumerate(contents.items()):
            for name, content in ((f"{number}.{suffix}", stream.getvalue()), (f"{number}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    source = open_source(DataConfig(spec=f"wds:{tmp_path}/train-0.tar", channels=4), "train")
    assert len(source) == 2
    for index in range(2):
        np.testing.assert_allclose(source.read(index).numpy(), expected(pixels), rtol=1e-6)


@pytest.mark.parametrize("kind", ["array", "lists", "tiff", "npy"])
def test_tables_hold_arrays_and_files(kind: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pixels = values(4, np.uint16)
    stream = io.BytesIO()
    if kind == "tiff":
        tifffile.imwrite(stream, pixels, photometric="minisblack", planarconfig="contig")
    else:
        np.save(stream, pixels)
    cells = pixels if kind == "array" else pixels.tolist() if kind == "lists" else stream.getvalue()
    features = {
        "array": datasets.Array3D(pixels.shape, "uint16"),
        "lists": datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("uint16")))),
    }.get(kind, datasets.Value("binary"))
    features = datasets.Features({"image": features, "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": [cells] * 2, "label": [0, 1]}, features=features).to_parquet(
        os.fspath(tmp_path / "train.parquet")
    )
    source = open_source(DataConfig(spec=f"hf:{tmp_path}", channels=4), "train")
    np.testing.assert_allclose(source.read(1).numpy(), expected(pixels), rtol=1e-6)
    wrong = open_source(DataConfig(spec=f"hf:{tmp_path}", channels=5), "train")
    with pytest.raises(DataError, match=r"\[0\] has 4 channels, not 5"):
        wrong.read(0)


@pytest.mark.parametrize("suffix", [".tif", ".npy", ".png"])
def test_narrow_values_of_16_bits_are_reported(suffix: str, tmp_path: Path) -> None:
    """12 bits stored in 16 are reported, unless `data.range` defines white."""
    pixels = values(1, np.uint16)
    path = tmp_path / f"x{suffix}"
    if suffix == ".png":
        Image.fromarray(pixels[:, :, 0]).save(path)
    else:
        write(path, pixels)
    for window, traits in (("type", WIDE | NARROW), ("0,4095", 0)):
        assert decode_file(str(path), None, Decoding(channels=1, range=window)).traits == traits
    assert decode_array(pixels, "x", Decoding(channels=1)).traits == WIDE | NARROW
    assert decode_array(values(4, np.uint16), "x", Decoding(channels=4)).traits == 0  # mean and deviation are measured
    whole = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16, 1)
    assert decode_array(whole, "x", Decoding(channels=1)).traits == WIDE


def test_data_sets_in_memory_keep_gray() -> None:
    source = open_source(DataConfig(spec="digits", channels=1), "val")
    colour = open_source(DataConfig(spec="digits"), "val")
    assert torch.equal(source.read(3), colour.read(3)[:1])
    with pytest.raises(DataError, match="has 1 channel, not 4"):
        check_readable(open_source(DataConfig(spec="digits", channels=4), "val"), 0)


def test_given_images_of_many_channels() -> None:
    pixels = values(5, np.uint16)
    decoding = Decoding(channels=5)
    for image in (pixels, torch.from_numpy(pixels.astype(np.int32).transpose(2, 0, 1))):
        np.testing.assert_allclose(GivenSource([image], decoding).read(0).numpy(), expected(pixels), rtol=1e-6)
    unit = (pixels / 4096).astype(np.float32)
    found = GivenSource([unit], decoding).read(0).numpy()
    np.testing.assert_allclose(found, 255 * unit.transpose(2, 0, 1), rtol=1e-5)
    with pytest.raises(DataError, match=r"X\[0\] has 5 channels, not 2"):
        GivenSource([pixels], Decoding(channels=2)).read(0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mean": [0.1]}, "data.std"),
        ({"mean": [0.1], "std": [0.2], "channels": 2}, "1 values"),
        ({"mean": [0.1, 0.2, 0.3], "std": [0.1, 0.2, 0.0]}, "std"),
        ({"channels": 0}, "channels"),
        ({"channels": 4, "alpha": "white"}, "alpha"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validated(DataConfig, settings)
