"""Flip, colour jitter, blur, grayscale, solarize and normalisation, batched on the device (BYOL settings, Table 10).

Every sample has its own parameters, drawn by `mimref.draws`; operations equal torchvision's up to its rounding to
uint8. An operation runs only on the samples it was drawn for; the draws are made on the CPU so that choosing them needs
no device sync.

Shapes: N views (images times views), S pixels per side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mimref.config import ViewsConfig
from mimref.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from mimref.draws import Operation, uniform

_BLUR_TAPS = 23  # BYOL's kernel for 224 pixels; covers more than 5 standard deviations
_GRAY = (0.2989, 0.587, 0.114)


class Photometric:
    """Turns uint8 crops into normalised float views, every sample with its own colours."""

    def __init__(self, config: ViewsConfig, seed: int, device: torch.device) -> None:
        self.config, self.seed, self.device = config, seed, device
        self._mean = torch.tensor(IMAGENET_MEAN, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD, device=device).view(1, 3, 1, 1)

    def __call__(self, crops: Tensor, epoch: int, sample_B: Tensor, views: Sequence[int]) -> Tensor:
        """Augment and normalise: crops (B, V, 3, S, S) uint8 -> (V, B, 3, S, S) float32.

        sample_B: int64 on the CPU. views: the V view numbers; 0 and 1 are global, all others local.
        """
        batch, count = crops.shape[:2]
        image_NCHW = crops.to(self.device, non_blocking=True).transpose(0, 1).flatten(0, 1).float().div_(255)
        sample_N = sample_B.repeat(count)
        view_N = torch.tensor(views).repeat_interleave(batch)
        image_NCHW = self._flip(image_NCHW, self._draw(epoch, Operation.FLIP, sample_N, view_N))
        if self.config.color:
            image_NCHW = self._jitter(image_NCHW, self._draw(epoch, Operation.JITTER, sample_N, view_N, count=9))
        if self.config.blur:
            image_NCHW = self._blur(image_NCHW, self._draw(epoch, Operation.BLUR, sample_N, view_N, count=2), view_N)
        if self.config.color:
            image_NCHW = self._gray(image_NCHW, self._draw(epoch, Operation.GRAY, sample_N, view_N))
            image_NCHW = self._solarize(image_NCHW, self._draw(epoch, Operation.SOLARIZE, sample_N, view_N), view_N)
        normalised: Tensor = ((image_NCHW - self._mean) / self._std).unflatten(0, (count, batch))
        return normalised

    def _draw(self, epoch: int, operation: Operation, sample_N: Tensor, view_N: Tensor, count: int = 1) -> Tensor:
        return uniform(self.seed, epoch, operation, sample_N, view_N, count=count)

    def _where(self, mask_N: Tensor) -> Tensor:
        return mask_N.nonzero().flatten().to(self.device, non_blocking=True)

    def _flip(self, image: Tensor, draw: Tensor) -> Tensor:
        chosen = self._where(draw[:, 0] < self.config.flip)
        return image.index_copy(0, chosen, image[chosen].flip(-1))

    def _jitter(self, image: Tensor, draw: Tensor) -> Tensor:
        """draw (N, 9): whether, four strengths, and four numbers whose order is the order of operations."""
        strength = torch.tensor(self.config.jitter)
        factor = (draw[:, 1:5] * 2 - 1) * strength
        # Brightness, contrast and saturation are factors around 1; hue is a shift in turns of the colour circle.
        factor[:, :3] = (1 + factor[:, :3]).clamp_min(0)
        order = draw[:, 5:9].argsort(dim=1)
        applied = draw[:, 0] < self.config.jitter_probability
        factor_on_device = factor.to(self.device, non_blocking=True)
        for slot in range(4):
            for operation in range(4):
                if strength[operation] == 0:
                    continue
                chosen = self._where(applied & (order[:, slot] == operation))
                changed = _adjust(image[chosen], operation, factor_on_device[chosen, operation].view(-1, 1, 1, 1))
                image = image.index_copy(0, chosen, changed)
        return image

    def _blur(self, image: Tensor, draw: Tensor, view_N: Tensor) -> Tensor:
        chosen = draw[:, 0] < self._by_view(self.config.blur_probability, view_N)
        low, high = self.config.blur_sigma
        sigma = (low + (high - low) * draw[chosen, 1]).to(self.device, non_blocking=True)
        where = self._where(chosen)
        return image.index_copy(0, where, gaussian_blur(image[where], sigma))

    def _gray(self, image: Tensor, draw: Tensor) -> Tensor:
        chosen = self._where(draw[:, 0] < self.config.gray_probability)
        return image.index_copy(0, chosen, _luminance(image[chosen]).expand(-1, 3, -1, -1))

    def _solarize(self, image: Tensor, draw: Tensor, view_N: Tensor) -> Tensor:
        chosen = self._where(draw[:, 0] < self._by_view(self.config.solarize_probability, view_N))
        part = image[chosen]
        return image.index_copy(0, chosen, torch.where(part >= 128 / 255, 1 - part, part))

    @staticmethod
    def _by_view(values: tuple[float, float, float], view_N: Tensor) -> Tensor:
        return torch.tensor(values)[view_N.clamp_max(2)]


def _luminance(image: Tensor) -> Tensor:
    red, green, blue = image.unbind(dim=1)
    return (_GRAY[0] * red + _GRAY[1] * green + _GRAY[2] * blue).unsqueeze(1)


def _adjust(image: Tensor, operation: int, factor: Tensor) -> Tensor:
    """Brightness (0), contrast (1), saturation (2) or hue (3) of images in [0, 1], factor (N, 1, 1, 1)."""
    if operation == 0:
        return (image * factor).clamp(0, 1)
    if operation == 1:
        mean = _luminance(image).mean(dim=(1, 2, 3), keepdim=True)
        return (image * factor + mean * (1 - factor)).clamp(0, 1)
    if operation == 2:
        return (image * factor + _luminance(image) * (1 - factor)).clamp(0, 1)
    return shift_hue(image, factor.squeeze(-1))


def shift_hue(image_N3SS: Tensor, turns_N11: Tensor) -> Tensor:
    """Rotate the hue of RGB images in [0, 1] by a share of the colour circle, value and saturation kept."""
    top, _ = image_N3SS.max(dim=1)
    chroma = top - image_N3SS.min(dim=1).values
    red, green, blue = image_N3SS.unbind(dim=1)
    safe = torch.where(chroma > 0, chroma, 1)
    sixth = torch.where(
        top == red,
        (green - blue) / safe,
        torch.where(top == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = sixth + 6 * turns_N11
    # One channel of HSV -> RGB: value minus chroma, clipped to the hexagon's side the channel lies on.
    channels = []
    for offset in (5.0, 3.0, 1.0):
        distance = (offset + sixth) % 6
        channels.append(top - chroma * torch.minimum(distance, 4 - distance).clamp(0, 1))
    return torch.stack(channels, dim=1)


def gaussian_blur(image_N3SS: Tensor, sigma_N: Tensor) -> Tensor:
    """Gaussian blur with one standard deviation (pixels) per image, reflecting at the edges."""
    size = image_N3SS.shape[-1]
    taps = min(_BLUR_TAPS, 2 * ((size - 1) // 2) + 1)
    offset = torch.arange(taps, device=sigma_N.device) - taps // 2
    kernel_NT = torch.exp(-0.5 * (offset / sigma_N[:, None]) ** 2)
    kernel_NT = kernel_NT / kernel_NT.sum(dim=1, keepdim=True)
    weight = kernel_NT.repeat_interleave(3, dim=0)[:, None]
    channels = image_N3SS.reshape(1, -1, size, size)
    groups = channels.shape[1]
    if not groups:
        return image_N3SS
    padded = F.pad(channels, [taps // 2] * 4, mode="reflect")
    blurred = F.conv2d(padded, weight[:, :, :, None], groups=groups)
    return F.conv2d(blurred, weight[:, :, None, :], groups=groups).view_as(image_N3SS)
