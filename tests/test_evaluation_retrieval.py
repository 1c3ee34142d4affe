"""Retrieval against loops in float64 and scikit-learn's average precision."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from mimref.errors import ConfigError, DataError
from mimref.evaluation.knn import retrieval as module
from mimref.evaluation.knn.retrieval import retrieval

Arrays = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]


def clouds(train: int = 90, test: int = 40, classes: int = 5, width: int = 6) -> Arrays:
    """Classes of different sizes, with labels that are not 0, 1, ..."""
    rng = np.random.default_rng(0)
    centres = 1.2 * rng.normal(size=(classes, width))
    train_y, test_y = np.minimum(rng.integers(0, 9, train), classes - 1), rng.integers(0, classes, test)
    train_y[:classes] = np.arange(classes)
    x, z = (centres[y] + rng.normal(size=(len(y), width)) for y in (train_y, test_y))
    return x.astype(np.float32), train_y * 7 - 3, z.astype(np.float32), test_y * 7 - 3


def similarities(train_x: NDArray[np.float32], test_x: NDArray[np.float32], standardize: bool) -> NDArray[np.float64]:
    x, z = train_x.astype(np.float64), test_x.astype(np.float64)
    if standardize:
        x, z = (x - x.mean(0)) / x.std(0), (z - x.mean(0)) / x.std(0)
    x, z = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (x, z))
    return np.asarray(z @ x.T)


def loops(arrays: Arrays, recall_at: tuple[int, ...], standardize: bool) -> list[float]:
    train_x, train_y, test_x, test_y = arrays
    average, at_r, recalls = [], [], []
    for similarity, label in zip(similarities(train_x, test_x, standardize), test_y, strict=True):
        ranked = sorted(range(len(similarity)), key=lambda i: (-similarity[i], i))
        relevant = [train_y[i] == label for i in ranked]
        count = sum(relevant)
        precisions = [sum(relevant[: i + 1]) / (i + 1) if relevant[i] else 0.0 for i in range(len(relevant))]
        average.append(sum(precisions) / count)
        at_r.append(sum(precisions[:count]) / count)
        recalls.append([any(relevant[:k]) for k in recall_at])
    return [100 * float(each) for each in (np.mean(average), np.mean(at_r), *np.mean(recalls, axis=0))]


@pytest.mark.parametrize("standardize", [True, False])
def test_plain_loops(standardize: bool) -> None:
    arrays = clouds()
    rows = retrieval(*arrays, recall_at=(1, 3, 90), standardize=standardize)
    names = ["retrieval_map", "retrieval_map_at_r", *["retrieval_recall"] * 3]
    assert [row["metric"] for row in rows] == names and [row.get("k") for row in rows] == [None, None, 1, 3, 90]
    expected = loops(arrays, (1, 3, 90), standardize)
    assert [row["value"] for row in rows] == pytest.approx(expected, abs=1e-9)
    assert 20 < expected[1] < expected[0] < 90 and expected[2] < expected[3] < expected[4] == 100


def test_scikit_learn_agrees() -> None:
    x, y, z, t = clouds(train=60, classes=3)
    scores = [
        average_precision_score(y == label, similarity)
        for similarity, label in zip(similarities(x, z, True), t, strict=True)
    ]
    assert retrieval(x, y, z, t)[0]["value"] == pytest.approx(100 * np.mean(scores), abs=1e-9)


def test_closed_forms() -> None:
    """Two of four images are relevant, at ranks 1 and 4, or 2 and 4 where ties are in order of index."""
    x = np.array([[1, 0], [0.9, 0.1], [0.8, 0.2], [0, 1]], np.float32)
    y, z, t = np.array([0, 1, 1, 0]), np.array([[1, 0]], np.float32), np.array([0])
    rows = retrieval(x, y, z, t, recall_at=(1,), standardize=False)
    assert [row["value"] for row in rows] == pytest.approx([100 * (1 + 2 / 4) / 2, 50, 100])
    tied = np.array([[1, 0], [2, 0], [3, 0], [0, 1]], np.float32)
    rows = retrieval(tied, np.array([1, 0, 1, 0]), z, t, recall_at=(1, 2), standardize=False)
    assert [row["value"] for row in rows] == pytest.approx([100 * (1 / 2 + 2 / 4) / 2, 25, 0, 100])


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = clouds()
    expected = retrieval(*arrays)
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    for most in (1, 90 * 7):
        calls.clear()
        monkeypatch.setattr(module, "SORTED_AT_ONCE", most)
        found = retrieval(*arrays, progress=lambda done, total: calls.append((done, total)))
        assert [row["value"] for row in found] == pytest.approx([row["value"] for row in expected], abs=1e-9)
        assert calls[-1] == (40, 40) and all(a[0] < b[0] for a, b in pairwise(calls))


def test_what_cannot_be_measured() -> None:
    x, y, z, t = clouds()
    with pytest.raises(ConfigError, match=r"recall_at 91: .* 90"):
        retrieval(x, y, z, t, recall_at=(1, 91))
    with pytest.raises(DataError, match="class 99 has no training image"):
        retrieval(x, y, z, t * 0 + 99)
    collapsed = retrieval(np.ones_like(x), y, z, t)
    assert all(np.isnan(float(row["value"])) for row in collapsed) and len(collapsed) == 5
