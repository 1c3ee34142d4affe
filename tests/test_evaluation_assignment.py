"""Clusters of images, their distances and pictures, against loops over a k-means run of scikit-learn."""

import numpy as np
import pytest
from sklearn.cluster import MiniBatchKMeans

from mimref.data.sources import ArraySource
from mimref.evaluation.cluster.assignment import assign
from mimref.evaluation.cluster.kmeans import BestRun
from mimref.evaluation.metrics import unit_rows
from mimref.features.collection import Part
from mimref.features.encode import Column, Features


def test_assignment_of_some_images() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 6)).astype(np.float32)
    y = np.arange(60) % 3
    source = ArraySource("toy", rng.integers(0, 256, (70, 8, 8), np.uint8), None, ["a", "b", "c"], "val", np.arange(70))
    # Ten images could not be read, and class b is left out.
    features = Features({Column(1, "cls"): x}, np.arange(10, 70), y, ["a", "b", "c"])
    rows = np.flatnonzero(y != 1)
    points = unit_rows(x[rows])
    found = assign(BestRun(points, 5, 2, 7, 3), Part("val", source, features), rows, pictures=True)
    state = int(np.random.SeedSequence([7, 2]).generate_state(1)[0])
    model = MiniBatchKMeans(n_clusters=5, n_init=1, random_state=state).fit(points)
    assert found.cluster.tolist() == model.labels_.tolist()
    centres = model.cluster_centers_.astype(np.float64)
    distances = [
        float(np.sqrt(sum((p - q) ** 2 for p, q in zip(point.astype(np.float64), centres[number], strict=True))))
        for point, number in zip(points, model.labels_, strict=True)
    ]
    assert found.distance == pytest.approx(distances, abs=1e-12)
    assert found.paths == [f"toy/val/{10 + row}" for row in rows]
    assert found.class_names == ["abc"[y[row]] for row in rows]
    for position, rank in enumerate(found.rank()):
        same = [d for d, number in zip(distances, model.labels_, strict=True) if number == model.labels_[position]]
        assert rank == sorted(same).index(distances[position]) + 1
    shown = {position for cluster in found.clusters for position in (*cluster.central, *cluster.outlying)}
    assert found.pictures.keys() == shown
    for position, picture in found.pictures.items():
        assert (picture.path, picture.label) == (found.paths[position], found.class_names[position])
