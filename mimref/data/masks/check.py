"""Check of images and masks before an encoder runs, which also finds the number of classes in the masks."""

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from mimref.data.decode import BadImage
from mimref.data.masks.sources import ArrayMasks, Pairs
from mimref.data.sources import ArraySource, Split
from mimref.errors import Checks, DataError
from mimref.progress import LabelledProgress

MOST_CHECKED = 2000
"""Most pairs of a split, evenly spread, that are read before the work begins; others are checked when they are read."""
_MOST_LISTED = 5
"""Most mistakes of one split that are listed one by one."""


def check_pairs(pairs: dict[Split, Pairs], checks: Checks, progress: LabelledProgress | None = None) -> None:
    """Read masks, and compare their sizes with their images'; name the classes if only the masks show their number.

    Masks that cannot be read, differ in size from their image, or have classes out of range become mistakes of
    `data.spec`, as does a split without any labelled pixel. If the number of classes is unknown, all training masks are
    read.
    """
    for split, of_split in pairs.items():
        if isinstance(of_split.masks, ArrayMasks):
            continue
        unknown = not of_split.class_names and split == "train"
        largest = _check_split(of_split, checks, f"checking {split} masks", unknown, progress)
        if not unknown:
            continue
        if largest < 1:
            only = "have one class" if largest == 0 else "have no class"
            advice = "mask values are class numbers, counted from masks.first; masks.ignore marks unlabelled pixels"
            checks.add("data.spec", DataError(f"{of_split.name}: the training masks {only}; {advice}"))
            return
        for each in pairs.values():
            each.class_names = list(map(str, range(largest + 1)))


def _check_split(pairs: Pairs, checks: Checks, label: str, read_all: bool, progress: LabelledProgress | None) -> int:
    """Check a split. Returns the largest label in the masks that were read; -1 if there is none."""
    count = len(pairs) if read_all else min(len(pairs), MOST_CHECKED)
    rows = np.linspace(0, len(pairs) - 1, count).round().astype(np.int64).tolist()
    largest, wrong = -1, 0
    for done, row in enumerate(rows, 1):
        try:
            largest = max(largest, int(pairs.mask(row, _image_size(pairs, row)).max()))
        except DataError as error:
            wrong += 1
            if wrong <= _MOST_LISTED:
                checks.add("data.spec", error)
        if progress is not None and (done % 100 == 0 or done == count):
            progress(label, done, count)
    if wrong > _MOST_LISTED:
        more = f"{wrong - _MOST_LISTED} more of the {count} masks that were checked cannot be used"
        checks.add("data.spec", DataError(f"{pairs.name}: {more}"))
    if largest < 0 and not wrong and not read_all:
        none = f"{pairs.name}: none of the {count} masks that were checked has a pixel with a class"
        checks.add("data.spec", DataError(f"{none}; see masks.first and masks.ignore"))
    return largest


def _image_size(pairs: Pairs, row: int) -> tuple[int, int] | None:
    """Return width and height from an image file's header; None if it cannot be read, which is reported later."""
    source = pairs.images
    try:
        if isinstance(source, ArraySource):
            return None
        with Image.open(source.file(row)) as image:
            # Pillow turns TIFF by itself.
            may_turn = source.decoding.orientation == "exif" and not isinstance(image, TiffImageFile)
            turned = may_turn and image.getexif().get(0x0112, 1) >= 5
            return image.size[::-1] if turned else image.size
    except (BadImage, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
