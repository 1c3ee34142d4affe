"""Functions that load encoders and extract features, for scripts and notebooks."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from mimref.config.base import DataConfig, Interpolation, ReadingConfig
from mimref.config.load import validated
from mimref.data.decode import skipped_line
from mimref.data.device_crops import decoding_device
from mimref.data.given import GivenSource
from mimref.data.open import open_source
from mimref.data.pixels import Decoding
from mimref.data.sources import ArraySource, ImageSource, Split
from mimref.data.transforms import EvalTransform
from mimref.devices import resolve_device, resolve_precision
from mimref.encoders.backbones import TimmBackbone
from mimref.encoders.channels import ChannelInit, for_images
from mimref.encoders.checkpoints import choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.vit import Encoder
from mimref.errors import ConfigError, DataError
from mimref.features.config import EncoderPassConfig
from mimref.features.encode import PassSettings, columns_of
from mimref.features.encode import extract as extract_features
from mimref.features.header import completed, eval_transform, resolve_data, with_channels, with_statistics

_TRANSFORM = ("crop_fraction", "mean", "resize", "std")
"""Settings of the data that change the encoder's transform."""


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder ready for use, its transform and the header of its file."""

    model: Encoder | TimmBackbone
    """A torch module in evaluation mode: `model.blocks(images, [6, 12])` returns the tokens of two blocks."""
    transform: EvalTransform
    """Prepares images for the model: `transform.normalize(transform.crop(image)[None])`."""
    header: dict[str, Any]
    """Preset, source, licence and metrics of files that mimref wrote; empty for others."""
    channels: int | None = None
    """Number of channels of its images, as `data.channels`; None: images are converted to colour."""


class ExtractedFeatures(NamedTuple):
    """Features of a data set's readable images, in data order."""

    x: NDArray[np.float32]
    """(N, D), or (N, blocks, D) for several blocks."""
    y: NDArray[np.int64] | None
    """(N,) labels; None for unlabelled images."""
    paths: list[str]
    """(N,) names of the images."""


def load(
    path: str | Path,
    *,
    arch: str | None = None,
    source: str | None = None,
    num_heads: int | None = None,
    part: str | None = None,
    grid: tuple[int, int] | None = None,
    resolution: int | None = None,
    interpolation: Interpolation | None = None,
    channels: int | None = None,
    channel_init: ChannelInit | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> LoadedEncoder:
    """Load an encoder from a weights file in any known layout, a run's folder, or a published or packaged name.

    arch, source: needed only if the file is not recognised, as on the command line. num_heads: number of attention
    heads, for files from elsewhere with an unusual width; if it is missing, a warning names the assumed number.
    part: which encoder to load if the file holds several, as `encoder.part`. grid: rows and columns of its patches, as
    `encoder.grid`. resolution: image size in pixels; None: the encoder's own. interpolation: of the position embedding
    for another resolution, as `encoder.interpolation`. channels, mean, std, channel_init: for images with channels
    other than the weights', as `data.channels`, `data.mean`, `data.std` and `encoder.channel_init`;
    `mimref.data.statistics.channel_statistics` measures mean and std.
    Raises CheckpointError for a file that holds no encoder, ConfigError for names and sizes that do not fit.
    """
    validated(EncoderPassConfig, {"resolution": resolution})
    hints = {"num_heads": num_heads, "part": part, "grid": grid, "interpolation": interpolation}
    hints["channel_init"] = channel_init
    checkpoint = read_checkpoint(path, validated(ReadingConfig, hints))
    architecture = choose_architecture(checkpoint, arch, source, resolution)
    header = checkpoint.header
    given = {"spec": "images", "channels": channels, "mean": mean, "std": std}
    data = with_channels(resolve_data(validated(DataConfig, given), header), architecture)
    architecture = for_images(architecture, data.channels)
    known = with_statistics(data, header, checkpoint.channels_as(architecture.name), [])
    transform = eval_transform(architecture, known, header, resolution=resolution)
    for notice in checkpoint.notices(architecture, [transform.image_size]):
        warnings.warn(notice, stacklevel=2)
    return LoadedEncoder(encoder_from(checkpoint, architecture).eval(), transform, header, data.channels)


def extract(
    encoder: LoadedEncoder,
    data: str | Path | DataConfig | ImageSource | NDArray[Any],
    *,
    split: Split = "val",
    blocks: Sequence[int] | None = None,
    pool: str = "cls",
    final_norm: bool = False,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 256,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractedFeatures:
    """Return pooled features of all images of a split, from one pass of the encoder; write nothing.

    data: a value of `--data`, or uint8 images (N, H, W) or (N, 3, H, W); for an encoder with `channels` C, images
    (N, C, H, W) as uint8, uint16, or floats from 0 to 1. A `DataConfig` may also set how images are read, decoded,
    cropped and normalised; what it leaves open is as in the encoder's header and transform. blocks: 1-based; None: the
    last. pool: `cls`, `mean` or `cls+mean`. A warning names images that cannot be read; they have no row. Raises
    DataError for unusable images, ConfigError for a block, device or precision that does not exist, and for other
    values that are not valid or do not fit the encoder.
    """
    validated(EncoderPassConfig, {"batch_size": batch_size, "workers": workers})
    if split not in get_args(Split):
        raise ConfigError(f"split {split!r}: choose from {', '.join(get_args(Split))}")
    if blocks is not None and (isinstance(blocks, str) or not isinstance(blocks, Iterable)):
        raise ConfigError(f"blocks {blocks!r}: pass a list of numbers, such as [{encoder.model.depth}]")
    config = _settings(data, encoder)
    images = _open(data, config, split, encoder)
    architecture = encoder.model.architecture
    if for_images(architecture, images.channels) != architecture:
        wrong = f"images have {images.channels} channels, but the encoder reads {architecture.channels}"
        raise ConfigError(f"{wrong}; load it with channels={images.channels}")
    target, home = resolve_device(device), next(encoder.model.parameters()).device
    dtype, decode_on = resolve_precision(precision, target), decoding_device(config, target)
    reading = {key: value for key in _TRANSFORM if (value := getattr(config, key)) is not None}
    transform = replace(encoder.transform, **reading)
    settings = PassSettings(transform, target, dtype, batch_size, workers, config.max_bad, decode_on)
    depth = encoder.model.depth
    groups = [columns_of([block], pool, final_norm, depth) for block in ([depth] if blocks is None else blocks)]
    columns = [column for group in groups for column in group]
    try:
        found = extract_features(encoder.model.to(target), images, settings, columns, progress=progress)
    finally:
        encoder.model.to(home)
    for notice in [*images.peculiarities(), *([skipped_line(found.bad)] if found.bad else [])]:
        warnings.warn(notice, stacklevel=2)
    return ExtractedFeatures(found.stacked(groups), found.y, [images.path(int(index)) for index in found.indices])


def _settings(data: str | Path | DataConfig | ImageSource | NDArray[Any], encoder: LoadedEncoder) -> DataConfig:
    """Return how images are read, with what the encoder provides; the defaults for images that are open already."""
    if not isinstance(data, str | Path | DataConfig):
        return DataConfig()
    config = data if isinstance(data, DataConfig) else DataConfig(spec=str(data))
    if config.channels is None:
        config = completed(config, {"channels": encoder.channels})
    return resolve_data(config, encoder.header)


def _open(
    data: str | Path | DataConfig | ImageSource | NDArray[Any], config: DataConfig, split: Split, encoder: LoadedEncoder
) -> ImageSource:
    if isinstance(data, str | Path | DataConfig):
        source = open_source(config, split)
        for notice in source.notices:
            warnings.warn(notice, stacklevel=3)
        return source
    if not isinstance(data, np.ndarray | torch.Tensor):
        if not hasattr(data, "peculiarities"):
            raise ConfigError(f"data of type {type(data).__name__}: pass a value of --data, an array or a DataConfig")
        return data
    images = np.asarray(data)
    if encoder.channels is not None:
        recorded = Decoding.of(resolve_data(DataConfig(spec="images"), encoder.header))
        # As a tensor, whose channels come first if both orders are possible.
        return GivenSource(torch.from_numpy(images.copy()), replace(recorded, channels=encoder.channels))
    colour = images.ndim == 4 and images.shape[1] == 3
    if images.dtype != np.uint8 or not len(images) or not (images.ndim == 3 or colour):
        raise DataError(f"images are {images.dtype} {images.shape}; they must be uint8 (N, H, W) or (N, 3, H, W)")
    return ArraySource("images", images, None, None, split, np.arange(len(images), dtype=np.int64))
