"""What evaluations print and write."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from mimref.config.base import CommandConfig
    from mimref.results import EvaluationResult


def check_out(out: Path | None, force: bool) -> None:
    """Raise OutputError for a folder that results must not be written into."""
    if out is not None:
        from mimref.results import check_folder

        check_folder(out, force)


def print_finished(out: Path, command: str) -> bool:
    """Print the results of a run of this command that is finished already; False when it is not."""
    if not (out / "results.json").is_file():
        return False
    if os.environ.get("RANK", "0") != "0":
        return True  # the first process of torchrun's speaks
    from mimref.reports.terminal import print_rows
    from mimref.results import read_results

    print_rows(read_results(out, command)[0])
    # Of a run killed just before it did so itself.
    shutil.rmtree(out / "state", ignore_errors=True)
    return True


def report(out: Path | None, config: "CommandConfig", result: "EvaluationResult", quiet: bool) -> None:
    """Print a result and, where a folder is given, write its files."""
    from mimref.reports.terminal import print_rows

    print_rows(result.rows)
    write(out, config, result, quiet)


def write(out: Path | None, config: "CommandConfig", result: "EvaluationResult", quiet: bool) -> None:
    """Write results.csv and results.json into a folder, if one is given."""
    if out is None:
        return
    from mimref.results import write_results

    if result.data is not None:
        config = config.model_copy(update={"data": result.data})
    settings = config.model_dump(mode="json")
    write_results(out, config.command, settings, result.elapsed_s, result.rows, bad_images=result.bad_images)
    tell(f"results in {out}", quiet)


def tell(line: str, quiet: bool) -> None:
    """A line on standard error."""
    if not quiet:
        typer.echo(line, err=True)
