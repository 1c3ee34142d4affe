"""What is said once about peculiar images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimref.data.loader import crop_batches, view_batches
from mimref.data.sources import Subset
from mimref.data.traits import FLAT, NARROW, READ, TRANSPARENT, TURNED, WIDE, notices
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
