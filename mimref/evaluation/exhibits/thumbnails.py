"""Small JPEGs of images as the evaluation sees them, within a given number of bytes."""

import io
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mimref.data.decode import BadImage
from mimref.data.labels import Indices
from mimref.data.loader import crop_batches, loader_workers
from mimref.data.sources import ImageSource, Subset
from mimref.data.transforms import middle
from mimref.evaluation.exhibits.contents import Thumbnail
from mimref.features.encode import PassSettings

SIDE = 48
"""Length of the longest side in pixels."""
# Side and JPEG quality, best first. A photograph takes 1,000 bytes at the first and 350 at the last, which are mostly
# the file's header; noise takes 1,800 and 385.
GRADES = ((SIDE, 80), (SIDE, 70), (SIDE, 60), (40, 55), (32, 50), (24, 45), (16, 40))
SAMPLE = 100

GALLERY_SIDE = 112
"""Pixels of the longer side: twice the size shown in a gallery, for high-density screens and prints."""
MOST_PICTURES = 800
"""Most pictures in a gallery, which then stays below 5 MB."""
_QUALITY = 75

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


def thumbnail(source: ImageSource, index: int, label: str | None) -> Thumbnail:
    """Return one image of a data set, uncropped, with a longer side of at most `GALLERY_SIDE` pixels; 2 to 5 KB.

    Only the middle of very long images is shown. The picture of an image that cannot be read is empty.
    """

    def reduce(height: int, width: int) -> int:
        return next(
            factor for factor in (8, 4, 2, 1) if factor == 1 or max(height, width) // factor >= 2 * GALLERY_SIDE
        )

    path = source.path(index)
    try:
        pixels_CHW = middle(source.read_reduced(index, reduce).image)
    except BadImage:
        return Thumbnail(path, label, b"")
    return Thumbnail(path, label, encode(shown(pixels_CHW), GALLERY_SIDE, _QUALITY))


def most_per_group(counts: Iterable[int], most: int) -> int:
    """Return how many groups, counted from the first, hold at most `most` pictures in total."""
    total = groups = 0
    for count in counts:
        total += count
        if total > most:
            break
        groups += 1
    return groups
