"""Decode image files to uint8 pixels, and count those that cannot be read."""

import io
import os
import stat
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from mimref.errors import DataError

NAMED_BAD_IMAGES = 3

Reduce = Callable[[int, int], int]
"""From an image's height and width to the factor, 1, 2, 4 or 8, by which its decoded sides may be smaller."""


class BadImage(Exception):
    """An image that cannot be read; the caller decides whether to skip it (see `BadImages`)."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both in args: the exception then crosses process borders
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} ({self.reason})"


class BadImages:
    """Distinct images that could not be read; more than `max_bad` of them are an error."""

    def __init__(self, max_bad: int) -> None:
        self.max_bad = max_bad
        self._reasons: dict[str, str] = {}

    def add(self, path: str, reason: str) -> None:
        """Count one bad image; a known path does not count again.

        Raises DataError, naming count, limit and the first few files, when there are more than `max_bad`.
        """
        if path in self._reasons:
            return
        self._reasons[path] = reason
        count = len(self._reasons)
        if count <= self.max_bad:
            return
        named = ", ".join(f"{path} ({reason})" for path, reason in list(self._reasons.items())[:NAMED_BAD_IMAGES])
        images = "1 image" if count == 1 else f"{count} images"
        more = ", ..." if count > NAMED_BAD_IMAGES else ""
        raise DataError(
            f"{images} could not be read, more than data.max_bad={self.max_bad}: {named}{more}; "
            "fix or remove them, or raise data.max_bad"
        )

    @property
    def items(self) -> list[tuple[str, str]]:
        """(path, reason) of every bad image, sorted by path, so that the order does not depend on the workers."""
        return sorted(self._reasons.items())


class Decoded(NamedTuple):
    """A decoded image, and its size in the file."""

    image: Tensor
    """uint8 (3, H, W) with the channels of a pixel together in memory, as decoders write them."""
    height: int
    """Pixels in the file; the tensor has `ceil(height / factor)` where the image was reduced."""
    width: int


def decode_file(path: str, reduce: Reduce | None = None) -> Decoded:
    """Read an image file as RGB, a JPEG at a fraction of its size where `reduce` allows it; of an animation, one frame.

    Alpha is dropped, not composited, and EXIF orientation is not applied: both as in torchvision's ImageFolder and
    timm, which published numbers rely on. 16-bit gray is scaled to 8 bits. libjpeg reduces by skipping the high
    frequencies of each block of 8 x 8 pixels instead of computing pixels that a resize would average away.
    reduce: called for JPEG only, with the size in the file; None decodes at full size.
    Raises BadImage for files that are missing, unreadable, empty, truncated, not an image, or larger than
    `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb).
    """
    # A pipe or a terminal would be waited for.
    with suppress(OSError):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise BadImage(printable(path), "not a regular file")
    return _decode(path, printable(path), reduce)


def decode_content(content: bytes, name: str, reduce: Reduce | None = None) -> Decoded:
    """Decode the content of an image file as `decode_file` does; `name` stands for the file in BadImage."""
    return _decode(io.BytesIO(content), name, reduce)


def _decode(file: str | io.BytesIO, name: str, reduce: Reduce | None) -> Decoded:
    try:
        with warnings.catch_warnings():
            # Pillow's other warnings (broken EXIF, odd TIFF tags) are nothing that a user could act on.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                width, height = image.size
                if reduce is not None and isinstance(image, JpegImageFile):
                    factor = reduce(height, width)
                    # Pillow takes the strongest reduction that keeps this size: exactly `factor`.
                    image.draft(None, (width // factor, height // factor))
                rgb_HWC = _to_rgb(image)
    except Exception as error:  # on corrupt files Pillow's decoders raise nearly anything
        raise BadImage(name, _reason(file, error)) from error
    return Decoded(torch.from_numpy(rgb_HWC).permute(2, 0, 1), height, width)


def reason_of(error: BaseException) -> str:
    """What the system or an exception says, on one line; the exception's type where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def printable(path: str) -> str:
    """The path on one line, safe for any terminal and file format: odd bytes and control characters are escaped."""
    if path.isprintable():
        return path
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in path)


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Writable uint8 (H, W, 3)."""
    if image.mode.startswith("I"):
        # 0..65535 scaled to 0..255, rounded; Pillow's own conversion clips at 255 instead.
        wide_HW = np.asarray(image).astype(np.int64)
        if wide_HW.min() < 0 or wide_HW.max() > 65535:
            raise ValueError("32-bit pixels outside 0..65535")
        return np.repeat(((wide_HW + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point pixels of unknown range")
    if image.mode == "P" and "transparency" in image.info:
        # Only by way of RGBA do transparent palette entries keep their colour.
        return np.array(image.convert("RGBA").convert("RGB"))
    # Converting RGB to RGB would copy it.
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _reason(file: str | io.BytesIO, error: Exception) -> str:
    """A few words for the table of skipped images."""
    if isinstance(error, UnidentifiedImageError):
        size = os.path.getsize(file) if isinstance(file, str) else len(file.getvalue())
        return "empty file" if size == 0 else "not an image"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    return reason_of(error).lower() if isinstance(error, OSError) and error.strerror else reason_of(error)
