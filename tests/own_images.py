"""Write a folder of made-up photographs like a user's own: colour images of mixed sizes, in up to ten classes.

    python tests/own_images.py FOLDER --images 900             images in one folder
    python tests/own_images.py FOLDER --images 900 --labelled  class folders in train/ and val/, a fifth of each for val

A class is a shape or a texture. Place, size, rotation, colours, background and noise are drawn for every image, so that
pixels reveal the class only in part. The same arguments write the same images; with more images, the first ones stay.

Shapes: H x W pixels, coordinates x and y (H, W) in units of the object's radius.
"""

import argparse
import colorsys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[np.float64]

SIZES = (40, 160)
"""Range of the longer side, in pixels."""
VAL_EVERY = 5
HUE_SPREAD = 0.13
"""Standard deviation of an object's hue around that of its class, in turns."""


def _star(x: Plane, y: Plane) -> Plane:
    return np.hypot(x, y) - 0.65 - 0.3 * np.cos(5 * np.arctan2(y, x))


def _polygon(sides: int) -> Callable[[Plane, Plane], Plane]:
    def outline(x: Plane, y: Plane) -> Plane:
        sector = 2 * np.pi / sides
        angle = np.mod(np.arctan2(y, x), sector) - sector / 2
        return np.hypot(x, y) * np.cos(angle) - np.cos(sector / 2)

    return outline


def _disc(x: Plane, y: Plane) -> Plane:
    return np.hypot(x, y) - 0.9


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(np.hypot(x, y) - 0.7) - 0.22


def _cross(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.minimum(np.abs(x), np.abs(y)) - 0.28, np.maximum(np.abs(x), np.abs(y)) - 0.95)


def _crescent(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.hypot(x, y) - 0.95, 0.8 - np.hypot(x - 0.45, y))


def _plain(x: Plane, y: Plane) -> Plane:
    return np.ones_like(x)


def _stripes(x: Plane, y: Plane) -> Plane:
    return (np.sin(11 * x) > 0).astype(np.float64)


def _checks(x: Plane, y: Plane) -> Plane:
    return (np.sin(9 * x) * np.sin(9 * y) > 0).astype(np.float64)


def _dots(x: Plane, y: Plane) -> Plane:
    return (np.cos(10 * x) + np.cos(10 * y) > 0.9).astype(np.float64)


def _rings(x: Plane, y: Plane) -> Plane:
    return (np.sin(13 * np.hypot(x, y)) > 0).astype(np.float64)


CLASSES: dict[str, tuple[Callable[[Plane, Plane], Plane], Callable[[Plane, Plane], Plane]]] = {
    "striped": (_disc, _stripes),
    "star": (_star, _plain),
    "ring": (_ring, _plain),
    "checked": (_disc, _checks),
    "triangle": (_polygon(3), _plain),
    "dotted": (_disc, _dots),
    "cross": (_cross, _plain),
    "crescent": (_crescent, _plain),
    "target": (_disc, _rings),
    "square": (_polygon(4), _plain),
}
"""Outline (negative inside) and texture (0 to 1) of every class's object."""


def _color(rng: np.random.Generator, hue: float, saturation: tuple[float, float], value: tuple[float, float]) -> Plane:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(*saturation), rng.uniform(*value)))


def _background(rng: np.random.Generator, height: int, width: int) -> Plane:
    """Draw clouds of two colours, (H, W, 3)."""
    clouds = np.zeros((height, width))
    for cells in (2, 4, 9):
        small = Image.fromarray(rng.uniform(0, 1, (cells, cells)).astype(np.float32))
        clouds += np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64) / cells**0.7
    clouds = np.clip((clouds - clouds.min()) / np.ptp(clouds), 0, 1)[..., None]
    first, second = (_color(rng, rng.uniform(), (0.05, 0.5), (0.15, 0.75)) for _ in range(2))
    return first * clouds + second * (1 - clouds)


def draw(label: int, seed: int, number: int) -> Image.Image:
    """Draw image `number` of a class."""
    rng = np.random.default_rng((seed, number))
    longer, shorter = rng.integers(SIZES[0], SIZES[1] + 1), rng.uniform(0.6, 1.0)
    sides = sorted((int(longer), max(SIZES[0] // 2, round(longer * shorter))))
    height, width = sides if rng.random() < 0.6 else sides[::-1]
    outline, texture = list(CLASSES.values())[label]
    pixels = _background(rng, height, width)
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    radius, turn = min(height, width) * rng.uniform(0.28, 0.46), rng.uniform(-0.6, 0.6)
    x, y = columns - width * rng.uniform(0.38, 0.62), rows - height * rng.uniform(0.38, 0.62)
    x, y = (np.cos(turn) * x - np.sin(turn) * y) / radius, (np.sin(turn) * x + np.cos(turn) * y) / radius
    hue = label / len(CLASSES) + rng.normal(0, HUE_SPREAD)
    front = _color(rng, hue, (0.5, 1.0), (0.65, 1.0))
    back = _color(rng, hue + rng.uniform(0.3, 0.7), (0.2, 0.9), (0.1, 0.5))
    ink = texture(x, y)[..., None]
    inside = np.clip(0.5 - outline(x, y)[..., None] * radius, 0, 1)
    pixels = inside * (front * ink + back * (1 - ink)) + (1 - inside) * pixels
    light = rng.uniform(0.7, 1.1) + rng.uniform(-0.2, 0.2) * (columns / width - 0.5)[..., None]
    pixels = pixels * light + rng.normal(0, rng.uniform(0.01, 0.06), pixels.shape)
    return Image.fromarray((255 * np.clip(pixels, 0, 1)).astype(np.uint8))


def write(folder: Path, images: int, *, labelled: bool = False, seed: int = 0, classes: int | None = None) -> None:
    """Write the images. classes: their number; by default ten, or fewer for fewer than 50 images."""
    classes = classes or max(2, min(len(CLASSES), images // VAL_EVERY))
    names = list(CLASSES)
    for number in range(images):
        label, turn = number % classes, number // classes
        place = folder / ("val" if turn % VAL_EVERY == VAL_EVERY - 1 else "train") / names[label]
        place = place if labelled else folder
        place.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"quality": 88} if number % 5 else {}
        draw(label, seed, number).save(place / f"{number:05d}.{'jpg' if number % 5 else 'png'}", **options)


def main() -> None:
    """Read the arguments and write the images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--labelled", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.folder, options.images, labelled=options.labelled, seed=options.seed)


if __name__ == "__main__":
    main()
