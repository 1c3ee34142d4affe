"""Settings that several protocols share, and those of `mimref compare` and `mimref interpolate`."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from mimref.config.base import CommandConfig, Numbers, ReadingConfig
from mimref.evaluation.probe.config import ProbeTrainingConfig
from mimref.features.config import EncoderPassConfig


class CompareConfig(EncoderPassConfig):
    """All settings of `mimref compare`."""

    command = "compare"
    base: str
    """Weights file, run folder or name of the encoder that the others are compared with."""
    refined: Annotated[list[str], Field(min_length=1)]
    """Weights files, run folders or names of the encoders to compare with `base`."""
    protocols: Annotated[list[Literal["knn", "lowshot", "cluster", "probe"]], Field(min_length=1)] = [
        "knn",
        "lowshot",
        "cluster",
    ]
    """Protocols to run; `probe` is the cached probe."""
    k: int = Field(default=10, gt=0)
    """Neighbours that vote."""
    tau: float = Field(default=0.07, gt=0)
    """Temperature of the votes."""
    shots: Numbers = [1, 2, 5]
    """Training images per class."""
    splits: int | None = Field(default=None, gt=0)
    """As in `mimref lowshot`."""
    metrics: Annotated[list[str], Field(min_length=1)] = ["acc", "nmi"]
    """As in `mimref cluster`."""
    runs: int = Field(default=100, gt=0)
    """Mini-batch k-means runs."""
    probe: ProbeTrainingConfig = ProbeTrainingConfig()

    @model_validator(mode="after")
    def _check_probe(self) -> Self:
        if self.probe.kind != "linear":
            raise ValueError("probe.kind = 'attentive': compare trains linear probes; run mimref probe per encoder")
        return self


class InterpolateConfig(CommandConfig):
    """All settings of `mimref interpolate`."""

    command = "interpolate"
    encoder: ReadingConfig = ReadingConfig()
    arch: str | None = None
    """As `encoder.arch`; None: read from the checkpoints."""
    source: str | None = None
    """As `encoder.source`; None: read from the checkpoints."""
    base: str
    """Weights file, or a run's output folder."""
    refined: str
    """Weights file, or a run's output folder, of the same architecture."""
    alpha: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)] = [0.0, 0.25, 0.5, 0.75, 1.0]
    """Shares of the refined weights; one average each."""
    choose: Literal["knn", "assess"] | None = None
    """Write only the best average. `knn`: by accuracy on a fifth of the training images, held out from the others.
    `assess`: without labels, by the measure that `mimref assess` ranks by, on training images. Of equal averages, the
    first is chosen. None: all averages are written."""

    @field_validator("alpha")
    @classmethod
    def _check_alpha(cls, alpha: list[float]) -> list[float]:
        names = [f"{each:g}" for each in alpha]  # of the files
        if len(set(names)) < len(names):
            raise ValueError("each value once, with at most six digits")
        return alpha
