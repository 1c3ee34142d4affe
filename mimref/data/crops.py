"""Evaluation crops of a data set, batch by batch in data order."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mimref.data.decode import BadImage
from mimref.data.loader import ignore_signals
from mimref.data.sources import FetchedSource, ImageSource
from mimref.data.transforms import EvalTransform
from mimref.data.workers import Reading, watched


class CropBatch(NamedTuple):
    """Crops of some consecutive images of a data set."""

    end: int
    """Position in the data set after the last image of the batch."""
    crops: Tensor
    """(B, 3, S, S) uint8, of the images that could be read."""
    indices: list[int]
    """Their positions in the data set."""
    bad: list[tuple[str, str]]
    """Path and reason of the others."""


class _CroppedImages(Dataset[CropBatch]):
    """Batches are the items, so that nothing is left to collate."""

    def __init__(
        self, source: ImageSource, transform: EvalTransform, batch_size: int, start: int, every: int, workers: int
    ) -> None:
        self.source, self.transform, self.batch_size = source, transform, batch_size
        self.reading = Reading(source, workers)
        self.starts = range(start, len(source), every * batch_size)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, batch: int) -> CropBatch:
        crops, kept, bad = [], [], []
        start = self.starts[batch]
        end = min(len(self.source), start + self.batch_size)
        if isinstance(self.source, FetchedSource):
            self.source.fetch(range(start, end))
        for index in range(start, end):
            self.reading.note(index)
            try:
                crops.append(self.transform.crop(self.source.read(index)))
                kept.append(index)
            except BadImage as error:
                bad.append((error.path, error.reason))
        size = self.transform.image_size
        stacked = torch.stack(crops) if crops else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return CropBatch(end, stacked, kept, bad)


def crop_batches(
    source: ImageSource,
    transform: EvalTransform,
    *,
    batch_size: int,
    workers: int = 0,
    start: int = 0,
    every: int = 1,
) -> Iterator[CropBatch]:
    """The evaluation crops of all images from position `start` on; those that cannot be read are named instead.

    every: of so many batches only the first, where other processes take the rest.
    Raises DeadWorkerError when a loader process dies.
    """
    dataset = _CroppedImages(source, transform, batch_size, start, every, workers)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=ignore_signals)
    return watched(loader, dataset.reading)
