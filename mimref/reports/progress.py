"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    pass


# Seconds between two lines of progress when the output is not a terminal.
LINE_INTERVAL_S = 10.0


class ProgressDisplay:
    """Receives the progress of one piece of work; `update` fits the `progress` argument of computing functions."""

    def __init__(self, update: Callable[[int, int], None], log: Callable[[str], None]) -> None:
        self.update = update
        self.log = log


@contextmanager
def show_progress(
    description: str, *, quiet: bool = False, console: Console | None = None
) -> Iterator[ProgressDisplay]:
    """Progress of one piece of work, on standard error: `update(done, total)` and `log(line)`.

    On a terminal a bar with rate and time left, of which a line stays when the work took longer than ten seconds;
    elsewhere a plain line every ten seconds and at the end; nothing at all when `quiet`. The rate counts from the first
    update, so a resumed run does not look faster than it is.
    """
    console = console or Console(stderr=True)
    if quiet:
        yield ProgressDisplay(lambda done, total: None, lambda line: None)
    elif console.is_terminal and not console.is_dumb_terminal:
        started_s = time.monotonic()
        with _bar(console) as bar:
            task = bar.add_task(description, total=None)
            yield ProgressDisplay(
                lambda done, total: bar.update(task, completed=done, total=total),
                lambda line: bar.console.print(line, markup=False, highlight=False),
            )
        elapsed_s = time.monotonic() - started_s
        if elapsed_s >= LINE_INTERVAL_S:
            done = f"{bar.tasks[0].completed:.0f} in {timedelta(seconds=round(elapsed_s))}"
            _plain(console, f"{description}: {done}")
    else:
        yield ProgressDisplay(_PlainLines(description, console).update, lambda line: _plain(console, line))


class _RateColumn(ProgressColumn):
    """Steps per second, or seconds per step when those are long."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else _rate(speed), style="progress.data.speed")


class _PlainLines:
    """Progress for logs: a line when LINE_INTERVAL_S have passed, and one at the end."""

    def __init__(self, description: str, console: Console) -> None:
        self.description = description
        self.console = console
        self.first: tuple[float, int] | None = None
        self.last_s = time.monotonic()

    def update(self, done: int, total: int) -> None:
        """Print a line when one is due."""
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
        _plain(self.console, line)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _plain(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _rate(per_s: float) -> str:
    return f"{per_s:.1f}/s" if per_s >= 1 else f"{1 / per_s:.1f} s each"
