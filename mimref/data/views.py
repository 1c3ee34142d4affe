"""Multi-crop views: crops of fixed size that workers cut, and colour changes on the device.

A worker decodes an image once and cuts every view from it. Crop boxes follow torchvision's RandomResizedCrop. They are
drawn for a whole batch at once, and for an image's size in its file, even if it was decoded at a reduced size.

Flip, colour jitter, blur, grayscale, solarize and normalisation (BYOL, Table 10) then run batched on the device.
They match torchvision's operations up to its rounding to uint8. An operation runs only on the samples it was drawn for;
draws are made on the CPU, so that selecting samples needs no device sync.

Shapes: B images, V views of one group, S pixels per side, N boxes or views (images times views).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mimref.config.run import ViewsConfig
from mimref.data.decode import Decoded
from mimref.data.transforms import IMAGENET_MEAN, IMAGENET_STD, PerChannel, resize
from mimref.devices import send
from mimref.draws import Operation, uniform
from mimref.errors import ConfigError

_BLUR_TAPS = 23  # BYOL's kernel for 224 pixels; reaches 5.5 standard deviations of its widest blur
_GRAY = (0.2989, 0.587, 0.114)
_SOLARIZE_FROM = 128 / 255
_CROP_TRIES = 10
_REDUCTIONS = (8, 4, 2)
"""Factors by which libjpeg can reduce an image as it decodes it."""


@dataclass(frozen=True)
class CropGroup:
    """`count` views of one size, numbered from `first_view` on, drawn from the same ranges."""

    count: int
    size: int
    """Pixels per side of the finished crop."""
    scale: tuple[float, float]
    """Range of the crop's share of the image's area."""
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    first_view: int = 0


def multi_crop(config: ViewsConfig, image_size: int) -> list[CropGroup]:
    """Return the groups of the two global views and of the local views, if any."""
    aspect = config.aspect_ratio
    groups = [CropGroup(2, config.global_size or image_size, config.global_scale, aspect)]
    if config.local_views:
        groups.append(CropGroup(config.local_views, config.local_size, config.local_scale, aspect, first_view=2))
    return groups


def draw_boxes(
    group: CropGroup, view: int | Tensor, seed: int, epoch: int, sample_N: Tensor, size_N2: Tensor
) -> Tensor:
    """Draw crop boxes, (N, 4) int64: top, left, height, width.

    view: number of the view within the group, one for all or (N,) int64. size_N2: int64 heights and widths of the
    images. The first of ten draws of (area, aspect ratio) that fits wins; if none fits, the largest central crop within
    the aspect range is taken.
    """
    number = group.first_view + view
    shape = uniform(seed, epoch, Operation.CROP_SHAPE, sample_N, number, count=2 * _CROP_TRIES).double()
    height_N1, width_N1 = size_N2.double().split(1, dim=1)
    low, high = group.scale
    area_NT = height_N1 * width_N1 * (low + (high - low) * shape[:, :_CROP_TRIES])
    log_low, log_high = math.log(group.aspect_ratio[0]), math.log(group.aspect_ratio[1])
    ratio_NT = torch.exp(log_low + (log_high - log_low) * shape[:, _CROP_TRIES:])
    wide_NT, tall_NT = (area_NT * ratio_NT).sqrt().round(), (area_NT / ratio_NT).sqrt().round()
    fits_NT = (wide_NT > 0) & (wide_NT <= width_N1) & (tall_NT > 0) & (tall_NT <= height_N1)
    first_N1 = fits_NT.int().argmax(dim=1, keepdim=True)
    # The fallback: the whole image, cut to the nearest allowed aspect ratio (but never to nothing).
    whole_ratio = (width_N1 / height_N1).clamp(*group.aspect_ratio)
    fall_wide = (height_N1 * whole_ratio).round().clamp_min(1).minimum(width_N1)
    fall_tall = (width_N1 / whole_ratio).round().clamp_min(1).minimum(height_N1)
    any_N1 = fits_NT.any(dim=1, keepdim=True)
    wide = torch.where(any_N1, wide_NT.gather(1, first_N1), fall_wide)
    tall = torch.where(any_N1, tall_NT.gather(1, first_N1), fall_tall)
    place = uniform(seed, epoch, Operation.CROP_PLACE, sample_N, number, count=2).double()
    top = torch.where(any_N1, (place[:, :1] * (height_N1 - tall + 1)).floor(), ((height_N1 - tall) / 2).floor())
    left = torch.where(any_N1, (place[:, 1:] * (width_N1 - wide + 1)).floor(), ((width_N1 - wide) / 2).floor())
    return torch.cat([top, left, tall, wide], dim=1).long()


def reduction(groups: Sequence[CropGroup], seed: int, epoch: int, sample: int, height: int, width: int) -> int:
    """Return the factor by which an image may be reduced as it is decoded: 1, 2, 4 or 8.

    It is the largest factor at which both sides of every crop box still have at least the finished crop's pixels.
    """
    least = _REDUCTIONS[-1]
    if any(min(height, width) < least * group.size for group in groups):
        return 1  # the usual case, without the cost of drawing
    size_12 = torch.tensor([[height, width]])
    factor = _REDUCTIONS[0]
    for group in groups:
        view_V, sample_V = torch.arange(group.count), torch.tensor([sample]).expand(group.count)
        boxes_V4 = draw_boxes(group, view_V, seed, epoch, sample_V, size_12.expand(group.count, 2))
        factor = min(factor, int(boxes_V4[:, 2:].min()) // group.size)
        if factor < least:
            return 1
    return next(each for each in _REDUCTIONS if each <= factor)


def cut_group(
    images: Sequence[Decoded], group: CropGroup, seed: int, epoch: int, sample_B: Tensor, channels: int = 3
) -> Tensor:
    """Cut one group's views from B decoded images: (B, V, C, S, S) uint8, or float32 if any image is.

    Crops are resized bicubically with antialiasing, twice as fast if the channels of a pixel are together in memory.
    """
    decoded_B2 = torch.tensor([each.image.shape[1:] for each in images], dtype=torch.int64).view(-1, 2)
    views = group.count
    boxes_N4, size_N2 = _boxes([(each.height, each.width) for each in images], group, seed, epoch, sample_B)
    boxes_N4 = _scale_boxes(boxes_N4, size_N2, decoded_B2.repeat_interleave(views, dim=0))
    dtype = torch.float32 if any(each.image.is_floating_point() for each in images) else torch.uint8
    cut = torch.empty(len(images), views, channels, group.size, group.size, dtype=dtype)
    for number, (top, left, height, width) in enumerate(boxes_N4.tolist()):
        row, view = divmod(number, views)
        crop = images[row].image[:, top : top + height, left : left + width]
        cut[row, view] = resize(crop, [group.size, group.size])
    return cut


def view_windows(sizes: Sequence[tuple[int, int]], group: CropGroup, seed: int, epoch: int, sample_B: Tensor) -> Tensor:
    """Return the windows of `cut_group`'s crops on images of these sizes: (B, V, 2, 4), see `mimref.data.windows`."""
    boxes_N4, _ = _boxes(sizes, group, seed, epoch, sample_B)
    start_N2, length_N2 = boxes_N4.double().split(2, dim=1)
    windows_N24 = torch.stack([start_N2, length_N2 / group.size, start_N2, start_N2 + length_N2], dim=2)
    return windows_N24.view(len(sizes), group.count, 2, 4)


def _boxes(
    sizes: Sequence[tuple[int, int]], group: CropGroup, seed: int, epoch: int, sample_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw the boxes of all views, (N, 4), image by image; returns them and the images' sizes, (N, 2)."""
    views = group.count
    view_N = torch.arange(views).repeat(len(sizes))
    size_N2 = torch.tensor(sizes, dtype=torch.int64).view(-1, 2).repeat_interleave(views, dim=0)
    return draw_boxes(group, view_N, seed, epoch, sample_B.repeat_interleave(views), size_N2), size_N2


def _scale_boxes(boxes_N4: Tensor, size_N2: Tensor, decoded_N2: Tensor) -> Tensor:
    """Scale boxes to images of another size: each edge moves to the nearest border between pixels.

    Computed in integers, with halves rounded up: a box of at least f x n pixels keeps at least n after reduction by f.
    """
    start_N2, length_N2 = boxes_N4.split(2, dim=1)
    edges = (start_N2, start_N2 + length_N2)
    first_N2, end_N2 = ((2 * edge_N2 * decoded_N2 + size_N2) // (2 * size_N2) for edge_N2 in edges)
    return torch.cat([first_N2, end_N2 - first_N2], dim=1)


# --- on the device


class Photometric:
    """Turn crops into normalised float views, with separate colour changes for every sample.

    Images with three channels are treated as colour. In others, only brightness and contrast change (see
    `check_colors`), by one factor for all channels; contrast changes around each channel's own mean.
    mean, std: of each channel, for pixels in 0..1.
    """

    def __init__(
        self,
        config: ViewsConfig,
        seed: int,
        device: torch.device,
        mean: PerChannel = IMAGENET_MEAN,
        std: PerChannel = IMAGENET_STD,
    ) -> None:
        self.config, self.seed, self.device = config, seed, device
        self._mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def __call__(self, crops: Tensor, epoch: int, sample_B: Tensor, views: Sequence[int]) -> Tensor:
        """Augment and normalise: crops (B, V, C, S, S), uint8 or float32 up to 255 -> (V, B, C, S, S) float32.

        sample_B: int64 on the CPU. views: the V view numbers; 0 and 1 are global, all others local.
        """
        batch, count = crops.shape[:2]
        # A new tensor, which everything below changes in place.
        pixels_NCSS = crops.to(self.device, non_blocking=True).transpose(0, 1).flatten(0, 1)
        image_NCSS = pixels_NCSS.to(torch.float32, copy=True).div_(255)
        sample_N = sample_B.repeat(count)
        view_N = torch.tensor(views).repeat_interleave(batch)

        def draw(operation: Operation, numbers: int = 1) -> Tensor:
            return uniform(self.seed, epoch, operation, sample_N, view_N, count=numbers)

        self._change(image_NCSS, draw(Operation.FLIP)[:, 0] < self.config.flip, lambda part, _: part.flip(-1))
        if self.config.color:
            self._jitter(image_NCSS, draw(Operation.JITTER, 9))
        if self.config.blur:
            self._blur(image_NCSS, draw(Operation.BLUR, 2), view_N)
        if self.config.color:
            gray_N = draw(Operation.GRAY)[:, 0] < self.config.gray_probability
            self._change(image_NCSS, gray_N, lambda part, _: _luminance(part).expand_as(part))
            self._solarize(image_NCSS, draw(Operation.SOLARIZE), view_N)
        normalised: Tensor = image_NCSS.sub_(self._mean).div_(self._std).unflatten(0, (count, batch))
        return normalised

    def _change(self, image: Tensor, chosen_N: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replace the chosen images by `change(copies, rows)`, which may overwrite its copies."""
        rows = chosen_N.nonzero().flatten()
        if len(rows):
            rows = send(rows, self.device)
            image.index_copy_(0, rows, change(image.index_select(0, rows), rows))

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
        chosen = draw[:, 0] < _by_view(self.config.blur_probability, view_N)
        self._change(image, chosen, lambda part, rows: gaussian_blur(part, sigma[rows]))

    def _solarize(self, image: Tensor, draw: Tensor, view_N: Tensor) -> None:
        chosen = draw[:, 0] < _by_view(self.config.solarize_probability, view_N)
        self._change(image, chosen, lambda part, _: torch.where(part >= _SOLARIZE_FROM, 1 - part, part))


def colors_beyond(views: ViewsConfig) -> dict[str, float | tuple[float, ...]]:
    """Return the settings of views that need colour and are not off, with the values that turn them off."""
    if not views.color:
        return {}
    changed: dict[str, float | tuple[float, ...]] = {
        "jitter": (*views.jitter[:2], 0.0, 0.0),
        "gray_probability": 0.0,
        "solarize_probability": (0.0, 0.0, 0.0),
    }
    return {name: value for name, value in changed.items() if getattr(views, name) != value}


def check_colors(views: ViewsConfig, channels: int) -> None:
    """Raise ConfigError for views that change the colours of images without colour."""
    wrong = colors_beyond(views) if channels != 3 else {}
    if wrong:
        name, value = next(iter(wrong.items()))
        shown = ",".join(f"{each:g}" for each in (value if isinstance(value, tuple) else (value,)))
        raise ConfigError(
            f"views.{name} needs colour, but images have {channels} channel{'s' if channels > 1 else ''}; "
            f"--set views.{name}={shown}"
        )


def _by_view(values: tuple[float, float, float], view_N: Tensor) -> Tensor:
    """Return a value for every view, chosen from those for view 0, view 1 and all local views."""
    return torch.tensor(values)[view_N.clamp_max(2)]


def _luminance(image: Tensor) -> Tensor:
    red, green, blue = image.unbind(dim=1)
    return (_GRAY[0] * red).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2]).unsqueeze(1)


def _adjust(image: Tensor, rows: Tensor, *, operation: int, factor_N4111: Tensor) -> Tensor:
    """Change brightness (0), contrast (1), saturation (2) or hue (3) of images in [0, 1], which may be overwritten."""
    factor = factor_N4111[rows, operation]
    if operation == 3:
        return shift_hue(image, factor.squeeze(-1))
    if operation == 0:
        return image.mul_(factor).clamp_(0, 1)
    if operation == 1 and image.shape[1] != 3:
        base = image.mean(dim=(2, 3), keepdim=True)
    else:
        base = _luminance(image)
        base = base.mean(dim=(1, 2, 3), keepdim=True) if operation == 1 else base
    return torch.lerp(base, image, factor).clamp_(0, 1)


def shift_hue(image_N3SS: Tensor, turns_N11: Tensor) -> Tensor:
    """Rotate the hue of RGB images in [0, 1] by a share of the colour circle; value and saturation stay."""
    red, green, blue = image_N3SS.unbind(dim=1)
    # Twice as fast as aminmax, which reduces over a strided dimension.
    top = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = top - low
    sixth = torch.where(top == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    sixth = torch.where(top == red, green - blue, sixth)
    sixth /= torch.where(chroma > 0, chroma, 1)  # gray has no hue; any value will do
    sixth = (sixth + 6 * turns_N11).remainder_(6)
    # Around the circle, a channel is full for two sixths, empty for two, and linear in between.
    share = (
        (sixth - 3).abs_().sub_(1).clamp_(0, 1),
        (sixth - 2).abs_().neg_().add_(2).clamp_(0, 1),
        (sixth - 4).abs_().neg_().add_(2).clamp_(0, 1),
    )
    return torch.stack([torch.addcmul(low, chroma, channel) for channel in share], dim=1)


def gaussian_blur(image_NCSS: Tensor, sigma_N: Tensor) -> Tensor:
    """Apply Gaussian blur with one standard deviation (pixels) per image, reflecting at the edges."""
    size = image_NCSS.shape[-1]
    taps = min(_BLUR_TAPS, 2 * ((size - 1) // 2) + 1)
    offset = torch.arange(taps, device=sigma_N.device) - taps // 2
    kernel_NT = torch.exp(-0.5 * (offset / sigma_N[:, None]) ** 2)
    kernel_NT = kernel_NT / kernel_NT.sum(dim=1, keepdim=True)
    weight = kernel_NT.repeat_interleave(image_NCSS.shape[1], dim=0)[:, None]
    channels = image_NCSS.reshape(1, -1, size, size)
    padded = F.pad(channels, [taps // 2] * 4, mode="reflect")
    blurred = F.conv2d(padded, weight[:, :, :, None], groups=len(weight))
    return F.conv2d(blurred, weight[:, :, None, :], groups=len(weight)).view_as(image_NCSS)
