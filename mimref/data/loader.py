"""Batches of images from loader processes: evaluation crops in data order, and training views in shuffled order.

A loader's item is a whole batch, read and cropped in one process, so that nothing is left to collate. `device_batches`
copies training views to the GPU; `mimref.data.views` then changes their colours there.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import starmap
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from mimref.data.decode import Decoded
from mimref.data.device_crops import complete
from mimref.data.jpegs import Jpeg, Jpegs, jpegs_of, pack, read_jpeg
from mimref.data.sources import ImageSource
from mimref.data.transforms import EvalTransform, middle, resize, stacked
from mimref.data.views import CropGroup, cut_group, reduction, view_windows
from mimref.data.workers import BatchDataset, load
from mimref.devices import own_cores
from mimref.distributed.group import own_rank, share, world_size
from mimref.draws import permutation
from mimref.errors import ConfigError

_T = TypeVar("_T")


def loader_workers(requested: int | None, source: ImageSource) -> int:
    """Return how many loader processes to use. Default: 0 for images in memory, else one per own core, up to 16."""
    if requested is not None:
        return requested
    return 0 if source.in_memory else min(16, own_cores())


# --- evaluation crops


class CropBatch(NamedTuple):
    """Crops of consecutive images of a data set."""

    end: int
    """Position in the data set after the last image of the batch."""
    crops: Tensor
    """(B, C, S, S) for the readable images, or (B, V, C, S, S) for V views. uint8, or float32 from 0 to 255."""
    indices: list[int]
    """Positions of these images in the data set."""
    bad: list[tuple[str, str]]
    """Path and reason of every image of the batch that could not be read."""
    traits: list[int]
    """Traits of the readable images, see `mimref.data.traits`."""
    jpegs: Jpegs | None = None
    """Set by a loader process: images for a device to decode, whose crops are still missing."""


class _CropDataset(BatchDataset[CropBatch]):
    def __init__(self, source: ImageSource, transform: EvalTransform, decode_on: torch.device | None) -> None:
        super().__init__(source)
        self.transform, self.decode_on = transform, None if source.in_memory else decode_on

    def __getitem__(self, batch: range) -> CropBatch:
        read, good, bad = self.read(batch, self._read)
        size = self.transform.image_size
        crops = stacked([each.image for each in read if isinstance(each, Decoded)], (self.source.channels, size, size))
        rows, files = jpegs_of(read)
        windows = self.transform.windows([(each.height, each.width) for each in files])
        jpegs = pack(files, rows, [windows]) if files else None
        return CropBatch(batch.stop, crops, good, bad, [each.traits for each in read], jpegs)

    def _read(self, index: int) -> Decoded | Jpeg:
        if self.decode_on is None:
            return self._cropped(self.source.read_reduced(index, None))
        read = read_jpeg(self.source, index, None)
        return self._cropped(read) if isinstance(read, Decoded) else read

    def _cropped(self, decoded: Decoded) -> Decoded:
        return decoded._replace(image=self.transform.crop(decoded.image.contiguous()))

    def complete(self, batch: CropBatch) -> CropBatch:
        """Return the batch with all its crops, on the device if it has JPEGs for it; the source records the traits.

        Not for loader processes.
        """
        if batch.jpegs is not None and self.decode_on is not None:
            done = complete(
                *(batch.jpegs, [batch.crops[:, None]], self.decode_on, self.source.decoding),
                cut=lambda _, decoded: [self._cropped(decoded).image[None]],
            )
            kept = [row for row in range(len(batch.traits)) if row not in done.bad]
            batch = batch._replace(
                crops=done.crops[0][:, 0],
                indices=[batch.indices[row] for row in kept],
                bad=[*batch.bad, *done.bad.values()],
                traits=[batch.traits[row] | done.traits.get(row, 0) for row in kept],
                jpegs=None,
            )
        self.source.record(batch.indices, batch.traits)
        return batch


def crop_batches(
    source: ImageSource,
    transform: EvalTransform,
    *,
    batch_size: int,
    workers: int = 0,
    start: int = 0,
    every: int = 1,
    decode_on: torch.device | None = None,
) -> Iterator[CropBatch]:
    """Return batches of evaluation crops of all images from position `start` on; unreadable images are listed as bad.

    every: return only every n-th batch; other processes take the others. decode_on: decode and crop JPEGs on this
    device, and return the crops there. Raises DeadWorkerError if a loader process dies or hangs.
    """
    size = len(source)
    batches = [range(at, min(size, at + batch_size)) for at in range(start, size, every * batch_size)]

    dataset = _CropDataset(source, transform, decode_on)
    return map(dataset.complete, load(dataset, batches, workers=workers))


# --- training views


@dataclass
class ViewBatch:
    """Views of B images. Unreadable images are left out, so B may be smaller than the batch size."""

    epoch: int
    sample_B: Tensor
    """Sample indices, int64."""
    crops: list[Tensor]
    """One tensor (B, V, C, S, S) for each crop group, uint8 or float32 from 0 to 255."""
    bad: list[tuple[str, str]]
    """Path and reason of every image of the batch that could not be read."""
    traits: list[int] = field(default_factory=list)
    """Traits of the readable images, see `mimref.data.traits`."""
    places: list[int] = field(default_factory=list)
    """Places of these images in the process's part of the batch; not consecutive if some images could not be read."""
    jpegs: Jpegs | None = None
    """Set by a loader process: images for a device to decode, whose crops are still missing."""

    def pin_memory(self) -> "ViewBatch":
        """Return the same batch in page-locked memory."""
        return replace(self, crops=[crops.pin_memory() for crops in self.crops])


@dataclass(frozen=True)
class Preparation:
    """Steps that loader processes apply to training images, besides cutting crops."""

    resize: int | None = None
    """Shorter side in pixels to which an image is resized before it is cropped. None: the image keeps its size."""
    augment: Callable[[Tensor, int, int], Tensor] | None = None
    """Function of a crop (C, S, S), its epoch and its sample; returns the changed crop."""

    def before(self, decoded: Decoded) -> Decoded:
        """Return the image to cut crops from."""
        if self.resize is None:
            return decoded
        image = resize(middle(decoded.image), [self.resize])
        return decoded._replace(image=image, height=image.shape[1], width=image.shape[2])

    def after(self, crops: list[Tensor], epoch: int, sample_B: Tensor) -> None:
        """Change the crops (B, V, C, S, S) in place."""
        if self.augment is None:
            return
        for group in crops:
            for views, sample in zip(group, sample_B.tolist(), strict=True):
                for crop in views:
                    crop.copy_(self.augment(crop, epoch, sample))


_EpochBatch = tuple[int, list[int]]
"""Epoch and sample indices: workers outlive epochs, so the epoch travels with the samples."""


class _ViewDataset(BatchDataset[ViewBatch]):
    def __init__(
        self,
        source: ImageSource,
        groups: Sequence[CropGroup],
        seed: int,
        *,
        preparation: Preparation | None,
        reduce_jpeg: bool,
        decode_on: torch.device | None,
    ) -> None:
        super().__init__(source)
        self.groups, self.seed = groups, seed
        self.decode_on = None if source.in_memory else decode_on
        self.preparation, self.reduce_jpeg = preparation or Preparation(), reduce_jpeg

    def __getitem__(self, batch: _EpochBatch) -> ViewBatch:
        epoch, indices = batch

        def read(index: int) -> Decoded | Jpeg:
            reduce = partial(reduction, self.groups, self.seed, epoch, index) if self.reduce_jpeg else None
            if self.decode_on is not None:
                return read_jpeg(self.source, index, reduce)
            return self.preparation.before(self.source.read_reduced(index, reduce))

        images, good, bad = self.read(indices, read)
        sample_B = torch.tensor(good, dtype=torch.int64)
        rows, files = jpegs_of(images)
        decoded = [each for each in images if isinstance(each, Decoded)]
        others = [row for row, each in enumerate(images) if isinstance(each, Decoded)]
        crops = self._cut(decoded, epoch, sample_B[others])
        self.preparation.after(crops, epoch, sample_B)
        jpegs = None
        if files:
            sizes = [(each.height, each.width) for each in files]
            windows = [view_windows(sizes, group, self.seed, epoch, sample_B[rows]) for group in self.groups]
            jpegs = pack(files, rows, windows)
        place_of = {index: place for place, index in enumerate(indices)}
        places = [place_of[index] for index in good]
        return ViewBatch(epoch, sample_B, crops, bad, [each.traits for each in images], places, jpegs)

    def _cut(self, decoded: Sequence[Decoded], epoch: int, sample_B: Tensor) -> list[Tensor]:
        channels = self.source.channels
        return [cut_group(decoded, group, self.seed, epoch, sample_B, channels) for group in self.groups]

    def complete(self, batch: ViewBatch) -> ViewBatch:
        """Return the batch with all its crops, on the device if it has JPEGs for it; the source records the traits.

        Not for loader processes.
        """
        epoch, sample_B = batch.epoch, batch.sample_B

        def cut(row: int, decoded: Decoded) -> list[Tensor]:
            return [crops[0] for crops in self._cut([decoded], epoch, sample_B[row : row + 1])]

        if batch.jpegs is not None and self.decode_on is not None:
            done = complete(batch.jpegs, batch.crops, self.decode_on, self.source.decoding, cut)
            kept = [row for row in range(len(batch.traits)) if row not in done.bad]
            batch = replace(
                batch,
                crops=done.crops,
                sample_B=sample_B[kept],
                bad=[*batch.bad, *done.bad.values()],
                traits=[batch.traits[row] | done.traits.get(row, 0) for row in kept],
                places=[batch.places[row] for row in kept],
                jpegs=None,
            )
        self.source.record(batch.sample_B.tolist(), batch.traits)
        return batch


def epoch_batches(
    size: int, batch_size: int, seed: int, *, epochs: range, skip: int, every: int, part: slice
) -> Iterator[_EpochBatch]:
    """Yield a part of every n-th (`every`) shuffled full batch of consecutive epochs, from any position (`skip`) on."""
    per_epoch, first = size // batch_size, skip
    for epoch in epochs:
        order = permutation(seed, epoch, size).tolist()
        batches = range(first, per_epoch, every)
        # The count of `every` continues from one epoch to the next.
        first += len(batches) * every - per_epoch
        for batch in batches:
            yield epoch, order[batch * batch_size : (batch + 1) * batch_size][part]


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
    preparation: Preparation | None = None,
    together: int = 1,
    reduce_jpeg: bool = False,
    decode_on: torch.device | None = None,
) -> Iterator[ViewBatch]:
    """Return the batches of all `epochs`, one after another; the last partial batch of an epoch is dropped.

    skip: number of batches of the first epoch that are already done. Batches do not depend on the number of workers.
    every: return only every n-th batch; other processes take the others. With 1, each process takes its part of every
    batch.
    together: number of neighbouring images of a batch that stay in one process, counted from the batch's first image.
    reduce_jpeg: decode JPEG files at a reduced size unless a crop would need enlarging. The crops show the same parts
    of the images with slightly different pixels, so protocols that compare with published numbers leave it off.
    Protocols that resize images before cropping must leave it off too.
    decode_on: decode and crop JPEGs on this device, on its current stream, and return the crops there. Excludes JPEGs
    that are decoded at a reduced size; cannot be combined with a preparation.
    Raises DeadWorkerError if a loader process dies or hangs.
    """
    rank, world = (own_rank(), world_size()) if every == 1 else (0, 1)
    groups_of_rank = share(math.ceil(batch_size / together), rank, world)
    part = slice(groups_of_rank.start * together, groups_of_rank.stop * together)
    batches = epoch_batches(len(source), batch_size, seed, epochs=epochs, skip=skip, every=every, part=part)
    assert preparation is None or decode_on is None
    dataset = _ViewDataset(source, groups, seed, preparation=preparation, reduce_jpeg=reduce_jpeg, decode_on=decode_on)
    return map(dataset.complete, load(dataset, batches, workers=workers, pin_memory=pin_memory))


def view_crop_batches(
    source: ImageSource,
    group: CropGroup,
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    start: int = 0,
    every: int = 1,
    decode_on: torch.device | None = None,
) -> Iterator[CropBatch]:
    """Return batches of one group's views of all images from position `start` on, in data order.

    The views are those of training's first epoch. every, decode_on: as in `crop_batches`. Raises DeadWorkerError if a
    loader process dies or hangs.
    """
    size = len(source)
    firsts = range(start, size, every * batch_size)
    batches: list[_EpochBatch] = [(0, list(range(at, min(size, at + batch_size)))) for at in firsts]
    dataset = _ViewDataset(source, [group], seed, preparation=None, reduce_jpeg=False, decode_on=decode_on)

    def completed(asked: _EpochBatch, batch: ViewBatch) -> CropBatch:
        batch = dataset.complete(batch)
        return CropBatch(asked[1][-1] + 1, batch.crops[0], batch.sample_B.tolist(), batch.bad, batch.traits)

    return starmap(completed, zip(batches, load(dataset, batches, workers=workers), strict=True))


def check_batch_size(batch_size: int, images: int) -> None:
    """Raise ConfigError if an epoch has no full batch, or a batch has fewer images than there are processes."""
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


# --- copies to the device


def device_batches(batches: Iterator[ViewBatch], device: torch.device) -> Iterator[ViewBatch]:
    """Return the same batches with their crops on the device, each copied while the previous one is in use.

    On CUDA a separate stream copies them from pinned memory (`view_batches(pin_memory=True)`) during computation. This
    takes memory for the crops of one more batch, or of two if the caller still holds the last batch when it requests
    the next. `sample_B` stays on the CPU. On other devices the batches are returned unchanged.
    """
    if device.type != "cuda":
        return batches
    side = torch.cuda.Stream(device)

    def copied() -> Iterator[tuple[ViewBatch, torch.cuda.Event]]:
        while True:
            # JPEGs that are decoded on the device are decoded on this stream.
            with torch.cuda.stream(side):
                if (batch := next(batches, None)) is None:
                    return
                crops = [crops.to(device, non_blocking=True) for crops in batch.crops]
            yield replace(batch, crops=crops), side.record_event()

    def receive(batch: ViewBatch, event: torch.cuda.Event) -> ViewBatch:
        """Make the current stream wait for the copy; the CPU does not wait."""
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for crops in batch.crops:
            # The memory belongs to the side stream, which must not overwrite it while the current stream reads it.
            crops.record_stream(current)
        return batch

    return starmap(receive, _one_ahead(copied()))


def _one_ahead(items: Iterable[_T]) -> Iterator[_T]:
    """Yield the same items, each once the next one has been taken."""
    waiting: list[_T] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
