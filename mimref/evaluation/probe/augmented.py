"""The linear probe as published: every batch is augmented anew and encoded once for all classifiers (Appendix C.3)."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimref.config.run import ViewsConfig
from mimref.data.decode import BadImages
from mimref.data.loader import view_batches
from mimref.data.photometric import Photometric
from mimref.data.sources import ImageSource, Subset
from mimref.data.transforms import EvalTransform
from mimref.data.views import CropGroup
from mimref.devices import autocast
from mimref.distributed.group import own_rank, world_size
from mimref.distributed.turns import end_requests, request, requests, take_turns
from mimref.encoders.vit import TokenEncoder
from mimref.errors import DataError
from mimref.evaluation.probe.ensemble import Batch, Norm
from mimref.evaluation.probe.grid import (
    LEARNING_RATES,
    Indices,
    ProbeInput,
    ProbeRun,
    ProbeSettings,
    Select,
    check_inputs,
    fingerprint,
)
from mimref.features.encode import Column, encode_columns
from mimref.features.matrix import Matrix
from mimref.progress import Progress
from mimref.results import Row

CROP_SCALE = (0.08, 1.0)
"""Range of a training crop's share of the image's area."""
MAX_BAD = 100


def probe_inputs(depth: int, has_cls_token: bool, *, final_norm: bool = True) -> dict[ProbeInput, list[Column]]:
    """The inputs of an encoder's classifiers, each with the columns that are concatenated for it, in this order.

    An encoder of fewer than four blocks has no `last4`, one without a CLS token only `mean`. Where the sources differ:
    final_norm is of the last block, in `last` and in `last4` (DINOv2 norms all four blocks, the paper's released code
    none), and CLS and mean are both taken of each of the four blocks, as in the released code (DINOv2 adds the mean of
    the last block alone).
    """
    groups = {"last": [depth]} | ({"last4": list(range(depth - 3, depth + 1))} if depth >= 4 else {})
    pools: list[tuple[Literal["cls", "mean"], ...]] = [("cls",), ("cls", "mean")] if has_cls_token else [("mean",)]
    return {
        ProbeInput(name, "+".join(pool)): [
            Column(block, part, final_norm and block == depth) for block in blocks for part in pool
        ]
        for name, blocks in groups.items()
        for pool in pools
    }


def probe_augmented(
    encoder: TokenEncoder,
    train: ImageSource,
    test: Mapping[ProbeInput, Matrix],
    test_y: Indices,
    *,
    transform: EvalTransform,
    final_norm: bool = True,
    lrs: Sequence[float] = LEARNING_RATES,
    epochs: int = 50,
    batch_size: int = 1024,
    norm: Norm = "none",
    select: Select = "test",
    seed: int = 0,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    workers: int = 0,
    bad: BadImages | None = None,
    state: Path | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """As `probe_cached`, on freshly augmented images: random crops of 8% to 100% of the area, bicubic, and flips.

    The encoder is used as it is (move it to `device` first), in evaluation mode and without gradient; one pass per
    batch gives all inputs. Augmentations are a function of (seed, epoch, image). test: features (M, D) of centre crops,
    with the keys and columns of `probe_inputs(encoder.depth, encoder.has_cls_token, final_norm=final_norm)`; centre
    crops of held-out training images are encoded here, at the end. transform: crop size and normalisation of both.
    bad: collects unreadable training images, by default at most 100.
    In a process group all ranks call this; they encode the batches by turns, and rank 0 trains on them. The others get
    no rows. Raises what `probe_cached` does, and DataError for images without labels or too many unreadable ones.
    """
    settings = ProbeSettings(tuple(lrs), epochs, batch_size, norm, select, seed)
    if train.labels is None:
        raise DataError(f"{train.name}: the training images have no labels, which a probe needs")
    parts = probe_inputs(encoder.depth, encoder.has_cls_token, final_norm=final_norm)
    check_inputs({key: test[key].shape[1] if key in test else 0 for key in parts}, test)
    run = ProbeRun(settings, train.labels, {key: test[key] for key in parts}, test_y, device)
    source = _Augmented(
        train, run, transform, parts, device, precision, workers, BadImages(MAX_BAD) if bad is None else bad
    )
    training = encoder.training
    encoder.eval()
    try:
        if own_rank() > 0:
            source.follow(encoder)
            return []
        images = "" if state is None else source.fingerprint()
        run.train(lambda first: source.batches(encoder, first), images, state, progress)
        if world_size() > 1:
            end_requests()
        return run.rows("augmented", source.held_out(encoder))
    finally:
        encoder.train(training)


class _Encoded(NamedTuple):
    """A batch of augmented images, encoded."""

    columns: list[Tensor]
    """(B, D) each; empty where no image could be read."""
    labels: Tensor
    bad: list[tuple[str, str]]
    """Path and reason of every image that could not be read."""


@dataclass
class _Augmented:
    """Batches of features of augmented training images and of plain held-out ones."""

    source: ImageSource
    run: ProbeRun
    transform: EvalTransform
    parts: dict[ProbeInput, list[Column]]
    device: torch.device
    precision: torch.dtype
    workers: int
    bad: BadImages

    def batches(self, encoder: TokenEncoder, first: int) -> Iterator[Batch]:
        """All training batches from an update on, without unreadable images; ranks encode them by turns."""
        if world_size() > 1:
            request(first)
        for batch in take_turns(self._encoded(encoder, first), self.run.total - first):
            for path, reason in batch.bad:
                self.bad.add(path, reason)
            yield self._inputs(batch.columns), batch.labels

    def follow(self, encoder: TokenEncoder) -> None:
        """On other ranks than 0: encode batches for it, until it has all."""
        for first in requests():
            for _ in take_turns(self._encoded(encoder, first), self.run.total - first):
                pass

    def _encoded(self, encoder: TokenEncoder, first: int) -> Iterator["_Encoded"]:
        """This rank's batches."""
        first += own_rank()
        run, settings = self.run, self.run.settings
        photometric = Photometric(
            ViewsConfig(color=False, blur=False),
            settings.seed,
            self.device,
            mean=self.transform.mean,
            std=self.transform.std,
        )
        chosen = Subset(self.source, run.train_rows)
        labels = torch.from_numpy(run.labels[run.train_rows])
        loaded = view_batches(
            chosen,
            [CropGroup(1, self.transform.image_size, CROP_SCALE)],
            batch_size=run.batch,
            seed=settings.seed,
            epochs=range(first // run.per_epoch, settings.epochs),
            skip=first % run.per_epoch,
            every=world_size(),
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        for batch in loaded:
            found: list[Tensor] = []
            if len(batch.sample_B):
                images = photometric(batch.crops[0], batch.epoch, batch.sample_B, [0])[0]
                found = self._encode(encoder, images)
            # What travels to rank 0 does so from the memory of the CPU.
            columns = [column.cpu() for column in found] if world_size() > 1 else found
            yield _Encoded(columns, labels[batch.sample_B], batch.bad)

    @torch.inference_mode()
    def _encode(self, encoder: TokenEncoder, images: Tensor) -> list[Tensor]:
        """The columns of `_columns`."""
        columns = self._columns()
        blocks = sorted({(column.block, column.final_norm) for column in columns})
        with autocast(self.device, self.precision):
            tokens = encoder.blocks(images, [block for block, _ in blocks], final_norm=[norm for _, norm in blocks])
        of_block = dict(zip(blocks, tokens, strict=True))
        return [encoder.pool(of_block[column.block, column.final_norm], column.pool).float() for column in columns]

    def _columns(self) -> list[Column]:
        return list(dict.fromkeys(column for part in self.parts.values() for column in part))

    @torch.inference_mode()
    def _inputs(self, columns: list[Tensor]) -> list[Tensor]:
        """What the classifiers read, of the columns of a batch; nothing of a batch without images."""
        if not columns:
            return []
        pooled = {column: x.to(self.device) for column, x in zip(self._columns(), columns, strict=True)}
        inputs = [torch.cat([pooled[column] for column in part], dim=1) for part in self.parts.values()]
        check_inputs({key: x.shape[1] for key, x in zip(self.parts, inputs, strict=True)}, self.run.test)
        return inputs

    def held_out(self, encoder: TokenEncoder) -> Iterator[Batch]:
        """Centre crops of the held-out images."""
        if not len(self.run.held_rows):
            return
        columns = self._columns()
        labels = self.run.labels[self.run.held_rows]
        found = encode_columns(
            encoder,
            Subset(self.source, self.run.held_rows),
            self.transform,
            columns,
            device=self.device,
            precision=self.precision,
            workers=self.workers,
        )
        for batch in found:
            for path, reason in batch.bad:
                self.bad.add(path, reason)
            if batch.indices:
                of_column = dict(zip(columns, batch.columns, strict=True))
                inputs = [
                    np.concatenate([of_column[column] for column in part], axis=1) for part in self.parts.values()
                ]
                yield [torch.from_numpy(x) for x in inputs], torch.from_numpy(labels[batch.indices])

    def fingerprint(self) -> str:
        """Of the training images, the transform and, through the features of the test images, the encoder."""
        digest = hashlib.sha256(self.source.fingerprint.encode())
        digest.update(json.dumps(self.transform.to_dict(), sort_keys=True).encode())
        digest.update(f"{self.precision} {fingerprint(self.run.test, self.run.labels)}".encode())
        return digest.hexdigest()[:16]
