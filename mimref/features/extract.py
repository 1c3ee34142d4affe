"""Features of a frozen encoder, one pass for all blocks and poolings asked for.

Shapes: N images, K blocks, D feature width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mimref.data.loader import ignore_signals
from mimref.data.sources import BadImage, BadImages, ImageSource
from mimref.data.transforms import EvalTransform
from mimref.devices import autocast
from mimref.encoders.vit import TokenEncoder
from mimref.errors import DataError

# Pixels beyond this make no better baseline, and those of a large data set would fill the memory.
RAW_PIXELS_SIDE = 32


@dataclass
class Features:
    """Features of a data set's readable images, in data order."""

    x: NDArray[np.float32]
    """(N, K, D), one slice per block asked for, D the widest one's width: see `widths`."""
    y: NDArray[np.int64] | None
    """(N,) labels; None for unlabelled images."""
    indices: NDArray[np.int64]
    """(N,) position of every row in the data set."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of every image left out."""
    widths: list[int] = field(default_factory=list)
    """Width of every block; empty where all have the width D. Narrower ones are padded with zeros."""

    def block(self, column: int) -> NDArray[np.float32]:
        """Features of one of the K blocks without padding, (N, its width)."""
        return self.x[:, column, : self.widths[column]] if self.widths else self.x[:, column]


class _CroppedImages(Dataset[tuple[Tensor, list[int], list[tuple[str, str]]]]):
    """Batches of evaluation crops; the batches are the items, so that nothing is left to collate."""

    def __init__(self, source: ImageSource, transform: EvalTransform, batch_size: int) -> None:
        self.source, self.transform, self.batch_size = source, transform, batch_size

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, batch: int) -> tuple[Tensor, list[int], list[tuple[str, str]]]:
        crops, kept, bad = [], [], []
        for index in range(batch * self.batch_size, min(len(self.source), (batch + 1) * self.batch_size)):
            try:
                crops.append(self.transform.crop(self.source.read(index)))
                kept.append(index)
            except BadImage as error:
                bad.append((error.path, error.reason))
        size = self.transform.image_size
        return torch.stack(crops) if crops else torch.empty(0, 3, size, size, dtype=torch.uint8), kept, bad


@torch.inference_mode()
def _extract(
    source: ImageSource,
    transform: EvalTransform,
    encode: Callable[[Tensor], list[Tensor]],
    *,
    batch_size: int,
    workers: int,
    max_bad: int,
    progress: Callable[[int, int], None] | None,
) -> Features:
    dataset = _CroppedImages(source, transform, batch_size)
    batches = DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=ignore_signals)
    x = np.empty((0, 0, 0), dtype=np.float32)
    widths: list[int] = []
    indices: list[int] = []
    bad = BadImages(max_bad)
    for crops, kept, unreadable in batches:
        for path, reason in unreadable:
            bad.add(path, reason)
        if kept:
            pooled = [block_BD.float().cpu().numpy() for block_BD in encode(crops)]
            if not indices:
                widths = [block_BD.shape[1] for block_BD in pooled]
                # Made once at full size: joining batches at the end would hold everything twice.
                x = np.zeros((len(source), len(widths), max(widths)), dtype=np.float32)
            for column, block_BD in enumerate(pooled):
                x[len(indices) : len(indices) + len(kept), column, : widths[column]] = block_BD
            indices.extend(kept)
        if progress:
            progress(len(indices) + len(bad.items), len(source))
    if not indices:
        raise DataError(f"{source.name}: no readable image")
    rows = np.asarray(indices, dtype=np.int64)
    labels = None if source.labels is None else source.labels[rows]
    return Features(x[: len(rows)], labels, rows, bad.items, [] if len(set(widths)) == 1 else widths)


def extract(
    encoder: TokenEncoder,
    source: ImageSource,
    transform: EvalTransform,
    *,
    blocks: Sequence[int],
    pool: str = "cls",
    final_norm: bool = False,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    batch_size: int = 256,
    workers: int = 0,
    max_bad: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Pooled tokens of `blocks` (1-based) for every readable image: x is (N, len(blocks), D) float32.

    The encoder is used as it is (move it to `device` first), in evaluation mode and without gradient.
    Raises DataError when more than `max_bad` images cannot be read, ConfigError for blocks that are not there.
    """
    training = encoder.training
    encoder.eval()

    def encode(crops: Tensor) -> list[Tensor]:
        images = transform.normalize(crops.to(device, non_blocking=True))
        with autocast(device, precision):
            tokens = encoder.blocks(images, blocks, final_norm=final_norm)
        return [encoder.pool(block, pool) for block in tokens]

    try:
        return _extract(
            source,
            transform,
            encode,
            batch_size=batch_size,
            workers=workers,
            max_bad=max_bad,
            progress=progress,
        )
    finally:
        encoder.train(training)


def raw_pixels(source: ImageSource, transform: EvalTransform, *, workers: int = 0, max_bad: int = 100) -> Features:
    """The evaluation crops themselves as features, (N, 1, 3 * S * S) in [0, 1]: the baseline to beat.

    S is the crop's side, at most 32: larger crops are averaged down.
    """

    def encode(crops: Tensor) -> list[Tensor]:
        pixels = crops.float() / 255
        if pixels.shape[-1] > RAW_PIXELS_SIDE:
            pixels = F.adaptive_avg_pool2d(pixels, RAW_PIXELS_SIDE)
        return [pixels.flatten(1)]

    return _extract(source, transform, encode, batch_size=256, workers=workers, max_bad=max_bad, progress=None)
