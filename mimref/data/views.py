"""Multi-crop views: which crops an image gives, and cutting them to fixed-size uint8.

A worker decodes an image once and cuts every view from it; colours come later, batched on the device
(`mimref.data.photometric`). Crop boxes follow torchvision's RandomResizedCrop, drawn for a whole batch at once.

Shapes: B images, V views of one group, S pixels per side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from mimref.config import ViewsConfig
from mimref.draws import Operation, uniform

_CROP_TRIES = 10


@dataclass(frozen=True)
class CropGroup:
    """Views of one size: `count` crops, numbered from `first_view` on, drawn from the same ranges."""

    count: int
    size: int
    """Pixels per side of the finished crop."""
    scale: tuple[float, float]
    """Range of the crop's share of the image's area."""
    aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    first_view: int = 0


def multi_crop(config: ViewsConfig, image_size: int) -> list[CropGroup]:
    """The two global views and, unless there are none, the local views."""
    groups = [CropGroup(2, config.global_size or image_size, config.global_scale, config.aspect_ratio)]
    if config.local_views:
        groups.append(
            CropGroup(config.local_views, config.local_size, config.local_scale, config.aspect_ratio, first_view=2)
        )
    return groups


def draw_boxes(group: CropGroup, view: int, seed: int, epoch: int, sample_B: Tensor, size_B2: Tensor) -> Tensor:
    """Crop boxes (B, 4) int64 as top, left, height, width.

    view: number of the view within the group. size_B2: int64 heights and widths of the images. The first of ten draws
    of (area, aspect ratio) that fits wins; if none fits, the largest central crop within the aspect range is taken.
    """
    number = group.first_view + view
    shape = uniform(seed, epoch, Operation.CROP_SHAPE, sample_B, number, count=2 * _CROP_TRIES).double()
    height_B1, width_B1 = size_B2.double().split(1, dim=1)
    low, high = group.scale
    area_BT = height_B1 * width_B1 * (low + (high - low) * shape[:, :_CROP_TRIES])
    log_low, log_high = math.log(group.aspect_ratio[0]), math.log(group.aspect_ratio[1])
    ratio_BT = torch.exp(log_low + (log_high - log_low) * shape[:, _CROP_TRIES:])
    wide_BT, tall_BT = (area_BT * ratio_BT).sqrt().round(), (area_BT / ratio_BT).sqrt().round()
    fits_BT = (wide_BT > 0) & (wide_BT <= width_B1) & (tall_BT > 0) & (tall_BT <= height_B1)
    first_B1 = fits_BT.int().argmax(dim=1, keepdim=True)
    # The fallback: the whole image, cut to the nearest allowed aspect ratio (but never to nothing).
    whole_ratio = (width_B1 / height_B1).clamp(*group.aspect_ratio)
    fall_wide = (height_B1 * whole_ratio).round().clamp_min(1).minimum(width_B1)
    fall_tall = (width_B1 / whole_ratio).round().clamp_min(1).minimum(height_B1)
    any_B1 = fits_BT.any(dim=1, keepdim=True)
    wide = torch.where(any_B1, wide_BT.gather(1, first_B1), fall_wide)
    tall = torch.where(any_B1, tall_BT.gather(1, first_B1), fall_tall)
    place = uniform(seed, epoch, Operation.CROP_PLACE, sample_B, number, count=2).double()
    top = torch.where(any_B1, (place[:, :1] * (height_B1 - tall + 1)).floor(), ((height_B1 - tall) / 2).floor())
    left = torch.where(any_B1, (place[:, 1:] * (width_B1 - wide + 1)).floor(), ((width_B1 - wide) / 2).floor())
    return torch.cat([top, left, tall, wide], dim=1).long()


def cut_group(images: Sequence[Tensor], group: CropGroup, seed: int, epoch: int, sample_B: Tensor) -> Tensor:
    """Cut one group's views from decoded images: (B, V, 3, S, S) uint8.

    images: B tensors of (3, height, width) uint8, faster with channels last in memory. Crops are resized bicubically
    with antialiasing.
    """
    size_B2 = torch.tensor([image.shape[1:] for image in images])
    cut = torch.empty(len(images), group.count, 3, group.size, group.size, dtype=torch.uint8)
    for view in range(group.count):
        boxes = draw_boxes(group, view, seed, epoch, sample_B, size_B2).tolist()
        for row, (image, (top, left, height, width)) in enumerate(zip(images, boxes, strict=True)):
            crop = image[:, top : top + height, left : left + width]
            cut[row, view] = tvf.resize_image(crop, [group.size, group.size], InterpolationMode.BICUBIC, antialias=True)
    return cut
