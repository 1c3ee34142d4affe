"""Which average of two encoders is best, by images that are not those it is judged on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mimref.data.labels import stratified_split
from mimref.data.sources import ImageSource, Subset
from mimref.errors import DataError
from mimref.evaluation.assess.config import AssessConfig
from mimref.evaluation.assess.measures import DEFAULT, goodness
from mimref.evaluation.assess.protocol import assess
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.protocol import evaluate_knn
from mimref.progress import Listener
from mimref.results import Row

HELD_OUT = 0.2
"""Share of every class's training images on which k-NN accuracy chooses."""


@dataclass(frozen=True)
class Choice:
    """One of several encoders."""

    number: int
    """Its place."""
    rows: list[Row]
    """Of every encoder in order: `metric`, `value` and the settings of the measure, with `images`, which these are."""
    bad: list[tuple[str, str]]
    """Path and reason of every image left out."""


def check_held_out(source: ImageSource) -> None:
    """Raise DataError for labels of which no part can be held out, before an encoder runs."""
    assert source.labels is not None
    counts = np.unique_counts(source.labels).counts
    held = int(np.ceil(HELD_OUT * len(source)))
    if counts.min() < 2 or held < len(counts):
        raise DataError(
            f"--choose knn: {source.name} has {len(source)} training images, of its smallest class {counts.min()}; no "
            "fifth with every class can be held out; use --choose assess"
        )


def choose_by_knn(files: Sequence[Path], common: dict[str, Any], train: ImageSource, listener: Listener) -> Choice:
    """The encoder with the best k-NN accuracy on a fixed fifth of the training images, the others being neighbours.

    files: one per encoder. common: settings of the encoder pass. Of equal ones the first.
    """
    assert train.labels is not None
    kept, held = stratified_split(train.labels, held_out=HELD_OUT)
    k, rows, bad = min(KnnConfig().k[0], len(kept)), list[Row](), list[tuple[str, str]]()
    for done, file in enumerate(files, 1):
        config = KnnConfig(**common, checkpoint=str(file), k=[k])
        found = evaluate_knn(
            config, listener=listener, sources={"train": Subset(train, kept), "val": Subset(train, held)}
        )
        rows += [_shown(row, "held out") for row in found.rows if row["metric"] == "knn_top1"]
        bad = found.bad_images  # the same for every encoder
        listener.progress("averages", done, len(files))
    return Choice(_best("knn_top1", rows), rows, bad)


def choose_by_measure(files: Sequence[Path], common: dict[str, Any], listener: Listener) -> Choice:
    """The encoder that `mimref assess` ranks first, by its default measure on training images. Of equal ones the
    first."""
    config = AssessConfig(**common, checkpoints=list(map(str, files)))
    found = assess(config, listener=listener)
    rows = [_shown(row, "training") for row in found.rows if row["metric"] == DEFAULT]
    return Choice(_best(DEFAULT, rows), rows, found.bad_images)


def _best(metric: str, rows: Sequence[Row]) -> int:
    scores = [goodness(metric, float(row["value"])) for row in rows]
    if not np.isfinite(max(scores)):
        raise DataError(f"no average can be chosen: {metric} has no value, since the features do not vary")
    return int(np.argmax(scores))


def _shown(row: Row, images: str) -> Row:
    """Without the model's name, which is that of a temporary file."""
    return {key: value for key, value in row.items() if key not in ("model", "images")} | {"images": images}
