"""Commands that evaluate one encoder by one protocol."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mimref.cli.options import (
    ArchOption,
    BatchSizeOption,
    BlocksOption,
    CacheOption,
    CheckpointArgument,
    DataOption,
    DebugOption,
    DeviceOption,
    DrawsOption,
    EpochsOption,
    FeaturesOption,
    FinalNormOption,
    ForceOption,
    MetricsOption,
    NeighboursOption,
    OutOption,
    PoolOption,
    PrecisionOption,
    PresetOption,
    QuietOption,
    ResolutionOption,
    ResumeOption,
    RunsOption,
    SeedOption,
    SelectOption,
    SetOption,
    ShotsOption,
    SourceOption,
    SplitOption,
    TauOption,
    WorkersOption,
    common,
    encoder_settings,
    parse_floats,
    parse_ints,
    parse_names,
)
from mimref.cli.output import check_out, print_finished, report, tell
from mimref.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from mimref.evaluation.cluster.protocol import Embedding
    from mimref.results import Row


def knn(
    checkpoint: CheckpointArgument = None,
    features: FeaturesOption = None,
    sets: SetOption = None,
    data: DataOption = None,
    arch: ArchOption = None,
    source: SourceOption = None,
    k: NeighboursOption = None,
    tau: TauOption = None,
    standardize: Annotated[
        bool | None, typer.Option("--standardize/--no-standardize", help="Scale every feature first; default on.")
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="One result per class as well.")] = False,
    blocks: BlocksOption = None,
    pool: PoolOption = None,
    final_norm: FinalNormOption = None,
    resolution: ResolutionOption = None,
    cache: CacheOption = None,
    out: OutOption = None,
    force: ForceOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    workers: WorkersOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Classify images by their nearest neighbours.

    The training images vote on every validation image. Under torchrun the processes share the search. Without
    arguments: the packaged tiny encoder on scikit-learn's digits.
    """
    from mimref.config.load import load_config
    from mimref.evaluation.knn.config import KnnConfig

    overrides = encoder_settings(checkpoint, features, arch, source, blocks, pool, final_norm, resolution, cache)
    overrides |= common(data, device, precision, None, workers)
    overrides |= {"k": parse_ints("--k", k), "tau": parse_floats("--tau", tau)}
    overrides |= {"standardize": standardize, "per_class": per_class or None}
    config = load_config(KnnConfig, None, overrides, sets or ())
    check_out(out, force)

    from mimref.distributed.group import process_group
    from mimref.evaluation.knn.protocol import evaluate_knn
    from mimref.reports.terminal import Terminal

    with process_group(config.device) as rank, Terminal(quiet or rank > 0) as terminal:
        result = evaluate_knn(config, listener=terminal)
    if rank == 0:
        report(out, config, result, quiet)


def lowshot(
    checkpoint: CheckpointArgument = None,
    features: FeaturesOption = None,
    sets: SetOption = None,
    data: DataOption = None,
    arch: ArchOption = None,
    source: SourceOption = None,
    shots: ShotsOption = None,
    splits: DrawsOption = None,
    split_files: Annotated[
        list[str] | None,
        typer.Option("--split-file", metavar="FILE", help="Training images by name, one per line; repeatable."),
    ] = None,
    blocks: BlocksOption = None,
    pool: PoolOption = None,
    final_norm: FinalNormOption = None,
    resolution: ResolutionOption = None,
    cache: CacheOption = None,
    out: OutOption = None,
    force: ForceOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Classify images by a few labelled ones per class.

    Logistic regression.

    Without arguments: the packaged tiny encoder on scikit-learn's digits.
    """
    from mimref.config.load import load_config
    from mimref.evaluation.lowshot.config import LowshotConfig

    overrides = encoder_settings(checkpoint, features, arch, source, blocks, pool, final_norm, resolution, cache)
    overrides |= common(data, device, precision, seed, workers)
    overrides |= {"shots": parse_ints("--shots", shots), "splits": splits, "split_files": split_files or None}
    config = load_config(LowshotConfig, None, overrides, sets or ())
    check_out(out, force)

    from mimref.distributed.group import process_group
    from mimref.evaluation.lowshot.protocol import evaluate_lowshot
    from mimref.reports.terminal import Terminal

    with process_group(config.device) as rank, Terminal(quiet or rank > 0) as terminal:
        result = evaluate_lowshot(config, listener=terminal)
    if rank > 0:
        return
    report(out, config, result, quiet)


def cluster(
    checkpoint: CheckpointArgument = None,
    features: FeaturesOption = None,
    sets: SetOption = None,
    data: DataOption = None,
    arch: ArchOption = None,
    source: SourceOption = None,
    metrics: MetricsOption = None,
    runs: RunsOption = None,
    split: SplitOption = None,
    classes: Annotated[
        str | None, typer.Option("--classes", metavar="NAMES|FILE", help="Only these classes, or a file of names.")
    ] = None,
    umap: Annotated[
        Path | None, typer.Option("--umap", metavar="FILE.png", help="Draw the images as points, coloured by class.")
    ] = None,
    blocks: BlocksOption = None,
    pool: PoolOption = None,
    final_norm: FinalNormOption = None,
    resolution: ResolutionOption = None,
    cache: CacheOption = None,
    out: OutOption = None,
    force: ForceOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Cluster images and compare the clusters with the classes.

    k-means, best and mean of many runs.

    Without arguments: the packaged tiny encoder on scikit-learn's digits.
    """
    from mimref.config.load import load_config
    from mimref.evaluation.cluster.config import ClusterConfig

    overrides = encoder_settings(checkpoint, features, arch, source, blocks, pool, final_norm, resolution, cache)
    overrides |= common(data, device, precision, seed, workers)
    overrides |= {"metrics": parse_names(metrics), "runs": runs, "split": split, "classes": classes}
    config = load_config(ClusterConfig, None, overrides, sets or ())
    check_out(out, force)
    if umap is not None:
        _check_figure(umap, force)

    from mimref.distributed.group import process_group
    from mimref.evaluation.cluster.protocol import evaluate_cluster
    from mimref.reports.terminal import Terminal

    with process_group(config.device) as rank, Terminal(quiet or rank > 0) as terminal:
        result, embedding = evaluate_cluster(config, embed=umap is not None, listener=terminal)
    if rank > 0:
        return
    report(out, config, result, quiet)
    if embedding is not None and umap is not None:
        _draw_embedding(umap, embedding, result.rows)
        tell(f"figure in {umap}", quiet)


def probe(
    checkpoint: CheckpointArgument = None,
    features: FeaturesOption = None,
    sets: SetOption = None,
    data: DataOption = None,
    arch: ArchOption = None,
    source: SourceOption = None,
    preset: PresetOption = None,
    cached: Annotated[
        bool, typer.Option("--cached", help="Train on cached features of centre crops: many times faster.")
    ] = False,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = None,
    select: SelectOption = None,
    final_norm: Annotated[
        bool | None, typer.Option("--final-norm/--no-final-norm", help="The encoder's last norm; default on.")
    ] = None,
    resolution: ResolutionOption = None,
    cache: CacheOption = None,
    resume: ResumeOption = False,
    out: OutOption = None,
    force: ForceOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train linear classifiers on the frozen encoder.

    DINOv2's protocol: a grid of them, of which the best one counts. With --out an interrupted probe can be continued by
    --resume. Without arguments: the packaged tiny encoder on scikit-learn's digits.
    """
    from mimref.config.load import load_config
    from mimref.evaluation.probe.config import ProbeConfig

    overrides = encoder_settings(checkpoint, features, arch, source, None, None, final_norm, resolution, cache)
    overrides |= common(data, device, precision, seed, workers)
    overrides |= {"cached": cached or None, "probe.epochs": epochs, "probe.batch_size": batch_size}
    config = load_config(ProbeConfig, preset, overrides | {"probe.select": select}, sets or ())
    if resume and out and print_finished(out, config.command):
        return
    check_out(out, force)
    state = _state_file(out, resume=resume, force=force)

    from mimref.distributed.group import process_group
    from mimref.evaluation.probe.protocol import evaluate_probe
    from mimref.reports.terminal import Terminal

    advice = "--resume continues the probe" if state else "run it again, with --out to be able to --resume it"
    with process_group(config.device, advice=advice) as rank, Terminal(quiet or rank > 0) as terminal:
        result = evaluate_probe(config, state=state, listener=terminal)
    if rank > 0:
        return
    report(out, config, result, quiet)
    if state is not None:
        state.unlink(missing_ok=True)


def _draw_embedding(file: Path, embedding: "Embedding", rows: Sequence["Row"]) -> None:
    """The images as points, with the clustering's scores under them."""
    from mimref.reports.figures import plot_embedding
    from mimref.reports.metrics import scores_line

    title, caption = str(rows[0]["model"]), scores_line(rows)
    plot_embedding(file, embedding.points, embedding.y, embedding.class_names, title=title, caption=caption)


def _check_figure(file: Path, force: bool) -> None:
    if file.suffix.lower() != ".png":
        raise ConfigError(f"--umap {file}: a figure is written as PNG; give a file that ends in .png")
    if file.exists() and not force:
        raise OutputError(f"--umap {file}: exists; give another file, or --force to replace it")


def _state_file(out: Path | None, *, resume: bool, force: bool) -> Path | None:
    """Where an interrupted probe is continued from; one that is not to be continued is refused, or removed by force."""
    if out is None:
        if resume:
            raise ConfigError("--resume continues the probe in a folder; name it with --out DIR")
        return None
    state = out / "state" / "probe.pt"
    if state.exists() and not resume:
        if not force:
            raise OutputError(f"{out}: holds an unfinished probe; --resume continues it, --force starts anew")
        state.unlink(missing_ok=True)  # another process of this run may have been first
    return state
