"""Peculiarities of images as decoded, one bit each; the loader records them, and `notices` reports each one once."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

TURNED = 1
"""The image has an EXIF orientation, which is ignored."""
TRANSPARENT = 2
"""The image is not opaque everywhere, and its alpha is dropped."""
WIDE = 4
"""The image has more than 8 bits, scaled from their whole range."""
NARROW = 8
"""The image is `WIDE` and fills less than an eighth of that range."""
FLAT = 16
"""The image is nearly of one colour once decoded."""
SEVERAL = 32
"""The image has several frames or pages, of which the first is used."""
ON_CPU = 64
"""The image was decoded by the CPU although `data.decode` = `device`."""
READ = 128

NAMED = 3
MANY = 0.25
"""Share of the images above which a notice reports a peculiarity that is normal in single images."""


def notices(traits: NDArray[np.uint8], path: Callable[[int], str], what: str) -> list[str]:
    """Return a line for each peculiarity that matters: how many images have it, the first ones, and the setting for it.

    traits: (N,), one for every image, with `READ` if it was read. path: returns an image's name. what: name of the
    images, such as `validation images`.
    """
    count = int(np.count_nonzero(traits & READ))
    found: list[str] = []

    def report(chosen: NDArray[np.bool_], says: str, least: float = 0) -> None:
        rows = np.flatnonzero(chosen)
        if len(rows) > least:
            first = ", ".join(path(int(row)) for row in rows[:NAMED]) + (", ..." if len(rows) > NAMED else "")
            found.append(f"{len(rows):,} of {count:,} {what} {says}; the first: {first}")

    def has(trait: int) -> NDArray[np.bool_]:
        return (traits & trait) > 0

    report(
        has(TURNED),
        "have an EXIF orientation, which is ignored as in published numbers (--set data.orientation=exif turns them)",
    )
    hidden = int(np.count_nonzero(has(TRANSPARENT) & has(FLAT)))
    report(
        has(TRANSPARENT),
        "are partly transparent, and their alpha is dropped"
        + (f", which leaves {hidden:,} of one colour" if hidden else "")
        + " (--set data.alpha=white composites them on white; black and checker exist too)",
    )
    report(
        has(ON_CPU),
        "were decoded by the CPU although data.decode is device: the device decodes only 8-bit JPEGs in gray or usual "
        "colour whose crops need their full size",
    )
    report(has(SEVERAL), "have several frames or pages; the first is used")
    report(
        has(NARROW),
        "have more than 8 bits (usually 16) and fill fewer than 32 of the 256 levels of their type's range "
        "(--set data.range=percentile spreads their values; image and a window A,B do too)",
        MANY * int(np.count_nonzero(has(WIDE))),
    )
    report(
        has(FLAT) & ~has(TRANSPARENT | NARROW),
        "are nearly of one colour once decoded; look at them",
        max(2, MANY * count),
    )
    return found
