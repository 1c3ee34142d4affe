"""Planning a pre-training before anything is trained: settings that fit the images, the encoder, and the images."""

from dataclasses import dataclass, replace
from functools import partial

from mimref.config.recipe import Derived, is_set
from mimref.config.run import refuse_warmup
from mimref.data.loader import check_batch_size
from mimref.data.sample import look_at
from mimref.data.sources import ImageSource
from mimref.devices import machine_of, resolve_device
from mimref.distributed.group import world_size
from mimref.encoders.channels import for_images
from mimref.encoders.vit import Architecture
from mimref.errors import Checks, ConfigError
from mimref.features.opening import check_device, measure_channels, open_images, without_limit
from mimref.pretraining.config import PretrainConfig
from mimref.pretraining.recipe import fit
from mimref.progress import Listener


@dataclass(frozen=True)
class Plan:
    """A pre-training that is ready to start."""

    config: PretrainConfig
    """The settings after the recipe; they reproduce the run."""
    derived: list[Derived]
    architecture: Architecture
    source: ImageSource
    """The training images."""

    @property
    def steps_per_epoch(self) -> int:
        """Updates per epoch; the last partial batch is dropped."""
        return len(self.source) // self.config.batch_size


def make_plan(config: PretrainConfig, listener: Listener, checks: Checks) -> Plan:
    """Open and check everything that the settings name. Raises UserError subclasses, one error for all mistakes."""
    check_device(config, checks)
    config, derived = without_limit(config, listener.progress)
    source = open_images(config.data, listener.progress, checks, need_labels=False, splits=["train"]).get("train")
    known = config.preset is not None
    if source is not None and checks.passed and (fitted := checks.run("preset", partial(_fitted, config, source))):
        config, derived, known = fitted[0], [*derived, *fitted[1]], True
    architecture = checks.run("encoder.arch", partial(_architecture, config))
    if source is not None and checks.passed:
        data, measured = measure_channels(config.data, {}, None, source, checks)
        config, derived = config.model_copy(update={"data": data}), [*derived, *measured]
    # Defaults that the recipe would have replaced are not the user's mistakes.
    if source is not None and (known or is_set(config, "batch_size")):
        checks.run("batch_size", partial(check_batch_size, config.batch_size, len(source)))
    if known:
        name, settings = config.objective, config.masking
        checks.run(f"{name}.warmup_epochs", partial(refuse_warmup, name, settings.warmup_epochs, settings.epochs))
    return Plan(config, derived, checks.finished(architecture), checks.finished(source))


def _fitted(config: PretrainConfig, source: ImageSource) -> tuple[PretrainConfig, list[Derived]]:
    machine = machine_of(resolve_device(config.device), world_size())
    fitted, derived = fit(config, len(source), look_at(source), machine)
    # These settings fit the run's images: config.toml reproduces the run and is never adapted.
    return fitted.model_copy(update={"strict": True}), derived


def _architecture(config: PretrainConfig) -> Architecture:
    """Return the architecture to train. Raises ConfigError for one that the objective cannot train."""
    if config.encoder.weights is not None:
        raise ConfigError(f"pretrain starts from random weights; omit encoder.weights {config.encoder.weights!r}")
    architecture = for_images(Architecture.from_config(config.encoder), config.data.channels)
    if architecture.post_norm or architecture.from_timm:
        raise ConfigError(f"pretrain builds MAE's own encoders; encoder.arch {architecture.name!r} is not one")
    architecture.check_size(architecture.image_size, "encoder.image_size")
    # SimMIM learns the position embedding, which starts from MAE's.
    return replace(architecture, fixed_positions=config.objective == "mae")
