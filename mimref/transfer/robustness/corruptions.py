"""The corruptions of ImageNet-C: their names, AlexNet's errors, and corruption of any images while they are read.

ImageNet-C is by Hendrycks and Dietterich (2019). The package `imagecorruptions-imaug` corrupts the images.
"""

from functools import cache
from importlib.metadata import version
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mimref.data.decode import Decoded, Reduce
from mimref.data.sources import ImageSource, Subset
from mimref.data.transforms import EvalTransform
from mimref.draws import Operation, seeded
from mimref.errors import ConfigError, did_you_mean

ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
    "speckle_noise": 84.5388,
    "gaussian_blur": 78.7108,
    "spatter": 71.7512,
    "saturate": 65.8248,
}
"""Errors in percent, means over the five severities, by which the mCE divides. The first 15: google-research/augmix,
`imagenet.py` (from hendrycks/robustness). All 19, by severity: facebookresearch/dinov3,
`dinov3/eval/metrics/imagenet_c.py`."""
CORRUPTIONS = tuple(ALEXNET_ERRORS)
"""The 15 of the published mean, then the 4 that the authors set apart for validation."""
COUNTS = (15, 19)
"""Numbers of corruptions that published means cover: the standard ones, or all."""
SEVERITIES = (1, 2, 3, 4, 5)
IMAGENET_C = "imagenet-c"
"""Name of ImageNet-C in results."""
SMALLEST_SIDE = 32
"""Smallest side in pixels; the package rejects smaller images."""
_OWN_GENERATORS = ("impulse_noise", "glass_blur")
"""Corruptions that draw from their own generator and take a seed for it."""


def corruption_names(text: str) -> list[str]:
    """Return the corruptions that `15`, `19` or `fog,snow` stands for, in order. Raises ValueError for other names."""
    if text in map(str, COUNTS):
        return list(CORRUPTIONS[: int(text)])
    chosen = [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in CORRUPTIONS:
            raise ValueError(f"15, 19 or names such as fog,snow{did_you_mean(name, CORRUPTIONS)}")
    return [name for name in CORRUPTIONS if name in chosen]


@cache
def corruption_package() -> ModuleType:
    """Import the package that corrupts images. Raises ConfigError if it is not installed."""
    try:
        version("imagecorruptions-imaug")  # the package that it was forked from has the same modules, but no seeds
        import cv2
        import imagecorruptions
    except ImportError as error:
        missing = "the package imagecorruptions-imaug is missing" if isinstance(error, ModuleNotFoundError) else error
        raise ConfigError(f"images cannot be corrupted: {missing}; pip install 'mimref[corruptions]'") from error
    # Loader processes are forked: OpenCV would wait in them for threads that do not exist there.
    cv2.setNumThreads(0)
    module: ModuleType = imagecorruptions
    return module


def corrupt(crop: Tensor, corruption: str, severity: int, seed: int) -> Tensor:
    """Corrupt one image, uint8 (3, S, S). Draws from NumPy's global generator, or from a generator with this seed."""
    package, options = corruption_package(), {"seed": seed} if corruption in _OWN_GENERATORS else {}
    try:
        # Spatter divides 0 by 0 if it draws no drop, as happens on small images.
        with np.errstate(invalid="raise" if corruption == "spatter" else "ignore"):
            image_HWC = package.corrupt(crop.permute(1, 2, 0).numpy(), severity, corruption, **options)
    except FloatingPointError:
        return crop
    return torch.from_numpy(np.array(image_HWC)).permute(2, 0, 1)


class CorruptedSource(Subset):
    """Evaluation crops of another source's images, corrupted while they are read.

    Draws are a function of (seed, image, corruption, severity). Read it with a transform that does not crop.
    """

    def __init__(self, source: ImageSource, transform: EvalTransform, corruption: str, severity: int, seed: int):
        super().__init__(source, np.arange(len(source)))
        self.transform, self.corruption, self.severity, self.seed = transform, corruption, severity, seed
        self.in_memory = False  # corruption takes longer than decoding

    def read(self, index: int) -> Tensor:
        """Return one corrupted crop, uint8 (3, S, S)."""
        return self.read_reduced(index, None).image.contiguous()

    def read_reduced(self, index: int, reduce: Reduce | None) -> Decoded:
        """See `ImageSource`; the image is decoded at its full size."""
        decoded = super().read_reduced(index, None)
        crop = self.transform.crop(decoded.image.contiguous())
        stream = len(SEVERITIES) * CORRUPTIONS.index(self.corruption) + self.severity
        with seeded(self.seed, stream, Operation.CORRUPTION, index) as seed:
            image = corrupt(crop, self.corruption, self.severity, seed)
        return decoded._replace(image=image, height=image.shape[1], width=image.shape[2])

    def encoded(self, index: int) -> None:
        """See `ImageSource`: no file holds a corrupted image."""
        return None
