"""A refinement before anything is trained: encoder, heads, sizes, steps, and whether they fit each other."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from mimref.config.run import EncoderConfig
from mimref.data.loader import check_batch_size
from mimref.data.open import open_source
from mimref.data.sources import ImageSource
from mimref.data.transforms import EvalTransform
from mimref.data.views import multi_crop
from mimref.devices import resolve_device, resolve_precision
from mimref.encoders.checkpoints import Checkpoint, load_weights, read_checkpoint, with_fixed_positions
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
class Plan:
    """A refinement: settings, the weights to refine and the images. `make_plan` checks that they fit."""

    config: RefineConfig
    """With encoder and data filled in from the checkpoint's header."""
    checkpoint: Checkpoint
    architecture: Architecture
    transform: EvalTransform
    source: ImageSource
    """The training images."""
    warnings: list[str]
    """About settings that have no effect."""

    @cached_property
    def blocks(self) -> list[int]:
        """Block of every head, 1-based."""
        return head_blocks(self.config.heads.blocks, self.architecture.depth)

    @cached_property
    def temperature(self) -> list[float]:
        """Of every head."""
        return temperatures(self.config.heads.temperature, len(self.blocks))

    @property
    def notices(self) -> list[str]:
        """What was assumed or changed to read the weights, one line each."""
        size = self.architecture.image_size
        return self.checkpoint.notices(
            self.architecture, [size, *(group.size for group in multi_crop(self.config.views, size))]
        )

    @property
    def steps_per_epoch(self) -> int:
        """Updates per epoch; the last partial batch is dropped."""
        return len(self.source) // self.config.batch_size

    @property
    def heads_steps(self) -> int:
        """Updates of stage 1 in this run."""
        return 0 if self.config.stage == "encoder" else self.config.heads_stage.epochs * self.steps_per_epoch

    @property
    def encoder_steps(self) -> int:
        """Updates of stage 2 in this run."""
        return 0 if self.config.stage == "heads" else self.config.encoder_stage.epochs * self.steps_per_epoch


def make_plan(config: RefineConfig, progress: LabelledProgress | None = None) -> Plan:
    """Check the settings against the weights and the images. Raises UserError subclasses.

    Nothing is written but a copy of published weights, whose download is reported to `progress`.
    """
    plan = _open(config, progress)
    if plan.config.heads.blocks == "auto":
        heads = plan.config.heads.model_copy(update={"blocks": _measured_blocks(plan, progress)})
        plan = replace(plan, config=plan.config.model_copy(update={"heads": heads}))
    config = plan.config
    temperatures(config.heads.temperature, len(plan.blocks))
    _check_heads(config, plan.blocks)
    check_sizes(config, plan.architecture)
    _check_counts(config, len(plan.source))
    if not plan.heads_steps and not plan.encoder_steps:
        raise ConfigError(
            f"nothing to train: heads_stage.epochs is {config.heads_stage.epochs} and encoder_stage.epochs "
            f"{config.encoder_stage.epochs} with stage = {config.stage!r}; set at least one stage's epochs"
        )
    return plan


def _open(config: RefineConfig, progress: LabelledProgress | None) -> Plan:
    """Read the weights that the settings name, and find the training images."""
    weights = config.encoder.weights or official_name(config.encoder.arch, config.encoder.source)
    checkpoint = read_checkpoint(
        weights, num_heads=config.encoder.num_heads, interpolation=config.encoder.interpolation, progress=progress
    )
    architecture = architecture_to_train(config.encoder, checkpoint)
    data = resolve_data(config.data, checkpoint.header)
    warnings = _warnings(config.encoder, checkpoint)
    config = config.model_copy(update={"data": data, "encoder": _resolved(config.encoder, checkpoint, architecture)})
    transform = eval_transform(architecture, data, checkpoint.header)
    return Plan(config, checkpoint, architecture, transform, open_source(data, "train", progress=progress), warnings)


def _measured_blocks(plan: Plan, progress: LabelledProgress | None) -> str:
    """Blocks for `heads.blocks = "auto"`, from the k-NN accuracy of every block of the base encoder.

    Measured on the monitor's subset of the images (`monitor.knn_samples`), on the features that heads would read;
    `mimref analyze-blocks` shows the curve. Raises ConfigError without labels.
    """
    config, device = plan.config, resolve_device(plan.config.device)
    precision, problems = resolve_precision(config.precision, device), list[str]()
    monitor = KnnMonitor(config, plan.source, plan.transform, device, precision, note=problems.append)
    if monitor.test is None:
        raise ConfigError(
            "heads.blocks 'auto' measures k-NN and needs labelled training and validation images; name blocks, such as "
            f"last8{''.join(f' ({problem})' for problem in problems)}"
        )
    depth = plan.architecture.depth
    groups = [columns_of([block], config.heads.pool, True, depth) for block in range(1, depth + 1)]
    train, test = monitor.features(base_encoder(plan, device), [column for columns in groups for column in columns])
    assert test is not None
    accuracies = []
    for done, columns in enumerate(groups, 1):
        accuracies.append(monitor.knn_top1(train.matrix(columns), train.y, test.matrix(columns), test.y))
        if progress is not None:
            progress("k-NN of every block", done, depth)
    return blocks_text(recommend_heads(accuracies))


def base_encoder(plan: Plan, device: torch.device) -> Encoder:
    """The encoder with the weights to refine, in evaluation mode."""
    with torch.device("meta"):
        encoder = build_encoder(plan.architecture)
    load_weights(encoder, plan.checkpoint, share=device.type != "cpu")
    return encoder.to(device).eval()


def architecture_to_train(config: EncoderConfig, checkpoint: Checkpoint) -> Architecture:
    """The architecture of the weights at the image size of the settings; the settings' own where weights name none.

    Unlike an evaluation's `--arch`, settings that contradict the weights are ignored: presets serve any weights.
    """
    recorded, asked = checkpoint.architecture, config.model_fields_set
    if recorded is None and "arch" not in asked:
        raise CheckpointError(f"{checkpoint.path}: {checkpoint.problem}; pass --arch")
    if recorded is None or _is_timm(config, checkpoint):
        return with_fixed_positions(Architecture.from_config(config), checkpoint.tensors)
    # A preset's image size belongs to the preset's architecture.
    if "image_size" in asked and ("arch" not in asked or config.arch == recorded.name):
        return replace(recorded, image_size=config.image_size)
    return recorded


def _is_timm(config: EncoderConfig, checkpoint: Checkpoint) -> bool:
    """Whether weights without a header are read as the timm model that the settings name."""
    named = "arch" in config.model_fields_set and config.arch not in (*PAPER_SIZES, "custom")
    return named and checkpoint.recognised is not None


def _warnings(config: EncoderConfig, checkpoint: Checkpoint) -> list[str]:
    recorded, path, warnings = checkpoint.architecture, checkpoint.path, list[str]()
    if recorded is None or _is_timm(config, checkpoint):
        return warnings
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


def _check_heads(config: RefineConfig, blocks: list[int]) -> None:
    frozen, schedule = config.encoder_stage.freeze_blocks, config.loss.schedule
    if frozen >= max(blocks):
        raise ConfigError(
            f"encoder_stage.freeze_blocks {frozen} leaves nothing to refine: the last head reads block {max(blocks)}"
        )
    if schedule != "constant" and len(blocks) < 2:
        raise ConfigError(f"loss.schedule {schedule!r} needs at least two heads; heads.blocks names one")
    if schedule != "constant" and blocks != sorted(set(blocks)):
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
