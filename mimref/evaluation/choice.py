"""Scores that choose among averages of two encoders, on other images than those the choice is later judged on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mimref.data.labels import stratified_split
from mimref.data.sources import ImageSource, Split, Subset
from mimref.errors import DataError
from mimref.evaluation.assess.config import AssessConfig
from mimref.evaluation.assess.measures import DEFAULT, goodness
from mimref.evaluation.assess.protocol import assess
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.protocol import evaluate_knn
from mimref.progress import Listener
from mimref.results import EvaluationResult, Row

HELD_OUT = 0.2
"""Share of each class's training images that is held out to choose by k-NN accuracy."""


def check_held_out(source: ImageSource) -> None:
    """Raise DataError, before an encoder runs, if no part with every class can be held out."""
    assert source.labels is not None
    counts = np.unique(source.labels, return_counts=True)[1]
    held = int(np.ceil(HELD_OUT * len(source)))
    if counts.min() < 2 or held < len(counts):
        raise DataError(
            f"--choose knn: {source.name} has {len(source)} training images, and its smallest class has "
            f"{counts.min()}; a fifth with every class cannot be held out; use --choose assess"
        )


def by_knn(file: Path, common: dict[str, Any], train: ImageSource, listener: Listener) -> EvaluationResult:
    """Return one row: an encoder's k-NN accuracy on a fixed fifth of the training images, with the rest as neighbours.

    common: settings of the encoder pass. The row has no model name; its `images` states which images it is measured on.
    """
    assert train.labels is not None
    kept, held = stratified_split(train.labels, held_out=HELD_OUT)
    config = KnnConfig(**common, checkpoint=str(file), k=[min(KnnConfig().k[0], len(kept))])
    sources: dict[Split, ImageSource] = {"train": Subset(train, kept), "val": Subset(train, held)}
    return _shown(evaluate_knn(config, listener=listener, sources=sources), "knn_top1", "held out")


def by_measure(file: Path, common: dict[str, Any], listener: Listener) -> EvaluationResult:
    """Return one row, as `by_knn` does: the measure by which `mimref assess` ranks encoders, on training images."""
    found = assess(AssessConfig(**common, checkpoints=[str(file)]), listener=listener)
    return _shown(found, DEFAULT, "training")


def best(rows: Sequence[Row]) -> int:
    """Return the position of the best row, the first of equal ones. Raises DataError if none has a value."""
    scores = [goodness(str(row["metric"]), float(row["value"])) for row in rows]
    if not np.isfinite(max(scores)):
        raise DataError(f"no average can be chosen: {rows[0]['metric']} has no value, since the features do not vary")
    return int(np.argmax(scores))


def _shown(found: EvaluationResult, metric: str, images: str) -> EvaluationResult:
    """Return a metric's only row with `images`, but without the model's name, which is that of a temporary file."""
    (row,) = (row for row in found.rows if row["metric"] == metric)
    row = {key: value for key, value in row.items() if key not in ("model", "images")} | {"images": images}
    return EvaluationResult([row], found.elapsed_s, found.bad_images)
