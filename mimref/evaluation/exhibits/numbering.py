"""Conversion of rows of features to numbered images: the last step before the file is written."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mimref.data.decode import printable
from mimref.data.labels import Indices
from mimref.data.sources import ImageSource
from mimref.evaluation.exhibits.contents import Cluster, Confusion, Exhibits, Query, Thumbnail
from mimref.evaluation.exhibits.maps import UMAP_IMAGES, arrange
from mimref.evaluation.exhibits.thumbnails import encode_within, read_crops
from mimref.features.encode import PassSettings
from mimref.features.matrix import Labels
from mimref.progress import Listener

MOST_BYTES = 3_000_000
"""Largest size of exhibits.json, so that a page with its images and a chart library stays below 5 MB."""
MOST_PATH_BYTES = 800_000
"""Largest size of all paths in the file; beyond it, long paths lose their beginning."""


@dataclass(frozen=True)
class Shown:
    """What is shown of one model; images are rows of its features."""

    map_x: NDArray[np.float32]
    """(M, D) features of the images on the map."""
    neighbours: list[list[int]]
    """Nearest images of every query."""
    confusions: list[Confusion]
    clusters: list[Cluster]


@dataclass(frozen=True)
class Models:
    """The N images that several models have in common, and what is shown of each model."""

    positions: Indices
    """(N,) positions in their source."""
    y: Labels | None
    """(N,) labels, if there are any."""
    name: Callable[[int], str]
    """Returns the name of a label."""
    map_rows: Indices
    """(M,) rows of the images on the maps."""
    queries: Indices
    """Rows of the queries."""
    shown: dict[str, Shown] = field(default_factory=dict)


class _Numbers:
    """Numbers rows in the order in which they are first requested."""

    def __init__(self) -> None:
        self._of_row: dict[int, int] = {}

    def of(self, rows: Iterable[int]) -> list[int]:
        return [self._of_row.setdefault(int(row), len(self._of_row)) for row in rows]

    @property
    def rows(self) -> Indices:
        """(images,) rows in order of their numbers."""
        return np.array(list(self._of_row), dtype=np.int64)


def number_images(
    models: Models, source: ImageSource, settings: PassSettings, seed: int, listener: Listener, notes: Iterable[str]
) -> Exhibits:
    """Return the exhibits of all models, with maps and thumbnails.

    Raises whatever UMAP raises, and DataError where reading images does.
    """
    numbers, shown = _Numbers(), models.shown
    map_images = numbers.of(models.map_rows)
    queries = [
        Query(numbers.of([row])[0], {name: numbers.of(each.neighbours[place]) for name, each in shown.items()})
        for place, row in enumerate(models.queries)
    ]
    confusions = {
        name: [replace(pair, images=numbers.of(pair.images)) for pair in each.confusions]
        for name, each in shown.items()
        if models.y is not None
    }
    clusters = {
        name: [
            replace(cluster, central=numbers.of(cluster.central), outlying=numbers.of(cluster.outlying))
            for cluster in each.clusters
        ]
        for name, each in shown.items()
    }
    steps = len(shown) + 1
    maps: dict[str, NDArray[np.float32]] = {}
    for done, (name, each) in enumerate(shown.items() if map_images else ()):
        listener.progress("images for the report", done, steps)
        maps[name] = arrange(each.map_x, seed=seed)
    how = f"principal components, as there are fewer than {UMAP_IMAGES} images for UMAP"
    if not map_images:
        how = "none, as there are too few images"
    elif len(map_images) >= UMAP_IMAGES:
        how = "UMAP of the features"
    all_notes = [f"Maps: {how}.", *notes]
    crops = read_crops(source, models.positions[numbers.rows], settings)
    if missing := sum(crop is None for crop in crops):
        all_notes.append(f"Gray squares: {missing} images could not be read a second time.")
    images = _named(models, source, numbers.rows, all_notes)
    without = Exhibits(images, map_images, maps, queries, confusions, clusters, all_notes)
    # Base64 turns three bytes into four, and rounds up.
    room = (MOST_BYTES - len(without.to_json())) * 3 // 4 - 3 * len(crops)
    jpegs = encode_within(crops, room)
    listener.progress("images for the report", steps, steps)
    return replace(without, images=[replace(each, jpeg=jpeg) for each, jpeg in zip(images, jpegs, strict=True)])


def _named(models: Models, source: ImageSource, rows: Indices, notes: list[str]) -> list[Thumbnail]:
    """Return thumbnails with the paths and labels of images, but without pixels."""
    paths = [printable(source.path(int(position))) for position in models.positions[rows]]
    for longest in (400, 200, 100, 50):
        if len(json.dumps(paths)) <= MOST_PATH_BYTES:
            break
        paths = [path if len(path) <= longest else f"...{path[3 - longest :]}" for path in paths]
        notes.append(f"Long paths are cut to their last {longest} characters.")
    labels = [None] * len(rows) if models.y is None else [models.name(int(label)) for label in models.y[rows]]
    return [Thumbnail(path, label, b"") for path, label in zip(paths, labels, strict=True)]
