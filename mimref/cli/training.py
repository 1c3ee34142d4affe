"""`mimref refine` and `mimref pretrain`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Protocol, TypeVar

from mimref.cli.execution import default_out, note, print_facts, print_finished, run_on_ranks
from mimref.cli.options import ARCH, BatchSize, Images, MicroBatch, Preset, Resume, Seed, TrainedEncoder
from mimref.cli.parser import Option

if TYPE_CHECKING:
    from mimref.config.run import RunConfig
    from mimref.progress import Listener
    from mimref.results import Row

Config = TypeVar("Config", bound="RunConfig", contravariant=True)


@dataclass(kw_only=True)
class TrainingOptions(Images, Seed, Preset, Resume):
    """Of `mimref refine` and `mimref pretrain`."""

    panel: ClassVar[str] = "Training"
    batch_size: BatchSize = None

    def resumed(self) -> str | None:
        """The settings of the run that `--resume --out DIR` continues, so that they need not be repeated.

        With `--preset` none: the run itself then compares its settings with those it started with.
        """
        if not self.resume or self.preset is not None or self.out is None or not (self.out / "config.toml").is_file():
            return None
        return str(self.out / "config.toml")


@dataclass(kw_only=True)
class WeightsOptions(TrainedEncoder):
    """The weights that `mimref refine` starts from."""

    panel: ClassVar[str] = "Encoder"
    weights: Annotated[
        str | None,
        Option(
            "Weights to refine; names such as mae_l16 are fetched, quickstart is packaged.",
            "FILE|NAME",
            "encoder.weights",
        ),
    ] = None


@dataclass(kw_only=True)
class RefineOptions(WeightsOptions, TrainingOptions):
    """Of `mimref refine`."""

    panel: ClassVar[str] = "Training"
    epochs: Annotated[str | None, Option("Epochs of stage 2.", "N", "encoder_stage.epochs")] = None
    heads_epochs: Annotated[str | None, Option("Epochs of stage 1.", "N", "heads_stage.epochs")] = None
    stage: Annotated[str | None, Option("Which stages to run; default both.", "both|heads|encoder", "stage")] = None
    heads_from: Annotated[str | None, Option("Reuse another run's heads; runs stage 2 only.", "DIR", "heads_from")] = (
        None
    )
    heads: Annotated[
        str | None, Option("Blocks with a head: 17-24, 20,22,24, last8 or auto.", "BLOCKS", "heads.blocks")
    ] = None
    micro_batch: MicroBatch = None
    dry_run: Annotated[bool, Option("Print the settings, sizes and steps; write nothing.")] = False

    def __post_init__(self) -> None:
        if self.heads_from and self.stage is None:
            self.stage = "encoder"


def refine(options: RefineOptions) -> None:
    """Refine an encoder with contrastive heads.

    Stage 1 trains the heads on the frozen encoder, stage 2 heads and encoder together; then a table compares the
    encoder before and after. Without options: the packaged tiny encoder on scikit-learn's digits.

    Examples:
      mimref refine
      mimref refine --arch vit_l16 --source mae --data /data/imagenet --dry-run
      mimref refine --weights runs/my_mae --preset mae_b16 --set heads.temperature=0.3 --data /data/my_images
    """
    from mimref.refinement.config import RefineConfig

    config = options.load(RefineConfig, options.resumed() or _choose_preset(options))
    out = options.out or default_out(config)
    if options.dry_run:
        from mimref.refinement.plan import describe, make_plan

        print_facts(describe(make_plan(config)) | {"output": str(out)})
        return
    if options.resume and print_finished(out, config.command):
        return

    from mimref.refinement.run import refine as run_refine

    _train(run_refine, config, out, options)


@dataclass(kw_only=True)
class PretrainOptions(TrainingOptions):
    """Of `mimref pretrain`."""

    panel: ClassVar[str] = "Training"
    arch: Annotated[str | None, Option(ARCH, "NAME", "encoder.arch")] = None
    epochs: Annotated[str | None, Option("Passes over the images.", "N", "mae.epochs")] = None


def pretrain(options: PretrainOptions) -> None:
    """Train a masked autoencoder to start from.

    For images or sizes without public weights. Without options: the packaged tiny encoder again.

    Examples:
      mimref pretrain --preset quickstart
      mimref pretrain --preset mae_b16 --data /data/my_images --out runs/my_mae
    """
    from mimref.config.presets import choose_pretrain_preset
    from mimref.pretraining.config import PretrainConfig

    chosen = options.resumed() or choose_pretrain_preset(options.preset, options.arch)
    config = options.load(PretrainConfig, chosen)
    out = options.out or default_out(config)
    if options.resume and print_finished(out, config.command):
        return

    from mimref.pretraining.run import pretrain as run_pretrain

    _train(run_pretrain, config, out, options)


def _choose_preset(options: RefineOptions) -> str:
    """The preset that the options ask for; published weights know their architecture and source."""
    from mimref.config.presets import choose_refine_preset
    from mimref.encoders.published import find_published

    known = find_published(options.weights) if options.weights else None
    arch = options.arch or (known.arch if known else None)
    source = options.source or (known.source if known else None)
    return choose_refine_preset(options.preset, arch, source, options.weights)


class _Result(Protocol):
    @property
    def rows(self) -> list["Row"]: ...


class _Training(Protocol[Config]):
    """`refine` or `pretrain` of the library."""

    def __call__(
        self, config: Config, out: Path, *, resume: bool, force: bool, listener: "Listener | None"
    ) -> _Result: ...


def _train(training: _Training[Config], config: Config, out: Path, options: TrainingOptions) -> None:
    """Train in the processes that torchrun has started; the first prints."""
    from mimref.reports.terminal import print_rows
    from mimref.training.folder import RunFolder

    def work(listener: "Listener") -> _Result:
        # torchrun restarts all processes when one has died, with the same command.
        again = RunFolder(out).continues_launch()
        resume, force = options.resume or again, options.force and not again
        return training(config, out, resume=resume, force=force, listener=listener)

    advice = "the last saved state is kept: --resume continues, and torchrun --max-restarts does so by itself"
    result = run_on_ranks(config, options, work, advice=advice)
    if result is not None:
        print_rows(result.rows)
        note(f"encoder in {out / 'encoder.safetensors'}, results in {out / 'results.json'}", options)
