"""Flip, colour jitter, blur, grayscale, solarize and normalisation, batched on the device (BYOL settings, Table 10).

Every sample has its own parameters, drawn by `mimref.draws`. Operations equal torchvision's up to its rounding to
uint8. An operation runs only on the samples it was drawn for; draws are made on the CPU, so that selecting samples
needs no device sync.

Shapes: N views (images times views), S pixels per side.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mimref.config.run import ViewsConfig
from mimref.data.transforms import IMAGENET_MEAN, IMAGENET_STD, RGB
from mimref.devices import send
from mimref.draws import Operation, uniform

_BLUR_TAPS = 23  # BYOL's kernel for 224 pixels; reaches 5.5 standard deviations of its widest blur
_GRAY = (0.2989, 0.587, 0.114)
_SOLARIZE_FROM = 128 / 255


class Photometric:
    """Turns uint8 crops into normalised float views, every sample with its own colours.

    mean, std: of red, green and blue, where pixels are 0..1.
    """

    def __init__(
        self,
        config: ViewsConfig,
        seed: int,
        device: torch.device,
        *,
        mean: RGB = IMAGENET_MEAN,
        std: RGB = IMAGENET_STD,
    ) -> None:
        self.config, self.seed, self.device = config, seed, device
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1)

    def __call__(self, crops: Tensor, epoch: int, sample_B: Tensor, views: Sequence[int]) -> Tensor:
        """Augment and normalise: crops (B, V, 3, S, S) uint8 -> (V, B, 3, S, S) float32.

        sample_B: int64 on the CPU. views: the V view numbers; 0 and 1 are global, all others local.
        """
        batch, count = crops.shape[:2]
        # A new tensor, which everything below changes in place.
        image_N3SS = crops.to(self.device, non_blocking=True).transpose(0, 1).flatten(0, 1).float().div_(255)
        sample_N = sample_B.repeat(count)
        view_N = torch.tensor(views).repeat_interleave(batch)

        def draw(operation: Operation, numbers: int = 1) -> Tensor:
            return uniform(self.seed, epoch, operation, sample_N, view_N, count=numbers)

        self._flip(image_N3SS, draw(Operation.FLIP))
        if self.config.color:
            self._jitter(image_N3SS, draw(Operation.JITTER, 9))
        if self.config.blur:
            self._blur(image_N3SS, draw(Operation.BLUR, 2), view_N)
        if self.config.color:
            self._gray(image_N3SS, draw(Operation.GRAY))
            self._solarize(image_N3SS, draw(Operation.SOLARIZE), view_N)
        normalised: Tensor = image_N3SS.sub_(self._mean).div_(self._std).unflatten(0, (count, batch))
        return normalised

    def _change(self, image: Tensor, chosen_N: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replace the chosen images by `change(copies, rows)`, which may overwrite its copies."""
        rows = chosen_N.nonzero().flatten()
        if len(rows):
            rows = send(rows, self.device)
            image.index_copy_(0, rows, change(image.index_select(0, rows), rows))

    def _flip(self, image: Tensor, draw: Tensor) -> None:
        self._change(image, draw[:, 0] < self.config.flip, lambda part, _: part.flip(-1))

    def _jitter(self, image: Tensor, draw: Tensor) -> None:
        """draw (N, 9): whether to jitter, four strengths, and four numbers whose ranks order the operations."""
        strength = torch.tensor(self.config.jitter)
        factor = (draw[:, 1:5] * 2 - 1) * strength
        # Brightness, contrast and saturation are factors around 1; hue is a shift in turns of the colour circle.
        factor[:, :3] += 1
        order = draw[:, 5:9].argsort(dim=1)
        applied = draw[:, 0] < self.config.jitter_probability
        factor = send(factor, self.device).view(-1, 4, 1, 1, 1)
        for slot in range(4):
            for operation in range(4):
                if strength[operation] == 0:
                    continue
                chosen = applied & (order[:, slot] == operation)
                self._change(image, chosen, partial(_adjust, operation=operation, factor_N4111=factor))

    def _blur(self, image: Tensor, draw: Tensor, view_N: Tensor) -> None:
        low, high = self.config.blur_sigma
        sigma = send(low + (high - low) * draw[:, 1], self.device)
        chosen = draw[:, 0] < self._by_view(self.config.blur_probability, view_N)
        self._change(image, chosen, lambda part, rows: gaussian_blur(part, sigma[rows]))

    def _gray(self, image: Tensor, draw: Tensor) -> None:
        chosen = draw[:, 0] < self.config.gray_probability
        self._change(image, chosen, lambda part, _: _luminance(part).expand_as(part))

    def _solarize(self, image: Tensor, draw: Tensor, view_N: Tensor) -> None:
        chosen = draw[:, 0] < self._by_view(self.config.solarize_probability, view_N)
        self._change(image, chosen, lambda part, _: torch.where(part >= _SOLARIZE_FROM, 1 - part, part))

    @staticmethod
    def _by_view(values: tuple[float, float, float], view_N: Tensor) -> Tensor:
        return torch.tensor(values)[view_N.clamp_max(2)]


def _luminance(image: Tensor) -> Tensor:
    red, green, blue = image.unbind(dim=1)
    return (_GRAY[0] * red).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2]).unsqueeze(1)


def _adjust(image: Tensor, rows: Tensor, *, operation: int, factor_N4111: Tensor) -> Tensor:
    """Brightness (0), contrast (1), saturation (2) or hue (3) of images in [0, 1], which may be overwritten."""
    factor = factor_N4111[rows, operation]
    if operation == 3:
        return shift_hue(image, factor.squeeze(-1))
    if operation == 0:
        return image.mul_(factor).clamp_(0, 1)
    base = _luminance(image)
    if operation == 1:
        base = base.mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(base, image, factor).clamp_(0, 1)


def shift_hue(image_N3SS: Tensor, turns_N11: Tensor) -> Tensor:
    """Rotate the hue of RGB images in [0, 1] by a share of the colour circle; value and saturation stay."""
    red, green, blue = image_N3SS.unbind(dim=1)
    # Twice as fast as aminmax, which reduces over a strided dimension.
    top = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = top - low
    sixth = torch.where(
        top == red, green - blue, torch.where(top == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    )
    sixth /= torch.where(chroma > 0, chroma, 1)  # gray has no hue; any value will do
    sixth = (sixth + 6 * turns_N11).remainder_(6)
    # Around the circle, a channel is full for two sixths, empty for two, and linear in between.
    share = (
        (sixth - 3).abs_().sub_(1).clamp_(0, 1),
        (sixth - 2).abs_().neg_().add_(2).clamp_(0, 1),
        (sixth - 4).abs_().neg_().add_(2).clamp_(0, 1),
    )
    return torch.stack([torch.addcmul(low, chroma, channel) for channel in share], dim=1)


def gaussian_blur(image_N3SS: Tensor, sigma_N: Tensor) -> Tensor:
    """Gaussian blur with one standard deviation (pixels) per image, reflecting at the edges."""
    size = image_N3SS.shape[-1]
    taps = min(_BLUR_TAPS, 2 * ((size - 1) // 2) + 1)
    offset = torch.arange(taps, device=sigma_N.device) - taps // 2
    kernel_NT = torch.exp(-0.5 * (offset / sigma_N[:, None]) ** 2)
    kernel_NT = kernel_NT / kernel_NT.sum(dim=1, keepdim=True)
    weight = kernel_NT.repeat_interleave(3, dim=0)[:, None]
    channels = image_N3SS.reshape(1, -1, size, size)
    padded = F.pad(channels, [taps // 2] * 4, mode="reflect")
    blurred = F.conv2d(padded, weight[:, :, :, None], groups=len(weight))
    return F.conv2d(blurred, weight[:, :, None, :], groups=len(weight)).view_as(image_N3SS)
