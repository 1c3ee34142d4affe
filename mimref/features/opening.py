"""Open the inputs of an evaluation, and report everything that is wrong with them before any encoder pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from mimref.config.base import CommandConfig, DataConfig
from mimref.config.recipe import Derived, is_adaptable
from mimref.config.run import TrainingConfig
from mimref.data.device_crops import decoding_device
from mimref.data.open import open_source
from mimref.data.sample import check_readable
from mimref.data.sources import ImageSource, NoSplitError, Split
from mimref.data.statistics import SAMPLE
from mimref.devices import resolve_device, resolve_precision
from mimref.distributed.group import own_rank
from mimref.encoders.backbones import EncoderArchitecture
from mimref.encoders.channels import for_images
from mimref.encoders.checkpoints import Checkpoint, read_checkpoint
from mimref.encoders.published import must_download
from mimref.encoders.settings import architecture_to_train, weights_name
from mimref.errors import Checks, ConfigError, UserError
from mimref.features.config import EncoderPassConfig, EvaluationConfig
from mimref.features.files import FeatureFiles
from mimref.features.header import resolve_data, shared_data, with_channels, with_statistics
from mimref.features.inputs import EncoderInputs, Inputs, give_distinct_names
from mimref.features.matrix import Labels
from mimref.progress import LabelledProgress, Listener

T = TypeVar("T", bound=TrainingConfig)
# Settings that change the features of an encoder.
_OF_ENCODERS = ("arch", "data", "encoder", "final_norm", "pool", "resolution", "source")


@dataclass(frozen=True)
class Opened:
    """Inputs and images, as far as they could be opened."""

    inputs: Inputs | None
    sources: dict[Split, ImageSource]
    """The images, even without an encoder to read them."""

    def checked(self, checks: Checks) -> Inputs:
        """Finish all checks and return the inputs."""
        checks.finish()
        assert self.inputs is not None
        return self.inputs

    def labels(self, split: Split) -> Labels | None:
        """Return the labels of all images, if they are known."""
        if isinstance(self.inputs, FeatureFiles):
            return self.inputs.features(split).y
        return self.sources[split].labels if split in self.sources else None

    def class_names(self, split: Split) -> list[str] | None:
        """Return the names of classes 0, 1, ..., if they are known."""
        if isinstance(self.inputs, FeatureFiles):
            return self.inputs.features(split).class_names
        return self.sources[split].class_names if split in self.sources else None


def open_encoder(
    config: EncoderPassConfig,
    checkpoint: str,
    listener: Listener,
    checks: Checks,
    *,
    setting: str = "checkpoint",
    need_labels: bool = True,
    splits: Sequence[Split] = ("train", "val"),
    existing: bool = False,
    sources: dict[Split, ImageSource] | None = None,
    read: Checkpoint | None = None,
) -> Opened:
    """Open a checkpoint and its images, and check everything that can be checked without a pass.

    setting: the setting that names the checkpoint. splits: the splits to open. existing: see `open_images`. sources:
    images that have been opened already. read: the checkpoint, if it has been read already.
    """
    check_device(config, checks)
    opened, progress = dict(sources or {}), listener.progress
    open_splits = partial(
        open_images, progress=progress, checks=checks, need_labels=need_labels, splits=splits, existing=existing
    )
    known, remote = sources is not None, must_download(checkpoint)
    # Weights from a server name no images, and are not downloaded before all other mistakes are corrected.
    if remote and not known and checks.run("data.spec", partial(resolve_data, config.data, {})) is not None:
        opened, known = open_splits(config.data), True
    if remote and not checks.passed:
        return Opened(None, opened)
    inputs = checks.run(
        setting, lambda: EncoderInputs(config, checkpoint, listener, need_labels=need_labels, read=read)
    )
    # The header may name the images, or how they are decoded.
    data = config.data if inputs is None else inputs.data
    changed = data != config.data and (config.data.spec is None or bool(opened))
    if data.spec is not None and (changed or not known):
        opened = open_splits(data)
    if inputs is not None:
        inputs.sources = opened
        if config.arch is not None:
            checks.run("arch", lambda: inputs.encoder)  # whether the weights fit it
        if opened and checks.passed:
            checks.run("data.mean", lambda: inputs.settings)  # channels may have to be measured
    if sources is None:
        warn_of_notices(opened, listener)
    return Opened(inputs, opened)


def warn_of_notices(sources: dict[Split, ImageSource], listener: Listener) -> None:
    """Report which parts of the data set are not used, and what had to be guessed."""
    notices = [notice for source in sources.values() for notice in source.notices]
    for notice in dict.fromkeys(notices) if own_rank() == 0 else ():
        listener.warn(notice)


def check_device(config: CommandConfig, checks: Checks) -> None:
    """Check device, precision, and where images are decoded."""
    device = checks.run("device", lambda: resolve_device(config.device))
    if device is not None:
        # A preset's precision is adapted later.
        if not (isinstance(config, TrainingConfig) and is_adaptable(config, "precision")):
            checks.run("precision", lambda: resolve_precision(config.precision, device))
        checks.run("data.decode", lambda: decoding_device(config.data, device))


def open_images(
    data: DataConfig,
    progress: LabelledProgress | None,
    checks: Checks,
    *,
    need_labels: bool = True,
    splits: Sequence[Split] = ("train", "val"),
    existing: bool = False,
) -> dict[Split, ImageSource]:
    """Open the splits until one cannot be opened, and check that their images can be read.

    existing: open only the splits that exist, and only one of them if it contains all images of the other.
    """
    sources: dict[Split, ImageSource] = {}
    missing: list[Split] = []

    def find(split: Split) -> ImageSource | None:
        try:
            return open_source(data, split, need_labels=need_labels, progress=progress)
        except NoSplitError:
            missing.append(split)
            if not existing or len(missing) == len(splits):
                raise
            return None

    for split in splits:
        source = checks.run("data.spec", partial(find, split))
        if source is not None:
            sources[split] = source
            checks.run("data.spec", partial(check_readable, source, data.max_bad))
        elif not existing or split not in missing:
            break  # the other split would fail for the same reason
    return _distinct(sources) if existing else sources


def _distinct(sources: dict[Split, ImageSource]) -> dict[Split, ImageSource]:
    """Drop a split whose images are all in the other one; both splits of a folder without splits are the same."""
    longest_first = sorted(sources.items(), key=lambda item: -len(item[1]))
    if len(longest_first) < 2:
        return sources
    (kept, longer), (_, shorter) = longest_first
    if longer.find([shorter.path(0)]) == [None]:
        return sources
    names = {longer.path(index) for index in range(len(longer))}
    return {kept: longer} if all(shorter.path(index) in names for index in range(len(shorter))) else sources


def open_encoders(
    config: EncoderPassConfig,
    checkpoints: Sequence[str],
    listener: Listener,
    checks: Checks,
    setting: str,
    *,
    need_labels: bool = True,
    splits: Sequence[Split] = ("train", "val"),
) -> list[Opened]:
    """Open several checkpoints on the same images, decoded in the same way, see `shared_data`.

    setting: the setting that names the checkpoints. splits: the splits to open.
    """
    read = {
        checkpoint: checks.run(setting, partial(read_checkpoint, checkpoint, config.encoder))
        for checkpoint in checkpoints
        if not must_download(checkpoint)
    }
    headers = [each.header if (each := read.get(checkpoint)) else {} for checkpoint in checkpoints]
    data, differing = checks.run("data.spec", partial(shared_data, config.data, headers)) or (config.data, [])
    config = config.model_copy(update={"data": data})
    if differing:
        listener.note(
            f"the encoders' headers differ in how images are decoded; all encoders read them with "
            f"{', '.join(differing)} (--set chooses other values)"
        )
    found: list[Opened] = []
    for checkpoint in checkpoints:
        # The same images are opened, and reported on, once.
        sources = found[0].sources if found else None
        opened = open_encoder(
            config,
            checkpoint,
            listener,
            checks,
            setting=setting,
            need_labels=need_labels,
            splits=splits,
            sources=sources,
            read=read.get(checkpoint),
        )
        found.append(opened)
        if isinstance(first := found[0].inputs, EncoderInputs):
            # Its weights may determine the number of channels.
            config = config.model_copy(update={"data": first.data})
    inputs = [each.inputs for each in found if isinstance(each.inputs, EncoderInputs)]
    if len(inputs) == len(checkpoints):
        checks.run(setting, lambda: give_distinct_names(inputs, checkpoints))
    return found


def open_inputs(
    config: EvaluationConfig,
    listener: Listener,
    checks: Checks,
    splits: Sequence[Split] = ("train", "val"),
    sources: dict[Split, ImageSource] | None = None,
    *,
    need_labels: bool = True,
) -> Opened:
    """Open the features that the settings name, from an encoder or from files, as `open_encoder` does."""
    if config.features is None:
        return open_encoder(
            config, config.checkpoint, listener, checks, need_labels=need_labels, splits=splits, sources=sources
        )
    if "checkpoint" in config.model_fields_set:
        wrong = f"--features replaces the encoder's features; leave {config.checkpoint} out"
        checks.add("features", ConfigError(wrong))
    for key in sorted(config.given):
        if key.split(".")[0] in _OF_ENCODERS:
            checks.add("features", ConfigError(f"--features are used as they are: {key} has no effect; omit it"))
    files = config.features
    return Opened(checks.run("features", lambda: FeatureFiles(*files)), {})


@dataclass(frozen=True)
class OpenedTraining:
    """Weights and images that a training command starts from, as far as they could be opened."""

    checkpoint: Checkpoint | None
    architecture: EncoderArchitecture | None
    data: DataConfig | None
    """Settings of the images; what they leave open comes from the checkpoint's header."""
    sources: dict[Split, ImageSource]
    derived: list[Derived]
    """Settings of the data that were measured."""


def open_training(
    config: TrainingConfig,
    progress: LabelledProgress | None,
    checks: Checks,
    *,
    need_labels: bool,
    splits: Sequence[Split],
) -> OpenedTraining:
    """Read the weights that the settings name and open the images; `checks` collects what is wrong with either."""
    open_splits = partial(open_images, progress=progress, checks=checks, need_labels=need_labels, splits=splits)
    weights = checks.run("encoder.weights", lambda: weights_name(config.encoder))
    remote = weights is not None and must_download(weights)
    # Weights from a server name no images, and are not downloaded before all other mistakes are corrected.
    sources: dict[Split, ImageSource] = {}
    if remote and checks.run("data.spec", partial(resolve_data, config.data, {})) is not None:
        sources = open_splits(config.data)
    checkpoint = architecture = data = None
    if weights is not None and (checks.passed or not remote):
        checkpoint = checks.run("encoder.weights", lambda: read_checkpoint(weights, config.encoder, progress=progress))
    if checkpoint is not None:
        architecture = checks.run("encoder.arch", partial(architecture_to_train, config.encoder, checkpoint))
        data = checks.run("data.spec", partial(resolve_data, config.data, checkpoint.header))
    if data is not None and architecture is not None:
        data = with_channels(data, architecture)
        architecture = for_images(architecture, data.channels)
    # The header may name the images, or how they are decoded.
    known = data or config.data
    if not remote and known.spec is not None:
        sources = open_splits(known)
    derived: list[Derived] = []
    if checkpoint and architecture and data and sources and checks.passed:
        channels = checkpoint.channels_as(architecture.name)
        data, derived = measure_channels(data, checkpoint.header, channels, sources.get("train"), checks)
    return OpenedTraining(checkpoint, architecture, data, sources, derived)


def measure_channels(
    data: DataConfig, header: Mapping[str, Any], weights_channels: int | None, train: ImageSource | None, checks: Checks
) -> tuple[DataConfig, list[Derived]]:
    """Apply `with_statistics` to training images. Returns the settings, and what was measured."""
    sources = [] if train is None else [train]
    found = checks.run("data.mean", partial(with_statistics, data, header, weights_channels, sources))
    if found is None or found == data:
        return data, []
    rule = f"measured on {min(SAMPLE, len(sources[0])):,} training images"
    return found, [Derived("data.mean", found.mean, rule), Derived("data.std", found.std, rule)]


def without_limit(config: T, progress: LabelledProgress | None) -> tuple[T, list[Derived]]:
    """Remove a preset's `data.train_limit` that exceeds the images. Returns the settings, and what was changed."""
    limit, setting = config.data.train_limit, "data.train_limit"
    if limit is None or not is_adaptable(config, setting):
        return config, []
    unlimited = config.model_copy(update={"data": config.data.model_copy(update={"train_limit": None})})
    try:
        images = len(open_source(unlimited.data, "train", progress=progress))
    except UserError:  # occurs again, and is reported then
        return config, []
    if images >= limit:
        return config, []
    return unlimited, [Derived(setting, None, f"there are {images:,} training images", limit)]
