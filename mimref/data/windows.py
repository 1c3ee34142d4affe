"""Crops resized on a device: each takes two matrix products, one across and one down.

The weights are those of torch's bicubic resize with antialiasing. After each product, values are rounded to whole
levels and clipped to 0..255, as in torch's resize of uint8 on the CPU; results differ from it by at most a level or
two.

A window (first, step, low, high) maps the pixels of one axis of an image to those of a crop. Output pixel i is centred
at `first + step * (i + 0.5)`, where pixel j of the image covers j to j + 1. Only the image's pixels low..high - 1
contribute.

Shapes: J images, V crops of each, S pixels per side of a crop, H, W of the largest image, P crops in all (J x V).
"""

import torch
from torch import Tensor

_SHARPNESS = -0.5
"""Parameter a of the cubic kernel with antialiasing (as in Pillow)."""


def resize_windows(image_J3HW: Tensor, windows_JV24: Tensor, size: int) -> Tensor:
    """Cut crops (J, V, 3, S, S) uint8 from float32 images in 0..255, which may be padded at the right and the bottom.

    windows_JV24: windows of every crop, down (0) and across (1), float64 on the CPU.
    """
    images, channels, height, width = image_J3HW.shape
    count = windows_JV24.shape[1]
    down_PSH, across_PSW = (
        window_weights(windows_JV24[:, :, axis].flatten(0, 1), size, length, image_J3HW.device)
        for axis, length in enumerate((height, width))
    )
    # Across first, as in Pillow.
    across_JWX = across_PSW.view(images, count * size, width).transpose(1, 2)
    rows = torch.bmm(image_J3HW.flatten(1, 2), across_JWX).round_().clamp_(0, 255)
    rows_JVH3S = rows.view(images, channels, height, count, size).permute(0, 3, 2, 1, 4)
    crops = torch.bmm(down_PSH, rows_JVH3S.reshape(images * count, height, channels * size)).round_().clamp_(0, 255)
    return crops.to(torch.uint8).view(images, count, size, channels, size).transpose(2, 3)


def window_weights(windows_P4: Tensor, size: int, length: int, device: torch.device) -> Tensor:
    """Return the weights of an axis's pixels for each of S output pixels, (P, S, length) float32, on the device."""
    first_P1, step_P1, low_P1, high_P1 = windows_P4.split(1, dim=1)
    centre_PS = first_P1 + step_P1 * (torch.arange(size, dtype=torch.float64) + 0.5)
    # Whole and fractional parts are separate: in large images, float32 would be off by a thousandth of a pixel.
    whole_PS = centre_PS.floor()
    fraction_PS1 = (centre_PS - whole_PS - 0.5).float()[:, :, None].to(device)
    # Antialiasing: when shrinking, the kernel widens with the span that an output pixel covers.
    scale_P11 = step_P1.clamp_min(1).float()[:, :, None].to(device)
    whole_PS1, low_P11, high_P11 = (each.int()[:, :, None].to(device) for each in (whole_PS, low_P1, high_P1))
    pixel_L = torch.arange(length, dtype=torch.int32, device=device)
    distance_PSL = (pixel_L - whole_PS1).float().sub_(fraction_PS1).div_(scale_P11).abs_()
    weight_PSL = _cubic(distance_PSL).mul_((pixel_L >= low_P11) & (pixel_L < high_P11))
    return weight_PSL.div_(weight_PSL.sum(dim=2, keepdim=True))


def _cubic(distance: Tensor) -> Tensor:
    """Return the kernel of Keys's cubic convolution, 0 from a distance of 2 on (Keys 1981, Eq. 15)."""
    a = _SHARPNESS
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return torch.where(distance < 1, near, far).masked_fill_(distance >= 2, 0)
