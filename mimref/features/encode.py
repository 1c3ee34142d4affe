"""What an evaluation reads: features of one encoder on one data set, cached or from one pass; or arrays from files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mimref.data.decode import BadImages
from mimref.data.loader import crop_batches
from mimref.data.sources import ImageSource
from mimref.data.transforms import EvalTransform
from mimref.devices import autocast
from mimref.encoders.vit import TokenEncoder
from mimref.errors import ConfigError, DataError


def block_groups(blocks: str, depth: int) -> dict[str, list[int]]:
    """Which blocks' features are evaluated together: name in the results to block numbers.

    blocks: `last`, `last4` (concatenated), `all` or `1,5,12` (one by one, named by their number).
    Raises ConfigError for anything else, and for blocks outside 1..depth.
    """
    if blocks == "last":
        return {"last": [depth]}
    if blocks == "last4":
        if depth < 4:
            raise ConfigError(f"--blocks last4: the encoder has only {depth} blocks; use --blocks last or all")
        return {"last4": list(range(depth - 3, depth + 1))}
    if blocks == "all":
        return {str(block): [block] for block in range(1, depth + 1)}
    try:
        numbers = [int(part) for part in blocks.split(",")]
    except ValueError:
        raise ConfigError(f"--blocks {blocks!r}: expected last, last4, all or blocks such as 1,5,12") from None
    for number in numbers:
        if not 1 <= number <= depth:
            raise ConfigError(f"--blocks {blocks}: block {number} does not exist; the encoder has blocks 1 to {depth}")
    return {str(number): [number] for number in numbers}


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


class Column(NamedTuple):
    """One vector per image that a pass of an encoder gives."""

    block: int
    """1-based."""
    pool: Literal["cls", "mean"]
    final_norm: bool = False
    """After the encoder's final norm; of the last block alone."""

    @property
    def name(self) -> str:
        """Such as `block-08-cls-normed`."""
        return f"block-{self.block:02d}-{self.pool}{'-normed' if self.final_norm else ''}"


_POOLS: Mapping[str, tuple[Literal["cls", "mean"], ...]] = {
    "cls": ("cls",),
    "mean": ("mean",),
    "cls+mean": ("cls", "mean"),
}


def columns_of(blocks: Sequence[int], pool: str, final_norm: bool, depth: int) -> list[Column]:
    """The columns that make up the features of some blocks under one pooling; the norm is of the last block alone.

    Raises ConfigError for an unknown pooling.
    """
    if pool not in _POOLS:
        raise ConfigError(f"pool {pool!r}: choose from {', '.join(_POOLS)}")
    return [Column(block, part, final_norm and block == depth) for block in blocks for part in _POOLS[pool]]


class Batch(NamedTuple):
    """Pooled features of some consecutive images of a data set."""

    end: int
    """Position in the data set after the last image of the batch."""
    indices: list[int]
    """Positions of the images that could be read."""
    bad: list[tuple[str, str]]
    """Path and reason of the others."""
    columns: list[NDArray[np.float32]]
    """(B, D) each; empty where no image could be read."""


@torch.inference_mode()
def _batches(
    source: ImageSource,
    transform: EvalTransform,
    encode: Callable[[Tensor], list[Tensor]],
    *,
    batch_size: int,
    workers: int,
    start: int = 0,
    every: int = 1,
) -> Iterator[Batch]:
    for batch in crop_batches(source, transform, batch_size=batch_size, workers=workers, start=start, every=every):
        columns = [column_BD.float().cpu().numpy() for column_BD in encode(batch.crops)] if batch.indices else []
        yield Batch(batch.end, batch.indices, batch.bad, columns)


def encode_columns(
    encoder: TokenEncoder,
    source: ImageSource,
    transform: EvalTransform,
    columns: Sequence[Column],
    *,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    batch_size: int = 256,
    workers: int = 0,
    start: int = 0,
    every: int = 1,
) -> Iterator[Batch]:
    """Pooled features of every image from position `start` on, batch by batch, from one pass of the encoder.

    every: of so many batches only the first, where other processes encode the rest.

    The encoder is used as it is (move it to `device` first), in evaluation mode and without gradient; its mode is put
    back at the end. Batches hold what `columns` names, in that order. Raises ConfigError for blocks that are not there.
    """
    blocks = sorted({(column.block, column.final_norm) for column in columns})
    numbers, norms = [block for block, _ in blocks], [norm for _, norm in blocks]

    def encode(crops: Tensor) -> list[Tensor]:
        images = transform.normalize(crops.to(device, non_blocking=True))
        with autocast(device, precision):
            tokens = encoder.blocks(images, numbers, final_norm=norms)
        of_block = dict(zip(blocks, tokens, strict=True))
        return [encoder.pool(of_block[column.block, column.final_norm], column.pool) for column in columns]

    training = encoder.training
    encoder.eval()
    try:
        yield from _batches(source, transform, encode, batch_size=batch_size, workers=workers, start=start, every=every)
    finally:
        encoder.train(training)


def _gather(
    batches: Iterator[Batch],
    source: ImageSource,
    *,
    max_bad: int,
    progress: Callable[[int, int], None] | None,
) -> Features:
    """All batches in one array."""
    x = np.empty((0, 0, 0), dtype=np.float32)
    widths: list[int] = []
    indices: list[int] = []
    bad = BadImages(max_bad)
    for batch in batches:
        for path, reason in batch.bad:
            bad.add(path, reason)
        if batch.indices:
            if not indices:
                widths = [column_BD.shape[1] for column_BD in batch.columns]
                # Made once at full size: joining batches at the end would hold everything twice.
                x = np.zeros((len(source), len(widths), max(widths)), dtype=np.float32)
            for number, column_BD in enumerate(batch.columns):
                x[len(indices) : len(indices) + len(batch.indices), number, : widths[number]] = column_BD
            indices.extend(batch.indices)
        if progress:
            progress(batch.end, len(source))
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
    Raises DataError when more than `max_bad` images cannot be read, ConfigError for blocks and poolings that are not
    there.
    """
    columns = columns_of(blocks, pool, final_norm, encoder.depth)
    batches = encode_columns(
        encoder,
        source,
        transform,
        columns,
        device=device,
        precision=precision,
        batch_size=batch_size,
        workers=workers,
    )
    found = _gather(batches, source, max_bad=max_bad, progress=progress)
    return found if len(columns) == len(blocks) else _pairs(found)


def _pairs(features: Features) -> Features:
    """CLS and mean of every block next to each other, as one slice per block."""
    widths = features.widths[::2]
    if not widths:
        rows, slices, width = features.x.shape
        x = features.x.reshape(rows, slices // 2, 2 * width)
        return Features(x, features.y, features.indices, features.bad)
    x = np.zeros((len(features.x), len(widths), 2 * max(widths)), dtype=np.float32)
    for number, width in enumerate(widths):
        x[:, number, : 2 * width] = np.concatenate([features.block(2 * number), features.block(2 * number + 1)], axis=1)
    return Features(x, features.y, features.indices, features.bad, [2 * width for width in widths])


def raw_pixels(source: ImageSource, transform: EvalTransform, *, workers: int = 0, max_bad: int = 100) -> Features:
    """The evaluation crops themselves as features, (N, 1, 3 * S * S) in [0, 1]: the baseline to beat.

    S is the crop's side, at most 32: larger crops are averaged down.
    """

    def encode(crops: Tensor) -> list[Tensor]:
        pixels = crops.float() / 255
        if pixels.shape[-1] > RAW_PIXELS_SIDE:
            pixels = F.adaptive_avg_pool2d(pixels, RAW_PIXELS_SIDE)
        return [pixels.flatten(1)]

    batches = _batches(source, transform, encode, batch_size=256, workers=workers)
    return _gather(batches, source, max_bad=max_bad, progress=None)
