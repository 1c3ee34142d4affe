"""Verdicts on encoders and blocks, based on their measures: a ranking, and a plain sentence for each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mimref.evaluation.assess.measures import Measure, goodness

NAMES: dict[str, str] = {
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "alpha_req": "alpha-ReQ",
    "effective_rank": "effective rank",
    "correlation_rank": "correlation rank",
    "uniformity": "uniformity",
    "neighbour_consistency": "neighbour consistency",
    "view_retrieval": "view retrieval",
    "hubness": "hubness",
}
# Share of all dimensions below which features use few of them.
FEW_DIMENSIONS = 0.05
# About the skewness if a twentieth of the images filled all neighbour places; no healthy encoder reached it.
MANY_HUBS = 4.0


@dataclass(frozen=True)
class Assessed:
    """One encoder's features of one group of blocks."""

    model: str
    blocks: str
    width: int
    """Features per image."""
    values: Mapping[str, float]
    """Value of every measure."""


@dataclass(frozen=True)
class Verdict:
    """Verdict on one encoder's group of blocks, based on its measures."""

    model: str
    blocks: str
    rank: int
    """1 is best; equal values share a rank."""
    text: str


def verdicts(found: Sequence[Assessed], measure: Measure) -> list[Verdict]:
    """Return a verdict for each of `found`, the best by `measure` first; those of equal value stay in order."""
    scores = [goodness(measure, each.values[measure]) for each in found]
    order = sorted(range(len(found)), key=lambda number: -scores[number])
    several_models = len({each.model for each in found}) > 1
    several_groups = len({each.blocks for each in found}) > 1
    best = found[order[0]]
    result = []
    for number in order:
        each, rank = found[number], 1 + sum(score > scores[number] for score in scores)
        where = _where(each.blocks) if several_groups else ""
        name = ", ".join(filter(None, (each.model if several_models or not where else "", where)))
        parts = [_standing(name, each, rank, len(found), best, measure), _spread(each)]
        result.append(Verdict(each.model, each.blocks, rank, "; ".join(filter(None, parts))))
    return result


def _where(blocks: str) -> str:
    return f"block {blocks}" if blocks.isdigit() else f"{blocks} blocks" if blocks != "last" else "last block"


def _standing(name: str, each: Assessed, rank: int, count: int, best: Assessed, measure: Measure) -> str:
    value = each.values[measure]
    if math.isnan(value):
        return f"{name}: no {NAMES[measure]}, since the features do not vary"
    shown = f"{NAMES[measure]} {format_measure(measure, value)}"
    if count == 1:
        return f"{name}: {shown}"
    if rank == 1:
        return f"{name} is the best of {count}: {shown}"
    return f"{name} is {_ordinal(rank)} of {count}: {shown}, against {format_measure(measure, best.values[measure])}"


def _spread(each: Assessed) -> str:
    """Describe what matters whatever the rank: the dimensions that features use, and hubs."""
    rank, hubs = each.values["effective_rank"], each.values["hubness"]
    text = f"features are spread over {rank:.0f} of {each.width} dimensions"
    if rank < max(1.5, FEW_DIMENSIONS * each.width):
        text += ", which is few"
    return text + (f"; few images are the neighbours of most (hubness {hubs:.1f})" if hubs > MANY_HUBS else "")


def format_measure(measure: str, value: float) -> str:
    """Return the value with its unit."""
    if measure in ("neighbour_consistency", "view_retrieval", "knn_leave_one_out"):
        return f"{value:.1f}%"
    return f"{value:.2f}" if measure in ("alpha_req", "uniformity", "hubness") else f"{value:.1f}"


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
