"""Maps of images: points in a plane, with similar images near each other."""

import numpy as np
from numpy.typing import NDArray

from mimref.data.labels import Indices, fixed_choice
from mimref.evaluation.cluster.embedding import umap_embedding
from mimref.evaluation.exhibits.contents import MAP_DECIMALS
from mimref.evaluation.metrics import unit_rows
from mimref.features.matrix import Labels

MOST_IMAGES = 2000
"""Most images on a map. UMAP takes 5 s for this many."""
UMAP_IMAGES = 100
"""Fewest images for UMAP, whose import and compilation alone take 10 s; fewer are arranged by principal components."""
FEWEST_IMAGES = 3
"""Fewest images on a map: two points have no arrangement."""


def map_rows(images: int, y: Labels | None) -> Indices:
    """Return the images on the maps: all, a fixed choice with equal shares of classes y (N,), or none if too few."""
    return fixed_choice(images, y, most=MOST_IMAGES) if images >= FEWEST_IMAGES else np.empty(0, dtype=np.int64)


def arrange(x: NDArray[np.float32], *, seed: int) -> NDArray[np.float32]:
    """Return the positions (M, 2) of images with features x (M, D), scaled to unit length here; rounded as saved."""
    points = umap_embedding(x, seed=seed) if len(x) >= UMAP_IMAGES else principal_components(x)
    return np.asarray(np.round(points.astype(np.float64), MAP_DECIMALS), dtype=np.float32)


def principal_components(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the scores (M, 2) of x (M, D), scaled to unit length, on two principal components; the largest becomes 10.

    Signs are chosen so that the largest score of each component is positive.
    """
    centred = unit_rows(x).astype(np.float64)
    centred -= centred.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    scores = np.zeros((len(x), 2))
    scores[:, : min(2, len(values))] = (left * values)[:, :2]
    largest = np.take_along_axis(scores, np.abs(scores).argmax(axis=0)[None], axis=0)
    scores *= np.where(largest < 0, -1.0, 1.0)
    # Equal images differ only by float32 rounding.
    size = float(np.abs(scores).max())
    return np.asarray(scores * (10 / size if size > 1e-6 else 0.0), dtype=np.float32)
