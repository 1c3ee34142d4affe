"""Settings of `mimref probe`."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mimref.config.base import Numbers, Section, Temperatures
from mimref.features.config import EvaluationConfig

LEARNING_RATES = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""The paper's grid (Appendix C.3), for a batch of 256 images. DINOv2's code has 13 rates from 1e-5 to 0.1."""
ATTENTIVE_LEARNING_RATES = (0.1, 0.2, 0.5, 0.7, 1.0, 1.2, 1.5)
"""Of LARS, for a batch of 256 images: the grid of the authors' search (billpsomas/efficient-probing,
search_linprobe.py)."""
ATTENTIVE_ONLY = ("queries", "tokens", "tokens_gb")
"""Settings that the linear probe does not have."""
# What `kind` = "attentive" changes unless it is set (billpsomas/efficient-probing).
_ATTENTIVE = {"lr": list(ATTENTIVE_LEARNING_RATES), "epochs": 90, "norm": "batch", "blocks": "last"}


class ProbeTrainingConfig(Section):
    """How classifiers are trained on frozen features (Appendix C.3; attentive ones: Psomas et al., ICLR 2026)."""

    kind: Literal["linear", "attentive"] = "linear"
    """linear: a linear classifier on pooled tokens. attentive: learned queries pool the patch tokens first (efficient
    probing)."""
    lr: Temperatures = list(LEARNING_RATES)
    """Base learning rates, times (batch size / 256), with one classifier each. Attentive: 0.1, 0.2, 0.5, 0.7, 1, 1.2
    and 1.5 by default, for LARS."""
    epochs: int = Field(default=50, gt=0)
    """Passes over the training images. Attentive: 90 by default."""
    batch_size: int | None = Field(default=None, gt=0)
    """Images per update. None: the published 1024 or, with few images, the power of two that gives ten updates per
    epoch."""
    norm: Literal["none", "batch"] = "none"
    """none: DINOv2's protocol, with the encoder's final norm on every block. batch: the MIM-Refiner release's protocol,
    with the last four blocks raw, a BatchNorm on each input and a warm-up. Attentive: batch, the default, is a
    BatchNorm between pooling and classifier."""
    blocks: Literal["both", "last", "last4"] = "both"
    """What classifiers read: the last block, the last four concatenated, or both, each with its own classifiers.
    Attentive: the last block by default."""
    select: Literal["test", "val-split"] = "test"
    """Images used to choose the best classifier: the test images, as published, or a tenth of the training set."""
    queries: Numbers = [32]
    """Attentive: numbers of queries, each with one classifier per learning rate; each must divide the width."""
    tokens: Literal["patch", "cls+patch", "both"] = "patch"
    """Attentive: tokens that the queries attend to. cls+patch: the CLS token as well, which the authors use for
    encoders that were trained on it. both: separate classifiers for each. Registers are left out."""
    tokens_gb: float = Field(default=10.0, ge=0)
    """Attentive: tokens are cached if they fit in this many GB, in memory if `cache.folder` is `off`; otherwise the
    encoder reads the images again in every epoch."""

    @model_validator(mode="before")
    @classmethod
    def _fit_kind(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("kind") == "attentive":
            return _ATTENTIVE | table
        return table

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.kind == "linear":
            for name in ATTENTIVE_ONLY:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"probe.{name} requires probe.kind = 'attentive'")
        return self


class ProbeConfig(EvaluationConfig):
    """All settings of `mimref probe`."""

    command = "probe"
    unread = {
        "blocks": "set probe.blocks",
        "pool": "linear probes read the CLS token, and it with the mean of the patch tokens; see also probe.tokens",
    }
    final_norm: bool = True
    """Apply the encoder's final norm: to every block's output if `probe.norm` is `none`, else only to the last
    block's."""
    cached: bool = False
    """Train on cached features of centre crops instead of augmented images."""
    probe: ProbeTrainingConfig = ProbeTrainingConfig()
