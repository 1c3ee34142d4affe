"""Output of `mimref benchmark all`: a table of findings, on the terminal and as a page ready for docs/results.md."""

from collections import Counter
from collections.abc import Mapping, Sequence

import typer
from rich.console import Console
from rich.text import Text

from mimref.benchmarks.suite.lines import Finding, Verdict
from mimref.reports.tables import markdown_lines, plain_table

UNFINISHED = "- not finished: the command was stopped, or still runs"
_NAMES = ("", "measured", "verdict", "threshold", "with")
_STYLES: dict[Verdict, str] = {"met": "green", "missed": "bold red", "failed": "bold red"}


def print_findings(findings: Sequence[Finding]) -> None:
    """Print every finding, and the number of findings with each verdict."""
    lines = [
        (finding.line.name, _value(finding), Text(finding.verdict, style=_STYLES.get(finding.verdict, "dim")), *rest)
        for finding in findings
        for rest in [(_bar(finding), finding.note)]
    ]
    Console().print(plain_table(_NAMES, lines, right=_NAMES[1:2]))
    typer.echo(_summary(findings))


def missed_lines(findings: Sequence[Finding]) -> list[str]:
    """Return one line for every finding that misses its threshold or has failed."""
    return [
        f"{finding.line.name}: {finding.fault or f'{_value(finding)}, threshold {_bar(finding)}'}"
        for finding in findings
        if finding.misses
    ]


def suite_page(
    findings: Sequence[Finding], facts: Mapping[str, str], elapsed_s: float, command: str, *, finished: bool
) -> str:
    """Return a Markdown page: the command, the machine, every finding, what missed its threshold, and the reasons.

    finished: whether the findings are complete.
    """
    text = [f"```bash\n{command}\n```", "", *(f"- {name}: {value}" for name, value in facts.items())]
    text += [f"- {elapsed_s:,.0f} s in all" if finished else UNFINISHED]
    lines = [(finding.line.name, _value(finding), finding.verdict, _bar(finding), finding.note) for finding in findings]
    text += ["", *markdown_lines(_NAMES, lines), "", _summary(findings), ""]
    if missed := missed_lines(findings):
        text += ["Missed:", "", *(f"- {line}" for line in missed), ""]
    thresholds = {
        f"- {finding.line.name}, {_bar(finding)}: {threshold.reason}"
        for finding in findings
        if (threshold := finding.line.threshold)
    }
    return "\n".join([*text, "Thresholds:", "", *sorted(thresholds)]) + "\n"


def _value(finding: Finding) -> str:
    value = finding.value
    if value is None:
        return ""
    return f"{value:,.0f} {finding.line.unit}" if abs(value) >= 1000 else f"{value:.4g} {finding.line.unit}"


def _bar(finding: Finding) -> str:
    return f"{threshold} {finding.line.unit}" if (threshold := finding.line.threshold) else ""


def _summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.verdict for finding in findings)
    verdicts: tuple[Verdict, ...] = ("met", "missed", "failed", "no threshold", "not measured")
    return ", ".join(f"{verdict}: {counts[verdict]}" for verdict in verdicts)
