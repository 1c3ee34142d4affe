"""Images passed from Python: paths, PIL images, arrays and tensors."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mimref.data.bands import WrongChannels, as_tensor, channels_last, check_channels, read_pillow
from mimref.data.decode import BadImage, decode_file, printable
from mimref.data.pixels import Decoding, orientation_of, to_rgb, turned
from mimref.data.sources import ImageSource, fingerprint_files
from mimref.errors import DataError

_ACCEPTED = "paths, PIL images, or uint8 arrays (H, W), (H, W, 1), (H, W, 3) or (3, H, W)"


class GivenSource(ImageSource):
    """A list of images, each a path, a PIL image, an array or a tensor.

    Unlike in a data set, no image is skipped: one that cannot be read is an error. Arrays are uint8, or floats from 0
    to 1. With `data.channels` they hold any numbers that `data.range` scales; by default, floats must be from 0 to 1.
    Raises DataError for anything else.
    """

    labels = None
    class_names = None
    name = "X"

    def __init__(self, images: Any, decoding: Decoding) -> None:
        self.items, self.decoding = _as_list(images, decoding.channels), decoding
        self.in_memory = not any(isinstance(item, str | os.PathLike) for item in self.items)

    def __len__(self) -> int:
        return len(self.items)

    def path(self, index: int) -> str:
        """Return the path, or a name such as `X[3]`."""
        item = self.items[index]
        return printable(os.fspath(item)) if isinstance(item, str | os.PathLike) else f"X[{index}]"

    def read(self, index: int) -> Tensor:
        """See `ImageSource`. Raises DataError for an image that cannot be read."""
        item = self.items[index]
        try:
            if isinstance(item, str | os.PathLike):
                return decode_file(os.fspath(item), None, self.decoding).image.contiguous()
            if self.decoding.channels is not None:
                return self._with_channels(item, self.decoding.channels)
            rgb_HWC = self._rgb(item)
        except BadImage as bad:
            raise DataError(
                f"{bad.path}: cannot be read as an image ({bad.reason}); leave it out or repair it"
            ) from bad
        except WrongChannels as error:
            raise DataError(f"{self.path(index)} {error}") from error
        except ValueError as error:
            raise DataError(f"{self.path(index)}: {error}") from error
        return torch.from_numpy(rgb_HWC).permute(2, 0, 1).contiguous()

    def _with_channels(self, item: Any, channels: int) -> Tensor:
        """Return an image (C, H, W) with the channels as stored. Raises WrongChannels and ValueError."""
        window = self.decoding.range
        if isinstance(item, Image.Image):
            values_HWC = self._upright(item, check_channels(read_pillow(item, None), channels))
        else:
            is_tensor = isinstance(item, Tensor)
            values = item.detach().cpu().numpy() if is_tensor else item
            values_HWC = channels_last(values, channels, prefer_first=is_tensor)
            if values.dtype.kind == "f" and window == "type":
                _check_unit(values)
                window = "0,1"
        return as_tensor(values_HWC, window).contiguous()

    def _rgb(self, item: Any) -> NDArray[np.uint8]:
        """Return writable pixels (H, W, 3). Raises ValueError."""
        if isinstance(item, Image.Image):
            return self._upright(item, to_rgb(item, self.decoding)[0])
        pixels = _as_uint8(_channels_last(item))
        if pixels.shape[2] == 4:
            return to_rgb(Image.fromarray(pixels), self.decoding)[0]
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))).copy()

    def _upright(self, image: Image.Image, pixels_HWC: NDArray[Any]) -> NDArray[Any]:
        """Return the pixels of a loaded image as those of its file would be turned."""
        turn = orientation_of(image) if self.decoding.orientation == "exif" else 1
        return turned(pixels_HWC, turn) if turn > 1 else pixels_HWC

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the pixels, or over names, sizes and modification times of files."""
        paths = [item for item in self.items if isinstance(item, str | os.PathLike)]
        digest = hashlib.sha256(fingerprint_files("", [os.fsencode(os.path.abspath(path)) for path in paths]).encode())
        for index, item in enumerate(self.items):
            if not isinstance(item, str | os.PathLike):
                image = self.read(index)
                digest.update(b"%d %d %d\n" % (index, *image.shape[1:]))
                digest.update(image.numpy().data)
        return digest.hexdigest()


def _as_list(images: Any, channels: int | None) -> Sequence[Any]:
    """Return one item per image. Raises DataError for anything but a list of images."""
    if isinstance(images, str | os.PathLike | Image.Image):
        raise DataError(f"X is one {'image' if isinstance(images, Image.Image) else 'path'}; put it into a list")
    if isinstance(images, np.ndarray | Tensor) and images.ndim not in (1, 3, 4):
        raise DataError(f"X has the shape {tuple(images.shape)}; images are (N, H, W), (N, H, W, 3) or (N, 3, H, W)")
    if not isinstance(images, Iterable) or isinstance(images, dict | bytes):
        raise DataError(f"X is of type {type(images).__name__}; expected a list of {_ACCEPTED}")
    items = list(images)
    if not items:
        raise DataError("X holds no image")
    for index, item in enumerate(items):
        if isinstance(item, str | os.PathLike | Image.Image):
            continue
        if not isinstance(item, np.ndarray | Tensor):
            raise DataError(f"X[{index}] is of type {type(item).__name__}; expected {_ACCEPTED}")
        if channels is not None:
            continue  # the shape is checked when the image is read
        try:
            _channels_last(item)
        except ValueError as error:
            raise DataError(f"X[{index}]: {error}") from error
    return items


def _channels_last(item: Any) -> NDArray[Any]:
    """Return one image as (H, W, 1), (H, W, 3) or (H, W, 4). Raises ValueError for other shapes."""
    is_tensor = isinstance(item, Tensor)
    pixels = item.detach().cpu().numpy() if is_tensor else item
    if pixels.ndim == 2 and pixels.size:
        return np.asarray(pixels[:, :, None])
    if pixels.ndim == 3 and pixels.size:
        # Channels come first in tensors and last in arrays, unless only the other order fits.
        first, last = pixels.shape[0] in (1, 3, 4), pixels.shape[2] in (1, 3, 4)
        if first and (is_tensor or not last):
            return np.asarray(pixels.transpose(1, 2, 0))
        if last:
            return np.asarray(pixels)
    raise ValueError(f"its shape is {tuple(pixels.shape)}; expected (H, W), (H, W, 1), (H, W, 3) or (3, H, W)")


def _as_uint8(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Return pixels as uint8. Raises ValueError unless they are uint8, booleans, or floats from 0 to 1."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind != "f":
        raise ValueError(f"its pixels are of type {pixels.dtype}; expected uint8, or floats from 0 to 1")
    _check_unit(pixels)
    return np.rint(pixels.astype(np.float64) * 255).astype(np.uint8)


def _check_unit(pixels: NDArray[Any]) -> None:
    """Raise ValueError for floats outside 0 to 1."""
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN fails too
        low, high = float(pixels.min()), float(pixels.max())
        raise ValueError(f"its pixels range from {low:g} to {high:g}; expected floats from 0 to 1, or uint8")
