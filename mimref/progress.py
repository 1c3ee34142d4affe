"""Progress reports: functions call a listener, and the command line displays what it receives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mimref.errors import UserError

Progress = Callable[[int, int], None]
"""Called with the amount of work done and the total amount."""
LabelledProgress = Callable[[str, int, int], None]
"""The same for one of several pieces of work, with its label first."""


class Listener:
    """Receives the progress of a run; this base class ignores it."""

    def progress(self, label: str, done: int, total: int) -> None:
        """Receive the progress of the work `label`: `done` of `total` steps or images."""

    def note(self, message: str) -> None:
        """Receive one line of information."""

    def warn(self, message: str) -> None:
        """Receive a one-line warning."""


@contextmanager
def optional(missing: str, listener: Listener) -> Iterator[None]:
    """Run a part of the work that may fail: an exception becomes a warning, and the rest continues.

    missing: what is missing after a failure, such as `no figure`.
    """
    try:
        yield
    except Exception as error:  # of any library
        # Some libraries raise pages of text, whose first line names the problem.
        reason = next(iter(str(error).strip().splitlines()), "")
        listener.warn(f"{missing}: {reason if isinstance(error, UserError) else f'{type(error).__name__}: {reason}'}")


class Silent(Listener):
    """Ignores everything."""


class ProgressOnly(Listener):
    """A listener that passes progress on to a function. total: total of the whole work that this is a part of."""

    def __init__(self, report: Progress | None, total: int | None = None) -> None:
        self._report, self._total = report, total

    def progress(self, label: str, done: int, total: int) -> None:
        if self._report is not None:
            self._report(done, self._total or total)
