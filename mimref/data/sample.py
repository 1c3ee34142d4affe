"""Appearance of a data set's images, estimated from a sample: whether they have colours, and how large they are."""

import statistics
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from mimref.data.decode import BadImage, BadImages, Decoded, none_readable
from mimref.data.index.remote import UnreachableError
from mimref.data.sources import ImageSource

SAMPLE = 64
# Largest mean difference between the channels of gray pixels, in levels of 255: JPEG leaves traces of colour.
_GRAY_LEVELS = 2.0
# A few coloured images, such as scans with a stamp, do not make a gray data set coloured.
_GRAY_SHARE = 0.05
_ENOUGH_PIXELS = 64


@dataclass(frozen=True)
class Appearance:
    """Appearance of a sample of images."""

    images: int
    """Number of images read; 0 if none of the sample can be read."""
    colored: int
    """Number of these images that have colours."""
    side: int
    """Median of their shorter sides, in pixels as stored in the file."""
    channels: int = 3
    """Channels of every image. Only images with 3 channels can have colours."""

    @property
    def gray(self) -> bool:
        """Whether the data set consists of gray images."""
        return self.images > 0 and self.colored <= _GRAY_SHARE * self.images


def look_at(source: ImageSource, most: int = SAMPLE) -> Appearance:
    """Describe at most `most` images, evenly spread over the data set. Raises DataError if a server fails."""
    rows = evenly(source, most)
    source.fetch(rows)
    found: list[Decoded] = []
    for row in rows:
        with suppress(BadImage):
            found.append(source.read_reduced(row, _reduction))
    sides = [min(each.height, each.width) for each in found]
    side = int(statistics.median(sides)) if sides else 0
    return Appearance(len(found), sum(map(_colored, found)), side, source.channels)


def _colored(decoded: Decoded) -> bool:
    if len(decoded.image) != 3:
        return False
    # Differences of bytes may not fit into a byte.
    pixels = decoded.image if decoded.image.is_floating_point() else decoded.image.short()
    return float((pixels.amax(dim=0) - pixels.amin(dim=0)).float().mean()) > _GRAY_LEVELS


def evenly(source: ImageSource, most: int) -> list[int]:
    """Return at most `most` positions, evenly spread over the data set."""
    return [int(row) for row in np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).round())]


def _reduction(height: int, width: int) -> int:
    return next((factor for factor in (8, 4, 2) if min(height, width) >= factor * _ENOUGH_PIXELS), 1)


def check_readable(source: ImageSource, max_bad: int) -> None:
    """Read images until one succeeds, usually the first, so that no run starts on a data set that it cannot use at all.

    If `data.channels` states a number of channels, a sample of the whole data set is read too. Raises DataError for an
    image with another number of channels, if no image can be read, or if the first `max_bad` + 1 images cannot.
    """
    if source.in_memory:
        if source.decoding.channels is not None:
            source.read(0)
        return
    bad = BadImages(max_bad)
    for index in range(min(len(source), max_bad + 1)):
        try:
            source.read(index)
        except BadImage as error:
            bad.add(error.path, error.reason)
        except UnreachableError:  # the run retries for longer, and reports it
            return
        else:
            break
    else:
        raise none_readable(source.name, bad.items)
    if source.decoding.channels is not None:
        look_at(source)
