"""Pictures of single images, for galleries."""

from collections.abc import Iterable

from mimref.data.decode import BadImage
from mimref.data.sources import ImageSource
from mimref.data.transforms import middle
from mimref.evaluation.exhibits.contents import Thumbnail
from mimref.evaluation.exhibits.thumbnails import encode, shown

GALLERY_SIDE = 112
"""Pixels of the longer side: twice the size shown in a gallery, for high-density screens and prints."""
MOST_PICTURES = 800
"""Most pictures in a gallery, which then stays below 5 MB."""
_QUALITY = 75


def thumbnail(source: ImageSource, index: int, label: str | None, side: int = GALLERY_SIDE) -> Thumbnail:
    """Return one image of a data set, uncropped, with a longer side of at most `side` pixels; 2 to 5 KB.

    Only the middle of very long images is shown. The picture of an image that cannot be read is empty.
    """

    def reduce(height: int, width: int) -> int:
        return next(factor for factor in (8, 4, 2, 1) if factor == 1 or max(height, width) // factor >= 2 * side)

    path = source.path(index)
    try:
        pixels_CHW = middle(source.read_reduced(index, reduce).image)
    except BadImage:
        return Thumbnail(path, label, b"")
    return Thumbnail(path, label, encode(shown(pixels_CHW), side, _QUALITY))


def most_per_group(counts: Iterable[int], most: int) -> int:
    """Return how many groups, counted from the first, hold at most `most` pictures in total."""
    total = groups = 0
    for count in counts:
        total += count
        if total > most:
            break
        groups += 1
    return groups
