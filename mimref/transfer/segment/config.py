"""Settings of `mimref segment`: those of the paper's protocol, and what other protocols change of them."""

from typing import Any, Literal

from pydantic import Field, model_validator

from mimref.config.base import CommandConfig, Fraction, Positive, PositiveRange, ReadingConfig, Section, Temperatures
from mimref.config.masks import MasksConfig, MosaicsConfig
from mimref.config.presets import merge_tables

Protocol = Literal["paper", "dinov2", "knn"]
Upsampling = Literal["bilinear", "nearest"]
TestMode = Literal["crop", "slide", "full"]
LEARNING_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""The release's reduced grid, for a batch of 256."""


class TrainingConfig(Section):
    """How linear heads are trained on patch tokens."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd: with momentum 0.9 and learning rates times (batch size / 256). adamw: with the learning rates as they
    are."""
    lr: Temperatures = list(LEARNING_RATES)
    """Learning rates, with one head each on every input."""
    block_lr: Positive = 0.1
    """Learning rate with `blocks`, where each block has one head."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of all weights."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """cosine: a linear warm-up, then a cosine to 1e-6. linear: a straight line to 0, times a linear warm-up."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the updates in the warm-up."""
    epochs: int = Field(default=50, gt=0)
    """Passes over the training images."""
    updates: int | None = Field(default=None, gt=0)
    """Number of updates, instead of `epochs`."""
    batch_size: int = Field(default=16, gt=0)
    """Images per update; all of them if there are fewer."""
    affine: bool = False
    """Whether the heads' BatchNorm has a trained scale and shift."""
    upsampling: Upsampling = "bilinear"
    """How classes of patches become classes of pixels. The release's code uses nearest."""


class CropsConfig(Section):
    """Random crops of training images."""

    scale: PositiveRange = (0.5, 2.0)
    """Range of the random resize: the shorter side becomes at most this many times the crop's."""
    longest: Positive = 2.0
    """Before the random resize, the longer side is at most this many times the crop's."""
    most_of_one_class: Fraction = 0.75
    """A crop is drawn again, up to 10 times, while one class has at least this share of its labelled pixels."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    distort_color: bool = False
    """Distort brightness, contrast, saturation and hue."""


class InContextConfig(Section):
    """k-NN on patches."""

    k: int = Field(default=30, gt=0)
    """Patches of training images that vote."""
    tau: Positive = 0.02
    """Temperature of the votes."""
    memory: int = Field(default=500_000, gt=0)
    """Maximum number of patches of training images to search, equally many from every image."""
    standardize: bool = False
    """First scale every feature by its mean and standard deviation over the memory."""


DINOV2_SIZE = 512
"""Pixels of DINOv2's crops and windows."""
CHANGES: dict[str, dict[str, Any]] = {
    "dinov2": {
        "final_norm": True,
        "test": "slide",
        "training": {
            "optimizer": "adamw",
            "lr": [1e-3],
            "block_lr": 1e-3,
            "weight_decay": 1e-4,
            "schedule": "linear",
            "warmup": 1500 / 40_000,
            "updates": 40_000,
            "affine": True,
        },
        "crops": {"longest": 4.0, "distort_color": True},
    },
    "knn": {"final_norm": True},
}
"""What a protocol changes of the defaults."""


class SegmentConfig(CommandConfig):
    """All settings of `mimref segment`. The defaults are those of the paper's protocol."""

    command = "segment"
    checkpoint: str = "quickstart"
    """Weights file, output folder of `mimref refine`, name of published weights, or packaged weights (`quickstart` or
    `peak`)."""
    encoder: ReadingConfig = ReadingConfig()
    arch: str | None = None
    """As `encoder.arch`; None: read from the checkpoint."""
    source: str | None = None
    """As `encoder.source`; None: read from the checkpoint."""
    protocol: Protocol = "paper"
    """paper: 18 linear heads on four blocks. dinov2: one linear head on the last block, at 512 pixels with sliding
    windows. knn: patches vote, without training."""
    blocks: str | None = None
    """`all`, or blocks such as `1,5,12`: each is scored by itself. A first block 0, as in `0,all`, is a baseline of raw
    pixels: those of each patch and the eight around it. None: the protocol's blocks together."""
    final_norm: bool = False
    """Apply the encoder's final norm to the last block's output. dinov2 and knn: true."""
    resolution: int | None = Field(default=None, gt=0)
    """Pixels of crops and windows. None: 512 for dinov2, else the encoder's image size, or twice that for mosaics;
    rounded to a multiple of the patch size."""
    test: TestMode = "crop"
    """crop: the middle square, after resizing the shorter side to `resolution`. slide: the same resize, then windows
    over the whole image, scored at its own size (dinov2). full: windows over images at their own size (the release)."""
    stride: int | None = Field(default=None, gt=0)
    """Pixels from window to window. None: two thirds of a window (341 of 512, as in DINOv2; the release: 170 of
    224)."""
    batch_size: int = Field(default=64, gt=0)
    """Images or windows per pass of the encoder, where nothing is trained."""
    masks: MasksConfig = MasksConfig()
    mosaics: MosaicsConfig = MosaicsConfig()
    training: TrainingConfig = TrainingConfig()
    crops: CropsConfig = CropsConfig()
    knn: InContextConfig = InContextConfig()

    @model_validator(mode="before")
    @classmethod
    def _of_protocol(cls, table: Any) -> Any:
        """The protocol's values where none are given."""
        protocol = table.get("protocol") if isinstance(table, dict) else None
        changes = CHANGES.get(protocol) if isinstance(protocol, str) else None
        if changes is None:
            return table
        merged, training = merge_tables(changes, table), table.get("training")
        if isinstance(training, dict) and "epochs" in training and "updates" not in training:
            # The protocol's number of updates would take precedence.
            merged["training"] = {key: value for key, value in merged["training"].items() if key != "updates"}
        return merged
