"""The command line: every command parses its options, loads a config, calls the room that does the work, and reports.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import errno
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from mimref import __version__
from mimref.cli import benchmark, cache, comparison, evaluation, presets, training, weights
from mimref.cli.parser import Group, add_command
from mimref.errors import Interrupted, UserError

EXAMPLES = """Examples:
  mimref refine
  mimref knn runs/refine-quickstart"""

app = typer.Typer(
    name="mimref",
    cls=Group,
    help="Refine vision transformers that were pre-trained by masked image modelling.",
    epilog=EXAMPLES,
    pretty_exceptions_enable=False,
)
add_command(app, training.refine, name="refine", panel="Refine")
add_command(app, training.pretrain, name="pretrain", panel="Refine")
add_command(app, evaluation.knn, name="knn", panel="Evaluate")
add_command(app, evaluation.lowshot, name="lowshot", panel="Evaluate")
add_command(app, evaluation.cluster, name="cluster", panel="Evaluate")
add_command(app, evaluation.probe, name="probe", panel="Evaluate")
add_command(app, comparison.analyze_blocks, name="analyze-blocks", panel="Evaluate")
add_command(app, comparison.compare, name="compare", panel="Evaluate")
add_command(app, comparison.extract, name="extract", panel="Evaluate")
add_command(app, weights.inspect, name="inspect", panel="Weights")
add_command(app, weights.export, name="export", panel="Weights")
add_command(app, weights.interpolate, name="interpolate", panel="Weights")

presets_app = typer.Typer(cls=Group, help="Show the settings that ship with mimref.")
add_command(presets_app, presets.list_presets, name="list")
add_command(presets_app, presets.show_preset, name="show")
cache_app = typer.Typer(cls=Group, help="List, clear or verify cached features and listings of images.")
add_command(cache_app, cache.list_cache, name="list")
add_command(cache_app, cache.clear_cache, name="clear")
add_command(cache_app, cache.verify_cache, name="verify")
benchmark_app = typer.Typer(cls=Group, help="Measure speed and cost on this machine.")
add_command(benchmark_app, benchmark.benchmark_views, name="views")
add_command(benchmark_app, benchmark.benchmark_step, name="step")
add_command(benchmark_app, benchmark.benchmark_eval, name="eval")
add_command(benchmark_app, benchmark.benchmark_cost, name="cost")
app.add_typer(presets_app, name="presets", rich_help_panel="Tools")
app.add_typer(cache_app, name="cache", rich_help_panel="Tools")
app.add_typer(benchmark_app, name="benchmark", rich_help_panel="Tools")


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
    # Rich draws help with boxes and colours, which only a terminal can use.
    app.rich_markup_mode = "rich" if sys.stdout.isatty() else None
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
