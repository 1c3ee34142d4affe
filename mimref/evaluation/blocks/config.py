"""Settings of `mimref analyze-blocks`."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from mimref.config.base import AreaRange, Fraction, Section
from mimref.config.run import DecoderConfig, check_warmup
from mimref.features.config import EncoderPassConfig


class ReconstructionConfig(Section):
    """A light decoder on every frozen block: MAE's settings except where Appendix C.2 differs."""

    epochs: int = Field(default=20, gt=0)
    """Passes over the training images."""
    warmup_epochs: float = Field(default=5, ge=0)
    """Epochs of linear warm-up."""
    batch_size: int = Field(default=4096, gt=0)
    """Images per update, as in MAE. If there are fewer images, all of them, with the learning rate scaled to their
    number."""
    micro_batch: int = Field(default=1024, gt=0)
    """Maximum number of images per pass. Gradients are accumulated over the batch: the same result in less memory."""
    lr: float = Field(default=1.5e-4, gt=0)
    """Base learning rate, times (batch size / 256)."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay of the decoders."""
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of patches hidden from the encoder."""
    crop_scale: AreaRange = (0.2, 1.0)
    """Area range of the random crop."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    decoder: DecoderConfig = DecoderConfig(depth=2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_warmup("reconstruction", self.warmup_epochs, self.epochs)
        return self


class BlocksConfig(EncoderPassConfig):
    """All settings of `mimref analyze-blocks`."""

    command = "analyze-blocks"
    checkpoints: Annotated[list[str], Field(min_length=1)] = ["quickstart"]
    """Weights files, run folders or names; several are shown in one figure."""
    k: int = Field(default=10, gt=0)
    """Neighbours that vote."""
    tau: float = Field(default=0.07, gt=0)
    """Temperature of the votes."""
    reconstruct: bool = False
    """Also train a decoder on every block."""
    reconstruction: ReconstructionConfig = ReconstructionConfig()
