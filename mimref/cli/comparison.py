"""`mimref analyze-blocks`, `compare` and `extract`: several blocks or encoders, and features as a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from mimref.cli.execution import check_out, note, run_on_ranks, write
from mimref.cli.options import (
    CHECKPOINT,
    Blocks,
    EncoderPass,
    Force,
    Metrics,
    Output,
    Pool,
    Pooled,
    Preset,
    Runs,
    Seed,
    Shots,
    Split,
    Splits,
    read_names,
)
from mimref.cli.parser import Argument, Option


@dataclass(kw_only=True)
class BlocksOptions(EncoderPass, Pool, Seed, Preset, Output):
    """Of `mimref analyze-blocks`."""

    panel: ClassVar[str] = "Protocol"
    checkpoints: Annotated[
        list[str] | None, Argument("Weights files, or output folders of `refine`.", "[CKPT...]", "checkpoints")
    ] = None
    k: Annotated[str | None, Option("Neighbours that vote; default 10.", "K", "k")] = None
    tau: Annotated[str | None, Option("Temperature of the votes; default 0.07.", "T", "tau")] = None
    reconstruction: Annotated[
        bool | None, Option("Train a light decoder on every block as well (Fig. 6).", sets="reconstruct")
    ] = None


def analyze_blocks(options: BlocksOptions) -> None:
    """Score every block, and recommend blocks for the heads.

    k-NN accuracy and feature statistics per block; a figure with --out. Without CKPT: the packaged tiny encoder on
    scikit-learn's digits.

    Examples:
      mimref analyze-blocks
      mimref analyze-blocks mae_l16 runs/mae_l16 --data /data/imagenet --out runs/blocks
    """
    from mimref.evaluation.blocks.config import BlocksConfig

    config = options.load(BlocksConfig, options.preset or (None if options.checkpoints else "quickstart"))
    check_out(options)

    from mimref.evaluation.blocks.protocol import evaluate_blocks
    from mimref.reports.terminal import print_blocks

    result = run_on_ranks(config, options, lambda listener: evaluate_blocks(config, listener=listener))
    if result is None:
        return
    print_blocks(result.rows, result.heads)
    write(options, config, result)
    if options.out is not None:
        from mimref.reports.figures import plot_blocks

        figure = options.out / "blocks.png"
        plot_blocks(figure, result.rows, heads=result.heads)
        note(f"figure in {figure}", options)


@dataclass(kw_only=True)
class CompareOptions(EncoderPass, Pooled, Seed, Output):
    """Of `mimref compare`."""

    panel: ClassVar[str] = "Protocol"
    base: Annotated[str, Argument("Weights before refining: a file or a run's folder.", "BASE", "base")]
    refined: Annotated[list[str], Argument("Weights to compare with BASE.", "REFINED...", "refined")]
    protocols: Annotated[
        str | None,
        Option("Default knn,lowshot,cluster.", "knn,lowshot,cluster,probe", "protocols", read_names),
    ] = None
    shots: Shots = None
    splits: Splits = None
    metrics: Metrics = None
    runs: Runs = None


def compare(options: CompareOptions) -> None:
    """Measure several encoders by the same protocols.

    With --out: a table as CSV, JSON and Markdown, and a figure.

    Examples:
      mimref compare quickstart runs/refine-quickstart
      mimref compare mae_l16 runs/mae_l16 --data /data/imagenet --out runs/compared
    """
    from mimref.evaluation.config import CompareConfig

    config = options.load(CompareConfig)
    check_out(options)

    from mimref.evaluation.compare import compare_encoders
    from mimref.reports.terminal import print_comparison

    result = run_on_ranks(config, options, lambda listener: compare_encoders(config, listener=listener))
    if result is None:
        return
    first = str(result.rows[0]["model"])
    print_comparison(result.rows, first)
    write(options, config, result)
    if options.out is not None:
        from mimref.files import write_bytes
        from mimref.reports.figures import plot_comparison
        from mimref.reports.tables import markdown_table

        write_bytes(options.out / "results.md", markdown_table(result.rows, first).encode())
        plot_comparison(options.out / "comparison.png", result.rows, first)


@dataclass(kw_only=True)
class ExtractOptions(EncoderPass, Blocks, Force):
    """Of `mimref extract`."""

    panel: ClassVar[str] = "Output"
    checkpoint: Annotated[str, Argument(CHECKPOINT, "CKPT", "checkpoint")]
    out: Annotated[Path, Option("File to write.", "FILE.npz|FILE.parquet")]
    split: Split = None


def extract(options: ExtractOptions) -> None:
    """Write features to a file for other programs.

    Arrays in the order of the images: x, y for labelled images, and paths. Images need no labels.

    Examples:
      mimref extract quickstart --out features.npz
      mimref extract runs/mae_l16 --blocks 18,24 --data /data/my_images --out features.parquet
    """
    from mimref.features.config import ExtractConfig

    config = options.load(ExtractConfig)

    from mimref.features.extraction import extract_to_file

    out = options.out
    shape = run_on_ranks(
        config, options, lambda listener: extract_to_file(config, out, force=options.force, listener=listener)
    )
    if shape is not None:
        note(f"features {' x '.join(map(str, shape))} in {out}", options)
