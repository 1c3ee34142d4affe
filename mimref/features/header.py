"""Data and transform recorded in a checkpoint's header, for settings that the user leaves open."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from mimref.config.base import DataConfig
from mimref.config.load import validated
from mimref.data.open import ACCEPTED, absolute_spec
from mimref.data.pixels import DECODING, USUAL
from mimref.data.sources import ImageSource
from mimref.data.statistics import channel_statistics
from mimref.data.transforms import IMAGENET_MEAN, IMAGENET_STD, EvalTransform, PerChannel
from mimref.encoders.backbones import EncoderArchitecture
from mimref.encoders.timm_models import normalisation
from mimref.errors import CheckpointError, ConfigError

_IMAGES = ("spec", "root", "train_limit")
_COLUMNS = ("image", "label")
_UNKNOWN = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "assumed": True}


def resolve_data(data: DataConfig, header: Mapping[str, Any]) -> DataConfig:
    """Return `data` if it names images, else the images that the header records, with the recorded decoding.

    Individual values set by the user override the recorded ones. Raises ConfigError asking for --data when neither
    names images, and for values set by the user that do not fit the recorded ones, CheckpointError when the record is
    not valid.
    """
    recorded = header.get("data") or {}
    keys = DECODING if data.spec is not None else (*_IMAGES, *_COLUMNS, *DECODING)
    missing = [key for key in keys if getattr(data, key) is None]
    if data.spec is not None and not (isinstance(recorded, Mapping) and recorded.keys() & missing):
        return data
    try:
        if not isinstance(recorded, Mapping):
            raise TypeError("not a table")
        known = DataConfig.model_validate({key: recorded[key] for key in missing if key in recorded})
    except (ValidationError, TypeError) as error:
        advice = "pass --data" if data.spec is None else "set data.orientation, data.alpha and data.range"
        raise CheckpointError(f"the checkpoint's record of its data, {recorded!r}, is not valid; {advice}") from error
    if data.spec is None and known.spec is None:
        raise ConfigError(f"no images: pass --data ({ACCEPTED})")
    found = {key: getattr(known, key) for key in missing}
    if data.channels is not None and "alpha" in found:
        found["alpha"] = None  # recorded for colour images
    return completed(data, found)


def shared_data(data: DataConfig, headers: Sequence[Mapping[str, Any]]) -> tuple[DataConfig, list[str]]:
    """Return settings with which several encoders see the same images, and those in which the headers differ.

    What `data` leaves open is what a header records, the first one if they differ; so are the images. Raises UserError
    subclasses like `resolve_data`, but not if nothing names images.
    """
    records = [record if isinstance(record := header.get("data"), Mapping) else {} for header in headers]
    named = next((record for record in records if record.get("spec") is not None), {})
    decoding: dict[str, Any] = {}
    for key in DECODING:
        if (value := next(filter(None, (record.get(key) for record in records)), None)) is not None:
            decoding[key] = value
    if data.channels is not None or "channels" in decoding:
        decoding.pop("alpha", None)  # recorded for colour images
    usual = asdict(USUAL)
    differing = [
        f"data.{key}={value}"
        for key, value in decoding.items()
        if getattr(data, key) is None and any((record.get(key) or usual[key]) != value for record in records)
    ]
    if data.spec is None and not named:
        return data, []
    images = {key: named[key] for key in (*_IMAGES, *_COLUMNS) if key in named}
    return resolve_data(data, {"data": images | decoding}), differing


def completed(data: DataConfig, found: Mapping[str, Any]) -> DataConfig:
    """Return the settings with values that they leave open. Raises ConfigError if both do not fit together."""
    updated = data.model_copy(update=found)
    validated(DataConfig, updated.model_dump())
    return updated


def with_channels(data: DataConfig, architecture: EncoderArchitecture) -> DataConfig:
    """Return the settings, with the encoder's number of channels if that is not 1 or 3 and they do not set any.

    Raises ConfigError if other settings do not fit this number.
    """
    if data.channels is not None or architecture.channels in (1, 3):
        return data
    return completed(data, {"channels": architecture.channels})


def with_statistics(
    data: DataConfig, header: Mapping[str, Any], weights_channels: int | None, sources: Iterable[ImageSource]
) -> DataConfig:
    """Return the settings, with measured `mean` and `std` of `data.channels` if nothing else provides them.

    They may be provided by the user, the header or the weights. weights_channels: channels of the images that the
    weights are for; None: random weights. sources: the first is measured, see `channel_statistics`. Raises ConfigError
    if there is none, DataError for images that cannot be read.
    """
    if data.channels is None or data.mean is not None:
        return data
    recorded = header["transform"].get("mean", ()) if isinstance(header.get("transform"), Mapping) else ()
    known = len(recorded) if recorded else (3 if weights_channels in (1, 3) else 0)
    if known == data.channels or (weights_channels == 1 and data.channels in (1, 3)):
        return data
    source = next(iter(sources), None)
    if source is None:
        raise ConfigError(f"nothing records the mean and std of {data.channels} channels; set data.mean and data.std")
    mean, std = channel_statistics(source)
    return data.model_copy(update={"mean": mean, "std": std})


def records_crop(header: Mapping[str, Any]) -> bool:
    """Return whether a header records the crop of evaluations, and not just how channels are normalised."""
    transform = header.get("transform")
    return isinstance(transform, Mapping) and "crop_fraction" in transform


def data_record(data: DataConfig) -> dict[str, Any]:
    """Return what a header records of the data, for `resolve_data`; folders are absolute paths."""
    recorded = {key: getattr(data, key) for key in _IMAGES}
    optional = (*_COLUMNS, *DECODING)
    recorded |= {key: value for key in optional if (value := getattr(data, key)) is not None}
    if data.decode == "device":
        recorded["decode"] = data.decode  # for information; readers of the weights follow their own settings
    if data.root is not None:
        recorded["root"] = os.path.abspath(os.path.expanduser(data.root))
    if data.spec is not None:
        recorded["spec"] = absolute_spec(data.spec)
    return recorded


def eval_transform(
    architecture: EncoderArchitecture, data: DataConfig, header: Mapping[str, Any], *, resolution: int | None = None
) -> EvalTransform:
    """Return the evaluation transform of an encoder's images, at `resolution` or at the encoder's own.

    Crop fraction: from the settings, else the header, else 0.875; the resizing method likewise. Normalisation: from the
    settings, else the header, else timm's record for tagged weights (`vit_x.tag`), else as the publisher of such
    weights does (`assumed` in the header), else ImageNet's; for gray encoders, its mean over the three channels, as in
    timm's loader. Raises CheckpointError when the header's record is not valid, ConfigError when the normalisation of
    `data.channels` is unknown (see `with_statistics`).
    """
    image_size, channels = architecture.image_size, with_channels(data, architecture).channels
    try:
        saved = {"image_size": image_size, **header.get("transform", _UNKNOWN)}
        if saved.get("assumed") and "." in architecture.name:
            saved |= normalisation(architecture.name)
        recorded = EvalTransform.from_dict(saved)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's record of its transform is not valid: {error}") from error
    mean, std = recorded.mean, recorded.std
    if data.mean is not None and data.std is not None:
        mean, std = data.mean, data.std
    elif architecture.channels == 1:
        mean, std = _same(mean, channels), _same(std, channels)
    if len(mean) not in (1, channels or 3):
        raise ConfigError(
            f"mean and std of {len(mean)} channels are known, but images have {channels or 3}; set data.mean and "
            "data.std"
        )
    fraction = recorded.crop_fraction if data.crop_fraction is None else data.crop_fraction
    return EvalTransform(resolution or image_size, fraction, mean, std, data.resize or recorded.resize)


def _same(values: PerChannel, channels: int | None) -> PerChannel:
    """Replace the channels' values by their mean: gray encoders see the luma of equally normalised pixels."""
    if len(set(values)) > 1:
        values = (sum(values) / len(values),) * len(values)
    return values[:1] if channels == 1 else values
