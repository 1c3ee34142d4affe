"""Planning a refinement before anything is trained: encoder, heads, sizes, steps, and whether they fit together."""

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from mimref.config.recipe import Derived
from mimref.data.loader import check_batch_size
from mimref.data.sources import ImageSource
from mimref.data.transforms import EvalTransform
from mimref.data.views import CropGroup, check_colors, multi_crop
from mimref.devices import resolve_device, resolve_precision
from mimref.encoders.backbones import EncoderArchitecture, TokenEncoder, check_checkpointing, patch_shapes
from mimref.encoders.checkpoints import Checkpoint, encoder_from
from mimref.encoders.parameters import check_layers
from mimref.encoders.settings import ignored_settings, resolved_settings
from mimref.errors import CheckpointError, Checks, ConfigError, DataError
from mimref.evaluation.assess.measures import DEFAULT, goodness
from mimref.evaluation.assess.verdicts import NAMES
from mimref.evaluation.blocks.statistics import blocks_text, recommend_heads
from mimref.evaluation.monitor import KnnMonitor
from mimref.features.encode import Column, columns_of
from mimref.features.header import eval_transform, records_crop
from mimref.features.opening import check_device, open_training, without_limit
from mimref.progress import LabelledProgress
from mimref.refinement.config import LossConfig, RefineConfig
from mimref.refinement.heads import head_blocks
from mimref.refinement.recipe import LEAST_QUEUE, average_decay, fit, last_third, with_counts

# Images whose views choose the blocks of heads if there are no labels and `monitor.view_samples` is 0.
UNLABELLED_IMAGES = 1000
# Share of the base's weights in the result above which an average is called slow: the paper's presets keep up to 8%.
_KEPT_SHARE = 0.1
_WITHOUT_LABELS = f"by the {NAMES[DEFAULT]} of every block"


@dataclass(frozen=True)
class Plan:
    """A refinement: settings, the weights to refine and the images. `make_plan` checks that they fit."""

    config: RefineConfig
    """The settings, with encoder and data filled in from the checkpoint's header."""
    checkpoint: Checkpoint
    architecture: EncoderArchitecture
    transform: EvalTransform
    source: ImageSource
    """The training images."""
    warnings: list[str]
    """Warnings about settings that have no effect, or too much of one."""
    derived: list[Derived] = field(default_factory=list)
    """Settings that were derived from encoder and images, or adapted from a preset."""

    @cached_property
    def blocks(self) -> list[int]:
        """Block of every head, 1-based."""
        return head_blocks(self.config.heads.blocks, self.architecture.depth)

    @property
    def widths(self) -> list[int]:
        """Width of the block that each head reads."""
        return [self.architecture.widths[block - 1] for block in self.blocks]

    @cached_property
    def temperature(self) -> list[float]:
        """Temperature of each head."""
        return temperatures(self.config.heads.temperature, len(self.blocks))

    @property
    def columns(self) -> list[Column]:
        """The features that each head reads, as columns of an evaluation."""
        return columns_of(
            self.blocks, self.config.heads.pool, self.architecture.has_final_norm, self.architecture.depth
        )

    @property
    def notices(self) -> list[str]:
        """Assumptions and changes made to read the weights, one line each."""
        sizes = [self.architecture.image_size, *(group.size for group in self.crops)]
        return self.checkpoint.notices(self.architecture, sizes)

    @property
    def crops(self) -> list[CropGroup]:
        """The views of an image."""
        return multi_crop(self.config.views, self.architecture.image_size)

    @property
    def steps_per_epoch(self) -> int:
        """Updates per epoch; the last partial batch is dropped."""
        return len(self.source) // self.config.batch_size

    @property
    def heads_steps(self) -> int:
        """Updates of stage 1 in this run."""
        return self.config.epochs["heads"] * self.steps_per_epoch

    @property
    def encoder_steps(self) -> int:
        """Updates of stage 2 in this run."""
        return self.config.epochs["encoder"] * self.steps_per_epoch


def make_plan(config: RefineConfig, progress: LabelledProgress | None = None, checks: Checks | None = None) -> Plan:
    """Check the settings against the weights and the images, and return the plan.

    Writes nothing except a copy of published weights, whose download is reported to `progress`. checks: mistakes found
    earlier. Raises UserError subclasses, a single error for all mistakes.
    """
    checks = checks or Checks()
    plan = checks.finished(_open(config, progress, checks))
    if plan.config.heads.blocks == "auto":
        plan = _with_blocks(plan, progress)
        _check_heads(plan.config, plan.architecture, checks)
        checks.finish()
    return plan


def _open(config: RefineConfig, progress: LabelledProgress | None, checks: Checks) -> Plan | None:
    """Read the weights, find the training images, and check as much as possible, even if one of them is missing."""
    check_device(config, checks)
    _check_epochs(config, checks)
    config, limited = without_limit(config, progress)
    opened = open_training(config, progress, checks, need_labels=False, splits=["train"])
    checkpoint, architecture, sources = opened.checkpoint, opened.architecture, opened.sources
    limited = [*limited, *opened.derived]
    data, derived, known = opened.data, limited, config.preset is not None
    if checkpoint is not None and architecture is not None and data is not None and sources:
        complete, recorded = config.model_copy(update={"data": data}), records_crop(checkpoint.header)
        fitting = partial(fit, complete, architecture, sources["train"], crop_known=recorded)
        if (fitted := checks.run("preset", fitting)) is not None:
            (config, found), data, known = fitted, fitted[0].data, True
            derived = [*limited, *found]
    # Values that a recipe would have derived or adapted are not the user's mistakes.
    if architecture is not None and known:
        _check_heads(config, architecture, checks)
        checks.run("views.local_size", partial(check_sizes, config, architecture))
        checks.run("views.color", partial(check_colors, config.views, config.data.channels or 3))
        if config.epochs["encoder"]:
            decay = config.encoder_stage.layer_decay
            checks.run("encoder_stage.layer_decay", partial(check_layers, architecture, decay))
    if architecture is not None and config.activation_checkpointing:
        checks.run("activation_checkpointing", partial(check_checkpointing, architecture))
    if sources and known:
        images = len(sources["train"])
        _check_counts(with_counts(config, images), images, checks)
    if checkpoint is None or architecture is None or data is None or not checks.passed:
        return None
    warnings = [
        *ignored_settings(config.encoder, checkpoint),
        *_ignored_dense(config),
        *_slow_average(config, len(sources["train"])),
    ]
    encoder = resolved_settings(config.encoder, checkpoint, architecture)
    # The resolved settings fit the images: a run from the written config.toml repeats them, and never adapts them.
    config = config.model_copy(update={"data": data, "encoder": encoder, "strict": True})
    transform = eval_transform(architecture, data, checkpoint.header)
    return Plan(config, checkpoint, architecture, transform, sources["train"], warnings, derived)


def heads_file(path: str) -> Path:
    """Return the file of another run's heads. path: the file or the run's folder. Raises CheckpointError if missing."""
    file = Path(path, "heads.pt") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; --heads-from needs the output folder of a run with stage 1")
    return file


def _with_blocks(plan: Plan, progress: LabelledProgress | None) -> Plan:
    """Return the plan with measured blocks for the heads; if a recipe asked and measuring fails, the last third."""
    derived = [each for each in plan.derived if each.setting != "heads.blocks"]
    chosen = len(derived) < len(plan.derived)
    try:
        blocks, why = _measured_blocks(plan, progress)
    except (ConfigError, DataError):
        if not chosen:
            raise
        blocks, why = last_third(plan.architecture.depth), "the last third of the blocks, as in the paper"
    if chosen:
        derived.insert(0, Derived("heads.blocks", blocks, why))
    warnings = [*plan.warnings]
    if why.startswith(_WITHOUT_LABELS) and not chosen:
        warnings.append(f"heads on blocks {blocks}: {why}")
    heads = plan.config.heads.model_copy(update={"blocks": blocks})
    config = plan.config.model_copy(update={"heads": heads})
    return replace(plan, config=config, derived=derived, warnings=warnings)


def _measured_blocks(plan: Plan, progress: LabelledProgress | None) -> tuple[str, str]:
    """Score every block of the base encoder; return the blocks for `heads.blocks = "auto"` and the reason for them.

    Scores are k-NN accuracies on the monitor's subset of the images (`monitor.knn_samples`), on the features that heads
    would read. Without labelled training and validation images, they are the default measure of `mimref assess`, from
    views of training images. `mimref analyze-blocks` and `mimref assess --blocks all` show the curves.
    """
    config, device = plan.config, resolve_device(plan.config.device)
    precision, problems = resolve_precision(config.precision, device), list[str]()
    monitor = KnnMonitor(config, plan.source, plan.transform, device, precision, note=problems.append)
    depth, encoder = plan.architecture.depth, base_encoder(plan, device)
    final_norm = plan.architecture.has_final_norm
    groups = [columns_of([block], config.heads.pool, final_norm, depth) for block in range(1, depth + 1)]
    if monitor.test is None:
        measured = monitor.view_measures(encoder, groups, config.monitor.view_samples or UNLABELLED_IMAGES)
        scores = [goodness(DEFAULT, values[DEFAULT]) for values in measured]
        missing = "".join(f"; {problem}" for problem in problems)
        return blocks_text(recommend_heads(scores)), f"{_WITHOUT_LABELS}, without labels for k-NN{missing}"
    train, test = monitor.features(encoder, [column for columns in groups for column in columns])
    assert test is not None
    scores = []
    for done, columns in enumerate(groups, 1):
        scores.append(monitor.knn_top1(train.matrix(columns), train.y, test.matrix(columns), test.y))
        if progress is not None:
            progress("k-NN of every block", done, depth)
    return blocks_text(recommend_heads(scores)), "by the k-NN accuracy of every block"


def base_encoder(plan: Plan, device: torch.device, *, share: bool = False) -> TokenEncoder:
    """Return the encoder to refine, in evaluation mode. share: do not copy the weights if they are on the device."""
    return encoder_from(plan.checkpoint, plan.architecture, share=share or device.type != "cpu").to(device).eval()


def temperatures(temperature: float | list[float], num_heads: int) -> list[float]:
    """Return the temperature of each head. Raises ConfigError for a list of another length."""
    if not isinstance(temperature, list):
        return [temperature] * num_heads
    if len(temperature) != num_heads:
        raise ConfigError(
            f"heads.temperature has {len(temperature)} values for {num_heads} heads; give one, or one each"
        )
    return temperature


def check_sizes(config: RefineConfig, architecture: EncoderArchitecture) -> None:
    """Raise ConfigError for views that the encoder cannot take, and for local views larger than the global ones."""
    views, global_size = config.views, _global_size(config, architecture)
    if views.local_views:
        architecture.check_size(views.local_size, "views.local_size")
        if views.local_size > global_size:
            raise ConfigError(
                f"views.local_size {views.local_size} is larger than the global views of {global_size} pixels; "
                "local views show less of an image: set views.local_size, or views.local_views=0"
            )


def _global_size(config: RefineConfig, architecture: EncoderArchitecture) -> int:
    """Return the size of global views in pixels. Raises ConfigError for a size that the encoder cannot take."""
    size = config.views.global_size or architecture.image_size
    architecture.check_size(size, "encoder.image_size" if config.views.global_size is None else "views.global_size")
    return size


def _check_heads(config: RefineConfig, architecture: EncoderArchitecture, checks: Checks) -> None:
    """Check the settings that depend on the number of blocks."""
    if config.heads.blocks == "auto":
        return
    blocks = checks.run("heads.blocks", lambda: head_blocks(config.heads.blocks, architecture.depth))
    if blocks is not None:
        checks.run("heads.temperature", lambda: temperatures(config.heads.temperature, len(blocks)))
        checks.run("encoder_stage.freeze_blocks", lambda: _check_frozen(config, blocks))
        checks.run("loss.schedule", lambda: _check_schedule(config, blocks))
        checks.run("loss.dense", lambda: _check_dense(config, architecture, max(blocks)))


def _check_frozen(config: RefineConfig, blocks: list[int]) -> None:
    frozen = config.encoder_stage.freeze_blocks
    if frozen >= max(blocks):
        raise ConfigError(
            f"encoder_stage.freeze_blocks {frozen} leaves nothing to refine: the last head reads block {max(blocks)}; "
            "freeze fewer"
        )


def _check_schedule(config: RefineConfig, blocks: list[int]) -> None:
    schedule = config.loss.schedule
    if schedule != "constant" and len(blocks) < 2:
        raise ConfigError(f"loss.schedule {schedule!r} needs at least two heads; heads.blocks names one")
    if schedule != "constant" and blocks != sorted(set(blocks)):
        raise ConfigError(
            f"loss.schedule {schedule!r} runs from the earliest head to the last; "
            f"heads.blocks {config.heads.blocks!r} must name each block once, in ascending order"
        )


def _check_dense(config: RefineConfig, architecture: EncoderArchitecture, last: int) -> None:
    """Raise ConfigError if the dense term's block has fewer than two patches to compare."""
    if config.loss.dense == "none" or not config.epochs["encoder"]:
        return
    size = _global_size(config, architecture)
    count, _ = patch_shapes(architecture, [last], size)[last]
    if count < 2:
        raise ConfigError(
            f"loss.dense {config.loss.dense!r} compares the patches of an image: block {last} has {count} at "
            f"{size} pixels; set a larger views.global_size, earlier heads.blocks, or loss.dense=none"
        )


def _ignored_dense(config: RefineConfig) -> list[str]:
    """Return warnings about settings of the dense term that have no effect."""
    loss = config.loss
    if loss.dense == "none":
        unused = loss.dense_weight != LossConfig().dense_weight
        return [f"loss.dense_weight {loss.dense_weight:g} has no effect: loss.dense is none"] if unused else []
    if config.epochs["encoder"]:
        return []
    return [f"loss.dense {loss.dense!r} has no effect: it is a term of stage 2, which this run does not train"]


def _slow_average(config: RefineConfig, images: int) -> list[str]:
    """Return a warning if the average of stage 2 is too slow for its updates."""
    ema, updates = config.encoder_stage.ema, config.epochs["encoder"] * (images // config.batch_size)
    if not updates or ema**updates <= _KEPT_SHARE:
        return []
    least = average_decay(updates)
    return [
        f"encoder_stage.ema {ema} is slow for {updates:,} updates: the result keeps {100 * ema**updates:.0f}% of the "
        f"base's weights; use {least:g}" + " or less" * (least > 0)
    ]


def _check_epochs(config: RefineConfig, checks: Checks) -> None:
    if not any(config.epochs.values()) and checks.unusable.isdisjoint({"stage", "encoder_stage.epochs"}):
        wrong = (
            f"nothing to train: heads_stage.epochs is {config.heads_stage.epochs} and encoder_stage.epochs "
            f"{config.encoder_stage.epochs} with stage = {config.stage!r}; set at least one stage's epochs"
        )
        checks.add("encoder_stage.epochs", ConfigError(wrong))


def _check_counts(config: RefineConfig, images: int, checks: Checks) -> None:
    """Check the settings that depend on the number of images."""
    checks.run("batch_size", lambda: check_batch_size(config.batch_size, images))
    if images > 1:
        checks.run("heads.queue_size", lambda: _check_queue(config, images))


def _check_queue(config: RefineConfig, images: int) -> None:
    queue = config.heads.queue_size
    if queue > max(images, config.batch_size, LEAST_QUEUE):
        raise ConfigError(
            f"heads.queue_size {queue} exceeds the {images} training images, so every image would be in the queue "
            f"several times; set heads.queue_size={images} or less"
        )
    most = max(config.heads_stage.top_k, config.encoder_stage.top_k)
    # A queue spans at most three epochs, so up to three of its rows are a sample's own and excluded.
    if most > queue - 3:
        raise ConfigError(
            f"a top_k of {most} needs a heads.queue_size of at least {most + 3}, not {queue}: "
            "an image's own rows are excluded from its neighbours"
        )
