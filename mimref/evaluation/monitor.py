"""A cheap check of an encoder during training: k-NN and feature statistics on a fixed subset (Appendix E)."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from mimref.config.run import RunConfig
from mimref.data.open import open_source
from mimref.data.sources import ImageSource, NoSplitError, fixed_subset
from mimref.data.transforms import EvalTransform
from mimref.distributed.collectives import gather_lists
from mimref.encoders.vit import Encoder
from mimref.errors import DataError
from mimref.evaluation.blocks.statistics import feature_statistics
from mimref.evaluation.knn.protocol import knn_accuracy
from mimref.evaluation.metrics import check_features
from mimref.features.encode import Column, Features, PassSettings, extract
from mimref.features.matrix import Labels, Matrix


def _validation(config: RunConfig, train: ImageSource, note: Callable[[str], None]) -> ImageSource | None:
    """The validation images if they can be used for k-NN, else None, with a note of the reason.

    Images without labels or without splits need no note. In a process group, whose ranks share the search, all must see
    the same number of images.
    """
    val, problem = None, ""
    if train.labels is not None:
        try:
            val = open_source(config.data, "val")
        except NoSplitError:
            pass
        except DataError as error:
            problem = str(error)
        else:
            for notice in val.notices:
                if notice not in train.notices:
                    note(notice)
    if val is not None and val.labels is None:
        # Without splits, the validation images are the training images.
        problem = "" if val.path(0) == train.path(0) else "the validation images have no labels"
        val = None
    counts = set(gather_lists([0 if val is None else len(val)]))
    if len(counts) > 1:
        val, problem = None, problem or f"processes see {sorted(counts)} of them"
    if problem:
        note(f"no k-NN on the validation images: {problem}")
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
        note: Callable[[str], None],
    ) -> None:
        self.settings = PassSettings(transform, device, precision, workers=config.workers, max_bad=config.data.max_bad)
        self.k = config.evaluate.knn_k
        self.train = fixed_subset(train, config.monitor.knn_samples)
        self.val = _validation(config, train, note)
        """All validation images, if they can be used for k-NN."""
        self.test = None if self.val is None else fixed_subset(self.val, -(-config.monitor.knn_samples // 4))

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
        assert train_y is not None and test_y is not None  # `features` gives test features only with labels
        known = np.flatnonzero(np.isin(test_y, train_y))
        if not len(known) or len(np.unique(train_y)) < 2:
            return math.nan
        return knn_accuracy(train_x, train_y, test_x[known], test_y[known], k=min(self.k, len(train_y)))


# Healthy refinement changes both far less; a collapsed encoder has a variance near 0 and a k-NN near chance.
COLLAPSED_SHARES = {"knn_top1": 0.8, "feature_variance": 0.1}


class CollapseWatch:
    """Compares an encoder in training with its start."""

    def __init__(self, start: dict[str, float]) -> None:
        self.start = start

    def warning(self, now: dict[str, float]) -> str | None:
        """One line with advice when k-NN or feature variance have fallen sharply, else None."""
        fallen = [
            f"{name} fell from {self.start[name]:.3g} to {now[name]:.3g}"
            for name, share in COLLAPSED_SHARES.items()
            if name in self.start and name in now and now[name] < share * self.start[name]
        ]
        if not fallen:
            return None
        return (
            f"features collapse: {' and '.join(fallen)}; lower encoder_stage.lr or encoder_stage.layer_decay, raise "
            "heads.temperature, or train the heads longer first (heads_stage.epochs)"
        )
