"""A refinement before anything is trained: encoder, heads, sizes, steps, and whether they fit each other."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from mimref.config.run import EncoderConfig
from mimref.data.loader import check_batch_size
from mimref.data.open import open_source
from mimref.data.sources import ImageSource
from mimref.data.transforms import EvalTransform
from mimref.devices import resolve_device, resolve_precision
from mimref.encoders.checkpoints import Checkpoint, load_weights, read_checkpoint, with_channels, with_fixed_positions
from mimref.encoders.published import official_name
from mimref.encoders.vit import PAPER_SIZES, Architecture, Encoder, build_encoder
from mimref.errors import CheckpointError, ConfigError
from mimref.evaluation.blocks.statistics import blocks_text, recommend_heads
from mimref.evaluation.monitor import KnnMonitor
from mimref.features.encode import columns_of
from mimref.features.header import eval_transform, resolve_data
from mimref.progress import LabelledProgress
from mimref.refinement.config import RefineConfig
from mimref.refinement.heads import head_blocks


@dataclass(frozen=True)
class Base:
    """What is refined: the encoder's weights and the images."""

    config: RefineConfig
    """With encoder and data filled in from the checkpoint's header."""
    checkpoint: Checkpoint
    architecture: Architecture
    transform: EvalTransform
    source: ImageSource
    """The training images."""
    warnings: list[str]
    """About settings that have no effect."""


@dataclass(frozen=True)
class Plan(Base):
    """A checked refinement: settings that fit the weights and the images."""

    blocks: list[int]
    """Block of every head, 1-based."""
    temperature: list[float]
    """Of every head."""

    @property
    def steps_per_epoch(self) -> int:
        """Updates per epoch; the last partial batch is dropped."""
        return len(self.source) // self.config.batch_size

    @property
    def heads_steps(self) -> int:
        """Updates of stage 1 in this run."""
        trained = self.config.stage != "encoder" and self.config.heads_from is None
        return self.config.heads_stage.epochs * self.steps_per_epoch if trained else 0

    @property
    def encoder_steps(self) -> int:
        """Updates of stage 2 in this run."""
        return 0 if self.config.stage == "heads" else self.config.encoder_stage.epochs * self.steps_per_epoch


def make_plan(config: RefineConfig, progress: LabelledProgress | None = None) -> Plan:
    """Check the settings against the weights and the images. Raises UserError subclasses.

    Nothing is written but a copy of published weights, whose download is reported to `progress`.
    """
    base = open_base(config, progress)
    if base.config.heads.blocks == "auto":
        heads = base.config.heads.model_copy(update={"blocks": measure_blocks(base, progress)})
        base = replace(base, config=base.config.model_copy(update={"heads": heads}))
    config = base.config
    blocks = head_blocks(config.heads.blocks, base.architecture.depth)
    temperature = temperatures(config.heads.temperature, len(blocks))
    _check_schedule(config, blocks)
    _check_frozen(config, blocks)
    check_sizes(config, base.architecture)
    _check_counts(config, len(base.source))
    plan = Plan(**vars(base), blocks=blocks, temperature=temperature)
    if not plan.heads_steps and not plan.encoder_steps:
        raise ConfigError(
            f"nothing to train: heads_stage.epochs is {config.heads_stage.epochs} and encoder_stage.epochs "
            f"{config.encoder_stage.epochs} with stage = {config.stage!r}; set at least one stage's epochs"
        )
    return plan


def open_base(config: RefineConfig, progress: LabelledProgress | None = None) -> Base:
    """Read the weights that the settings name, and find the training images."""
    weights = config.encoder.weights or official_name(config.encoder.arch, config.encoder.source)
    checkpoint = read_checkpoint(
        weights,
        num_heads=config.encoder.num_heads,
        part=config.encoder.part,
        grid=config.encoder.grid,
        progress=progress,
    )
    architecture = architecture_to_train(config.encoder, checkpoint)
    data = resolve_data(config.data, checkpoint.header)
    warnings = _warnings(config.encoder, checkpoint)
    config = config.model_copy(update={"data": data, "encoder": _resolved(config.encoder, checkpoint, architecture)})
    transform = eval_transform(architecture, data, checkpoint.header)
    return Base(config, checkpoint, architecture, transform, open_source(data, "train", progress=progress), warnings)


def measure_blocks(base: Base, progress: LabelledProgress | None = None) -> str:
    """Blocks for `heads.blocks = "auto"`, from the k-NN accuracy of every block of the base encoder.

    Measured on the monitor's subset of the images (`monitor.knn_samples`), on the features that heads would read;
    `mimref analyze-blocks` shows the curve. Raises ConfigError without labels.
    """
    config, device = base.config, resolve_device(base.config.device)
    precision, problems = resolve_precision(config.precision, device), list[str]()
    monitor = KnnMonitor(config, base.source, base.transform, device, precision, note=problems.append)
    if monitor.test is None:
        raise ConfigError(
            "heads.blocks 'auto' measures k-NN and needs labelled training and validation images; name blocks, such as "
            f"last8{''.join(f' ({problem})' for problem in problems)}"
        )
    depth = base.architecture.depth
    groups = [columns_of([block], config.heads.pool, True, depth) for block in range(1, depth + 1)]
    encoder = base_encoder(base, device)
    train, test = monitor.features(encoder, [column for columns in groups for column in columns])
    assert test is not None
    accuracies = []
    for done, columns in enumerate(groups, 1):
        accuracies.append(monitor.knn_top1(train.matrix(columns), train.y, test.matrix(columns), test.y))
        if progress is not None:
            progress("k-NN of every block", done, depth)
    return blocks_text(recommend_heads(accuracies))


def base_encoder(base: Base, device: torch.device) -> Encoder:
    """The encoder with the weights to refine, in evaluation mode."""
    with torch.device("meta"):
        encoder = build_encoder(base.architecture)
    load_weights(encoder, base.checkpoint, share=device.type != "cpu")
    return encoder.to(device).eval()


def architecture_to_train(config: EncoderConfig, checkpoint: Checkpoint) -> Architecture:
    """The architecture of the weights at the image size of the settings; the settings' own where weights name none.

    Unlike an evaluation's `--arch`, settings that contradict the weights are ignored: presets serve any weights.
    """
    recorded = checkpoint.architecture
    # Without advice, no architecture helps: several encoders and no choice, or a part of the weights.
    if recorded is None and not ("arch" in config.model_fields_set and checkpoint.advice):
        raise CheckpointError(f"{checkpoint.path}: {checkpoint.problem}{checkpoint.advice}")
    if recorded is None or (checkpoint.recognised and _names_timm(config)):
        tensors = checkpoint.recognised.tensors if checkpoint.recognised else checkpoint.tensors
        return with_channels(with_fixed_positions(Architecture.from_config(config), tensors), checkpoint)
    # A preset's image size belongs to the preset's architecture.
    belongs = "arch" not in config.model_fields_set or config.arch == recorded.name
    if belongs and "image_size" in config.model_fields_set:
        return replace(recorded, image_size=config.image_size)
    return recorded


def _names_timm(config: EncoderConfig) -> bool:
    """Whether the settings name a timm model; files are then read as that model's."""
    return "arch" in config.model_fields_set and config.arch not in (*PAPER_SIZES, "custom")


def _warnings(config: EncoderConfig, checkpoint: Checkpoint) -> list[str]:
    recorded, path = checkpoint.architecture, checkpoint.path
    if recorded is None or (checkpoint.recognised and _names_timm(config)):
        return []
    warnings = []
    if "arch" in config.model_fields_set and config.arch not in (recorded.name, "custom"):
        warnings.append(
            f"encoder.arch {config.arch} is ignored: {path} holds {recorded.name} with {recorded.depth} blocks of "
            f"width {recorded.width} for images of {recorded.image_size} pixels"
        )
    asked = "source" in config.model_fields_set and checkpoint.recognised
    if asked and checkpoint.source not in (None, config.source):
        warnings.append(f"encoder.source {config.source} is ignored: {path} is of {checkpoint.source}")
    return warnings


def _resolved(config: EncoderConfig, checkpoint: Checkpoint, architecture: Architecture) -> EncoderConfig:
    """Settings that name the encoder as it is, for config.toml."""
    custom = architecture.name == "custom"
    sizes = ("width", "depth", "num_heads", "patch_size")
    return config.model_copy(
        update={
            "arch": architecture.name,
            "source": checkpoint.source or config.source,
            "image_size": architecture.image_size,
            **{name: getattr(architecture, name) if custom else None for name in sizes},
        }
    )


def temperatures(temperature: float | list[float], num_heads: int) -> list[float]:
    """The temperature of every head. Raises ConfigError for a list of another length."""
    if not isinstance(temperature, list):
        return [temperature] * num_heads
    if len(temperature) != num_heads:
        raise ConfigError(f"heads.temperature has {len(temperature)} values for {num_heads} heads (heads.blocks)")
    return temperature


def check_sizes(config: RefineConfig, architecture: Architecture) -> None:
    """Raise ConfigError for views that cannot be cut into patches, and for local views larger than the global ones."""
    views = config.views
    global_size = views.global_size or architecture.image_size
    architecture.check_size(global_size, "encoder.image_size" if views.global_size is None else "views.global_size")
    if views.local_views:
        architecture.check_size(views.local_size, "views.local_size")
        if views.local_size > global_size:
            raise ConfigError(
                f"views.local_size {views.local_size} is larger than the global views of {global_size} pixels; "
                "local views show less of an image: set views.local_size, or views.local_views=0"
            )


def _check_frozen(config: RefineConfig, blocks: list[int]) -> None:
    frozen = config.encoder_stage.freeze_blocks
    if frozen >= max(blocks):
        raise ConfigError(
            f"encoder_stage.freeze_blocks {frozen} leaves nothing to refine: the last head reads block {max(blocks)}"
        )


def _check_schedule(config: RefineConfig, blocks: list[int]) -> None:
    schedule = config.loss.schedule
    if schedule == "constant":
        return
    if len(blocks) < 2:
        raise ConfigError(f"loss.schedule {schedule!r} needs at least two heads; heads.blocks names one")
    if any(block >= following for block, following in pairwise(blocks)):
        raise ConfigError(
            f"loss.schedule {schedule!r} runs from the earliest head to the last; "
            f"heads.blocks {config.heads.blocks!r} must name each block once, in ascending order"
        )


def _check_counts(config: RefineConfig, images: int) -> None:
    check_batch_size(config.batch_size, images)
    queue = config.heads.queue_size
    if queue > max(images, config.batch_size):
        raise ConfigError(
            f"heads.queue_size {queue} exceeds the {images} training images, so every image would be in the queue "
            f"several times; set heads.queue_size={images} or less"
        )
    most = max(config.heads_stage.top_k, config.encoder_stage.top_k)
    # A queue spans at most three epochs, so up to three of its rows are a sample's own and excluded.
    if most > queue - 3:
        raise ConfigError(
            f"top_k {most} needs a heads.queue_size of at least {most + 3}, not {queue}: "
            "an image's own entries are not among its neighbours"
        )


def header_of(plan: Plan) -> dict[str, Any]:
    """The result's header beside the architecture: where the weights came from, and that they were refined."""
    source = plan.config.encoder.source
    header: dict[str, Any] = {"source": f"{source} refined" if plan.encoder_steps else source}
    if plan.checkpoint.licence:
        header["licence"] = plan.checkpoint.licence
    return header
