"""Output of `mimref assess`: a table with a line per encoder and block, one sentence for each, and a figure."""

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mimref.evaluation.assess.verdicts import Verdict, format_measure
from mimref.reports.figures import plot_blocks, plot_comparison
from mimref.results import Row

# Column titles in the order of the table; short, to fit 80 columns.
COLUMNS = {
    "neighbour_consistency": "cons.",
    "view_retrieval": "retr.",
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "effective_rank": "eff.",
    "correlation_rank": "corr.",
    "alpha_req": "alpha",
    "uniformity": "unif.",
    "hubness": "hubs",
    "knn_leave_one_out": "k-NN",
}


def print_assessment(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
    """Print all measures and verdicts, best first; k-NN only if the images have labels."""
    values = {(row["model"], row["blocks"], row["metric"]): float(row["value"]) for row in rows}
    metrics = [metric for metric in COLUMNS if any(row["metric"] == metric for row in rows)]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = {"model": {each.model for each in verdicts}, "block": {each.blocks for each in verdicts}}
    named = [name for name, different in names.items() if len(different) > 1] or ["model"]
    for name in named:
        table.add_column(name, overflow="fold")
    for metric in metrics:
        table.add_column(COLUMNS[metric], justify="right", no_wrap=True)
    for each in verdicts:
        cells = [format_measure(metric, values[each.model, each.blocks, metric]).rstrip("%") for metric in metrics]
        table.add_row(*(Text(each.model if name == "model" else each.blocks) for name in named), *cells)
    Console().print(table)
    for each in verdicts:
        typer.echo(each.text)


def plot_assessment(path: Path, rows: Sequence[Row]) -> None:
    """Plot curves over the blocks; bars if fewer than two blocks were evaluated one by one.

    Raises OutputError if the file cannot be written.
    """
    if curves := block_rows(rows):
        plot_blocks(path, curves, heads={})
    else:
        plot_comparison(path, [row for row in rows if row["metric"] in COLUMNS], "")


def block_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of two or more single blocks, named as in `evaluate_blocks`; none for groups of blocks."""
    rows = [row for row in rows if row["metric"] in COLUMNS]
    blocks = {str(row["blocks"]) for row in rows}
    if len(blocks) < 2 or not all(map(str.isdigit, blocks)):
        return []
    return [{**row, "metric": f"block_{row['metric']}", "block": int(row["blocks"])} for row in rows]
