"""UMAP on unit rows: a function of the seed, and silent."""

import numpy as np
import pytest
import torch

from mimref.errors import DataError
from mimref.evaluation.cluster.embedding import umap_embedding


def test_embedding_is_a_function_of_directions_and_seed(capfd: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 8))[np.arange(60) % 3] + 0.1 * rng.normal(size=(60, 8))).astype(np.float32)
    first = umap_embedding(x, seed=1)
    assert first.shape == (60, 2)
    assert first.dtype == np.float32
    # Powers of two scale without rounding: lengths do not matter.
    lengths = 2.0 ** rng.integers(-3, 3, (60, 1))
    assert np.array_equal(umap_embedding((x * lengths).astype(np.float32), seed=1), first)
    assert not np.array_equal(umap_embedding(x, seed=2), first)
    # Groups stay together.
    centres = np.stack([first[start::3].mean(axis=0) for start in range(3)])
    nearest = np.linalg.norm(first[:, None] - centres, axis=2).argmin(axis=1)
    assert np.array_equal(nearest, np.arange(60) % 3)
    # The fewest images, and images that are all alike.
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
