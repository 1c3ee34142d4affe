"""mmsegmentation's photometric distortion on the device, drawn independently for every image.

It changes brightness (by up to 32 of 255), contrast and saturation (by factors from 0.5 to 1.5) and hue (by up to a
tenth of the colour circle), each with probability 0.5; contrast comes before or after saturation and hue at random.
"""

import torch
from torch import Tensor

from mimref.data.views import shift_hue
from mimref.devices import send
from mimref.draws import Operation, uniform

_BRIGHTNESS = 32 / 255
_FACTORS = (0.5, 1.5)
_HUE = 18 / 180
_DRAWS = 9


def distort(image_B3SS: Tensor, seed: int, epoch: int, sample_B: Tensor) -> Tensor:
    """Return distorted copies of float images in [0, 1]. sample_B: sample indices, int64 on the CPU."""
    draw_BN = uniform(seed, epoch, Operation.JITTER, sample_B, count=_DRAWS)
    chosen_B4 = draw_BN[:, :4] < 0.5
    low, high = _FACTORS
    shift_B = torch.where(chosen_B4[:, 0], _BRIGHTNESS * (2 * draw_BN[:, 4] - 1), 0)
    contrast_B, saturation_B = (torch.where(chosen_B4[:, n], low + (high - low) * draw_BN[:, 4 + n], 1) for n in (1, 2))
    turns_B = torch.where(chosen_B4[:, 3], _HUE * (2 * draw_BN[:, 7] - 1), 0)
    early_B = draw_BN[:, 8] < 0.5
    one = torch.ones(())

    def each(values_B: Tensor) -> Tensor:
        return send(values_B.to(image_B3SS.dtype), image_B3SS.device).view(-1, 1, 1, 1)

    image = (image_B3SS + each(shift_B)).clamp_(0, 1)
    image = (image * each(torch.where(early_B, contrast_B, one))).clamp_(0, 1)
    image = saturate(image, each(saturation_B))
    # Where the hue does not change, keep the image as it is: a shift by 0 would round its values.
    image = torch.where(each(turns_B) != 0, shift_hue(image, each(turns_B).squeeze(-1)), image)
    return (image * each(torch.where(early_B, one, contrast_B))).clamp_(0, 1)


def saturate(image_B3SS: Tensor, factor_B111: Tensor) -> Tensor:
    """Multiply the HSV saturation of images in [0, 1], clipped at 1; hue and value stay the same."""
    top, low = image_B3SS.amax(1, keepdim=True), image_B3SS.amin(1, keepdim=True)
    chroma = top - low
    # With a factor of value / chroma, the saturation is 1.
    factor = torch.minimum(factor_B111, top / chroma.masked_fill(chroma <= 0, 1).clamp_min(1e-12))
    return top - (top - image_B3SS) * factor
