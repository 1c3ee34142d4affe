"""The command line: every command parses its options, loads a config, calls the room that does the work, and reports.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import errno
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from mimref import __version__
from mimref.cli import benchmark, cache, comparison, evaluation, training, weights
from mimref.errors import Interrupted, UserError

app = typer.Typer(
    name="mimref",
    help="Refine vision transformers that were pre-trained by masked image modelling.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    training.refine,
    training.pretrain,
    evaluation.knn,
    evaluation.lowshot,
    evaluation.cluster,
    evaluation.probe,
    comparison.analyze_blocks,
    comparison.compare,
    comparison.extract,
    weights.inspect,
    weights.export,
    weights.interpolate,
):
    app.command()(command)
presets_app = typer.Typer(help="The settings that ship with mimref.", rich_markup_mode=None)
presets_app.command("list")(weights.list_presets)
presets_app.command("show")(weights.show_preset)
app.add_typer(presets_app, name="presets")
cache_app = typer.Typer(help="Features and lists of images, kept on disk between commands.", rich_markup_mode=None)
cache_app.command("list")(cache.list_cache)
cache_app.command("clear")(cache.clear_cache)
cache_app.command("verify")(cache.verify_cache)
app.add_typer(cache_app, name="cache")
benchmark_app = typer.Typer(help="Speed, measured on this machine.", rich_markup_mode=None)
benchmark_app.command("views")(benchmark.benchmark_views)
benchmark_app.command("step")(benchmark.benchmark_step)
benchmark_app.command("eval")(benchmark.benchmark_eval)
benchmark_app.command("cost")(benchmark.benchmark_cost)
app.add_typer(benchmark_app, name="benchmark")


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
