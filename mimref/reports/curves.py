"""k-NN accuracy over the blocks before and after refinement, as SVG for light and dark pages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from mimref.files import atomic_path
from mimref.results import Row

STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "mimref", "font.family": "sans-serif", "font.size": 11}
THEMES: Mapping[str, Mapping[str, str]] = {
    "light": {"text": "#24292f", "grid": "#d0d7de", "raw": "#8c959f", "base": "#bf5b04", "refined": "#1f5fbf"},
    "dark": {"text": "#e6edf3", "grid": "#30363d", "raw": "#7d8590", "base": "#f0954a", "refined": "#6cb6ff"},
}
LABELS = {"base": "base encoder", "refined": "refined"}


def plot_curves(path: Path, rows: Sequence[Row], theme: str) -> None:
    """Plot a line per model over its blocks, with the range over seeds as a band; label the best and the last block.

    rows: `block_knn_top1` of `base` and `refined`, with `least` and `most`, as `summarise` returns them. Raises
    OutputError if the file cannot be written.
    """
    colours = THEMES[theme]
    with rc_context(STYLE), atomic_path(path) as temporary:
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for model, label in LABELS.items():
            found = [row for row in rows if (row["model"], row["metric"]) == (model, "block_knn_top1")]
            if not found:
                continue
            blocks, values, least, most = (
                [float(row[key]) for row in found] for key in ("block", "value", "least", "most")
            )
            axes.fill_between(blocks, least, most, color=colours[model], alpha=0.2, lw=0)
            axes.plot(blocks, values, "-o", color=colours[model], lw=2, ms=5, label=label)
            best = max(range(len(values)), key=values.__getitem__)
            for place in {best, len(values) - 1}:
                style: Any = {"ha": "center", "color": colours[model], "weight": "bold"}
                offset = (0, 9) if model == "refined" else (0, -17)
                axes.annotate(
                    f"{values[place]:.1f}", (blocks[place], values[place]), offset, textcoords="offset points", **style
                )
            axes.set_xticks([int(block) for block in blocks])
        axes.legend(frameon=False, labelcolor=colours["text"], loc="upper left")
        axes.margins(y=0.18)
        axes.set_xlabel("block", color=colours["text"])
        axes.set_ylabel("k-NN accuracy (%)", color=colours["text"])
        axes.tick_params(colors=colours["text"], length=0)
        axes.grid(axis="y", color=colours["grid"])
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        figure.savefig(temporary, format="svg", transparent=True, metadata={"Date": None})
