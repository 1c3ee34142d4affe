"""What a refinement will be before anything is trained: encoder, heads, sizes, steps, and whether they fit."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from mimref.config.run import EncoderConfig
from mimref.data.loader import check_batch_size
from mimref.data.open import open_source
from mimref.data.sources import ImageSource
from mimref.data.transforms import EvalTransform
from mimref.encoders.checkpoints import Checkpoint, encoder_from, read_checkpoint, with_fixed_positions
from mimref.encoders.published import official_name
from mimref.encoders.vit import PAPER_SIZES, Architecture
from mimref.errors import CheckpointError, ConfigError
from mimref.features.header import eval_transform, resolve_data
from mimref.progress import LabelledProgress
from mimref.refinement.auto import recommended_blocks
from mimref.refinement.config import RefineConfig
from mimref.refinement.heads import Heads, head_blocks
from mimref.refinement.memory import state_bytes


@dataclass(frozen=True)
class Plan:
    """A checked refinement: settings that fit the weights and the images."""

    config: RefineConfig
    """With encoder and data filled in from the checkpoint's header."""
    checkpoint: Checkpoint
    architecture: Architecture
    transform: EvalTransform
    source: ImageSource
    blocks: list[int]
    """Block of every head, 1-based."""
    temperature: list[float]
    """Of every head."""
    warnings: list[str]
    """What the settings say in vain."""

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

    Nothing is written but a copy of published weights, of whose download `progress` is told.
    """
    weights = config.encoder.weights or official_name(config.encoder.arch, config.encoder.source)
    checkpoint = read_checkpoint(weights, num_heads=config.encoder.num_heads, progress=progress)
    architecture = architecture_to_train(config.encoder, checkpoint)
    data = resolve_data(config.data, checkpoint.header)
    warned = _warnings(config.encoder, checkpoint)
    config = config.model_copy(update={"data": data, "encoder": _resolved(config.encoder, checkpoint, architecture)})
    transform = eval_transform(architecture, data, checkpoint.header)
    source_images = open_source(data, "train", progress=progress)
    if config.heads.blocks == "auto":
        chosen = recommended_blocks(config, checkpoint, architecture, transform, source_images, progress)
        config = config.model_copy(update={"heads": config.heads.model_copy(update={"blocks": chosen})})
    blocks = head_blocks(config.heads.blocks, architecture.depth)
    temperature = temperatures(config.heads.temperature, len(blocks))
    _check_schedule(config, blocks)
    _check_frozen(config, blocks)
    check_sizes(config, architecture)
    _check_counts(config, len(source_images))
    plan = Plan(config, checkpoint, architecture, transform, source_images, blocks, temperature, warned)
    if not plan.heads_steps and not plan.encoder_steps:
        raise ConfigError(
            f"nothing to train: heads_stage.epochs is {config.heads_stage.epochs} and encoder_stage.epochs "
            f"{config.encoder_stage.epochs} with stage = {config.stage!r}; give at least one stage an epoch"
        )
    return plan


def architecture_to_train(config: EncoderConfig, checkpoint: Checkpoint) -> Architecture:
    """What the weights say they are, at the image size asked for; else what the settings say.

    Unlike an evaluation's `--arch`, settings that contradict the weights give way: a preset has them for all weights.
    """
    recorded = checkpoint.architecture
    if recorded is None and "arch" not in config.model_fields_set:
        raise CheckpointError(f"{checkpoint.path}: {checkpoint.problem}; pass --arch")
    if recorded is None or (checkpoint.recognised and _names_timm(config)):
        return with_fixed_positions(Architecture.from_config(config), checkpoint.tensors)
    # A preset's image size belongs to the preset's architecture.
    belongs = "arch" not in config.model_fields_set or config.arch == recorded.name
    if belongs and "image_size" in config.model_fields_set:
        return replace(recorded, image_size=config.image_size)
    return recorded


def _names_timm(config: EncoderConfig) -> bool:
    """Whether the settings name a timm model, whose files are then taken for that model's."""
    return "arch" in config.model_fields_set and config.arch not in (*PAPER_SIZES, "custom")


def _warnings(config: EncoderConfig, checkpoint: Checkpoint) -> list[str]:
    recorded, path = checkpoint.architecture, checkpoint.path
    if recorded is None or (checkpoint.recognised and _names_timm(config)):
        return []
    warned = []
    if "arch" in config.model_fields_set and config.arch not in (recorded.name, "custom"):
        warned.append(
            f"encoder.arch {config.arch} is passed over: {path} holds {recorded.name} with {recorded.depth} blocks of "
            f"width {recorded.width} for images of {recorded.image_size} pixels"
        )
    asked = "source" in config.model_fields_set and checkpoint.recognised
    if asked and checkpoint.source not in (None, config.source):
        warned.append(f"encoder.source {config.source} is passed over: {path} is of {checkpoint.source}")
    return warned


def _resolved(config: EncoderConfig, checkpoint: Checkpoint, architecture: Architecture) -> EncoderConfig:
    """The settings that name the encoder as it is, so that config.toml does."""
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
    """Raise ConfigError for views, in pixels per side, that cannot be cut into patches, or local larger than global."""
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
            f"loss.schedule {schedule!r} goes from the earliest head to the last; "
            f"heads.blocks {config.heads.blocks!r} must name each block once, in rising order"
        )


def _check_counts(config: RefineConfig, images: int) -> None:
    check_batch_size(config.batch_size, images)
    queue = config.heads.queue_size
    if queue > max(images, config.batch_size):
        raise ConfigError(
            f"heads.queue_size {queue} is larger than the {images} training images, so that every image would stand in "
            f"the queue several times; set heads.queue_size={images} or less"
        )
    most = max(config.heads_stage.top_k, config.encoder_stage.top_k)
    # A queue reaches over three epochs at most, so up to three of its rows are a sample's own and left out.
    if most > queue - 3:
        raise ConfigError(
            f"top_k {most} needs a heads.queue_size of at least {most + 3}, not {queue}: "
            "an image's own entries are not among its neighbours"
        )


def describe(plan: Plan) -> dict[str, str]:
    """Facts of a dry run, label to text: sizes, parameters, steps and memory that does not depend on activations.

    Raises CheckpointError when the weights do not fit.
    """
    config, architecture = plan.config, plan.architecture
    encoder = encoder_from(plan.checkpoint, architecture)
    with torch.device("meta"):
        heads = Heads(config.heads, len(plan.blocks), encoder.embed_dim)
    encoder_count = sum(parameter.numel() for parameter in encoder.parameters())
    heads_count = sum(parameter.numel() for parameter in heads.parameters())
    state = state_bytes(config, architecture, plan.blocks, "encoder" if plan.encoder_steps else "heads")
    mebibytes = state.total / 2**20
    memory = f"{mebibytes / 1024:.2f} GiB" if mebibytes >= 1024 else f"{mebibytes:.1f} MiB"
    views = 2 + config.views.local_views
    facts = {
        "encoder": f"{architecture.name}, {architecture.depth} blocks of width {architecture.width}, "
        f"{'post' if architecture.post_norm else 'pre'}-norm, {encoder_count:,} parameters",
        "weights": str(plan.checkpoint.path),
        "heads": f"{len(plan.blocks)} at blocks {', '.join(map(str, plan.blocks))}, {heads_count:,} parameters",
        "images": f"{len(plan.source):,} of {plan.source.name}, {views} views each, batches of {config.batch_size}",
        "steps": f"{plan.heads_steps:,} (heads), then {plan.encoder_steps:,} (encoder and heads)",
        "memory": f"{memory} in float32 for weights, optimizer, average and queue, activations not counted",
    }
    notices = plan.checkpoint.notices(architecture)
    if notices:
        facts["notice"] = "; ".join(notices)
    return facts | ({"warning": "; ".join(plan.warnings)} if plan.warnings else {})


def header_of(plan: Plan) -> dict[str, Any]:
    """What the result's header says beside the architecture: where the weights came from and how they were refined."""
    source = plan.config.encoder.source
    header: dict[str, Any] = {"source": f"{source} refined" if plan.encoder_steps else source}
    if plan.checkpoint.licence:
        header["licence"] = plan.checkpoint.licence
    return header
