"""Settings of `mimref refine`.

Every field carries its unit and source. Block numbers are 1-based. Learning rates are base rates, for a global batch of
256 images.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from mimref.config.base import Decay, Positive, Section
from mimref.config.run import RunConfig, check_warmup
from mimref.refinement.schedule import StageName


def _check_head_blocks(blocks: str) -> str:
    if blocks != "auto" and not re.fullmatch(r"last[1-9]\d*|[1-9]\d*(-[1-9]\d*)?(,[1-9]\d*(-[1-9]\d*)?)*", blocks):
        raise ValueError("blocks such as 17-24, 20,22,24, last8 or auto")
    return blocks


class HeadsConfig(Section):
    """The ensemble of contrastive heads and its queue (Appendix B.2)."""

    blocks: Annotated[str, AfterValidator(_check_head_blocks)] = "last8"
    """Block of every head: `17-24`, `20,22,24` or `last8`. A block may appear several times (temperature sweeps).
    `auto` first scores every block by k-NN accuracy or, without labelled training and validation images, by neighbour
    consistency."""
    temperature: Positive | Annotated[list[Positive], Field(min_length=1)] = 0.2
    """Temperature of the loss: one for all heads, or one per head."""
    projector_hidden: int = Field(default=2048, gt=0)
    """Width of the two hidden layers of a projector."""
    predictor_hidden: int = Field(default=4096, gt=0)
    """Width of the hidden layer of a predictor."""
    output: int = Field(default=256, gt=0)
    """Width of projections, predictions and queue rows."""
    norm: Literal["batch", "layer", "running"] = "batch"
    """Normalisation after every linear layer. `batch`: over the whole batch, as in the paper; in a process group every
    layer waits for all ranks in the forward and backward pass. `running`: with statistics of earlier updates, which
    ranks exchange once per update. `layer`: over the features of each row; ranks exchange nothing."""
    queue_size: int = Field(default=65536, gt=0)
    """Rows of the nearest-neighbour queue."""
    pool: Literal["cls", "mean"] = "cls"
    """Token that the heads read; `mean` is the mean of the patch tokens, also used when there is no CLS token."""


DenseKind = Literal["gram", "cka"]


class LossConfig(Section):
    """Nearest Neighbor Alignment, Eq. (1), and the term added to it."""

    direction: Literal["projection", "prediction"] = "projection"
    """`projection`: softmax over stop-gradient projections for each prediction (Eq. 1). `prediction`: softmax over
    predictions for each projection, as in the released code."""
    swap_negatives: bool = False
    """Also replace negatives by their nearest neighbours, as NNCLR does (Table 1e)."""
    schedule: Literal["constant", "uniform_decay", "staggered_decay", "staggered_step", "one_hot"] = "constant"
    """Loss weight of intermediate heads over stage 2 (Table 1c)."""
    dense: Literal["none"] | DenseKind = "none"
    """Stage 2 term that keeps the patch tokens of the last block with a head close to the base's, on the global views.
    `gram`: mean square difference of the patches' cosine similarities (Gram anchoring, DINOv3). `cka`: 1 - CKA of the
    patches' centred linear kernels (Kornblith et al. 2019). Costs a pass of the base without gradients."""
    dense_weight: float = Field(default=1.0, gt=0)
    """Weight of the dense term, which is added to the loss."""


class HeadsStageConfig(Section):
    """Stage 1: train the heads on the frozen encoder."""

    epochs: int = Field(default=20, ge=0)
    """Passes over the training images."""
    lr: float = Field(default=2e-4, gt=0)
    """Base learning rate, times (batch size / 256)."""
    warmup_epochs: float | None = Field(default=None, ge=0)
    """Epochs of linear warm-up. None: min(4, epochs / 5)."""
    top_k: int = Field(default=1, gt=0)
    """Positives are drawn uniformly from this many nearest neighbours."""
    weight_decay: float = Field(default=1e-5, ge=0)
    """Weight decay of the heads."""
    knn_every_epochs: int = Field(default=0, ge=0)
    """Epochs between k-NN checks of every head's first layer (Appendix E), on the subset of `monitor.knn_samples`; 0
    disables the checks. Needs labels. Each check costs one pass of the encoder over the subset."""


class EncoderStageConfig(Section):
    """Stage 2: train encoder and heads together."""

    epochs: int = Field(default=30, ge=0)
    """Passes over the training images."""
    lr: float = Field(default=4e-4, gt=0)
    """Base learning rate, times (batch size / 256)."""
    warmup_epochs: float | None = Field(default=None, ge=0)
    """Epochs of linear warm-up. None: min(4, epochs / 5)."""
    top_k: int = Field(default=20, gt=0)
    """Positives are drawn uniformly from this many nearest neighbours."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay of the encoder."""
    heads_weight_decay: float = Field(default=1e-5, ge=0)
    """Weight decay of the heads."""
    layer_decay: float = Field(default=0.65, gt=0, le=1)
    """Learning rate factor from one block to the block below (BEiT's counting)."""
    freeze_blocks: int = Field(default=0, ge=0)
    """Number of first blocks to freeze, together with the patch embedding, CLS token and position embedding."""
    ema: Decay = 0.9999
    """Decay per update of the averaged encoder, which becomes the result."""


class RefineConfig(RunConfig):
    """All settings of `mimref refine`."""

    command = "refine"
    path_settings = ("heads_from",)
    micro_batch: Annotated[int, Field(gt=0)] | Literal["auto"] | None = None
    """Images per pass of the encoder. Heads and loss still see whole batches, so the result is the same. None, `auto`:
    the largest part that fits on a GPU; the whole batch on other devices and for sharded weights."""
    activation_checkpointing: bool = False
    """Save only each block's input for the backward pass and recompute the rest: less memory, a third more time."""
    shard: bool = False
    """Shard weights, gradients, moments and averages across the processes (FSDP), for encoders that do not fit on one
    GPU; the result is the same."""
    compile: bool = False
    """Compile encoder blocks and heads with torch.compile: takes minutes at the start, then makes steps faster on
    CUDA."""
    stage: Literal["both", "heads", "encoder"] = "both"
    """Stages to run: `heads` is stage 1, `encoder` is stage 2 and needs `heads_from`."""
    heads_from: str | None = None
    """Output folder of another run; stage 2 starts from its heads and queue."""
    heads: HeadsConfig = HeadsConfig()
    loss: LossConfig = LossConfig()
    heads_stage: HeadsStageConfig = HeadsStageConfig()
    encoder_stage: EncoderStageConfig = EncoderStageConfig()

    @property
    def epochs(self) -> dict[StageName, int]:
        """Epochs of each stage in this run."""
        return {
            "heads": 0 if self.stage == "encoder" else self.heads_stage.epochs,
            "encoder": 0 if self.stage == "heads" else self.encoder_stage.epochs,
        }

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if isinstance(self.micro_batch, int) and self.micro_batch > self.batch_size:
            raise ValueError(f"micro_batch {self.micro_batch} exceeds batch_size {self.batch_size}")
        if self.stage == "encoder" and self.heads_from is None:
            raise ValueError("stage = 'encoder' needs heads_from (--heads-from DIR), a run with trained heads")
        if self.stage != "encoder" and self.heads_from is not None:
            raise ValueError(f"stage = {self.stage!r} trains its own heads; heads_from requires stage = 'encoder'")
        for name, stage in (("heads_stage", self.heads_stage), ("encoder_stage", self.encoder_stage)):
            check_warmup(name, stage.warmup_epochs, stage.epochs)
            # Without a preset, what nothing has set will be derived.
            known = self.preset is not None or "top_k" in stage.model_fields_set
            if known and stage.top_k > self.heads.queue_size:
                raise ValueError(f"{name}.top_k {stage.top_k} exceeds heads.queue_size {self.heads.queue_size}")
        return self
