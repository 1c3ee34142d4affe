"""The command line: every command parses its options, loads a config, calls the room that does the work, and reports.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from mimref import __version__
from mimref.cli import (
    benchmark,
    doctor,
    evaluation,
    report,
    reproduce,
    robustness,
    segment,
    suite,
    tools,
    training,
    transfer,
    weights,
)
from mimref.cli.parser import Group, add_command
from mimref.errors import Interrupted, UserError, UserErrors
from mimref.files import DISK_FULL, ensure_caches

Function = Callable[[Any], None]
COMMANDS: Mapping[str, Sequence[Function]] = {
    "Refine": (training.refine, training.pretrain),
    "Evaluate": (
        evaluation.knn,
        evaluation.lowshot,
        evaluation.cluster,
        evaluation.probe,
        evaluation.analyze_blocks,
        evaluation.assess,
        evaluation.compare,
        evaluation.search,
        evaluation.extract,
        report.report,
    ),
    "Transfer": (transfer.finetune, transfer.predict, segment.segment, suite.transfer, robustness.robustness),
    "Weights": (weights.inspect, weights.export, weights.push, weights.interpolate),
    "Tools": (doctor.doctor,),
}
TOOLS: Mapping[str, tuple[str, Mapping[str, Function]]] = {
    "presets": ("Show the presets that ship with mimref.", {"list": tools.list_presets, "show": tools.show_preset}),
    "cache": (
        "List, clear or verify cached features and image listings.",
        {"list": tools.list_cache, "clear": tools.clear_cache, "verify": tools.verify_cache},
    ),
    "reproduce": ("Reproduce tables of the paper with a suite of runs.", {"ablations": reproduce.ablations}),
    "benchmark": (
        "Measure speed and cost on this machine.",
        {
            "all": benchmark.everything,
            "views": benchmark.views,
            "step": benchmark.step,
            "eval": benchmark.evaluations,
            "cost": benchmark.cost,
            "memory": benchmark.memory,
        },
    ),
}

app = typer.Typer(
    name="mimref",
    cls=Group,
    help="Refine vision transformers pre-trained by masked image modelling.",
    epilog="Examples:\n  mimref refine\n  mimref knn runs/refine-quickstart",
    pretty_exceptions_enable=False,
)
for panel, functions in COMMANDS.items():
    for function in functions:
        add_command(app, function, panel=panel)


def _help_without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for name, (text, commands) in TOOLS.items():
    group = typer.Typer(cls=Group, help=text, callback=_help_without_command, invoke_without_command=True)
    for command, function in commands.items():
        add_command(group, function, command)
    app.add_typer(group, name=name, rich_help_panel="Tools")


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    _help_without_command(context)


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0, 2 for a user's mistake, 128 + n after signal n.

    Every mistake is one line on standard error, after a traceback with `--debug`. Other exceptions are not caught.
    """
    debug = "--debug" in args
    ensure_caches()  # before any library looks for a folder
    # Rich draws help with boxes and colours, which only a terminal can use.
    app.rich_markup_mode = "rich" if sys.stdout.isatty() else None
    try:
        # If nothing can be saved, Typer turns Ctrl-C into exit code 130.
        code = app(args=list(args), prog_name="mimref", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except Interrupted as interruption:
        typer.echo(f"mimref: {interruption.message}", err=True)
        return 128 + interruption.signum
    except (UserError, typer.TyperException, OSError) as error:
        if isinstance(error, typer.TyperException):
            message = error.format_message().replace(": Value error, ", ": ")  # pydantic's prefix, from Typer
        elif isinstance(error, UserError):
            message = str(error)
        elif error.errno in DISK_FULL:
            message = f"disk full while writing {error.filename or 'a file'}; free some space and run again"
        else:
            raise
        if debug:
            traceback.print_exception(error)
        for line in map(str, error.errors) if isinstance(error, UserErrors) else [message]:
            typer.echo(f"mimref: error: {' '.join(line.split())}", err=True)
        return 2
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        if debug:
            traceback.print_exception(error)
        # The rest of torch's message is about its allocator.
        what = ". ".join(str(error).split(". ")[:2])
        typer.echo(f"mimref: error: {what}; lower batch_size, or the micro_batch of a training run", err=True)
        return 2


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # not imported for commands without it
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
