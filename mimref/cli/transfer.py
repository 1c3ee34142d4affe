"""`mimref finetune` and `mimref predict`."""

from functools import partial
from pathlib import Path

from mimref.cli.execution import figure, note, print_finished, run_on_ranks
from mimref.cli.options import CHECKPOINT, MICRO_BATCH, WORKERS, Configured, Force, Shard, Split, Text, TrainedEncoder
from mimref.cli.parser import argument, option
from mimref.cli.training import DRY_RUN, TrainingOptions, print_plan, run_folder, run_training
from mimref.files import check_new_file


class FinetuneOptions(TrainedEncoder, Shard, TrainingOptions, panel="Training"):
    weights: Text = argument(
        f"{CHECKPOINT}; default: the packaged tiny encoder, on digits.", "CKPT", "encoder.weights", required=False
    )
    micro_batch: Text = option(MICRO_BATCH, "N", "micro_batch")
    epochs: Text = option("Passes over the images.", "N", "finetune.epochs")
    lr: Text = option("Base learning rate, for 256 images per update.", "RATE", "finetune.lr")
    pool: Text = option("Token pooling for the classifier; default cls.", "cls|mean", "finetune.pool")
    resolution: Text = option("Image size; default: the encoder's own.", "PIXELS", "resolution")
    shots: Text = option("Train on this many images per class; default all.", "N", "shots")
    splits: Text = option("Draws of the shots, each trained on separately; default 3.", "N", "splits")
    split_files: list[str] | None = option(
        "File that names training images, one per line; repeatable.", "FILE", "split_files", flag="--split-file"
    )
    dry_run: bool = DRY_RUN

    def chosen_preset(self) -> str | None:
        """Choose the preset for the options; None if a recipe derives the settings."""
        from mimref.config.presets import choose_finetune_preset

        arch, weights, data = map(self.given, ("encoder.arch", "encoder.weights", "data.spec"))
        preset = choose_finetune_preset(self.preset, arch, weights, data)
        if preset is None and arch is None and weights is None:
            self.weights = "quickstart"
        return preset


def finetune(options: FinetuneOptions) -> None:
    """Fine-tune an encoder and a classifier on labelled images.

    Trains on all training images, or on a few per class, and classifies the validation images after every epoch.
    predict, export and all evaluations read the result. Without a preset, settings are derived from the number of
    labels and the encoder. Without options, this fine-tunes the packaged tiny encoder on scikit-learn's digits.

    Examples:
      mimref finetune
      mimref finetune runs/my_mae --data /data/my_images --dry-run
      mimref finetune runs/mae_l16 --preset imagenet_l16 --data /data/imagenet
      mimref finetune runs/mae_l16 --preset inat18_5shot --data /data/inat18 --shots 5 --splits 3
    """
    from mimref.transfer.finetune.config import FinetuneConfig

    config = options.load(FinetuneConfig, options.resumed_preset(), options.chosen_preset)
    folder = run_folder(config, options)
    if options.dry_run:
        from mimref.benchmarks.planned import describe_finetuning
        from mimref.progress import Silent
        from mimref.transfer.finetune.plan import make_plan

        plan = make_plan(config, Silent(), checks=options.checks)
        print_plan(plan.config, plan.derived, describe_finetuning(plan), options)
        return
    if print_finished(folder, config.command, options):
        return
    from mimref.transfer.finetune.run import finetune as run_finetune

    if run_training(run_finetune, config, options):
        with figure(folder / "curve.png", options):
            from mimref.reports.figures import plot_learning_curve

            plot_learning_curve(folder / "curve.png", folder / "metrics.jsonl")


class PredictOptions(Configured, Split, Force, panel="Data"):
    checkpoint: str = argument("Weights file or output folder of `finetune`.", "CKPT", "checkpoint")
    images: str = argument("Images to classify: a folder, or what --data accepts.", "IMAGES", "data.spec")
    out: Path = option("Table to write: path, label and probability of every image.", "FILE.csv", required=True)
    resolution: Text = option("Image size; default: as in fine-tuning.", "PIXELS", "resolution")
    workers: Text = WORKERS


def predict(options: PredictOptions) -> None:
    """Classify images with a fine-tuned encoder.

    Writes a table with the most probable class of every image.

    Examples:
      mimref predict runs/finetune-quickstart /data/my_images --out labels.csv
    """
    from mimref.transfer.finetune.config import PredictConfig

    config, out = options.load(PredictConfig), options.out
    options.checks.run("out", lambda: check_new_file(out, (".csv",), options.force))

    from mimref.transfer.finetune.predict import predict as run_predict

    result = run_on_ranks(config, options, partial(run_predict, out=out))
    if result is not None:
        note(f"{result} images in {out}", options)
