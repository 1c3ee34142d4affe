"""Augmentation in fine-tuning, in addition to cropping and flipping: timm's RandAugment in the loader's processes, and
timm's random erasing, mixup and CutMix on the device.

timm draws from global generators. Here the draws for an image depend on (seed, epoch, sample), and those for a batch on
its step, so that results do not depend on the number of processes and a resumed run repeats them.

Shapes: B images of S x S pixels.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional as F

from mimref.data.transforms import PerChannel
from mimref.devices import send
from mimref.draws import Operation, global_generators, seeded, seeds
from mimref.transfer.finetune.config import AugmentConfig

# timm has no annotations for these.
_POSTERIZE: Any = posterize
_RANDOM_ERASING: Any = RandomErasing
_CUTMIX_BOX: Any = cutmix_bbox_and_lam


@dataclass(frozen=True)
class RandAugment:
    """timm's RandAugment, applied to crops."""

    text: str
    """timm's configuration string, such as `rand-m9-mstd0.5-inc1`."""
    seed: int
    mean: PerChannel
    """Fill colour, from 0 to 1, of pixels that shears, shifts and rotations uncover."""

    @cached_property
    def _change(self) -> Any:
        fill = tuple(min(255, round(255 * channel)) for channel in self.mean)
        found: Any = rand_augment_transform(self.text, {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC})
        for operation in found.ops:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
        return found

    def __call__(self, crop: Tensor, epoch: int, sample: int) -> Tensor:
        """Return the augmented copy of a uint8 (3, S, S) crop of this sample in this epoch."""
        image = Image.fromarray(crop.permute(1, 2, 0).numpy())
        with seeded(self.seed, epoch, Operation.RAND_AUGMENT, sample):
            changed = self._change(image)
        return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Posterize like timm, also to 0 bits: the largest magnitude keeps no bits, which newer Pillow rejects."""
    kept: Image.Image = _POSTERIZE(image, bits, **options) if bits else Image.new(image.mode, image.size)
    return kept


class Erasing:
    """timm's random erasing: fills one rectangle per image with noise, after normalisation."""

    def __init__(self, probability: float, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.erase: Any = _RANDOM_ERASING(probability, mode="pixel", max_count=1, device=str(device))

    def __call__(self, images: Tensor, epoch: int, sample_B: Tensor) -> None:
        """Erase rectangles in place."""
        if not self.erase.probability:
            return
        for image, number in zip(images, seeds(self.seed, epoch, Operation.ERASE, sample_B), strict=True):
            # timm's first draw decides whether it erases; seeding its generators for every image would take longer.
            if random.Random(number).random() > self.erase.probability:
                continue
            with global_generators(number):
                torch.manual_seed(number)  # for the noise
                self.erase(image)


@dataclass(frozen=True)
class Mixed:
    """A batch whose images are mixed with their partners."""

    images: Tensor
    share: float
    """Weight of an image's own label; the rest is the weight of its partner's."""
    partner_B: Tensor
    """Row of each image's partner in the batch, on the device."""

    def loss(self, logits_BC: Tensor, label_B: Tensor, partner_label_B: Tensor, smoothing: float) -> Tensor:
        """Return the cross-entropy with mixed and smoothed labels, summed over some images, in at least fp32."""
        logits_BC = logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
        own = F.cross_entropy(logits_BC, label_B, label_smoothing=smoothing, reduction="sum")
        if self.share == 1:
            return own
        other = F.cross_entropy(logits_BC, partner_label_B, label_smoothing=smoothing, reduction="sum")
        return self.share * own + (1 - self.share) * other


def partners(places: Sequence[int]) -> Tensor:
    """Return the rows of the images at places 1, 0, 3, 2, 5, ... of a batch; an image without a partner gets its own.

    Partners are neighbours in the batch, so that it can be divided among processes. timm pairs the batch with its
    reverse; as the order of the batch is random, both have the same distribution.
    """
    row_of = {place: row for row, place in enumerate(places)}
    return torch.tensor([row_of.get(place ^ 1, row) for row, place in enumerate(places)], dtype=torch.int64)


def mix(images: Tensor, places: Sequence[int], config: AugmentConfig, seed: int, epoch: int, step: int) -> Mixed:
    """Mix the images (B, 3, S, S) of a batch with their partners by mixup or CutMix, with one share for all.

    places: places of the images in the batch. An image whose partner could not be read stays as it is.
    """
    partner_B = send(partners(places), images.device)
    if not config.mixup and not config.cutmix:
        return Mixed(images, 1.0, partner_B)
    with seeded(seed, epoch, Operation.MIX, step):
        cut = bool(config.cutmix) and (not config.mixup or np.random.rand() < 0.5)
        alpha = config.cutmix if cut else config.mixup
        share = float(np.random.beta(alpha, alpha))
        if not cut:
            return Mixed(torch.lerp(images[partner_B], images, share), share, partner_B)
        (top, bottom, left, right), share = _CUTMIX_BOX(images.shape, share)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partner_B, :, top:bottom, left:right]
    return Mixed(mixed, float(share), partner_B)
