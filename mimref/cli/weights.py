"""`mimref inspect`, `export`, `push` and `interpolate`: weights files."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from mimref.cli.execution import note, print_facts
from mimref.cli.options import ARCH, CHECKPOINT, PART, SOURCE, Debug, Force, Images, Output, Quiet, Text
from mimref.cli.parser import Options, argument, option
from mimref.errors import ConfigError

if TYPE_CHECKING:
    from mimref.config.base import ReadingConfig
    from mimref.encoders.backbones import TokenEncoder
    from mimref.encoders.checkpoints import Checkpoint
    from mimref.encoders.export import Export
    from mimref.progress import Listener
    from mimref.sharing.export import FolderExport
    from mimref.sharing.layout import Library, Subject


class ForeignFile(Options, panel="Encoder"):
    """What commands without settings need to read an encoder from any file."""

    arch: Text = ARCH
    source: Text = SOURCE
    encoder: Text = PART
    grid: Text = option("Patch grid of the position embedding, if it is not square.", "ROWS,COLUMNS")
    num_heads: int | None = option("Number of attention heads, if it cannot be inferred from the weights.", "N", min=1)


def read_grid(text: str | None) -> tuple[int, int] | None:
    """Parse the value of `--grid`. Raises ConfigError unless it is two numbers above 0."""
    if text is None:
        return None
    rows, _, columns = text.partition(",")
    if not (rows.strip().isdecimal() and columns.strip().isdecimal()) or not int(rows) or not int(columns):
        raise ConfigError(f"--grid {text}: expected rows and columns, such as 4,8")
    return int(rows), int(columns)


LAYOUT = "Library that loads the folder; default transformers, or timm where it has no such model."


class InspectOptions(ForeignFile, Debug, panel="Output"):
    file: str = argument("Weights file, run folder or published name.", "FILE")
    as_json: bool = option("Print everything as JSON.", flag="--json")


def inspect(options: InspectOptions) -> None:
    """Describe a weights file.

    Shows its format and architecture, how its tensors are mapped, and which are dropped.

    Examples:
      mimref inspect quickstart
      mimref inspect swin.pth --arch swin_tiny_patch4_window7_224
      mimref inspect mae_pretrain_vit_large.pth --json
    """
    from mimref.config.base import ReadingConfig
    from mimref.encoders.inspection import inspect_file
    from mimref.reports.terminal import print_inspection

    reading = ReadingConfig(num_heads=options.num_heads, part=options.encoder, grid=read_grid(options.grid))
    inspection = inspect_file(options.file, reading, options.arch, options.source)
    if options.as_json:
        typer.echo(json.dumps(asdict(inspection), indent=2))
    else:
        print_inspection(inspection)


class ExportOptions(ForeignFile, Force, panel="Encoder"):
    checkpoint: str = argument(f"{CHECKPOINT}.", "CKPT")
    to: Literal["timm", "publisher", "release", "onnx", "hf"] = option("Target format.", required=True)
    out: Path = option("File to write, its extension matching --to; for hf, a folder.", "FILE|DIR", required=True)
    layout: Literal["transformers", "timm"] | None = option(f"{LAYOUT} Requires --to hf.", "transformers|timm")
    blocks: Text = option("Blocks that the ONNX graph outputs; default last. Requires --to onnx.", "last|all|1,5,12")
    resolution: int | None = option("Image size; default: the encoder's own.", "PIXELS", min=1)
    interpolation: Text = option(
        "Rule for interpolating positions to another --resolution; default: the weights' own.",
        "mae|dino|dinov2|dinov2_reg|timm|torchvision|mae_pytorch",
    )


def export(options: ExportOptions) -> None:
    """Write an encoder in another format, read it back and compare the two.

    timm: a file for timm.create_model with checkpoint_path; a fine-tuned encoder keeps its classifier. publisher: a
    file that the code of DINOv3, EVA-02, BEiT, Swin, Hiera, ConvNeXt or AIMv2 loads. release: the layout of the
    MIM-Refiner releases. onnx: a graph that outputs the tokens of the chosen blocks. hf: a folder that
    AutoModel.from_pretrained or timm loads, with image processor, classifier and model card.

    Examples:
      mimref export runs/mae_l16 --to timm --out refined.pth
      mimref export runs/mae_l16 --to onnx --out refined.onnx --blocks 18,24
      mimref export runs/mae_l16 --to hf --out refined_l16
    """
    to, out, force, checks = options.to, options.out, options.force, options.checks
    if options.blocks is not None and to != "onnx":
        wrong = f"--blocks {options.blocks}: requires --to onnx; --to {to} keeps every block"
        checks.add("blocks", ConfigError(wrong))
    if options.layout is not None and to != "hf":
        checks.add("layout", ConfigError(f"--layout {options.layout}: requires --to hf, not --to {to}"))

    from mimref.config.base import ReadingConfig
    from mimref.config.load import validated
    from mimref.encoders.export import ENDINGS, plain, read_encoder
    from mimref.encoders.export_onnx import check_packages
    from mimref.features.encode import block_groups
    from mimref.files import check_new_file
    from mimref.reports.terminal import Terminal

    hints = {name: getattr(options, name) for name in ("arch", "source", "resolution")}
    of_file = {"num_heads": options.num_heads, "part": options.encoder, "grid": read_grid(options.grid)}
    of_file["interpolation"] = options.interpolation
    reading = checks.run("interpolation", lambda: validated(ReadingConfig, of_file))
    if to == "hf":
        export_to_hf(options, reading, hints)
        return
    checks.run("out", lambda: check_new_file(out, ENDINGS[to], force))
    if to == "onnx":
        checks.run("to", check_packages)
    with Terminal(options.quiet) as terminal:
        read = checks.run("checkpoint", lambda: read_encoder(options.checkpoint, reading, **hints, listener=terminal))
        blocks: list[int] = []
        if read is not None and to == "onnx":
            groups = checks.run("blocks", lambda: block_groups(options.blocks or "last", read[0].depth)) or {}
            blocks = [number for group in groups.values() for number in group]
        if read is not None and to not in ("timm", "publisher"):
            checks.run("to", lambda: plain(read[0], f"--to {to}"))
        done = write_export(options, checks.finished(read), blocks, terminal)
    name = {"timm name": done.timm_name or "none of these sizes"} if to == "timm" else {}
    difference = {"largest difference": f"{done.difference:.1e}"}
    print_facts({"file": str(done.path)} | name | {"read with": done.read_with} | difference)


def write_export(
    options: ExportOptions,
    read: "tuple[TokenEncoder, dict[str, Any], Checkpoint]",
    blocks: list[int],
    listener: "Listener",
) -> "Export":
    """Write a file for timm, a publisher's code, the releases or ONNX."""
    from mimref.encoders.backbones import TimmBackbone
    from mimref.encoders.classifier import classifier_of
    from mimref.encoders.export import export_release, export_timm
    from mimref.encoders.export_backbone import export_backbone
    from mimref.encoders.export_classifier import export_classifier
    from mimref.encoders.export_onnx import export_onnx
    from mimref.encoders.export_publisher import export_publisher

    encoder, facts, checkpoint = read
    to, out, force = options.to, options.out, options.force
    if to == "publisher":
        return export_publisher(encoder, out, facts, force=force, listener=listener)
    if isinstance(encoder, TimmBackbone):
        return export_backbone(encoder, out, facts, force=force, listener=listener)
    found = classifier_of(checkpoint, encoder)
    if found and to != "timm":
        listener.note(f"--to {to} leaves the classifier out; --to timm and --to hf keep it")
    if to == "timm" and found:
        return export_classifier(*found, out, facts, force=force, listener=listener)
    if to == "timm":
        return export_timm(encoder, out, facts, force=force, listener=listener)
    if to == "release":
        return export_release(encoder, out, facts, force=force, listener=listener)
    return export_onnx(encoder, out, facts, blocks, force=force, listener=listener)


def export_to_hf(options: ExportOptions, reading: "ReadingConfig | None", hints: dict[str, Any]) -> None:
    """Run `mimref export --to hf`."""
    from mimref.files import check_new_folder
    from mimref.reports.terminal import Terminal
    from mimref.sharing.export import OWN_FILES, read_subject

    out, checks = options.out, options.checks
    checks.run("out", lambda: check_new_folder(out, OWN_FILES, options.force))
    with Terminal(options.quiet) as terminal:
        read = checks.run("checkpoint", lambda: read_subject(options.checkpoint, reading, **hints, listener=terminal))
        done = write_folder(
            checks.finished(read), options.layout, out, out.resolve().name, force=options.force, listener=terminal
        )
    facts = {"folder": str(done.path), "model": done.model, "read with": done.read_with}
    compared = {"largest difference": f"{done.difference:.1e}, as read by {' and '.join(done.read_by)}"}
    print_facts(facts | compared)


def write_folder(
    read: "tuple[Subject, Checkpoint]",
    layout: "Library | None",
    out: Path,
    title: str,
    *,
    force: bool,
    listener: "Listener",
) -> "FolderExport":
    """Write a folder for Hugging Face's libraries, with its model card. title: the model's name in the card."""
    from mimref.reports.model_card import model_card
    from mimref.sharing.export import export_folder, folder_layout
    from mimref.sharing.record import read_record

    subject, checkpoint = read
    files = folder_layout(subject, layout, listener)
    card = model_card(title, subject, files, read_record(checkpoint))
    return export_folder(subject, files, card, out, force=force, listener=listener)


class PushOptions(ForeignFile, Quiet, panel="Output"):
    checkpoint: str = argument("Folder that `export --to hf` wrote, or a checkpoint to export.", "FOLDER|CKPT")
    name: str = argument("Repository, as OWNER/NAME; without OWNER, under your account.", "NAME")
    layout: Literal["transformers", "timm"] | None = option(LAYOUT, "transformers|timm")
    private: bool = option("Create a private repository; default: as its owner's account sets.")
    message: Text = option("Commit message.", "TEXT")
    force: bool = option("Replace the files of an existing repository.")


def push(options: PushOptions) -> None:
    """Upload an encoder to the Hugging Face hub.

    A checkpoint is exported first, as by export --to hf. The token is HF_TOKEN, or the one that hf auth login saved.

    Examples:
      mimref push refined_l16 me/refined-l16
      mimref push runs/mae_l16 me/refined-l16 --private
    """
    from mimref.sharing.push import check_access, check_name, is_export, push_folder

    source, checks = Path(options.checkpoint), options.checks
    exported = is_export(source)
    checks.run("name", lambda: check_name(options.name))
    checks.run("token", check_access)
    for name in ("layout", *ForeignFile.declared()) if exported else ():
        if (value := getattr(options, name)) is not None:
            wrong = f"--{name.replace('_', '-')} {value}: {source} is exported already; export the checkpoint again"
            checks.add(name, ConfigError(wrong))
    upload = partial(
        push_folder, name=options.name, private=options.private, message=options.message, force=options.force
    )
    if exported:
        checks.finish()
        show_progress(options)
        print_facts({"address": upload(source)})
        return

    from tempfile import TemporaryDirectory

    from mimref.config.base import ReadingConfig
    from mimref.reports.terminal import Terminal
    from mimref.sharing.export import read_subject

    grid = checks.run("grid", lambda: read_grid(options.grid))
    reading = ReadingConfig(num_heads=options.num_heads, part=options.encoder, grid=grid)
    read_checkpoint = partial(read_subject, options.checkpoint, reading, arch=options.arch, source=options.source)
    with Terminal(options.quiet) as terminal, TemporaryDirectory(prefix="mimref-") as temporary:
        read = checks.run("checkpoint", lambda: read_checkpoint(listener=terminal))
        folder, title = Path(temporary) / "export", options.name.rpartition("/")[2]
        write_folder(checks.finished(read), options.layout, folder, title, force=False, listener=terminal)
        show_progress(options)
        address = upload(folder)
    print_facts({"address": address})


def show_progress(options: Quiet) -> None:
    """Disable the progress bars of the hub's client with `--quiet`, and outside a terminal."""
    import sys

    from huggingface_hub.utils import disable_progress_bars

    if options.quiet or not sys.stderr.isatty():
        disable_progress_bars()


class InterpolateOptions(Images, Output, panel="Encoder"):
    base: str = argument("Weights before refining: a file or a run's folder.", "BASE", "base")
    refined: str = argument("Weights after refining.", "REFINED", "refined")
    arch: Text = ARCH
    source: Text = SOURCE
    encoder: Text = PART
    alpha: Text = option("Shares of REFINED in the averages; default 0,0.25,0.5,0.75,1.", "A,B,...", "alpha")
    choose: Text = option(
        "Write only the best average, by k-NN on held-out training images or without labels.", "knn|assess", "choose"
    )


def interpolate(options: InterpolateOptions) -> None:
    """Average the weights of two encoders.

    With --data, reports the k-NN accuracy of every average. With --choose, the best average on training images is
    chosen; only this one is written and measured on the validation images.

    Examples:
      mimref interpolate quickstart runs/refine-quickstart --data digits
      mimref interpolate quickstart runs/refine-quickstart --choose knn
      mimref interpolate mae_l16 runs/mae_l16 --alpha 0,0.5,1 --out runs/averages
    """
    from mimref.evaluation.config import InterpolateConfig

    config = options.load(InterpolateConfig)

    from mimref.evaluation.interpolate import interpolate as average
    from mimref.reports.terminal import Terminal, print_rows

    out = options.out or Path("runs") / "interpolate"
    with Terminal(options.quiet) as terminal:
        result = average(config, out, force=options.force, listener=terminal, checks=options.checks)
    print_rows(result.rows)
    made = f"{len(config.alpha)} encoders in {out}" if config.choose is None else f"encoder in {out}"
    note(made, options)
