"""The linear probe as published (Appendix C.3): every batch is augmented, and encoded once for all classifiers."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mimref.config.run import ViewsConfig
from mimref.data.decode import BadImages
from mimref.data.loader import loader_workers, view_batches
from mimref.data.sources import ImageSource, Subset
from mimref.data.views import CropGroup, Photometric
from mimref.devices import autocast
from mimref.distributed.group import own_rank, world_size
from mimref.distributed.turns import end_requests, request, requests, take_turns
from mimref.encoders.backbones import TokenEncoder
from mimref.errors import ConfigError, DataError
from mimref.evaluation.probe.config import ProbeTrainingConfig
from mimref.evaluation.probe.ensemble import Batch, Norm
from mimref.evaluation.probe.grid import ProbeGrid, ProbeInput, fingerprint
from mimref.features.encode import Column, Features, PassSettings, encode_columns, pooled_tokens
from mimref.progress import Progress
from mimref.results import Row

CROP_SCALE = (0.08, 1.0)
"""Range of a training crop's share of the image's area."""


def probe_inputs(
    depth: int,
    has_cls_token: bool,
    *,
    norm: Norm = "none",
    blocks: Literal["both", "last", "last4"] = "both",
    final_norm: bool = True,
    norm_any_block: bool = True,
) -> dict[ProbeInput, list[Column]]:
    """The inputs of an encoder's classifiers, each with the columns that are concatenated for it, in this order.

    An encoder of fewer than four blocks has no `last4`, one without a CLS token only `mean`. norm "none" is DINOv2's
    protocol (dinov2/eval/linear.py; models/vision_transformer.py, `get_intermediate_layers`): the encoder's final norm
    on all four blocks, and with their CLS tokens the mean of the last block only. "batch" is the paper's released code:
    the final norm in `last` alone, and CLS and mean of each of the four raw blocks.
    final_norm False: no block is normed. norm_any_block False: only the last one can be.
    Raises ConfigError for `last4` of fewer than four blocks.
    """

    def columns(numbers: list[int], pool: str) -> list[Column]:
        first, *more = pool.split("+")
        if norm == "batch":
            normed = final_norm and numbers == [depth]
            return [Column(block, part, normed) for block in numbers for part in (first, *more)]
        cls = [Column(block, first, final_norm and (norm_any_block or block == depth)) for block in numbers]
        return cls + [Column(depth, part, final_norm) for part in more]

    groups = {"last": [depth]} | ({"last4": list(range(depth - 3, depth + 1))} if depth >= 4 else {})
    wanted = {name: numbers for name, numbers in groups.items() if blocks in ("both", name)}
    if not wanted:
        raise ConfigError(f"probe.blocks 'last4': there are only {depth} blocks; use probe.blocks='last'")
    pools = ["cls", "cls+mean"] if has_cls_token else ["mean"]
    return {ProbeInput(name, pool): columns(numbers, pool) for name, numbers in wanted.items() for pool in pools}


def probe_augmented(
    encoder: TokenEncoder,
    train: ImageSource,
    test: Features,
    groups: Mapping[ProbeInput, list[Column]],
    settings: ProbeTrainingConfig,
    seed: int,
    reading: PassSettings,
    state: Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[Row], list[tuple[str, str]]]:
    """As `probe_cached`, on freshly augmented images: random crops of 8% to 100% of the area, bicubic, and flips.

    The encoder (move it to the device first) is put into evaluation mode, and runs without gradient; one pass per batch
    gives all inputs. Augmentations are a function of (seed, epoch, image). test: features of centre crops, with the
    columns of `groups` (see `probe_inputs`); centre crops of held-out training images are encoded at the end. Returns
    rows, and path and reason of the training images left out. In a process group all ranks call this: they encode the
    batches in turns, and rank 0 trains on them; the others return nothing. Raises what `probe_cached` does, and
    DataError for images without labels or too many unreadable ones.
    """
    if train.labels is None or test.y is None:
        raise DataError(f"{train.name}: the training images have no labels, which a probe needs")
    matrices = {key: test.matrix(columns) for key, columns in groups.items()}
    grid = ProbeGrid(settings, seed, train.labels, matrices, test.y, reading.device, state=state)
    encoder.eval()
    images = _Augmented(encoder, train, grid, groups, reading)
    if own_rank() > 0:
        images.follow()
        return [], []
    grid.train(images.batches, images.fingerprint, progress)
    if world_size() > 1:
        end_requests()
    return grid.rows("augmented", images.held_out()), images.bad.items


# Columns, (B, D) each (none where no image could be read), labels (B,), and path and reason of every unreadable image.
_Encoded = tuple[list[Tensor], Tensor, list[tuple[str, str]]]


class _Augmented:
    """Batches of features of augmented training images and of plain held-out ones."""

    def __init__(
        self,
        encoder: TokenEncoder,
        source: ImageSource,
        grid: ProbeGrid,
        groups: Mapping[ProbeInput, list[Column]],
        reading: PassSettings,
    ) -> None:
        self.encoder, self.source, self.grid, self.groups, self.reading = encoder, source, grid, groups, reading
        self.columns = list(dict.fromkeys(column for group in groups.values() for column in group))
        self.bad = BadImages(reading.max_bad)

    def batches(self, first: int) -> Iterator[Batch]:
        """All training batches from an update on, without unreadable images; ranks encode them in turns."""
        if world_size() > 1:
            request(first)
        for columns, labels, bad in take_turns(self._encoded(first), self.grid.total - first):
            yield self._inputs(columns, bad), labels

    def follow(self) -> None:
        """On other ranks than 0: encode batches for it, until it ends."""
        for first in requests():
            for _ in take_turns(self._encoded(first), self.grid.total - first):
                pass

    def _encoded(self, first: int) -> Iterator[_Encoded]:
        """This rank's batches."""
        first += own_rank()
        grid, reading, transform = self.grid, self.reading, self.reading.transform
        views = ViewsConfig(color=False, blur=False)
        photometric = Photometric(views, grid.seed, reading.device, mean=transform.mean, std=transform.std)
        labels = torch.from_numpy(grid.labels[grid.train_rows])
        loaded = view_batches(
            Subset(self.source, grid.train_rows),
            [CropGroup(1, transform.image_size, CROP_SCALE)],
            batch_size=grid.batch,
            seed=grid.seed,
            epochs=range(first // grid.steps_per_epoch, grid.settings.epochs),
            skip=first % grid.steps_per_epoch,
            every=world_size(),
            workers=loader_workers(reading.workers, self.source),
            pin_memory=reading.device.type == "cuda",
        )
        for batch in loaded:
            columns: list[Tensor] = []
            if len(batch.sample_B):
                images = photometric(batch.crops[0], batch.epoch, batch.sample_B, [0])[0]
                with torch.inference_mode(), autocast(reading.device, reading.precision):
                    columns = [column.float() for column in pooled_tokens(self.encoder, images, self.columns)]
            if world_size() > 1:
                # Other ranks' features travel to rank 0 through the CPU's memory.
                columns = [column.cpu() for column in columns]
            yield columns, labels[batch.sample_B], batch.bad

    @torch.inference_mode()
    def _inputs(self, columns: list[Tensor], bad: list[tuple[str, str]]) -> list[Tensor]:
        """What the classifiers read of a batch's columns: nothing without readable images."""
        for path, reason in bad:
            self.bad.add(path, reason)
        if not columns:
            return []
        of_column = {name: x.to(self.reading.device) for name, x in zip(self.columns, columns, strict=True)}
        return [torch.cat([of_column[column] for column in group], dim=1) for group in self.groups.values()]

    def held_out(self) -> Iterator[Batch]:
        """Centre crops of the held-out images."""
        rows = self.grid.held_rows
        labels = torch.from_numpy(self.grid.labels[rows])
        for batch in encode_columns(self.encoder, Subset(self.source, rows), self.reading, self.columns):
            inputs = self._inputs([torch.from_numpy(x) for x in batch.columns], batch.bad)
            if inputs:
                yield inputs, labels[batch.indices]

    def fingerprint(self) -> str:
        """Of the training images, the transform and, through the features of the test images, the encoder."""
        digest = hashlib.sha256(self.source.fingerprint.encode())
        read = self.reading.transform.to_dict() | self.source.decoding.changes()
        digest.update(json.dumps(read, sort_keys=True).encode())
        digest.update(f"{self.reading.precision} {fingerprint(self.grid.test, self.grid.labels)}".encode())
        return digest.hexdigest()[:16]
