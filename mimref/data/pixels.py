"""From an image as Pillow opens it to RGB in 8 bits: high bit depths, alpha and EXIF orientation."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from mimref.data.traits import FLAT, NARROW, TRANSPARENT, WIDE

_ORIENTATION = 0x0112
_CHECKS = (102, 153)
"""Two grays on which black and white shapes both stand out, as in GIMP."""
_CHECK_SIDE = 8
_GROUNDS = {"white": 255, "black": 0}
_PERCENTILES = (0.5, 99.5)
_FLAT_LEVELS = 2.0
"""Standard deviation, of 255 levels, below which a channel shows nothing."""
_NARROW_LEVELS = 32


@dataclass(frozen=True)
class Decoding:
    """What `data.orientation`, `data.alpha` and `data.range` choose."""

    orientation: str = "file"
    alpha: str = "drop"
    range: str = "type"

    def changes(self) -> dict[str, str]:
        """The choices that are not the default."""
        usual = asdict(Decoding())
        return {key: value for key, value in asdict(self).items() if value != usual[key]}


USUAL = Decoding()


def to_rgb(image: Image.Image, decoding: Decoding = USUAL) -> tuple[NDArray[np.uint8], int]:
    """Writable uint8 (H, W, 3), and the image's traits. Raises ValueError for pixels of unknown range."""
    if image.mode[0] in "IF":
        gray_HW, traits = _gray(image, decoding.range)
        rgb_HWC = np.repeat(gray_HW[:, :, None], 3, axis=2)
    elif image.has_transparency_data:
        rgb_HWC, traits = _without_alpha(image, decoding.alpha)
    else:
        # Converting RGB to RGB would copy it.
        rgb_HWC, traits = np.array(image if image.mode == "RGB" else image.convert("RGB")), 0
    return rgb_HWC, traits | FLAT * _is_flat(rgb_HWC)


def _gray(image: Image.Image, window: str) -> tuple[NDArray[np.uint8], int]:
    """uint8 (H, W) of gray in more than 8 bits, and its traits."""
    values_HW = np.asarray(image)
    if window == "type":
        if image.mode == "F":
            raise ValueError(
                "floating-point pixels of unknown range; --set data.range=image, percentile or a window A,B scales them"
            )
        # 0..65535 scaled to 0..255, rounded; Pillow's own conversion clips at 255 instead.
        wide_HW = values_HW.astype(np.int64)
        if wide_HW.min() < 0 or wide_HW.max() > 65535:
            raise ValueError(
                "32-bit pixels outside 0..65535; --set data.range=image, percentile or a window A,B scales them"
            )
        low, high = np.percentile(_look(wide_HW, 64), _PERCENTILES)
        return ((wide_HW + 128) // 257).astype(np.uint8), WIDE | NARROW * (high - low < 257 * _NARROW_LEVELS)
    known = values_HW[np.isfinite(values_HW)]
    if not known.size:
        raise ValueError("no pixel is a finite number")
    low, high = _window(known.astype(np.float64), window)
    values_HW = np.nan_to_num(values_HW.astype(np.float64), nan=low, posinf=high, neginf=low)
    share_HW = (values_HW - low).clip(0, high - low) / (high - low or 1)
    return np.rint(255 * share_HW).astype(np.uint8), 0


def _window(values: NDArray[np.float64], window: str) -> tuple[float, float]:
    """The values that become black and white."""
    if window == "image":
        return float(values.min()), float(values.max())
    if window == "percentile":
        low, high = np.percentile(values, _PERCENTILES)
        return float(low), float(high)
    low, high = map(float, window.split(","))
    return low, high


def _without_alpha(image: Image.Image, ground: str) -> tuple[NDArray[np.uint8], int]:
    """RGB (H, W, 3) on a ground, or as stored where it is `drop`, and its traits."""
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    alpha = rgba.getchannel("A")
    # Only by way of RGBA do transparent palette entries keep their colour.
    colours = rgba.convert("RGB") if image.mode == "P" else image.convert("RGB")
    if alpha.getextrema()[0] == 255:
        return np.array(colours), 0
    if ground == "drop":
        return np.array(colours), TRANSPARENT
    below = _checks(image.size) if ground == "checker" else Image.new("RGB", image.size, (_GROUNDS[ground],) * 3)
    below.paste(colours, mask=alpha)
    return np.array(below), 0


def _checks(size: tuple[int, int]) -> Image.Image:
    """Squares of two grays, the darker one at the top left."""
    width, height = (np.arange(side) // _CHECK_SIDE for side in size)
    light_HW = (height[:, None] + width) % 2
    return Image.fromarray(np.array(_CHECKS, np.uint8)[light_HW]).convert("RGB")


def _look(pixels: NDArray[Any], samples: int) -> NDArray[Any]:
    """About so many rows and columns of an image (H, W, ...)."""
    height, width = pixels.shape[:2]
    return pixels[:: max(1, height // samples), :: max(1, width // samples)]


def _is_flat(rgb_HWC: NDArray[np.uint8]) -> bool:
    """Whether an image is nearly of one colour."""
    # A look at some pixels answers for most images, in 0.02 ms; np.std takes twice as long.
    some_N3 = _look(rgb_HWC, 16).reshape(-1, 3).astype(np.float32)
    count, squares_3 = len(some_N3), (some_N3.T @ some_N3).diagonal()
    means_3 = np.ones(count, np.float32) @ some_N3 / count
    if (squares_3 / count - means_3**2).max() >= _FLAT_LEVELS**2:
        return False
    return bool(rgb_HWC.reshape(-1, 3).std(axis=0).max() < _FLAT_LEVELS)


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8: 1 where there is none, or where Pillow turns the image by itself, as TIFF.

    The EXIF data of JPEG is known once the file is opened, that of other formats once it is loaded.
    """
    info = image.info
    exif, xmp = info.get("exif", b""), info.get("xmp", info.get("XML:com.adobe.xmp", ""))
    # Most images have no such tag, and reading all tags takes longer than to look for its bytes.
    may_have = b"\x12\x01" in exif or b"\x01\x12" in exif or "Raw profile type exif" in info
    if isinstance(image, TiffImageFile) or not (may_have or "Orientation" in str(xmp)):
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged tags are no reason to lose the pixels, and Pillow raises many kinds
        return 1
    return found if found in range(1, 9) else 1


def turned(rgb_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The image as it is looked at."""
    if orientation >= 5:
        rgb_HWC = rgb_HWC.transpose(1, 0, 2)
    down, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(rgb_HWC[:: -1 if down else 1, :: -1 if right else 1])
