"""Thumbnails of a page in base64, compressed to the space that is left on the page."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from mimref.evaluation.exhibits.contents import Thumbnail
from mimref.reports.html.environment import base64_text

# Longest side and quality of WebP, tried in this order. WebP saves the 600 bytes of tables in a JPEG.
SMALLER = ((48, 60), (48, 35), (40, 30), (32, 25), (24, 20), (16, 10))

SAMPLE = 50


@dataclass(frozen=True)
class Pool:
    """All images of a page, each once; galleries and maps refer to them by number."""

    prefix: str
    """Prefix of every image's address."""
    encoded: list[str]
    note: str = ""


def encode(images: Sequence[Thumbnail], most_bytes: int) -> Pool:
    """Encode the images in base64, compressed further if they would take more than `most_bytes`."""
    files = [image.jpeg for image in images]
    if not images or _size(files) <= most_bytes:
        return Pool("data:image/jpeg;base64,", _encoded(files))
    sample = images[:: max(1, len(images) // SAMPLE)]
    for side, quality in SMALLER:
        # Sizes that are too large would take most of the time: estimate them from a few images.
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
    """Return the size of the files in base64, with quotes and commas."""
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
