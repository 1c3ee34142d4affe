"""Commands that look at several blocks or encoders, and the one that writes features."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mimref.cli.options import (
    ArchOption,
    BlocksOption,
    CacheOption,
    DataOption,
    DebugOption,
    DeviceOption,
    DrawsOption,
    FinalNormOption,
    ForceOption,
    MetricsOption,
    OutOption,
    PoolOption,
    PrecisionOption,
    PresetOption,
    QuietOption,
    ResolutionOption,
    RunsOption,
    SeedOption,
    SetOption,
    ShotsOption,
    SourceOption,
    SplitOption,
    WorkersOption,
    common,
    encoder_settings,
    parse_ints,
    parse_names,
)
from mimref.cli.output import check_out, tell, write


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
    """Tell what every block is worth, and which need a head.

    Without arguments: the packaged tiny encoder on scikit-learn's digits.
    """
    from mimref.config.load import load_config
    from mimref.evaluation.blocks.config import BlocksConfig

    overrides: dict[str, Any] = {"checkpoints": checkpoints or None, "arch": arch, "source": source, "pool": pool}
    overrides |= {"resolution": resolution, "cache.folder": cache, "k": k, "tau": tau}
    overrides |= common(data, device, precision, seed, workers)
    overrides |= {"reconstruct": reconstruction or None}
    chosen = preset or (None if checkpoints else "quickstart")
    config = load_config(BlocksConfig, chosen, overrides, sets or ())
    check_out(out, force)

    from mimref.distributed.group import process_group
    from mimref.evaluation.blocks.protocol import evaluate_blocks
    from mimref.reports.terminal import Terminal, print_blocks

    with process_group(config.device) as rank, Terminal(quiet or rank > 0) as terminal:
        result = evaluate_blocks(config, listener=terminal)
    if rank > 0:
        return
    print_blocks(result.rows, result.heads)
    write(out, config, result, quiet)
    if out is not None:
        from mimref.reports.figures import plot_blocks

        plot_blocks(out / "blocks.png", result.rows, heads=result.heads)
        tell(f"figure in {out / 'blocks.png'}", quiet)


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
    """Measure several encoders by the same protocols.

    With --out: a table as CSV, JSON and Markdown, and a figure.
    """
    from mimref.config.load import load_config
    from mimref.evaluation.config import CompareConfig

    overrides: dict[str, Any] = {"base": base, "refined": refined, "arch": arch, "source": source, "pool": pool}
    overrides |= {"final_norm": final_norm, "resolution": resolution, "cache.folder": cache}
    overrides |= {"protocols": parse_names(protocols), "metrics": parse_names(metrics), "runs": runs}
    overrides |= {"shots": parse_ints("--shots", shots), "splits": splits}
    config = load_config(CompareConfig, None, overrides | common(data, device, precision, seed, workers), sets or ())
    check_out(out, force)

    from mimref.distributed.group import process_group
    from mimref.evaluation.compare import compare_encoders
    from mimref.reports.tables import markdown_table
    from mimref.reports.terminal import Terminal, print_comparison

    with process_group(config.device) as rank, Terminal(quiet or rank > 0) as terminal:
        result = compare_encoders(config, listener=terminal)
    if rank > 0:
        return
    first = str(result.rows[0]["model"])
    print_comparison(result.rows, first)
    write(out, config, result, quiet)
    if out is not None:
        from mimref.files import write_bytes
        from mimref.reports.figures import plot_comparison

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
    """Write features to a file for other programs.

    x, y where there are labels, and paths, in the order of the images.
    """
    from mimref.config.load import load_config
    from mimref.features.config import ExtractConfig

    overrides = encoder_settings(checkpoint, None, arch, source, blocks, pool, final_norm, resolution, cache)
    overrides |= common(data, device, precision, None, workers) | {"split": split}
    config = load_config(ExtractConfig, None, overrides, sets or ())

    from mimref.distributed.group import process_group
    from mimref.features.extraction import extract_to_file
    from mimref.reports.terminal import Terminal

    with process_group(config.device) as rank, Terminal(quiet or rank > 0) as terminal:
        shape = extract_to_file(config, out, force=force, listener=terminal)
    if rank > 0:
        return
    tell(f"features {' x '.join(map(str, shape))} in {out}", quiet)
