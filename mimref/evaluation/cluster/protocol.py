"""Clustering of frozen features by mini-batch k-means, compared with the classes (Appendix C.12): `mimref cluster`."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import pdist
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    davies_bouldin_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from sklearn.metrics.cluster import contingency_matrix

from mimref.devices import own_cores
from mimref.distributed.group import end_group
from mimref.errors import Checks, ConfigError, did_you_mean
from mimref.evaluation.cluster.assignment import Assignment, assign
from mimref.evaluation.cluster.classes import check_classes, check_clusters
from mimref.evaluation.cluster.config import ClusterConfig
from mimref.evaluation.cluster.kmeans import BestRun, fit_kmeans, inertia
from mimref.evaluation.exhibits.collect import Exhibition, IllustratedResult
from mimref.evaluation.metrics import check_features, number_classes, percent, progress_label, spread, unit_rows, vary
from mimref.features.collection import Part
from mimref.features.inputs import SPLIT_NAMES, EncoderInputs, column_groups, prepare_groups
from mimref.features.matrix import Labels, Matrix
from mimref.features.opening import Opened, open_inputs
from mimref.progress import Listener, Progress, Silent
from mimref.results import Row, named

# runs * N * D * clusters below which starting processes takes as long as the runs themselves (1 to 2 s).
SERIAL_WORK = 2e8


class LastFeatures(NamedTuple):
    """Features that a figure shows: those of the last of the chosen blocks."""

    x: Matrix
    """Features (N, D)."""
    y: Labels
    """(N,) classes, or clusters if the images have no labels."""
    class_names: list[str] | None


@dataclass(frozen=True)
class ClusterResult(IllustratedResult):
    """Scores, and the cluster of every image."""

    assignment: Assignment | None = None
    """Clusters by the features of the last of the chosen blocks."""


def evaluate_cluster(
    config: ClusterConfig,
    *,
    embed: bool = False,
    assigned: bool = False,
    exhibits: bool = False,
    listener: Listener | None = None,
    checks: Checks | None = None,
) -> tuple[ClusterResult, LastFeatures | None]:
    """Cluster one split's images; with `embed`, also return the features to embed, once checked to be enough for UMAP.

    assigned: also return the cluster of every image, and pictures of each cluster. exhibits: also collect the images
    that a report shows. Both use the features of the last of the chosen blocks.
    Rows are those of `cluster`, with `model`, `blocks` and `pool`. Raises UserError subclasses, where possible before
    the encoder runs.
    """
    started, listener, checks = time.monotonic(), listener or Silent(), checks or Checks()
    checks.run("metrics", lambda: check_metrics(config.metrics))
    opened = open_inputs(config, listener, checks, (config.split,), need_labels=False)
    groups = column_groups(config, opened.inputs, checks)
    classes = check_classes(config, opened, checks, embed)
    checks.run("metrics", lambda: _check_labels(config, opened))
    inputs = opened.checked(checks)
    if config.clusters is not None and opened.labels(config.split) is None:
        missing = [name for name in config.metrics if name in AGREEMENT]
        if missing:
            listener.note(f"left out, since the images have no labels to compare with: {', '.join(missing)}")
    prepare_groups(groups, inputs, (config.split,))
    rows: list[Row] = []
    last = exhibition = assignment = None
    clusters = config.clusters or len([] if classes is None else classes)
    for where, columns in groups if end_group() else []:
        features = inputs.features(config.split)
        x, y, chosen = features.matrix(columns), features.y, None
        if y is not None and classes is not None and config.classes is not None:
            chosen = np.flatnonzero(np.isin(y, classes))
            x, y = x[chosen], y[chosen]
            where = where | {"classes": len(classes)}
        where = where if config.clusters is None else where | {"clusters": clusters}
        report = partial(listener.progress, progress_label("k-means", where))
        found, best = cluster_and_best(
            x, y, clusters=config.clusters, metrics=config.metrics, runs=config.runs, seed=config.seed, progress=report
        )
        rows += named(found, inputs.name, where)
        if columns != groups[-1][1]:
            continue
        if isinstance(inputs, EncoderInputs) and best is not None and (assigned or y is None):
            part = Part(config.split, inputs.source(config.split), features)
            own = np.arange(len(features)) if chosen is None else chosen
            assignment = assign(best, part, own, pictures=assigned)
        if embed:
            last = _last_features(x, y, features.class_names, assignment)
        if exhibits and isinstance(inputs, EncoderInputs):
            what = f"{SPLIT_NAMES[config.split]} images"
            exhibition = Exhibition(inputs.source(config.split), inputs.settings, config.seed, listener, what)
            exhibition.add(inputs.name, features, columns, best=best, chosen=chosen)
    elapsed_s = time.monotonic() - started
    made = None if exhibition is None else exhibition.made()
    return ClusterResult(rows, elapsed_s, inputs.bad, inputs.data, made, assignment), last


def _check_labels(config: ClusterConfig, opened: Opened) -> None:
    """Raise ConfigError if the images have no labels and every metric needs them."""
    unlabelled = opened.inputs is not None and opened.labels(config.split) is None
    if unlabelled and config.clusters is not None and AGREEMENT.keys() >= set(config.metrics):
        wrong = f"metrics {','.join(config.metrics)}: the images have no labels to compare with; choose sil or dbs"
        raise ConfigError(wrong)


def _last_features(
    x: Matrix, y: Labels | None, class_names: list[str] | None, assignment: Assignment | None
) -> LastFeatures:
    if y is not None:
        return LastFeatures(x, y, class_names)
    assert assignment is not None  # images without labels are clustered
    return LastFeatures(x, assignment.cluster, [f"cluster {n}" for n in range(int(assignment.cluster.max()) + 1)])


def cluster_accuracy(y: Labels, assignment: Labels) -> float:
    """Return the clustering accuracy in percent: images explained by the best one-to-one map of clusters to classes.

    y (N,): classes. assignment (N,): clusters. The Hungarian method finds the map on the contingency matrix. Surplus
    clusters or classes stay unmapped, and their images count as errors.
    """
    counts = contingency_matrix(y, assignment)
    return percent(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(y))


# Scores in percent from classes and clusters, both (N,).
AGREEMENT: dict[str, Callable[[Labels, Labels], float]] = {
    "acc": cluster_accuracy,
    "nmi": lambda y, assignment: percent(normalized_mutual_info_score(y, assignment)),
    "ami": lambda y, assignment: percent(adjusted_mutual_info_score(y, assignment)),
    "ari": lambda y, assignment: percent(adjusted_rand_score(y, assignment)),
}


def _silhouette(x: NDArray[np.float32], y: Labels) -> float:
    """Return the silhouette in percent; NaN if all points are the same, for which scikit-learn returns 0."""
    return percent(silhouette_score(x, y)) if vary(x) and _separable(y) else math.nan


def _davies_bouldin(x: NDArray[np.float32], y: Labels) -> float:
    """Return Davies-Bouldin; NaN if centres coincide: scikit-learn then omits the pair or returns 0, the best score."""
    if not _separable(y):
        return math.nan
    centres = np.stack([x[y == label].mean(axis=0, dtype=np.float64) for label in range(int(y.max()) + 1)])
    # For unit rows, this is far below what separates any two classes.
    return float(davies_bouldin_score(x, y)) if pdist(centres).min() > 1e-6 else math.nan


def _separable(y: Labels) -> bool:
    """Return whether there are several classes, and not every point is a class of its own; y: classes 0, 1, ..."""
    return 1 < int(y.max()) + 1 < len(y)


# Scores from unit rows (N, D) and classes 0, 1, ... (N,): how far apart the classes are, without clustering.
SEPARATION: dict[str, Callable[[NDArray[np.float32], Labels], float]] = {"sil": _silhouette, "dbs": _davies_bouldin}
# Names in results.
NAMES = {name: f"cluster_{name}" for name in AGREEMENT} | {"sil": "silhouette", "dbs": "davies_bouldin"}


def cluster(
    x: Matrix,
    y: Labels | None,
    *,
    clusters: int | None = None,
    metrics: Sequence[str] = ("acc", "nmi"),
    runs: int = 100,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Score k-means clusters against the classes, and the classes' separation (Appendix C.12, Tables 3 and 9).

    x (N, D): features, scaled to unit length here and held in memory as float32. y (N,): labels, any whole numbers, or
    None. clusters: their number; None: as many as classes. metrics: acc, nmi, ami, ari (of clusters: `value` is from
    the run with the lowest inertia, next to `mean` and `std` (ddof 1) over `runs`), sil and dbs (silhouette and
    Davies-Bouldin of the true classes, without clustering). With `clusters`, sil and dbs are also measured on the
    clusters of that run, as `cluster_silhouette` and `cluster_davies_bouldin`. Without labels, metrics that need them
    are left out. Values are in percent, except Davies-Bouldin. sil and dbs are NaN for features that do not vary and if
    every image is a class of its own, dbs also if two classes have the same mean.
    A run is scikit-learn's MiniBatchKMeans with its defaults and n_init=1. Runs are spread over `workers` processes
    (None: all cores), or stay in this one if that is faster, with the same results. Silhouette compares all pairs of
    images, in pieces of up to 1 GB; this takes minutes for the 50,000 validation images of ImageNet.
    Raises ConfigError for an unknown metric, DataError for features or labels that cannot be used.
    """
    return cluster_and_best(
        x, y, clusters=clusters, metrics=metrics, runs=runs, seed=seed, workers=workers, progress=progress
    )[0]


def cluster_and_best(
    x: Matrix,
    y: Labels | None,
    *,
    clusters: int | None = None,
    metrics: Sequence[str],
    runs: int,
    seed: int,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[list[Row], BestRun | None]:
    """Return the rows of `cluster`, and the run with the lowest inertia, or None if no metric needs clusters."""
    check_metrics(metrics)
    for option, number in (("runs", runs), ("workers", workers)):
        if number is not None and number < 1:
            raise ConfigError(f"{option} = {number}: give at least 1")
    check_features(x, "features", y)
    truth = None if y is None else number_classes(y, "features")[1]
    if clusters is None and truth is None:
        raise ConfigError("without labels, give the number of clusters")
    count = clusters or int(truth.max()) + 1 if truth is not None else int(clusters or 0)
    check_clusters(count, len(x), given=clusters is not None)
    points = unit_rows(x)
    of_clusters = [name for name in metrics if name in AGREEMENT and truth is not None]
    jobs = min(workers or own_cores(), runs) if float(runs) * points.size * count >= SERIAL_WORK else 1
    done: list[Run] = []
    for run in _all_runs(points, truth, of_clusters, count, runs, seed, jobs) if of_clusters or clusters else ():
        done.append(run)
        if progress is not None:
            progress(len(done), runs)
    number = min(range(len(done)), key=lambda run: done[run].inertia, default=None)
    best = None if number is None else BestRun(points, count, number, seed, runs)
    rows: list[Row] = []
    for name in dict.fromkeys(metrics):
        if name in SEPARATION and truth is not None:
            rows.append({"metric": NAMES[name], "value": SEPARATION[name](points, truth)})
        elif name in of_clusters and number is not None:
            mean, std = spread([run.scores[name] for run in done])
            rows.append(
                {"metric": NAMES[name], "value": done[number].scores[name], "mean": mean, "std": std, "runs": runs}
            )
    if clusters is not None and best is not None:
        assigned = np.unique(best.fit[0], return_inverse=True)[1]
        for name in [name for name in SEPARATION if name in metrics]:
            rows.append({"metric": f"cluster_{NAMES[name]}", "value": SEPARATION[name](points, assigned), "runs": runs})
    return rows, best


def check_metrics(metrics: Sequence[str]) -> None:
    """Raise ConfigError for an unknown metric, and if none is given."""
    for name in metrics:
        if name not in NAMES:
            raise ConfigError(f"unknown metric {name!r}; choose from {', '.join(NAMES)}{did_you_mean(name, NAMES)}")
    if not metrics:
        raise ConfigError(f"metrics: none given; choose from {', '.join(NAMES)}")


class Run(NamedTuple):
    """One k-means run."""

    inertia: float
    """Sum of squared distances of all points to their centres, float64."""
    scores: dict[str, float]
    """Scores in percent, by short name."""


def kmeans_run(
    x: NDArray[np.float32], y: Labels | None, metrics: Sequence[str], clusters: int, number: int, seed: int
) -> Run:
    """Do run `number` of mini-batch k-means on unit rows x (N, D), and score it against classes y (N,), if any.

    Its randomness is a function of (seed, number).
    """
    labels, centres = fit_kmeans(x, clusters, number, seed)
    return Run(inertia(x, labels, centres), {name: AGREEMENT[name](y, labels) for name in metrics if y is not None})


def _all_runs(
    x: NDArray[np.float32], y: Labels | None, metrics: Sequence[str], clusters: int, runs: int, seed: int, jobs: int
) -> Iterator[Run]:
    """Yield `kmeans_run` of every number, from several processes if they can be started and do not die."""
    # Arrays above a megabyte are written once and memory-mapped by all processes.
    parallel = Parallel(n_jobs=jobs, max_nbytes="1M", return_as="generator")
    done = 0
    with suppress(*() if jobs == 1 else (OSError, BrokenExecutor)):
        for run in parallel(delayed(kmeans_run)(x, y, metrics, clusters, number, seed) for number in range(runs)):
            yield run
            done += 1
    for number in range(done, runs):
        yield kmeans_run(x, y, metrics, clusters, number, seed)
