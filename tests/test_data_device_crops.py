"""Decoding and cropping on a device, here torchvision's decoder on the CPU, against the loader processes."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mimref.benchmarks.views import ViewSizes, photographs
from mimref.config.base import DataConfig
from mimref.config.run import ViewsConfig
from mimref.data import device_crops
from mimref.data.decode import BadImage, BadImages, decode_content
from mimref.data.device_crops import decode_jpegs, decoding_device
from mimref.data.loader import CropBatch, ViewBatch, crop_batches, device_batches, view_batches, view_crop_batches
from mimref.data.pixels import Decoding
from mimref.data.sources import FileSource, ImageSource, Subset
from mimref.data.traits import FLAT, ON_CPU, READ, TURNED
from mimref.data.transforms import EvalTransform
from mimref.data.views import CropGroup, multi_crop
from mimref.errors import ConfigError, DataError

CPU = torch.device("cpu")
GROUPS = [CropGroup(2, 48, (0.25, 1.0)), CropGroup(3, 24, (0.05, 0.25), first_view=2)]
TRANSFORM = EvalTransform(40)


def save(folder: Path, name: str, image: Image.Image, orientation: int = 1, **options: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(folder / name, quality=90, **options, **({"exif": exif} if orientation > 1 else {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's photographs in many encodings, and files that cannot be read."""
    from sklearn.datasets import load_sample_images

    made = tmp_path_factory.mktemp("photographs")
    china, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    small, wide = china.resize((150, 100), Image.Resampling.BICUBIC), flower.resize((200, 90), Image.Resampling.BICUBIC)
    for orientation in range(1, 9):
        save(made, f"orientation{orientation}.jpg", wide, orientation)
    save(made, "large.jpg", china)
    for mode in ("L", "CMYK"):
        save(made, f"{mode}.jpg", small.convert(mode))
    save(made, "progressive.jpg", small, progressive=True)
    for subsampling in ("4:4:4", "4:2:2"):
        save(made, f"{subsampling.replace(':', '')}.jpg", small, subsampling=subsampling)
    save(made, "tiny.jpg", small.resize((1, 1)))
    save(made, "narrow.jpg", small.resize((3, 60)))
    save(made, "flat.jpg", Image.new("RGB", (50, 40), (90, 120, 30)))
    small.save(made / "png.png")
    usual = (made / "444.jpg").read_bytes()
    (made / "cut.jpg").write_bytes(usual[:-100])
    (made / "empty.jpg").write_bytes(b"")
    # As if damaged in transfer, but with an end marker.
    header = usual.index(b"\xff\xc4")
    (made / "torn.jpg").write_bytes(usual[: header + 2] + b"\0\0" + usual[header + 4 :])
    return made


def source_of(folder: Path, orientation: str = "file") -> FileSource:
    files = sorted(path.name for path in folder.iterdir())
    source = FileSource("photographs", str(folder), files, None, None)
    source.decoding = Decoding(orientation=orientation)
    return source


def traits_of(source: ImageSource) -> dict[str, int]:
    assert source._traits is not None
    return {Path(source.path(row)).name: int(traits) for row, traits in enumerate(source._traits)}


def check_close(one: Tensor, other: Tensor) -> None:
    """Check equality within rounding: at most two levels apart, and seldom any."""
    assert one.shape == other.shape and one.dtype == other.dtype == torch.uint8
    apart = (one.int() - other.int()).abs()
    assert apart.max() <= 2 and apart.double().mean() < 0.02


def views(source: ImageSource, decode_on: torch.device | None, **settings: Any) -> list[ViewBatch]:
    batches: Iterator[ViewBatch] = view_batches(
        source, GROUPS, batch_size=8, seed=3, epochs=range(2), decode_on=decode_on, **settings
    )
    return list(batches)


def check_views(source: ImageSource, other: ImageSource, **settings: Any) -> None:
    """Check for the same views of the same samples in the same order, and for the same unreadable images."""
    usual, found = views(source, None, **settings), views(other, CPU, **settings)
    assert len(usual) == len(found) > 1
    for one, two in zip(usual, found, strict=True):
        assert (one.epoch, sorted(one.bad), one.places) == (two.epoch, sorted(two.bad), two.places)
        assert torch.equal(one.sample_B, two.sample_B) and two.jpegs is None
        assert [traits & ~ON_CPU for traits in two.traits] == one.traits
        for left, right in zip(one.crops, two.crops, strict=True):
            check_close(left, right)


@pytest.mark.parametrize("orientation", ["file", "exif"])
def test_views_are_those_of_the_cpu_within_rounding(folder: Path, orientation: str) -> None:
    check_views(source_of(folder, orientation), source := source_of(folder, orientation))
    found = traits_of(source)
    turned = TURNED if orientation == "file" else 0
    assert all(found[f"orientation{number}.jpg"] == READ | turned for number in range(2, 9))
    assert {name for name, traits in found.items() if traits & ON_CPU} == {"CMYK.jpg", "png.png"}
    assert {name for name, traits in found.items() if traits & FLAT} == {"flat.jpg", "tiny.jpg"}
    assert {name for name, traits in found.items() if not traits} == {"cut.jpg", "empty.jpg", "torn.jpg"}


def test_views_of_images_that_are_decoded_smaller_and_by_loader_processes(folder: Path) -> None:
    check_views(source_of(folder), source := source_of(folder), reduce_jpeg=True, workers=2)
    assert traits_of(source)["large.jpg"] == READ | ON_CPU
    (line,) = [line for line in source.peculiarities() if "data.decode" in line]
    assert line.startswith("3 of 18 images were decoded by the CPU") and "CMYK.jpg" in line


def test_parts_hold_images_of_similar_size_and_all_of_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(50, 40), (10, 90), (50, 41), (10, 80), (200, 300), (9, 9)]
    monkeypatch.setattr(device_crops, "PART_PIXELS", 2 * 50 * 41)
    assert list(device_crops._parts(sizes)) == [[number] for number in (5, 3, 1, 0, 2, 4)]
    monkeypatch.setattr(device_crops, "LEAST_WIDTH", 1)
    assert list(device_crops._parts(sizes)) == [[5, 3, 1], [0, 2], [4]]
    check_views(source_of(folder), source_of(folder))


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_crops_are_those_of_the_cpu_within_rounding(folder: Path, workers: int) -> None:
    def crops(decode_on: torch.device | None) -> list[CropBatch]:
        source = source_of(folder)
        return list(crop_batches(source, TRANSFORM, batch_size=7, workers=workers, decode_on=decode_on))

    for one, two in zip(crops(None), crops(CPU), strict=True):
        assert (one.end, one.indices, sorted(one.bad)) == (two.end, two.indices, sorted(two.bad))
        assert [traits & ~ON_CPU for traits in two.traits] == one.traits
        check_close(one.crops, two.crops)


def test_views_in_data_order_are_those_of_the_cpu_within_rounding(folder: Path) -> None:
    subset = Subset(source_of(folder), np.array([3, 0, 9, 12, 5]))
    one, two = (
        list(view_crop_batches(subset, GROUPS[0], batch_size=3, seed=1, decode_on=device)) for device in (None, CPU)
    )
    for left, right in zip(one, two, strict=True):
        assert (left.end, left.indices, sorted(left.bad)) == (right.end, right.indices, sorted(right.bad))
        check_close(left.crops, right.crops)


def test_what_the_device_cannot_decode_falls_back_to_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = (folder / "progressive.jpg").read_bytes()

    def fails(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        if any(content.numpy().tobytes() == refused for content in contents):
            raise RuntimeError("Error while decoding JPEG images")
        return decode_jpegs(contents, device)

    monkeypatch.setattr(device_crops, "decode_jpegs", fails)
    check_views(source_of(folder), source := source_of(folder))
    on_cpu = {name for name, traits in traits_of(source).items() if traits & ON_CPU}
    assert on_cpu == {"CMYK.jpg", "png.png", "progressive.jpg"}


def test_images_that_only_decoding_shows_to_be_broken_are_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(content: bytes, name: str, *settings: Any) -> Any:
        if name.endswith(("422.jpg", "tiny.jpg")):
            raise BadImage(name, "broken data stream")
        return decode_content(content, name, *settings)

    def none(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        raise RuntimeError("no")

    monkeypatch.setattr(device_crops, "decode_content", fails)
    monkeypatch.setattr(device_crops, "decode_jpegs", none)
    source = source_of(folder)
    (batch,) = crop_batches(source, TRANSFORM, batch_size=99, decode_on=CPU)
    (usual,) = crop_batches(source_of(folder), TRANSFORM, batch_size=99)
    bad, known = ({Path(path).name for path, _ in each.bad} for each in (batch, usual))
    assert bad - known == {"422.jpg", "tiny.jpg"} and known < bad
    kept = [row for row, index in enumerate(usual.indices) if index in batch.indices]
    assert batch.indices == [usual.indices[row] for row in kept] and len(batch.traits) == len(kept)
    assert torch.equal(batch.crops, usual.crops[kept])  # all decoded by the CPU


def test_running_out_of_memory_is_no_broken_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_crops, "decode_jpegs", full)
    with pytest.raises(torch.OutOfMemoryError):
        list(crop_batches(source_of(folder), TRANSFORM, batch_size=4, decode_on=CPU))


def test_where_images_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for decode in ("auto", "cpu"):
        assert decoding_device(DataConfig(decode=decode), cuda) is None
    asked = DataConfig(decode="device")
    for device in ("cpu", "mps"):
        with pytest.raises(ConfigError, match=f"data.decode device needs CUDA, and the device is {device}"):
            decoding_device(asked, torch.device(device))
    with pytest.raises(ConfigError, match=r"data\.channels"):
        decoding_device(DataConfig(decode="device", channels=3), cuda)
    monkeypatch.setattr(device_crops, "_trial", lambda device: "torchvision not compiled with nvJPEG support")
    with pytest.raises(ConfigError, match=r"nvJPEG support\); set data\.decode=cpu"):
        decoding_device(asked, cuda)
    monkeypatch.setattr(device_crops, "_trial", lambda device: None)
    assert decoding_device(asked, cuda) == cuda


def test_the_trial_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_crops._trial.__wrapped__(CPU) is None

    def none(contents: list[Tensor], device: torch.device) -> list[Tensor]:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled\nwith nvJPEG")

    monkeypatch.setattr(device_crops, "decode_jpegs", none)
    assert device_crops._trial.__wrapped__(CPU) == "decode_jpegs_cuda: torchvision not compiled"


def test_limits_hold_for_the_device_too(folder: Path) -> None:
    bad = BadImages(2)
    with pytest.raises(DataError, match="3 images could not be read"):
        for batch in crop_batches(source_of(folder), TRANSFORM, batch_size=99, decode_on=CPU):
            for path, reason in batch.bad:
                bad.add(path, reason)


def repeated_chroma(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    """Decode 4:2:0 JPEGs as nvJPEG does: each chroma sample covers four pixels."""
    found = []
    for content in contents:
        files = [Image.open(io.BytesIO(content.numpy().tobytes())) for _ in range(2)]
        width, height = files[0].size
        files[0].draft("YCbCr", (width, height))
        # At half the size, libjpeg has no chroma to interpolate.
        files[1].draft("YCbCr", (width // 2, height // 2))
        small_HWC = np.asarray(files[1])
        assert small_HWC.shape == (-(-height // 2), -(-width // 2), 3)
        large_HWC = small_HWC.repeat(2, axis=0).repeat(2, axis=1)[:height, :width].astype(np.float64)
        luma, blue, red = np.asarray(files[0])[:, :, 0], large_HWC[:, :, 1] - 128, large_HWC[:, :, 2] - 128
        rgb_3HW = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue])
        found.append(torch.from_numpy(np.rint(rgb_3HW).clip(0, 255).astype(np.uint8)).to(device))
    return found


def test_how_much_repeated_chroma_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = photographs(str(tmp_path), ViewSizes(images=2))
    settings: dict[str, Any] = {"batch_size": 2, "seed": 0, "epochs": range(3)}
    groups = multi_crop(ViewsConfig(), 224)
    usual = list(view_batches(source, groups, **settings))
    monkeypatch.setattr(device_crops, "decode_jpegs", repeated_chroma)
    found = list(view_batches(source, groups, decode_on=CPU, **settings))
    for group in range(2):
        pairs = zip(usual, found, strict=True)
        apart = torch.stack([(one.crops[group].int() - two.crops[group].int()).abs() for one, two in pairs])
        assert 0.5 < apart.double().mean() < 0.9 and 15 < apart.max() <= 31


@pytest.mark.gpu
def test_a_gpu_decodes_nearly_the_same(folder: Path) -> None:
    """nvJPEG repeats chroma where libjpeg interpolates it, so colours of subsampled files differ more at edges."""
    cuda = torch.device("cuda")
    assert decoding_device(DataConfig(decode="device"), cuda) == cuda
    files = [name for name in source_of(folder).files if name != "torn.jpg"]  # nvJPEG may be able to decode it
    usual, source = (FileSource("photographs", str(folder), files, None, None) for _ in range(2))
    settings: dict[str, Any] = {"batch_size": 5, "seed": 3, "epochs": range(4)}
    batches = view_batches(source, GROUPS, decode_on=cuda, pin_memory=True, workers=2, **settings)
    found = list(device_batches(batches, cuda))
    for one, two in zip(view_batches(usual, GROUPS, **settings), found, strict=True):
        assert torch.equal(one.sample_B, two.sample_B) and sorted(one.bad) == sorted(two.bad)
        for left, right in zip(one.crops, two.crops, strict=True):
            assert right.device.type == "cuda" and left.shape == right.shape
            # torchvision's own tests allow decoded images a mean difference of 2.
            assert (left.float() - right.cpu().float()).abs().mean() < 2
    assert traits_of(source)["444.jpg"] == READ
