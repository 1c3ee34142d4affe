"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

# Seconds between two progress lines if the output is not a terminal.
LINE_INTERVAL_S = 10.0


class ProgressDisplay(NamedTuple):
    """Shows the progress of one piece of work."""

    update: Callable[[int, int], None]
    """Takes the number of steps done and the total number of steps."""
    log: Callable[[str], None]
    """Prints a line."""


@contextmanager
def show_progress(description: str, console: Console | None = None) -> Iterator[ProgressDisplay]:
    """Show the progress of one piece of work on standard error.

    On a terminal: a bar with rate and time left, and a final line if the work took at least ten seconds. Elsewhere: a
    plain line every ten seconds and at the end. The rate counts from the first update, so that a resumed run does not
    look faster than it is.
    """
    console = console or _Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield ProgressDisplay(_PlainLines(description, console).update, lambda line: _print(console, line))
        return
    started_s = time.monotonic()
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), _RateColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield ProgressDisplay(
            lambda done, total: bar.update(task, completed=done, total=total),
            lambda line: bar.console.print(line, markup=False, highlight=False),
        )
    elapsed_s = time.monotonic() - started_s
    if elapsed_s >= LINE_INTERVAL_S:
        _print(console, f"{description}: {bar.tasks[0].completed:.0f} in {timedelta(seconds=round(elapsed_s))}")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Continue without progress, where rich would end the process."""
        self.quiet = True


class _RateColumn(ProgressColumn):
    """Steps per second, or seconds per step if steps take longer than a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else _rate(speed), style="progress.data.speed")


class _PlainLines:
    """Prints a line every LINE_INTERVAL_S seconds, and one at the end."""

    def __init__(self, description: str, console: Console) -> None:
        self.description, self.console = description, console
        self.first: tuple[float, int] | None = None
        self.last_s = time.monotonic()

    def update(self, done: int, total: int) -> None:
        """Print a line if one is due."""
        now = time.monotonic()
        self.first = self.first or (now, done)
        if done < total and now - self.last_s < LINE_INTERVAL_S:
            return
        self.last_s = now
        line = f"{self.description}: {done}/{total}"
        elapsed_s, steps = now - self.first[0], done - self.first[1]
        if elapsed_s > 0 and steps > 0:
            left = timedelta(seconds=round((total - done) * elapsed_s / steps))
            line += f", {_rate(steps / elapsed_s)}" + (f", {left} left" if done < total else "")
        _print(self.console, line)


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _rate(per_s: float) -> str:
    return f"{per_s:.1f}/s" if per_s >= 1 else f"{1 / per_s:.1f} s each"
