"""Settings of `mimref pretrain`."""

from typing import Literal

from pydantic import Field

from mimref.config.base import AreaRange, Section
from mimref.config.run import DecoderConfig, RunConfig


class MAEConfig(Section):
    """Masked-autoencoder objective and schedule; the defaults, which a recipe replaces, are MAE's for ImageNet."""

    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of patches hidden from the encoder."""
    crop_scale: AreaRange = (0.2, 1.0)
    """Area range of the random crop."""
    epochs: int = Field(default=800, gt=0)
    """Passes over the training images."""
    warmup_epochs: float = Field(default=40, ge=0)
    """Epochs of linear warm-up."""
    lr: float = Field(default=1.5e-4, gt=0)
    """Base learning rate, times (batch size / 256)."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Of encoder and decoder."""
    decoder: DecoderConfig = DecoderConfig()
    save_dtype: Literal["fp32", "fp16"] = "fp32"
    """Number format of encoder.safetensors; fp16 halves the file."""


class PretrainConfig(RunConfig):
    """All settings of `mimref pretrain`."""

    command = "pretrain"
    mae: MAEConfig = MAEConfig()
