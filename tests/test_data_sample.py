"""What a sample of images reveals about a data set."""

from pathlib import Path

import numpy as np
from PIL import Image

from mimref.config.base import DataConfig
from mimref.data.open import open_source
from mimref.data.sample import Appearance, look_at
from mimref.data.sources import ArraySource


def write(folder: Path, name: str, pixels: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(folder / name, quality=60)


def seen(folder: Path, most: int = 64) -> Appearance:
    return look_at(open_source(DataConfig(spec=str(folder)), "train"), most)


def test_gray_images_that_jpeg_stored_as_rgb_are_gray(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(5):
        gray = rng.integers(0, 256, (40, 30 + 10 * number))
        write(tmp_path, f"{number}.jpg", np.repeat(gray[:, :, None], 3, axis=2))
    assert seen(tmp_path) == Appearance(5, 0, 40) and seen(tmp_path).gray


def test_colours_and_median_of_the_shorter_sides(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(1000, 700), (60, 90), (300, 50)]):
        write(tmp_path, f"{number}.jpg", rng.integers(0, 2, (height, width, 3)) * 100)
    assert seen(tmp_path) == Appearance(3, 3, 60) and not seen(tmp_path).gray
    # Unreadable images are left out.
    (tmp_path / "a.jpg").write_bytes(b"no image")
    assert seen(tmp_path).images == 3


def test_a_single_coloured_image_does_not_colour_a_data_set() -> None:
    pixels = np.zeros((100, 3, 8, 8), dtype=np.uint8)
    pixels[50, 0] = 255
    source = ArraySource("arrays", pixels, None, None, "train", np.arange(100))
    assert look_at(source, 100) == Appearance(100, 1, 8) and look_at(source, 100).gray
    assert look_at(source, 7).images == 7
    assert not Appearance(0, 0, 0).gray
