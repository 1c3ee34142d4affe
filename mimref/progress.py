"""How computing functions report progress: they call a listener, and the command line shows it."""

from collections.abc import Callable
from typing import Protocol

Progress = Callable[[int, int], None]
"""Called with how much of one piece of work is done, and how much there is."""
LabelledProgress = Callable[[str, int, int], None]
"""The same for one of several pieces of work, which the label names."""


class Listener(Protocol):
    """Receives a run's progress; the command line shows it, a script may ignore it."""

    def progress(self, label: str, done: int, total: int) -> None:
        """`done` of `total` steps or images of the work named `label`."""

    def note(self, message: str) -> None:
        """One line worth reading."""

    def warn(self, message: str) -> None:
        """One line that asks for attention."""


class Silent:
    """A listener that ignores everything."""

    def progress(self, label: str, done: int, total: int) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass


class ProgressOnly(Silent):
    """A listener that passes progress on to a function, as part of a larger total if one is given."""

    def __init__(self, report: Progress | None, total: int | None = None) -> None:
        self._report, self._total = report, total

    def progress(self, label: str, done: int, total: int) -> None:
        if self._report is not None:
            self._report(done, self._total or total)
