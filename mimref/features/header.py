"""Data and transform that a checkpoint's header records, for what the user leaves open."""

import os
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from mimref.config.base import DataConfig
from mimref.data.open import ACCEPTED, absolute_spec
from mimref.data.pixels import DECODING
from mimref.data.transforms import RGB, EvalTransform
from mimref.encoders.backbones import BackboneArchitecture
from mimref.encoders.timm_models import timm_record
from mimref.encoders.vit import Architecture
from mimref.errors import CheckpointError, ConfigError

_IMAGES = ("spec", "root", "train_limit")
_COLUMNS = ("image", "label")


def resolve_data(data: DataConfig, header: Mapping[str, Any]) -> DataConfig:
    """`data` if it names images, else the images that the header records; decoded as the header records.

    Single values that the user sets override the recorded ones. Raises ConfigError asking for --data when neither names
    images, CheckpointError when the record cannot be read.
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
    return data.model_copy(update={key: getattr(known, key) for key in missing})


def data_record(data: DataConfig) -> dict[str, Any]:
    """What a header records of the data, for `resolve_data`; folders as absolute paths."""
    recorded = {key: getattr(data, key) for key in _IMAGES}
    optional = (*_COLUMNS, *DECODING)
    recorded |= {key: value for key in optional if (value := getattr(data, key)) is not None}
    if data.root is not None:
        recorded["root"] = os.path.abspath(os.path.expanduser(data.root))
    if data.spec is not None:
        recorded["spec"] = absolute_spec(data.spec)
    return recorded


def eval_transform(
    architecture: Architecture | BackboneArchitecture,
    data: DataConfig,
    header: Mapping[str, Any],
    *,
    resolution: int | None = None,
) -> EvalTransform:
    """The evaluation transform of an encoder's images, at `resolution` or at the encoder's own.

    Crop fraction: from the settings, else the header, else 0.875; the way of resizing likewise. Normalisation: from the
    header, else timm's record for tagged weights (`vit_x.tag`), else ImageNet's; for gray encoders the mean of those of
    the three channels, as timm's loader does. Raises CheckpointError when the header's record is not valid.
    """
    image_size = architecture.image_size
    try:
        if "transform" in header:
            recorded = EvalTransform.from_dict(header["transform"])
        elif "." in architecture.name:
            timms = timm_record(architecture.name)
            recorded = EvalTransform(image_size, mean=timms.mean, std=timms.std)
        else:
            recorded = EvalTransform(image_size)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's record of its transform is not valid: {error}") from error
    mean, std = recorded.mean, recorded.std
    if isinstance(architecture, Architecture) and architecture.channels == 1:
        mean, std = _same(mean), _same(std)
    fraction = recorded.crop_fraction if data.crop_fraction is None else data.crop_fraction
    return EvalTransform(resolution or image_size, fraction, mean, std, data.resize or recorded.resize)


def _same(values: RGB) -> RGB:
    """The mean of the three for each of them: gray encoders see the luma of pixels normalised alike."""
    if len(set(values)) == 1:
        return values
    mean = sum(values) / 3
    return mean, mean, mean
