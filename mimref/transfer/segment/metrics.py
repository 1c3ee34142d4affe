"""Exact confusion of classes over the pixels of a whole data set, and the scores that follow from it."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimref.data.masks.sources import UNLABELLED
from mimref.results import Row

Confusion = NDArray[np.int64]
"""(C, C) pixels, by true class and by predicted class."""


def confusions(truth: Tensor, predicted_K: Tensor, classes: int) -> Tensor:
    """(K, C, C) int64 pixels of K predictions, by true class (rows) and predicted class; unlabelled ones do not count.

    truth: any shape, whole numbers. predicted_K: (K, ...), 0..C-1.
    """
    heads, labelled = len(predicted_K), truth != UNLABELLED
    cell_P = truth[labelled].long() * classes
    cell_KP = predicted_K[:, labelled].long() + cell_P
    cell_KP += torch.arange(heads, device=cell_KP.device)[:, None] * classes**2
    return torch.bincount(cell_KP.flatten(), minlength=heads * classes**2).view(heads, classes, classes)


def class_ious(found: Confusion) -> NDArray[np.float64]:
    """IoU of every class, (C,); NaN for one that neither the truth nor the prediction has."""
    hits, union = _hits_and_unions(found)
    ious: NDArray[np.float64] = np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)
    return ious


def scores(found: Confusion) -> dict[str, float]:
    """`miou` (the mean over classes), `micro_iou` (of all classes' pixels together) and `accuracy`, in percent.

    Sums of intersections and unions of the whole data set. A classification that nothing is labelled for is NaN.
    """
    hits, union = _hits_and_unions(found)
    ious, total = class_ious(found), found.sum()
    if not total:
        return dict.fromkeys(("miou", "micro_iou", "accuracy"), float("nan"))
    return {
        "miou": 100 * float(np.nanmean(ious)),
        "micro_iou": 100 * float(hits.sum() / union.sum()),
        "accuracy": 100 * float(hits.sum() / total),
    }


def score_rows(found: Confusion, where: Row, prefix: str = "segment_") -> list[Row]:
    """One row per score."""
    return [{"metric": f"{prefix}{name}", "value": value, **where} for name, value in scores(found).items()]


def class_rows(found: Confusion, names: Sequence[str | int], where: Row) -> list[Row]:
    """The IoU of every class that the truth has, with its pixels."""
    pixels = found.sum(axis=1)
    return [
        {"metric": "segment_iou", "value": 100 * float(iou), **where, "class": name, "pixels": int(count)}
        for name, iou, count in zip(names, class_ious(found), pixels, strict=True)
        if count
    ]


def _hits_and_unions(found: Confusion) -> tuple[Confusion, Confusion]:
    hits = np.diagonal(found)
    return hits, found.sum(axis=0) + found.sum(axis=1) - hits
