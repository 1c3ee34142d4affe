"""Scores and checks shared by several protocols."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from mimref.errors import DataError
from mimref.evaluation.cluster.protocol import cluster_accuracy
from mimref.evaluation.metrics import check_features, row_blocks, spread, unit_rows
from mimref.features.matrix import SideBySide
from mimref.results import main_rows


@pytest.mark.parametrize(("classes", "clusters"), [(4, 4), (3, 5), (5, 3)])
def test_cluster_accuracy_equals_brute_force(classes: int, clusters: int) -> None:
    rng = np.random.default_rng(classes)
    for _ in range(5):
        y = rng.integers(0, classes, 40)
        assignment = rng.integers(0, clusters, 40)
        size = max(classes, clusters)
        best = max(
            sum(permutation[a] == label for a, label in zip(assignment, y, strict=True))
            for permutation in itertools.permutations(range(size))
        )
        assert cluster_accuracy(y * 7 + 3, assignment) == pytest.approx(100 * best / 40)


def test_check_features_names_the_fault(tmp_path: Path) -> None:
    good = np.ones((4, 3), dtype=np.float32)
    check_features(good, "train", np.arange(4))
    for bad in (np.nan, np.inf, -np.inf):
        x = good.copy()
        x[2, 1] = bad
        with pytest.raises(DataError, match="train: features of image 2 "):
            check_features(x, "train")
    with pytest.raises(DataError, match=r"4 rows of features, but labels of shape \(3,\)"):
        check_features(good, "train", np.arange(3))
    with pytest.raises(DataError, match=r"shape \(4,\)"):
        check_features(good[:, 0], "train")
    with pytest.raises(DataError, match=r"shape \(0, 3\)"):
        check_features(good[:0], "train")
    with pytest.raises(DataError, match=r"labels of .* type float64"):
        check_features(good, "train", np.linspace(0, 1, 4))
    with pytest.raises(DataError, match="type <U"):
        check_features(good.astype(str), "train")


def test_row_blocks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.arange(40).reshape(10, 4)
    for elements, rows in ((12, 3), (1, 1)):
        monkeypatch.setattr("mimref.evaluation.metrics.BLOCK_ELEMENTS", elements)
        blocks = [x[block] for block in row_blocks(x)]
        assert len(blocks[0]) == rows and np.array_equal(np.concatenate(blocks), x)


def test_unit_rows_standardise_then_normalise() -> None:
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    x[2] = 0
    mean, std = np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.5, 2.0])
    expected = (x.astype(np.float64) - mean) / std
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(unit_rows(x, mean, std), expected, atol=1e-7)
    assert not unit_rows(x)[2].any()


def test_spread_and_main_rows() -> None:
    assert spread([1.0, 3.0]) == (2.0, pytest.approx(np.sqrt(2)))
    assert spread([5.0]) == (5.0, 0.0)
    main = [{"metric": "a", "splits": 2}, {"metric": "b", "classes": 3}]
    assert main_rows([{"metric": "a", mark: 0} for mark in ("split", "classifier", "class")] + main) == main


def test_half_precision_and_joined_parts_are_read_as_one_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimref.evaluation.metrics.BLOCK_ELEMENTS", 10)
    x = (300 * np.random.default_rng(0).normal(size=(50, 5))).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    # The squares of such values overflow in half precision.
    expected = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    for matrix in (mapped, SideBySide([mapped[:, :2], x[:, 2:].astype(np.float32)])):
        check_features(matrix, "train", np.arange(50))
        np.testing.assert_allclose(unit_rows(matrix), expected, atol=1e-7)
    x[37, 4] = np.inf
    with pytest.raises(DataError, match="features of image 37 "):
        check_features(SideBySide([mapped, x]), "train")


def test_cluster_accuracy_equals_clustpy() -> None:
    clustpy = pytest.importorskip("clustpy.metrics.external", exc_type=ImportError)
    rng = np.random.default_rng(0)
    for classes, clusters in ((10, 10), (7, 12), (12, 7)):
        y, assignment = rng.integers(0, classes, 500), rng.integers(0, clusters, 500)
        expected = 100 * clustpy.unsupervised_clustering_accuracy(y, assignment)
        assert cluster_accuracy(y, assignment) == pytest.approx(expected)
