"""Figures of results as PNG files: each function takes rows or arrays and a path, and writes one file.

They do not use pyplot, so a program's own figures, backend and settings stay unchanged. The same input produces the
same bytes. Colours suit colour-blind readers; markers tell many curves or classes apart.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from colorsys import hsv_to_rgb
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from torch import Tensor

from mimref.files import atomic_path
from mimref.reports.metrics import LOWER_IS_BETTER, STATISTICS, metric_label, short_name
from mimref.results import Row, main_rows

# Okabe and Ito's colours, with a darker yellow for white paper.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#B8A900")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT, BASE = "#262626", "#D9D9D9", "#8C8C8C"
DPI = 150
LEGEND_CLASSES = 20
NAME_LENGTH = 32
BLOCKS_WIDTH = 8.0  # inches
CURVES = {
    "block_neighbour_consistency": "neighbour consistency\nof two views (%)",
    "block_view_retrieval": "view retrieval (%)",
    "block_knn_leave_one_out": "k-NN accuracy (%),\nleaving one out",
    "block_knn_top1": "k-NN accuracy (%)",
    "block_segment_miou": "mean IoU (%)",
    "block_segment_micro_iou": "micro IoU (%)",
    "block_reconstruction": "reconstruction loss\n(normalised pixels, lower is better)",
    "block_rankme": "RankMe (dimensions)",
    "block_lidar": "LiDAR (dimensions)",
    "block_effective_rank": "effective rank (dimensions)",
    "block_correlation_rank": "correlation rank (dimensions)",
    "block_alpha_req": "alpha-ReQ (best near 1)",
    "block_uniformity": "uniformity (lower is better)",
    "block_hubness": "hubness (lower is better)",
}
_LABELLED = ("block_knn_top1", "block_segment_miou")
"""Curves whose best block is labelled."""
DELTAS = {"block_knn_delta": "k-NN accuracy", "block_reconstruction_delta": "reconstruction loss"}


def plot_blocks(path: Path, rows: Sequence[Row], *, heads: Mapping[str, Sequence[int]]) -> None:
    """Plot the scores of every block of one or several encoders (Fig. 3b, Fig. 3d and Fig. 6).

    rows: those of `evaluate_blocks`. Every metric of `CURVES` gets a panel with a curve per model;
    `block_reconstruction_delta` adds a panel of normalised deltas per model. heads: recommended head positions of each
    model, drawn as filled points. The best block by k-NN and by mean IoU is labelled.
    Raises OutputError if the file cannot be written.
    """
    rows = [row for row in rows if row["metric"] in CURVES or row["metric"] in DELTAS]
    curves = [metric for metric in CURVES if any(row["metric"] == metric for row in rows)]
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    compared = [model for model in models if _curve(rows, model, "block_reconstruction_delta")[0]]
    columns = max(1, min(4, len(models), int(BLOCKS_WIDTH / _name_inches(models))))  # of the legend
    figure, axes = _panels(len(curves) + len(compared), legend_lines=-(-len(models) // columns))
    first, last = (choose(int(row["block"]) for row in rows) for choose in (min, max))
    for ax, metric in zip(axes, curves, strict=False):
        for number, model in enumerate(models):
            _draw_curve(ax, *_curve(rows, model, metric), number, heads.get(model, ()), metric)
        ax.set_ylabel(CURVES[metric])
    for ax, model in zip(axes[len(curves) :], compared, strict=True):
        _draw_deltas(ax, {metric: _curve(rows, model, metric) for metric in DELTAS})
        ax.set_title(_text(model), fontsize=9, color=INK, loc="left")
    for ax in axes:
        _block_axis(ax, min(first, 1), last)
    entries = [(model, *_curve_style(number)) for number, model in enumerate(models)]
    _legend(figure, entries, "-", {"loc": "outside lower center", "ncols": columns})
    if any(heads.values()):
        axes[0].set_title("filled: recommended head positions", fontsize=8, color=INK, loc="right")
    save_figure(figure, path)


def plot_embedding(
    path: Path,
    points: NDArray[np.floating],
    y: NDArray[np.int64],
    class_names: Sequence[str] | None = None,
    *,
    title: str = "",
    caption: str = "",
) -> None:
    """Plot points in the plane, coloured by class (Fig. 5).

    points: (N, 2); points that are not finite are left out. y: (N,) integers of any value. class_names: names of the
    classes 0, 1, ..., if known. A legend names up to 20 classes. caption: a line under the points, such as
    "ACC 95.3  NMI 92.2". Raises OutputError if the file cannot be written.
    """
    classes = np.unique(y)
    named = len(classes) <= LEGEND_CLASSES
    known = dict(enumerate(class_names or ()))
    names = [known.get(label, str(label)) for label in classes.tolist()] if named else []
    figure = _figure(6.0 + _name_inches(names), 5.6)
    ax = figure.add_subplot()
    finite = np.isfinite(points).all(axis=1)
    styles = _class_styles(len(classes))
    # Area in square points: 16 for hundreds of images, 1 for tens of thousands, so that dots neither vanish nor merge.
    size = float(np.clip(9000 / max(1, len(points)), 1.0, 16.0))
    for label, (color, marker) in zip(classes, styles, strict=True):
        x, z = points[finite & (y == label)].astype(np.float64).T
        ax.scatter(x, z, s=size, color=color, marker=marker, linewidths=0, alpha=0.85)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_color(FAINT)
    ax.set_title(_text(title), fontsize=11, color=INK)
    note = "" if named else f"{len(classes)} classes"
    label = "    ".join(filter(None, (caption, note))).replace("$", r"\$")
    ax.set_xlabel(label, fontsize=10, color=INK, labelpad=8)
    if named:
        entries = [(name, *style) for name, style in zip(names, styles, strict=True)]
        _legend(ax, entries, "", {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)})
    save_figure(figure, path)


def plot_learning_curve(path: Path, log: Path) -> None:
    """Plot loss and validation accuracy over the epochs of a fine-tuning, with a curve for each split.

    log: the run's metrics.jsonl. Raises OutputError if the file cannot be written.
    """
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = _figure(BLOCKS_WIDTH, 6.0)
    axes = figure.subplots(2, sharex=True)
    splits = list(dict.fromkeys(line.get("split", 1) for line in lines))
    for ax, name, label in zip(axes, ("loss", "val_top1"), ("training loss", "validation top-1 (%)"), strict=True):
        for number, split in enumerate(splits):
            points = [line for line in lines if name in line and line.get("split", 1) == split]
            color, marker = _curve_style(number)
            epochs = [point["epoch"] for point in points]
            ax.plot(epochs, [point[name] for point in points], color=color, marker=marker, markersize=3, linewidth=1.2)
        ax.set_ylabel(label, fontsize=9, color=INK)
        ax.tick_params(labelsize=8, labelcolor=INK, color=FAINT)
        ax.grid(axis="y", color=FAINT, linewidth=0.6)
        _clean(ax, keep=("left", "bottom"))
    axes[-1].set_xlabel("epoch", fontsize=9, color=INK)
    if len(splits) > 1:
        entries = [(f"split {split}", *_curve_style(number)) for number, split in enumerate(splits)]
        _legend(axes[-1], entries, "-", {"loc": "lower right"})
    save_figure(figure, path)


def plot_comparison(path: Path, rows: Sequence[Row], base: str) -> None:
    """Plot bars of several models, one panel per metric, with the difference from the model named `base`.

    rows: results with `model`; rows that detail others (`split`, `classifier`, `class`) are left out. Panels and bars
    are in the order of the rows. Whiskers show one standard deviation over repetitions around a mean.
    Raises OutputError if the file cannot be written.
    """
    rows = main_rows(rows)
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    panels: dict[str, dict[str, Row]] = {}
    for row in rows:
        panels.setdefault(metric_label(row, rows), {})[str(row["model"])] = row
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = _figure(0.3 + _name_inches(models) + 3.0 * columns, 0.5 + lines * (0.85 + 0.28 * len(models)))
    for number, (label, by_model) in enumerate(panels.items()):
        ax = figure.add_subplot(lines, columns, number + 1)
        _draw_bars(ax, models, by_model, base)
        metric = next(iter(by_model.values()))["metric"]
        unit = ", lower is better" if metric in LOWER_IS_BETTER else "" if metric in STATISTICS else " (%)"
        ax.set_title(_text(label + unit), fontsize=9, color=INK, loc="left")
        names = [_text(model, NAME_LENGTH) for model in models] if number % columns == 0 else [""] * len(models)
        ax.set_yticks(range(len(models)), names, fontsize=9)
    save_figure(figure, path)


def plot_segments(path: Path, samples: Sequence[tuple[Tensor, Tensor, Tensor]], class_names: Sequence[str]) -> None:
    """Plot images with the true and the predicted classes of their pixels, one line per image.

    samples: image, uint8 (3, H, W), and truth and prediction, (H', W') of classes 0, 1, ...; pixels with a negative
    class are white. A legend names up to 20 classes. Raises OutputError if the file cannot be written.
    """
    present = sorted({int(label) for _, *maps in samples for each in maps for label in each.unique() if label >= 0})
    named = len(present) <= LEGEND_CLASSES
    names = [class_names[label] for label in present] if named else []
    colors = np.ones((len(class_names) + 1, 3))
    for label, (color, _) in enumerate(_class_styles(len(class_names), markers=False)):
        colors[label] = to_rgb(color)
    figure = _figure(6.6 + _name_inches(names), 0.3 + 2.1 * len(samples))
    axes = figure.subplots(len(samples), 3, squeeze=False)
    for line, (image, *maps) in zip(axes, samples, strict=True):
        for ax, pixels in zip(
            line, (image.permute(1, 2, 0).numpy(), *(colors[each.numpy()] for each in maps)), strict=True
        ):
            ax.imshow(pixels, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            _clean(ax, keep=())
    for ax, title in zip(axes[0], ("image", "truth", "prediction"), strict=True):
        ax.set_title(title, fontsize=9, color=INK)
    if named:
        entries = [(name, to_hex(colors[label]), "s") for name, label in zip(names, present, strict=True)]
        _legend(figure, entries, "", {"loc": "outside right center"})
    save_figure(figure, path)


def plot_robustness(path: Path, rows: Sequence[Row]) -> None:
    """Plot accuracy on shifted sets, and on corrupted sets at every severity, with the clean accuracy as a dashed line.

    rows: those of `evaluate_robustness`. Shifted sets share one panel; every corrupted set has its own, with a line per
    corruption and a dot per severity, darker for more severe ones. Raises OutputError if the file cannot be written.
    """
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row["metric"] == "robust_top1" and ("severity" in row or "corruption" not in row):
            panel, line = (row["set"], row["corruption"]) if "severity" in row else ("shifted images", row["set"])
            panels.setdefault(str(panel), {}).setdefault(str(line), []).append(row)
    sizes = [len(lines) + 2 for lines in panels.values()]
    figure = _figure(BLOCKS_WIDTH, 0.3 + 0.25 * sum(sizes))
    axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for place, found in enumerate(lines.values()):
            values = [float(row["value"]) for row in found]
            shades = [0.2 + 0.16 * int(row.get("severity", 5)) for row in found]
            ax.plot([min(values), max(values)], [place, place], color=FAINT, linewidth=2.4, zorder=1)
            ax.scatter(values, [place] * len(values), s=26, color=[(0.0, 0.447, 0.698, shade) for shade in shades])
        for row in rows:
            if row["metric"] == "clean_top1":
                ax.axvline(float(row["value"]), color=COLORS[1], linewidth=1, linestyle="--", zorder=0)
        ax.set_yticks(range(len(lines)), [_text(line, NAME_LENGTH) for line in lines], fontsize=8)
        ax.set_ylim(len(lines) - 0.4, -0.6)
        ax.tick_params(labelsize=8, labelcolor=INK, color=FAINT)
        ax.set_title(_text(title), fontsize=9, color=INK, loc="left")
        _clean(ax, keep=("left", "bottom"))
    dashed = ", dashed: clean" if any(row["metric"] == "clean_top1" for row in rows) else ""
    axes[-1].set_xlabel(f"top-1 (%); darker: more severe{dashed}", fontsize=9, color=INK)
    save_figure(figure, path)


def _draw_curve(
    ax: Axes, blocks: list[int], values: list[float], number: int, heads: Sequence[int], metric: str
) -> None:
    """Draw one model's values over its blocks; for metrics in `_LABELLED`, label the best block."""
    color, marker = _curve_style(number)
    ax.plot(blocks, values, color=color, linewidth=1.6)
    fill = [color if block in heads else "white" for block in blocks]
    ax.scatter(blocks, values, s=26, marker=marker, facecolors=fill, edgecolors=color, linewidths=1.3, zorder=3)
    if metric not in _LABELLED or not np.isfinite(values).any():
        return
    best = int(np.nanargmax(np.where(np.isfinite(values), values, np.nan)))
    style: dict[str, Any] = {"ha": "center", "fontsize": 8, "fontweight": "bold", "color": color}
    at = (blocks[best], values[best])
    ax.annotate(f"{values[best]:.1f}", at, xytext=(0, 7), textcoords="offset points", **style)


def _draw_deltas(ax: Axes, curves: Mapping[str, tuple[list[int], list[float]]]) -> None:
    """Draw the improvement from one block to the next, two bars per block."""
    ax.axhline(0, color=INK, linewidth=0.8)
    for number, (metric, (blocks, values)) in enumerate(curves.items()):
        place = np.asarray(blocks, dtype=np.float64) + (0.4 * number - 0.2)
        finite = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        ax.bar(place, finite, width=0.4, color=(COLORS[0], COLORS[5])[number], label=DELTAS[metric])
    ax.set_ylabel("improvement over the block before\n(largest = 1)")
    ax.legend(fontsize=8, frameon=False, labelcolor=INK, loc="best")


def _draw_bars(ax: Axes, models: Sequence[str], by_model: Mapping[str, Row], base: str) -> None:
    """Draw one horizontal bar per model, the first on top."""
    values = np.array([float(by_model[model]["value"]) if model in by_model else math.nan for model in models])
    known = np.where(np.isfinite(values), values, 0.0)
    others = [model for model in models if model != base]
    base_value = values[models.index(base)] if base in models else math.nan
    digits = 1 if np.abs(known).max() >= 10 else 2
    for place, model in enumerate(models):
        color = BASE if model == base else COLORS[others.index(model) % len(COLORS)]
        row = by_model.get(model, {})
        # The value of a clustering is that of its best run; the deviation belongs to the mean.
        around = "std" in row and row.get("mean", row["value"]) == row["value"]
        whisker = float(row["std"]) if around else None
        ax.barh(place, known[place], xerr=whisker, height=0.7, color=color, error_kw={"elinewidth": 1, "ecolor": INK})
        difference = values[place] - base_value
        shown = f"  ({difference:+.{digits}f})" if model != base and math.isfinite(difference) else ""
        text = f"{values[place]:.{digits}f}{shown}" if math.isfinite(values[place]) else "-"
        at = (max(0.0, known[place] + (whisker or 0.0)), place)
        ax.annotate(text, at, xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    # Leave room for the numbers to the right of the bars.
    low, high = min(0.0, float(known.min())), max(0.0, float(known.max()))
    ax.set_xlim(low * 1.05, low + (high - low or 1.0) * 1.5)
    ax.axvline(0, color=BASE, linewidth=0.8)
    ax.invert_yaxis()
    ax.set_xticks([])
    _clean(ax, keep=())
    ax.tick_params(axis="y", length=0, labelcolor=INK)


def _panels(count: int, *, legend_lines: int) -> tuple[Figure, list[Axes]]:
    """Return a wide panel above two columns of panels; a last panel alone in its line is wide too."""
    lines: list[Any] = [[0, 0], *([number, min(number + 1, count - 1)] for number in range(1, count, 2))]
    figure = _figure(BLOCKS_WIDTH, 0.4 + 0.2 * legend_lines + 3.0 * len(lines))
    return figure, list(figure.subplot_mosaic(lines).values())


def _block_axis(ax: Axes, first: int, last: int) -> None:
    """Format the axis of blocks. first: 1, or 0 if block 0 stands for raw pixels."""
    step = next((step for step in (1, 2, 4, 5, 10) if last <= 12 * step), 20)
    ax.set_xticks(range(first * step, last + 1, step))
    ax.set_xlim(first - 0.6, last + 0.6)
    ax.margins(y=0.14)
    ax.set_xlabel("block", fontsize=9, color=INK)
    ax.yaxis.label.set(fontsize=9, color=INK)
    ax.tick_params(labelsize=8, labelcolor=INK, color=FAINT)
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    _clean(ax, keep=("left", "bottom"))


def _clean(ax: Axes, *, keep: Sequence[str]) -> None:
    for side, spine in ax.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(BASE)


def _legend(
    owner: Axes | Figure, entries: Sequence[tuple[str, str, str]], line: Literal["-", ""], place: dict[str, Any]
) -> None:
    """Draw a legend. entries: name, colour and marker of each. line: line style of the samples."""
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle=line, markersize=5, label="name")
        for _, color, marker in entries
    ]
    legend = owner.legend(handles=handles, frameon=False, fontsize=9, **place)
    # matplotlib leaves out labels that begin with an underscore, but accepts any text afterwards.
    for text, (name, _, _) in zip(legend.get_texts(), entries, strict=True):
        text.set(text=_text(name, NAME_LENGTH), color=INK)


def _name_inches(names: Sequence[str]) -> float:
    """Return the approximate width of a legend's column in inches."""
    return 0.45 + 0.085 * min(NAME_LENGTH, max(map(len, names), default=0))


def _class_styles(count: int, *, markers: bool = True) -> list[tuple[str, str]]:
    """Return colour and marker of every class: all colours with one marker, then with the next. Without markers, all
    colours differ."""
    if count <= (LEGEND_CLASSES if markers else len(COLORS)):
        return [(COLORS[n % len(COLORS)], MARKERS[n // len(COLORS)]) for n in range(count)]
    # Too many to name: hues of successive classes are a golden ratio of the circle apart, HSV values differ.
    colors = [hsv_to_rgb(number * 0.618034 % 1.0, 0.75, (0.95, 0.6, 0.8)[number % 3]) for number in range(count)]
    return [(to_hex(color), "o") for color in colors]


def _curve(rows: Sequence[Row], model: str, metric: str) -> tuple[list[int], list[float]]:
    """Return the blocks in ascending order, and their values."""
    chosen = sorted(
        (int(row["block"]), float(row["value"])) for row in rows if (row["model"], row["metric"]) == (model, metric)
    )
    return [block for block, _ in chosen], [value for _, value in chosen]


def _curve_style(number: int) -> tuple[str, str]:
    """Return colour and marker of a curve; they repeat with different periods, so that few curves look the same."""
    return COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]


def _text(text: str, length: int = 3 * NAME_LENGTH) -> str:
    """Return a text on one line, shortened in its middle if long; dollar signs, which start formulas, are escaped."""
    return short_name(text, length).replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure. width, height: in inches."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically. Raises OutputError if the file cannot be written."""
    # Letters missing from the font are drawn as boxes; matplotlib warns about each.
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # matplotlib would save its version in the file, which is not part of the result.
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
