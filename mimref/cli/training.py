"""`mimref refine` and `mimref pretrain`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mimref.cli.execution import note, print_facts, print_finished, run_on_ranks, write_page
from mimref.cli.options import (
    Batch,
    Images,
    MicroBatch,
    Preset,
    Report,
    Resume,
    Seed,
    Text,
    TrainedArch,
    TrainedEncoder,
)
from mimref.cli.parser import option
from mimref.errors import Checks

if TYPE_CHECKING:
    from mimref.config.run import TrainingConfig
    from mimref.pretraining.run import PretrainResult
    from mimref.progress import Listener
    from mimref.refinement.run import RefineResult
    from mimref.transfer.finetune.run import FinetuneResult

    TrainingResult = RefineResult | PretrainResult | FinetuneResult


class TrainingOptions(Images, Batch, Preset, Seed, Report, Resume):
    """Of commands that train in an output folder."""

    def resumed_preset(self) -> str | None:
        """The settings file of the run that `--resume --out DIR` continues, so that nothing need be repeated.

        None with `--preset`: the run itself compares its settings with those it started with.
        """
        file = self.out / "config.toml" if self.out and self.resume and self.preset is None else None
        return str(file) if file and file.is_file() else None


class Weights(TrainedEncoder, panel="Encoder"):
    weights: Text = option(
        "Weights to refine; published ones such as mae_l16 are downloaded.", "FILE|NAME", "encoder.weights"
    )


class RefineOptions(Weights, MicroBatch, TrainingOptions, panel="Training"):
    epochs: Text = option("Epochs of stage 2.", "N", "encoder_stage.epochs")
    heads_epochs: Text = option("Epochs of stage 1.", "N", "heads_stage.epochs")
    stage: Text = option("Which stages to run; default both.", "both|heads|encoder", "stage")
    heads_from: Text = option("Reuse another run's heads; runs stage 2 only.", "DIR", "heads_from")
    heads: Text = option("Blocks with a head: 17-24, 20,22,24, last8 or auto.", "BLOCKS", "heads.blocks")
    dry_run: bool = option("Print the settings, sizes and steps; write nothing.")

    def chosen_preset(self) -> str:
        """The preset that the options ask for; published weights determine architecture and source."""
        from mimref.config.presets import choose_refine_preset
        from mimref.encoders.published import find_published

        known = find_published(self.weights) if self.weights else None
        arch, source = (known.arch, known.source) if known else (None, None)
        return choose_refine_preset(self.preset, self.arch or arch, self.source or source, self.weights)


def refine(options: RefineOptions) -> None:
    """Refine an encoder with contrastive heads.

    Stage 1 trains the heads on the frozen encoder, stage 2 heads and encoder together; then a table compares the
    encoder before and after. Without options: the packaged tiny encoder on scikit-learn's digits.

    Examples:
      mimref refine
      mimref refine --arch vit_l16 --source mae --data /data/imagenet --dry-run
      mimref refine --weights runs/my_mae --preset mae_b16 --data /data/my_images
    """
    from mimref.refinement.config import RefineConfig

    if options.heads_from and not options.stage:
        options.stage = "encoder"
    config = options.load(RefineConfig, options.resumed_preset(), options.chosen_preset)
    if options.dry_run:
        from mimref.refinement.plan import make_plan
        from mimref.refinement.sizes import describe

        print_facts(describe(make_plan(config, checks=options.checks)) | {"output": str(run_folder(config, options))})
    elif not (options.resume and options.checks.passed and print_finished(run_folder(config, options), config.command)):
        from mimref.refinement.run import refine as run_refine

        run_training(run_refine, config, options)


class PretrainOptions(TrainedArch, TrainingOptions, panel="Training"):
    epochs: Text = option("Passes over the images.", "N", "mae.epochs")


def pretrain(options: PretrainOptions) -> None:
    """Train a masked autoencoder to start from.

    For images or sizes without public weights. Without options, this recreates the packaged tiny encoder.

    Examples:
      mimref pretrain --preset quickstart
      mimref pretrain --preset mae_b16 --data /data/my_images --out runs/my_mae
    """
    from mimref.config.presets import choose_pretrain_preset
    from mimref.pretraining.config import PretrainConfig

    preset = options.resumed_preset() or choose_pretrain_preset(options.preset, options.arch)
    config = options.load(PretrainConfig, preset)
    if not (options.resume and options.checks.passed and print_finished(run_folder(config, options), config.command)):
        from mimref.pretraining.run import pretrain as run_pretrain

        run_training(run_pretrain, config, options)


def run_folder(config: "TrainingConfig", options: TrainingOptions) -> Path:
    """`--out`; else `runs/refine-mae_l16` for the preset refine/mae_l16, `runs/refine-mine` for my/mine.toml."""
    preset = config.preset or "default"
    name = preset.removeprefix(f"{config.command}/").replace("/", "-")
    name = Path(preset).stem if preset.endswith(".toml") else name
    return options.out or Path("runs") / f"{config.command}-{name}"


def run_training(training: "Callable[..., TrainingResult]", config: "TrainingConfig", options: TrainingOptions) -> bool:
    """Train in the processes that torchrun has started; the first prints. Returns whether this is the first."""
    from mimref.reports.terminal import print_rows
    from mimref.training.folder import RunFolder

    out = run_folder(config, options)

    def work(config: "TrainingConfig", listener: "Listener", checks: Checks) -> "TrainingResult":
        # torchrun restarts all processes when one has died, with the same command.
        again = RunFolder(out).continues_launch()
        resume, force = options.resume or again, options.force and not again
        return training(config, out, resume=resume, force=force, listener=listener, checks=checks)

    advice = "the last saved state is kept: --resume continues, and torchrun --max-restarts does so by itself"
    result = run_on_ranks(config, options, work, advice=advice)
    if result is None:
        return False
    print_rows(result.rows)
    weights = ", ".join(map(str, sorted(out.glob("*.safetensors"))))
    note(f"encoder in {weights}, results in {out / 'results.json'}", options)
    write_page(out, options)
    return True
