"""Batches of images with a class for every pixel: random crops for training, and whole images for testing.

A training image is resized by a random factor, which keeps its aspect ratio, then cropped, flipped and padded, as in
mmsegmentation. All draws are functions of (seed, epoch, image).

Shapes: B images, S pixels per side of a crop.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from mimref.data.loader import epoch_batches
from mimref.data.masks.sources import UNLABELLED, Pairs
from mimref.data.workers import BatchDataset, load
from mimref.draws import Operation, uniform
from mimref.transfer.segment.config import CropsConfig, TestMode

_CROP_TRIES = 10


def resize(image: Tensor, mask: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Resize an image (3, H, W) bicubically with antialiasing, and its classes (H, W) by nearest neighbour."""
    resized = tvf.resize(image, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return resized, nearest(mask, height, width)


def nearest(mask_HW: Tensor, height: int, width: int) -> Tensor:
    """Resize classes by taking those at the nearest pixel centre; exact for any dtype."""
    rows, columns = (
        ((torch.arange(new, dtype=torch.float64) + 0.5) * (old / new)).long()
        for old, new in zip(mask_HW.shape, (height, width), strict=True)
    )
    return mask_HW[rows][:, columns]


# --- training crops


def resized_size(height: int, width: int, size: int, crops: CropsConfig, draw: float) -> tuple[int, int]:
    """Return height and width after the random resize. draw: in [0, 1)."""
    low, high = crops.scale
    ratio = low + (high - low) * draw
    longest, shortest = crops.longest * size * ratio, size * ratio
    factor = min(longest / max(height, width), shortest / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def crop_box(mask_HW: Tensor, size: int, most: float, draw_2T: Tensor) -> tuple[int, int]:
    """Return top and left of the first of 10 crops in which every class has a share below `most`, else of the eleventh.

    draw_2T: numbers in [0, 1), one row for the tops and one for the lefts. Crops with a single class or without labels
    are drawn again as well.
    """
    top_T, left_T = (
        (draw_T.double() * (max(length - size, 0) + 1)).long().tolist()
        for draw_T, length in zip(draw_2T, mask_HW.shape, strict=True)
    )
    for top, left in zip(top_T[:-1], left_T[:-1], strict=True):
        crop = mask_HW[top : top + size, left : left + size]
        counts = torch.bincount(crop[crop >= 0].flatten().long())
        if counts.count_nonzero() > 1 and counts.max() < most * counts.sum():
            return top, left
    return top_T[-1], left_T[-1]


class Crop(NamedTuple):
    """A training crop, padded at its lower and right edges."""

    image: Tensor
    """uint8 (3, S, S)."""
    mask: Tensor
    """int16 (S, S); `UNLABELLED` in the padding."""
    height: int
    """Height without padding."""
    width: int
    """Width without padding."""


def training_crop(
    image: Tensor, mask: Tensor, size: int, crops: CropsConfig, seed: int, epoch: int, sample: int
) -> Crop:
    """Resize, crop, flip and pad one image at random, as a function of (seed, epoch, sample)."""

    def draw(operation: Operation, count: int = 1) -> Tensor:
        return uniform(seed, epoch, operation, torch.tensor([sample]), count=count)[0]

    height, width = resized_size(mask.shape[0], mask.shape[1], size, crops, float(draw(Operation.CROP_SHAPE)))
    image, mask = resize(image, mask, height, width)
    places_2T = draw(Operation.CROP_PLACE, 2 * (_CROP_TRIES + 1)).view(2, -1)
    top, left = crop_box(mask, size, crops.most_of_one_class, places_2T)
    image, mask = (each[..., top : top + size, left : left + size] for each in (image, mask))
    if float(draw(Operation.FLIP)) < crops.flip:
        image, mask = image.flip(-1), mask.flip(-1)
    height, width = mask.shape
    padded, labels = torch.zeros(3, size, size, dtype=torch.uint8), torch.full((size, size), UNLABELLED).short()
    padded[:, :height, :width], labels[:height, :width] = image, mask
    return Crop(padded, labels, height, width)


@dataclass
class CropBatch:
    """Training crops of B images. Unreadable images are left out."""

    epoch: int
    sample_B: Tensor
    """Sample indices, int64."""
    images: Tensor
    """uint8 (B, 3, S, S)."""
    masks: Tensor
    """int16 (B, S, S)."""
    sizes: list[tuple[int, int]]
    """Height and width of every crop without padding."""
    bad: list[tuple[str, str]]
    """Path and reason of every image that could not be read."""
    traits: list[int]
    """Traits of the readable images, see `mimref.data.traits`."""

    def pin_memory(self) -> "CropBatch":
        """The same batch in page-locked memory."""
        return replace(self, images=self.images.pin_memory(), masks=self.masks.pin_memory())


class _CropDataset(BatchDataset[CropBatch]):
    def __init__(self, pairs: Pairs, size: int, crops: CropsConfig, seed: int) -> None:
        super().__init__(pairs.images)
        self.pairs, self.size, self.crops, self.seed = pairs, size, crops, seed

    def __getitem__(self, batch: tuple[int, list[int]]) -> CropBatch:
        epoch, indices = batch

        def cut(index: int) -> tuple[Crop, int]:
            decoded, mask = self.pairs.read(index)
            image = decoded.image.contiguous()
            return training_crop(image, mask, self.size, self.crops, self.seed, epoch, index), decoded.traits

        read, good, bad = self.read(indices, cut)
        cuts = [crop for crop, _ in read]
        empty = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        images = torch.stack([each.image for each in cuts]) if cuts else empty
        masks = torch.stack([each.mask for each in cuts]) if cuts else empty[:, 0].short()
        sizes = [(each.height, each.width) for each in cuts]
        traits = [each for _, each in read]
        return CropBatch(epoch, torch.tensor(good, dtype=torch.int64), images, masks, sizes, bad, traits)


def crop_batches(
    pairs: Pairs,
    size: int,
    crops: CropsConfig,
    *,
    batch_size: int,
    seed: int,
    epochs: range,
    skip: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[CropBatch]:
    """Yield shuffled batches of random crops for all `epochs`; the last partial batch of an epoch is dropped.

    skip: batches of the first epoch that are already done. The batches are the same for every number of workers.
    """
    batches = epoch_batches(len(pairs), batch_size, seed, epochs=epochs, skip=skip, every=1, part=slice(None))
    for batch in load(_CropDataset(pairs, size, crops, seed), batches, workers=workers, pin_memory=pin_memory):
        pairs.images.record(batch.sample_B.tolist(), batch.traits)
        yield batch


# --- test images


class View(NamedTuple):
    """An image as passed to the heads, and its classes, whose size may differ."""

    number: int
    """Position in the data set."""
    image: Tensor
    """uint8 (3, H, W)."""
    mask: Tensor
    """int16 (H', W')."""
    traits: int = 0
    """See `mimref.data.traits`."""


class Views(NamedTuple):
    """Some consecutive images of a data set, except unreadable ones."""

    images: list[View]
    bad: list[tuple[str, str]]
    """Path and reason of every image that could not be read."""


def view_of(index: int, image: Tensor, mask: Tensor, size: int, mode: TestMode) -> View:
    """Return an image as it is tested, see `SegmentConfig.test`."""
    if mode == "full":
        return View(index, image, mask)
    height, width = shorter_side_to(mask.shape[0], mask.shape[1], size)
    resized, labels = resize(image, mask, height, width)
    if mode == "slide":
        return View(index, resized, mask)
    top, left = round((height - size) / 2), round((width - size) / 2)
    middle = (slice(top, top + size), slice(left, left + size))
    return View(index, resized[:, *middle].contiguous(), labels[middle].contiguous())


def shorter_side_to(height: int, width: int, size: int) -> tuple[int, int]:
    """Return height and width for a shorter side of `size`; the longer one is rounded down, as torchvision does."""
    if height <= width:
        return size, max(size, int(size * width / height))
    return max(size, int(size * height / width)), size


class _ViewDataset(BatchDataset[Views]):
    def __init__(self, pairs: Pairs, size: int, mode: TestMode) -> None:
        super().__init__(pairs.images)
        self.pairs, self.size, self.mode = pairs, size, mode

    def __getitem__(self, batch: range) -> Views:
        images, _, bad = self.read(batch, self._view)
        return Views(images, bad)

    def _view(self, index: int) -> View:
        decoded, mask = self.pairs.read(index)
        view = view_of(index, decoded.image.contiguous(), mask, self.size, self.mode)
        return view._replace(traits=decoded.traits)


def view_batches(pairs: Pairs, size: int, mode: TestMode, *, batch_size: int, workers: int = 0) -> Iterator[Views]:
    """Yield all images in data order, as they are tested."""
    at_once = batch_size if mode == "crop" else 1
    batches = [range(at, min(len(pairs), at + at_once)) for at in range(0, len(pairs), at_once)]
    for views in load(_ViewDataset(pairs, size, mode), batches, workers=workers):
        pairs.images.record([view.number for view in views.images], [view.traits for view in views.images])
        yield views
