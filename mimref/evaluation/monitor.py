"""A cheap check of an encoder during training: k-NN (Appendix E) and measures without labels on a fixed subset."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from mimref.config.run import RunConfig, ViewsConfig
from mimref.data.device_crops import decoding_device
from mimref.data.open import open_source
from mimref.data.sources import ImageSource, NoSplitError, fixed_subset
from mimref.data.transforms import EvalTransform
from mimref.distributed.collectives import gather_lists
from mimref.encoders.backbones import TokenEncoder
from mimref.errors import DataError
from mimref.evaluation.assess.measures import crop_measures, view_measures
from mimref.evaluation.blocks.statistics import feature_statistics
from mimref.evaluation.knn.protocol import knn_accuracy
from mimref.evaluation.metrics import check_features
from mimref.features.encode import Column, Features, PassSettings, encode_views, extract, gather
from mimref.features.matrix import Labels, Matrix


def _validation(config: RunConfig, train: ImageSource, note: Callable[[str], None]) -> ImageSource | None:
    """Return the validation images if they can be used for k-NN; otherwise note the reason and return None.

    Training images without labels and data without splits need no note. In a process group, whose ranks share the
    search, all ranks must see the same number of images.
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
        val, problem = None, problem or f"the processes see different numbers ({sorted(counts)}) of them"
    if problem:
        note(f"no k-NN on the validation images: {problem}")
    return val


class KnnMonitor:
    """Checks an encoder by features of its last block on a fixed subset of training and validation images.

    train: the training images of `config.data`. There is no k-NN without labels or a validation split, nor if the
    validation images cannot be opened, which `note` reports.
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
        views: ViewsConfig | None = None,
    ) -> None:
        """views: settings whose global views are compared; None: those of `config`."""
        data = config.data
        self.settings = PassSettings(
            *(transform, device, precision),
            workers=config.workers,
            max_bad=data.max_bad,
            decode_on=decoding_device(data, device),
        )
        self.k, self.tau = config.evaluate.knn_k, config.evaluate.knn_tau
        self.train = fixed_subset(train, config.monitor.knn_samples)
        self.val = _validation(config, train, note)
        """All validation images, if they can be used for k-NN."""
        self.views, self.view_samples, self.seed = views or config.views, config.monitor.view_samples, config.seed
        self.test = None if self.val is None else fixed_subset(self.val, -(-config.monitor.knn_samples // 4))

    @property
    def images_per_check(self) -> int:
        """Number of images that pass through the encoder in one check; two views of an image count twice."""
        return len(self.train) + (len(self.test) if self.test else 0) + 2 * min(self.view_samples, len(self.train))

    def check(self, encoder: TokenEncoder) -> dict[str, float]:
        """Return measures of the last block's raw output, leaving out values that are not finite.

        These are `feature_variance`; the measures without labels of `crop_measures` and, with `monitor.view_samples`,
        of `view_measures`; and, with labels, `knn_top1` in percent. Raises DataError if features are not finite.
        """
        last = Column(encoder.depth, "cls")
        train, test = self.features(encoder, [last])
        x = train.matrix([last])
        check_features(x, "features of the k-NN check")
        values = {
            "feature_variance": feature_statistics(x).variance,
            **crop_measures(x, device=self.settings.device.type),
        }
        if self.view_samples:
            values |= self.view_measures(encoder, [[last]], self.view_samples)[0]
        if test is not None:
            values["knn_top1"] = self.knn_top1(x, train.y, test.matrix([last]), test.y)
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def view_measures(
        self, encoder: TokenEncoder, groups: Sequence[Sequence[Column]], images: int
    ) -> list[dict[str, float]]:
        """Return the `view_measures` of each group of columns, from at most `images` training images."""
        source = fixed_subset(self.train, images)
        pairs = [[column._replace(view=view) for column in columns] for columns in groups for view in (0, 1)]
        columns = [column for pair in pairs for column in pair]
        batches = encode_views(encoder, source, self.settings, columns, self.views, self.seed)
        found = gather(batches, columns, len(source), source.name)
        matrices = [found.matrix(pair) for pair in pairs]
        for matrix in matrices:
            check_features(matrix, "features of two views")
        pairs_of_views = [matrices[at : at + 2] for at in range(0, len(matrices), 2)]
        return [view_measures(*pair, device=self.settings.device.type) for pair in pairs_of_views]

    def features(self, encoder: TokenEncoder, columns: Sequence[Column]) -> tuple[Features, Features | None]:
        """Return the features of the training subset and, if there are labels, of the validation subset."""
        train = extract(encoder, self.train, self.settings, columns)
        return train, None if self.test is None else extract(encoder, self.test, self.settings, columns)

    def knn_top1(self, train_x: Matrix, train_y: Labels | None, test_x: Matrix, test_y: Labels | None) -> float:
        """Return the k-NN accuracy in percent of features (N, D) from `features`; NaN with fewer than two classes.

        Validation images whose class is missing from the training subset (a rare one of many) are left out.
        """
        assert train_y is not None and test_y is not None  # `features` gives test features only with labels
        known = np.flatnonzero(np.isin(test_y, train_y))
        if not len(known) or len(np.unique(train_y)) < 2:
            return math.nan
        device, k = self.settings.device.type, min(self.k, len(train_y))
        return knn_accuracy(train_x, train_y, test_x[known], test_y[known], k=k, tau=self.tau, device=device)


# Shares of the starting values below which features count as collapsed. Healthy refinement stays far above: neighbours
# become more alike and ranks hardly fall, while a collapse divides both by a large factor. The variance of features is
# no sign of collapse, since their scale is arbitrary.
COLLAPSED_SHARES = {"knn_top1": 0.8, "correlation_rank": 0.5, "neighbour_consistency": 0.5}


class CollapseWatch:
    """Compares an encoder during training with its starting point."""

    def __init__(self, start: dict[str, float]) -> None:
        self.start = start

    def warning(self, now: dict[str, float]) -> str | None:
        """Return one line of advice if k-NN accuracy, feature rank or neighbour consistency has fallen sharply."""
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
