"""What the suite measures: parts of tasks, each with the lines of the page that it gives; and what was found."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mimref.results import Row

Verdict = Literal["met", "missed", "failed", "no bar", "not measured"]


@dataclass(frozen=True)
class Bar:
    """What a value must reach."""

    kind: Literal["at most", "at least"]
    limit: float
    reason: str
    """Where the number comes from."""

    def met_by(self, value: float) -> bool:
        """Whether a value reaches it; NaN never does."""
        return value <= self.limit if self.kind == "at most" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.kind} {self.limit:g}"


@dataclass(frozen=True)
class Line:
    """A line of the page."""

    name: str
    unit: str
    bar: Bar | None = None


class Found(NamedTuple):
    """What was measured for a line."""

    line: str
    value: float | None
    """None where this machine cannot measure it, and nothing is wrong; `note` says why."""
    note: str = ""
    """What belongs to the value, such as memory beside time."""
    setting: Row = {}  # noqa: RUF012  # never changed
    """What it was measured with."""


Measure = Callable[[str], Iterator[Found]]
"""Measures on a device, `cpu` or `cuda`. Whatever it raises is a fault of the lines that it has not given yet."""


@dataclass(frozen=True)
class Task:
    """Lines that are measured together."""

    lines: tuple[Line, ...]
    measure: Measure
    limit_s: float
    """It is killed when it takes longer."""


@dataclass(frozen=True)
class Part:
    """Tasks that share a process, until one kills it."""

    name: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Finding:
    """A line and what became of it."""

    part: str
    line: Line
    found: Found | None = None
    fault: str = ""
    """Why nothing was found though it should."""

    @property
    def verdict(self) -> Verdict:
        """Whether the bar is met; `failed` where there is nothing to compare with it though it should be."""
        if self.found is None:
            return "failed"
        if self.found.value is None:
            return "not measured"
        if self.line.bar is None:
            return "no bar"
        return "met" if self.line.bar.met_by(self.found.value) else "missed"

    @property
    def misses(self) -> bool:
        """Whether it counts against the machine."""
        return self.verdict in ("missed", "failed")

    @property
    def value(self) -> float | None:
        """In the line's unit."""
        return None if self.found is None else self.found.value

    @property
    def note(self) -> str:
        """What to say beside the value, or in its place."""
        return self.fault if self.found is None else self.found.note

    def row(self) -> Row:
        """A row of the results; a value that was not measured is NaN."""
        bar = self.line.bar
        row: Row = {"metric": "benchmark_all", "value": float("nan") if self.value is None else self.value}
        row |= {"part": self.part, "line": self.line.name, "unit": self.line.unit, "verdict": self.verdict}
        row |= {"bar": "no bar" if bar is None else str(bar), "bar_reason": "" if bar is None else bar.reason}
        return row | {"note": self.note, **(self.found.setting if self.found else {})}
