"""All measures of one set of features, by name, and the direction in which each improves."""

import math
from typing import Literal, get_args

import numpy as np

from mimref.evaluation.assess.neighbours import (
    fitting_k,
    hubness,
    leave_one_out_accuracy,
    neighbour_consistency,
    other_neighbours,
    uniformity,
    view_retrieval,
)
from mimref.evaluation.assess.spectra import alpha_req, correlation, effective_rank, lidar, moments, rankme, spectrum
from mimref.evaluation.metrics import vary
from mimref.features.matrix import Labels, Matrix

Measure = Literal[
    "rankme",
    "lidar",
    "alpha_req",
    "effective_rank",
    "correlation_rank",
    "uniformity",
    "neighbour_consistency",
    "view_retrieval",
    "hubness",
]
MEASURES: tuple[Measure, ...] = get_args(Measure)
DEFAULT: Measure = "neighbour_consistency"
"""The measure that follows k-NN accuracy best, see `docs/results.md`."""
LOWER_IS_BETTER = {"uniformity", "hubness"}


def goodness(measure: str, value: float) -> float:
    """Return the value, mapped so that higher is better; NaN is worst. alpha-ReQ is best at 1."""
    if math.isnan(value):
        return -math.inf
    if measure == "alpha_req":
        return -abs(value - 1)
    return -value if measure in LOWER_IS_BETTER else value


def crop_measures(x: Matrix, *, k: int = 10, y: Labels | None = None, device: str = "cpu") -> dict[str, float]:
    """Return measures of features x (N, D), N >= 3; with labels y (N,) also `knn_leave_one_out` in percent.

    x: one feature per image. y: labels of a single class are ignored. k: neighbours, see `fitting_k`. Measures are NaN
    if undefined for features that do not vary. In a process group every rank must call this with the same arguments.
    """
    classes = 0 if y is None else len(np.unique(y))
    if not vary(x):
        ranks = dict.fromkeys(("rankme", "effective_rank", "correlation_rank"), 1.0)
        ranks |= {"alpha_req": math.nan, "uniformity": 0.0, "hubness": math.nan}
        return ranks | ({"knn_leave_one_out": math.nan} if classes > 1 else {})
    found = moments(x)
    eigenvalues = spectrum(found.covariance)
    neighbours = other_neighbours(x, k=fitting_k(k, len(x)), device=device)
    values = {
        "rankme": rankme(found),
        "alpha_req": alpha_req(eigenvalues),
        "effective_rank": effective_rank(eigenvalues),
        "correlation_rank": effective_rank(spectrum(correlation(found))),
        "uniformity": uniformity(x),
        "hubness": hubness(neighbours),
    }
    if y is not None and classes > 1:
        values["knn_leave_one_out"] = leave_one_out_accuracy(neighbours, y)
    return values


def view_measures(first: Matrix, second: Matrix, *, k: int = 10, device: str = "cpu") -> dict[str, float]:
    """Return measures of two augmented views of every image, (N, D) each, N >= 3; otherwise as `crop_measures`."""
    if not (vary(first) and vary(second)):
        return {"lidar": 1.0, "neighbour_consistency": math.nan, "view_retrieval": math.nan}
    k = fitting_k(k, len(first))
    graphs = [other_neighbours(view, k=k, device=device) for view in (first, second)]
    return {
        "lidar": lidar([first, second]),
        "neighbour_consistency": neighbour_consistency(*graphs),
        "view_retrieval": view_retrieval(first, second, device=device),
    }
