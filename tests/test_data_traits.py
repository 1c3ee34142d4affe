"""Notices about peculiar images, given once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mimref.data.loader import crop_batches, view_batches
from mimref.data.sources import Subset
from mimref.data.traits import FLAT, NARROW, READ, SEVERAL, TRANSPARENT, TURNED, WIDE, notices
from mimref.data.transforms import EvalTransform
from mimref.data.views import CropGroup
from tests.sources import opened


def said(*traits: int) -> list[str]:
    return notices(np.array(traits, dtype=np.uint8), lambda row: f"{row}.png", "validation images")


def test_nothing_peculiar_is_no_notice() -> None:
    assert said(*[READ] * 5) == said() == said(*[READ | WIDE] * 5) == []


def test_first_names_and_counts() -> None:
    (line,) = said(0, *[READ | TURNED] * 4, READ)
    assert line.startswith("4 of 5 validation images") and "data.orientation=exif" in line
    assert line.endswith("1.png, 2.png, 3.png, ...")
    (line,) = said(READ, READ | TRANSPARENT)
    assert line.startswith("1 of 2 ") and "data.alpha=white" in line and line.endswith("first: 1.png")
    (line,) = said(READ | TRANSPARENT | FLAT, READ | TRANSPARENT)
    assert line.startswith("2 of 2 ") and "leaves 1 of one colour" in line


@pytest.mark.parametrize(("narrow", "wide", "told"), [(1, 0, True), (1, 3, False), (2, 5, True)])
def test_narrow_images_must_be_more_than_a_quarter_of_the_wide_ones(narrow: int, wide: int, told: bool) -> None:
    lines = said(*[READ | WIDE | NARROW] * narrow, *[READ | WIDE] * wide, *[READ] * 50)
    assert [("data.range=percentile" in line) for line in lines] == [True] * told


@pytest.mark.parametrize(("flat", "others", "told"), [(2, 0, False), (3, 0, True), (3, 9, False), (4, 9, True)])
def test_flat_images_must_be_many(flat: int, others: int, told: bool) -> None:
    lines = said(*[READ | FLAT] * flat, *[READ] * others)
    assert [("one colour" in line) for line in lines] == [True] * told


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_record_each_image_once(tmp_path: Path, workers: int) -> None:
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(6):
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        image.save(tmp_path / f"{number}.png", **({"exif": exif} if number % 2 else {}))
    (tmp_path / "6.png").write_bytes(b"")
    expected = "3 of 6 images have an EXIF orientation"
    source = opened(tmp_path)
    list(crop_batches(source, EvalTransform(4), batch_size=4, workers=workers))
    (line,) = source.peculiarities()
    assert line.startswith(expected) and line.endswith(", ".join(str(tmp_path / f"{n}.png") for n in (1, 3, 5)))
    source = opened(tmp_path)
    groups = [CropGroup(2, 4, (0.5, 1.0))]
    list(view_batches(source, groups, batch_size=7, seed=0, epochs=range(3), workers=workers))
    assert source.peculiarities() == [line]
    source = opened(tmp_path)
    list(crop_batches(Subset(source, np.array([1, 2])), EvalTransform(4), batch_size=4, workers=workers))
    assert source.peculiarities() and source.peculiarities()[0].startswith("1 of 2 images")


def test_images_in_memory_are_never_peculiar() -> None:
    source = opened("digits", "val")
    list(crop_batches(source, EvalTransform(4), batch_size=100))
    assert source.peculiarities() == []


@pytest.mark.parametrize("ending", ["gif", "png", "tif", "webp"])
def test_only_the_first_of_several_frames_is_used_and_told(ending: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (9, 8), dtype=np.uint8)).convert("P") for _ in range(3)]
    options = {} if ending in ("gif", "tif") else {"lossless": True}
    frames = frames if ending in ("gif", "tif") else [each.convert("RGB") for each in frames]
    frames[0].save(tmp_path / f"one.{ending}", **options)
    frames[0].save(tmp_path / f"three.{ending}", save_all=True, append_images=frames[1:], **options)
    source = opened(tmp_path)
    one, three = (source.read_reduced(index, None) for index in range(2))
    expected = torch.from_numpy(np.array(frames[0].convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(one.image, expected) and torch.equal(three.image, expected)
    assert (one.traits, three.traits) == (0, SEVERAL)
    list(crop_batches(source, EvalTransform(4), batch_size=2))
    (line,) = source.peculiarities()
    assert line.startswith("1 of 2 images have several frames or pages") and line.endswith(f"three.{ending}")
    # A fault in a later frame is no reason to lose the first one.
    content = (tmp_path / f"three.{ending}").read_bytes()
    if ending == "gif":
        cut = content.index(b"\x21\xf9", content.index(b"\x21\xf9") + 1)
        (tmp_path / f"three.{ending}").write_bytes(content[: cut + 12])
        assert torch.equal(source.read(1), expected)


def test_layers_and_previews_are_no_frames(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)) for _ in range(2)]
    images[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=images[1:])
    assert opened(tmp_path).read_reduced(0, None).traits == 0
