"""Mosaics: small gray objects of known data sets on a textured ground, with a class for every pixel.

Objects of scikit-learn's digits or Fashion-MNIST lie in a grid of 2 x 2 cells. Their size and place are random, so some
overlap. Every number is drawn for (split, mosaic, cell), so mosaics are the same on every machine.
"""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from mimref.config.masks import MosaicsConfig
from mimref.data.masks.sources import ArrayMasks, Pairs
from mimref.data.sources import ArraySource, Split
from mimref.draws import Operation, uniform

SIDE = 2
"""Cells per side."""
SMALLEST_CELL = 16
_SIZES = (0.8, 1.2)
"""Range of an object's side, relative to the cell's."""
_INK = {"digits": 48, "fashion-mnist": 16}
"""Value above which an object's pixels cover the ground."""
_GROUND = 110
"""Brightest value of the ground's smooth part; that of the grain is a third of it."""
_WAVES = 6
"""Number of values per side from which the smooth part is interpolated."""


def make_mosaics(objects: ArraySource, split: Split, settings: MosaicsConfig) -> Pairs:
    """Make mosaics of labelled gray images (N, S, S). The classes are those of the images, then the ground."""
    assert objects.labels is not None and objects.class_names is not None
    count = settings.train if split == "train" else settings.val
    cell = max(SMALLEST_CELL, objects.images.shape[-1])
    side, ground = SIDE * cell, len(objects.class_names)
    canvas = np.empty((count, side, side), dtype=np.uint8)
    masks = np.empty((count, side, side), dtype=np.int16)
    for number in range(count):
        image, mask = _mosaic(objects, number, 0 if split == "train" else 1, cell, settings.filled)
        canvas[number], masks[number] = image.numpy(), mask.numpy()
    name = f"mosaics of {objects.name}"
    images = ArraySource(objects.name, canvas, None, None, f"{split} mosaic", np.arange(count))
    assert int(masks.max()) <= ground
    return Pairs(images, ArrayMasks(masks, f"{name}/{split}"), [*objects.class_names, "ground"], are_mosaics=True)


def _mosaic(objects: ArraySource, number: int, epoch: int, cell: int, filled: float) -> tuple[Tensor, Tensor]:
    """Make one mosaic: pixels and classes, (S, S) each. epoch: separates the draws of the splits."""
    assert objects.labels is not None and objects.class_names is not None
    side, cells = SIDE * cell, SIDE**2
    sample = torch.full((cells,), number)
    draw = uniform(0, epoch, Operation.MOSAIC, sample, torch.arange(cells), count=5).double()
    image = _ground(number, epoch, side)
    mask = torch.full((side, side), len(objects.class_names), dtype=torch.int16)
    for place in range(cells):
        present, which, size, down, right = draw[place].tolist()
        if present >= filled:
            continue
        row = int(which * len(objects.images))
        length = round(cell * (_SIZES[0] + (_SIZES[1] - _SIZES[0]) * size))
        pixels = torch.from_numpy(objects.images[row])[None]
        pixels = tvf.resize(pixels, [length, length], interpolation=InterpolationMode.BICUBIC, antialias=True)[0]
        # Up to an eighth of a cell away from the cell's middle, and within the mosaic.
        top, left = (
            int(min(max(at * cell + (cell - length) / 2 + (shift - 0.5) * cell / 4, 0), side - length))
            for at, shift in ((place // SIDE, down), (place % SIDE, right))
        )
        window = (slice(top, top + length), slice(left, left + length))
        covers = pixels > _INK[objects.name]
        image[window] = torch.where(covers, pixels, image[window])
        mask[window] = torch.where(covers, int(objects.labels[row]), mask[window])
    return image, mask


def _ground(number: int, epoch: int, side: int) -> Tensor:
    """Draw smooth waves and grain, uint8 (side, side)."""
    sample = torch.tensor([number])
    waves, grain = (
        uniform(0, epoch, Operation.MOSAIC, sample, SIDE**2 + part, count=count)[0]
        for part, count in enumerate((_WAVES**2, side**2))
    )
    smooth = torch.nn.functional.interpolate(
        waves.view(1, 1, _WAVES, _WAVES), size=(side, side), mode="bicubic", align_corners=False
    )[0, 0]
    values = _GROUND * smooth.clamp(0, 1) + _GROUND / 3 * grain.view(side, side)
    return values.round().to(torch.uint8)
