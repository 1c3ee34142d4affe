"""The thumbnails of a page, as text, within what the page may still take."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from mimref.evaluation.exhibits.contents import Thumbnail
from mimref.reports.html.environment import base64_text

# Longest side and quality of WebP, whose files lack the 600 bytes of tables of a JPEG; tried in this order.
SMALLER = ((48, 60), (48, 35), (40, 30), (32, 25), (24, 20), (16, 10))

SAMPLE = 50


@dataclass(frozen=True)
class Pool:
    """Every image once: galleries and maps refer to it by its number."""

    prefix: str
    """Of the address of each."""
    encoded: list[str]
    note: str = ""


def encode(images: Sequence[Thumbnail], most_bytes: int) -> Pool:
    """The images in base64; compressed further where they would take more than `most_bytes`."""
    files = [image.jpeg for image in images]
    if _size(files) <= most_bytes:
        return Pool("data:image/jpeg;base64,", _encoded(files))
    sample = images[:: max(1, len(images) // SAMPLE)]
    for side, quality in SMALLER:
        # Most of the time goes into sizes that are too large: a few images tell.
        estimate = _size([_smaller(image.jpeg, side, quality) for image in sample]) * len(images) / len(sample)
        if estimate > 1.1 * most_bytes and (side, quality) != SMALLER[-1]:
            continue
        files = [_smaller(image.jpeg, side, quality) for image in images]
        if _size(files) <= most_bytes:
            break
    note = f"The images are compressed further, to at most {side} pixels, so that the page stays small."
    return Pool("data:image/webp;base64,", _encoded(files), note)


def _encoded(files: Sequence[bytes]) -> list[str]:
    return [base64_text(file) for file in files]


def _size(files: Sequence[bytes]) -> int:
    """With quotes and commas."""
    return sum(4 * -(-len(file) // 3) + 3 for file in files)


def _smaller(jpeg: bytes, side: int, quality: int) -> bytes:
    try:
        with Image.open(io.BytesIO(jpeg)) as image:
            image.load()
            image.thumbnail((side, side))
            written = io.BytesIO()
            image.convert("RGB").save(written, "WEBP", quality=quality, method=4)
    except (OSError, ValueError, SyntaxError):
        return b""  # a damaged file shows nothing, compressed or not
    return written.getvalue()
