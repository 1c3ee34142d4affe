"""Images with a stated number of channels (`data.channels`), which keep their values.

uint8 stays uint8. Wider values become float32 with black at 0 and white at 255, so that all later steps treat both
alike: 16-bit values are divided by 257, and a window of `data.range` scales others. No step rounds them to 8 bits.
"""

import io
import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from mimref.data.pixels import check_16_bits, deep_colour, low_bytes, raw_mode, scaled, turned, wide_traits

# Pillow also logs an error for what it cannot read, which Python would print for every image.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_NPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION, _SAMPLES_PER_PIXEL = 274, 277
_WHITE_16, _WHITE_8 = 65535, 255


class WrongChannels(Exception):
    """An image with another number of channels than its data set."""

    def __init__(self, found: int, wanted: int) -> None:
        super().__init__(found, wanted)
        self.found, self.wanted = found, wanted

    def __str__(self) -> str:
        channels = "1 channel" if self.found == 1 else f"{self.found} channels"
        return (
            f"has {channels}, not {self.wanted} (data.channels); set --channels {self.found} if all images have them, "
            "else leave this one out"
        )


def as_pixels(values: NDArray[Any], window: str) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Return values of any shape as uint8, or as float32 from 0 (black) to 255 (white). Raises ValueError.

    window: see `data.range`; ignored for 8-bit values.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * _WHITE_8
    if values.dtype.kind not in "iuf":
        raise ValueError(f"its values are {values.dtype}, not numbers")
    if window != "type":
        return scaled(values, window).astype(np.float32)
    check_16_bits(values)
    return values.astype(np.float32) / np.float32(_WHITE_16 / _WHITE_8)


def traits_of(values_HWC: NDArray[Any], window: str) -> int:
    """Return the traits of an image before `as_pixels`, see `mimref.data.traits`.

    Only images of one or three channels are checked: they may be normalised with the statistics of usual pictures,
    which narrow values do not resemble. For other numbers of channels, mean and standard deviation are measured.
    """
    wide = values_HWC.dtype.kind in "iu" and values_HWC.dtype.itemsize > 1
    usual = window == "type" and values_HWC.shape[2] in (1, 3)
    return wide_traits(values_HWC, _WHITE_16 // _WHITE_8) if wide and usual else 0


def channels_last(values: NDArray[Any], channels: int, *, prefer_first: bool = False) -> NDArray[Any]:
    """Return an array (H, W), (H, W, C) or (C, H, W) as (H, W, C).

    The channels are the last axis if it has `channels` entries, else the first; with `prefer_first`, the other way
    round. Raises WrongChannels, and ValueError for other shapes.
    """
    if values.ndim not in (2, 3) or not values.size:
        raise ValueError(f"its shape is {values.shape}; expected (H, W), (H, W, C) or (C, H, W)")
    if values.ndim == 2:
        values = values[:, :, None]
        return check_channels(values, channels)
    for axis in (0, 2) if prefer_first else (2, 0):
        if values.shape[axis] == channels:
            return np.moveaxis(values, axis, 2)
    raise WrongChannels(min(values.shape[0], values.shape[2]), channels)


def check_channels(values_HWC: NDArray[Any], channels: int) -> NDArray[Any]:
    """Return the array. Raises WrongChannels unless it has `channels` channels."""
    if values_HWC.shape[2] != channels:
        raise WrongChannels(values_HWC.shape[2], channels)
    return values_HWC


def as_tensor(values_HWC: NDArray[Any], window: str) -> Tensor:
    """Return a uint8 or float32 tensor (C, H, W) in memory of its own, with the channels of a pixel together."""
    pixels = as_pixels(values_HWC, window)
    return torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1)


# --- files


def is_array(head: bytes) -> bool:
    """Return whether a file that starts with `head` is `.npy`, or a ZIP archive, as `.npz` is."""
    return head.startswith((_NPY, _ZIP))


def is_tiff(head: bytes) -> bool:
    """Return whether a file that starts with `head` is TIFF."""
    return head.startswith(_TIFF)


def read_array(file: str | io.BytesIO) -> NDArray[Any]:
    """Return the array of a `.npy` file; of `.npz`, `image` or the only one. Raises ValueError, OSError and others."""
    found = np.load(file, allow_pickle=False)
    if not isinstance(found, np.ndarray):
        with found:
            names = found.files
            if len(names) != 1 and "image" not in names:
                raise ValueError(f"it holds {len(names)} arrays, and none of them is named image")
            found = found["image" if "image" in names else names[0]]
    return np.asarray(found)


def read_tiff(file: str | io.BytesIO) -> NDArray[Any] | None:
    """Return the image (H, W, C) of a TIFF file that Pillow would not read unchanged; None for other files.

    The channels are the samples of a pixel, or pages or planes of one size. The file's orientation tag is applied, as
    Pillow always does. Raises ValueError for several such axes, and if the package tifffile is missing.
    """
    if _pillow_keeps(file):
        return None
    try:
        import tifffile
    except ImportError as error:
        raise ValueError("this kind of TIFF needs the package tifffile; pip install 'mimref[bands]'") from error
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        series = tiff.series[0]
        values, axes = np.asarray(series.asarray()), series.axes
        orientation = tiff.pages.first.tags.valueof(_ORIENTATION, default=1)
    kept = [place for place, name in enumerate(axes) if name in "YX" or values.shape[place] > 1]
    names = "".join(axes[place] for place in kept)
    values = values.reshape([values.shape[place] for place in kept])
    others = [place for place, name in enumerate(names) if name not in "YX"]
    if len(others) > 1 or len(names) - len(others) != 2:
        raise ValueError(f"its axes {axes} of {series.shape} are more than rows, columns and channels")
    values_HWC = np.moveaxis(values, others[0], 2) if others else values[:, :, None]
    return turned(values_HWC, orientation) if orientation in range(2, 9) else values_HWC


def _pillow_keeps(file: str | io.BytesIO) -> bool:
    """Return whether Pillow reads all channels and bits of a TIFF file, which has one page."""
    try:
        with Image.open(file) as image:
            if not isinstance(image, TiffImageFile) or image.is_animated:
                return False
            samples = int(image.tag_v2.get(_SAMPLES_PER_PIXEL, 1))
            return samples == len(image.getbands()) and not loses_bits(image)
    except UnidentifiedImageError:
        return False
    finally:
        if isinstance(file, io.BytesIO):
            file.seek(0)


def loses_bits(image: Image.Image) -> bool:
    """Return whether Pillow reads an image's 16-bit channels as 8 bits, and `deep_bytes` cannot restore the others."""
    raw_modes = map(raw_mode, getattr(image, "tile", []))
    several = len(image.getbands()) > 1
    return several and not deep_colour(image) and any(";16" in mode for mode in raw_modes)


def read_pillow(image: Image.Image, low_HWC: NDArray[np.uint8] | None) -> NDArray[Any]:
    """Return an image that Pillow has opened as (H, W, C), in the type of its values; palettes become colours.

    low_HWC: lower 8 bits of 16-bit colours, of which Pillow keeps the upper 8; see `deep_bytes`.
    """
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    values = np.asarray(image)
    if low_HWC is not None:
        values = values.astype(np.uint16) * 256 + low_HWC
    return values[:, :, None] if values.ndim == 2 else values


def deep_bytes(file: str | io.BytesIO) -> NDArray[np.uint8] | None:
    """Return the lower 8 bits of an image with 16-bit colours; None for others. Raises what Pillow raises."""
    with Image.open(file) as image:
        return low_bytes(image) if deep_colour(image) else None
