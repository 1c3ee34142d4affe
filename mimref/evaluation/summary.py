"""The before/after table: k-NN, low-shot and clustering of raw pixels, the base and the refined encoder."""

import numpy as np
import torch

from mimref.config.base import DataConfig
from mimref.config.run import EvaluateConfig
from mimref.data.open import open_source
from mimref.data.sources import ImageSource
from mimref.data.transforms import EvalTransform
from mimref.encoders.vit import Encoder
from mimref.errors import DataError
from mimref.evaluation.cluster.protocol import cluster
from mimref.evaluation.knn.protocol import knn
from mimref.evaluation.lowshot.protocol import lowshot
from mimref.evaluation.metrics import check_classes, class_indices
from mimref.features.encode import Features, extract, raw_pixels
from mimref.progress import LabelledProgress
from mimref.results import Row, main_rows


class Summary:
    """Evaluates models on the same images: raw outputs of the last block, CLS token (Appendix C.4, C.5, C.12).

    Raises DataError when the images have no labels or no validation split, or classes are missing among them.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        data: DataConfig,
        transform: EvalTransform,
        *,
        seed: int,
        workers: int,
        device: torch.device,
        precision: torch.dtype,
        progress: LabelledProgress,
    ) -> None:
        self.config, self.transform, self.seed, self.progress = config, transform, seed, progress
        self.train = open_source(data, "train", need_labels=True)
        self.test = open_source(data, "val", need_labels=True)
        assert self.train.labels is not None and self.test.labels is not None
        class_indices(check_classes(self.train.labels, "train"), self.test.labels, "test")
        self.workers, self.max_bad = workers, data.max_bad
        self.bad: list[tuple[str, str]] = []
        """Path and reason of images that were left out, once for every model."""
        self.device, self.precision = device, precision

    def raw_pixels(self) -> list[Row]:
        """Rows of the pixels themselves."""
        train, test = (
            raw_pixels(source, self.transform, workers=self.workers, max_bad=self.max_bad)
            for source in (self.train, self.test)
        )
        return self._rows("raw pixels", train, test)

    def encoder(self, model: str, encoder: Encoder) -> list[Row]:
        """Rows of an encoder, named `model` in the results."""
        train, test = (self._features(model, encoder, source) for source in (self.train, self.test))
        return [{**row, "blocks": "last", "pool": "cls"} for row in self._rows(model, train, test)]

    def _features(self, model: str, encoder: Encoder, source: ImageSource) -> Features:
        return extract(
            encoder,
            source,
            self.transform,
            blocks=[encoder.depth],
            device=self.device,
            precision=self.precision,
            workers=self.workers,
            max_bad=self.max_bad,
            progress=lambda done, total: self.progress(f"features of {model}", done, total),
        )

    def _rows(self, model: str, train: Features, test: Features) -> list[Row]:
        config = self.config
        if train.y is None or test.y is None:
            raise DataError("labels are needed to evaluate features")
        self.bad += train.bad + test.bad
        train_x, test_x = train.x[:, 0], test.x[:, 0]
        k = min(config.knn_k, len(train_x))
        rows = knn(train_x, train.y, test_x, test.y, k=(k,), tau=(config.knn_tau,), device=str(self.device))
        drawn = lowshot(
            train_x,
            train.y,
            test_x,
            test.y,
            shots=(config.shots,),
            splits=config.splits,
            seed=self.seed,
            progress=lambda done, total: self.progress(f"low-shot of {model}", done, total),
        )
        rows += main_rows(drawn)
        rows += cluster(
            test_x,
            test.y,
            metrics=("acc", "nmi"),
            runs=config.cluster_runs,
            seed=self.seed,
            progress=lambda done, total: self.progress(f"k-means of {model}", done, total),
        )
        return [{"model": model, **row} for row in rows]


def compared(rows: list[Row], metric: str, model: str) -> float:
    """The value of one metric of one model, NaN when it is not among the rows."""
    return next((float(row["value"]) for row in rows if row["metric"] == metric and row["model"] == model), np.nan)
