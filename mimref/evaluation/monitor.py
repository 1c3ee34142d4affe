"""A cheap check of an encoder during training: k-NN and feature statistics on a fixed subset (Appendix E)."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from mimref.config.run import RunConfig
from mimref.data.labels import first_images
from mimref.data.open import open_source
from mimref.data.sources import ImageSource, NoSplitError, Subset
from mimref.data.transforms import EvalTransform
from mimref.distributed.collectives import gather_lists
from mimref.encoders.vit import Encoder
from mimref.errors import DataError
from mimref.evaluation.blocks.statistics import feature_statistics
from mimref.evaluation.knn.protocol import knn_accuracy
from mimref.evaluation.metrics import check_features
from mimref.features.encode import Column, Features, PassSettings, extract
from mimref.features.matrix import Labels, Matrix


def _subset(source: ImageSource, most: int) -> Subset:
    """A fixed choice of at most so many images: classes in turn; without labels, every n-th image."""
    if source.labels is None:
        return Subset(source, np.arange(0, len(source), max(1, -(-len(source) // most))))
    return Subset(source, first_images(len(source), source.labels, limit=min(most, len(source))))


def _validation(config: RunConfig, train: ImageSource, note: Callable[[str], None] | None) -> ImageSource | None:
    """The validation images if they can be used for k-NN, else None, with a note that says why.

    Images without labels or without splits need no note.
    """
    if train.labels is None:
        return None
    try:
        val = open_source(config.data, "val")
    except NoSplitError:
        return None
    except DataError as error:
        problem = str(error)
    else:
        if note is not None:
            for notice in val.notices:
                if notice not in train.notices:
                    note(notice)
        if val.labels is not None:
            return val
        # Without splits, the validation images are the training images.
        if val.path(0) == train.path(0):
            return None
        problem = "the validation images have no labels"
    if note is not None:
        note(f"no k-NN on the validation images: {problem}")
    return None


def _agreed(val: ImageSource | None, note: Callable[[str], None] | None) -> ImageSource | None:
    """The validation images if all ranks, which share the search, see the same number; else None on all ranks."""
    counts = set(gather_lists([0 if val is None else len(val)]))
    if len(counts) > 1:
        if note is not None:
            note(f"no k-NN on the validation images: processes see {sorted(counts)} of them")
        return None
    return val


class KnnMonitor:
    """Features of the last block on a fixed subset of training and validation images.

    train: the training images of `config.data`. Without labels or a validation split, only the feature statistics are
    measured; so too when the validation images cannot be opened, which `note` reports.
    """

    def __init__(
        self,
        config: RunConfig,
        train: ImageSource,
        transform: EvalTransform,
        device: torch.device,
        precision: torch.dtype,
        *,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.settings = PassSettings(transform, device, precision, workers=config.workers, max_bad=config.data.max_bad)
        self.k = config.evaluate.knn_k
        self.train = _subset(train, config.monitor.knn_samples)
        val = _agreed(_validation(config, train, note), note)
        self.test = None if val is None else _subset(val, -(-config.monitor.knn_samples // 4))

    def check(self, encoder: Encoder) -> dict[str, float]:
        """Feature statistics of the last block's raw output and, if there are labels, its `knn_top1` in percent.

        Raises DataError when features are not finite.
        """
        last = Column(encoder.depth, "cls")
        train, test = self.features(encoder, [last])
        x = train.matrix([last])
        check_features(x, "features of the k-NN check")
        statistics = feature_statistics(x)
        values = {"feature_variance": statistics.variance, "effective_rank": statistics.effective_rank}
        if test is not None:
            accuracy = self.knn_top1(x, train.y, test.matrix([last]), test.y)
            values |= {} if math.isnan(accuracy) else {"knn_top1": accuracy}
        return values

    def features(self, encoder: Encoder, columns: Sequence[Column]) -> tuple[Features, Features | None]:
        """Features of the training subset and, if there are labels, of the validation subset."""
        train = extract(encoder, self.train, self.settings, columns)
        return train, None if self.test is None else extract(encoder, self.test, self.settings, columns)

    def knn_top1(self, train_x: Matrix, train_y: Labels | None, test_x: Matrix, test_y: Labels | None) -> float:
        """k-NN accuracy in percent of features (N, D) from `features`; NaN with fewer than two classes.

        Validation images of classes that the training subset lacks (rare ones of many) are left out.
        """
        if train_y is None or test_y is None:
            raise DataError("labels are needed for k-NN")
        known = np.flatnonzero(np.isin(test_y, train_y))
        if not len(known) or len(np.unique(train_y)) < 2:
            return math.nan
        return knn_accuracy(train_x, train_y, test_x[known], test_y[known], k=min(self.k, len(train_y)))


class CollapseWatch:
    """Compares an encoder in training with its start."""

    # Healthy refinement changes both far less; a collapsed encoder has a variance near 0 and a k-NN near chance.
    KNN_SHARE = 0.8
    VARIANCE_SHARE = 0.1

    def __init__(self, start: dict[str, float]) -> None:
        self.start = start

    def warning(self, now: dict[str, float]) -> str | None:
        """One line with advice when k-NN or feature variance have fallen sharply, else None."""
        fallen = [
            f"{name} fell from {self.start[name]:.3g} to {now[name]:.3g}"
            for name, share in (("knn_top1", self.KNN_SHARE), ("feature_variance", self.VARIANCE_SHARE))
            if name in self.start and name in now and now[name] < share * self.start[name]
        ]
        if not fallen:
            return None
        return (
            f"features collapse: {' and '.join(fallen)}; lower encoder_stage.lr or encoder_stage.layer_decay, raise "
            "heads.temperature, or train the heads longer first (heads_stage.epochs)"
        )
