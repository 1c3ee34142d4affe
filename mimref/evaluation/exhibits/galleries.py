"""Choice of the images that a report shows side by side: neighbours of queries, confused classes, cluster members.

Images are rows of the features here; they are numbered once it is known which ones are shown.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mimref.data.labels import Indices
from mimref.evaluation.exhibits.contents import Cluster, Confusion
from mimref.evaluation.knn.protocol import find_neighbours
from mimref.features.matrix import Labels, Matrix

QUERIES = 12
NEIGHBOURS = 12
EXAMPLES = 6
CONFUSIONS_PER_CLASS = 2
MOST_CONFUSIONS = 20
"""Largest number shown for one model."""
MOST_CLUSTERS = 20
"""Largest number shown for one model."""


def choose_queries(images: int, y: Labels | None, seed: int) -> Indices:
    """Draw the rows of up to twelve images: one of each class in turn, for as many turns as needed."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(images)
    if y is None:
        return order[:QUERIES]
    classes = generator.permutation(np.unique(y))[:QUERIES]
    members = {label: iter(order[y[order] == label].tolist()) for label in classes}
    turns = [row for _ in range(QUERIES) for label in classes if (row := next(members[label], None)) is not None]
    return np.array(turns[:QUERIES], dtype=np.int64)


def nearest(x: Matrix, queries: Indices, *, device: str = "cpu") -> list[list[int]]:
    """Return, for every query (a row of x, (N, D)), the rows nearest by cosine, nearest first, without itself."""
    if not len(queries):
        return []
    most = min(NEIGHBOURS + 1, len(x))
    found = find_neighbours(x, x[queries], k=most, standardize=False, device=device).train_index.tolist()
    return [
        [row for row in rows if row != query][:NEIGHBOURS] for query, rows in zip(queries.tolist(), found, strict=True)
    ]


def confusions(y: Labels, predicted: Labels, rows: Indices, name: Callable[[int], str]) -> list[Confusion]:
    """Return the most frequent wrong predictions of every class, largest share of the class first.

    y, predicted (M,): true and predicted labels; `name` returns a label's name. rows (M,): those of the images.
    """
    found: list[Confusion] = []
    for label in np.unique(y):
        wrong = np.unique(predicted[(y == label) & (predicted != label)], return_counts=True)
        total = int((y == label).sum())
        worst = np.argsort(-wrong[1], kind="stable")[:CONFUSIONS_PER_CLASS]
        for other, count in zip(wrong[0][worst].tolist(), wrong[1][worst].tolist(), strict=True):
            images = rows[(y == label) & (predicted == other)][:EXAMPLES].tolist()
            found.append(Confusion(name(int(label)), name(other), count, count / total, images))
    return sorted(found, key=lambda each: (-each.share, -each.count))


def describe_clusters(
    assigned: Labels, distances: NDArray[np.float64], y: Labels | None, name: Callable[[int], str]
) -> list[Cluster]:
    """Return the content of every cluster that has images, largest first.

    assigned (N,): the images' clusters. distances (N,): those from the centres. y (N,): labels or None; `name` returns
    a label's name. An image is central or outlying, not both.
    """
    found: list[Cluster] = []
    for number, size in zip(*np.unique(assigned, return_counts=True), strict=True):
        members = np.flatnonzero(assigned == number)
        members = members[np.argsort(distances[members], kind="stable")]
        label = purity = None
        if y is not None:
            classes, counts = np.unique(y[members], return_counts=True)
            label, purity = name(int(classes[counts.argmax()])), float(counts.max() / size)
        outlying = members[EXAMPLES:][::-1][:EXAMPLES]
        central = members[:EXAMPLES].tolist()
        found.append(Cluster(int(number), int(size), label, purity, central, outlying.tolist()))
    return sorted(found, key=lambda cluster: (-cluster.size, cluster.number))
