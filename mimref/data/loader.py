"""Batches of cropped views in an order that depends on (seed, epoch) alone."""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mimref.data.sources import BadImage, ImageSource
from mimref.data.views import CropGroup, cut_group
from mimref.draws import permutation
from mimref.errors import ConfigError

_Item = tuple[int, int]  # (epoch, sample index): workers outlive epochs, so the epoch travels with the sample


@dataclass
class ViewBatch:
    """Views of B images. Unreadable images are left out, so B may be smaller than the batch size."""

    epoch: int
    sample_B: Tensor
    """Sample indices, int64."""
    crops: list[Tensor]
    """One tensor (B, V, 3, S, S) uint8 for each crop group."""
    bad: list[tuple[str, str]]
    """Path and reason of every image of the batch that could not be read."""

    def pin_memory(self) -> "ViewBatch":
        """The same batch in page-locked memory. DataLoader looks for this method, and leaves objects without it be."""
        return ViewBatch(self.epoch, self.sample_B, [crops.pin_memory() for crops in self.crops], self.bad)


class _ViewDataset(Dataset[ViewBatch]):
    def __init__(self, source: ImageSource, groups: Sequence[CropGroup], seed: int) -> None:
        self.source, self.groups, self.seed = source, groups, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, items: list[_Item]) -> ViewBatch:
        epoch = items[0][0]
        images, kept, bad = [], [], []
        for _, index in items:
            try:
                image = self.source.read(index)
            except BadImage as error:
                bad.append((error.path, error.reason))
                continue
            # torch resizes bytes twice as fast when an image's channels lie together.
            images.append(image[None].contiguous(memory_format=torch.channels_last)[0])
            kept.append(index)
        sample_B = torch.tensor(kept, dtype=torch.int64)
        crops = [cut_group(images, group, self.seed, epoch, sample_B) for group in self.groups] if images else []
        return ViewBatch(epoch, sample_B, crops, bad)


class _EpochBatches(Sampler[list[_Item]]):
    """Shuffled full batches of one epoch after another, from any position on."""

    def __init__(self, size: int, batch_size: int, seed: int, *, first_epoch: int, last_epoch: int, skip: int) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.first_epoch, self.last_epoch, self.skip = first_epoch, last_epoch, skip

    def __iter__(self) -> Iterator[list[_Item]]:
        for epoch in range(self.first_epoch, self.last_epoch):
            order = permutation(self.seed, epoch, self.size).tolist()
            skip = self.skip if epoch == self.first_epoch else 0
            for batch in range(skip, self.size // self.batch_size):
                chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
                yield [(epoch, index) for index in chosen]


def view_batches(
    source: ImageSource,
    groups: Sequence[CropGroup],
    *,
    batch_size: int,
    seed: int,
    epochs: range,
    skip: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[ViewBatch]:
    """Batches of all `epochs`, one after another; the last partial batch of an epoch is dropped.

    skip: batches of the first epoch that are already done. The batches are the same for every number of workers.
    """
    batches = _EpochBatches(len(source), batch_size, seed, first_epoch=epochs.start, last_epoch=epochs.stop, skip=skip)
    loader = DataLoader(
        _ViewDataset(source, groups, seed),
        batch_sampler=batches,
        num_workers=workers,
        # The dataset returns whole batches; there is nothing left to collate.
        collate_fn=_whole_batch,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
    )
    return cast(Iterator[ViewBatch], iter(loader))


def check_batch_size(batch_size: int, images: int) -> None:
    """Raise ConfigError when an epoch has not one full batch."""
    if images < 2:
        raise ConfigError(f"there is only {images} training image; a batch needs two")
    if batch_size > images:
        raise ConfigError(
            f"batch_size {batch_size} is larger than the {images} training images; set --batch-size {images} or less"
        )


def ignore_signals(_worker: int) -> None:
    """Leave SIGTERM and Ctrl-C to the main process, which saves before it stops its workers (`worker_init_fn`).

    Batch systems and terminals signal the whole process group, and a run whose workers are gone cannot go on to save.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader_workers(requested: int | None, source: ImageSource) -> int:
    """Loader processes: as asked, else none for images in memory and one per core (at most 16) for files."""
    if requested is not None:
        return requested
    return 0 if source.in_memory else min(16, os.cpu_count() or 1)


def _whole_batch(batch: Any) -> Any:
    return batch
