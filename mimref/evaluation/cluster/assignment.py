"""Assignment of images to clusters, with their distances from the centres."""

import csv
from dataclasses import dataclass, field
from io import StringIO

import numpy as np
from numpy.typing import NDArray

from mimref.evaluation.cluster.kmeans import BestRun
from mimref.evaluation.exhibits.contents import Cluster, Thumbnail
from mimref.evaluation.exhibits.galleries import describe_clusters
from mimref.evaluation.exhibits.thumbnails import MOST_PICTURES, most_per_group, thumbnail
from mimref.features.collection import Part
from mimref.features.matrix import Labels


@dataclass(frozen=True)
class Assignment:
    """The clusters of N images, of the k-means run with the lowest inertia."""

    paths: list[str]
    class_names: list[str] | None
    """Class of every image; None without labels."""
    cluster: Labels
    """(N,) numbers from 0; a cluster without images has no number here."""
    distance: NDArray[np.float64]
    """(N,) distance of each unit vector from its cluster's centre: 0 to 2."""
    clusters: list[Cluster] = field(default_factory=list)
    """Largest first; their images are positions in `paths`."""
    pictures: dict[int, Thumbnail] = field(default_factory=dict)
    """If requested: central and outlying images of the first clusters, by position."""

    def rank(self) -> Labels:
        """Return ranks (N,): 1 for the image nearest to its cluster's centre, and so on."""
        order = np.lexsort((self.distance, self.cluster))
        grouped = self.cluster[order]
        start = np.searchsorted(grouped, grouped)
        ranks = np.empty(len(order), dtype=np.int64)
        ranks[order] = np.arange(len(order)) - start + 1
        return ranks

    def table(self) -> bytes:
        """Return a CSV, one line per image, in data order: path, cluster, distance, rank and, with labels, class."""
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "cluster", "distance", "rank", *(["class"] if self.class_names else [])])
        lines = zip(self.paths, self.cluster.tolist(), self.distance.tolist(), self.rank().tolist(), strict=True)
        for position, (path, cluster, distance, rank) in enumerate(lines):
            own = [self.class_names[position]] if self.class_names else []
            writer.writerow([path, cluster, f"{distance:.6f}", rank, *own])
        return text.getvalue().encode()


def assign(run: BestRun, images: Part, rows: Labels, *, pictures: bool) -> Assignment:
    """Return the clusters of a run, whose points are these rows of the images. pictures: also make thumbnails."""
    (cluster, _), distance = run.fit, run.distances
    y, names = images.features.y, [images.class_name(int(row)) for row in rows]
    class_names = None if y is None else [str(name) for name in names]
    known = {} if y is None else {int(label): str(name) for label, name in zip(y[rows], names, strict=True)}
    labels = None if y is None else y[rows]
    clusters = describe_clusters(cluster, distance, labels, lambda label: known[label])
    shown = [[*each.central, *each.outlying] for each in clusters]
    shown = shown[: most_per_group(map(len, shown), MOST_PICTURES)] if pictures else []
    made = {
        position: thumbnail(images.source, int(images.features.indices[rows[position]]), names[position])
        for group in shown
        for position in group
    }
    paths = [images.path(int(row)) for row in rows]
    return Assignment(paths, class_names, cluster, distance, clusters, made)
