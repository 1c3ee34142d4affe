"""Curves on the terminal, as tables of horizontal bars."""

from collections.abc import Sequence
from math import isfinite

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from mimref.reports.metrics import sign
from mimref.results import Row

BAR_WIDTH = 16
# Column title and number format of every metric; the first available one is drawn. Short, to fit 80 columns.
METRICS = {
    "block_knn_top1": ("k-NN", ".1f"),
    "block_segment_miou": ("mIoU", ".1f"),
    "block_segment_micro_iou": ("micro IoU", ".1f"),
    "block_segment_accuracy": ("pixels", ".1f"),
    "block_reconstruction": ("recon.", ".3f"),
    "block_effective_rank": ("rank", ".1f"),
    "block_mean": ("mean", ".3g"),
    "block_variance": ("variance", ".3g"),
}


class Bar:
    """A bar that fills `share` (0 to 1) of its width, in eighths of a cell; in whole cells on ASCII terminals."""

    def __init__(self, share: float, *, style: str) -> None:
        self.share, self.style = share, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        eighths = round(8 * BAR_WIDTH * self.share)
        blocks = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]
        text = "#" * round(eighths / 8) if options.ascii_only else blocks
        yield Segment(text[:BAR_WIDTH].ljust(BAR_WIDTH), console.get_style(self.style))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(BAR_WIDTH, BAR_WIDTH)


def block_chart(rows: Sequence[Row], *, heads: Sequence[int], title: str) -> Table:
    """Return a table with one line per block of one model: a bar, the metrics, and a mark if a head is recommended.

    rows: those of `analyze_blocks`. The bar shows the first metric of `METRICS` that the rows have, from a tenth of the
    width for the worst block to all of it for the best: the curve's shape, not its height. The best block is bold.
    """
    metrics = [metric for metric in METRICS if any(row["metric"] == metric for row in rows)]
    values = {(int(row["block"]), str(row["metric"])): float(row["value"]) for row in rows if row["metric"] in METRICS}
    blocks = sorted({block for block, _ in values})
    table = Table(title=Text(title))
    table.add_column("block", justify="right")
    table.add_column(METRICS[metrics[0]][0], no_wrap=True)
    for number, metric in enumerate(metrics):
        table.add_column("" if number == 0 else METRICS[metric][0], justify="right", no_wrap=True)
    if heads:
        table.add_column("head", justify="center")
    # Signed, so that larger is better.
    better = sign({"metric": metrics[0]})
    curve = {block: better * value for (block, name), value in values.items() if name == metrics[0] and isfinite(value)}
    best = max(curve, key=lambda block: (curve[block], -block)) if curve else None
    for block in blocks:
        cells = [_cell(values.get((block, metric)), METRICS[metric][1]) for metric in metrics]
        bar = Bar(_share(curve, block), style="green" if block in heads else "blue")
        mark = [Text("*" if block in heads else "")] if heads else []
        table.add_row(Text(str(block)), bar, *cells, *mark, style="bold" if block == best else "")
    return table


def _share(curve: dict[int, float], block: int) -> float:
    if block not in curve:
        return 0.0
    low, high = min(curve.values()), max(curve.values())
    return 1.0 if high == low else 0.1 + 0.9 * (curve[block] - low) / (high - low)


def _cell(value: float | None, decimals: str) -> Text:
    return Text("-" if value is None or not isfinite(value) else format(value, decimals))
