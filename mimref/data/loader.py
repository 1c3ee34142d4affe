"""Batches of cropped views in an order that depends on (seed, epoch) alone."""

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mimref.data.decode import BadImage, Decoded
from mimref.data.sources import EncodedSource, FetchedSource, ImageSource
from mimref.data.views import CropGroup, cut_group, reduction
from mimref.data.workers import Reading, watched
from mimref.devices import own_cores
from mimref.distributed.group import own_rank, share, world_size
from mimref.draws import permutation
from mimref.errors import ConfigError

_Item = tuple[int, int]  # (epoch, sample index): workers outlive epochs, so the epoch travels with the sample
_T = TypeVar("_T")


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
    def __init__(
        self, source: ImageSource, groups: Sequence[CropGroup], seed: int, *, reduce_jpeg: bool, workers: int
    ) -> None:
        self.source, self.groups, self.seed, self.reduce_jpeg = source, groups, seed, reduce_jpeg
        self.reading = Reading(source, workers)

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, items: list[_Item]) -> ViewBatch:
        epoch = items[0][0]
        images, sizes, kept, bad = [], [], [], []
        if isinstance(self.source, FetchedSource):
            self.source.fetch([index for _, index in items])
        for _, index in items:
            self.reading.note(index)
            try:
                decoded = self._read(epoch, index)
            except BadImage as error:
                bad.append((error.path, error.reason))
                continue
            # torch resizes bytes twice as fast when an image's channels lie together.
            images.append(decoded.image[None].contiguous(memory_format=torch.channels_last)[0])
            sizes.append((decoded.height, decoded.width))
            kept.append(index)
        sample_B = torch.tensor(kept, dtype=torch.int64)
        if not images:
            # Another rank may have images, and then all go through the step together.
            sizes_SV = [(group.size, group.count) for group in self.groups]
            empty = [torch.empty(0, count, 3, size, size, dtype=torch.uint8) for size, count in sizes_SV]
            return ViewBatch(epoch, sample_B, empty, bad)
        size_B2 = torch.tensor(sizes)
        crops = [cut_group(images, group, self.seed, epoch, sample_B, size_B2) for group in self.groups]
        return ViewBatch(epoch, sample_B, crops, bad)

    def _read(self, epoch: int, index: int) -> Decoded:
        if isinstance(self.source, EncodedSource):
            reduce = partial(reduction, self.groups, self.seed, epoch, index) if self.reduce_jpeg else None
            return self.source.read_reduced(index, reduce)
        image = self.source.read(index)
        return Decoded(image, image.shape[1], image.shape[2])


class _EpochBatches(Sampler[list[_Item]]):
    """Shuffled full batches of one epoch after another, from any position on: of each this rank's part, or by turns."""

    def __init__(self, size: int, batch_size: int, seed: int, *, epochs: range, skip: int, every: int) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.epochs, self.skip, self.every = epochs, skip, every
        self.rank, self.world = (own_rank(), world_size()) if every == 1 else (0, 1)

    def __iter__(self) -> Iterator[list[_Item]]:
        per_epoch, first = self.size // self.batch_size, self.skip
        for epoch in self.epochs:
            order = permutation(self.seed, epoch, self.size).tolist()
            batches = range(first, per_epoch, self.every)
            # Turns go on from one epoch to the next.
            first += len(batches) * self.every - per_epoch
            for batch in batches:
                chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
                own = chosen[share(self.batch_size, self.rank, self.world)]
                yield [(epoch, index) for index in own]


def view_batches(
    source: ImageSource,
    groups: Sequence[CropGroup],
    *,
    batch_size: int,
    seed: int,
    epochs: range,
    skip: int = 0,
    every: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    reduce_jpeg: bool = False,
) -> Iterator[ViewBatch]:
    """Batches of all `epochs`, one after another; the last partial batch of an epoch is dropped.

    skip: batches of the first epoch that are already done. The batches are the same for every number of workers.
    every: of so many batches only the first, where other processes take the rest; with 1 they take a part of each.
    reduce_jpeg: decode JPEG files smaller where no crop is enlarged by it. The crops show the same parts of the images
    in slightly other pixels, so protocols that compare with published numbers leave it off.
    Raises DeadWorkerError when a loader process dies.
    """
    batches = _EpochBatches(len(source), batch_size, seed, epochs=epochs, skip=skip, every=every)
    dataset = _ViewDataset(source, groups, seed, reduce_jpeg=reduce_jpeg, workers=workers)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        # The dataset returns whole batches; there is nothing left to collate.
        collate_fn=_whole_batch,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
    )
    return watched(loader, dataset.reading)


def device_batches(batches: Iterator[ViewBatch], device: torch.device) -> Iterator[ViewBatch]:
    """The same batches with their crops on the device, which is given each while the one before is in use.

    On CUDA a stream of its own copies them, beside the computing, from pinned memory (`view_batches(pin_memory=True)`).
    That takes the crops of one batch more, and of two when the caller still holds the last batch as it asks for the
    next. `sample_B` stays on the CPU. Elsewhere the batches pass through as they are.
    """
    if device.type != "cuda":
        return batches
    side = torch.cuda.Stream(device)
    return (copied.receive() for copied in _one_ahead(_Copied(batch, device, side) for batch in batches))


class _Copied:
    """A batch on its way to a CUDA device."""

    def __init__(self, batch: ViewBatch, device: torch.device, side: torch.cuda.Stream) -> None:
        with torch.cuda.stream(side):
            crops = [crops.to(device, non_blocking=True) for crops in batch.crops]
        self.batch = ViewBatch(batch.epoch, batch.sample_B, crops, batch.bad)
        self.device = device
        self.done = side.record_event()

    def receive(self) -> ViewBatch:
        """The batch, for use on the current stream, which waits for the copy; the CPU does not."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.done)
        for crops in self.batch.crops:
            # The memory belongs to the side stream, which must not overwrite it while the current one still reads.
            crops.record_stream(current)
        return self.batch


def _one_ahead(items: Iterable[_T]) -> Iterator[_T]:
    """The same items, each given out only after the next one was taken."""
    waiting: list[_T] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def check_batch_size(batch_size: int, images: int) -> None:
    """Raise ConfigError when an epoch has not one full batch, or a batch not one image for every process."""
    if images < 2:
        raise ConfigError(f"there is only {images} training image; a batch needs two")
    if batch_size > images:
        raise ConfigError(
            f"batch_size {batch_size} is larger than the {images} training images; set --batch-size {images} or less"
        )
    if batch_size < world_size():
        raise ConfigError(
            f"batch_size {batch_size} leaves some of the {world_size()} processes without an image; set --batch-size "
            f"{world_size()} or more, or start fewer processes"
        )


def ignore_signals(_worker: int) -> None:
    """Leave SIGTERM and Ctrl-C to the main process, which saves before it stops its workers (`worker_init_fn`).

    Batch systems and terminals signal the whole process group, and a run whose workers are gone cannot go on to save.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader_workers(requested: int | None, source: ImageSource) -> int:
    """Loader processes: as asked, else none for images in memory and one per own core (at most 16) for files."""
    if requested is not None:
        return requested
    return 0 if source.in_memory else min(16, own_cores())


def _whole_batch(batch: Any) -> Any:
    return batch
