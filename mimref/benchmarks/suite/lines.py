"""Types of the suite: parts, their tasks with the lines of the page that each produces, and findings."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mimref.results import Row

Verdict = Literal["met", "missed", "failed", "no threshold", "not measured"]


@dataclass(frozen=True)
class Threshold:
    """Bound that a value must meet."""

    kind: Literal["at most", "at least"]
    limit: float
    reason: str
    """Where the number comes from."""

    def met_by(self, value: float) -> bool:
        """Return whether a value meets the threshold; NaN never does."""
        return value <= self.limit if self.kind == "at most" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.kind} {self.limit:g}"


@dataclass(frozen=True)
class Line:
    """A line of the page."""

    name: str
    unit: str
    threshold: Threshold | None = None


class Found(NamedTuple):
    """Result measured for a line."""

    line: str
    value: float | None
    """None if this machine cannot measure it although nothing is wrong; `note` gives the reason."""
    note: str = ""
    """Further information on the value, such as memory in addition to time."""
    setting: Row = {}  # noqa: RUF012  # never changed
    """Settings of the measurement."""


Measure = Callable[[str], Iterator[Found]]
"""Measures on a device, `cpu` or `cuda`. If it raises, the lines not yet yielded count as failed."""


@dataclass(frozen=True)
class Task:
    """Lines that are measured together."""

    lines: tuple[Line, ...]
    measure: Measure
    limit_s: float
    """The task is killed if it takes longer."""


@dataclass(frozen=True)
class Part:
    """Tasks that share a process, until one of them brings it down."""

    name: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Finding:
    """A line and its outcome."""

    part: str
    line: Line
    found: Found | None = None
    fault: str = ""
    """Why there is no result although there should be."""

    @property
    def verdict(self) -> Verdict:
        """Whether the threshold is met; `failed` if there is no result although there should be."""
        if self.found is None:
            return "failed"
        if self.found.value is None:
            return "not measured"
        if self.line.threshold is None:
            return "no threshold"
        return "met" if self.line.threshold.met_by(self.found.value) else "missed"

    @property
    def misses(self) -> bool:
        """Whether the finding counts against the machine."""
        return self.verdict in ("missed", "failed")

    @property
    def value(self) -> float | None:
        """Measured value in the line's unit, or None."""
        return None if self.found is None else self.found.value

    @property
    def note(self) -> str:
        """Text to show beside the value, or in its place."""
        return self.fault if self.found is None else self.found.note

    def row(self) -> Row:
        """Return a row of the results; a value that was not measured is NaN."""
        threshold = self.line.threshold
        row: Row = {"metric": "benchmark_all", "value": float("nan") if self.value is None else self.value}
        row |= {"part": self.part, "line": self.line.name, "unit": self.line.unit, "verdict": self.verdict}
        row |= {
            "threshold": "no threshold" if threshold is None else str(threshold),
            "threshold_reason": "" if threshold is None else threshold.reason,
        }
        return row | {"note": self.note, **(self.found.setting if self.found else {})}
