"""Output of `mimref doctor`: a table of checks, on the terminal and as a Markdown page."""

from collections.abc import Sequence

import typer
from rich.console import Console
from rich.text import Text

from mimref.doctor.checks import Check, Verdict
from mimref.reports.tables import markdown_lines, plain_table

_NAMES = ("check", "value", "verdict", "what to do, and notes")
_STYLES: dict[Verdict, str] = {"ok": "green", "advice": "yellow", "problem": "bold red"}


def print_checks(checks: Sequence[Check]) -> None:
    """Print every check, and the number of checks with each verdict."""
    lines = [
        (check.name, check.value, Text(check.verdict, style=_STYLES[check.verdict]), check.todo) for check in checks
    ]
    Console().print(plain_table(_NAMES, lines))
    typer.echo(summary(checks))


def doctor_page(checks: Sequence[Check]) -> str:
    """Return the checks as a Markdown page."""
    lines = [(check.name, check.value, check.verdict, check.todo) for check in checks]
    return "\n".join(["`mimref doctor`", "", *markdown_lines(_NAMES, lines), "", summary(checks)]) + "\n"


def summary(checks: Sequence[Check]) -> str:
    """Return the number of checks with each verdict, worst verdict first."""
    verdicts: tuple[Verdict, ...] = ("problem", "advice", "ok")
    return ", ".join(f"{verdict}: {sum(check.verdict == verdict for check in checks)}" for verdict in verdicts)
