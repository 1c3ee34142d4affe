"""`mimref inspect`, `export` and `interpolate`: weights files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import typer

from mimref.cli.execution import note, print_facts
from mimref.cli.options import (
    CHECKPOINT,
    Debug,
    Force,
    Images,
    Output,
    Text,
    arch_option,
    part_option,
    read_floats,
    read_ints,
    source_option,
)
from mimref.cli.parser import argument, option
from mimref.errors import ConfigError


def grid_option() -> Any:
    """`--grid`, for commands without settings."""
    return option("Patches that positions are for, where they are no square.", "ROWS,COLUMNS")


def read_grid(text: str | None) -> tuple[int, int] | None:
    """The value of `--grid`."""
    if text is None:
        return None
    numbers = read_ints("--grid", text)
    if not isinstance(numbers, list) or len(numbers) != 2 or min(numbers) < 1:
        raise ConfigError(f"--grid {text}: expected rows and columns, such as 4,8")
    return numbers[0], numbers[1]


class InspectOptions(Debug, panel="Output"):
    file: str = argument("Weights file, run folder or published name.", "FILE")
    encoder: Text = part_option()
    grid: Text = grid_option()
    as_json: bool = option("Everything, for programs.", flag="--json")


def inspect(options: InspectOptions) -> None:
    """Show what a weights file is.

    Its format and architecture, where its tensors go, and what is dropped.

    Examples:
      mimref inspect quickstart
      mimref inspect mae_pretrain_vit_large.pth --json
    """
    from mimref.encoders.inspection import inspect_file
    from mimref.reports.terminal import print_inspection

    inspection = inspect_file(options.file, part=options.encoder, grid=read_grid(options.grid))
    if options.as_json:
        typer.echo(json.dumps(asdict(inspection), indent=2))
    else:
        print_inspection(inspection)


class ExportOptions(Force, panel="Encoder"):
    checkpoint: str = argument(f"{CHECKPOINT}.", "CKPT")
    to: Literal["timm", "release", "onnx"] = option("Target format.", required=True)
    out: Path = option("File to write; its ending must fit --to.", "FILE", required=True)
    blocks: Text = option("Outputs of the ONNX graph; default last. Requires --to onnx.", "last|all|1,5,12")
    resolution: int | None = option("Default: the encoder's own.", "PIXELS", min=1)
    arch: Text = arch_option()
    source: Text = source_option()
    encoder: Text = part_option()
    grid: Text = grid_option()
    num_heads: int | None = option("Attention heads, where they cannot be inferred from the weights.", "N", min=1)
    interpolation: Text = option(
        "Whose rule interpolates positions to another --resolution; default the weights' own.",
        "mae|dino|dinov2|dinov2_reg|timm|torchvision|mae_pytorch",
    )


def export(options: ExportOptions) -> None:
    """Write an encoder in another format, read it again and compare.

    timm: for timm.create_model with checkpoint_path. release: the layout of the MIM-Refiner releases. onnx: a graph
    whose outputs are the tokens of the chosen blocks.

    Examples:
      mimref export runs/mae_l16 --to timm --out refined.pth
      mimref export runs/mae_l16 --to onnx --out refined.onnx --blocks 18,24
    """
    to, out, force = options.to, options.out, options.force
    if options.blocks is not None and to != "onnx":
        raise ConfigError(f"--blocks {options.blocks}: requires --to onnx; --to {to} keeps every block")

    from mimref.encoders.export import export_release, export_timm, read_encoder
    from mimref.encoders.export_onnx import export_onnx
    from mimref.features.encode import block_groups
    from mimref.reports.terminal import Terminal

    hints = {name: getattr(options, name) for name in ("arch", "source", "num_heads", "resolution", "interpolation")}
    hints |= {"part": options.encoder, "grid": read_grid(options.grid)}
    with Terminal(options.quiet) as terminal:
        encoder, facts = read_encoder(options.checkpoint, **hints, listener=terminal)
        if to == "timm":
            done = export_timm(encoder, out, facts, force=force, listener=terminal)
        elif to == "release":
            done = export_release(encoder, out, facts, force=force, listener=terminal)
        else:
            groups = block_groups(options.blocks or "last", encoder.depth)
            blocks = [number for group in groups.values() for number in group]
            done = export_onnx(encoder, out, facts, blocks, force=force, listener=terminal)
    name = {"timm name": done.timm_name or "none of these sizes"} if to == "timm" else {}
    difference = {"largest difference": f"{done.difference:.1e}"}
    print_facts({"file": str(done.path)} | name | {"read with": done.read_with} | difference)


class InterpolateOptions(Images, Output, panel="Encoder"):
    base: str = argument("Weights before refining: a file or a run's folder.", "BASE", "base")
    refined: str = argument("Weights after refining.", "REFINED", "refined")
    encoder: Text = part_option("encoder.part")
    alpha: Text = option("Shares of REFINED; default 0,0.25,0.5,0.75,1.", "A,B,...", "alpha", read_floats)


def interpolate(options: InterpolateOptions) -> None:
    """Average the weights of two encoders.

    With --data, the k-NN accuracy of every average is reported.

    Examples:
      mimref interpolate quickstart runs/refine-quickstart --data digits
      mimref interpolate mae_l16 runs/mae_l16 --alpha 0,0.5,1 --out runs/averages
    """
    from mimref.evaluation.config import InterpolateConfig

    config = options.load(InterpolateConfig)

    from mimref.evaluation.interpolate import interpolate as average
    from mimref.reports.terminal import Terminal, print_rows

    out = options.out or Path("runs") / "interpolate"
    with Terminal(options.quiet) as terminal:
        result = average(config, out, force=options.force, listener=terminal)
    print_rows(result.rows)
    note(f"{len(config.alpha)} encoders in {out}", options)
