"""One run of mini-batch k-means (Appendix C.12)."""

import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from mimref.evaluation.metrics import row_blocks
from mimref.features.matrix import Labels, Matrix


@dataclass(frozen=True)
class BestRun:
    """The k-means run of an evaluation that has the lowest inertia."""

    points: NDArray[np.float32]
    """(N, D) unit rows."""
    clusters: int
    number: int
    seed: int
    runs: int
    """Number of runs of which it is the best."""

    @cached_property
    def fit(self) -> tuple[Labels, NDArray[np.float64]]:
        """The cluster of every point, (N,), and the centres (clusters, D). Computed again at first use."""
        return fit_kmeans(self.points, self.clusters, self.number, self.seed)

    @cached_property
    def distances(self) -> NDArray[np.float64]:
        """(N,) distance of every point from the centre of its cluster."""
        return distances(self.points, *self.fit)


def fit_kmeans(x: NDArray[np.float32], clusters: int, number: int, seed: int) -> tuple[Labels, NDArray[np.float64]]:
    """Return the cluster of every row of x (N, D), (N,), and the centres (clusters, D).

    number: number of the run, whose randomness is a function of (seed, number).
    """
    state = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    model = MiniBatchKMeans(n_clusters=clusters, batch_size=1024, n_init=1, random_state=state)
    # One thread: the order of sums, and so the result, must not depend on the process.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # Collapsed features have fewer distinct points than clusters; the scores show it.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x)
    return model.labels_.astype(np.int64), model.cluster_centers_.astype(np.float64)


def distances(x: Matrix, labels: Labels, centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the Euclidean distance (N,) of every row of x (N, D) from the centre of its cluster."""
    return np.concatenate([np.linalg.norm(x[rows] - centres[labels[rows]], axis=1) for rows in row_blocks(x)])


def inertia(x: NDArray[np.float32], labels: Labels, centres: NDArray[np.float64]) -> float:
    """Return the sum of squared distances of all points to their centres.

    Computed in float64: scikit-learn sums in float32, which is too coarse to rank nearly equal runs.
    """
    return float(sum(np.square(x[rows] - centres[labels[rows]]).sum() for rows in row_blocks(x)))
