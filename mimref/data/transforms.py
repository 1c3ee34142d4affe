"""The evaluation transform, which is built only here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from mimref.devices import send
from mimref.errors import ConfigError

PerChannel = tuple[float, ...]
Resize = Literal["shorter", "direct"]

IMAGENET_MEAN: PerChannel = (0.485, 0.456, 0.406)
IMAGENET_STD: PerChannel = (0.229, 0.224, 0.225)

LONGEST_ASPECT = 16
"""Ratio of an image's sides beyond which only its middle is resized."""


def middle(image: Tensor) -> Tensor:
    """Return an image (C, H, W), or its middle if it is more than 16 times as long as wide.

    A strip of 1 x 100,000 pixels would fill the memory if its shorter side were resized as usual.
    """
    height, width = image.shape[-2:]
    longest = LONGEST_ASPECT * min(height, width)
    if max(height, width) <= longest:
        return image
    cropped: Tensor = tvf.center_crop(image, [min(height, longest), min(width, longest)])
    return cropped


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side, crop the centre square, normalise each channel; or resize to a square directly.

    Defaults: shorter side 256 for crops of 224, bicubic, ImageNet's mean and standard deviation. Raises ConfigError for
    values out of range.
    """

    image_size: int
    """Side of the square crop in pixels."""
    crop_fraction: float = 0.875
    """Crop side over resized shorter side, in (0, 1]."""
    mean: PerChannel = IMAGENET_MEAN
    """Mean of each channel, for pixels in 0..1; a single value applies to any number of channels."""
    std: PerChannel = IMAGENET_STD
    resize: Resize = "shorter"
    """`direct`: the whole image is resized to the square, whatever its aspect ratio; nothing is cropped."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ConfigError(f"image size is {self.image_size}; it must be at least 1 pixel")
        if not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"data.crop_fraction is {self.crop_fraction}; it must be above 0 and at most 1")
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if not self.mean or len(self.mean) != len(self.std) or not finite:
            raise ConfigError(f"mean {self.mean} and std {self.std} must be a finite number for each channel")
        if min(self.std) <= 0:
            raise ConfigError(f"std is {self.std}; every channel's must be above 0")
        if self.resize not in ("shorter", "direct"):
            raise ConfigError(f"resize is {self.resize!r}; it must be shorter or direct")

    def crop(self, image: Tensor) -> Tensor:
        """Resize and crop one image, (C, H, W) -> (C, S, S), as torchvision's Resize and CenterCrop do.

        uint8 stays uint8; float32 is clipped to 0..255, as rounding to uint8 does. With resize `shorter`, only the
        `middle` of a very long image is resized; the square would show no more of it anyway.
        """
        if self.resize == "direct":
            return resize(image, [self.image_size, self.image_size]).contiguous()
        resized = resize(middle(image), [round(self.image_size / self.crop_fraction)])
        cropped: Tensor = tvf.center_crop(resized, [self.image_size, self.image_size])
        return cropped.contiguous()

    def windows(self, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Return `crop`'s windows on images of these sizes (H, W): (J, 1, 2, 4) float64, see `mimref.data.windows`."""
        found = torch.tensor([self._window(*size) for size in sizes], dtype=torch.float64)
        return found.view(-1, 1, 2, 4)

    def _window(self, height: int, width: int) -> list[tuple[float, float, float, float]]:
        """Return the windows of one image, down and across."""
        square = self.image_size
        if self.resize == "direct":
            return [(0, side / square, 0, side) for side in (height, width)]
        sides = [min(side, LONGEST_ASPECT * min(height, width)) for side in (height, width)]
        shorter = round(square / self.crop_fraction)
        found: list[tuple[float, float, float, float]] = []
        for whole, side in zip((height, width), sides, strict=True):
            start = round((whole - side) / 2)
            resized = int(shorter * side / min(sides))
            step = side / resized
            found.append((start + step * round((resized - square) / 2), step, start, start + side))
        return found

    def normalize(self, batch_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalise crops (B, C, S, S) to `dtype`, on their device; computed in at least fp32, then rounded once."""
        compute = torch.promote_types(dtype, torch.float32)
        mean, std = (
            send(torch.tensor(values, dtype=compute), batch_BCHW.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        return ((batch_BCHW.to(compute) / 255 - mean) / std).to(dtype)

    def to_dict(self) -> dict[str, Any]:
        """Return settings for a JSON header, for `from_dict`. The default `resize` is left out, as in older headers."""
        saved = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in saved.items() if (key, value) != ("resize", "shorter")}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "EvalTransform":
        """Read what `to_dict` wrote. Raises ConfigError for missing keys and invalid values."""
        try:
            sizes = int(saved["image_size"]), float(saved.get("crop_fraction", 0.875))
            mean, std = (tuple(map(float, saved[key])) for key in ("mean", "std"))
            if len(mean) != len(std):
                raise ValueError(f"{len(mean)} means and {len(std)} standard deviations")
            return cls(*sizes, mean, std, saved.get("resize", "shorter"))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"recorded transform {dict(saved)} cannot be read: {error!r}") from error


def resize(image: Tensor, size: list[int]) -> Tensor:
    """Resize an image (C, H, W) to this height and width, or to this shorter side: bicubic, with antialiasing.

    float32 is clipped to 0..255, as a cubic overshoots; torchvision clips uint8 itself.
    """
    resized: Tensor = tvf.resize_image(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return resized.clamp_(0, 255) if resized.is_floating_point() else resized


def stacked(crops: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Stack crops of one shape into a batch: float32 if any of them is; uint8 (0, *shape) if there are none."""
    if not crops:
        return torch.empty(0, *shape, dtype=torch.uint8)
    if len({crop.dtype for crop in crops}) > 1:
        crops = [crop.float() for crop in crops]
    return torch.stack(list(crops))
