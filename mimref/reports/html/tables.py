"""Tables of a report: results of one or several runs side by side, and facts about the runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from mimref.encoders.published import PACKAGED
from mimref.errors import UserError
from mimref.reports.html.charts import NAME_LENGTH, block_title, rows_by_block, run_names
from mimref.reports.html.runs import SETTINGS, Run, checkpoints, setting
from mimref.reports.metrics import (
    LABELS,
    format_value,
    metric_label,
    short_name,
    spread_legend,
    suite_base,
    suite_lines,
)
from mimref.reports.tables import Cell, compared_cell
from mimref.results import Row, main_rows


@dataclass(frozen=True)
class Group:
    """The columns of one run."""

    name: str
    models: list[str]
    base: str
    """The model with which the others are compared."""


@dataclass(frozen=True)
class Table:
    """Table of results: a line per metric, a group of columns per run, a column per model."""

    groups: list[Group]
    lines: list[tuple[str, str, list[Cell]]]
    """The metric, what its spread is taken over, and a cell per column."""
    left_out: int
    """Number of rows left out because they detail others: one draw, one class, one severity."""


def results_table(runs: Sequence[Run]) -> Table | None:
    """Return the table of all metrics and models, except metrics of single blocks; None without any."""
    rows_of = [_rows(run, name) for run, name in zip(runs, run_names(runs), strict=True)]
    everything = [row for rows in rows_of for row in rows]
    main = main_rows(everything)
    if not main:
        return None
    groups = []
    for run, name, rows in zip(runs, run_names(runs), rows_of, strict=True):
        models = list(dict.fromkeys(str(row["model"]) for row in main_rows(rows)))
        first = suite_base(run.rows) if run.command == "transfer" and models else next(iter(models), "")
        groups.append(Group(name, models, "base" if "base" in models else first))
    # Labels name the settings in which any two rows differ, also rows of different runs.
    by_label: dict[str, dict[tuple[int, str], Row]] = {}
    for number, rows in enumerate(rows_of):
        for row in main_rows(rows):
            label = metric_label(row, main)
            label = label if str(row["metric"]) in LABELS else label.replace("_", " ")
            by_label.setdefault(label, {})[number, str(row["model"])] = row
    lines = []
    for label, found in by_label.items():
        cells = []
        for number, group in enumerate(groups):
            by_model = {model: row for (run, model), row in found.items() if run == number}
            compared = [compared_cell(by_model, model, group.base) for model in group.models]
            cells += compared if len(compared) > 1 else [cell._replace(is_best=False) for cell in compared]
        lines.append((label, spread_legend(list(found.values())), cells))
    return Table(groups, lines, len(everything) - len(main))


def _rows(run: Run, name: str) -> list[Row]:
    """Return the run's rows, except those of single blocks, each with a model."""
    rows = suite_lines(run.rows) if run.command == "transfer" else run.rows
    return [{"model": name, **row} for row in rows if not str(row["metric"]).startswith("block_")]


@dataclass(frozen=True)
class BlockTable:
    """The numbers behind one model's curves over the blocks: a line per block, a column per metric."""

    title: str
    metrics: list[str]
    lines: list[tuple[int, list[str]]]


def block_tables(runs: Sequence[Run]) -> list[BlockTable]:
    """Return one table per model."""
    tables = []
    for title, rows in rows_by_block(runs).items():
        metrics = list(dict.fromkeys(str(row["metric"]) for row in rows))
        cells = {(int(row["block"]), str(row["metric"])): format_value(row) for row in rows}
        lines = [
            (block, [cells.get((block, metric), "-") for metric in metrics])
            for block in sorted({block for block, _ in cells})
        ]
        tables.append(BlockTable(title, [block_title(metric) for metric in metrics], lines))
    return tables


# --- facts about a run


def facts(run: Run) -> list[tuple[str, str]]:
    """Return facts about a run, as pairs of name and value."""
    data = setting(run, "data.spec")
    limit = setting(run, "data.train_limit")
    weights = checkpoints(run)
    found = {
        "command": f"mimref {run.command}",
        "state": "" if run.finished else "not finished",
        "preset": setting(run, "preset"),
        "repeat with": _repeat(run),
        "images": f"{data}{f', {limit:,} for training' if isinstance(limit, int) else ''}" if data else "",
        "encoder": ", ".join(weights) or setting(run, "encoder.arch"),
        **_encoder_facts(run),
        "seed": setting(run, "seed"),
        "device": setting(run, "device"),
        "precision": setting(run, "precision"),
        "time": "" if run.elapsed_s is None else str(timedelta(seconds=round(run.elapsed_s))),
        "skipped images": len(run.bad_images) or "",
        "version": run.version and f"mimref {run.version}",
        "with": ", ".join(f"{name} {version}" for name, version in run.versions.items() if version),
    }
    return [(name, str(value)) for name, value in found.items() if value not in ("", None)]


def _repeat(run: Run) -> str:
    """Return the command line that repeats a training run, if its folder holds the settings; else an empty string."""
    file = run.folder / SETTINGS
    return f"mimref {run.command} --preset {file} --out DIR" if file.is_file() else ""


def _encoder_facts(run: Run) -> dict[str, str]:
    """Return architecture, source and licence from the weights that the run wrote, or else from the first it read."""
    from mimref.encoders.inspection import inspect_file

    own = sorted(run.folder.glob("encoder.safetensors")) or sorted(run.folder.glob("split[0-9]*.safetensors"))
    for file in (*map(str, own), *checkpoints(run)):
        if file not in PACKAGED and not Path(file).exists():  # a published name, or weights that no longer exist
            continue
        try:
            found = inspect_file(file)
        except UserError:
            continue
        shape = found.architecture
        size = f"{shape.depth} blocks of width {shape.width}, patches of {shape.patch_size} pixels"
        return {
            "architecture": f"{shape.name}, {size}, {found.parameters:,} parameters",
            "source": found.source or "unknown",
            "licence of the weights": found.licence or "unknown",
        }
    return {}


def short(text: object, length: int = NAME_LENGTH) -> str:
    """Shorten a name for cells and captions; a filter of the templates."""
    return short_name(str(text), length)
