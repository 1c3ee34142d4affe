"""`mimref refine` and `mimref pretrain`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import typer

from mimref.cli.options import (
    ArchOption,
    BatchSizeOption,
    DataOption,
    DebugOption,
    DeviceOption,
    DryRunOption,
    EncoderEpochsOption,
    EpochsOption,
    ForceOption,
    HeadsEpochsOption,
    HeadsFromOption,
    HeadsOption,
    MicroBatchOption,
    OutOption,
    PrecisionOption,
    PresetOption,
    QuietOption,
    ResumeOption,
    SeedOption,
    SetOption,
    SourceOption,
    StageOption,
    WeightsOption,
    WorkersOption,
    common,
    default_out,
    print_facts,
)
from mimref.cli.output import print_finished

if TYPE_CHECKING:
    from mimref.config.run import RunConfig
    from mimref.progress import Listener
    from mimref.results import Row

_Config = TypeVar("_Config", bound="RunConfig", contravariant=True)


def refine(
    preset: PresetOption = None,
    sets: SetOption = None,
    data: DataOption = None,
    arch: ArchOption = None,
    source: SourceOption = None,
    weights: WeightsOption = None,
    epochs: EncoderEpochsOption = None,
    heads_epochs: HeadsEpochsOption = None,
    stage: StageOption = None,
    heads_from: HeadsFromOption = None,
    batch_size: BatchSizeOption = None,
    micro_batch: MicroBatchOption = None,
    heads: HeadsOption = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Refine an encoder with contrastive heads.

    First the heads on the frozen encoder (stage 1), then heads and encoder together (stage 2); then a table of the
    encoder before and after. Without options: the packaged tiny encoder on scikit-learn's digits.
    """
    from mimref.config.load import load_config
    from mimref.refinement.config import RefineConfig

    overrides = {
        "encoder.arch": arch,
        "encoder.source": source,
        "encoder.weights": weights,
        "encoder_stage.epochs": epochs,
        "heads_stage.epochs": heads_epochs,
        "stage": stage or ("encoder" if heads_from else None),
        "heads_from": heads_from,
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "heads.blocks": heads,
    } | common(data, device, precision, seed, workers)
    chosen = _resumed_config(out, resume, preset) or _refine_preset(preset, arch, source, weights)
    config = load_config(RefineConfig, chosen, overrides, sets or ())
    out = out or default_out(config)
    if dry_run:
        from mimref.refinement.dry_run import describe
        from mimref.refinement.plan import make_plan

        print_facts(describe(make_plan(config)) | {"output": str(out)})
        return
    if resume and print_finished(out, config.command):
        return

    from mimref.refinement.run import refine as run_refine

    _train_together(run_refine, config, out, resume, force, quiet)


def pretrain(
    preset: PresetOption = None,
    sets: SetOption = None,
    data: DataOption = None,
    arch: ArchOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    force: ForceOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a masked autoencoder to start from.

    For images or sizes without public weights. Without options: makes the packaged tiny encoder again.
    """
    from mimref.config.load import load_config
    from mimref.config.presets import choose_pretrain_preset
    from mimref.pretraining.config import PretrainConfig

    overrides = {"encoder.arch": arch, "mae.epochs": epochs, "batch_size": batch_size}
    overrides |= common(data, device, precision, seed, workers)
    chosen = _resumed_config(out, resume, preset) or choose_pretrain_preset(preset, arch)
    config = load_config(PretrainConfig, chosen, overrides, sets or ())
    out = out or default_out(config)
    if resume and print_finished(out, config.command):
        return

    from mimref.pretraining.run import pretrain as run_pretrain

    _train_together(run_pretrain, config, out, resume, force, quiet)


def _refine_preset(preset: str | None, arch: str | None, source: str | None, weights: str | None) -> str:
    """The preset that the options ask for; the name of published weights says what they are."""
    from mimref.config.presets import choose_refine_preset
    from mimref.encoders.published import find_published

    known = find_published(weights) if weights else None
    return choose_refine_preset(
        preset, arch or (known.arch if known else None), source or (known.source if known else None), weights
    )


class _Result(Protocol):
    @property
    def rows(self) -> list["Row"]: ...


class _Training(Protocol[_Config]):
    """`refine` or `pretrain` of the library."""

    def __call__(
        self, config: _Config, out: Path, *, resume: bool, force: bool, listener: "Listener | None"
    ) -> _Result: ...


def _train_together(
    training: _Training[_Config], config: _Config, out: Path, resume: bool, force: bool, quiet: bool
) -> None:
    """Train with whatever processes torchrun has started; the first one speaks."""
    from mimref.distributed.group import process_group
    from mimref.reports.terminal import Terminal
    from mimref.training.folder import RunFolder

    advice = "the last saved state is kept: --resume continues, and torchrun --max-restarts does so by itself"
    with process_group(config.device, advice=advice) as rank, Terminal(quiet or rank > 0) as terminal:
        # torchrun starts all processes again when one has died, with the same command.
        again = RunFolder(out).continues_launch()
        result = training(config, out, resume=resume or again, force=force and not again, listener=terminal)
    if rank == 0:
        _print_trained(out, result.rows, quiet)


def _resumed_config(out: Path | None, resume: bool, preset: str | None) -> str | None:
    """The settings of the run that `--resume --out DIR` continues, so that they need not be given again.

    A preset given all the same is not passed over: the run compares its settings with those it was started with.
    """
    if not resume or preset is not None or out is None or not (out / "config.toml").is_file():
        return None
    return str(out / "config.toml")


def _print_trained(out: Path, rows: Sequence["Row"], quiet: bool) -> None:
    """Results of a run that has written its folder by itself."""
    from mimref.reports.terminal import print_rows

    print_rows(rows)
    if not quiet:
        typer.echo(f"encoder in {out / 'encoder.safetensors'}, results in {out / 'results.json'}", err=True)
