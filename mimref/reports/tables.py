"""Tables of results, for the terminal and in Markdown."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mimref.results import columns, main_rows

if TYPE_CHECKING:
    from mimref.encoders.inspection import Inspection
    from mimref.results import Row


LABELS = {
    "knn_top1": "k-NN top-1",
    "knn_top5": "k-NN top-5",
    "lowshot_top1": "{shots}-shot top-1",
    "probe_top1": "linear probe top-1",
    "cluster_acc": "k-means ACC",
    "cluster_nmi": "k-means NMI",
    "cluster_ami": "k-means AMI",
    "cluster_ari": "k-means ARI",
    "silhouette": "silhouette",
    "davies_bouldin": "Davies-Bouldin",
    "block_knn_top1": "k-NN top-1 of block {block}",
    "head_knn_top1": "k-NN top-1",
    "head_nn_accuracy": "neighbours of the same class",
    "block_knn_delta": "k-NN gained by block {block}",
    "block_mean": "mean of block {block}",
    "block_variance": "variance of block {block}",
    "block_effective_rank": "effective rank of block {block}",
    "block_reconstruction": "reconstruction loss of block {block}",
    "block_reconstruction_delta": "reconstruction gained by block {block}",
}
LOWER_IS_BETTER = {"davies_bouldin", "block_reconstruction"}
# Neither percentages nor of a known size.
STATISTICS = {
    "feature_variance",
    "effective_rank",
    "block_mean",
    "block_variance",
    "block_effective_rank",
    "block_knn_delta",
    "block_reconstruction_delta",
}
# What was measured, as opposed to the settings it was measured with.
MEASURED = ("value", "mean", "std", "splits", "runs")
# How settings are called where their name in the files says too little.
SETTINGS = {"select": "best one chosen on", "norm": "input norm", "batch_size": "batch size"}
# What the measurement itself chose: the best classifier of a grid.
CHOSEN = {"probe_top1": ("blocks", "pool", "lr", "held_out_top1")}


def best_table(rows: Sequence["Row"]) -> RenderableType:
    """The table that suits the rows: heads ranked, models compared, or one line per row; without parts of others."""
    rows = main_rows(rows)
    if any(str(row["metric"]).startswith("head_") for row in rows):
        return heads_table(rows)
    compared = len({row["model"] for row in rows if "model" in row}) > 1
    return comparison_table(rows) if compared else results_table(rows)


def comparison_table(
    rows: Sequence["Row"], *, base: str = "base", refined: str = "refined", title: str | None = None
) -> Table:
    """One line per metric, one column per model, and the difference of the refined to the base model.

    rows: results with `model`, in the order in which models and metrics shall appear; parts of others are left out. The
    best value of a line is bold; the difference is green where the refined model is better and red where it is worse.
    """
    models, lines = _by_metric(rows)
    compared = base in models and refined in models
    table = Table(title=title)
    table.add_column("")
    for model in models:
        table.add_column(Text(model), justify="right", no_wrap=True)
    if compared:
        table.add_column(Text(f"{refined} - {base}"), justify="right", no_wrap=True)
    for label, by_model in lines.items():
        sign = -1 if next(iter(by_model.values()))["metric"] in LOWER_IS_BETTER else 1
        best = max(sign * _shown_value(row) for row in by_model.values())
        cells = [_value_cell(by_model.get(model), sign, best) for model in models]
        if compared:
            cells.append(_difference_cell(by_model.get(base), by_model.get(refined), sign))
        table.add_row(Text(label), *cells)
    return table


def differences_table(rows: Sequence["Row"], base: str) -> Table:
    """One line per metric, one column per model, each value with its difference to that of the model `base`.

    rows: results with `model`. The best value of a line is bold, a difference green or, where it is worse, red.
    """
    models, lines = _by_metric(rows)
    table = Table()
    table.add_column("")
    for model in models:
        table.add_column(Text(model), justify="right", overflow="fold")
    for label, by_model in lines.items():
        sign = -1 if next(iter(by_model.values()))["metric"] in LOWER_IS_BETTER else 1
        best = max(sign * _shown_value(row) for row in by_model.values())
        cells = []
        for model in models:
            cell = _value_cell(by_model.get(model), sign, best)
            if model != base and model in by_model:
                cell = Text.assemble(cell, " (", _difference_cell(by_model.get(base), by_model[model], sign), ")")
            cells.append(cell)
        table.add_row(Text(label), *cells)
    return table


def markdown_table(rows: Sequence["Row"], base: str) -> str:
    """The same as `differences_table` for a paper's appendix or a README."""
    models, lines = _by_metric(rows)
    text = [f"| | {' | '.join(models)} |", "|---|" + "---|" * len(models)]
    for label, by_model in lines.items():
        sign = -1 if next(iter(by_model.values()))["metric"] in LOWER_IS_BETTER else 1
        best = max(sign * _shown_value(row) for row in by_model.values())
        cells = []
        for model in models:
            cell = _value_cell(by_model.get(model), sign, best)
            shown = f"**{cell.plain}**" if cell.style == "bold" else cell.plain
            if model != base and model in by_model:
                shown += f" ({_difference_cell(by_model.get(base), by_model[model], sign).plain})"
            cells.append(shown)
        text.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def scores_line(rows: Sequence["Row"]) -> str:
    """`ACC 95.3   NMI 92.2`: what a clustering's figure says under the points, of the blocks that come last."""
    last = {str(row["metric"]): row for row in rows}
    return "   ".join(
        f"{_label(metric).removeprefix('k-means ')} {_value(_plain_row(row))}" for metric, row in last.items()
    )


def benchmark_table(rows: Sequence["Row"]) -> Table:
    """One line per comparison: its ratio, the times of both ways, and what it was measured on."""
    table = Table()
    for name, justify in (("", "left"), ("ratio", "right"), ("seconds", "right"), ("measured on", "left")):
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        times = [f"{key.removesuffix('_s')} {float(row[key]):.3g}" for key in row if key.endswith("_s")]
        sizes = [f"{key} {_setting(value)}" for key, value in row.items() if not key.endswith("_s")]
        name = str(row["metric"]).removeprefix("benchmark_").replace("_", " ")
        told = ", ".join(sizes[2:])
        table.add_row(Text(name), Text(f"{float(row['value']):.2f}"), Text(", ".join(times)), Text(told))
    return table


def view_rates_table(rows: Sequence["Row"]) -> Table:
    """One line per pipeline: images per second and milliseconds per image, and how much faster than torchvision's."""
    table = Table()
    table.add_column("pipeline")
    for name in ("images/s", "ms", "x PIL", "x PIL, Pillow's blur"):
        table.add_column(name, justify="right")
    for row in rows:
        ratios = [f"{float(row[key]):.1f}" if key in row else "" for key in ("ratio", "ratio_pillow_blur")]
        table.add_row(Text(str(row["pipeline"])), f"{float(row['value']):.1f}", f"{float(row['ms']):.1f}", *ratios)
    return table


def classes_table(rows: Sequence["Row"]) -> Group:
    """One line per class, worst first: its images and what share of them is classified rightly, per setting."""
    rows = [row for row in rows if "class" in row]
    return results_table(sorted(rows, key=lambda row: float(row["value"])), title="per class")


def inspection_table(inspection: "Inspection") -> Table:
    """The encoder's tensors and where they come from, blocks that are alike in one line."""
    from mimref.encoders.inspection import by_block

    table = Table()
    for name in ("tensor", "in the file", "shape and type"):
        table.add_column(name, overflow="fold")
    for line in by_block(inspection.tensors):
        table.add_row(*map(Text, line))
    return table


def heads_table(rows: Sequence["Row"], *, title: str | None = None) -> Table:
    """One line per head of a sweep, in the order of the rows (best first): its settings and every metric."""
    metrics = list(dict.fromkeys(str(row["metric"]) for row in rows))
    heads: dict[str, dict[str, Row]] = {}
    for row in rows:
        heads.setdefault(str(row["head"]), {})[str(row["metric"])] = row
    best = {metric: max(_shown_value(row) for row in rows if row["metric"] == metric) for metric in metrics}
    table = Table(title=title)
    for name in ("head", "block", "temperature"):
        table.add_column(name, justify="right")
    for metric in metrics:
        table.add_column(Text(LABELS.get(metric, metric)), justify="right")
    for by_metric in heads.values():
        row = next(iter(by_metric.values()))
        settings = [Text(_setting(row[name])) for name in ("head", "block", "temperature")]
        table.add_row(*settings, *(_value_cell(by_metric.get(metric), 1, best[metric]) for metric in metrics))
    return table


def results_table(rows: Sequence["Row"], *, title: str | None = None) -> Group:
    """One line per row: metric, the settings in which rows differ, value; what all have in common stands below.

    The title is the model's name where there is one model.
    """
    keys = [key for key in columns(rows) if key not in ("metric", "value", "mean", "std")]
    shared = {key: value for key in keys if (value := _shared(rows, key)) is not None}
    varying = [key for key in keys if key not in shared and not all(_names(row, key) for row in rows)]
    model = shared.pop("model", None)
    table = Table()
    table.add_column("")
    for key in varying:
        table.add_column(Text(key), overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    for row in rows:
        cells = [_setting(row[key]) if key in row else "" for key in varying]
        table.add_row(Text(metric_label(row)), *map(Text, cells), Text(_value(row)))
    told = [f"{SETTINGS.get(key, key)} {_setting(value)}" for key, value in shared.items() if not _in_labels(rows, key)]
    heading = title or ("" if model is None else str(model))
    lines = [Text(heading, style="bold")] if heading else []
    return Group(*lines, table, *([Text(", ".join(told), style="dim")] if told else []))


def _shared(rows: Sequence["Row"], key: str) -> str | int | float | None:
    """The value of a setting that all rows which have it agree on; None where they differ."""
    values = {row[key] for row in rows if key in row}
    return values.pop() if len(values) == 1 else None


def _names(row: "Row", key: str) -> bool:
    """Whether the label of a row's metric tells this setting."""
    return f"{{{key}}}" in _label(str(row["metric"]))


def _in_labels(rows: Sequence["Row"], key: str) -> bool:
    return any(_names(row, key) for row in rows)


def metric_label(row: "Row", among: Sequence["Row"] = ()) -> str:
    """A person's name for a row's metric, with those settings that tell it from the same metric's rows in `among`."""
    metric = str(row["metric"])
    template = LABELS.get(metric, metric)
    same = [other for other in among if other["metric"] == metric]
    varying = [
        f"{key} = {_setting(value)}"
        for key, value in row.items()
        if key not in ("model", "metric", *MEASURED, *CHOSEN.get(metric, ()))
        and f"{{{key}}}" not in template
        # Raw pixels have no blocks: a setting that a row does not have tells nothing apart.
        and any(other.get(key, value) != value for other in same)
    ]
    label = template.format_map({"shots": "?", "block": "?"} | row)
    return f"{label} ({', '.join(varying)})" if varying else label


def _by_metric(rows: Sequence["Row"]) -> tuple[list[str], dict[str, dict[str, "Row"]]]:
    """The models, and for every metric's label the row of each."""
    rows = main_rows(rows)
    lines: dict[str, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault(metric_label(row, rows), {})[str(row["model"])] = row
    return list(dict.fromkeys(str(row["model"]) for row in rows)), lines


def _label(metric: str) -> str:
    return LABELS.get(metric, metric)


def _plain_row(row: "Row") -> "Row":
    """Without the spread over repetitions."""
    return {key: value for key, value in row.items() if key != "std"}


def _decimals(row: "Row") -> int:
    return 3 if row["metric"] in LOWER_IS_BETTER else 1


def _shown_value(row: "Row") -> float:
    """The value as the table shows it, so that what looks equal is treated as equal."""
    return round(float(row["value"]), _decimals(row))


def _value(row: "Row") -> str:
    text = f"{float(row['value']):.{_decimals(row)}f}"
    if row["metric"] in STATISTICS:
        text = f"{float(row['value']):.4g}"
    if "std" not in row:
        return text
    # The value of a clustering is its best run's, which the spread does not surround: the mean goes with it.
    spread = f"± {float(row['std']):.{_decimals(row)}f}"
    if row.get("mean", row["value"]) == row["value"]:
        return f"{text} {spread}"
    return f"{text} (mean {float(row['mean']):.{_decimals(row)}f} {spread})"


def _value_cell(row: "Row | None", sign: int, best: float) -> Text:
    if row is None:
        return Text("-")
    # Three models side by side have no room for the spread of a clustering's runs; results.csv has it.
    shown = _value(_plain_row(row) if "runs" in row else row)
    return Text(shown, style="bold" if sign * _shown_value(row) == best else "")


def _difference_cell(base: "Row | None", refined: "Row | None", sign: int) -> Text:
    if base is None or refined is None:
        return Text("-")
    digits = _decimals(refined)
    difference = round(float(refined["value"]) - float(base["value"]), digits) + 0.0
    style = "red" if sign * difference < 0 else "green" if difference else ""
    return Text(f"{difference:+.{digits}f}", style=style)


def _setting(value: str | int | float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
