"""Conversion of images that Pillow has opened to 8-bit RGB: high bit depths, alpha and EXIF orientation.

`mimref.data.bands` keeps other channels and more bits.
"""

import re
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from mimref.config.base import DataConfig
from mimref.data.traits import FLAT, NARROW, TRANSPARENT, WIDE

_ORIENTATION = 0x0112
_CHECKS = (102, 153)
"""Two grays on which black and white shapes both stand out, as in GIMP."""
_CHECK_SIDE = 8
_GROUNDS = {"white": 255, "black": 0}
_PERCENTILES = (0.5, 99.5)
FLAT_LEVELS = 2.0
"""Standard deviation, in levels of 255, below which a channel shows nothing."""
FLAT_LOOK = 16
"""About this many rows and columns are enough to show that an image is not of one colour."""
_NARROW_LEVELS = 32
_DEEP = re.compile("RGBA?;16[BLN]")


@dataclass(frozen=True)
class Decoding:
    """Choices of `data.orientation`, `data.alpha`, `data.range` and `data.channels`."""

    orientation: str = "file"
    alpha: str = "drop"
    range: str = "type"
    channels: int | None = None
    """Number of channels of every image, which keep their values. None: 8-bit colour."""

    @classmethod
    def of(cls, data: DataConfig) -> "Decoding":
        """Return the choices of the settings, with defaults for those that are not set."""
        return cls(**{key: getattr(data, key) or value for key, value in asdict(USUAL).items()})

    def changes(self) -> dict[str, str | int]:
        """Return the choices that are not the default."""
        usual = asdict(USUAL)
        return {key: value for key, value in asdict(self).items() if value != usual[key]}


USUAL = Decoding()
DECODING = tuple(asdict(USUAL))
"""Names of the settings."""


def to_rgb(
    image: Image.Image, decoding: Decoding, *, is_deep: bool = False, low_HWC: NDArray[np.uint8] | None = None
) -> tuple[NDArray[np.uint8], int]:
    """Return writable pixels, uint8 (H, W, 3), and the image's traits. Raises ValueError for pixels of unknown range.

    is_deep, low_HWC: results of `deep_colour` and `low_bytes`.
    """
    traits = 0
    if is_deep and low_HWC is None:
        traits = wide_traits(np.asarray(image)[:, :, :3], 1)
    elif low_HWC is not None:
        deep_HWC = np.asarray(image).astype(np.uint16) * 256 + low_HWC
        deep_HWC[:, :, :3] = _windowed(deep_HWC[:, :, :3], decoding.range)
        deep_HWC[:, :, 3:] //= 256
        image = Image.fromarray(deep_HWC.astype(np.uint8))
    if image.mode[0] in "IF":
        gray_HW, traits = _gray(image, decoding.range)
        rgb_HWC = np.repeat(gray_HW[:, :, None], 3, axis=2)
    elif image.has_transparency_data:
        rgb_HWC, transparent = _without_alpha(image, decoding.alpha)
        traits |= transparent
    else:
        # Converting RGB to RGB would copy it.
        rgb_HWC = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return rgb_HWC, traits | FLAT * is_flat(rgb_HWC)


def deep_colour(image: Image.Image) -> bool:
    """Return whether an image, opened but not loaded, has 16-bit colours, of which Pillow keeps the upper 8 bits."""
    tiles = getattr(image, "tile", [])
    return bool(tiles) and image.mode in ("RGB", "RGBA") and all(_DEEP.fullmatch(raw_mode(tile)) for tile in tiles)


def low_bytes(image: Any) -> NDArray[np.uint8]:
    """Return the lower 8 bits of such an image's colours: those that Pillow keeps if it swaps the byte order."""
    other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    for number, tile in enumerate(image.tile):
        mode = raw_mode(tile)[:-1] + other[raw_mode(tile)[-1]]
        args = mode if isinstance(tile[3], str) else (mode, *tile[3][1:])
        image.tile[number] = tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)
    return np.asarray(image)


def raw_mode(tile: Any) -> str:
    """Return Pillow's name for the layout of the data in a tile."""
    args = tile[3]
    return str(args[0] if isinstance(args, tuple) and args else args)


def _gray(image: Image.Image, window: str) -> tuple[NDArray[np.uint8], int]:
    """Return gray of more than 8 bits as uint8 (H, W), and its traits."""
    values_HW = np.asarray(image)
    if window == "type":
        check_16_bits(values_HW)
        # 0..65535 scaled to 0..255, rounded; Pillow's own conversion clips at 255 instead.
        wide_HW = values_HW.astype(np.int64)
        return ((wide_HW + 128) // 257).astype(np.uint8), wide_traits(wide_HW, 257)
    return _windowed(values_HW, window), 0


def check_16_bits(values: NDArray[Any]) -> None:
    """Raise ValueError unless values are integers in 0..65535; otherwise black and white are unknown."""
    if values.dtype.kind not in "iu":
        raise ValueError(
            "floating-point pixels of unknown range; --set data.range=image, percentile or a window A,B scales them"
        )
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError(
            f"{8 * values.dtype.itemsize}-bit pixels outside 0..65535; --set data.range=image, percentile or a window "
            "A,B scales them"
        )


def wide_traits(values: NDArray[Any], step: int) -> int:
    """Return the traits of an image whose values are scaled from their whole range. step: values per 8-bit level."""
    low, high = np.percentile(_look(values, 64), _PERCENTILES)
    return WIDE | NARROW * bool(high - low < step * _NARROW_LEVELS)


def _windowed(values: NDArray[Any], window: str) -> NDArray[np.uint8]:
    """Scale values of any shape to 0..255 by one window."""
    return np.rint(scaled(values, window)).astype(np.uint8)


def scaled(values: NDArray[Any], window: str) -> NDArray[np.float64]:
    """Scale values as `_windowed` does, without rounding. Raises ValueError if none is a finite number."""
    known = values if values.dtype.kind in "iu" else values[np.isfinite(values)]
    if not known.size:
        raise ValueError("no pixel is a finite number")
    low, high = _window(known, window)
    values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    found: NDArray[np.float64] = 255 * (values - low).clip(0, high - low) / (high - low or 1)
    return found


def _window(values: NDArray[Any], window: str) -> tuple[float, float]:
    """Return the values that become black and white."""
    if window == "image":
        return float(values.min()), float(values.max())
    if window == "percentile":
        low, high = np.percentile(values, _PERCENTILES)
        return float(low), float(high)
    low, high = map(float, window.split(","))
    return low, high


def _without_alpha(image: Image.Image, ground: str) -> tuple[NDArray[np.uint8], int]:
    """Return RGB (H, W, 3), composited on the background `ground` or as stored if that is `drop`, and its traits."""
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    alpha = rgba.getchannel("A")
    # Transparent palette entries keep their colour only if converted by way of RGBA.
    colours = rgba.convert("RGB") if image.mode == "P" else image.convert("RGB")
    if alpha.getextrema()[0] == 255:
        return np.array(colours), 0
    if ground == "drop":
        return np.array(colours), TRANSPARENT
    below = _checks(image.size) if ground == "checker" else Image.new("RGB", image.size, (_GROUNDS[ground],) * 3)
    below.paste(colours, mask=alpha)
    return np.array(below), 0


def _checks(size: tuple[int, int]) -> Image.Image:
    """Return a checkerboard of two grays, with the darker one at the top left."""
    width, height = (np.arange(side) // _CHECK_SIDE for side in size)
    light_HW = (height[:, None] + width) % 2
    return Image.fromarray(np.array(_CHECKS, np.uint8)[light_HW]).convert("RGB")


def _look(pixels: NDArray[Any], samples: int) -> NDArray[Any]:
    """Return about `samples` rows and columns of an image (H, W, ...)."""
    height, width = pixels.shape[:2]
    return pixels[:: max(1, height // samples), :: max(1, width // samples)]


def is_flat(rgb_HWC: NDArray[np.uint8]) -> bool:
    """Return whether an image is nearly of one colour."""
    # Some pixels are enough for most images, in 0.02 ms; np.std takes twice as long.
    some_N3 = _look(rgb_HWC, FLAT_LOOK).reshape(-1, 3).astype(np.float32)
    count, squares_3 = len(some_N3), (some_N3.T @ some_N3).diagonal()
    means_3 = np.ones(count, np.float32) @ some_N3 / count
    if (squares_3 / count - means_3**2).max() >= FLAT_LEVELS**2:
        return False
    # Those pixels may have missed stripes; all pixels of a large image would take 24 bytes each.
    return bool(_look(rgb_HWC, 512).reshape(-1, 3).std(axis=0).max() < FLAT_LEVELS)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8: 1 if there is none, or if Pillow applies it by itself, as in TIFF.

    The EXIF data of a JPEG is known once the file is opened, that of other formats once it is loaded.
    """
    info = image.info
    exif, xmp = info.get("exif", b""), info.get("xmp", info.get("XML:com.adobe.xmp", ""))
    # Most images have no such tag, and reading all tags takes longer than searching for its bytes.
    may_have = b"\x12\x01" in exif or b"\x01\x12" in exif or "Raw profile type exif" in info
    if isinstance(image, TiffImageFile) or not (may_have or "Orientation" in str(xmp)):
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged tags are no reason to lose the pixels, and Pillow raises many exceptions
        return 1
    return found if found in range(1, 9) else 1


def turned(pixels_HWC: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Return the image with its orientation applied."""
    if orientation >= 5:
        pixels_HWC = pixels_HWC.transpose(1, 0, 2)
    down, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(pixels_HWC[:: -1 if down else 1, :: -1 if right else 1])
