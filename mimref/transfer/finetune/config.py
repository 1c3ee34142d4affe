"""Settings of `mimref finetune` and `mimref predict`."""

from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from mimref.config.base import AreaRange, CommandConfig, Decay, Fraction, PositiveRange, Section
from mimref.config.run import LogConfig, OptimizerConfig, TrainingConfig


def _check_rand_augment(text: str) -> str:
    from timm.data.auto_augment import rand_augment_transform  # slow to import

    wrong = ValueError("a RandAugment of timm such as rand-m9-mstd0.5-inc1, or none")
    try:
        # Older timm would change its defaults if it were given no options.
        found: Any = rand_augment_transform(text, {"img_mean": (0, 0, 0)})
    except (AssertionError, ValueError, KeyError, TypeError, IndexError):
        raise wrong from None
    # With weights, no operation is drawn twice.
    most = float("inf") if found.choice_weights is None else np.count_nonzero(found.choice_weights)
    if not 1 <= found.num_layers <= most:
        raise wrong
    return text


class AugmentConfig(Section):
    """Augmentation of training images; the defaults, which a recipe replaces, are MAE's for fine-tuning."""

    resize: int | None = Field(default=None, gt=0)
    """Pixels of the shorter side before the random crop. None: crops are cut from the image as it is."""
    crop_scale: AreaRange = (0.08, 1.0)
    """Area range of the random crop."""
    aspect_ratio: PositiveRange = (3 / 4, 4 / 3)
    """Width over height of the crop, drawn log-uniformly; if no crop fits, the largest one within this range."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    rand_augment: Annotated[str, AfterValidator(_check_rand_augment)] | None = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment."""
    erase: Fraction = 0.25
    """Probability of filling a random rectangle with noise."""
    mixup: float = Field(default=0.8, ge=0)
    """Parameter of mixup's Beta distribution; 0 disables mixup."""
    cutmix: float = Field(default=1.0, ge=0)
    """Parameter of CutMix's Beta distribution; 0 disables CutMix. If both are above 0, each batch draws one of them."""
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of each label that is spread over all classes."""


class ScheduleConfig(Section):
    """What is trained, how long and how fast; the defaults, which a recipe replaces, are MAE's for ViT-L."""

    epochs: int = Field(default=50, gt=0)
    """Passes over the training images."""
    warmup_epochs: float = Field(default=5, ge=0)
    """Epochs of linear warm-up."""
    lr: float = Field(default=1e-3, gt=0)
    """Base learning rate, times (batch size / 256)."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay of matrices; vectors, tokens and positions have none."""
    layer_decay: float = Field(default=0.75, gt=0, le=1)
    """Learning rate factor from one block to the block before it."""
    drop_path: float = Field(default=0.2, ge=0, lt=1)
    """Stochastic depth of the last block; it rises from 0 at the first block."""
    freeze_blocks: int = Field(default=0, ge=0)
    """Number of first blocks to freeze, together with the embeddings before them."""
    train_positions: bool = True
    """Train the position embedding, even if pre-training kept it fixed. Frozen blocks freeze it."""
    pool: Literal["cls", "mean"] = "cls"
    """What the classifier reads: the CLS token, or the mean of the patch tokens (also for encoders without a CLS
    token)."""
    ema: Decay | None = None
    """Decay of an average of the weights; this average is then evaluated and written. None: the weights themselves
    are."""


class ValidationConfig(LogConfig):
    """What a fine-tuning logs about itself."""

    validate_every_epochs: int = Field(default=1, gt=0)
    """Epochs between classifications of the validation images; the last epoch always ends with one."""


class AdamConfig(OptimizerConfig):
    """AdamW as fine-tuning uses it."""

    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    """Decay rates of the first and second moments."""
    end_lr: float = Field(default=0.0, ge=0)
    """Absolute learning rate at the end of the cosine, before layer-wise scales."""


class FinetuneConfig(TrainingConfig):
    """All settings of `mimref finetune`."""

    command = "finetune"
    path_settings: ClassVar[tuple[str, ...]] = ("split_files",)

    micro_batch: int | None = Field(default=None, gt=0)
    """Images per pass of the model in each process; gradients add up to those of the whole batch. None: all at once."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of storing its activations."""
    shard: bool = False
    """Shard weights, gradients, moments and averages across the processes (FSDP), for encoders that do not fit on one
    GPU; the result is the same."""
    resolution: int | None = Field(default=None, gt=0)
    """Pixels per side of the images. None: the encoder's own."""
    shots: int | None = Field(default=None, gt=0)
    """Train on this many images per class. None: on all."""
    splits: int = Field(default=3, gt=0)
    """Random draws of the `shots`, each trained on separately."""
    all_if_fewer: bool = False
    """Use all images of a class that has fewer than `shots`, as for iNat18. False: such a class is an error."""
    split_files: list[str] = []
    """Files with one image file name per line, each trained on separately."""
    finetune: ScheduleConfig = ScheduleConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: AdamConfig = AdamConfig()
    monitor: ValidationConfig = ValidationConfig()

    @model_validator(mode="after")
    def _check_splits(self) -> Self:
        if self.shots is not None and self.split_files:
            raise ValueError("shots and split_files both choose the training images; set one of them")
        return self


class PredictConfig(CommandConfig):
    """All settings of `mimref predict`."""

    command = "predict"
    checkpoint: str = ""
    """A file that `mimref finetune` wrote, or its folder."""
    split: Literal["train", "val"] = "val"
    """Images of a data set to classify; a folder of images without classes has one split."""
    resolution: int | None = Field(default=None, gt=0)
    """Pixels per side of the images. None: as in fine-tuning."""
