"""What a checkpoint's header says about data and transform, where the user does not."""

from collections.abc import Mapping
from typing import Any

from mimref.config import DataConfig
from mimref.data.transforms import EvalTransform
from mimref.errors import ConfigError

_RECORDED = ("spec", "root", "train_limit")


def recorded_data(data: DataConfig, header: Mapping[str, Any]) -> DataConfig:
    """`data` as it is when it names images, else with the ones the checkpoint was made with.

    Raises ConfigError asking for --data when neither names any.
    """
    if data.spec is not None:
        return data
    recorded = header.get("data") or {}
    if not recorded.get("spec"):
        raise ConfigError("no images: pass --data (a folder, digits, fashion-mnist or torchvision:NAME)")
    return data.model_copy(update={key: recorded.get(key) for key in _RECORDED})


def data_record(data: DataConfig) -> dict[str, Any]:
    """What a header keeps of the data, for `recorded_data`."""
    return {key: getattr(data, key) for key in _RECORDED}


def eval_transform(
    image_size: int, data: DataConfig, header: Mapping[str, Any], *, resolution: int | None = None
) -> EvalTransform:
    """The evaluation transform: the settings' crop fraction, else the recorded one, else 0.875."""
    recorded = EvalTransform.from_dict(header["transform"]) if "transform" in header else EvalTransform(image_size)
    fraction = recorded.crop_fraction if data.crop_fraction is None else data.crop_fraction
    return EvalTransform(resolution or image_size, fraction, recorded.mean, recorded.std)
