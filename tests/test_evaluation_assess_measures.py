"""Measures without labels, against plain loops in float64, other implementations and closed forms."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from mimref.errors import DataError
from mimref.evaluation import metrics
from mimref.evaluation.assess.measures import LOWER_IS_BETTER, MEASURES, crop_measures, goodness, view_measures
from mimref.evaluation.assess.neighbours import (
    fitting_k,
    hubness,
    leave_one_out_accuracy,
    neighbour_consistency,
    other_neighbours,
    uniformity,
    view_retrieval,
)
from mimref.evaluation.assess.spectra import (
    LIDAR_DELTA,
    RANKME_EPSILON,
    alpha_req,
    correlation,
    effective_rank,
    lidar,
    moments,
    rankme,
    spectrum,
)
from mimref.features.matrix import SideBySide

Array = NDArray[np.float64]


def features(count: int = 40, width: int = 6, seed: int = 0) -> Array:
    """Correlated features of unequal scale, away from the origin."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) * np.arange(1, width + 1) + 3


def entropy_rank(share: Array) -> float:
    return math.exp(-sum(p * math.log(p) for p in share if p > 0))


def standardised(x: Array) -> Array:
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    return np.asarray(z / np.linalg.norm(z, axis=1, keepdims=True))


def nearest(x: Array, y: Array, k: int, *, others: bool) -> list[list[int]]:
    """The k nearest rows of y for every row of x, by loops; both are standardised by y's statistics."""
    mean, std = y.mean(axis=0), y.std(axis=0)
    unit = [(v - mean) / std / np.linalg.norm((v - mean) / std) for v in (*x, *y)]
    queries, keys = unit[: len(x)], unit[len(x) :]
    found = []
    for row, query in enumerate(queries):
        order = sorted(range(len(keys)), key=lambda at: -float(query @ keys[at]))
        found.append([at for at in order if not (others and at == row)][:k])
    return found


def test_rankme_is_that_of_singular_values() -> None:
    x = features()
    singular = np.linalg.svd(x, compute_uv=False)
    share = singular / singular.sum() + RANKME_EPSILON
    assert rankme(moments(x)) == pytest.approx(entropy_rank(share), rel=1e-9)
    assert rankme(moments(np.concatenate([np.eye(5), -np.eye(5)]))) == pytest.approx(5, rel=1e-4)
    assert rankme(moments(np.ones((9, 1)) * np.arange(1.0, 5.0))) == pytest.approx(1, abs=1e-3)


def test_effective_and_correlation_rank() -> None:
    x = features()
    eigenvalues = np.linalg.svd(x - x.mean(axis=0), compute_uv=False) ** 2
    expected = entropy_rank(eigenvalues / eigenvalues.sum())
    assert effective_rank(spectrum(moments(x).covariance)) == pytest.approx(expected, rel=1e-9)
    correlations = np.linalg.eigvalsh(np.corrcoef(x.T))
    expected = entropy_rank(correlations / correlations.sum())
    scaled = x * 10.0 ** np.arange(6)
    for each in (x, scaled, np.concatenate([x, np.full((40, 2), 7.0)], axis=1)):
        assert effective_rank(spectrum(correlation(moments(each)))) == pytest.approx(expected, rel=1e-8)


def test_alpha_req_of_power_laws() -> None:
    number = np.arange(1, 41)
    for alpha in (0.0, 0.5, 1.0, 2.5):
        assert alpha_req(7.0 * number**-alpha) == pytest.approx(alpha, abs=1e-9)
    # Weighted least squares by the normal equations; eigenvalues that are rounding errors are ignored.
    eigenvalues = np.sort(np.random.default_rng(0).random(12))[::-1]
    x, y, w = np.log(np.arange(1, 13)), np.log(eigenvalues), 1 / np.arange(1, 13)
    mean_x, mean_y = (w * x).sum() / w.sum(), (w * y).sum() / w.sum()
    slope = (w * (x - mean_x) * (y - mean_y)).sum() / (w * (x - mean_x) ** 2).sum()
    assert alpha_req(eigenvalues) == pytest.approx(-slope, rel=1e-9)
    assert alpha_req(np.append(eigenvalues, [1e-12, 0.0])) == pytest.approx(-slope, rel=1e-9)
    assert alpha_req(np.array([1.0, 0.0])) == math.inf


@pytest.mark.parametrize("views", [2, 3])
def test_lidar_by_loops(views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = features()
    rng = np.random.default_rng(1)
    seen = [images + rng.normal(size=images.shape) for _ in range(views)]
    between, within = np.zeros((6, 6)), np.zeros((6, 6))
    mean = sum(view.mean(axis=0) for view in seen) / views
    for row in range(len(images)):
        centre = sum(view[row] for view in seen) / views
        between += np.outer(centre - mean, centre - mean) / len(images)
        for view in seen:
            within += np.outer(view[row] - centre, view[row] - centre) / (views * len(images))
    variance = np.concatenate(seen).var(axis=0).mean()
    within += LIDAR_DELTA * variance * np.eye(6)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    ratios = np.linalg.eigvalsh(root @ between @ root)
    expected = entropy_rank(ratios / ratios.sum() + RANKME_EPSILON)
    assert lidar(seen) == pytest.approx(expected, rel=1e-9)
    assert lidar([1000 * view for view in seen]) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 6 * 7)
    assert lidar(seen) == pytest.approx(expected, rel=1e-9)
    assert lidar([SideBySide([view[:, :2], view[:, 2:]]) for view in seen]) == pytest.approx(expected, rel=1e-9)


def test_lidar_needs_views_of_the_same_images() -> None:
    with pytest.raises(DataError, match="two or more"):
        lidar([features()])
    with pytest.raises(DataError, match="two or more"):
        lidar([features(), features(39)])
    assert lidar([np.ones((5, 3)), np.ones((5, 3))]) == 1


def test_neighbours_of_other_images() -> None:
    x = features(60)
    assert other_neighbours(x, k=7).train_index.tolist() == nearest(x, x, 7, others=True)
    # With more duplicates than neighbours, an image is still not its own neighbour.
    same = np.repeat(features(4), 10, axis=0)
    found = other_neighbours(same, k=5).train_index.numpy()
    assert found.shape == (40, 5) and not (found == np.arange(40)[:, None]).any()
    assert (found // 10 == np.arange(40)[:, None] // 10).all()


def test_hubness_is_the_skewness_of_occurrences() -> None:
    x = features(60)
    counts = [0] * 60
    for row in nearest(x, x, 5, others=True):
        for at in row:
            counts[at] += 1
    assert hubness(other_neighbours(x, k=5)) == pytest.approx(scipy.stats.skew(counts), rel=1e-9)
    angles = np.linspace(0, 2 * math.pi, 12, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert hubness(other_neighbours(circle, k=2)) == 0  # every point is a neighbour of two others


def test_consistency_and_retrieval_by_loops() -> None:
    first = features(50)
    second = first + np.random.default_rng(3).normal(size=first.shape) * 4
    one, two = nearest(first, first, 6, others=True), nearest(second, second, 6, others=True)
    expected = 100 * sum(len(set(a) & set(b)) for a, b in zip(one, two, strict=True)) / (50 * 6)
    graphs = [other_neighbours(view, k=6) for view in (first, second)]
    assert neighbour_consistency(*graphs) == pytest.approx(expected, rel=1e-12)
    assert neighbour_consistency(graphs[0], graphs[0]) == 100
    ways = [nearest(second, first, 1, others=False), nearest(first, second, 1, others=False)]
    hits = [sum(found == [row] for row, found in enumerate(way)) for way in ways]
    assert 0 < sum(hits) < 100
    assert view_retrieval(first, second) == pytest.approx(sum(hits), rel=1e-12)
    assert view_retrieval(first, first) == 100


def test_uniformity_by_loops() -> None:
    x = features(30)
    z = standardised(x)
    potentials = [
        math.exp(-2 * sum((a - b) ** 2 for a, b in zip(z[i], z[j], strict=True)))
        for i in range(30)
        for j in range(30)
        if i != j
    ]
    assert uniformity(x) == pytest.approx(math.log(sum(potentials) / len(potentials)), abs=1e-5)
    large = np.random.default_rng(0).normal(size=(2500, 3))
    parts = standardised(large)
    squared = np.square(parts[:, None] - parts).sum(axis=2)
    expected = math.log((np.exp(-2 * squared).sum() - 2500) / (2500 * 2499))
    assert uniformity(large) == pytest.approx(expected, abs=1e-5)


def test_leave_one_out_votes_of_all_others() -> None:
    x, y = features(50), np.random.default_rng(0).integers(3, 6, 50)
    z = standardised(x)
    right = 0
    for row, index in enumerate(nearest(x, x, 4, others=True)):
        votes = {label: 0.0 for label in (3, 4, 5)}
        for at in index:
            votes[int(y[at])] += math.exp(float(z[row] @ z[at]) / 0.07)
        right += max(votes, key=lambda label: votes[label]) == y[row]
    assert leave_one_out_accuracy(other_neighbours(x, k=4), y) == pytest.approx(100 * right / 50)


def test_all_measures_have_a_name_and_a_better_side() -> None:
    x = features(17)
    found = crop_measures(x) | view_measures(x, x + 0.1 * features(17, seed=1))
    assert sorted(found) == sorted(MEASURES)
    assert all(map(math.isfinite, found.values()))
    for measure in MEASURES:
        better, worse = (1.1, 1.7) if measure == "alpha_req" or measure in LOWER_IS_BETTER else (1.7, 1.1)
        assert goodness(measure, better) > goodness(measure, worse) > goodness(measure, math.nan)
    assert goodness("alpha_req", 0.9) == pytest.approx(goodness("alpha_req", 1.1))


def test_labels_add_a_row_and_change_nothing_else() -> None:
    x, y = features(30), np.arange(30) % 3
    plain, labelled = crop_measures(x), crop_measures(x, y=y)
    assert labelled.pop("knn_leave_one_out") >= 0
    assert labelled == plain == crop_measures(x, y=np.zeros(30, np.int64))


@pytest.mark.parametrize("x", [np.ones((20, 4)), np.tile(np.arange(4.0), (20, 1)), np.zeros((20, 4))])
def test_features_that_do_not_vary(x: Array) -> None:
    found: dict[str, Any] = crop_measures(x) | view_measures(x, x)
    assert sorted(found) == sorted(MEASURES)
    assert all(found[name] == 1 for name in ("rankme", "lidar", "effective_rank", "correlation_rank"))
    assert found["uniformity"] == 0 and math.isnan(found["neighbour_consistency"]) and math.isnan(found["hubness"])


def test_small_sets_have_fewer_neighbours() -> None:
    assert [fitting_k(10, images) for images in (3, 5, 17, 41, 1000)] == [1, 1, 4, 10, 10]
