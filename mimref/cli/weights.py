"""Commands on weights files, and on the presets that ship."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mimref.cli.options import (
    ArchOption,
    DataOption,
    DebugOption,
    DeviceOption,
    ForceOption,
    OutOption,
    PrecisionOption,
    QuietOption,
    SetOption,
    SourceOption,
    WorkersOption,
    common,
    parse_floats,
    print_facts,
)
from mimref.errors import ConfigError


def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A weights file, or a run's output folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
    debug: DebugOption = False,
) -> None:
    """Tell what a weights file is.

    Its format, its architecture, and what becomes of its tensors.
    """
    from mimref.encoders.inspection import inspect_file
    from mimref.reports.terminal import print_inspection

    inspection = inspect_file(file)
    if as_json:
        typer.echo(json.dumps(asdict(inspection), indent=2))
    else:
        print_inspection(inspection)


def interpolate(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Weights before refining, a file or a run's folder.")],
    refined: Annotated[str, typer.Argument(metavar="REFINED", help="Weights after it.")],
    alpha: Annotated[
        str | None, typer.Option("--alpha", metavar="A,B,...", help="Shares of REFINED; default 0,0.25,0.5,0.75,1.")
    ] = None,
    data: DataOption = None,
    sets: SetOption = None,
    out: OutOption = None,
    force: ForceOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    workers: WorkersOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Average the weights of two encoders.

    With --data the k-NN accuracy of every average is told.
    """
    from mimref.config.load import load_config
    from mimref.evaluation.config import InterpolateConfig

    overrides: dict[str, Any] = {"base": base, "refined": refined, "alpha": parse_floats("--alpha", alpha)}
    config = load_config(
        InterpolateConfig, None, overrides | common(data, device, precision, None, workers), sets or ()
    )

    from mimref.evaluation.interpolate import interpolate as average
    from mimref.reports.terminal import Terminal, print_rows

    out = out or Path("runs") / "interpolate"
    with Terminal(quiet) as terminal:
        result = average(config, out, force=force, listener=terminal)
    print_rows(result.rows)
    if not quiet:
        typer.echo(f"{len(config.alpha)} encoders in {out}", err=True)


def export(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Weights file or the output folder of `refine`.")],
    to: Annotated[Literal["timm", "release", "onnx"], typer.Option("--to", help="Who shall read it.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write; its ending must fit --to.")],
    blocks: Annotated[
        str | None, typer.Option("--blocks", metavar="last|all|1,5,12", help="Outputs of ONNX; default last.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option("--resolution", metavar="PIXELS", min=1, help="Default: the encoder's own.")
    ] = None,
    arch: ArchOption = None,
    source: SourceOption = None,
    num_heads: Annotated[
        int | None,
        typer.Option("--num-heads", metavar="N", min=1, help="Attention heads, where CKPT does not tell."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write an encoder in another format.

    The file is read again and its features compared.

    timm: for timm.create_model(..., checkpoint_path=FILE). release: the layout of the MIM-Refiner releases. onnx: a
    graph with the chosen blocks' tokens as outputs.
    """
    if blocks is not None and to != "onnx":
        raise ConfigError(f"--blocks {blocks}: goes with --to onnx alone; --to {to} keeps every block")

    from mimref.encoders.export import read_encoder
    from mimref.encoders.export_onnx import export_onnx
    from mimref.encoders.export_release import export_release
    from mimref.encoders.export_timm import export_timm
    from mimref.features.encode import block_groups
    from mimref.reports.terminal import Terminal

    with Terminal(quiet) as terminal:
        encoder, facts = read_encoder(
            checkpoint, arch=arch, source=source, num_heads=num_heads, resolution=resolution, listener=terminal
        )
        if to == "timm":
            done = export_timm(encoder, out, facts, force=force, listener=terminal)
        elif to == "release":
            done = export_release(encoder, out, facts, force=force, listener=terminal)
        else:
            chosen = [number for group in block_groups(blocks or "last", encoder.depth).values() for number in group]
            done = export_onnx(encoder, out, facts, chosen, force=force, listener=terminal)
    name = {"timm name": done.timm_name or "none of these sizes"} if to == "timm" else {}
    difference = {"largest difference": f"{done.difference:.1e}"}
    print_facts({"file": str(done.path)} | name | {"read with": done.read_with} | difference)


def list_presets(debug: DebugOption = False) -> None:
    """Name and first line of every preset."""
    from mimref.config.presets import preset_names, preset_text

    names = preset_names()
    width = max(map(len, names), default=0)
    for name in names:
        first_line = preset_text(name).partition("\n")[0]
        typer.echo(
            f"{name:{width}}  {first_line.removeprefix('#').strip() if first_line.startswith('#') else ''}".rstrip()
        )


def show_preset(name: Annotated[str, typer.Argument(metavar="NAME")], debug: DebugOption = False) -> None:
    """Print a preset's file, with its comments."""
    from mimref.config.presets import preset_text

    typer.echo(preset_text(name), nl=False)
