"""What evaluations print and write."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mimref.errors import OutputError

if TYPE_CHECKING:
    from mimref.config import CommandConfig
    from mimref.evaluation.run import EvaluationResult


def check_out(out: Path | None, force: bool) -> None:
    """Raise OutputError for a folder that holds results, unless they are to be replaced."""
    if out and (out / "results.json").exists() and not force:
        raise OutputError(f"{out}: holds results; give another --out, or --force to replace them")


def report(out: Path | None, config: "CommandConfig", result: "EvaluationResult", quiet: bool) -> None:
    """Print a result and, where a folder is given, write its files."""
    from mimref.terminal import print_rows

    print_rows(result.rows)
    write(out, config, result, quiet)


def write(out: Path | None, config: "CommandConfig", result: "EvaluationResult", quiet: bool) -> None:
    """Write results.csv and results.json into a folder, if one is given."""
    if out is None:
        return
    from mimref.results import write_results

    settings = config.model_dump(mode="json")
    write_results(out, config.command, settings, result.elapsed_s, result.rows, bad_images=result.bad_images)
    tell(f"results in {out}", quiet)


def tell(line: str, quiet: bool) -> None:
    """A line on standard error."""
    if not quiet:
        typer.echo(line, err=True)
