"""JPEGs for a device to decode: what a loader process reads of them, and passes on instead of pixels.

A loader process reads files and headers and draws crops; `mimref.data.device_crops` does the rest. What nvJPEG cannot
decode, or decodes to other colours, the loader process decodes itself: other formats, CMYK, pixels stored as RGB,
unusual chroma sampling, and files that do not end like a JPEG. It also decodes photographs that libjpeg can decode at
a fraction of their size.

Shapes: J images, V crops of each.
"""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimref.data.decode import Decoded, Reduce, decode_content, reduction_of
from mimref.data.pixels import Decoding, orientation_of
from mimref.data.sources import ImageSource
from mimref.data.traits import ON_CPU, TURNED

_SUBSAMPLINGS = {(1, 1), (2, 1), (2, 2), (1, 2), (4, 1), (4, 2)}
"""Luma samples per chroma sample, across and down, in nvJPEG: 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1 and 4:1:0."""
_RGB_IDS = [ord(letter) for letter in "RGB"]
"""Names of components by which libjpeg recognises pixels that are stored as RGB."""


class Jpeg(NamedTuple):
    """A JPEG file that a device can decode."""

    content: bytes
    name: str
    """Name of the image in BadImage."""
    height: int
    """Height of the image in pixels, after its orientation is applied."""
    width: int
    orientation: int
    """EXIF orientation to apply to the decoded pixels; 1 leaves them unchanged."""
    traits: int
    """See `mimref.data.traits`; `FLAT` is known only after decoding."""


@dataclass
class Jpegs:
    """The JPEGs of a batch, and the crops to be cut from them."""

    content: Tensor
    """uint8: all files, one after another. A batch of usual photographs takes a fifth of the memory of its crops."""
    ends: list[int]
    """End of each file in `content`."""
    names: list[str]
    orientations: list[int]
    sizes: list[tuple[int, int]]
    """Height and width of each image, after its orientation is applied."""
    rows: list[int]
    """Places of these images in the batch."""
    windows: list[Tensor]
    """For each crop group (J, V, 2, 4) float64, see `mimref.data.windows`."""

    def __len__(self) -> int:
        return len(self.rows)

    def contents(self) -> list[Tensor]:
        """Return the bytes of each file, as views into `content`."""
        return [self.content[start:end] for start, end in zip([0, *self.ends[:-1]], self.ends, strict=True)]


def jpegs_of(images: Sequence[Decoded | Jpeg]) -> tuple[list[int], list[Jpeg]]:
    """Return the places of the JPEGs among a batch's images, and the JPEGs."""
    found = [(row, image) for row, image in enumerate(images) if isinstance(image, Jpeg)]
    return [row for row, _ in found], [image for _, image in found]


def pack(jpegs: Sequence[Jpeg], rows: Sequence[int], windows: list[Tensor]) -> Jpegs:
    """Pack JPEGs into one block, for their way to the main process."""
    content = np.frombuffer(bytearray().join(each.content for each in jpegs), dtype=np.uint8)
    return Jpegs(
        torch.from_numpy(content),
        np.cumsum([len(each.content) for each in jpegs], dtype=np.int64).tolist(),
        [each.name for each in jpegs],
        [each.orientation for each in jpegs],
        [(each.height, each.width) for each in jpegs],
        list(rows),
        windows,
    )


def read_jpeg(source: ImageSource, index: int, reduce: Reduce | None) -> Jpeg | Decoded:
    """Return an image for a device to decode, or decoded if only a CPU can. Raises BadImage as `read_reduced` does."""
    found = source.encoded(index) if source.decoding.channels is None else None
    if found is None:
        decoded = source.read_reduced(index, reduce)
    else:
        content, name = found
        if (jpeg := as_jpeg(content, name, reduce, source.decoding)) is not None:
            return jpeg
        decoded = decode_content(content, name, reduce, source.decoding)
    return decoded._replace(traits=decoded.traits | ON_CPU)


def as_jpeg(content: bytes, name: str, reduce: Reduce | None, decoding: Decoding) -> Jpeg | None:
    """Return a file that a device can decode at full size; None for any other file, damaged ones included."""
    # A file without an end mark at its end is cut short or has trailing data; decoding on the CPU shows which.
    if not (content.startswith(b"\xff\xd8\xff") and content.endswith(b"\xff\xd9")):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                if not _is_usual(image):
                    return None
                orientation = orientation_of(image)
                width, height = image.size
    except Exception:  # on corrupt files Pillow raises nearly anything, and raises it again when the CPU decodes
        return None
    turned = orientation > 1 and decoding.orientation == "exif"
    by = orientation if turned else 1
    if reduce is not None and reduction_of(width, height, reduce, by) > 1:
        return None
    if by >= 5:
        width, height = height, width
    return Jpeg(content, name, height, width, by, TURNED * (orientation > 1 and not turned))


def _is_usual(image: Any) -> bool:
    """Return whether an opened image is an 8-bit JPEG that nvJPEG decodes to libjpeg's colours."""
    # Pillow treats MPO, a JPEG followed by more pictures, as a separate format.
    if image.format != "JPEG" or image.bits != 8 or image.mode not in ("L", "RGB"):
        return False
    if image.mode == "L":
        return True
    ids, (luma, *chroma) = [each[0] for each in image.layer], [tuple(each[1:3]) for each in image.layer]
    is_rgb = image.info.get("adobe_transform") == 0 or ids == _RGB_IDS
    return not is_rgb and luma in _SUBSAMPLINGS and chroma == [(1, 1), (1, 1)]
