"""Embedding of features in two dimensions, for figures (Fig. 5, Appendix C.12)."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from mimref.errors import DataError
from mimref.evaluation.metrics import check_features, unit_rows
from mimref.features.matrix import Matrix
from mimref.files import ensure_caches

# umap-learn's default.
NEIGHBORS = 15


def check_count(images: int) -> None:
    """Raise DataError if there are too few images for UMAP."""
    if images <= NEIGHBORS:
        raise DataError(
            f"UMAP of {images} images: {NEIGHBORS} neighbours need more than {NEIGHBORS} images; add some, or leave "
            "--umap out"
        )


def umap_embedding(x: Matrix, *, seed: int) -> NDArray[np.float32]:
    """Embed features x (N, D), scaled to unit length here, by UMAP with the defaults of umap-learn. Returns (N, 2).

    On one machine, the result depends only on features and seed; UMAP runs in a single thread. Importing umap-learn and
    compiling its code takes about 10 s.
    Raises DataError for features that cannot be used, and for too few images.
    """
    check_features(x, "features")
    check_count(len(x))
    # In its own thread: numba sets the number of OpenMP threads of the thread that calls it. Torch would share this
    # number, which decides how its products are rounded.
    with warnings.catch_warnings(), ThreadPoolExecutor(1) as pool:
        # These are about numba's compilation, one thread for a fixed seed, and identical images, which have no graph.
        warnings.simplefilter("ignore")
        return pool.submit(_fit, unit_rows(x), seed).result()


def _fit(x: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    ensure_caches()  # numba writes compiled code to one
    from umap import UMAP

    seed %= 2**32  # NumPy's RandomState takes 32 bits
    return np.asarray(UMAP(n_neighbors=NEIGHBORS, random_state=seed, n_jobs=1).fit_transform(x), dtype=np.float32)
