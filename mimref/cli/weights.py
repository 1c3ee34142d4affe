"""`mimref inspect`, `interpolate` and `export`: weights files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import typer

from mimref.cli.execution import note, print_facts
from mimref.cli.options import ARCH, CHECKPOINT, SOURCE, Debug, Force, Images, Output, read_floats
from mimref.cli.parser import Argument, Option
from mimref.errors import ConfigError


@dataclass(kw_only=True)
class InspectOptions(Debug):
    """Of `mimref inspect`."""

    panel: ClassVar[str] = "Output"
    file: Annotated[str, Argument("Weights file, run folder or published name.", "FILE")]
    as_json: Annotated[bool, Option("Everything, for programs.", flag="--json")] = False


def inspect(options: InspectOptions) -> None:
    """Show what a weights file is.

    Its format and architecture, where its tensors go, and what is dropped.

    Examples:
      mimref inspect quickstart
      mimref inspect mae_pretrain_vit_large.pth --json
    """
    from mimref.encoders.inspection import inspect_file
    from mimref.reports.terminal import print_inspection

    inspection = inspect_file(options.file)
    if options.as_json:
        typer.echo(json.dumps(inspection.to_dict(), indent=2))
    else:
        print_inspection(inspection)


@dataclass(kw_only=True)
class InterpolateOptions(Images, Output):
    """Of `mimref interpolate`."""

    panel: ClassVar[str] = "Encoder"
    base: Annotated[str, Argument("Weights before refining: a file or a run's folder.", "BASE", "base")]
    refined: Annotated[str, Argument("Weights after refining.", "REFINED", "refined")]
    alpha: Annotated[
        str | None,
        Option("Shares of REFINED; default 0,0.25,0.5,0.75,1.", "A,B,...", "alpha", read_floats),
    ] = None


def interpolate(options: InterpolateOptions) -> None:
    """Average the weights of two encoders.

    With --data, the k-NN accuracy of every average is reported.

    Examples:
      mimref interpolate quickstart runs/refine-quickstart --data digits
      mimref interpolate mae_l16 runs/mae_l16 --alpha 0,0.5,1 --data /data/imagenet --out runs/averages
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


@dataclass(kw_only=True)
class ExportOptions(Force):
    """Of `mimref export`."""

    panel: ClassVar[str] = "Encoder"
    checkpoint: Annotated[str, Argument(CHECKPOINT, "CKPT")]
    to: Annotated[Literal["timm", "release", "onnx"], Option("Target format.")]
    out: Annotated[Path, Option("File to write; its ending must fit --to.", "FILE")]
    blocks: Annotated[
        str | None, Option("Outputs of the ONNX graph; default last. Requires --to onnx.", "last|all|1,5,12")
    ] = None
    resolution: Annotated[int | None, Option("Default: the encoder's own.", "PIXELS", min=1)] = None
    arch: Annotated[str | None, Option(ARCH, "NAME")] = None
    source: Annotated[str | None, Option(SOURCE, "NAME")] = None
    num_heads: Annotated[
        int | None, Option("Attention heads, where they cannot be inferred from the weights.", "N", min=1)
    ] = None


def export(options: ExportOptions) -> None:
    """Write an encoder in another format.

    The file is loaded again and its features compared before the export counts as done.

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
    from mimref.encoders.onnx import export_onnx
    from mimref.features.encode import block_groups
    from mimref.reports.terminal import Terminal

    with Terminal(options.quiet) as terminal:
        encoder, facts = read_encoder(
            options.checkpoint,
            arch=options.arch,
            source=options.source,
            num_heads=options.num_heads,
            resolution=options.resolution,
            listener=terminal,
        )
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
