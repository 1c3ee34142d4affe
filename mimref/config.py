"""Settings of every command, as strict models; `recipes` fills them from presets and the command line.

Every field carries its unit and source. Block numbers are 1-based. Learning rates are base rates, for a global batch of
256 images.
"""

import re
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _check_ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("a range whose first number is not above its second")
    return pair


def _check_head_blocks(blocks: str) -> str:
    if blocks != "auto" and not re.fullmatch(r"last[1-9]\d*|[1-9]\d*(-[1-9]\d*)?(,[1-9]\d*(-[1-9]\d*)?)*", blocks):
        raise ValueError("blocks such as 17-24, 20,22,24, last8 or auto")
    return blocks


# The message of a ValueError in a field's validator completes "expected ...".
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Hue = Annotated[float, Field(ge=0, le=0.5)]
Decay = Annotated[float, Field(ge=0, lt=1)]
AreaRange = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]],
    Field(strict=False),
    AfterValidator(_check_ordered),
]
PositiveRange = Annotated[tuple[Positive, Positive], Field(strict=False), AfterValidator(_check_ordered)]
Probabilities = Annotated[tuple[Fraction, Fraction, Fraction], Field(strict=False)]
HeadBlocks = Annotated[str, AfterValidator(_check_head_blocks)]


class Section(BaseModel):
    """One strict, immutable table of settings: unknown keys and wrong types are errors."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _read_none(cls, table: Any) -> Any:
        # TOML has no null: the word `none` stands for it where a field can be without a value.
        if not isinstance(table, dict):
            return table
        optional = {name for name, field in cls.model_fields.items() if type(None) in get_args(field.annotation)}
        return {key: None if value == "none" and key in optional else value for key, value in table.items()}


class EncoderConfig(Section):
    """Which encoder, and where its weights come from."""

    arch: str = "vit_l16"
    """`vit_b16`, `vit_l16`, `vit_h14`, `vit_2b14`, a timm name of a VisionTransformer, or `custom` (sizes below)."""
    source: str = "mae"
    """Pre-training method of the weights; `d2v2` selects the post-norm transformer."""
    weights: str | None = None
    """Weights file, or `quickstart` for the packaged encoder. None starts from random weights (`pretrain` only)."""
    image_size: int = Field(default=224, gt=0)
    """Pixels, height and width, of the images the position embedding is made for."""
    width: int | None = Field(default=None, gt=0)
    """Token width of a `custom` encoder."""
    depth: int | None = Field(default=None, gt=0)
    """Number of blocks of a `custom` encoder."""
    num_heads: int | None = Field(default=None, gt=0)
    """Attention heads of a `custom` encoder, and of weights of an unusual width, which do not tell it."""
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


class DataConfig(Section):
    """Which images."""

    spec: str | None = None
    """A folder, `digits`, `fashion-mnist`, `torchvision:NAME`, `list:FILE` (a .csv or .parquet table of paths),
    `hf:FOLDER` (a Hugging Face data set on disk) or `wds:SHARDS` (webdataset tar files)."""
    root: str | None = None
    """Folder of the data set's files, for specs that name a data set."""
    download: bool = False
    """Let torchvision download the data set."""
    max_bad: int = Field(default=100, ge=0)
    """Unreadable images that are skipped and reported; one more stops the run."""
    train_limit: int | None = Field(default=None, gt=0)
    """Use only the first N training images (of a fixed, class-balanced order for labelled data)."""
    crop_fraction: float | None = Field(default=None, gt=0, le=1)
    """Evaluation: centre crop over resized shorter side; None: the checkpoint header's, else 0.875 (224 / 256)."""


class ViewsConfig(Section):
    """Multi-crop views (BYOL colour settings, Table 10)."""

    global_size: int | None = Field(default=None, gt=0)
    """Pixels of the two global views; None is the encoder's image size."""
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
    """Colour jitter, grayscale and solarize on or off (Table 1f)."""
    blur: bool = True
    """Gaussian blur on or off (Table 1f)."""
    jitter: Annotated[tuple[Fraction, Fraction, Fraction, Hue], Field(strict=False)] = (0.4, 0.4, 0.2, 0.1)
    """Strength of brightness, contrast, saturation and hue jitter."""
    jitter_probability: Fraction = 0.8
    gray_probability: Fraction = 0.2
    solarize_probability: Probabilities = (0.0, 0.2, 0.0)
    """For global view 0, global view 1 and local views; threshold 128 of 255."""
    blur_probability: Probabilities = (1.0, 0.1, 0.5)
    """For global view 0, global view 1 and local views."""
    blur_sigma: PositiveRange = (0.1, 2.0)
    """Standard deviation of the blur in pixels, drawn uniformly."""


class HeadsConfig(Section):
    """The ensemble of contrastive heads and its queue (Appendix B.2)."""

    blocks: HeadBlocks = "last8"
    """Block of every head: `17-24`, `20,22,24` or `last8`. A block may appear several times (temperature sweeps).
    `auto` measures the k-NN accuracy of every block first (needs labels)."""
    temperature: Positive | Annotated[list[Positive], Field(min_length=1)] = 0.2
    """One for all heads, or one per head."""
    projector_hidden: int = Field(default=2048, gt=0)
    predictor_hidden: int = Field(default=4096, gt=0)
    output: int = Field(default=256, gt=0)
    """Width of projections, predictions and queue rows."""
    queue_size: int = Field(default=65536, gt=0)
    """Rows of the nearest-neighbour queue."""
    pool: Literal["cls", "mean"] = "cls"
    """Token the heads read; `mean` is the mean of the patch tokens, also used when there is no CLS token."""


class LossConfig(Section):
    """Nearest Neighbor Alignment, Eq. (1)."""

    direction: Literal["projection", "prediction"] = "projection"
    """Softmax over stop-gradient projections for each prediction (Eq. 1), or over predictions for each projection."""
    swap_negatives: bool = False
    """Replace negatives by their nearest neighbours too, as NNCLR does (Table 1e)."""
    schedule: Literal["constant", "uniform_decay", "staggered_decay", "staggered_step", "one_hot"] = "constant"
    """Loss weight of intermediate heads over stage 2 (Table 1c)."""


def _check_warmup(section: str, warmup_epochs: float | None, epochs: int) -> None:
    if warmup_epochs is not None and 0 < epochs < warmup_epochs:
        raise ValueError(f"{section}.warmup_epochs {warmup_epochs:g} is more than {section}.epochs {epochs}")


class HeadsStageConfig(Section):
    """Stage 1: heads are trained on the frozen encoder."""

    epochs: int = Field(default=20, ge=0)
    lr: float = Field(default=2e-4, gt=0)
    """Base learning rate, times (batch size / 256)."""
    warmup_epochs: float | None = Field(default=None, ge=0)
    """None: min(4, epochs / 5)."""
    top_k: int = Field(default=1, gt=0)
    """Positives are drawn uniformly from this many nearest neighbours."""
    weight_decay: float = Field(default=1e-5, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_warmup("heads_stage", self.warmup_epochs, self.epochs)
        return self


class EncoderStageConfig(Section):
    """Stage 2: encoder and heads are trained together."""

    epochs: int = Field(default=30, ge=0)
    lr: float = Field(default=4e-4, gt=0)
    """Base learning rate, times (batch size / 256)."""
    warmup_epochs: float | None = Field(default=None, ge=0)
    """None: min(4, epochs / 5)."""
    top_k: int = Field(default=20, gt=0)
    """Positives are drawn uniformly from this many nearest neighbours."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Of the encoder."""
    heads_weight_decay: float = Field(default=1e-5, ge=0)
    layer_decay: float = Field(default=0.65, gt=0, le=1)
    """Learning rate factor from one block to the block below (BEiT's counting)."""
    freeze_blocks: int = Field(default=0, ge=0)
    """Freeze this many first blocks, and with them patch embedding, CLS token and positions."""
    ema: Decay = 0.9999
    """Decay per update of the averaged encoder, which is the result."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_warmup("encoder_stage", self.warmup_epochs, self.epochs)
        return self


class OptimizerConfig(Section):
    """AdamW."""

    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.95)
    clip_grad: float | None = Field(default=None, gt=0)
    """Largest norm of the whole gradient; None does not clip."""
    end_lr: float = Field(default=1e-6, ge=0)
    """Absolute learning rate the cosine ends at, before layer-wise scales."""


class MonitorConfig(Section):
    """What a run tells about itself."""

    log_every: int = Field(default=20, gt=0)
    """Steps between lines of metrics.jsonl."""
    knn_every_epochs: int = Field(default=1, ge=0)
    """Epochs between k-NN checks of the encoder on a fixed subset; 0 never checks."""
    trackers: list[Literal["tensorboard", "wandb"]] = []
    """Where metrics are sent besides metrics.jsonl; each needs the extra of its name."""
    knn_samples: int = Field(default=10_000, gt=0)
    """Most images in the k-NN check's memory; a quarter as many are classified."""


class EvaluateConfig(Section):
    """The before/after table."""

    enabled: bool = True
    knn_k: int = Field(default=10, gt=0)
    knn_tau: float = Field(default=0.07, gt=0)
    shots: int = Field(default=1, gt=0)
    """Training images per class of the low-shot logistic regression."""
    splits: int = Field(default=3, gt=0)
    """Draws of the low-shot training images."""
    cluster_runs: int = Field(default=100, gt=0)
    """Mini-batch k-means runs; the best by inertia counts."""


class CommandConfig(Section):
    """Settings that every command has."""

    command: ClassVar[str]
    """Name on the command line, and folder of the command's presets."""

    preset: str | None = None
    """Name of the preset the settings came from."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 elsewhere."""
    workers: int | None = Field(default=None, ge=0)
    """Loader processes; None: 0 for images in memory, else one per core that this process may use, at most 16.

    torchrun's processes on one machine share its cores.
    """
    data: DataConfig = DataConfig()


class RunConfig(CommandConfig):
    """Settings that every training command has."""

    batch_size: int = Field(default=1024, gt=1)
    """Images per update, over all processes."""
    encoder: EncoderConfig = EncoderConfig()
    views: ViewsConfig = ViewsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    monitor: MonitorConfig = MonitorConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


class RefineConfig(RunConfig):
    """Everything `mimref refine` can be told."""

    command = "refine"
    micro_batch: Annotated[int, Field(gt=0)] | Literal["auto"] | None = None
    """Images per pass of the encoder; the result is that of whole batches, which heads and loss still see. `auto` finds
    the largest that fits the GPU's memory; None encodes a batch at once."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, a third more time."""
    compile: bool = False
    """Compile encoder blocks and heads by torch.compile: minutes at the start, then faster steps on CUDA."""
    stage: Literal["both", "heads", "encoder"] = "both"
    """`encoder` needs `heads_from`."""
    heads_from: str | None = None
    """Output folder of another run, whose stage 1 heads and queue are taken over."""
    heads: HeadsConfig = HeadsConfig()
    loss: LossConfig = LossConfig()
    heads_stage: HeadsStageConfig = HeadsStageConfig()
    encoder_stage: EncoderStageConfig = EncoderStageConfig()

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if isinstance(self.micro_batch, int) and self.micro_batch > self.batch_size:
            raise ValueError(f"micro_batch {self.micro_batch} is more than the {self.batch_size} images of batch_size")
        if self.stage == "encoder" and self.heads_from is None:
            raise ValueError("stage = 'encoder' needs heads_from (--heads-from DIR): a run whose heads are trained")
        if self.stage != "encoder" and self.heads_from is not None:
            raise ValueError(f"stage = {self.stage!r} trains heads of its own; heads_from goes with stage = 'encoder'")
        for name, top_k in (("heads_stage", self.heads_stage.top_k), ("encoder_stage", self.encoder_stage.top_k)):
            if top_k > self.heads.queue_size:
                raise ValueError(f"{name}.top_k {top_k} is more than the {self.heads.queue_size} of heads.queue_size")
        return self


class DecoderConfig(Section):
    """The masked autoencoder's decoder."""

    width: int = Field(default=512, gt=0)
    depth: int = Field(default=8, gt=0)
    num_heads: int = Field(default=16, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(f"mae.decoder.width {self.width} must be a multiple of num_heads {self.num_heads}")
        return self


class MAEConfig(Section):
    """Masked-autoencoder objective and schedule."""

    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of patches hidden from the encoder."""
    crop_scale: AreaRange = (0.2, 1.0)
    """Area range of the random crop."""
    epochs: int = Field(default=800, gt=0)
    warmup_epochs: float = Field(default=40, ge=0)
    lr: float = Field(default=1.5e-4, gt=0)
    """Base learning rate, times (batch size / 256)."""
    weight_decay: float = Field(default=0.05, ge=0)
    decoder: DecoderConfig = DecoderConfig()
    save_dtype: Literal["fp32", "fp16"] = "fp32"
    """Number format of encoder.safetensors; fp16 halves the file."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_warmup("mae", self.warmup_epochs, self.epochs)
        return self


class PretrainConfig(RunConfig):
    """Everything `mimref pretrain` can be told."""

    command = "pretrain"
    mae: MAEConfig = MAEConfig()


def dump_config(config: CommandConfig) -> str:
    """The settings as TOML text that `recipes.load_config` reads back to an equal config; unset keys are left out."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))
