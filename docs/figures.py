"""Draw the pictures of the README and the first page from the tables in results.md, for light and dark pages.

python docs/figures.py
"""

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

from matplotlib import rc_context
from matplotlib.figure import Figure

from mimref.reports.curves import STYLE, THEMES, plot_curves
from mimref.results import Row

HERE = Path(__file__).parent
# Row of the table -> its name in the picture.
SHOWN = {
    "k-NN": "k-NN",
    "1-shot (20 draws)": "1-shot",
    "k-means ACC, lowest inertia of 100 runs": "k-means ACC",
    "k-means NMI, lowest inertia of 100 runs": "k-means NMI",
}


def read_table(page: Path, heading: str) -> list[list[str]]:
    """Return the cells of all tables in a section, row by row."""
    section = page.read_text(encoding="utf-8").split(f"# {heading}\n")[1].split("\n#")[0]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]


def read_curves(page: Path) -> list[Row]:
    """Return the k-NN accuracy of every block: of the base, and of the refined encoder as mean and range over seeds."""
    rows = read_table(page, "The effect at small size")
    models = {"base": ["k-NN, base"], "refined": [f"k-NN, refined, seed {seed}" for seed in range(3)]}
    found: list[Row] = []
    for model, names in models.items():
        curves = [[float(cell) for cell in row[1:]] for row in rows if row[0] in names]
        assert len(curves) == len(names), model
        for block, values in enumerate(zip(*curves, strict=True), 1):
            row: Row = {"model": model, "metric": "block_knn_top1", "block": block, "value": mean(values)}
            found.append(row | {"least": min(values), "most": max(values)})
    return found


def read_scores(page: Path) -> dict[str, tuple[float, float, float]]:
    """Return name in the picture -> the scores of raw pixels, base and refined encoder."""
    rows = read_table(page, "Quickstart: digits")
    scores = {row[0]: tuple(map(float, row[1:4])) for row in rows if re.fullmatch(r"\+?[\d.]+", row[-1])}
    return {name: scores[row] for row, name in SHOWN.items()}  # type: ignore[misc]


def draw(scores: dict[str, tuple[float, float, float]], colours: Mapping[str, str], file: Path) -> None:
    """Draw a line from base to refined for every score, with raw pixels as a ring."""
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    axes = figure.subplots()
    for place, (raw, base, refined) in enumerate(reversed(scores.values())):
        axes.plot([base, refined], [place, place], "-", color=colours["refined"], lw=2, zorder=1)
        for value, part, face in ((raw, "raw", "none"), (base, "base", None), (refined, "refined", None)):
            axes.plot(value, place, "o", ms=8, mec=colours[part], mfc=face or colours[part], mew=1.6)
        axes.annotate(
            f"{refined:.1f}",
            (refined, place),
            (9, 0),
            textcoords="offset points",
            va="center",
            color=colours["refined"],
            weight="bold",
        )
        axes.annotate(
            f"{base:.1f}", (base, place), (0, 9), textcoords="offset points", ha="center", color=colours["base"]
        )
    for part, label in (("raw", "raw pixels"), ("base", "base encoder"), ("refined", "refined")):
        axes.plot([], [], "o", ms=8, mec=colours[part], mfc="none" if part == "raw" else colours[part], label=label)
    axes.legend(frameon=False, labelcolor=colours["text"], loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=3)
    axes.set(yticks=range(len(scores)), yticklabels=reversed(scores), xlim=(62, 103), ylim=(-0.6, len(scores) - 0.3))
    axes.set_xlabel("% on scikit-learn's digits, mean of three seeds", color=colours["text"])
    axes.tick_params(colors=colours["text"], length=0)
    axes.grid(axis="x", color=colours["grid"])
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    figure.savefig(file, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    (HERE / "images").mkdir(exist_ok=True)
    found, curves = read_scores(HERE / "results.md"), read_curves(HERE / "results.md")
    for theme, colours in THEMES.items():
        plot_curves(HERE / "images" / f"blocks-{theme}.svg", curves, theme)
        with rc_context(STYLE):
            draw(found, colours, HERE / "images" / f"digits-{theme}.svg")
