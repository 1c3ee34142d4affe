"""Charts of a report, as Vega-Lite specifications that the page draws.

Text, axes and grids have the colour of the page's text, so that one chart suits light pages, dark pages and paper. Data
are long tables with fixed field names: names given by users are only ever values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from mimref.evaluation.exhibits.contents import Exhibits
from mimref.reports.html.runs import LogLine, Run
from mimref.reports.metrics import LABELS, LOWER_IS_BETTER, STATISTICS, short_name
from mimref.results import Row

# Okabe and Ito's colours; those too light or too dark for one kind of page are replaced.
COLORS = ["#2f86d1", "#e0691f", "#12a07a", "#cc79a7", "#56b4e9", "#d99a00", "#8c7ae6", "#8f8f8f"]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"]
FEW_CLASSES = 20
"""Up to this many classes or curves have a legend."""
NAME_LENGTH = 40
PATH_LENGTH = 60
MOST_POINTS = 20_000
"""Maximum number of points of all log curves together, within the limits per curve in `POINTS_OF_CURVE`."""
POINTS_OF_CURVE = (40, 400)
_NAMES = {"lr": "learning rate", "nn_age": "neighbour age"}
# Entries of a log line that are not measurements.
_POSITIONS = ("step", "epoch", "stage", "split")


@dataclass(frozen=True)
class Chart:
    """One chart."""

    title: str
    """What the chart shows; also its text alternative."""
    spec: dict[str, Any]
    note: str = ""


POINTS = alt.NamedData("points")


def _finish(
    chart: alt.Chart | alt.LayerChart | alt.FacetChart,
    points: list[dict[str, Any]],
    title: str,
    height: int,
    note: str = "",
) -> Chart:
    """Style a chart and build its specification. points: the data set `POINTS`, which altair would copy many times."""
    ink = "currentColor"
    chart = (
        chart.properties(width="container", height=height, description=f"{title}. {note}" if note else title)
        .configure(background="transparent", font="system-ui, sans-serif", autosize=alt.AutoSizeParams(type="fit-x"))
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=ink, titleColor=ink, tickColor=ink, domainColor=ink, gridColor=ink, gridOpacity=0.12,
            titleFontWeight="normal",
        )
        .configure_legend(labelColor=ink, titleColor=ink, orient="bottom", columns=4, labelLimit=150, title=None)
        .configure_range(category=COLORS, symbol=SHAPES)
    )  # fmt: skip
    # Skip validation: every part was validated when it was created.
    spec: dict[str, Any] = chart.to_dict(validate=False)
    spec["datasets"] = spec.get("datasets", {}) | {"points": points}
    return Chart(title, spec, note)


def _scheme(count: int) -> Any:
    """Return Vega's colour scheme for `count` curves or classes; for few, undefined, so that `COLORS` applies."""
    if count <= len(COLORS):
        return alt.Undefined
    return "tableau10" if count <= 10 else "tableau20" if count <= FEW_CLASSES else "sinebow"


# --- logs


def log_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return a chart for every quantity in the runs' logs, over the epochs of all stages.

    For one run, quantities with a value per head have a curve per head, and fine-tuning a curve per split. For several
    runs, curves are means over the heads. Long curves are thinned out, keeping the first and the last point.
    """
    names = list(dict.fromkeys(key for run in runs for line in run.log for key in line if key not in _POSITIONS))
    labels = run_names(runs)
    found = {name: _curves(name, runs, labels) for name in names}
    found = {name: curves for name, curves in found.items() if any(curves.values())}
    count = max(1, sum(map(len, found.values())))
    most = min(max(MOST_POINTS // count, POINTS_OF_CURVE[0]), POINTS_OF_CURVE[1])
    borders = _borders(runs[0].log) if len(runs) == 1 else []
    end = max((x for curves in found.values() for points in curves.values() for x, _ in points), default=0)
    # Quantities without a curve per head come first, and learning rates last.
    found = dict(sorted(found.items(), key=lambda item: (_per_head(item[1]), item[0] == "lr")))
    averaged = {key for run in runs for line in run.log for key, value in line.items() if isinstance(value, list)}
    averaged = averaged if len(runs) > 1 else set()
    return [_log_chart(name, curves, most, borders, end, averaged=name in averaged) for name, curves in found.items()]


def run_names(runs: Sequence[Run]) -> list[str]:
    """Return the folders' names, or numbered paths if two folders have the same name."""
    names = [short_name(run.name, NAME_LENGTH) for run in runs]
    if len(set(names)) == len(names):
        return names
    return [f"{number}: {short_name(str(run.folder), NAME_LENGTH)}" for number, run in enumerate(runs, start=1)]


Points = list[tuple[float, float]]


def _curves(name: str, runs: Sequence[Run], labels: Sequence[str]) -> dict[str, Points]:
    """Return epochs and values by the curve's name."""
    curves: dict[str, Points] = {}
    for run, label in zip(runs, labels, strict=True):
        starts = _starts(run.log)
        splits = len({line.get("split", 1) for line in run.log}) > 1
        for line in run.log:
            if name not in line:
                continue
            epoch = starts[_stage(line)] + float(line["epoch"])
            values = line[name] if isinstance(line[name], list) else [line[name]]
            numbers = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
            part = f"split {line.get('split', 1)}" if splits else ""
            if len(runs) > 1 and len(numbers) > 1:
                numbers = [sum(numbers) / len(numbers)]
            for head, value in enumerate(numbers, start=1):
                own = f"head {head}" if len(numbers) > 1 else ""
                curve = ", ".join(filter(None, (label if len(runs) > 1 else "", part, own)))
                curves.setdefault(curve, []).append((round(epoch, 4), float(f"{value:.6g}")))
    return curves


def _stage(line: LogLine) -> str:
    return str(line.get("stage", ""))


def _starts(log: Sequence[LogLine]) -> dict[str, float]:
    """Return, by stage, the total epochs of the stages before it. Logged epochs count from the start of their stage."""
    ends: dict[str, float] = {}
    for line in log:
        ends[_stage(line)] = max(ends.get(_stage(line), 0.0), float(line["epoch"]))
    starts, before = {}, 0.0
    for stage, end in ends.items():
        starts[stage] = before
        before += end
    return starts


def _borders(log: Sequence[LogLine]) -> list[dict[str, Any]]:
    return [{"x": start, "name": f"stage {stage}"} for stage, start in _starts(log).items() if start]


def _per_head(curves: Mapping[str, Points]) -> bool:
    return any(curve.split(", ")[-1].startswith("head ") for curve in curves)


def _log_chart(
    name: str, curves: dict[str, Points], most: int, borders: list[dict[str, Any]], end: float, *, averaged: bool
) -> Chart:
    values = [
        {"x": x, "y": y, "curve": curve} for curve, points in curves.items() for x, y in _thinned(sorted(points), most)
    ]
    chart = alt.Chart(POINTS)
    tooltip = [alt.Tooltip("x:Q", title="epoch"), alt.Tooltip("y:Q", title="value", format=".5~g")]
    encoding: dict[str, Any] = {
        "x": alt.X("x:Q", title="epoch", axis=alt.Axis(grid=False), scale=alt.Scale(domain=[0, end], nice=False)),
        "y": alt.Y("y:Q", title=None, scale=alt.Scale(zero=False, nice=True)),
    }
    if len(curves) > 1:
        legend = alt.Legend() if len(curves) <= FEW_CLASSES else None
        encoding["color"] = alt.Color(
            "curve:N", sort=list(curves), legend=legend, scale=alt.Scale(scheme=_scheme(len(curves)))
        )
        tooltip.insert(0, alt.Tooltip("curve:N", title="curve"))
    else:
        encoding["color"] = alt.value(COLORS[0])
    lines = chart.mark_line(strokeWidth=1.6, clip=True, interpolate="linear").encode(**encoding)
    points = chart.mark_point(size=18, filled=True, opacity=0.75, aria=False).encode(**encoding, tooltip=tooltip)
    layers: list[Any] = [lines, points]
    if borders:
        rule = alt.Chart(alt.InlineData(borders)).mark_rule(strokeDash=[4, 4], color="currentColor", opacity=0.5)
        layers.append(rule.encode(x="x:Q", tooltip=alt.Tooltip("name:N", title="starts")))
    note = "One curve per head." if _per_head(curves) else "The mean over heads." if averaged else ""
    return _finish(alt.layer(*layers), values, _readable(name), 190, note)


def _thinned(points: Points, most: int) -> Points:
    if len(points) <= most:
        return points
    return [points[round(number * (len(points) - 1) / (most - 1))] for number in range(most)]


def _readable(name: str) -> str:
    label = _NAMES.get(name) or LABELS.get(name, "{")
    label = name.replace("_", " ") if "{" in label else label
    return short_name(f"{label} (%)" if name.endswith(("top1", "top5", "accuracy")) else label, PATH_LENGTH)


# --- blocks


def rows_by_block(runs: Sequence[Run]) -> dict[str, list[Row]]:
    """Return results of single blocks by model; keys include the run's name if several runs have such results."""
    found = {
        name: [row for row in run.rows if "block" in row and str(row["metric"]).startswith("block_")]
        for name, run in zip(run_names(runs), runs, strict=True)
    }
    found = {name: rows for name, rows in found.items() if rows}
    by_model: dict[str, list[Row]] = {}
    for name, rows in found.items():
        for row in rows:
            model = str(row.get("model", name))
            by_model.setdefault(f"{name}: {model}" if len(found) > 1 else model, []).append(row)
    return by_model


def block_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return a chart for every metric with a value per block: a curve per model, filled at recommended heads."""
    curves: dict[str, dict[str, list[Row]]] = {}
    for model, rows in rows_by_block(runs).items():
        for row in rows:
            if math.isfinite(float(row["value"])):
                curves.setdefault(str(row["metric"]), {}).setdefault(short_name(model, NAME_LENGTH), []).append(row)
    heads = {name: _recommended(rows) for name, rows in curves.get("block_knn_top1", {}).items()}
    return [_block_chart(metric, by_model, heads) for metric, by_model in curves.items()]


def block_title(metric: str) -> str:
    """Return the metric's name without its block: `k-NN top-1` for block_knn_top1."""
    label = LABELS.get(metric, metric.replace("_", " "))
    return label.replace(" of block {block}", "").replace(" by block {block}", " by the block")


def _recommended(rows: Sequence[Row]) -> list[int]:
    from mimref.evaluation.blocks.statistics import recommend_heads  # imports torch

    accuracies = {int(row["block"]): float(row["value"]) for row in rows}
    return recommend_heads([accuracies.get(block, math.nan) for block in range(1, max(accuracies) + 1)])


def _block_chart(metric: str, curves: Mapping[str, Sequence[Row]], heads: Mapping[str, Sequence[int]]) -> Chart:
    values: list[dict[str, Any]] = [
        {
            "x": int(row["block"]),
            "y": float(f"{float(row['value']):.6g}"),
            "curve": model,
            "head": int(row["block"]) in heads.get(model, ()),
        }
        for model, rows in curves.items()
        for row in rows
    ]
    title = block_title(metric)
    unit = " (lower is better)" if metric in LOWER_IS_BETTER else "" if metric in STATISTICS else " (%)"
    last = max(value["x"] for value in values)
    ticks = list(range(1, last + 1)) if last <= 16 else list(range(0, last + 1, 4))
    color = alt.Color("curve:N", sort=list(curves), legend=alt.Legend() if len(curves) > 1 else None)
    chart = alt.Chart(POINTS).encode(
        x=alt.X("x:Q", title="block", axis=alt.Axis(grid=False, values=ticks, format="d"), scale=alt.Scale(nice=False)),
        y=alt.Y("y:Q", title=None, scale=alt.Scale(zero=False)),
        color=color,
    )
    tooltip = [
        alt.Tooltip("curve:N", title="model"),
        alt.Tooltip("x:Q", title="block"),
        alt.Tooltip("y:Q", title="value", format=".5~g"),
    ]
    points = chart.mark_point(size=45, fill="transparent", aria=False).encode(
        shape=alt.Shape("curve:N", sort=list(curves), legend=None),
        fill=alt.condition("datum.head", alt.Fill("curve:N", sort=list(curves), legend=None), alt.value("transparent")),
        tooltip=tooltip,
    )
    note = "Filled: recommended for heads." if any(heads.values()) else ""
    return _finish(alt.layer(chart.mark_line(), points), values, title + unit, 240, note)


# --- the map


def map_chart(exhibits: Exhibits) -> Chart:
    """Return a map of the images as points, similar ones close together, with a switch between models.

    Hovering over a point shows its image. The page adds a data set `images` with `number` and `source` of every image.
    """
    models = list(exhibits.maps)
    positions = [exhibits.maps[model] for model in models]
    labels = sorted({image.label for image in map(exhibits.images.__getitem__, exhibits.map_images) if image.label})
    values = []
    for place, number in enumerate(exhibits.map_images):
        image = exhibits.images[number]
        at = [[round(float(axis), 3) for axis in points[place]] for points in positions]
        value = {"number": number, "at": at, "path": short_name(image.path, PATH_LENGTH)}
        values.append(value | ({} if image.label is None else {"label": short_name(image.label, NAME_LENGTH)}))
    names = [short_name(model, NAME_LENGTH) for model in models]
    switch = alt.binding_radio(options=list(range(len(models))), labels=names, name=" ")
    model = alt.param(name="model", value=len(models) - 1, bind=switch if len(models) > 1 else alt.Undefined)
    tooltip = [alt.Tooltip("source:N", title="image"), alt.Tooltip("path:N", title="file")]
    encoding: dict[str, Any] = {"color": alt.value(COLORS[0])}
    if labels:
        shown = [short_name(label, NAME_LENGTH) for label in labels]
        few = len(labels) <= FEW_CLASSES
        scheme = _scheme(len(labels))
        legend = alt.Legend(title=None, symbolOpacity=1) if few else None
        # Use the same domain for both, so that they share one legend.
        scale = alt.Scale(domain=shown, scheme=scheme)
        encoding["color"] = alt.Color("label:N", scale=scale, legend=legend)
        if few:
            encoding["shape"] = alt.Shape("label:N", scale=alt.Scale(domain=shown), legend=legend)
        tooltip.insert(1, alt.Tooltip("label:N", title="class"))
    axis = alt.Scale(zero=False, nice=False, padding=12)
    chart = (
        alt.Chart(POINTS)
        .transform_lookup(
            lookup="number", from_=alt.LookupData(data=alt.NamedData("images"), key="number", fields=["source"])
        )
        .transform_calculate(x="datum.at[model][0]", y="datum.at[model][1]")
        .mark_point(size=55 if len(values) <= 500 else 28, filled=True, opacity=0.8, aria=False)
        .encode(
            x=alt.X("x:Q", axis=None, scale=axis), y=alt.Y("y:Q", axis=None, scale=axis), tooltip=tooltip, **encoding
        )
    )
    chart = chart.add_params(model)
    title = f"{len(values):,} images by {', '.join(names)}"
    return _finish(chart, values, title, 460, f"{len(labels)} classes." if labels else "")
