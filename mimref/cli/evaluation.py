"""Commands that evaluate encoders."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    parse_floats,
    parse_ints,
    parse_names,
)
from mimref.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from mimref.config import CommandConfig
    from mimref.evaluation.run import EvaluationResult


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

    The training images vote on every validation image. Without arguments: the packaged tiny encoder on scikit-learn's
    digits.
    """
    from mimref.evaluation_config import KnnConfig
    from mimref.recipes import load_config

    overrides = _inputs(checkpoint, features, arch, source, blocks, pool, final_norm, resolution, cache)
    overrides |= _common(checkpoint, features, data, device, precision, None, workers)
    overrides |= {"k": parse_ints("--k", k), "tau": parse_floats("--tau", tau)}
    overrides |= {"standardize": standardize, "per_class": per_class or None}
    config = load_config(KnnConfig, None, overrides, sets or ())
    _check_out(out, force)

    from mimref.evaluation.run import evaluate_knn
    from mimref.terminal import Terminal, print_classes

    with Terminal(quiet) as terminal:
        result = evaluate_knn(config, listener=terminal)
    _report(out, config, result, quiet)
    if config.per_class:
        print_classes(result.rows)


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
    """Classify images by logistic regression on a few labelled ones per class.

    Without arguments: the packaged tiny encoder on scikit-learn's digits.
    """
    from mimref.evaluation_config import LowshotConfig
    from mimref.recipes import load_config

    overrides = _inputs(checkpoint, features, arch, source, blocks, pool, final_norm, resolution, cache)
    overrides |= _common(checkpoint, features, data, device, precision, seed, workers)
    overrides |= {"shots": parse_ints("--shots", shots), "splits": splits, "split_files": split_files or None}
    config = load_config(LowshotConfig, None, overrides, sets or ())
    _check_out(out, force)

    from mimref.evaluation.run import evaluate_lowshot
    from mimref.terminal import Terminal

    with Terminal(quiet) as terminal:
        result = evaluate_lowshot(config, listener=terminal)
    _report(out, config, result, quiet)


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
    """Cluster images by k-means and compare the clusters with the classes.

    Without arguments: the packaged tiny encoder on scikit-learn's digits.
    """
    from mimref.evaluation_config import ClusterConfig
    from mimref.recipes import load_config

    overrides = _inputs(checkpoint, features, arch, source, blocks, pool, final_norm, resolution, cache)
    overrides |= _common(checkpoint, features, data, device, precision, seed, workers)
    overrides |= {"metrics": parse_names(metrics), "runs": runs, "split": split, "classes": classes}
    config = load_config(ClusterConfig, None, overrides, sets or ())
    _check_out(out, force)
    if umap is not None and umap.suffix.lower() != ".png":
        raise ConfigError(f"--umap {umap}: a figure is written as PNG; give a file that ends in .png")

    from mimref.evaluation.run import evaluate_cluster
    from mimref.report import scores_line
    from mimref.terminal import Terminal

    figure = umap or (out / "umap.png" if out else None)
    with Terminal(quiet) as terminal:
        result, embedding = evaluate_cluster(config, embed=umap is not None, listener=terminal)
    _report(out, config, result, quiet)
    if embedding is not None and figure is not None:
        from mimref.plots import plot_embedding

        title = str(result.rows[0]["model"])
        caption = scores_line(result.rows)
        plot_embedding(figure, embedding.points, embedding.y, embedding.class_names, title=title, caption=caption)
        _tell(f"figure in {figure}", quiet)


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
    """Train a grid of linear classifiers on the frozen encoder (DINOv2's protocol).

    With --out an interrupted probe can be continued by --resume. Without arguments: the packaged tiny encoder on
    scikit-learn's digits.
    """
    from mimref.evaluation_config import ProbeConfig
    from mimref.recipes import load_config

    overrides = _inputs(checkpoint, features, arch, source, None, None, final_norm, resolution, cache)
    overrides |= _common(checkpoint, features, data, device, precision, seed, workers)
    overrides |= {"cached": cached or None, "probe.epochs": epochs, "probe.batch_size": batch_size}
    chosen = preset or (None if checkpoint or features else "quickstart")
    config = load_config(ProbeConfig, chosen, overrides | {"probe.select": select}, sets or ())
    state = out / "state" / "probe.pt" if out else None
    if resume and state is None:
        raise ConfigError("--resume continues the probe in a folder; name it with --out DIR")
    _check_out(out, force or resume)
    _check_unfinished(state, resume=resume, force=force)

    from mimref.evaluation.run import evaluate_probe
    from mimref.terminal import Terminal

    with Terminal(quiet) as terminal:
        result = evaluate_probe(config, state=state, listener=terminal)
    _report(out, config, result, quiet)
    if state is not None:
        state.unlink(missing_ok=True)


def analyze_blocks(
    checkpoints: Annotated[
        list[str] | None, typer.Argument(metavar="[CKPT...]", help="Weights files or run folders.")
    ] = None,
    sets: SetOption = None,
    data: DataOption = None,
    arch: ArchOption = None,
    source: SourceOption = None,
    preset: PresetOption = None,
    k: Annotated[str | None, typer.Option("--k", metavar="K", help="Neighbours that vote; default 10.")] = None,
    tau: Annotated[str | None, typer.Option("--tau", metavar="T", help="Temperature of the votes.")] = None,
    pool: PoolOption = None,
    reconstruction: Annotated[
        bool, typer.Option("--reconstruction", help="Train a light decoder on every block as well (Fig. 6).")
    ] = False,
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
    """What every block of an encoder is worth, and which should get a head.

    Without arguments: the packaged tiny encoder on scikit-learn's digits.
    """
    from mimref.evaluation_config import BlocksConfig
    from mimref.recipes import load_config

    overrides: dict[str, Any] = {"checkpoints": checkpoints or None, "arch": arch, "source": source, "pool": pool}
    overrides |= {"resolution": resolution, "cache.folder": cache, "k": k, "tau": tau}
    overrides |= common(data or (None if checkpoints else "digits"), device, precision, seed, workers)
    overrides |= {"reconstruct": reconstruction or None}
    chosen = preset or (None if checkpoints else "quickstart")
    config = load_config(BlocksConfig, chosen, overrides, sets or ())
    _check_out(out, force)

    from mimref.evaluation.analysis import evaluate_blocks
    from mimref.terminal import Terminal, print_blocks

    with Terminal(quiet) as terminal:
        result = evaluate_blocks(config, listener=terminal)
    print_blocks(result.rows, result.heads)
    _write(out, config, result, quiet)
    if out is not None:
        from mimref.plots import plot_blocks

        plot_blocks(out / "blocks.png", result.rows, heads=result.heads)
        _tell(f"figure in {out / 'blocks.png'}", quiet)


def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Weights before refining, a file or a run's folder.")],
    refined: Annotated[list[str], typer.Argument(metavar="REFINED...", help="Weights to compare with it.")],
    sets: SetOption = None,
    data: DataOption = None,
    arch: ArchOption = None,
    source: SourceOption = None,
    protocols: Annotated[
        str | None,
        typer.Option("--protocols", metavar="knn,lowshot,cluster,probe", help="Default knn,lowshot,cluster."),
    ] = None,
    shots: ShotsOption = None,
    splits: DrawsOption = None,
    metrics: MetricsOption = None,
    runs: RunsOption = None,
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
    """Measure several encoders by the same protocols and show the differences.

    With --out: a table as CSV, JSON and Markdown, and a figure.
    """
    from mimref.evaluation_config import CompareConfig
    from mimref.recipes import load_config

    overrides: dict[str, Any] = {"base": base, "refined": refined, "arch": arch, "source": source, "pool": pool}
    overrides |= {"final_norm": final_norm, "resolution": resolution, "cache.folder": cache}
    overrides |= {"protocols": parse_names(protocols), "metrics": parse_names(metrics), "runs": runs}
    overrides |= {"shots": parse_ints("--shots", shots), "splits": splits}
    config = load_config(CompareConfig, None, overrides | common(data, device, precision, seed, workers), sets or ())
    _check_out(out, force)

    from mimref.evaluation.compare import compare_encoders
    from mimref.report import markdown_table
    from mimref.terminal import Terminal, print_comparison

    with Terminal(quiet) as terminal:
        result = compare_encoders(config, listener=terminal)
    first = str(result.rows[0]["model"])
    print_comparison(result.rows, first)
    _write(out, config, result, quiet)
    if out is not None:
        from mimref.files import write_bytes
        from mimref.plots import plot_comparison

        write_bytes(out / "results.md", markdown_table(result.rows, first).encode())
        plot_comparison(out / "comparison.png", result.rows, first)


def extract(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Weights file or the output folder of `refine`.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.npz|FILE.parquet", help="The file to write.")],
    sets: SetOption = None,
    data: DataOption = None,
    arch: ArchOption = None,
    source: SourceOption = None,
    split: SplitOption = None,
    blocks: BlocksOption = None,
    pool: PoolOption = None,
    final_norm: FinalNormOption = None,
    resolution: ResolutionOption = None,
    cache: CacheOption = None,
    force: ForceOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    workers: WorkersOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write features to a file: x, y where there are labels, and paths, in the order of the images."""
    from mimref.evaluation_config import ExtractConfig
    from mimref.recipes import load_config

    overrides = _inputs(checkpoint, None, arch, source, blocks, pool, final_norm, resolution, cache)
    overrides |= common(data, device, precision, None, workers) | {"split": split}
    config = load_config(ExtractConfig, None, overrides, sets or ())

    from mimref.evaluation.extraction import extract_to_file
    from mimref.terminal import Terminal

    with Terminal(quiet) as terminal:
        shape = extract_to_file(config, out, force=force, listener=terminal)
    _tell(f"features {' x '.join(map(str, shape))} in {out}", quiet)


def _inputs(
    checkpoint: str | None,
    features: tuple[str, str] | None,
    arch: str | None,
    source: str | None,
    blocks: str | None,
    pool: str | None,
    final_norm: bool | None,
    resolution: str | None,
    cache: str | None,
) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint,
        "features": features,
        "arch": arch,
        "source": source,
        "blocks": blocks,
        "pool": pool,
        "final_norm": final_norm,
        "resolution": resolution,
        "cache.folder": cache,
    }


def _common(
    checkpoint: str | None,
    features: tuple[str, str] | None,
    data: str | None,
    device: str | None,
    precision: str | None,
    seed: str | None,
    workers: str | None,
) -> dict[str, Any]:
    """Common settings; digits where nothing at all is named."""
    return common(data or (None if checkpoint or features else "digits"), device, precision, seed, workers)


def _check_out(out: Path | None, force: bool) -> None:
    if out and (out / "results.json").exists() and not force:
        raise OutputError(f"{out}: holds results; give another --out, or --force to replace them")


def _check_unfinished(state: Path | None, *, resume: bool, force: bool) -> None:
    if state is None or not state.exists() or resume:
        return
    if not force:
        raise OutputError(
            f"{state.parent.parent}: holds an unfinished probe; --resume continues it, --force starts anew"
        )
    state.unlink()


def _report(out: Path | None, config: "CommandConfig", result: "EvaluationResult", quiet: bool) -> None:
    from mimref.terminal import print_rows

    print_rows(result.rows)
    _write(out, config, result, quiet)


def _write(out: Path | None, config: "CommandConfig", result: "EvaluationResult", quiet: bool) -> None:
    if out is None:
        return
    from mimref.results import write_results

    settings = config.model_dump(mode="json")
    write_results(out, config.command, settings, result.elapsed_s, result.rows, bad_images=result.bad_images)
    _tell(f"results in {out}", quiet)


def _tell(line: str, quiet: bool) -> None:
    if not quiet:
        typer.echo(line, err=True)
