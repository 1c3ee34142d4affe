"""Compute the features of a data set in one pass of an encoder over its images, batch by batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mimref.config.run import ViewsConfig
from mimref.data.decode import BadImages, none_readable
from mimref.data.loader import CropBatch, crop_batches, loader_workers, view_crop_batches
from mimref.data.sources import ImageSource
from mimref.data.transforms import EvalTransform
from mimref.data.views import Photometric, multi_crop
from mimref.devices import autocast
from mimref.encoders.backbones import TokenEncoder
from mimref.errors import ConfigError
from mimref.features.matrix import Labels, Matrix, SideBySide
from mimref.progress import Progress

# Larger crops are no better as a baseline, and for a large data set they would fill the memory.
RAW_PIXELS_SIDE = 32
PATCHES = "patches"
"""Pooling of a column that keeps every patch token."""


class Column(NamedTuple):
    """One vector per image."""

    block: int
    """1-based; 0 for raw pixels."""
    pool: str
    """`cls`, `mean`, `pixels`, or `patches`: all patch tokens, one after another."""
    final_norm: bool = False
    """Whether the encoder's final norm is applied."""
    view: int | None = None
    """Number of the augmented view, 0 or 1; None: the evaluation crop."""

    @property
    def name(self) -> str:
        """Name of the column, such as `block-08-cls-normed` or `block-08-cls-view-1`."""
        view = "" if self.view is None else f"-view-{self.view}"
        return f"block-{self.block:02d}-{self.pool}{'-normed' if self.final_norm else ''}{view}"


PIXELS = Column(0, "pixels")
"""The column of `raw_pixels`."""


@dataclass
class Features:
    """Vectors of a data set's readable images in data order: in memory, memory-mapped or from files."""

    columns: Mapping[Column, Matrix]
    """(N, D) each; widths may differ."""
    indices: Labels
    """(N,) position of every row in the data set."""
    y: Labels | None = None
    """(N,) labels; None for unlabelled images."""
    class_names: list[str] | None = None
    """Names of labels 0, 1, ..., if they have any."""
    lacks_classes: bool = False
    """See `ImageSource`."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason for every image left out."""
    notices: list[str] = field(default_factory=list)
    """Peculiarities of the images, one line each."""

    def __len__(self) -> int:
        return len(self.indices)

    def matrix(self, columns: Sequence[Column]) -> Matrix:
        """Return some columns side by side, (N, D)."""
        parts = [self.columns[column] for column in columns]
        return parts[0] if len(parts) == 1 else SideBySide(parts)

    def stacked(self, groups: Sequence[Sequence[Column]]) -> NDArray[np.float32]:
        """Return groups of columns in memory: (N, D) for one group, (N, groups, D) for several.

        Raises ConfigError for groups of different widths.
        """
        parts = [np.array(self.matrix(columns)[:], np.float32) for columns in groups]  # not views of mapped files
        widths = [x.shape[1] for x in parts]
        if len(set(widths)) > 1:
            raise ConfigError(f"the blocks differ in width ({widths}); extract them one by one")
        return parts[0] if len(parts) == 1 else np.stack(parts, axis=1)


def block_groups(blocks: str, depth: int) -> dict[str, list[int]]:
    """Return the blocks whose features are evaluated together: name in the results to block numbers.

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


def columns_of(blocks: Sequence[int], pool: str, final_norm: bool, depth: int) -> list[Column]:
    """Return the columns that make up the features of some blocks. The final norm applies to the last block only.

    Raises ConfigError for a pooling other than `cls`, `mean` and `cls+mean`.
    """
    if pool not in ("cls", "mean", "cls+mean"):
        raise ConfigError(f"pool {pool!r}: choose from cls, mean, cls+mean")
    return [Column(block, part, final_norm and block == depth) for block in blocks for part in pool.split("+")]


@dataclass(frozen=True)
class PassSettings:
    """How a pass reads images and computes."""

    transform: EvalTransform
    device: torch.device
    precision: torch.dtype = torch.float32
    batch_size: int = 256
    workers: int | None = 0
    """Loader processes; None: one per core for images in files."""
    max_bad: int = 100
    """Number of unreadable images that may be left out; one more is an error."""
    decode_on: torch.device | None = None
    """Where JPEGs are decoded, see `decoding_device`."""


class Batch(NamedTuple):
    """Features of some consecutive images of a data set."""

    end: int
    """Position in the data set after the last image of the batch."""
    indices: list[int]
    """Positions of the images that could be read."""
    bad: list[tuple[str, str]]
    """Path and reason for each of the others."""
    columns: list[NDArray[np.float32]]
    """(B, D) each; empty if no image could be read."""
    traits: Sequence[int] = ()
    """Traits of the readable images, see `mimref.data.traits`."""


def _crops(source: ImageSource, settings: PassSettings, start: int = 0, every: int = 1) -> Iterator[CropBatch]:
    size, workers = settings.batch_size, loader_workers(settings.workers, source)
    return crop_batches(
        *(source, settings.transform),
        batch_size=size,
        workers=workers,
        start=start,
        every=every,
        decode_on=settings.decode_on,
    )


@torch.inference_mode()
def _batches(
    crops: Iterator[CropBatch], settings: PassSettings, encode: Callable[[CropBatch], list[Tensor]]
) -> Iterator[Batch]:
    bad = BadImages(settings.max_bad)
    bad.some_readable = False
    for batch in crops:
        bad.some_readable |= bool(batch.indices)
        bad.add_all(batch.bad)
        columns = [column_BD.float().cpu().numpy() for column_BD in encode(batch)] if batch.indices else []
        yield Batch(batch.end, batch.indices, batch.bad, columns, batch.traits)


@contextmanager
def _evaluating(encoder: TokenEncoder) -> Iterator[None]:
    """Set evaluation mode, then restore the previous mode."""
    training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(training)


def pooled_tokens(encoder: TokenEncoder, images: Tensor, columns: Sequence[Column]) -> list[Tensor]:
    """Compute the columns, (B, D) each, of a batch of normalised images in one forward pass."""
    blocks = sorted({(column.block, column.final_norm) for column in columns})
    tokens = encoder.blocks(images, [block for block, _ in blocks], final_norm=[norm for _, norm in blocks])
    of_block = dict(zip(blocks, tokens, strict=True))

    def pooled(column: Column) -> Tensor:
        tokens_BLD = of_block[column.block, column.final_norm]
        if column.pool == PATCHES:
            return tokens_BLD[:, encoder.num_prefix_tokens :].flatten(1)
        return encoder.pool(tokens_BLD, column.pool)

    return [pooled(column) for column in columns]


def encode_columns(
    encoder: TokenEncoder,
    source: ImageSource,
    settings: PassSettings,
    columns: Sequence[Column],
    start: int = 0,
    every: int = 1,
) -> Iterator[Batch]:
    """Yield the features of all images from position `start`, batch by batch, in one pass of the encoder.

    every: encode only the first of every so many batches; other processes encode the rest. The encoder (move it to the
    device first) runs in evaluation mode and without gradients; its mode is restored at the end. Batches hold `columns`
    in order. Raises ConfigError for blocks that do not exist, DataError for too many unreadable images.
    """

    def encode(batch: CropBatch) -> list[Tensor]:
        images = settings.transform.normalize(batch.crops.to(settings.device, non_blocking=True))
        with autocast(settings.device, settings.precision):
            return pooled_tokens(encoder, images, columns)

    with _evaluating(encoder):
        yield from _batches(_crops(source, settings, start, every), settings, encode)


def encode_views(
    encoder: TokenEncoder,
    source: ImageSource,
    settings: PassSettings,
    columns: Sequence[Column],
    views: ViewsConfig,
    seed: int,
    start: int = 0,
    every: int = 1,
) -> Iterator[Batch]:
    """Yield features of refinement's two global views of every image, as `encode_columns`; columns must set `view`.

    views, seed: determine crops and colours, which are those of the first epoch of training.
    """
    transform = settings.transform
    photometric = Photometric(views, seed, settings.device, mean=transform.mean, std=transform.std)
    group = multi_crop(views, transform.image_size)[0]
    workers = loader_workers(settings.workers, source)
    crops = view_crop_batches(
        *(source, group),
        batch_size=settings.batch_size,
        seed=seed,
        workers=workers,
        start=start,
        every=every,
        decode_on=settings.decode_on,
    )

    def encode(batch: CropBatch) -> list[Tensor]:
        pair = photometric(batch.crops, 0, torch.tensor(batch.indices, dtype=torch.int64), range(group.count))
        found: dict[Column, Tensor] = {}
        for view, images in enumerate(pair):
            wanted = [column for column in columns if column.view == view]
            with autocast(settings.device, settings.precision):
                found |= zip(wanted, pooled_tokens(encoder, images, wanted), strict=True)
        return [found[column] for column in columns]

    with _evaluating(encoder):
        yield from _batches(crops, settings, encode)


def gather(
    batches: Iterator[Batch], columns: Sequence[Column], images: int, name: str, progress: Progress | None = None
) -> Features:
    """Gather all batches of a data set of `images` images, without labels. Raises DataError if none is readable."""
    arrays: list[NDArray[np.float32]] = []
    indices: list[int] = []
    bad: list[tuple[str, str]] = []
    for batch in batches:
        bad += [(path, reason) for path, reason in batch.bad]
        if batch.indices:
            # Allocated once at full size: concatenating batches at the end would need the memory twice.
            arrays = arrays or [np.empty((images, x.shape[1]), dtype=np.float32) for x in batch.columns]
            for array, x in zip(arrays, batch.columns, strict=True):
                array[len(indices) : len(indices) + len(x)] = x
            indices += batch.indices
        if progress:
            progress(batch.end, images)
    if not indices:
        raise none_readable(name, bad)
    found = {column: array[: len(indices)] for column, array in zip(columns, arrays, strict=True)}
    return Features(found, np.asarray(indices, dtype=np.int64), bad=bad)


def extract(
    encoder: TokenEncoder,
    source: ImageSource,
    settings: PassSettings,
    columns: Sequence[Column],
    *,
    progress: Progress | None = None,
) -> Features:
    """Compute columns of every readable image in memory, in float32; see `encode_columns`."""
    columns = list(dict.fromkeys(columns))
    batches = encode_columns(encoder, source, settings, columns)
    return labelled(gather(batches, columns, len(source), source.name, progress), source)


def raw_pixels(source: ImageSource, settings: PassSettings) -> Features:
    """Return the evaluation crops themselves, (N, 3 * S * S) in [0, 1], as the column `PIXELS`: the baseline to beat.

    S is the side of the crop, at most 32; larger crops are downsampled by averaging.
    """

    def encode(batch: CropBatch) -> list[Tensor]:
        pixels = batch.crops.float() / 255
        if pixels.shape[-1] > RAW_PIXELS_SIDE:
            pixels = F.adaptive_avg_pool2d(pixels, RAW_PIXELS_SIDE)
        return [pixels.flatten(1)]

    return labelled(
        gather(_batches(_crops(source, settings), settings, encode), [PIXELS], len(source), source.name), source
    )


def labelled(features: Features, source: ImageSource) -> Features:
    """Add the labels of the images to the features, if there are any."""
    features.y = None if source.labels is None else source.labels[features.indices]
    features.class_names, features.lacks_classes = source.class_names, source.lacks_classes
    return features
