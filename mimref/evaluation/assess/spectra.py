"""Measures of how many dimensions features use, from D x D matrices; rows are read in blocks, in float64.

Shapes: N images, V views, D features.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from mimref.errors import DataError
from mimref.evaluation.metrics import row_blocks
from mimref.features.matrix import Matrix

Array = NDArray[np.float64]

RANKME_EPSILON = 1e-7
"""Added to every share (Garrido et al. 2023, Eq. 2; Thilak et al. 2024 as well)."""
LIDAR_DELTA = 1e-4
"""Regularises the covariance within images (Thilak et al. 2024), here as a share of the features' mean variance."""
# Eigenvalues below this share of the largest are rounding errors of float32 features.
_NOISE = 1e-10


class Moments(NamedTuple):
    """First and second moments of features."""

    mean: Array
    """Mean (D,)."""
    covariance: Array
    """Covariance (D, D), ddof 0."""


def moments(x: Matrix) -> Moments:
    """Return the mean and covariance of x (N, D), in float64; x is read twice, and memory use is D x D."""
    slices = row_blocks(x)
    mean = sum(x[rows].sum(axis=0, dtype=np.float64) for rows in slices) / len(x)
    covariance = np.zeros((x.shape[1], x.shape[1]))
    for rows in slices:
        centred = x[rows] - mean
        covariance += centred.T @ centred
    return Moments(np.asarray(mean), covariance / len(x))


def spectrum(covariance: Array) -> Array:
    """Return the eigenvalues (D,), largest first; rounding errors below 0 become 0."""
    return np.linalg.eigvalsh(covariance)[::-1].clip(min=0)


def effective_rank(eigenvalues: Array) -> float:
    """Return exp of the entropy of the normalised eigenvalues (Roy & Vetterli 2007): 1 to D; 1 if none is above 0.

    Those of a covariance are shares of variance, which a few large features dominate. With those of `correlation`,
    every feature counts alike. RankMe uses shares of singular values instead, where small ones count more.
    """
    total = eigenvalues.sum()
    share = eigenvalues[eigenvalues > 0] / total if total > 0 else np.ones(1)
    return float(np.exp(-(share * np.log(share)).sum()))


def correlation(found: Moments) -> Array:
    """Return the covariance (D, D) of features standardised as for k-NN; features that do not vary are left out."""
    std = np.sqrt(np.diag(found.covariance))
    varies = std > np.finfo(np.float32).eps * np.abs(found.mean)
    return np.asarray(found.covariance[np.ix_(varies, varies)] / np.outer(std[varies], std[varies]))


def rankme(found: Moments) -> float:
    """Return exp of the entropy of the normalised singular values of uncentred features (Garrido et al. 2023).

    Between 1 and D (Eq. 1 and 2, with epsilon in the shares). Singular values are the square roots of the eigenvalues
    of the second moment.
    """
    second = found.covariance + np.outer(found.mean, found.mean)
    return _smoothed_rank(np.sqrt(spectrum(second)))


def alpha_req(eigenvalues: Array) -> float:
    """Return the exponent of the power law i^-alpha that a covariance's eigenvalues follow (Agrawal et al. 2022).

    eigenvalues: largest first. alpha is the negative slope of log eigenvalue over log i, by least squares with weights
    1 / i, so that every octave counts alike, as in Stringer et al. 2019, whose fit the paper uses. The fit includes all
    eigenvalues except rounding errors. alpha is 0 for a flat spectrum and infinite for a single dimension; according to
    the paper, about 1 is best. NaN if nothing varies.
    """
    kept = eigenvalues[eigenvalues > _NOISE * eigenvalues[0]]
    if len(kept) < 2:
        return float("inf") if len(kept) else float("nan")
    number = np.arange(1, len(kept) + 1)
    # polyfit multiplies residuals, not squares, by its weights.
    return float(-np.polyfit(np.log(number), np.log(kept), 1, w=number**-0.5)[0])


def lidar(views: Sequence[Matrix]) -> float:
    """Return the effective rank of linear discriminant analysis, with images as classes (Thilak et al. 2024), 1 to D.

    views: V matrices (N, D), the features of two or more augmented views of every image, row by row. The rank is exp of
    the entropy of the normalised eigenvalues of W^-1/2 B W^-1/2: B is the covariance of the images' means, W that of
    the views around their image's mean. The paper adds 1e-4 to the diagonal of W; here it is `LIDAR_DELTA` times the
    mean variance of all views, so that the scale of features does not matter. The paper uses 50 views of 1,000 images;
    with two views, W is estimated from N differences, so N should exceed D. The rank is 1 if nothing varies. Raises
    DataError for views of different shapes.
    """
    if len(views) < 2 or any(a.shape != b.shape for a, b in pairwise(views)):
        raise DataError(f"views have shapes {[view.shape for view in views]}; give two or more of the same images")
    count, width = views[0].shape
    between, within, total = np.zeros((width, width)), np.zeros((width, width)), np.zeros(width)
    for rows in row_blocks(views[0]):
        total += _mean_view(views, rows).sum(axis=0)
    for rows in row_blocks(views[0]):
        centre = _mean_view(views, rows)
        difference = centre - total / count
        between += difference.T @ difference
        for view in views:
            difference = view[rows] - centre
            within += difference.T @ difference / len(views)
    between, within = between / count, within / count
    variance = float(np.trace(between) + np.trace(within)) / width
    if variance == 0:
        return 1.0
    within[np.diag_indices(width)] += LIDAR_DELTA * variance
    # The eigenvalues of W^-1 B, which are those of the symmetric form.
    return _smoothed_rank(scipy.linalg.eigvalsh(between, within)[::-1].clip(min=0))


def _mean_view(views: Sequence[Matrix], rows: slice) -> Array:
    return np.asarray(sum(view[rows].astype(np.float64) for view in views) / len(views))


def _smoothed_rank(values: Array) -> float:
    """Return exp of the entropy of the values' shares, to which epsilon is added; at least 1."""
    total = values.sum()
    if total <= 0:
        return 1.0
    share = values / total + RANKME_EPSILON
    return max(1.0, float(np.exp(-(share * np.log(share)).sum())))
