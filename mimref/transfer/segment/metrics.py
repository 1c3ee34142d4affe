"""Exact confusion matrices over all pixels of a data set, and the scores computed from them."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimref.data.masks.sources import UNLABELLED
from mimref.results import Row

Confusion = NDArray[np.int64]
"""Pixel counts (C, C), by true class (rows) and predicted class (columns)."""


def confusions(truth: Tensor, predicted_K: Tensor, classes: int) -> Tensor:
    """Return the pixel counts (K, C, C) of K predictions, int64; unlabelled pixels are not counted.

    truth: integers of any shape. predicted_K: (K, *truth.shape), 0..C-1.
    """
    heads, labelled = len(predicted_K), truth != UNLABELLED
    cell_P = truth[labelled].long() * classes
    cell_KP = predicted_K[:, labelled].long() + cell_P
    cell_KP += torch.arange(heads, device=cell_KP.device)[:, None] * classes**2
    return torch.bincount(cell_KP.flatten(), minlength=heads * classes**2).view(heads, classes, classes)


def class_ious(found: Confusion) -> NDArray[np.float64]:
    """Return the IoU of every class, (C,); NaN for a class that occurs neither in the truth nor in the prediction."""
    hits, union = _hits_and_unions(found)
    ious: NDArray[np.float64] = np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)
    return ious


def scores(found: Confusion) -> dict[str, float]:
    """Return `miou` (mean over classes), `micro_iou` (all classes' pixels together) and `accuracy`, in percent.

    Intersections and unions are summed over the whole data set. Without labelled pixels, all scores are NaN.
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
    """Return one row per score."""
    return [{"metric": f"{prefix}{name}", "value": value, **where} for name, value in scores(found).items()]


def class_rows(found: Confusion, names: Sequence[str | int], where: Row) -> list[Row]:
    """Return the IoU of every class that occurs in the truth, with its number of pixels."""
    pixels = found.sum(axis=1)
    return [
        {"metric": "segment_iou", "value": 100 * float(iou), **where, "class": name, "pixels": int(count)}
        for name, iou, count in zip(names, class_ious(found), pixels, strict=True)
        if count
    ]


def _hits_and_unions(found: Confusion) -> tuple[Confusion, Confusion]:
    hits = np.diagonal(found)
    return hits, found.sum(axis=0) + found.sum(axis=1) - hits
