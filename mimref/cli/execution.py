"""Tasks that commands share: join the processes, show progress, print and write results."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from mimref.cli.options import Output, Quiet, Report, Resume

if TYPE_CHECKING:
    from mimref.config.base import CommandConfig
    from mimref.config.recipe import Derived
    from mimref.reports.galleries import Strip
    from mimref.reports.terminal import Terminal
    from mimref.results import EvaluationResult, Row

Result = TypeVar("Result")


def run_on_ranks(
    config: "CommandConfig",
    options: Quiet,
    work: Callable[..., Result],
    *,
    advice: str = "run it again: cached features are reused",
) -> Result | None:
    """Call `work(config, listener=..., checks=...)` in every process that torchrun has started.

    Returns None on all but rank 0. advice: what to do when another process dies.
    """
    from mimref.distributed.group import process_group
    from mimref.files import ensure_caches
    from mimref.reports.terminal import Terminal

    caches = ensure_caches()
    with process_group(config.device, advice=advice) as rank, Terminal(options.quiet or rank > 0) as terminal:
        if caches is not None:
            terminal.note(f"the user has no cache folder: caches are in {caches}; set MIMREF_CACHE to keep them")
        result = work(config, listener=terminal, checks=options.checks)
    return result if rank == 0 else None


def report(
    options: Output,
    config: "CommandConfig",
    result: "EvaluationResult | None",
    show: "Callable[[Sequence[Row]], None] | None" = None,
) -> None:
    """Print the result, if this process has one; with `--out`, write results.csv, results.json and images.

    show: prints the rows; default: as a table.
    """
    if result is None:
        return
    from mimref.errors import OutputError
    from mimref.reports.terminal import print_rows
    from mimref.results import remove_earlier, write_results

    show = show or print_rows
    if options.out is not None:
        if result.data is not None:
            config = config.model_copy(update={"data": result.data})
        settings, bad = config.model_dump(mode="json"), result.bad_images
        try:
            remove_earlier(options.out)
            save_exhibits(options.out, result, options)
            write_results(options.out, config.command, settings, result.elapsed_s, result.rows, bad_images=bad)
        except OutputError:  # the disk is full, or the folder is gone; the result is complete nevertheless
            show(result.rows)
            raise
    show(result.rows)
    if options.out is not None:
        note(f"results in {options.out}", options)


def save_exhibits(out: Path, result: "EvaluationResult", options: Quiet) -> None:
    """Write the images that illustrate a result, if it has any, and remove those of an earlier one."""
    from mimref.evaluation.exhibits.contents import save
    from mimref.progress import optional
    from mimref.reports.terminal import Terminal

    with Terminal(options.quiet) as terminal, optional("no images for the report", terminal):
        # Its type is not checked, as that module takes seconds to import.
        save(getattr(result, "exhibits", None), out)


@contextmanager
def figure(path: Path, options: Quiet) -> "Iterator[Terminal]":
    """Draw a figure of results that are printed and written already; a failure is a warning."""
    from mimref.progress import optional
    from mimref.reports.terminal import Terminal

    with Terminal(options.quiet) as terminal, optional(f"no figure in {path}", terminal):
        yield terminal
        terminal.note(f"figure in {path}")


def gallery(out: Path, title: str, strips: "Sequence[Strip]", notes: Sequence[str], options: Quiet) -> None:
    """Write gallery.html and gallery.png into a folder of results; a failure is a warning."""
    from mimref.progress import optional
    from mimref.reports.terminal import Terminal

    with Terminal(options.quiet) as terminal, optional(f"no gallery in {out}", terminal):
        from mimref.reports.galleries import plot_gallery, write_gallery

        write_gallery(out / "gallery.html", title, strips, notes)
        plot_gallery(out / "gallery.png", title, strips)
        terminal.note(f"gallery in {out / 'gallery.html'} and gallery.png")


def write_page(folder: Path | None, options: Report) -> None:
    """Write report.html about the finished run in `folder`, unless `--no-report`; a failure is a warning.

    A page about earlier results is removed.
    """
    if folder is None:
        return
    from mimref.progress import optional
    from mimref.reports.terminal import Terminal

    page = folder / "report.html"
    with Terminal(options.quiet) as terminal, optional(f"no report in {page}", terminal):
        page.unlink(missing_ok=True)
        if options.no_report:
            return
        from mimref.reports.html.page import write_report
        from mimref.reports.html.runs import read_run

        write_report(page, [read_run(folder)])
        terminal.note(f"report in {page}")


def print_finished(out: Path | None, command: str, options: Resume) -> bool:
    """With `--resume`, print the results of a finished run of this command; return False if there are none."""
    if options.resume and options.force:
        return False  # refused later, with all other mistakes
    if not (options.resume and options.checks.passed and out and (out / "results.json").is_file()):
        return False
    if os.environ.get("RANK", "0") == "0":
        from mimref.reports.terminal import print_rows
        from mimref.results import read_results

        found = read_results(out, command)
        note(f"{out} is finished; its results, with the settings it ran with:", options)
        if found.bad_images:
            from mimref.data.decode import skipped_line

            typer.echo(f"warning: {skipped_line(found.bad_images)}", err=True)
        print_rows(found.rows)
        # A run killed right after it finished may have left its state.
        shutil.rmtree(out / "state", ignore_errors=True)
    return True


def drop_state(state: Path) -> None:
    """Remove the state of a finished evaluation, and its folder."""
    state.unlink(missing_ok=True)
    with suppress(OSError):  # the folder holds other files, or does not exist
        state.parent.rmdir()


def print_facts(facts: Mapping[str, object]) -> None:
    """Print one line per fact, with values aligned."""
    width = max(map(len, facts), default=0)
    for label, value in facts.items():
        typer.echo(f"{label:{width}}  {value}")


def print_derived(derived: "Sequence[Derived]") -> None:
    """Print one line per derived setting: its key, its value and the rule, aligned."""
    rows = [(each.setting, each.change, each.rule) for each in derived]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)] if rows else []
    for setting, change, rule in rows:
        typer.echo(f"  {setting:{widths[0]}}  {change:{widths[1]}}  {rule}")


def note(line: str, options: Quiet) -> None:
    """Print a line on standard error, unless `--quiet`."""
    if not options.quiet:
        typer.echo(line, err=True)
