"""Settings of the commands that evaluate encoders; `config` holds those of training and what all commands share."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mimref.config import AreaRange, CommandConfig, DecoderConfig, Fraction, Positive, Section

Numbers = Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)]
Temperatures = Annotated[list[Positive], Field(min_length=1)]


class EvaluatedEncoderConfig(Section):
    """What an evaluated encoder's file does not tell."""

    num_heads: int | None = Field(default=None, gt=0)
    """Attention heads; None: those of the published model of the same width, else one per 64 channels."""


class CacheConfig(Section):
    """Where features are kept between commands."""

    folder: str | None = None
    """None: `features` in `$MIMREF_CACHE`, else in the user's cache folder. `off` keeps nothing."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Number format on disk; fp16 halves it."""
    keep_gb: float = Field(default=1.0, ge=0)
    """A pass of the encoder stores every block and both poolings where all of them take no more than this, so that
    later commands need no pass; else only what is asked for."""


class EncoderPassConfig(CommandConfig):
    """Settings of every command that reads features of encoders."""

    encoder: EvaluatedEncoderConfig = EvaluatedEncoderConfig()
    cache: CacheConfig = CacheConfig()
    arch: str | None = None
    """As `encoder.arch`; None: read from the checkpoint."""
    source: str | None = None
    """As `encoder.source`; None: read from the checkpoint."""
    batch_size: int = Field(default=256, gt=0)
    """Images per forward pass."""
    final_norm: bool = False
    """Apply the encoder's final norm to the last block's output."""
    resolution: int | None = Field(default=None, gt=0)
    """Pixels of the centre crop; None: the encoder's image size."""
    pool: Literal["cls", "mean", "cls+mean"] = "cls"
    """The class token, the mean of the patch tokens, or both concatenated."""


class EvaluationConfig(EncoderPassConfig):
    """Settings of every evaluation of one encoder."""

    checkpoint: str = "quickstart"
    """Weights file, a refine output folder, published weights by name, or `quickstart` for the packaged encoder."""
    features: Annotated[tuple[str, str], Field(strict=False)] | None = None
    """Two .npz files of training and validation features (`x`, `y`) to evaluate in place of an encoder's."""
    blocks: str = "last"
    """`last`, `last4` (concatenated), `all` (one by one), or blocks such as `1,5,12` (one by one)."""


class KnnConfig(EvaluationConfig):
    """Everything `mimref knn` can be told."""

    command = "knn"
    k: Numbers = [10]
    """Neighbours that vote; several give one result each."""
    tau: Temperatures = [0.07]
    """Temperatures of the votes; several give one result each."""
    standardize: bool = True
    """Scale every feature by the training images' mean and standard deviation first."""
    per_class: bool = False
    """One result per class as well."""


class LowshotConfig(EvaluationConfig):
    """Everything `mimref lowshot` can be told."""

    command = "lowshot"
    shots: Numbers = [1, 2, 5]
    """Training images per class."""
    splits: int | None = Field(default=None, gt=0)
    """Draws of the training images; None: 3, or 20 from fewer than 10,000 images."""
    split_files: list[str] = []
    """Files with one image file name per line (the format of MSN's splits), in place of draws."""


class ClusterConfig(EvaluationConfig):
    """Everything `mimref cluster` can be told."""

    command = "cluster"
    metrics: Annotated[list[str], Field(min_length=1)] = ["acc", "nmi", "ami", "ari", "sil", "dbs"]
    """Of the clusters: acc, nmi, ami, ari; of the classes: sil (silhouette), dbs (Davies-Bouldin)."""
    runs: int = Field(default=100, gt=0)
    """Mini-batch k-means runs."""
    split: Literal["train", "val"] = "val"
    """Which images."""
    classes: str | None = None
    """Only these classes: names, or a file with one name per line; None: all."""


class ProbeTrainingConfig(Section):
    """How linear classifiers are trained (Appendix C.3)."""

    lr: Temperatures = [0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5]
    """Base learning rates, times (batch size / 256), of one classifier each."""
    epochs: int = Field(default=50, gt=0)
    batch_size: int | None = Field(default=None, gt=0)
    """Images per update; None: the published 1024, or the power of two that gives few images ten updates per epoch."""
    norm: Literal["none", "batch"] = "none"
    """none: DINOv2's protocol. batch: the MIM-Refiner release's, with a BatchNorm on each input and a warm-up."""
    select: Literal["test", "val-split"] = "test"
    """Images on which the best classifier is chosen: the test images, as published, or a tenth of the training set."""


class ProbeConfig(EvaluationConfig):
    """Everything `mimref probe` can be told."""

    command = "probe"
    final_norm: bool = True
    """Apply the encoder's final norm to the last block's output."""
    cached: bool = False
    """Train on cached features of centre crops in place of augmented images."""
    probe: ProbeTrainingConfig = ProbeTrainingConfig()


class ReconstructionConfig(Section):
    """A light decoder on every frozen block: MAE's settings but for what Appendix C.2 changes."""

    epochs: int = Field(default=20, gt=0)
    warmup_epochs: float = Field(default=5, ge=0)
    batch_size: int = Field(default=1024, gt=0)
    """Images per update; all of them where there are fewer."""
    lr: float = Field(default=1.5e-4, gt=0)
    """Base learning rate, times (batch size / 256)."""
    weight_decay: float = Field(default=0.05, ge=0)
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of patches hidden from the encoder."""
    crop_scale: AreaRange = (0.2, 1.0)
    """Area range of the random crop."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    decoder: DecoderConfig = DecoderConfig(depth=2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"reconstruction.warmup_epochs {self.warmup_epochs:g} is more than reconstruction.epochs {self.epochs}"
            )
        return self


class BlocksConfig(EncoderPassConfig):
    """Everything `mimref analyze-blocks` can be told."""

    command = "analyze-blocks"
    checkpoints: Annotated[list[str], Field(min_length=1)] = ["quickstart"]
    """Weights files, run folders or names; several are shown over each other."""
    k: int = Field(default=10, gt=0)
    """Neighbours that vote."""
    tau: float = Field(default=0.07, gt=0)
    """Temperature of the votes."""
    reconstruct: bool = False
    """Train a decoder on every block as well."""
    reconstruction: ReconstructionConfig = ReconstructionConfig()


class CompareConfig(EncoderPassConfig):
    """Everything `mimref compare` can be told."""

    command = "compare"
    base: str
    """Weights file, run folder or name of the encoder that the others are compared with."""
    refined: Annotated[list[str], Field(min_length=1)]
    """The others."""
    protocols: Annotated[list[Literal["knn", "lowshot", "cluster", "probe"]], Field(min_length=1)] = [
        "knn",
        "lowshot",
        "cluster",
    ]
    """What is measured; `probe` is the cached one."""
    k: int = Field(default=10, gt=0)
    tau: float = Field(default=0.07, gt=0)
    shots: Numbers = [1, 2, 5]
    splits: int | None = Field(default=None, gt=0)
    """As of `mimref lowshot`."""
    metrics: Annotated[list[str], Field(min_length=1)] = ["acc", "nmi"]
    """As of `mimref cluster`."""
    runs: int = Field(default=100, gt=0)
    """Mini-batch k-means runs."""
    probe: ProbeTrainingConfig = ProbeTrainingConfig()


class ExtractConfig(EvaluationConfig):
    """Everything `mimref extract` can be told."""

    command = "extract"
    split: Literal["train", "val"] = "val"
    """Which images."""


class InterpolateConfig(CommandConfig):
    """Everything `mimref interpolate` can be told."""

    command = "interpolate"
    encoder: EvaluatedEncoderConfig = EvaluatedEncoderConfig()
    base: str
    """Weights file, or a run's output folder."""
    refined: str
    """Weights file, or a run's output folder, of the same architecture."""
    alpha: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)] = [0.0, 0.25, 0.5, 0.75, 1.0]
    """Shares of the refined weights; one average each."""
