"""Collection, model by model, of the images that a report shows, while an evaluation holds their features in memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mimref.data.labels import Indices, fixed_choice
from mimref.data.sources import ImageSource, Subset
from mimref.encoders.backbones import TokenEncoder
from mimref.errors import DataError
from mimref.evaluation.cluster.kmeans import BestRun, distances, fit_kmeans, inertia
from mimref.evaluation.exhibits.contents import Cluster, Confusion, Exhibits
from mimref.evaluation.exhibits.galleries import (
    MOST_CLUSTERS,
    MOST_CONFUSIONS,
    choose_queries,
    confusions,
    describe_clusters,
    nearest,
)
from mimref.evaluation.exhibits.maps import MOST_IMAGES, map_rows
from mimref.evaluation.exhibits.numbering import Models, Shown, number_images
from mimref.evaluation.knn.protocol import find_neighbours, predict_labels
from mimref.evaluation.metrics import check_features, labelled, show_class, unit_rows, vary
from mimref.features.encode import Column, Features, PassSettings, extract
from mimref.features.matrix import Labels, Matrix
from mimref.progress import Listener, optional
from mimref.results import EvaluationResult

MOST_MODELS = 4
MOST_PREDICTED = 10_000
"""Most images whose classes k-NN predicts for the confusions."""
OWN_RUNS = 10
"""k-means runs if no evaluation has clustered the images."""


@dataclass(frozen=True)
class IllustratedResult(EvaluationResult):
    """Results of an evaluation, and images that illustrate them."""

    exhibits: Exhibits | None = None


@dataclass(frozen=True)
class Voting:
    """The k-NN of an evaluation: training features (N, D), labels (N,), number of neighbours, and temperature."""

    x: Matrix
    y: Labels
    k: int
    tau: float


Model = tuple[str, Column, Callable[[ImageSource], Features]]
"""A name, the column by which the model is shown, and a function that returns this column for images."""


def encoder_model(name: str, encoder: TokenEncoder, settings: PassSettings) -> Model:
    """Return a model that is shown by the CLS token of an encoder's last block, from passes of the encoder."""
    last = Column(encoder.depth, "cls")
    return name, last, lambda images: extract(encoder, images, settings, [last])


@dataclass
class Exhibition:
    """Collects the content of `exhibits.json`. A failure becomes a warning, and all of the content is left out.

    source: the images. settings: those of the passes that computed the features. what: the images' name in the notes.
    """

    source: ImageSource
    settings: PassSettings
    seed: int
    listener: Listener
    what: str = "validation images"
    _models: Models | None = None
    _left_out: list[str] = field(default_factory=list)
    _notes: dict[str, None] = field(default_factory=dict)
    _failed: bool = False

    @classmethod
    def of_some(
        cls, source: ImageSource, settings: PassSettings, seed: int, listener: Listener, what: str
    ) -> "Exhibition":
        """Create an exhibition of a fixed choice of images, as many as a map shows."""
        rows = fixed_choice(len(source), source.labels, most=MOST_IMAGES)
        return cls(Subset(source, rows), settings, seed, listener, what)

    def add(
        self,
        name: str,
        images: Features,
        columns: Sequence[Column],
        *,
        voting: Voting | None = None,
        best: BestRun | None = None,
        chosen: Indices | None = None,
    ) -> None:
        """Add a model, shown by its features of the images.

        chosen: rows of `images` that are shown; None: all. voting: k-NN that predicts the classes of labelled images.
        best: k-means run on these rows; None: the best of ten runs on the images of the map.
        """
        if self._failed:
            return
        if self._models is not None and len(self._models.shown) == MOST_MODELS:
            self._left_out.append(name)
            return
        with self._guarded():
            rows = np.arange(len(images)) if chosen is None else chosen
            x = images.matrix(columns) if chosen is None else images.matrix(columns)[rows]
            check_features(x, "features")
            y = None if images.y is None else images.y[rows]
            models = self._of_images(images.indices[rows], y, images.class_names)
            models.shown[name] = self._show(models, x, voting, best)

    def add_passes(
        self, models: Iterable[Model], train: ImageSource | None = None, *, k: int = 10, tau: float = 0.07
    ) -> None:
        """Add models, each by its own pass over the images. train: labelled images that vote on the classes."""
        with self._guarded():
            for name, column, features in models:
                if not self._failed:
                    voting = None if train is None else Voting(*labelled(features(train), [column]), k, tau)
                    self.add(name, features(self.source), [column], voting=voting)

    def made(self) -> Exhibits | None:
        """Return everything that was added, with its images; None if something failed or nothing was added."""
        found = None
        if self._models is not None and not self._failed:
            if self._left_out:
                self._note(f"At most {MOST_MODELS} models are shown; these are left out: {', '.join(self._left_out)}.")
            with self._guarded():
                found = number_images(self._models, self.source, self.settings, self.seed, self.listener, self._notes)
        return found

    def save(self, folder: Path) -> None:
        """Write the exhibits into `folder`, if any were made."""
        if (made := self.made()) is not None:
            with self._guarded():
                made.write(folder)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn a failure into a warning, and discard what has been collected."""
        done = False
        with optional("no images for the report", self.listener):
            yield
            done = True
        self._failed = self._failed or not done

    def _note(self, line: str) -> None:
        """Add a note once, whatever the number of models."""
        self._notes[line] = None

    def _of_images(self, positions: Indices, y: Labels | None, class_names: list[str] | None) -> Models:
        """Return the models of these images, which must be the same images for every model."""
        if self._models is None:
            rows, queries = map_rows(len(positions), y), choose_queries(len(positions), y, self.seed)
            self._models = Models(positions, y, lambda label: show_class(label, class_names), rows, queries)
            some = "in equal shares per class" if y is not None else "evenly spread"
            if isinstance(source := self.source, Subset) and len(source) < len(source.source):
                self._note(f"Shown are {len(source)} of the {len(source.source)} {self.what}, {some}.")
            if 0 < len(rows) < len(positions):
                self._note(f"The maps show {len(rows)} of the {len(positions)} {self.what}, {some}.")
        elif not np.array_equal(self._models.positions, positions):
            raise DataError(f"{self.source.name}: the encoders have not read the same images; run again")
        return self._models

    def _show(self, models: Models, x: Matrix, voting: Voting | None, best: BestRun | None) -> Shown:
        map_x = x[models.map_rows].astype(np.float32)
        neighbours = nearest(x, models.queries, device=str(self.settings.device))
        wrong = [] if voting is None or models.y is None else self._confusions(models, x, models.y, voting)
        clusters = self._own_clusters(models, map_x) if best is None else self._clusters(models, best)
        return Shown(map_x, neighbours, wrong, clusters)

    def _confusions(self, models: Models, x: Matrix, y: Labels, voting: Voting) -> list[Confusion]:
        if not vary(voting.x):
            self._note("Confusions are not shown, because the features do not vary.")
            return []
        rows = fixed_choice(len(x), y, most=MOST_PREDICTED)
        k = min(voting.k, len(voting.y))
        some = f"{len(rows)} of the {len(x)} {self.what}" if len(rows) < len(x) else f"the {len(x)} {self.what}"
        self._note(f"Confusions: k-NN with k = {k} and tau = {voting.tau:g} on {some}.")
        neighbours = find_neighbours(voting.x, x[rows], k=k, device=str(self.settings.device))
        found = confusions(y[rows], predict_labels(neighbours, voting.y, tau=voting.tau), rows, models.name)
        if len(found) > MOST_CONFUSIONS:
            self._note(f"The {MOST_CONFUSIONS} confusions with the largest shares are shown.")
        return found[:MOST_CONFUSIONS]

    def _clusters(self, models: Models, best: BestRun) -> list[Cluster]:
        """Return the clusters of the evaluation's own best run."""
        self._note(f"Clusters: the best of {best.runs} k-means runs on the {len(best.points)} {self.what}.")
        found = describe_clusters(best.fit[0], best.distances, models.y, models.name)
        if len(found) > MOST_CLUSTERS:
            self._note(f"The {MOST_CLUSTERS} largest clusters are shown.")
        return found[:MOST_CLUSTERS]

    def _own_clusters(self, models: Models, map_x: NDArray[np.float32]) -> list[Cluster]:
        """Return the clusters of the best of ten runs on the images of the map; none for too few images."""
        rows, points = models.map_rows, unit_rows(map_x)
        y = None if models.y is None else models.y[rows]
        wanted = round(np.sqrt(len(rows) / 2)) if y is None else len(np.unique(y))
        clusters = min(max(2, wanted), MOST_CLUSTERS)
        if len(rows) <= clusters:
            self._note("No clusters: there are too few images.")
            return []
        runs = [fit_kmeans(points, clusters, number, self.seed) for number in range(OWN_RUNS)]
        assigned, centres = min(runs, key=lambda run: inertia(points, *run))
        self._note(f"Clusters: the best of {OWN_RUNS} k-means runs on the {len(rows)} images of the maps.")
        found = describe_clusters(assigned, distances(points, assigned, centres), y, models.name)
        return [
            replace(each, central=rows[each.central].tolist(), outlying=rows[each.outlying].tolist()) for each in found
        ]
