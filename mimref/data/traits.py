"""What is peculiar about images as they are decoded, one bit each; the loader counts it, and `notices` says it once."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

TURNED = 1
"""Its EXIF orientation is ignored."""
TRANSPARENT = 2
"""Alpha that is not opaque everywhere is dropped."""
WIDE = 4
"""It has more than 8 bits, scaled from their whole range."""
NARROW = 8
"""It is `WIDE` and fills less than an eighth of that range."""
FLAT = 16
"""It is nearly of one colour once decoded."""
SEVERAL = 32
"""It has several frames or pages, and the first is used."""
ON_CPU = 64
"""`data.decode` = `device`, and it was decoded by the CPU all the same."""
READ = 128

NAMED = 3
MANY = 0.25
"""Share of the images from which on something is worth a notice that single images may well be."""


def notices(traits: NDArray[np.uint8], path: Callable[[int], str], what: str) -> list[str]:
    """A line for each peculiarity that matters: how many images have it, the first ones, and which setting changes it.

    traits (N,): of every image, with `READ` where it was read. path: gives names. what: such as `validation images`.
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
        "were decoded by the CPU although data.decode is device: only 8-bit JPEGs of gray or usual colour, whose crops "
        "need them at full size, are decoded on the device",
    )
    report(has(SEVERAL), "have several frames or pages; the first is used")
    report(
        has(NARROW),
        "of more than 8 bits (16-bit, as a rule) fill less than 32 of 256 levels of their type's range "
        "(--set data.range=percentile spreads their values; image and a window A,B do too)",
        MANY * int(np.count_nonzero(has(WIDE))),
    )
    report(
        has(FLAT) & ~has(TRANSPARENT | NARROW),
        "are nearly of one colour once decoded; look at them",
        max(2, MANY * count),
    )
    return found
