"""Result of a check of the machine: a value, a verdict, and what to do."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from mimref.results import Row

Verdict = Literal["ok", "advice", "problem"]


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    value: str
    verdict: Verdict = "ok"
    """`advice`: runs work, but may be slower or lack something. `problem`: it would stop or cripple a run."""
    todo: str = ""
    """What to do, or what the value means."""

    def row(self) -> Row:
        """Return a row of the results."""
        return {
            "metric": "doctor", "value": self.value, "check": self.name, "verdict": self.verdict, "todo": self.todo
        }  # fmt: skip


def attempt(name: str, check: Callable[[], Iterable[Check]]) -> list[Check]:
    """Run the checks of a group; an error becomes a check of its own, so that nothing missing ends the diagnosis."""
    found: list[Check] = []
    try:
        found.extend(check())
    except Exception as error:  # a library or driver may raise anything
        reason = next(iter(str(error).strip().splitlines()), "")
        found.append(Check(name, f"could not be checked ({type(error).__name__}: {reason})", "advice"))
    return found


def gib(size: float) -> str:
    """Format bytes in GiB, or in MiB below one GiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
