"""Data and transform that a checkpoint's header records, for what the user leaves open."""

import os
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from mimref.config.base import DataConfig
from mimref.data.open import ACCEPTED, absolute_spec
from mimref.data.transforms import EvalTransform
from mimref.encoders.backbones import BackboneArchitecture, timm_record
from mimref.encoders.vit import Architecture
from mimref.errors import CheckpointError, ConfigError

_RECORDED = ("spec", "root", "train_limit")
_RECORDED_IF_SET = ("image", "label")


def resolve_data(data: DataConfig, header: Mapping[str, Any]) -> DataConfig:
    """`data` unchanged if it names images, else the images that the header records.

    Single values that the user sets override the recorded ones. Raises ConfigError asking for --data when neither names
    images, CheckpointError when the record cannot be read.
    """
    if data.spec is not None:
        return data
    recorded = header.get("data") or {}
    try:
        if not isinstance(recorded, Mapping):
            raise TypeError("not a table")
        keys = (*_RECORDED, *_RECORDED_IF_SET)
        known = DataConfig.model_validate({key: recorded[key] for key in keys if key in recorded})
    except (ValidationError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint's record of its data, {recorded!r}, is not valid; pass --data"
        ) from error
    if known.spec is None:
        raise ConfigError(f"no images: pass --data ({ACCEPTED})")
    return data.model_copy(update={key: getattr(known, key) for key in keys if getattr(data, key) is None})


def data_record(data: DataConfig) -> dict[str, Any]:
    """What a header records of the data, for `resolve_data`; folders as absolute paths."""
    recorded = {key: getattr(data, key) for key in _RECORDED}
    recorded |= {key: getattr(data, key) for key in _RECORDED_IF_SET if getattr(data, key) is not None}
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

    Crop fraction: from the settings, else the header, else 0.875. Normalisation: from the header, else timm's record
    for tagged weights (`vit_x.tag`), else ImageNet's. Raises CheckpointError when the header's record is not valid.
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
    fraction = recorded.crop_fraction if data.crop_fraction is None else data.crop_fraction
    return EvalTransform(resolution or image_size, fraction, recorded.mean, recorded.std)
