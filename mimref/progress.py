"""How functions that compute report progress: they call a listener, and the command line shows it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mimref.errors import UserError

Progress = Callable[[int, int], None]
"""Called with how much of one piece of work is done, and how much there is."""
LabelledProgress = Callable[[str, int, int], None]
"""The same for one of several pieces of work, which the label names."""


class Listener:
    """Receives the progress of a run; this one ignores it."""

    def progress(self, label: str, done: int, total: int) -> None:
        """`done` of `total` steps or images of the work named `label`."""

    def note(self, message: str) -> None:
        """One line of information."""

    def warn(self, message: str) -> None:
        """One line that asks for attention."""


@contextmanager
def optional(missing: str, listener: Listener) -> Iterator[None]:
    """A part of the work that takes nothing else with it when it fails: the failure is a warning.

    missing: what there is not then, such as `no figure`.
    """
    try:
        yield
    except Exception as error:  # of any library
        # Some libraries write pages, of which the first line says what is wrong.
        reason = next(iter(str(error).strip().splitlines()), "")
        listener.warn(f"{missing}: {reason if isinstance(error, UserError) else f'{type(error).__name__}: {reason}'}")


class Silent(Listener):
    """Ignores everything."""


class ProgressOnly(Listener):
    """A listener that passes progress on to a function. total: of the work that this is a part of."""

    def __init__(self, report: Progress | None, total: int | None = None) -> None:
        self._report, self._total = report, total

    def progress(self, label: str, done: int, total: int) -> None:
        if self._report is not None:
            self._report(done, self._total or total)
