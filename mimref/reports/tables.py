"""Tables of results, for the terminal and in Markdown."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mimref.reports.metrics import (
    STATISTICS,
    decimals,
    format_setting,
    format_value,
    is_undefined,
    merit,
    metric_label,
    shown_value,
    template,
)
from mimref.results import Row, columns, main_rows

# Names for settings whose key in the result files is not clear enough.
_SETTINGS = {"select": "best one chosen on", "norm": "input norm", "batch_size": "batch size"}

_RATES = {
    "benchmark_views": ("views", {"ratio": "x PIL", "ratio_pillow_blur": "x PIL, Pillow's blur"}),
    "benchmark_extraction": ("evaluation crops", {"ratio": "x torchvision", "ratio_timm": "x timm"}),
}
"""For each benchmark of rates: what is produced, and column titles of the ratios in its rows."""


def best_table(rows: Sequence[Row]) -> RenderableType:
    """Return the table that fits the rows: benchmark, robustness, ranked heads, several models, or a line per row."""
    metrics = {str(row["metric"]) for row in rows}
    if metrics and metrics <= set(_RATES):
        return Group(*(rates_table(rows, metric) for metric in _RATES if metric in metrics))
    if any(metric.startswith("benchmark_") for metric in metrics):
        return benchmark_table(rows)
    if any(metric.startswith("robust_") for metric in metrics):
        return robustness_table(rows)
    main = main_rows(rows)
    if any(metric.startswith("head_") for metric in metrics):
        return heads_table(main)
    if len({row["model"] for row in main if "model" in row}) > 1:
        return FirstThatFits(comparison_table(main), long_table(main, "base"))
    by_class = sorted((row for row in rows if "class" in row), key=shown_value)
    table = results_table(main)
    return Group(table, results_table(by_class, title="per class")) if by_class else table


def plain_table(names: Iterable[str], lines: Iterable[Iterable[str | Text]], *, right: Container[str] = ()) -> Table:
    """Return a table of text; long cells wrap. right: names of right-aligned columns."""
    table = Table()
    for name in names:
        table.add_column(Text(name), justify="right" if name in right else "left", overflow="fold")
    for line in lines:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in line))
    return table


def markdown_lines(names: Sequence[str], lines: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a table of text in Markdown."""
    rows = [names, ["---"] * len(names), *lines]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]


class Cell(NamedTuple):
    """One model's value of one metric, formatted for a comparison."""

    value: str = "-"
    is_best: bool = False
    difference: str = ""
    """Difference from the base model; empty for the base itself and for a model without a value."""
    is_gain: bool | None = None
    """Whether the difference is an improvement; None without a difference."""

    @property
    def value_text(self) -> Text:
        """The value, bold if it is the best."""
        return Text(self.value, style="bold" if self.is_best else "")

    @property
    def difference_text(self) -> Text:
        """The difference, green for an improvement, red for a regression."""
        return Text(self.difference or "-", style="" if self.is_gain is None else "green" if self.is_gain else "red")


def compare_rows(rows: Sequence[Row], base: str) -> tuple[list[str], dict[str, list[Cell]]]:
    """Return the models, and a cell per model for every metric's label, in the order of the rows, without details."""
    rows = main_rows(rows)
    by_metric: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_metric.setdefault(metric_label(row, rows), {})[str(row["model"])] = row
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    cells = {
        # Side by side, there is no room for the spread over a clustering's runs; results.csv has it.
        label: [compared_cell(by_model, model, base, spread="runs" not in by_model.get(model, {})) for model in models]
        for label, by_model in by_metric.items()
    }
    return models, cells


def compared_cell(by_model: Mapping[str, Row], model: str, base: str, *, spread: bool = True) -> Cell:
    """Return the cell of one model among all. spread: add the standard deviation over repetitions."""
    row = by_model.get(model)
    if row is None:
        return Cell()
    value = format_value(row, spread=spread)
    best = max(merit(row, shown_value(other)) for other in by_model.values())
    is_best = merit(row, shown_value(row)) == best and not is_undefined(row)
    if model == base:
        return Cell(value, is_best)
    if base not in by_model or is_undefined(row) or is_undefined(by_model[base]):
        return Cell(value, is_best, "-")
    if row["metric"] in STATISTICS:
        difference, form = shown_value(row) - shown_value(by_model[base]), "+.3g"
    else:
        digits = decimals(row)
        difference, form = round(float(row["value"]) - float(by_model[base]["value"]), digits) + 0.0, f"+.{digits}f"
    gain = merit(row, float(row["value"])) > merit(row, float(by_model[base]["value"]))
    return Cell(value, is_best, f"{difference:{form}}", gain if difference else None)


def comparison_table(rows: Sequence[Row]) -> Table:
    """Return a table with a line per metric, a column per model and, if both exist, `refined` minus `base`."""
    models, lines = compare_rows(rows, "base")
    compared = [models.index("refined")] if {"base", "refined"} <= set(models) else []
    table = Table("")
    for name in [*models, *["refined - base"] * len(compared)]:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for label, cells in lines.items():
        table.add_row(Text(label), *(cell.value_text for cell in cells), *(cells[n].difference_text for n in compared))
    return table


def differences_table(rows: Sequence[Row], base: str) -> Table:
    """Return a table with a line per metric and a column per model; values with their difference from `base`."""
    models, lines = compare_rows(rows, base)
    table = Table("")
    for model in models:
        table.add_column(Text(model), justify="right", overflow="fold")
    for label, cells in lines.items():
        shown = (
            Text.assemble(cell.value_text, " (", cell.difference_text, ")") if cell.difference else cell.value_text
            for cell in cells
        )
        table.add_row(Text(label), *shown)
    return table


def long_table(rows: Sequence[Row], base: str) -> Table:
    """Return a table with a line per metric and model, for many models or long names; differences are from `base`."""
    models, lines = compare_rows(rows, base)
    compared = base in models
    table = Table("", "model")
    for name in ("value", "difference")[: 1 + compared]:
        table.add_column(Text(name), justify="right", overflow="fold")
    for label, cells in lines.items():
        for number, (model, cell) in enumerate(zip(models, cells, strict=True)):
            found = (cell.value_text, cell.difference_text)[: 1 + compared]
            table.add_row(Text("" if number else label), Text(model, overflow="fold"), *found)
        table.add_section()
    return table


@dataclass(frozen=True)
class FirstThatFits:
    """The wide table where the console has room for it without wrapping, else the long one."""

    wide: Table
    long: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needed = Measurement.get(console, options.update(max_width=10_000), self.wide).maximum
        yield self.wide if needed <= options.max_width else self.long


def markdown_table(rows: Sequence[Row], base: str) -> str:
    """Return `differences_table` in Markdown, for a paper's appendix or a README."""
    models, lines = compare_rows(rows, base)
    text = [f"| | {' | '.join(models)} |", "|---|" + "---|" * len(models)]
    for label, cells in lines.items():
        shown = (
            (f"**{cell.value}**" if cell.is_best else cell.value) + (f" ({cell.difference})" if cell.difference else "")
            for cell in cells
        )
        text.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(text) + "\n"


def benchmark_table(rows: Sequence[Row]) -> Table:
    """Return a table with a line per comparison: its ratio, the times of both variants, and the sizes measured."""
    lines = []
    for row in rows:
        times = [f"{key.removesuffix('_s')} {float(row[key]):.3g}" for key in row if key.endswith("_s")]
        sizes = [f"{key} {format_setting(row[key])}" for key in list(row)[2:] if not key.endswith("_s")]
        name = str(row["metric"]).removeprefix("benchmark_").replace("_", " ")
        lines.append((name, f"{float(row['value']):.2f}", ", ".join(times), ", ".join(sizes)))
    return plain_table(("", "ratio", "seconds", "measured on"), lines, right=("ratio", "seconds"))


def rates_table(rows: Sequence[Row], metric: str) -> Table:
    """Return a table with a line per pipeline: images/s, ms per image, and ratios to other pipelines' speeds."""
    what, ratios = _RATES[metric]
    names = ("images/s", "ms", *ratios.values())
    lines = (
        (str(row["pipeline"]), *(f"{float(row[key]):.1f}" if key in row else "" for key in ("value", "ms", *ratios)))
        for row in rows
        if row["metric"] == metric
    )
    return plain_table((what, *names), lines, right=names)


def heads_table(rows: Sequence[Row]) -> Table:
    """Return a table with a line per head of a sweep, in the order of the rows (best first): settings and metrics."""
    settings, metrics = ("head", "block", "temperature"), list(dict.fromkeys(str(row["metric"]) for row in rows))
    heads: dict[str, dict[str, Row]] = {}
    for row in rows:
        heads.setdefault(str(row["head"]), {})[str(row["metric"])] = row
    names = (*settings, *(template({"metric": metric}) for metric in metrics))
    lines: list[list[str | Text]] = []
    best = {metric: max(shown_value(row) for row in rows if row["metric"] == metric) for metric in metrics}
    for by_metric in heads.values():
        row = next(iter(by_metric.values()))
        scores = [
            Text(
                format_value(found),
                style="bold" if shown_value(found) == best[metric] and not is_undefined(found) else "",
            )
            for metric, found in by_metric.items()
        ]
        lines.append([*(format_setting(row[name]) for name in settings), *scores])
    return plain_table(names, lines, right=names)


def robustness_table(rows: Sequence[Row]) -> Group:
    """Return a table with a line per mean and per shifted set, then for every corrupted set one per corruption."""
    found = [row for row in rows if "corruption" not in row]
    names = ("", "set", "classes", "value")
    lines = [
        (metric_label(row), *(format_setting(row.get(key, "")) for key in names[1:3]), format_value(row))
        for row in found
    ]
    tables = [plain_table(names, lines, right=names[2:])]
    levels = [str(level) for level in sorted({int(row["severity"]) for row in rows if "severity" in row})]
    for name in dict.fromkeys(str(row["set"]) for row in rows if "corruption" in row):
        by_corruption: dict[str, dict[str, str]] = {}
        for row in rows:
            if row["set"] == name and "corruption" in row:
                cells = by_corruption.setdefault(str(row["corruption"]), {})
                cells[str(row.get("severity", "mean"))] = format_value(row)
        columns = [*levels, "mean"]
        lines = [(each, *(cells.get(column, "") for column in columns)) for each, cells in by_corruption.items()]
        tables.append(plain_table((f"{name}, by severity", *columns), lines, right=columns))
    return Group(Text(str(rows[0]["model"]), style="bold"), *tables)


def results_table(rows: Sequence[Row], *, title: str | None = None) -> Group:
    """Return a table with a line per row: metric, settings in which rows differ, and value; common settings are below.

    Without `title`, the title is the model's name if there is only one model.
    """
    keys = [key for key in columns(rows) if key not in ("metric", "value", "mean", "std")]
    values = {key: {row[key] for row in rows if key in row} for key in keys}
    common = {key: next(iter(found)) for key, found in values.items() if len(found) == 1}
    # Settings that the labels already name.
    named = {key: [f"{{{key}}}" in template(row) for row in rows] for key in keys}
    varying = [key for key in keys if key not in common and not all(named[key])]
    model = common.pop("model", None)
    table = Table("")
    for key in varying:
        table.add_column(Text(key), overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    for row in rows:
        settings = [Text(format_setting(row[key]) if key in row else "") for key in varying]
        table.add_row(Text(metric_label(row)), *settings, Text(format_value(row)))
    heading = title or ("" if model is None else str(model))
    below = [
        f"{_SETTINGS.get(key, key)} {format_setting(value)}" for key, value in common.items() if not any(named[key])
    ]
    parts = [Text(heading, style="bold")] * bool(heading), [table], [Text(", ".join(below), style="dim")] * bool(below)
    return Group(*(part for group in parts for part in group))
