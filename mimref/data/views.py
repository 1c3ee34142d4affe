"""Multi-crop views: draw crop boxes, and cut crops of fixed size, uint8.

A worker decodes an image once and cuts every view from it; colours are changed later, batched on the device
(`mimref.data.photometric`). Crop boxes follow torchvision's RandomResizedCrop. They are drawn for a whole batch at
once, and for the size of an image in its file, even where it was decoded smaller.

Shapes: B images, V views of one group, S pixels per side, N boxes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from mimref.config.run import ViewsConfig
from mimref.draws import Operation, uniform

_CROP_TRIES = 10
_REDUCTIONS = (8, 4, 2)
"""Factors by which libjpeg can decode an image smaller."""


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
    """The groups of the two global views and of the local views, if any."""
    groups = [CropGroup(2, config.global_size or image_size, config.global_scale, config.aspect_ratio)]
    if config.local_views:
        groups.append(
            CropGroup(config.local_views, config.local_size, config.local_scale, config.aspect_ratio, first_view=2)
        )
    return groups


def draw_boxes(
    group: CropGroup, view: int | Tensor, seed: int, epoch: int, sample_N: Tensor, size_N2: Tensor
) -> Tensor:
    """Crop boxes (N, 4) int64 as top, left, height, width.

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
    """The factor by which an image may be decoded smaller: 1, 2, 4 or 8.

    It is the largest at which both sides of every crop still have at least the finished crop's pixels.
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
    images: Sequence[Tensor],
    group: CropGroup,
    seed: int,
    epoch: int,
    sample_B: Tensor,
    size_B2: Tensor | None = None,
) -> Tensor:
    """Cut one group's views from decoded images: (B, V, 3, S, S) uint8.

    images: B tensors of (3, height, width) uint8, faster with channels last in memory. size_B2: heights and widths in
    the files, for images that were decoded smaller; None: those of the tensors. Crops are resized bicubically with
    antialiasing.
    """
    decoded_B2 = torch.tensor([image.shape[1:] for image in images])
    size_B2 = decoded_B2 if size_B2 is None else size_B2
    views = group.count
    view_N = torch.arange(views).repeat(len(images))
    size_N2 = size_B2.repeat_interleave(views, dim=0)
    boxes_N4 = draw_boxes(group, view_N, seed, epoch, sample_B.repeat_interleave(views), size_N2)
    boxes_N4 = _scale_boxes(boxes_N4, size_N2, decoded_B2.repeat_interleave(views, dim=0))
    cut = torch.empty(len(images), views, 3, group.size, group.size, dtype=torch.uint8)
    for number, (top, left, height, width) in enumerate(boxes_N4.tolist()):
        row, view = divmod(number, views)
        crop = images[row][:, top : top + height, left : left + width]
        cut[row, view] = tvf.resize_image(crop, [group.size, group.size], InterpolationMode.BICUBIC, antialias=True)
    return cut


def _scale_boxes(boxes_N4: Tensor, size_N2: Tensor, decoded_N2: Tensor) -> Tensor:
    """The same boxes on images of another size: each edge goes to the nearest border between pixels.

    Computed in integers, with halves rounded up: a box of at least f x n pixels has at least n on an image reduced by
    f.
    """
    start_N2, length_N2 = boxes_N4.split(2, dim=1)
    first_N2, end_N2 = (
        (2 * edge_N2 * decoded_N2 + size_N2) // (2 * size_N2) for edge_N2 in (start_N2, start_N2 + length_N2)
    )
    return torch.cat([first_N2, end_N2 - first_N2], dim=1)
