"""Features in two dimensions, for figures (Fig. 5, Appendix C.12)."""

import warnings

import numpy as np
from numpy.typing import NDArray

from mimref.errors import DataError
from mimref.evaluation.metrics import check_features, unit_rows
from mimref.features.matrix import Matrix


def umap_embedding(x: Matrix, *, seed: int, neighbors: int = 15) -> NDArray[np.float32]:
    """UMAP of features x (N, D), scaled to unit length here, with the defaults of umap-learn. Returns (N, 2).

    A function of the features and the seed, on one machine; a fixed seed means a single thread. Importing umap-learn
    and compiling its code takes some 10 s.
    Raises DataError for features that cannot be used, and for no more images than `neighbors`.
    """
    check_features(x, "features")
    if len(x) <= neighbors:
        raise DataError(f"UMAP of {len(x)} images: {neighbors} neighbours need more than {neighbors} images; add some")
    with warnings.catch_warnings():
        # Of numba while it compiles; of one thread for a fixed seed; of identical images, which have no graph.
        warnings.simplefilter("ignore")
        from umap import UMAP

        model = UMAP(n_neighbors=neighbors, random_state=seed, n_jobs=1)
        return np.asarray(model.fit_transform(unit_rows(x)), dtype=np.float32)
