"""Small JPEGs of images as the evaluation sees them, within a given number of bytes."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mimref.data.labels import Indices
from mimref.data.loader import crop_batches, loader_workers
from mimref.data.sources import ImageSource, Subset
from mimref.features.encode import PassSettings

SIDE = 48
"""Length of the longest side in pixels."""
# Side and JPEG quality, best first. A photograph takes 1,000 bytes at the first and 350 at the last, which are mostly
# the file's header; noise takes 1,800 and 385.
GRADES = ((SIDE, 80), (SIDE, 70), (SIDE, 60), (40, 55), (32, 50), (24, 45), (16, 40))
SAMPLE = 100

Crop = NDArray[np.uint8]
"""Pixels (S, S, 3)."""


def shown(pixels_CHW: Tensor) -> Crop:
    """Return an image as a picture, uint8 (H, W, 3); an image of three channels in 8 bits is unchanged.

    Other images show their first three channels or, with fewer, the mean as gray; each picture is stretched from its
    smallest to its largest value.
    """
    channels = len(pixels_CHW)
    if channels != 3 or pixels_CHW.is_floating_point():
        chosen = (pixels_CHW[:3] if channels >= 3 else pixels_CHW.float().mean(dim=0, keepdim=True)).float()
        low, high = chosen.min(), chosen.max()
        pixels_CHW = (255 * (chosen - low) / (high - low).clamp_min(1e-6)).round().byte().expand(3, -1, -1)
    return np.ascontiguousarray(pixels_CHW.permute(1, 2, 0).numpy())


def read_crops(source: ImageSource, rows: Indices, settings: PassSettings) -> list[Crop | None]:
    """Return evaluation crops of some images, reduced to 48 pixels; None where an image cannot be read."""
    order = np.argsort(rows, kind="stable")  # archives are read from front to back
    found: list[Crop | None] = [None] * len(rows)
    subset = Subset(source, rows[order])
    workers = loader_workers(settings.workers, source)
    for batch in crop_batches(subset, settings.transform, batch_size=settings.batch_size, workers=workers):
        for place, crop in zip(batch.indices, batch.crops, strict=True):
            found[order[place]] = np.asarray(_shrunk(Image.fromarray(shown(crop)), SIDE))
    return found


def encode_within(crops: Sequence[Crop | None], most_bytes: int) -> list[bytes]:
    """Return JPEGs of the crops, in the best grade in which all of them together take at most `most_bytes`.

    If no grade is small enough, the last one is used. A missing crop becomes a gray square.
    """

    def encoded(grade: tuple[int, int], some: Sequence[Crop | None]) -> list[bytes]:
        missing = np.full((8, 8, 3), 128, np.uint8)
        return [encode(missing if crop is None else crop, *grade) for crop in some]

    sample = crops[:: max(1, len(crops) // SAMPLE)]
    for grade in GRADES[:-1]:
        # All are encoded only if a sample suggests that they fit.
        if sum(map(len, encoded(grade, sample))) * len(crops) <= most_bytes * len(sample):
            found = encoded(grade, crops)
            if sum(map(len, found)) <= most_bytes:
                return found
    return encoded(GRADES[-1], crops)


def encode(crop: Crop, side: int, quality: int) -> bytes:
    """Return a JPEG of a crop, with a longest side of at most `side`; a smaller crop is enlarged by a whole number.

    A crop of gray pixels is stored as grayscale.
    """
    image = _shrunk(Image.fromarray(crop), side)
    if (times := side // max(image.size)) > 1:
        # Enlarged pixels stay squares, so that images of 8 pixels look like what they are.
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    if (crop == crop[..., :1]).all():
        image = image.convert("L")
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality, optimize=True)
    return content.getvalue()


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    longest = max(image.size)
    if longest <= side:
        return image
    width, height = (max(1, round(each * side / longest)) for each in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
