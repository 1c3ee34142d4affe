"""A synthetic JPEG in memory that resembles a photograph, for timing the reading of images."""

import io
from functools import cache

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375
"""A usual size in ImageNet."""
_QUALITY = 90


@cache
def photograph() -> bytes:
    """Return a JPEG of smooth shapes and some noise."""
    x, y = np.meshgrid(np.linspace(0, 9, WIDTH), np.linspace(0, 7, HEIGHT))
    waves_HWC = np.stack([np.sin(x) + np.cos(y), np.sin(x + y), np.cos(x - 2 * y)], axis=2)
    noise_HWC = np.random.default_rng(0).normal(0, 8, waves_HWC.shape)
    pixels_HWC = np.clip(128 + 50 * waves_HWC + noise_HWC, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
