"""Measures of how features lie on the sphere: nearest neighbours among the images, and uniformity.

As for k-NN classification, features are standardised, then scaled to unit length.
Shapes: N images, D features, K neighbours.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mimref.evaluation.knn.protocol import Neighbours, find_neighbours, label_ranks
from mimref.evaluation.metrics import mean_and_std, number_classes, percent, unit_rows
from mimref.features.matrix import Labels, Matrix

UNIFORMITY_T = 2.0
"""Parameter t of the Gaussian potential (Wang & Isola 2020)."""
# Similarities of pairs of images that are computed at once: 32 MB.
_SIMILARITIES = 1 << 23


def fitting_k(k: int, images: int) -> int:
    """Return k, but at most a quarter of the other images: if nearly all images are neighbours, they mean nothing."""
    return min(k, max(1, (images - 1) // 4))


def other_neighbours(x: Matrix, *, k: int, device: str = "cpu") -> Neighbours:
    """Return the k nearest other images of every image of x (N, D), as `find_neighbours` does; k < N.

    In a process group this is a collective operation: every rank must call it with the same arguments.
    """
    found = find_neighbours(x, x, k=k + 1, device=device)
    own = found.train_index == torch.arange(len(x))[:, None]
    # Where duplicates that come first fill all places, the last of them is dropped instead of the image itself.
    own[~own.any(dim=1), -1] = True
    return Neighbours(*(part[~own].reshape(len(x), k) for part in found))


def leave_one_out_accuracy(neighbours: Neighbours, y: Labels, *, tau: float = 0.07) -> float:
    """Return the k-NN accuracy in percent if all other images vote on each image; see `knn`. y (N,): whole numbers."""
    classes, labels = number_classes(y, "images")
    k = neighbours.train_index.shape[1]
    return percent(np.mean(label_ranks(neighbours, labels, labels, len(classes), k=[k], tau=[tau])[k, tau] < 1))


def hubness(neighbours: Neighbours) -> float:
    """Return the skewness of how often an image is among the k nearest of others (Radovanovic et al. 2010).

    About 0 if all images are neighbours equally often; large if a few hubs are neighbours of many.
    """
    index = neighbours.train_index.numpy()
    counts = np.bincount(index.ravel(), minlength=len(index)).astype(np.float64)
    deviation = counts - counts.mean()
    variance = np.mean(deviation**2)
    return float(np.mean(deviation**3) / variance**1.5) if variance > 0 else 0.0


def neighbour_consistency(first: Neighbours, second: Neighbours) -> float:
    """Return the share, in percent, of an image's k nearest others that two views of all images have in common.

    first, second: neighbours of view 0 among views 0, and of view 1 among views 1. Chance level: 100 k / (N - 1).
    """
    one, two = (each.train_index.numpy() for each in (first, second))
    common = sum((one == two[:, [place]]).any(axis=1).sum() for place in range(two.shape[1]))
    return percent(common / one.size)


def view_retrieval(first: Matrix, second: Matrix, *, device: str = "cpu") -> float:
    """Return the share, in percent, of images that one of their views retrieves; mean of both directions.

    first, second (N, D): views 0 and 1 of the same images, row by row. An image is retrieved if its other view is the
    nearest among those of all images.
    """
    own = np.arange(len(first))
    found = (
        find_neighbours(keys, queries, k=1, device=device).train_index.numpy()[:, 0]
        for keys, queries in ((first, second), (second, first))
    )
    return percent(np.mean([np.mean(index == own) for index in found]))


def uniformity(x: Matrix) -> float:
    """Return the log of the mean Gaussian potential exp(-2 d^2) of all image pairs of x (N, D) (Wang & Isola 2020).

    It falls from 0, if all features are one point, to about -4 and below for features spread over the sphere.
    """
    unit = unit_rows(x, *mean_and_std(x))
    return _log_potential(unit)


def _log_potential(unit: NDArray[np.float32]) -> float:
    count, total = len(unit), 0.0
    step = max(1, _SIMILARITIES // count)
    for start in range(0, count, step):
        # On the unit sphere, d^2 = 2 - 2 cos.
        cosine: NDArray[Any] = unit[start : start + step] @ unit.T
        total += float(np.exp(2 * UNIFORMITY_T * (cosine - 1)).sum(dtype=np.float64))
    norms = np.square(unit, dtype=np.float64).sum(axis=1)
    total -= float(np.exp(2 * UNIFORMITY_T * (norms - 1)).sum())  # pairs of an image with itself
    return float(np.log(total / (count * (count - 1))))
