"""Decode image files to pixels, and count those that cannot be read."""

import io
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from mimref.data.bands import (
    WrongChannels,
    as_pixels,
    as_tensor,
    channels_last,
    check_channels,
    deep_bytes,
    is_array,
    is_tiff,
    loses_bits,
    read_array,
    read_pillow,
    read_tiff,
    traits_of,
)
from mimref.data.contents import HEAD, what_is
from mimref.data.pixels import USUAL, Decoding, deep_colour, low_bytes, orientation_of, to_rgb, turned
from mimref.data.traits import SEVERAL, TURNED
from mimref.errors import DataError

NAMED_BAD_IMAGES = 3

Reduce = Callable[[int, int], int]
"""Function of an image's height and width; returns the factor, 1, 2, 4 or 8, by which its sides may be reduced."""


class BadImage(Exception):
    """An image that cannot be read; the caller decides whether to skip it (see `BadImages`)."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both in args, so that the exception can be sent between processes
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} ({self.reason})"


class BadImages:
    """Distinct images that could not be read; more than `max_bad` of them are an error."""

    def __init__(self, max_bad: int) -> None:
        self.max_bad = max_bad
        self.some_readable = True
        """Whether a higher `max_bad` may help."""
        self._reasons: dict[str, str] = {}

    def add(self, path: str, reason: str) -> None:
        """Count one bad image; a path counts only once.

        Raises DataError, with the count, the limit and the first few files, if there are more than `max_bad`.
        """
        if path in self._reasons:
            return
        self._reasons[path] = reason
        count = len(self._reasons)
        if count <= self.max_bad:
            return
        images = "1 image" if count == 1 else f"{count} images"
        raise DataError(
            f"{images} could not be read, more than data.max_bad={self.max_bad}: "
            f"{first_bad(list(self._reasons.items()))}; fix or remove them"
            + (", or raise data.max_bad" if self.some_readable else ": none has been readable so far")
        )

    def add_all(self, images: Iterable[tuple[str, str]]) -> None:
        """Call `add` for several images, each with path and reason."""
        for path, reason in images:
            self.add(path, reason)

    @property
    def items(self) -> list[tuple[str, str]]:
        """(path, reason) of every bad image, sorted by path, so that the order does not depend on the workers."""
        return sorted(self._reasons.items())


def first_bad(images: Sequence[tuple[str, str]]) -> str:
    """Return the first few bad images with their reasons, for a message."""
    return first_of([f"{path} ({reason})" for path, reason in images], NAMED_BAD_IMAGES)


def skipped_line(images: Sequence[tuple[str, str]]) -> str:
    """Return a warning of skipped images: how many, and the first few with their reasons. results.json has them all."""
    more = " (all are in results.json)" if len(images) > NAMED_BAD_IMAGES else ""
    count = "1 unreadable image" if len(images) == 1 else f"{len(images)} unreadable images"
    return f"{count} skipped: {first_bad(images)}{more}"


def none_readable(name: str, images: Sequence[tuple[str, str]]) -> DataError:
    """Return the error for a data set in which every image is bad."""
    count = f" of {len(images)}" if len(images) > 1 else ""
    found = f"{count}: {first_bad(images)}; fix, convert or replace them" if images else ""
    return DataError(f"{name}: no readable image{found}")


class Decoded(NamedTuple):
    """A decoded image, and its size in the file."""

    image: Tensor
    """uint8 (3, H, W) with the channels of a pixel together in memory, as decoders write them. With `data.channels`,
    (C, H, W); values of more than 8 bits become float32 from 0 (black) to 255 (white)."""
    height: int
    """Height of the whole image in pixels; the tensor has `ceil(height / factor)` rows if it was reduced."""
    width: int
    traits: int = 0
    """See `mimref.data.traits`."""


def decode_file(path: str, reduce: Reduce | None = None, decoding: Decoding = USUAL) -> Decoded:
    """Read an image file, or its first frame, as RGB; a JPEG at a fraction of its size if `reduce` allows it.

    By default, alpha is dropped, not composited, and EXIF orientation is not applied: both as in torchvision's
    ImageFolder and timm, which published numbers rely on. 16-bit gray is scaled to 8 bits. libjpeg reduces by skipping
    the high frequencies of each block of 8 x 8 pixels instead of computing pixels that a resize would average away.
    reduce: called for JPEG only, with the size of the whole image; None decodes at full size. With `decoding.channels`,
    TIFF of any kind and arrays are read too (see `mimref.data.bands`), and an image with another number of channels
    raises DataError.
    Raises BadImage for files that are missing, unreadable, empty, truncated, not an image, or larger than
    `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb), and for pixels whose range is unknown.
    """
    _check_regular(path)
    return _decode(path, printable(path), reduce, decoding)


def read_content(path: str) -> bytes:
    """Return the content of an image file. Raises BadImage, as `decode_file` does, for files that cannot be read."""
    _check_regular(path)
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise BadImage(printable(path), _reason(path, error)) from error


def _check_regular(path: str) -> None:
    # Opening a pipe or reading from a terminal would wait for input.
    with suppress(OSError):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise BadImage(printable(path), "not a regular file")


def decode_content(content: bytes, name: str, reduce: Reduce | None = None, decoding: Decoding = USUAL) -> Decoded:
    """Decode the content of an image file as `decode_file` does; `name` stands for the file in BadImage."""
    return _decode(io.BytesIO(content), name, reduce, decoding)


def decode_array(values: NDArray[Any], name: str, decoding: Decoding) -> Decoded:
    """Decode an image that a table holds as numbers, see `mimref.data.bands`. Raises as `decode_file` does."""
    try:
        values_HWC = channels_last(values, decoding.channels or 3)
        image = as_tensor(values_HWC, decoding.range)
    except WrongChannels as error:
        raise DataError(f"{name} {error}") from error
    except ValueError as error:
        raise BadImage(name, reason_of(error)) from error
    return Decoded(image, image.shape[1], image.shape[2], traits_of(values_HWC, decoding.range))


def _decode(file: str | io.BytesIO, name: str, reduce: Reduce | None, decoding: Decoding) -> Decoded:
    try:
        with warnings.catch_warnings():
            # A user cannot act on Pillow's other warnings (broken EXIF, odd TIFF tags).
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if decoding.channels is not None:
                return _with_channels(file, reduce, decoding, decoding.channels)
            with Image.open(file) as image:
                is_deep, low_HWC = deep_colour(image), None
                if is_deep and decoding.range != "type":
                    with Image.open(file) as again:
                        low_HWC = low_bytes(again)
                rgb = partial(to_rgb, decoding=decoding, is_deep=is_deep, low_HWC=low_HWC)
                return _decoded(image, reduce, decoding, rgb)
    except WrongChannels as error:
        raise DataError(f"{name} {error}") from error
    except Exception as error:  # on corrupt files Pillow's decoders raise nearly anything
        raise BadImage(name, _reason(file, error)) from error


def _with_channels(file: str | io.BytesIO, reduce: Reduce | None, decoding: Decoding, channels: int) -> Decoded:
    """Decode an image whose channels keep their values. Raises WrongChannels; for corrupt files, nearly anything."""
    head, values_HWC = _head(file), None
    if is_array(head):
        values_HWC = channels_last(read_array(file), channels)
    elif is_tiff(head):
        values_HWC = read_tiff(file)
    if values_HWC is not None:
        if values_HWC.shape[0] * values_HWC.shape[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Image.DecompressionBombError
        image = as_tensor(check_channels(values_HWC, channels), decoding.range)
        return Decoded(image, image.shape[1], image.shape[2], traits_of(values_HWC, decoding.range))
    low_HWC = deep_bytes(file)
    with Image.open(file) as opened:
        if loses_bits(opened):
            raise ValueError("Pillow would read its 16 bits as 8; save it as TIFF or .npy")

        def convert(image: Image.Image) -> tuple[NDArray[Any], int]:
            """Return pixels and traits."""
            stored_HWC = check_channels(read_pillow(image, low_HWC), channels)
            pixels_HWC = np.array(as_pixels(stored_HWC, decoding.range), order="C")
            return pixels_HWC, traits_of(stored_HWC, decoding.range)

        return _decoded(opened, reduce, decoding, convert)


def _decoded(
    image: Image.Image,
    reduce: Reduce | None,
    decoding: Decoding,
    convert: Callable[[Image.Image], tuple[NDArray[Any], int]],
) -> Decoded:
    """Decode an opened image. convert: loads it, and returns its pixels (H, W, C) and traits."""
    several = False
    if isinstance(image, JpegImageFile):
        size, orientation = image.size, orientation_of(image)
        if reduce is not None:
            _draft(image, reduce, orientation if decoding.orientation == "exif" else 1)
    else:
        several = _has_several(image)
        image.load()
        # Only now: Pillow applies the orientation of TIFF files when it loads them.
        size, orientation = image.size, orientation_of(image)
    pixels_HWC, traits = convert(image)
    width, height = size
    if orientation > 1 and decoding.orientation == "exif":
        pixels_HWC = turned(pixels_HWC, orientation)
        width, height = size[::-1] if orientation >= 5 else size
    elif orientation > 1:
        traits |= TURNED
    traits |= SEVERAL * several
    return Decoded(torch.from_numpy(pixels_HWC).permute(2, 0, 1), height, width, traits)


def _has_several(image: Image.Image) -> bool:
    """Return whether an image, opened but not loaded, has several frames or pages; layers count as one image."""
    try:
        return image.format != "PSD" and bool(getattr(image, "is_animated", False))
    except Exception:  # damage after the first frame
        return False


def _draft(image: JpegImageFile, reduce: Reduce, orientation: int) -> None:
    """Let libjpeg decode the image at a reduced size."""
    width, height = image.size
    factor = reduction_of(width, height, reduce, orientation)
    # Pillow chooses the strongest reduction that keeps this size: exactly `factor`.
    image.draft(None, (width // factor, height // factor))


def reduction_of(width: int, height: int, reduce: Reduce, orientation: int) -> int:
    """Return the factor by which decoding reduces a JPEG of this stored size, before its orientation is applied."""
    factor = reduce(width, height) if orientation >= 5 else reduce(height, width)
    while orientation > 1 and (width % factor or height % factor):
        # The last pixels of a side would cover less than the others; once turned, they might be the first.
        factor //= 2
    return factor


def reason_of(error: BaseException) -> str:
    """Return the message of the system or of an exception on one line; the exception's type if it has no message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def printable(path: str) -> str:
    """Return the path on one line, safe for any terminal and file format: odd bytes and control characters escaped."""
    if path.isprintable():
        return path
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in path)


def first_of(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names, printable, for a message."""
    return ", ".join(map(printable, names[:most])) + (", ..." if len(names) > most else "")


def _reason(file: str | io.BytesIO, error: Exception) -> str:
    """Return the reason in a few words, for the table of skipped images."""
    if isinstance(error, UnidentifiedImageError):
        return what_is(_head(file))
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    return reason_of(error).lower() if isinstance(error, OSError) and error.strerror else reason_of(error)


def _head(file: str | io.BytesIO) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getvalue()[:HEAD]
    with open(file, "rb") as stream:
        return stream.read(HEAD)
