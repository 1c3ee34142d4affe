"""What a checkpoint's header says about data and transform, where the user does not."""

import os
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from mimref.config.base import DataConfig
from mimref.data.open import ACCEPTED, absolute_spec
from mimref.data.transforms import EvalTransform
from mimref.encoders.backbones import BackboneArchitecture, recorded_normalization
from mimref.encoders.vit import Architecture
from mimref.errors import CheckpointError, ConfigError

_RECORDED = ("spec", "root", "train_limit")


def recorded_data(data: DataConfig, header: Mapping[str, Any]) -> DataConfig:
    """`data` as it is when it names images, else with the ones the checkpoint was made with.

    Of these the user may still set single values. Raises ConfigError asking for --data when neither names any,
    CheckpointError when the record cannot be read.
    """
    if data.spec is not None:
        return data
    recorded = header.get("data") or {}
    try:
        if not isinstance(recorded, Mapping):
            raise TypeError("not a table")
        known = DataConfig.model_validate({key: recorded[key] for key in _RECORDED if key in recorded})
    except (ValidationError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint's record of its data, {recorded!r}, makes no sense; pass --data"
        ) from error
    if known.spec is None:
        raise ConfigError(f"no images: pass --data ({ACCEPTED})")
    return data.model_copy(update={key: getattr(known, key) for key in _RECORDED if getattr(data, key) is None})


def data_record(data: DataConfig) -> dict[str, Any]:
    """What a header keeps of the data, for `recorded_data`; folders as absolute paths, to be found from anywhere."""
    recorded = {key: getattr(data, key) for key in _RECORDED}
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
    """The evaluation transform of an encoder's images, at the resolution asked for, else at the encoder's own.

    Crop fraction: the settings', else the header's, else 0.875. Normalisation: the header's, else what timm records for
    the weights that a name with a tag stands for, else ImageNet's.
    Raises CheckpointError when the header's record of the transform cannot be read.
    """
    image_size = architecture.image_size
    try:
        if "transform" in header:
            recorded = EvalTransform.from_dict(header["transform"])
        elif "." in architecture.name:
            mean, std = recorded_normalization(architecture.name)
            recorded = EvalTransform(image_size, mean=mean, std=std)
        else:
            recorded = EvalTransform(image_size)
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's record of its transform makes no sense: {error}") from error
    fraction = recorded.crop_fraction if data.crop_fraction is None else data.crop_fraction
    return EvalTransform(resolution or image_size, fraction, recorded.mean, recorded.std)
