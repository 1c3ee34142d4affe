"""What a command shows: a run's progress, notes and warnings on standard error, its results on standard output."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from mimref.report import ProgressDisplay, best_table, show_progress

if TYPE_CHECKING:
    from mimref.evaluation.metrics import Row


class Terminal:
    """A listener of runs that prints to standard error; `quiet` keeps the warnings only."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._open = ExitStack()
        self._label: str | None = None
        self._bar: ProgressDisplay | None = None

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def progress(self, label: str, done: int, total: int) -> None:
        """Advance the bar of `label`; another label ends the bar before."""
        if label != self._label or self._bar is None:
            self._open.close()
            self._label, self._bar = label, self._open.enter_context(show_progress(label, quiet=self._quiet))
        self._bar.update(done, total)

    def note(self, message: str) -> None:
        """A line worth reading."""
        if not self._quiet:
            self._print(message)

    def warn(self, message: str) -> None:
        """A line that asks for attention."""
        self._print(f"warning: {message}")

    def _print(self, line: str) -> None:
        # A line printed past a live bar would tear it.
        if self._bar is not None and not self._quiet:
            self._bar.log(line)
        else:
            typer.echo(line, err=True)


def print_rows(rows: Sequence["Row"]) -> None:
    """The table that suits a run's results; nothing when there are none."""
    if rows:
        Console().print(best_table(rows))
