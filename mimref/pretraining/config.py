"""Settings of `mimref pretrain`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mimref.config.base import AreaRange, Section
from mimref.config.run import DecoderConfig, RunConfig, ViewsConfig

Objective = Literal["mae", "simmim"]
_VIEWS = ("flip", "aspect_ratio")
"""Settings of views that apply to the crops of masked image modelling."""


class MaskingConfig(Section):
    """Masks, crops and schedule, which both objectives share."""

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
    """Weight decay of encoder and decoder."""
    save_dtype: Literal["fp32", "fp16"] = "fp32"
    """Number format of encoder.safetensors; fp16 halves the file."""


class MAEConfig(MaskingConfig):
    """Masked-autoencoder objective and schedule; the defaults, which a recipe replaces, are MAE's for ImageNet."""

    decoder: DecoderConfig = DecoderConfig()


class SimMIMConfig(MaskingConfig):
    """Mask tokens in the encoder; the defaults, which a recipe replaces, are SimMIM's for ViT-B on ImageNet."""

    mask_ratio: float = Field(default=0.6, gt=0, lt=1)
    """Share of patches that the encoder sees as mask tokens."""
    mask_size: int = Field(default=2, gt=0)
    """Side of the hidden squares, in patches: hidden patches lie together. SimMIM's 32 pixels are 2 patches of 16."""
    crop_scale: AreaRange = (0.67, 1.0)
    """Area range of the random crop."""
    warmup_epochs: float = Field(default=10.0, ge=0)
    """Epochs of linear warm-up."""
    lr: float = Field(default=5e-5, gt=0)
    """Base learning rate, times (batch size / 256)."""


class PretrainConfig(RunConfig):
    """All settings of `mimref pretrain`."""

    command = "pretrain"
    objective: Objective = "mae"
    """`mae`: the encoder sees only the visible patches, and a decoder reconstructs the hidden ones. `simmim`: the
    encoder sees mask tokens in place of the hidden patches, and one linear layer reconstructs them."""
    mae: MAEConfig = MAEConfig()
    simmim: SimMIMConfig = SimMIMConfig()

    @property
    def masking(self) -> MaskingConfig:
        """The section of the objective."""
        return self.mae if self.objective == "mae" else self.simmim

    @model_validator(mode="after")
    def _check_views(self) -> Self:
        default = ViewsConfig()
        fields = [name for name in ViewsConfig.model_fields if name not in _VIEWS]
        if idle := [f"views.{name}" for name in fields if getattr(self.views, name) != getattr(default, name)]:
            raise ValueError(
                f"{', '.join(idle)}: no effect in pretrain, which reads only {' and '.join(_VIEWS)} of views; omit "
                f"{'it' if len(idle) == 1 else 'them'}"
            )
        return self

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        other = "simmim" if self.objective == "mae" else "mae"
        given, default = getattr(self, other), type(self).model_fields[other].default
        idle = [name for name in type(given).model_fields if getattr(given, name) != getattr(default, name)]
        if idle:
            if self.preset is not None:
                raise ValueError(
                    f"preset {self.preset} does not fit objective {self.objective!r}: it sets {other}.{idle[0]}; "
                    "omit one of the two"
                )
            names = ", ".join(f"{other}.{name}" for name in idle)
            raise ValueError(f"{names}: no effect with objective {self.objective!r}, whose section is {self.objective}")
        return self
