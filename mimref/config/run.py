"""Settings of training: encoder, views, optimizer, monitoring.

Every field carries its unit and source. Learning rates are base rates, for a global batch of 256 images.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mimref.config.base import (
    AreaRange,
    CommandConfig,
    Decay,
    Fraction,
    Hue,
    PositiveRange,
    Probabilities,
    ReadingConfig,
    Section,
)
from mimref.errors import ConfigError


class EncoderConfig(ReadingConfig):
    """Which encoder, and where its weights come from."""

    arch: str = "vit_l16"
    """`vit_b16`, `vit_l16`, `vit_h14`, `vit_2b14`, a timm name, or `custom` (sizes below)."""
    source: str | None = None
    """Pre-training method of the weights; `d2v2` selects the post-norm transformer. None: read from the file; without
    `weights`, the published weights of `mae`."""
    weights: str | None = None
    """Weights file, run folder, name of published weights, or packaged weights (`quickstart` or `peak`). None: the
    published weights of `arch` and `source`, or random weights (`pretrain`)."""
    image_size: int = Field(default=224, gt=0)
    """Height and width in pixels of the images that the position embedding is for."""
    width: int | None = Field(default=None, gt=0)
    """Token width of a `custom` encoder."""
    depth: int | None = Field(default=None, gt=0)
    """Number of blocks of a `custom` encoder."""
    patch_size: int | None = Field(default=None, gt=0)
    """Pixels per patch side of a `custom` encoder."""

    @model_validator(mode="after")
    def _check_custom(self) -> Self:
        if self.arch != "custom":
            return self
        missing = [n for n in ("width", "depth", "num_heads", "patch_size") if getattr(self, n) is None]
        if missing:
            names = ", ".join(f"encoder.{name}" for name in missing)
            raise ValueError(f"encoder.arch = 'custom' needs {names}")
        if self.width is not None and self.num_heads is not None and self.width % self.num_heads:
            raise ValueError(f"encoder.width {self.width} must be a multiple of encoder.num_heads {self.num_heads}")
        return self


class ViewsConfig(Section):
    """Multi-crop views (BYOL colour settings, Table 10)."""

    global_size: int | None = Field(default=None, gt=0)
    """Pixels of the two global views. None: the encoder's image size."""
    global_scale: AreaRange = (0.25, 1.0)
    """Area range of a global crop."""
    local_views: int = Field(default=10, ge=0)
    """Number of local views; with 0 the paper uses a global scale of [0.08, 1]."""
    local_size: int = Field(default=96, gt=0)
    """Pixels of the local views (96 for patch 16, 98 for patch 14)."""
    local_scale: AreaRange = (0.05, 0.25)
    """Area range of a local crop."""
    aspect_ratio: PositiveRange = (3 / 4, 4 / 3)
    """Width over height of a crop, drawn log-uniformly."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    color: bool = True
    """Colour jitter, grayscale and solarization on or off (Table 1f)."""
    blur: bool = True
    """Gaussian blur on or off (Table 1f)."""
    jitter: Annotated[tuple[Fraction, Fraction, Fraction, Hue], Field(strict=False)] = (0.4, 0.4, 0.2, 0.1)
    """Strength of brightness, contrast, saturation and hue jitter."""
    jitter_probability: Fraction = 0.8
    """Probability of jitter."""
    gray_probability: Fraction = 0.2
    """Probability of grayscale."""
    solarize_probability: Probabilities = (0.0, 0.2, 0.0)
    """Probability of solarization in global view 0, global view 1 and local views; the threshold is 128 of 255."""
    blur_probability: Probabilities = (1.0, 0.1, 0.5)
    """Probability of blur in global view 0, global view 1 and local views."""
    blur_sigma: PositiveRange = (0.1, 2.0)
    """Standard deviation of the blur in pixels, drawn uniformly."""


def check_warmup(section: str, warmup_epochs: float | None, epochs: int) -> None:
    if warmup_epochs is not None and 0 < epochs < warmup_epochs:
        raise ValueError(f"{section}.warmup_epochs {warmup_epochs:g} exceeds {section}.epochs {epochs}")


def refuse_warmup(section: str, warmup_epochs: float, epochs: int) -> None:
    """Raise ConfigError for a warm-up longer than the training, of settings that could have been adapted."""
    try:
        check_warmup(section, warmup_epochs, epochs)
    except ValueError as error:
        raise ConfigError(str(error)) from None


class OptimizerConfig(Section):
    """AdamW."""

    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the first and second moments."""
    clip_grad: float | None = Field(default=None, gt=0)
    """Maximum norm of the whole gradient. None: no clipping."""
    end_lr: float = Field(default=1e-6, ge=0)
    """Absolute learning rate at the end of the cosine, before layer-wise scales."""


class LogConfig(Section):
    """What a run logs about itself."""

    log_every: int = Field(default=20, gt=0)
    """Steps between lines of metrics.jsonl."""
    trackers: list[Literal["tensorboard", "wandb"]] = []
    """Where metrics go besides metrics.jsonl; each needs the extra of the same name."""


class MonitorConfig(LogConfig):
    """What a run without a classifier logs about itself."""

    knn_every_epochs: int = Field(default=1, ge=0)
    """Epochs between k-NN checks of the encoder on a fixed subset; 0 disables the checks."""
    knn_samples: int = Field(default=10_000, gt=0)
    """Maximum number of training images in the k-NN check; a quarter as many validation images are classified."""
    view_samples: int = Field(default=1000, ge=0)
    """Maximum number of training images in the k-NN check whose two augmented views are compared; 0 compares none."""


class EvaluateConfig(Section):
    """The before/after table."""

    enabled: bool = True
    """Evaluate at the end of the run."""
    knn_k: int = Field(default=10, gt=0)
    """Neighbours that vote."""
    knn_tau: float = Field(default=0.07, gt=0)
    """Temperature of the votes."""
    shots: int = Field(default=1, gt=0)
    """Training images per class of the low-shot logistic regression."""
    splits: int = Field(default=3, gt=0)
    """Random draws of the low-shot training images."""
    cluster_runs: int = Field(default=100, gt=0)
    """Mini-batch k-means runs; the one with the lowest inertia counts."""
    exhibits: bool = True
    """Save small images for the report: maps, nearest neighbours, confusions and clusters."""


class TrainingConfig(CommandConfig):
    """Settings of every training command."""

    path_settings: ClassVar[tuple[str, ...]] = ()
    """Settings besides those of data and encoder whose values are paths, or lists of them."""

    strict: bool = False
    """Refuse a preset that cannot fit the encoder or the images. Otherwise it is adapted, with a notice for every
    changed value."""
    batch_size: int = Field(default=1024, gt=1)
    """Images per update, over all processes."""
    encoder: EncoderConfig = EncoderConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    monitor: LogConfig = LogConfig()


class RunConfig(TrainingConfig):
    """Settings of training without labels."""

    device_decoding = True
    views: ViewsConfig = ViewsConfig()
    monitor: MonitorConfig = MonitorConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


class DecoderConfig(Section):
    """The masked autoencoder's decoder."""

    width: int = Field(default=512, gt=0)
    """Token width."""
    depth: int = Field(default=8, gt=0)
    """Number of blocks."""
    num_heads: int = Field(default=16, gt=0)
    """Attention heads."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % 4:
            raise ValueError(f"width {self.width} is not divisible by 4, as sin-cos positions need")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} must be a multiple of num_heads {self.num_heads}")
        return self
