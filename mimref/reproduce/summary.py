"""Summarise the runs of a suite: means over the seeds, next to the paper's numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mimref.reproduce.plan import DEFAULT, Run, Suite
from mimref.reproduce.table1 import PUBLISHED, Line
from mimref.results import Row, main_rows, read_results

METRICS = ("knn_top1", "lowshot_top1", "cluster_acc", "cluster_nmi")
"""Metrics of the default refinement; the tables have those that the paper reports."""
BLOCK_METRIC = "block_knn_top1"
Scores = Mapping[int, Mapping[tuple[str, str], float]]
"""Results of one refinement: seed to scores by model and metric."""
_SMALLEST = 0.05
"""Smallest difference in percent that counts as one, as tables have one decimal."""


@dataclass(frozen=True)
class Spread:
    """Values of several seeds."""

    mean: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise one value or more."""
        return cls(float(np.mean(values)), min(values), max(values), len(values))

    def row(self, prefix: str = "") -> Row:
        """Return the range as columns of a row."""
        return {f"{prefix}least": self.least, f"{prefix}most": self.most}


def summarise(suite: Suite) -> tuple[list[Row], float]:
    """Return rows for all finished runs, and the seconds of their training.

    Each row has a mean over seeds as `value`, its range `least` to `most`, and the number of `seeds`. First come
    `raw pixels`, `base` and the default refinement, `refined`, by every metric; then `block_knn_top1` of every `block`;
    then the lines of the tables, with `table`, `setting`, the paper's `paper_setting` and its value `paper`, the
    `difference` from the default with the same seed and its range, the paper's `paper_difference`, and `verdict` (see
    `verdict`).
    """
    scores: dict[str, dict[int, dict[tuple[str, str], float]]] = {}
    elapsed_s = 0.0
    for run in suite.refinements:
        if run.finished:
            result = read_results(run.folder, run.config.command)
            name = run.name.rpartition("-seed")[0]
            scores.setdefault(name, {})[run.config.seed] = {
                (str(row["model"]), str(row["metric"])): float(row["value"]) for row in main_rows(result.rows)
            }
            elapsed_s += result.elapsed_s
    default = scores.get(DEFAULT, {})
    found = _before_and_after(default) + _curve_rows(suite.curves)
    for line, name in zip(suite.lines, suite.names, strict=True):
        found += _line_rows(line, {} if line.missing else scores.get(name, {}), default)
    return found, elapsed_s


def skipped_images(suite: Suite) -> list[tuple[str, str]]:
    """Return path and reason for every image that a finished run has left out."""
    finished = (run for run in suite.runs if run.finished)
    return sorted({pair for run in finished for pair in read_results(run.folder, run.config.command).bad_images})


def _before_and_after(default: Scores) -> list[Row]:
    rows: list[Row] = []
    for model in ("raw pixels", "base", "refined"):
        for metric in METRICS:
            if values := [found[model, metric] for found in default.values() if (model, metric) in found]:
                spread = Spread.of(values)
                rows.append(
                    {"model": model, "metric": metric, "value": spread.mean, "seeds": spread.count, **spread.row()}
                )
    return rows


def _curve_rows(curves: Sequence[Run]) -> list[Row]:
    rows: list[Row] = []
    for model, runs in (("base", curves[:1]), ("refined", curves[1:])):
        by_block: dict[int, list[float]] = {}
        for run in filter(lambda run: run.finished, runs):
            for row in read_results(run.folder, run.config.command).rows:
                if row["metric"] == BLOCK_METRIC:
                    by_block.setdefault(int(row["block"]), []).append(float(row["value"]))
        for block, values in sorted(by_block.items()):
            spread = Spread.of(values)
            found: Row = {"model": model, "metric": BLOCK_METRIC, "value": spread.mean, "block": block}
            rows.append({**found, "seeds": spread.count, **spread.row()})
    return rows


def _line_rows(line: Line, scores: Scores, default: Scores) -> list[Row]:
    rows: list[Row] = []
    for metric, paper in line.published.items():
        common: Row = {"model": "refined", "metric": metric}
        where: Row = {"table": line.table, "setting": line.setting, "paper_setting": line.paper, "paper": paper}
        key = ("refined", metric)
        values = {seed: found[key] for seed, found in scores.items() if key in found}
        if not values:
            # The line has no value, but shows why.
            rows.append({**common, "value": float("nan"), **where, "verdict": line.missing or "no results"})
            continue
        spread = Spread.of(list(values.values()))
        row: Row = {**common, "value": spread.mean, "seeds": spread.count, **spread.row(), **where}
        pairs = [value - default[seed][key] for seed, value in values.items() if key in default.get(seed, {})]
        if line.changes and not pairs:
            row["verdict"] = "no results of the default with the same seed"
        elif line.changes:
            difference, expected = Spread.of(pairs), round(paper - PUBLISHED[metric], 1)
            row |= {"difference": difference.mean, **difference.row("difference_"), "paper_difference": expected}
            row["verdict"] = verdict(difference, expected)
        elif line.name != DEFAULT:
            row["verdict"] = "the same settings as the default here"
        rows.append(row)
    return rows


def verdict(ours: Spread, paper: float) -> str:
    """State in words whether our difference from the default has the sign of the paper's.

    Ours has a sign if the differences of all seeds have it, with two seeds or more; each is between runs with the same
    seed. paper: the paper's difference, from one run, in percent.
    """
    sign = 1 if ours.least >= _SMALLEST else -1 if ours.most <= -_SMALLEST else 0
    of_paper = (
        "no difference" if abs(paper) < _SMALLEST else f"{'better' if paper > 0 else 'worse'} by {abs(paper):.1f}"
    )
    word = {1: "better", -1: "worse", 0: "neither better nor worse"}[sign]
    if ours.count < 2:
        same = np.sign(round(ours.mean, 1)) == np.sign(round(paper, 1))
        return f"one seed: {'the same sign as' if same else 'not the sign of'} the paper's ({of_paper})"
    if sign == 0:
        ranged = f"from {ours.least:+.1f} to {ours.most:+.1f} over the seeds"
        if abs(paper) < _SMALLEST:
            return f"agrees: no difference in the paper, and none beyond the seeds' spread here ({ranged})"
        return f"undecided: {ranged}; {of_paper} in the paper"
    if abs(paper) < _SMALLEST:
        return f"disagrees: {word} with all {ours.count} seeds, no difference in the paper"
    agrees = "agrees" if sign == np.sign(paper) else "disagrees"
    return f"{agrees}: {word} with all {ours.count} seeds, {of_paper} in the paper"
