"""The command line: every command parses its options, loads a config, calls the room that does the work, and reports.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import errno
import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mimref import __version__
from mimref.errors import ConfigError, Interrupted, OutputError, UserError

if TYPE_CHECKING:
    from mimref.config import CommandConfig
    from mimref.evaluation.metrics import Row

app = typer.Typer(
    name="mimref",
    help="Refine vision transformers that were pre-trained by masked image modelling.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
presets_app = typer.Typer(help="The settings that ship with mimref.", rich_markup_mode=None)
app.add_typer(presets_app, name="presets")

PresetOption = Annotated[
    str | None, typer.Option("--preset", metavar="NAME|FILE.toml", help="Settings to start from; see `presets list`.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any single setting, such as heads.temperature=0.3; repeatable."),
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", metavar="SPEC", help="A folder of images, digits, fashion-mnist, torchvision:NAME."),
]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Output folder.")]
DeviceOption = Annotated[str | None, typer.Option("--device", metavar="cpu|cuda|mps", help="Default: what is there.")]
PrecisionOption = Annotated[
    str | None, typer.Option("--precision", metavar="fp32|bf16", help="Default: bf16 on CUDA, else fp32.")
]
SeedOption = Annotated[str | None, typer.Option("--seed", metavar="N", help="Seed of everything random; default 0.")]
WorkersOption = Annotated[str | None, typer.Option("--workers", metavar="N", help="Processes that read images.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print the result only.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]
ArchOption = Annotated[
    str | None,
    typer.Option("--arch", metavar="NAME", help="vit_b16, vit_l16, vit_h14, vit_2b14 or a timm name."),
]
SourceOption = Annotated[
    str | None, typer.Option("--source", metavar="NAME", help="How the weights were made: mae, d2v2, timm, ...")
]
BatchSizeOption = Annotated[
    str | None, typer.Option("--batch-size", metavar="N", help="Images per update over all processes.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the unfinished run in the output folder.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is in the output folder.")]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights", metavar="FILE|NAME", help="Weights to refine, such as mae_l16; `quickstart` is packaged."
    ),
]
EncoderEpochsOption = Annotated[str | None, typer.Option("--epochs", metavar="N", help="Epochs of stage 2.")]
HeadsEpochsOption = Annotated[str | None, typer.Option("--heads-epochs", metavar="N", help="Epochs of stage 1.")]
StageOption = Annotated[
    str | None, typer.Option("--stage", metavar="both|heads|encoder", help="Which stages to run; default both.")
]
HeadsFromOption = Annotated[
    str | None, typer.Option("--heads-from", metavar="DIR", help="Take another run's stage 1; runs stage 2 only.")
]
HeadsOption = Annotated[
    str | None, typer.Option("--heads", metavar="BLOCKS", help="Blocks with a head: 17-24, 20,22,24 or last8.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; write nothing.")]
EpochsOption = Annotated[str | None, typer.Option("--epochs", metavar="N", help="Passes over the images.")]
CheckpointArgument = Annotated[
    str | None, typer.Argument(metavar="[CKPT]", help="Weights file or the output folder of `refine`.")
]
NeighboursOption = Annotated[str | None, typer.Option("--k", metavar="10,20", help="Neighbours that vote; default 10.")]
TauOption = Annotated[str | None, typer.Option("--tau", metavar="T", help="Temperature of the votes; default 0.07.")]
BlocksOption = Annotated[
    str | None, typer.Option("--blocks", metavar="last|last4|all|1,5,12", help="Which blocks' features.")
]
PoolOption = Annotated[
    str | None, typer.Option("--pool", metavar="cls|mean|cls+mean", help="How tokens become one feature.")
]
FinalNormOption = Annotated[bool | None, typer.Option("--final-norm", help="Apply the encoder's last norm.")]
ResolutionOption = Annotated[
    str | None, typer.Option("--resolution", metavar="PIXELS", help="Default: the encoder's own.")
]


@app.command()
def refine(
    preset: PresetOption = None,
    sets: SetOption = None,
    data: DataOption = None,
    arch: ArchOption = None,
    source: SourceOption = None,
    weights: WeightsOption = None,
    epochs: EncoderEpochsOption = None,
    heads_epochs: HeadsEpochsOption = None,
    stage: StageOption = None,
    heads_from: HeadsFromOption = None,
    batch_size: BatchSizeOption = None,
    heads: HeadsOption = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Refine an encoder with contrastive heads.

    First the heads on the frozen encoder (stage 1), then heads and encoder together (stage 2); then a table of the
    encoder before and after. Without options: the packaged tiny encoder on scikit-learn's digits.
    """
    from mimref.config import RefineConfig
    from mimref.encoders.known import find_known
    from mimref.recipes import choose_refine_preset, load_config

    overrides = {
        "encoder.arch": arch,
        "encoder.source": source,
        "encoder.weights": weights,
        "encoder_stage.epochs": epochs,
        "heads_stage.epochs": heads_epochs,
        "stage": stage or ("encoder" if heads_from else None),
        "heads_from": heads_from,
        "batch_size": batch_size,
        "heads.blocks": heads,
    } | _common(data, device, precision, seed, workers)
    # The name of published weights says what they are.
    known = find_known(weights) if weights else None
    chosen = _resumed_config(out, resume, preset) or choose_refine_preset(
        preset, arch or (known.arch if known else None), source or (known.source if known else None), weights
    )
    config = load_config(RefineConfig, chosen, overrides, sets or ())
    out = out or _default_out(config)
    if dry_run:
        from mimref.refinement.plan import describe, make_plan

        _print_facts(describe(make_plan(config)) | {"output": str(out)})
        return
    if resume and _print_finished(out):
        return

    from mimref.refinement.run import refine as run_refine
    from mimref.terminal import Terminal

    with Terminal(quiet) as terminal:
        result = run_refine(config, out, resume=resume, force=force, listener=terminal)
    _print_trained(out, result.rows, quiet)


@app.command()
def pretrain(
    preset: PresetOption = None,
    sets: SetOption = None,
    data: DataOption = None,
    arch: ArchOption = None,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    force: ForceOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a masked autoencoder to start from.

    For images or sizes without public weights. Without options: makes the packaged tiny encoder again.
    """
    from mimref.config import PretrainConfig
    from mimref.recipes import choose_pretrain_preset, load_config

    overrides = {"encoder.arch": arch, "mae.epochs": epochs, "batch_size": batch_size}
    overrides |= _common(data, device, precision, seed, workers)
    chosen = _resumed_config(out, resume, preset) or choose_pretrain_preset(preset, arch)
    config = load_config(PretrainConfig, chosen, overrides, sets or ())
    out = out or _default_out(config)
    if resume and _print_finished(out):
        return

    from mimref.pretraining.run import pretrain as run_pretrain
    from mimref.terminal import Terminal

    with Terminal(quiet) as terminal:
        result = run_pretrain(config, out, resume=resume, force=force, listener=terminal)
    _print_trained(out, result.rows, quiet)


@app.command()
def knn(
    checkpoint: CheckpointArgument = None,
    sets: SetOption = None,
    data: DataOption = None,
    arch: ArchOption = None,
    source: SourceOption = None,
    k: NeighboursOption = None,
    tau: TauOption = None,
    blocks: BlocksOption = None,
    pool: PoolOption = None,
    final_norm: FinalNormOption = None,
    resolution: ResolutionOption = None,
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
    from mimref.config import KnnConfig
    from mimref.recipes import load_config

    overrides: dict[str, Any] = {
        "checkpoint": checkpoint,
        "arch": arch,
        "source": source,
        "k": _parse_ints("--k", k),
        "tau": tau,
        "blocks": blocks,
        "pool": pool,
        "final_norm": final_norm,
        "resolution": resolution,
    } | _common(data or (None if checkpoint else "digits"), device, precision, None, workers)
    config = load_config(KnnConfig, None, overrides, sets or ())
    if out and (out / "results.json").exists() and not force:
        raise OutputError(f"{out}: holds results; give another --out, or --force to replace them")

    from mimref.evaluation.run import evaluate_knn
    from mimref.terminal import Terminal

    with Terminal(quiet) as terminal:
        result = evaluate_knn(config, listener=terminal)
    _report(out, config, result.elapsed_s, result.rows, quiet)


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A weights file, or a run's output folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
    debug: DebugOption = False,
) -> None:
    """Tell what a weights file is: format, architecture, and what becomes of its tensors."""
    from mimref.encoders.inspection import inspect_file
    from mimref.terminal import print_inspection

    inspection = inspect_file(file)
    if as_json:
        typer.echo(json.dumps(inspection.to_dict(), indent=2))
    else:
        print_inspection(inspection)


@app.command()
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
    """Average the weights of two encoders; with --data, tell the k-NN accuracy of every average."""
    from mimref.config import InterpolateConfig
    from mimref.recipes import load_config

    overrides: dict[str, Any] = {"base": base, "refined": refined, "alpha": _parse_floats("--alpha", alpha)}
    config = load_config(
        InterpolateConfig, None, overrides | _common(data, device, precision, None, workers), sets or ()
    )

    from mimref.evaluation.interpolate import interpolate as average
    from mimref.terminal import Terminal, print_rows

    out = out or Path("runs") / "interpolate"
    with Terminal(quiet) as terminal:
        result = average(config, out, force=force, listener=terminal)
    print_rows(result.rows)
    if not quiet:
        typer.echo(f"{len(config.alpha)} encoders in {out}", err=True)


@app.command()
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
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write an encoder in another format; the file is read again and its features compared.

    timm: for timm.create_model(..., checkpoint_path=FILE). release: the layout of the MIM-Refiner releases. onnx: a
    graph with the chosen blocks' tokens as outputs.
    """
    if blocks is not None and to != "onnx":
        raise ConfigError(f"--blocks {blocks}: goes with --to onnx alone; --to {to} keeps every block")

    from mimref.encoders.export import export_onnx, export_release, export_timm, read_encoder
    from mimref.evaluation.run import block_groups
    from mimref.terminal import Terminal

    with Terminal(quiet) as terminal:
        encoder, facts = read_encoder(checkpoint, arch=arch, source=source, resolution=resolution, listener=terminal)
        if to == "timm":
            done = export_timm(encoder, out, facts, force=force, listener=terminal)
        elif to == "release":
            done = export_release(encoder, out, facts, force=force, listener=terminal)
        else:
            chosen = [number for group in block_groups(blocks or "last", encoder.depth).values() for number in group]
            done = export_onnx(encoder, out, facts, chosen, force=force, listener=terminal)
    name = {"timm name": done.timm_name or "none of these sizes"} if to == "timm" else {}
    difference = {"largest difference": f"{done.difference:.1e}"}
    _print_facts({"file": str(done.path)} | name | {"read with": done.read_with} | difference)


@presets_app.command("list")
def list_presets(debug: DebugOption = False) -> None:
    """Name and first line of every preset."""
    from mimref.recipes import preset_names, preset_text

    names = preset_names()
    width = max(map(len, names), default=0)
    for name in names:
        first_line = preset_text(name).partition("\n")[0]
        typer.echo(
            f"{name:{width}}  {first_line.removeprefix('#').strip() if first_line.startswith('#') else ''}".rstrip()
        )


@presets_app.command("show")
def show_preset(name: Annotated[str, typer.Argument(metavar="NAME")], debug: DebugOption = False) -> None:
    """Print a preset's file, with its comments."""
    from mimref.recipes import preset_text

    typer.echo(preset_text(name), nl=False)


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0, 2 for a user's mistake, 128 + n after signal n.

    A mistake is one line on standard error, after a traceback with `--debug`. Unexpected exceptions are not caught.
    """
    debug = "--debug" in args
    try:
        # Ctrl-C where nothing can be saved comes back as typer's exit code 130.
        code = app(args=list(args), prog_name="mimref", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except Interrupted as interruption:
        typer.echo(f"mimref: {interruption.message}", err=True)
        return 128 + interruption.signum
    except UserError as error:
        return _fail(str(error), error, debug)
    except typer.TyperException as error:
        return _fail(error.format_message(), error, debug)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        file = error.filename or "a file"
        return _fail(f"disk full while writing {file}; free some space and run again", error, debug)


def _fail(message: str, error: Exception, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    typer.echo(f"mimref: error: {' '.join(message.split())}", err=True)
    return 2


def _common(
    data: str | None, device: str | None, precision: str | None, seed: str | None, workers: str | None
) -> dict[str, Any]:
    return {"data.spec": data, "device": device, "precision": precision, "seed": seed, "workers": workers}


def _parse_ints(option: str, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected whole numbers separated by commas, such as 10,20") from None


def _parse_floats(option: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: expected numbers separated by commas, such as 0,0.5,1") from None


def _default_out(config: "CommandConfig") -> Path:
    """`runs/refine-mae_l16` for the preset refine/mae_l16, `runs/refine-mine` for my/mine.toml."""
    preset = config.preset or "default"
    name = (
        Path(preset).stem if preset.endswith(".toml") else preset.removeprefix(f"{config.command}/").replace("/", "-")
    )
    return Path("runs") / f"{config.command}-{name}"


def _resumed_config(out: Path | None, resume: bool, preset: str | None) -> str | None:
    """The settings of the run that `--resume --out DIR` continues, so that they need not be given again.

    A preset given all the same is not passed over: the run compares its settings with those it was started with.
    """
    if not resume or preset is not None or out is None or not (out / "config.toml").is_file():
        return None
    return str(out / "config.toml")


def _print_finished(out: Path) -> bool:
    """Print the results of a run that is finished already; False when it is not."""
    from mimref.results import read_results
    from mimref.terminal import print_rows

    if not (out / "results.json").is_file():
        return False
    print_rows(read_results(out)[0])
    return True


def _print_trained(out: Path, rows: Sequence["Row"], quiet: bool) -> None:
    """Results of a run that has written its folder by itself."""
    from mimref.terminal import print_rows

    print_rows(rows)
    if not quiet:
        typer.echo(f"encoder in {out / 'encoder.safetensors'}, results in {out / 'results.json'}", err=True)


def _report(out: Path | None, config: "CommandConfig", elapsed_s: float, rows: Sequence["Row"], quiet: bool) -> None:
    from mimref.terminal import print_rows

    print_rows(rows)
    if out is not None:
        from mimref.results import write_results

        write_results(out, config.command, config.model_dump(mode="json"), elapsed_s, rows)
        if not quiet:
            typer.echo(f"results in {out}", err=True)


def _print_facts(facts: Mapping[str, object]) -> None:
    width = max(map(len, facts), default=0)
    for label, value in facts.items():
        typer.echo(f"{label:{width}}  {value}")
