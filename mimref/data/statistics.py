"""Mean and standard deviation of every channel, from a sample of the images that is the same in every run."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mimref.data.decode import BadImage
from mimref.data.sample import evenly
from mimref.data.sources import ImageSource
from mimref.errors import DataError

SAMPLE = 512
"""Number of images in the sample, evenly spread over the data set."""
_AT_ONCE = 64
_WHITE = 255
_CONSTANT = 1e-6
"""Standard deviation, as a share of white, below which a channel is constant and is not divided by it."""


def channel_statistics(source: ImageSource, most: int = SAMPLE) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return each channel's mean and standard deviation over all pixels of the sample, where black is 0 and white 1.

    Values have six significant digits. The standard deviation of a constant channel is 1. Unreadable images are left
    out. Raises DataError if all are unreadable, and if a server fails.
    """
    rows = evenly(source, most)
    count, mean_C, squares_C = 0, np.zeros(source.channels), np.zeros(source.channels)
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE]
        source.fetch(part)
        for row in part:
            try:
                pixels_CHW = source.read(row).numpy()
            except BadImage:
                continue
            pixels_CN = pixels_CHW.reshape(len(pixels_CHW), -1).astype(np.float64) / _WHITE
            own_C, size = pixels_CN.mean(axis=1), pixels_CN.shape[1]
            # Chan et al. (1979): sums of squares would lose the digits of a small variance.
            squares_C += pixels_CN.var(axis=1) * size + (own_C - mean_C) ** 2 * (count * size / (count + size))
            mean_C += (own_C - mean_C) * (size / (count + size))
            count += size
    if not count:
        raise DataError(f"{source.name}: cannot measure mean and std: none of {len(rows)} sampled images is readable")
    std_C = np.sqrt(squares_C / count)
    return _digits(mean_C), _digits(np.where(std_C < _CONSTANT, 1.0, std_C))


def _digits(values: NDArray[np.float64]) -> tuple[float, ...]:
    found: Sequence[float] = values.tolist()
    return tuple(float(f"{value:.6g}") for value in found)
