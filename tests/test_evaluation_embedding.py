"""UMAP on unit rows: determined by the seed, and silent."""

import sys
import threading
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mimref.errors import DataError
from mimref.evaluation.cluster.embedding import umap_embedding


class StandIn:
    """Stand-in for umap-learn's class, without compilation: returns the first two columns and warns as UMAP does."""

    def __init__(self, made: list[dict[str, Any]], options: dict[str, Any]) -> None:
        made.append(options)

    def fit_transform(self, x: np.ndarray) -> np.ndarray:
        # numba changes the number of threads of the thread that calls it.
        assert threading.current_thread() is not threading.main_thread()
        assert x.dtype == np.float32
        warnings.warn("n_jobs value 1 overridden to 1 by setting random_state", stacklevel=1)
        return x[:, :2].astype(np.float64)


def test_umap_gets_directions_and_the_seed_in_a_thread_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=lambda **options: StandIn(made, options)))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 8)).astype(np.float32)
    wide = x.astype(np.float64)
    expected = (wide / np.linalg.norm(wide, axis=1, keepdims=True))[:, :2]
    # Scaling by powers of two does not round: lengths do not matter.
    lengths = 2.0 ** rng.integers(-3, 3, (20, 1))
    first, second = umap_embedding(x, seed=1), umap_embedding((x * lengths).astype(np.float16), seed=2**32 + 2)
    assert first.dtype == second.dtype == np.float32
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(second, expected, rtol=0, atol=1e-3)
    assert np.array_equal(umap_embedding((x * lengths).astype(np.float32), seed=1), first)
    assert made == [{"n_neighbors": 15, "random_state": seed, "n_jobs": 1} for seed in (1, 2, 1)]
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow  # most of the time is spent on compiling umap-learn
def test_embedding_is_a_function_of_directions_and_seed(capfd: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 8))[np.arange(60) % 3] + 0.1 * rng.normal(size=(60, 8))).astype(np.float32)
    first = umap_embedding(x, seed=1)
    assert first.shape == (60, 2)
    assert first.dtype == np.float32
    # Scaling by powers of two does not round: lengths do not matter.
    lengths = 2.0 ** rng.integers(-3, 3, (60, 1))
    assert np.array_equal(umap_embedding((x * lengths).astype(np.float32), seed=1), first)
    assert not np.array_equal(umap_embedding(x, seed=2), first)
    # Groups stay together.
    centres = np.stack([first[start::3].mean(axis=0) for start in range(3)])
    nearest = np.linalg.norm(first[:, None] - centres, axis=2).argmin(axis=1)
    assert np.array_equal(nearest, np.arange(60) % 3)
    # The minimum number of images, and identical images.
    assert np.isfinite(umap_embedding(x[:16], seed=0)).all()
    assert np.isfinite(umap_embedding(np.ones((20, 4), dtype=np.float16), seed=0)).all()
    assert capfd.readouterr() == ("", "")
    assert torch.get_num_threads() == threads


def test_refuses_too_few_images_and_bad_features() -> None:
    with pytest.raises(DataError, match="UMAP of 15 images: 15 neighbours need more than 15 images"):
        umap_embedding(np.ones((15, 4), dtype=np.float32), seed=0)
    x = np.ones((20, 4), dtype=np.float32)
    x[3] = np.nan
    with pytest.raises(DataError, match="features of image 3 "):
        umap_embedding(x, seed=0)
