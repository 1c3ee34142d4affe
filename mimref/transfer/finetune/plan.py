"""The checked inputs of a fine-tuning run: encoder, images, labels and the chosen training images."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from mimref.config.recipe import Derived, is_set
from mimref.config.run import refuse_warmup
from mimref.data.labels import Indices
from mimref.data.loader import check_batch_size
from mimref.data.sample import look_at
from mimref.data.sources import ImageSource, Subset
from mimref.data.transforms import EvalTransform
from mimref.devices import machine_of, resolve_device
from mimref.distributed.group import world_size
from mimref.encoders.backbones import EncoderArchitecture
from mimref.encoders.checkpoints import Checkpoint, load_weights
from mimref.encoders.settings import ignored_settings, resolved_settings
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.errors import Checks, ConfigError
from mimref.evaluation.lowshot.protocol import check_shots, draw_split
from mimref.evaluation.lowshot.split_files import read_split_files
from mimref.evaluation.metrics import name_classes, number_labels
from mimref.features.header import eval_transform, records_crop
from mimref.features.opening import check_device, open_training, warn_of_notices, without_limit
from mimref.progress import Listener
from mimref.transfer.finetune.config import FinetuneConfig
from mimref.transfer.finetune.recipe import Labelled, fit, fit_choice


@dataclass(frozen=True)
class Plan:
    """A fine-tuning run, checked and ready to start."""

    config: FinetuneConfig
    """With resolved encoder settings, and the images that the run uses."""
    checkpoint: Checkpoint
    architecture: Architecture
    """At the resolution of the images; its position embedding is fixed only if the run does not train it."""
    transform: EvalTransform
    train: ImageSource
    val: ImageSource
    labels: Indices
    """(N,) labels of the training images, 0..C-1."""
    val_labels: Indices
    classes: list[str]
    """Class names, in the order of the labels."""
    splits: list[Indices | None]
    """Training images of each split; None for all of them."""
    derived: list[Derived] = field(default_factory=list)
    """Settings derived from encoder and images, or adapted from a preset."""

    def images(self, split: int) -> ImageSource:
        """Return the training images of a split."""
        rows = self.splits[split]
        return self.train if rows is None else Subset(self.train, rows)

    def labels_of(self, split: int) -> Indices:
        """Return the labels of a split's training images."""
        rows = self.splits[split]
        return self.labels if rows is None else self.labels[rows]

    def encoder(self, device: torch.device, *, share: bool = False) -> Encoder:
        """Return the encoder with its initial weights. share: do not copy weights that are already on the device."""
        with torch.device("meta"):
            encoder = build_encoder(self.architecture)
        load_weights(encoder, self.checkpoint, share=share)
        return encoder.to(device)


def make_plan(config: FinetuneConfig, listener: Listener, checks: Checks) -> Plan:
    """Open and check everything that the settings name. Raises UserError subclasses, one error for all mistakes."""
    check_device(config, checks)
    config, derived = without_limit(config, listener.progress)
    opened = open_training(config, listener.progress, checks, need_labels=True, splits=["train", "val"])
    checkpoint, sources, architecture = opened.checkpoint, opened.sources, None
    if opened.architecture is not None:
        architecture = checks.run("encoder.arch", partial(plain_only, opened.architecture))
    derived = [*derived, *opened.derived]
    numbered = splits = None
    if opened.data is not None:
        config = config.model_copy(update={"data": opened.data})
    if architecture is not None and len(sources) == 2:
        config, found = _choice_fitted(config, architecture, sources["train"], checks)
        derived = [*derived, *found]
    if architecture is not None:
        architecture = checks.run("resolution", partial(_adapted, architecture, config))
    if len(sources) == 2:
        train, val = sources["train"], sources["val"]
        numbered = checks.run("data.spec", partial(_numbered, train, val))
        splits = checks.run("split_files" if config.split_files else "shots", partial(_splits, config, train))
        known, counts = config.preset is not None, [len(train) if rows is None else len(rows) for rows in splits or ()]
        if checkpoint and architecture and numbered and counts and checks.passed:
            labelled = Labelled(min(counts), len(numbered[0]), len(val))
            recorded = records_crop(checkpoint.header)
            fitting = partial(_fitted, config, labelled, train, architecture, crop_known=recorded)
            if (fitted := checks.run("preset", fitting)) is not None:
                config, derived, known = fitted[0], [*derived, *fitted[1]], True
        _check_fitted(config, counts, checks, known=known)
    checks.finish()
    assert checkpoint and architecture and opened.data and numbered and splits
    for warning in ignored_settings(config.encoder, checkpoint):
        listener.warn(warning)
    for notice in (*checkpoint.notices(architecture, [architecture.image_size]), *derived):
        listener.note(str(notice))
    warn_of_notices(sources, listener)
    encoder = resolved_settings(config.encoder, checkpoint, architecture)
    classes, labels, val_labels = numbered
    names = list(map(str, name_classes(classes, train.class_names)))
    # The resolved settings fit the images: a run from the written config.toml repeats them, and never adapts them.
    config = config.model_copy(update={"encoder": encoder, "strict": True})
    transform = eval_transform(architecture, config.data, checkpoint.header, resolution=config.resolution)
    return Plan(config, checkpoint, architecture, transform, train, val, labels, val_labels, names, splits, derived)


def _check_fitted(config: FinetuneConfig, counts: Sequence[int], checks: Checks, *, known: bool) -> None:
    """Check the numbers of images and epochs.

    counts: number of training images of each split. known: whether a preset or the recipe has set what the user did
    not. Defaults that do not fit are not reported as mistakes.
    """
    for count in set(counts) if known or is_set(config, "batch_size") else ():
        checks.run("batch_size", partial(check_batch_size, config.batch_size, count))
    if known and config.augment.rand_augment and config.data.channels is not None:
        wrong = f"needs 8-bit colour, but data.channels is {config.data.channels}; set augment.rand_augment=none"
        checks.add("augment.rand_augment", ConfigError(f"augment.rand_augment {wrong}"))
    if known:
        schedule = config.finetune
        warmup = partial(refuse_warmup, "finetune", schedule.warmup_epochs, schedule.epochs)
        checks.run("finetune.warmup_epochs", warmup)


def _choice_fitted(
    config: FinetuneConfig, architecture: Architecture, train: ImageSource, checks: Checks
) -> tuple[FinetuneConfig, list[Derived]]:
    least = int(np.unique(train.labels, return_counts=True)[1].min()) if train.labels is not None else 0
    return checks.run("preset", partial(fit_choice, config, architecture.depth, least)) or (config, [])


def _fitted(
    config: FinetuneConfig, labelled: Labelled, train: ImageSource, architecture: Architecture, *, crop_known: bool
) -> tuple[FinetuneConfig, list[Derived]]:
    machine = machine_of(resolve_device(config.device), world_size())
    return fit(config, labelled, look_at(train), architecture, machine, crop_known=crop_known)


def _numbered(train: ImageSource, val: ImageSource) -> tuple[Indices, Indices, Indices]:
    """Number classes like `number_labels`, or all if the data set is published without training images of some."""
    assert train.labels is not None and val.labels is not None
    if train.lacks_classes and train.class_names is not None:
        return np.arange(len(train.class_names)), train.labels, val.labels
    return number_labels(train.labels, val.labels, train.class_names)


def plain_only(architecture: EncoderArchitecture) -> Architecture:
    """Return the architecture unchanged. Raises ConfigError unless it is a plain vision transformer."""
    if not isinstance(architecture, Architecture):
        raise ConfigError(
            f"fine-tuning needs a plain vision transformer, which {architecture.name} is not; see mimref probe"
        )
    return architecture


def _adapted(architecture: Architecture, config: FinetuneConfig) -> Architecture:
    """Return the architecture at the resolution of the settings. Raises ConfigError for settings that do not fit it."""
    frozen, depth = config.finetune.freeze_blocks, architecture.depth
    if frozen > depth:
        raise ConfigError(f"finetune.freeze_blocks {frozen}: the encoder has only {depth} blocks")
    size = config.resolution or architecture.image_size
    architecture.check_size(size, "--resolution" if config.resolution else "encoder.image_size")
    trains = config.finetune.train_positions and not frozen
    return replace(architecture, image_size=size, fixed_positions=architecture.fixed_positions and not trains)


def _splits(config: FinetuneConfig, train: ImageSource) -> list[Indices | None]:
    """Return the training images of each split. Raises UserError subclasses for shots or files that do not fit."""
    labels = train.labels
    assert labels is not None
    if config.split_files:
        files = read_split_files(config.split_files, [train.path(index) for index in range(len(train))])
        for file, rows in zip(config.split_files, files, strict=True):
            _check_classes(file, labels, rows, train.class_names)
        return list(files)
    if config.shots is None:
        return [None]
    if not config.all_if_fewer:
        check_shots([config.shots], labels, train.class_names)
    return [draw_split(labels, config.shots, split=split, seed=config.seed) for split in range(config.splits)]


def _check_classes(file: str, labels: Indices, rows: Indices, names: Sequence[str] | None) -> None:
    missing = np.setdiff1d(labels, labels[rows])
    if len(missing):
        name = name_classes(missing[:1], names)[0]
        raise ConfigError(f"{file}: lists no image of class {name}; every class needs at least one")
