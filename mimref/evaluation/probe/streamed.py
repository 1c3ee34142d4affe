"""Probes whose training images the encoder reads in every epoch: augmented, or with tokens too large to cache."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimref.config.run import ViewsConfig
from mimref.data.decode import BadImages
from mimref.data.loader import crop_batches, loader_workers, view_batches
from mimref.data.sources import ImageSource, Subset
from mimref.data.views import CropGroup, Photometric
from mimref.devices import autocast
from mimref.distributed.group import own_rank, world_size
from mimref.distributed.turns import end_requests, request, requests, take_turns
from mimref.draws import permutation
from mimref.encoders.backbones import TokenEncoder
from mimref.errors import DataError
from mimref.evaluation.metrics import unseen_marked
from mimref.evaluation.probe.attentive import TokenShape
from mimref.evaluation.probe.config import ProbeTrainingConfig
from mimref.evaluation.probe.ensemble import Batch
from mimref.evaluation.probe.grid import ProbeGrid, ProbeInput, TestStream, fingerprint
from mimref.features.encode import Column, Features, PassSettings, encode_columns, pooled_tokens
from mimref.features.matrix import Labels, Matrix
from mimref.progress import Progress
from mimref.results import Row

CROP_SCALE = (0.08, 1.0)
"""Range of a training crop's area, as a share of the image's."""


class Examined(NamedTuple):
    """Test images that the encoder reads for scoring."""

    source: ImageSource
    identity: Mapping[str, Any]
    """Everything that their features depend on."""


class EncodedImages:
    """Features of images, from encoder passes in evaluation mode (move the encoder to the device first)."""

    def __init__(self, encoder: TokenEncoder, groups: Mapping[ProbeInput, list[Column]], reading: PassSettings) -> None:
        self.encoder, self.groups, self.reading = encoder.eval(), groups, reading
        self.columns = list(dict.fromkeys(column for group in groups.values() for column in group))
        self.bad, self.bad_test = BadImages(reading.max_bad), BadImages(reading.max_bad)
        """Training and test images that could not be read."""

    def encode(self, images: Tensor) -> list[Tensor]:
        """Return the columns, (B, D) float32 each, of normalised images on the device."""
        with torch.inference_mode(), autocast(self.reading.device, self.reading.precision):
            return [column.float() for column in pooled_tokens(self.encoder, images, self.columns)]

    @torch.inference_mode()
    def inputs(self, columns: list[Tensor]) -> list[Tensor]:
        """Return a batch's classifier inputs: none if no image could be read."""
        if not columns:
            return []
        of_column = {name: x.to(self.reading.device) for name, x in zip(self.columns, columns, strict=True)}
        return [torch.cat([of_column[column] for column in group], dim=1) for group in self.groups.values()]

    def centre_crops(self, source: ImageSource, bad: BadImages, labels: Labels) -> Iterator[Batch]:
        """Yield batches of all images of a source, in order. bad: records unreadable ones. labels: one per image."""
        numbers = torch.from_numpy(labels)
        for batch in encode_columns(self.encoder, source, self.reading, self.columns):
            bad.add_all(batch.bad)
            inputs = self.inputs([torch.from_numpy(x) for x in batch.columns])
            if inputs:
                yield inputs, numbers[batch.indices]


def probe_encoded(
    images: EncodedImages,
    train: ImageSource,
    test: Features | Examined,
    settings: ProbeTrainingConfig,
    seed: int,
    *,
    augment: bool,
    shapes: Sequence[TokenShape] = (),
    state: Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[Row], list[tuple[str, str]]]:
    """Run `probe_matrices` on images that are encoded batch by batch.

    The encoder (move it to the device first) is put into evaluation mode and runs without gradient; one pass per batch
    computes all inputs. augment: train on bicubic random crops of 8% to 100% of the area, and flips, a function of
    (seed, epoch, image). Without, the batches are those of cached features, as long as every image can be read. shapes:
    token shapes of the inputs of attentive probes. test: features of centre crops, or images that are encoded for
    scoring. Centre crops of held-out training images are encoded at the end. Returns the rows, and the path and reason
    of every training image left out. In a process group all ranks call this: they encode the batches in turns, and rank
    0 trains on them; the others return empty lists. Raises what `probe_matrices` does, and DataError for images without
    labels or too many unreadable ones.
    """
    test_y = test.y if isinstance(test, Features) else test.source.labels
    if train.labels is None or test_y is None:
        raise DataError(f"{train.name}: the training images have no labels, which a probe needs")
    test_y = unseen_marked(train.labels, test_y, lacks_classes=train.lacks_classes)
    groups, device = images.groups, images.reading.device
    examined: Mapping[ProbeInput, Matrix] | TestStream
    if isinstance(test, Features):
        examined = {key: test.matrix(columns) for key, columns in groups.items()}
    else:
        sizes = {key: shape.size for key, shape in zip(groups, shapes, strict=True)}
        examined = TestStream(sizes, partial(images.centre_crops, test.source, images.bad_test), test.identity)
    grid = ProbeGrid(settings, seed, train.labels, examined, test_y, device, shapes=shapes, state=state, bad=images.bad)
    batches = _TrainingBatches(images, train, grid, augment=augment)
    if own_rank() > 0:
        batches.follow()
        return [], []
    grid.train(batches.all, batches.fingerprint, progress)
    if world_size() > 1:
        end_requests()
    held = images.centre_crops(Subset(train, grid.held_rows), images.bad, grid.labels[grid.held_rows])
    rows = grid.rows("augmented" if augment else "streamed", held)
    return rows, sorted({**dict(images.bad.items), **dict(images.bad_test.items)}.items())


class _Crops(NamedTuple):
    """Normalised images (B, C, S, S) or None if none could be read, rows (B,), path and reason of unreadable images."""

    images: Tensor | None
    rows: Labels
    bad: list[tuple[str, str]]


# Columns, (B, D) each (none where no image could be read), labels (B,), and path and reason of every unreadable image.
_Encoded = tuple[list[Tensor], Tensor, list[tuple[str, str]]]


class _TrainingBatches:
    """Batches of features of training images, augmented or not."""

    def __init__(self, images: EncodedImages, source: ImageSource, grid: ProbeGrid, *, augment: bool) -> None:
        self.images, self.source, self.grid, self.augment = images, source, grid, augment
        self.workers = loader_workers(images.reading.workers, source)

    def all(self, first: int) -> Iterator[Batch]:
        """Yield all batches from update `first` on, without unreadable images; ranks encode them in turns."""
        if world_size() > 1:
            request(first)
        for columns, labels, bad in take_turns(self._encoded(first), self.grid.total - first):
            self.images.bad.add_all(bad)
            yield self.images.inputs(columns), labels

    def follow(self) -> None:
        """Encode batches for rank 0 until it ends; called on all other ranks."""
        for first in requests():
            for _ in take_turns(self._encoded(first), self.grid.total - first):
                pass

    def _encoded(self, first: int) -> Iterator[_Encoded]:
        """Yield this rank's batches."""
        first += own_rank()
        labels = torch.from_numpy(self.grid.labels)
        for crops in self._augmented(first) if self.augment else self._centred(first):
            columns = [] if crops.images is None else self.images.encode(crops.images)
            if world_size() > 1:
                # Features of other ranks reach rank 0 through CPU memory.
                columns = [column.cpu() for column in columns]
            yield columns, labels[crops.rows], crops.bad

    def _augmented(self, first: int) -> Iterator[_Crops]:
        grid, reading = self.grid, self.images.reading
        transform = reading.transform
        views = ViewsConfig(color=False, blur=False)
        photometric = Photometric(views, grid.seed, reading.device, mean=transform.mean, std=transform.std)
        loaded = view_batches(
            Subset(self.source, grid.train_rows),
            [CropGroup(1, transform.image_size, CROP_SCALE)],
            batch_size=grid.batch,
            seed=grid.seed,
            epochs=range(first // grid.steps_per_epoch, grid.settings.epochs),
            skip=first % grid.steps_per_epoch,
            every=world_size(),
            workers=self.workers,
            pin_memory=reading.device.type == "cuda",
            decode_on=reading.decode_on,
        )
        for batch in loaded:
            images = None
            if len(batch.sample_B):
                images = photometric(batch.crops[0], batch.epoch, batch.sample_B, [0])[0]
            yield _Crops(images, grid.train_rows[batch.sample_B.numpy()], batch.bad)

    def _centred(self, first: int) -> Iterator[_Crops]:
        """Yield crops in the order of cached features: a function of (seed, epoch), by position within a batch."""
        grid, reading, steps = self.grid, self.images.reading, self.grid.steps_per_epoch
        for epoch in range(first // steps, grid.settings.epochs):
            order = grid.train_rows[permutation(grid.seed, epoch, len(grid.train_rows)).numpy()]
            rows = np.sort(order[: steps * grid.batch].reshape(steps, grid.batch), axis=1).ravel()
            own = range(first - epoch * steps, steps, world_size())
            # Turns continue from one epoch to the next.
            first += len(own) * world_size()
            loaded = crop_batches(
                Subset(self.source, rows),
                reading.transform,
                batch_size=grid.batch,
                workers=self.workers,
                start=own.start * grid.batch,
                every=world_size(),
                decode_on=reading.decode_on,
            )
            for batch in loaded:
                images = None
                if batch.indices:
                    images = reading.transform.normalize(batch.crops.to(reading.device, non_blocking=True))
                yield _Crops(images, rows[batch.indices], batch.bad)

    def fingerprint(self) -> str:
        """Hash the training images, the transform and, through the test images or their features, the encoder."""
        reading, grid = self.images.reading, self.grid
        digest = hashlib.sha256(self.source.fingerprint.encode())
        read = reading.transform.to_dict() | self.source.decoding.changes()
        if reading.decode_on is not None:
            read["decode"] = "device"
        digest.update(json.dumps(read, sort_keys=True).encode())
        if isinstance(grid.test, TestStream):
            digest.update(json.dumps(dict(grid.test.identity), sort_keys=True).encode())
        tested = fingerprint({} if isinstance(grid.test, TestStream) else grid.test, grid.labels)
        digest.update(f"{reading.precision} {tested}{'' if self.augment else ' not augmented'}".encode())
        return digest.hexdigest()[:16]
