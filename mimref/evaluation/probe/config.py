"""Settings of `mimref probe`."""

from typing import Literal

from pydantic import Field

from mimref.config.base import Section, Temperatures
from mimref.features.config import EvaluationConfig

LEARNING_RATES = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""The paper's grid (Appendix C.3), for a batch of 256 images. DINOv2's code has 13 rates from 1e-5 to 0.1."""


class ProbeTrainingConfig(Section):
    """How linear classifiers are trained (Appendix C.3)."""

    lr: Temperatures = list(LEARNING_RATES)
    """Base learning rates, times (batch size / 256), of one classifier each."""
    epochs: int = Field(default=50, gt=0)
    """Passes over the training images."""
    batch_size: int | None = Field(default=None, gt=0)
    """Images per update; None: the published 1024, or the power of two that gives few images ten updates per epoch."""
    norm: Literal["none", "batch"] = "none"
    """none: DINOv2's protocol, with the encoder's final norm on every block. batch: the MIM-Refiner release's, with raw
    last four blocks, a BatchNorm on each input and a warm-up."""
    blocks: Literal["both", "last", "last4"] = "both"
    """What classifiers read: the last block, the last four concatenated, or both, with classifiers of their own."""
    select: Literal["test", "val-split"] = "test"
    """Images on which the best classifier is chosen: the test images, as published, or a tenth of the training set."""


class ProbeConfig(EvaluationConfig):
    """All settings of `mimref probe`."""

    command = "probe"
    final_norm: bool = True
    """Apply the encoder's final norm to the last block's output."""
    cached: bool = False
    """Train on cached features of centre crops instead of augmented images."""
    probe: ProbeTrainingConfig = ProbeTrainingConfig()
