"""`mimref refine` and `mimref pretrain`."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mimref.cli.execution import note, print_derived, print_facts, print_finished, run_on_ranks, write_page
from mimref.cli.options import (
    Batch,
    Images,
    MicroBatch,
    Preset,
    Report,
    Resume,
    Seed,
    Shard,
    Text,
    TrainedArch,
    TrainedEncoder,
)
from mimref.cli.parser import option
from mimref.errors import Checks

if TYPE_CHECKING:
    from mimref.config.recipe import Derived
    from mimref.config.run import TrainingConfig
    from mimref.progress import Listener
    from mimref.refinement.config import RefineConfig
    from mimref.training.run import TrainingResult


DRY_RUN = option("Print all settings and the reasons for them, sizes, steps and time; train nothing.")


_PACKAGED = (
    "without --weights, the packaged encoder of digits is refined, which is made for 16 pixels; for other images, pass "
    "--weights, or pre-train an encoder with mimref pretrain"
)


class TrainingOptions(Images, Batch, Preset, Seed, Report, Resume, panel="Training"):
    """Options of commands that train in an output folder."""

    strict: bool | None = option("Refuse a preset that does not fit, instead of adapting it.", sets="strict")

    def resumed_preset(self) -> str | None:
        """Return the settings file of the run that `--resume --out DIR` continues, so that no option need be repeated.

        None with `--preset`: the run itself then compares its settings with those it started with.
        """
        return None if self.preset else self.resumed("config.toml", None)


class Weights(TrainedEncoder, panel="Encoder"):
    weights: Text = option(
        "Weights to refine; published ones such as mae_l16 are downloaded.", "FILE|NAME", "encoder.weights"
    )


class RefineOptions(Weights, MicroBatch, Shard, TrainingOptions, panel="Training"):
    epochs: Text = option("Epochs of stage 2.", "N", "encoder_stage.epochs")
    heads_epochs: Text = option("Epochs of stage 1.", "N", "heads_stage.epochs")
    stage: Text = option("Which stages to run; default both.", "both|heads|encoder", "stage")
    heads_from: Text = option("Reuse another run's heads and run stage 2 only.", "DIR", "heads_from")
    heads: Text = option("Blocks with a head: 17-24, 20,22,24, last8 or auto.", "BLOCKS", "heads.blocks")
    dry_run: bool = DRY_RUN

    def chosen_preset(self) -> str | None:
        """Choose the preset for the options; None if a recipe derives the settings."""
        named, data = self.given("encoder.arch") or self.given("encoder.weights"), self.given("data.spec")
        preset = self.refine_preset()
        if preset is None and named is None and data not in (None, "digits") and os.environ.get("RANK", "0") == "0":
            note(_PACKAGED, self)
        return preset


def refine(options: RefineOptions) -> None:
    """Refine an encoder with contrastive heads.

    Stage 1 trains the heads on the frozen encoder; stage 2 trains heads and encoder together. A table then compares the
    encoder before and after. Without a preset, settings are derived from the encoder and the images. Without options,
    this refines the packaged tiny encoder on scikit-learn's digits.

    Examples:
      mimref refine
      mimref refine --weights my.pth --data /data/my_images --dry-run
      mimref refine --arch vit_l16 --source mae --data /data/imagenet
    """
    from mimref.refinement.config import RefineConfig

    if options.heads_from and not options.stage:
        options.stage = "encoder"
    config = options.load(RefineConfig, options.resumed_preset(), options.chosen_preset)
    if options.dry_run:
        _print_plan(config, options)
    elif not print_finished(run_folder(config, options), config.command, options):
        from mimref.refinement.run import refine as run_refine

        run_training(run_refine, config, options)


def _print_plan(config: "RefineConfig", options: RefineOptions) -> None:
    from mimref.benchmarks.duration import describe_duration, measure_duration
    from mimref.refinement.plan import heads_file, make_plan
    from mimref.refinement.sizes import describe

    if (heads_from := config.heads_from) is not None:
        options.checks.run("heads_from", lambda: heads_file(heads_from))
    plan = make_plan(config, checks=options.checks)
    print_plan(plan.config, plan.derived, describe(plan), options)
    print_facts({"time": describe_duration(measure_duration(plan))})


class PretrainOptions(TrainedArch, TrainingOptions, panel="Training"):
    objective: Text = option(
        "Mask tokens only in a decoder (mae, default) or in the encoder (simmim).", "mae|simmim", "objective"
    )
    epochs: Text = option("Passes over the images.", "N", "mae.epochs")
    dry_run: bool = DRY_RUN


def pretrain(options: PretrainOptions) -> None:
    """Pre-train an encoder by masked image modelling.

    For images or encoder sizes without public weights. Without a preset, the encoder and the settings are derived from
    the images and the machine. Without options, this recreates the packaged tiny encoder, a masked autoencoder.

    Examples:
      mimref pretrain
      mimref pretrain --data /data/my_images --dry-run
      mimref pretrain --arch vit_b16 --data /data/my_images --out runs/my_mae
      mimref pretrain --objective simmim --data /data/my_images --out runs/my_simmim
    """
    from mimref.config.load import load_config
    from mimref.config.presets import choose_pretrain_preset
    from mimref.pretraining.config import PretrainConfig

    preset = options.resumed_preset() or choose_pretrain_preset(
        options.preset, *map(options.given, ("encoder.arch", "data.spec", "objective"))
    )
    if options.epochs is not None:
        # The option is for the objective's own section, and a preset may choose the objective.
        chosen = load_config(PretrainConfig, preset, {"objective": options.objective}, options.sets or (), Checks())
        if chosen.objective != "mae":
            options.sets = [f"{chosen.objective}.epochs={options.epochs}", *(options.sets or ())]
            options.epochs = None
    config = options.load(PretrainConfig, preset)
    if options.dry_run:
        from mimref.benchmarks.planned import describe_pretraining
        from mimref.pretraining.plan import make_plan
        from mimref.progress import Silent

        plan = make_plan(config, Silent(), checks=options.checks)
        print_plan(plan.config, plan.derived, describe_pretraining(plan), options)
    elif not print_finished(run_folder(config, options), config.command, options):
        from mimref.pretraining.run import pretrain as run_pretrain

        run_training(run_pretrain, config, options)


def print_plan(
    config: "TrainingConfig", derived: "Sequence[Derived]", facts: dict[str, str], options: TrainingOptions
) -> None:
    """Print what a dry run shows: the `config.toml` of the run, facts, and every derived setting with its rule."""
    from mimref.config.base import dump_config

    typer.echo(dump_config(config))
    print_facts(facts | {"output": str(run_folder(config, options))})
    print_derived(derived)


def run_folder(config: "TrainingConfig", options: TrainingOptions) -> Path:
    """Return `--out`, else `runs/refine-mae_l16` for the preset refine/mae_l16, `runs/refine-mine` for my/mine.toml.

    Without a preset: `runs/refine-recipe`.
    """
    preset = config.preset or "recipe"
    name = preset.removeprefix(f"{config.command}/").replace("/", "-")
    name = Path(preset).stem if preset.endswith(".toml") else name
    return options.out or Path("runs") / f"{config.command}-{name}"


def run_training(training: "Callable[..., TrainingResult]", config: "TrainingConfig", options: TrainingOptions) -> bool:
    """Train in all processes that torchrun has started; the first one prints. Returns whether this is the first."""
    from mimref.config.load import load_config
    from mimref.reports.terminal import print_rows
    from mimref.training.folder import RunFolder

    out = run_folder(config, options)

    def work(config: "TrainingConfig", listener: "Listener", checks: Checks) -> "TrainingResult":
        # torchrun restarts all processes when one has died, with the same command.
        again = RunFolder(out).continues_launch()
        if again:  # a recipe may derive other settings for another number of processes
            config = load_config(type(config), str(out / "config.toml"))
        resume, force = options.resume or again, options.force and not again
        return training(config, out, resume=resume, force=force, listener=listener, checks=checks)

    advice = "the last saved state is kept: --resume continues from it, and torchrun --max-restarts does so by itself"
    result = run_on_ranks(config, options, work, advice=advice)
    if result is None:
        return False
    print_rows(result.rows)
    weights = ", ".join(map(str, sorted(out.glob("*.safetensors"))))
    note(f"encoder in {weights}, results in {out / 'results.json'}", options)
    write_page(out, options)
    return True
