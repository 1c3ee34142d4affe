"""`mimref knn`, `lowshot`, `cluster` and `probe`: one encoder by one protocol."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from mimref.cli.execution import check_out, note, print_finished, report, run_on_ranks
from mimref.cli.options import (
    Blocks,
    EncoderPass,
    Metrics,
    Output,
    Preset,
    Resume,
    Runs,
    Seed,
    Shots,
    Split,
    Splits,
    Subject,
    read_floats,
    read_ints,
)
from mimref.cli.parser import Option
from mimref.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from mimref.evaluation.cluster.protocol import Embedding
    from mimref.results import Row


@dataclass(kw_only=True)
class KnnOptions(Subject, EncoderPass, Blocks, Output):
    """Of `mimref knn`."""

    panel: ClassVar[str] = "Protocol"
    k: Annotated[str | None, Option("Neighbours that vote; default 10.", "10,20", "k", read_ints)] = None
    tau: Annotated[str | None, Option("Temperatures of the votes; default 0.07.", "0.07,0.1", "tau", read_floats)] = (
        None
    )
    standardize: Annotated[
        bool | None,
        Option("Scale every feature first; default on.", sets="standardize", flag="--standardize/--no-standardize"),
    ] = None
    per_class: Annotated[bool | None, Option("Report single classes as well.", sets="per_class")] = None


def knn(options: KnnOptions) -> None:
    """Classify images by their nearest neighbours.

    The training images vote on every validation image. Without CKPT: the packaged tiny encoder on scikit-learn's
    digits. Under torchrun the processes share the work.

    Examples:
      mimref knn
      mimref knn runs/mae_l16 --k 1,10,20 --tau 0.07 --blocks all --per-class
    """
    from mimref.evaluation.knn.config import KnnConfig

    config = options.load(KnnConfig)
    check_out(options)

    from mimref.evaluation.knn.protocol import evaluate_knn
    from mimref.reports.terminal import print_classes

    result = run_on_ranks(config, options, lambda listener: evaluate_knn(config, listener=listener))
    if result is not None:
        report(options, config, result)
        if config.per_class:
            print_classes(result.rows)


@dataclass(kw_only=True)
class LowshotOptions(Subject, EncoderPass, Blocks, Seed, Output):
    """Of `mimref lowshot`."""

    panel: ClassVar[str] = "Protocol"
    shots: Shots = None
    splits: Splits = None
    split_files: Annotated[
        list[str] | None,
        Option(
            "File that names the training images, one per line; repeatable.", "FILE", "split_files", flag="--split-file"
        ),
    ] = None


def lowshot(options: LowshotOptions) -> None:
    """Classify images from a few labelled ones per class.

    Logistic regression on the features of the drawn or named images. Without CKPT: the packaged tiny encoder on
    scikit-learn's digits.

    Examples:
      mimref lowshot --shots 1,5
      mimref lowshot runs/mae_l16 --split-file 1shot_0.txt --split-file 1shot_1.txt
    """
    from mimref.evaluation.lowshot.config import LowshotConfig

    config = options.load(LowshotConfig)
    check_out(options)

    from mimref.evaluation.lowshot.protocol import evaluate_lowshot

    result = run_on_ranks(config, options, lambda listener: evaluate_lowshot(config, listener=listener))
    if result is not None:
        report(options, config, result)


@dataclass(kw_only=True)
class ClusterOptions(Subject, EncoderPass, Blocks, Seed, Output):
    """Of `mimref cluster`."""

    panel: ClassVar[str] = "Protocol"
    metrics: Metrics = None
    runs: Runs = None
    split: Split = None
    classes: Annotated[
        str | None, Option("Only these classes, or those in a file of names.", "NAMES|FILE", "classes")
    ] = None
    umap: Annotated[Path | None, Option("Draw the images as points, coloured by class.", "FILE.png")] = None


def cluster(options: ClusterOptions) -> None:
    """Cluster images and compare the clusters with the classes.

    Mini-batch k-means: the best and the mean of many runs. Without CKPT: the packaged tiny encoder on scikit-learn's
    digits.

    Examples:
      mimref cluster --metrics acc,nmi
      mimref cluster runs/mae_l16 --classes food.txt --umap food.png
    """
    from mimref.evaluation.cluster.config import ClusterConfig

    config = options.load(ClusterConfig)
    check_out(options)
    umap = options.umap
    if umap is not None:
        _check_figure(umap, options.force)

    from mimref.evaluation.cluster.protocol import evaluate_cluster

    found = run_on_ranks(
        config, options, lambda listener: evaluate_cluster(config, embed=umap is not None, listener=listener)
    )
    if found is None:
        return
    result, embedding = found
    report(options, config, result)
    if embedding is not None and umap is not None:
        _draw_embedding(umap, embedding, result.rows)
        note(f"figure in {umap}", options)


@dataclass(kw_only=True)
class ProbeOptions(Subject, EncoderPass, Seed, Preset, Resume):
    """Of `mimref probe`."""

    panel: ClassVar[str] = "Protocol"
    cached: Annotated[
        bool | None, Option("Train on cached features of centre crops: many times faster.", sets="cached")
    ] = None
    epochs: Annotated[str | None, Option("Passes over the images.", "N", "probe.epochs")] = None
    batch_size: Annotated[str | None, Option("Images per update over all processes.", "N", "probe.batch_size")] = None
    select: Annotated[
        str | None, Option("Images the best classifier is chosen on; default test.", "test|val-split", "probe.select")
    ] = None
    final_norm: Annotated[
        bool | None,
        Option("The encoder's final norm; default on.", sets="final_norm", flag="--final-norm/--no-final-norm"),
    ] = None


def probe(options: ProbeOptions) -> None:
    """Train linear classifiers on the frozen encoder.

    DINOv2's protocol: a grid of classifiers, of which the best counts. With --out an interrupted probe can be
    continued by --resume. Without CKPT: the packaged tiny encoder on scikit-learn's digits.

    Examples:
      mimref probe --cached
      mimref probe runs/mae_l16 --out runs/probe
    """
    from mimref.evaluation.probe.config import ProbeConfig

    config = options.load(ProbeConfig, options.preset)
    if options.resume and options.out and print_finished(options.out, config.command):
        return
    check_out(options)
    state = _state_file(options)

    from mimref.evaluation.probe.protocol import evaluate_probe

    advice = "--resume continues the probe" if state else "run it again, with --out to be able to --resume it"
    result = run_on_ranks(
        config, options, lambda listener: evaluate_probe(config, state=state, listener=listener), advice=advice
    )
    if result is not None:
        report(options, config, result)
        if state is not None:
            state.unlink(missing_ok=True)


def _draw_embedding(file: Path, embedding: "Embedding", rows: Sequence["Row"]) -> None:
    """The images as points, above the clustering's scores."""
    from mimref.reports.figures import plot_embedding
    from mimref.reports.tables import scores_line

    title, caption = str(rows[0]["model"]), scores_line(rows)
    plot_embedding(file, embedding.points, embedding.y, embedding.class_names, title=title, caption=caption)


def _check_figure(file: Path, force: bool) -> None:
    if file.suffix.lower() != ".png":
        raise ConfigError(f"--umap {file}: figures are written as PNG; choose a file that ends in .png")
    if file.exists() and not force:
        raise OutputError(f"--umap {file}: exists; choose another file, or --force to replace it")


def _state_file(options: Resume) -> Path | None:
    """Where an interrupted probe continues from. Refuses one that is not to be continued, or removes it by force."""
    if options.out is None:
        if options.resume:
            raise ConfigError("--resume continues the probe in a folder; name it with --out DIR")
        return None
    state = options.out / "state" / "probe.pt"
    if state.exists() and not options.resume:
        if not options.force:
            raise OutputError(
                f"{options.out}: holds an unfinished probe; --resume continues it, --force starts from scratch"
            )
        state.unlink(missing_ok=True)  # another process of this run may have been first
    return state
