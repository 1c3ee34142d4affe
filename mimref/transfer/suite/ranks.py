"""Averages and ranks of models over the entries of a suite (Table 8)."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from mimref.results import Row


def average_ranks(values: Sequence[Sequence[float]]) -> list[float]:
    """Return every column's mean rank over the rows: rank 1 is the largest value of a row, ties share their mean rank.

    values: scores, one row per data set and one column per model; undefined scores (NaN) rank last.
    """
    scores = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=-np.inf)
    ranks: list[float] = rankdata(-scores, method="average", axis=1).mean(axis=0).tolist()
    return ranks


def summary_rows(values: Mapping[str, Mapping[str, float]], models: Sequence[str]) -> list[Row]:
    """Return `suite_average` of every model and, for several models, `suite_rank`, over entries that all models have.

    values: scores by entry and model. The column `entries` holds the number of these entries; without any, there are
    no rows.
    """
    common = [list(map(of_model.__getitem__, models)) for of_model in values.values() if of_model.keys() >= set(models)]
    if not common:
        return []
    summaries = {"suite_average": np.mean(common, axis=0).tolist()}
    if len(models) > 1:
        summaries["suite_rank"] = average_ranks(common)
    return [
        {"model": model, "metric": metric, "value": value, "entries": len(common)}
        for metric, of_model in summaries.items()
        for model, value in zip(models, of_model, strict=True)
    ]
