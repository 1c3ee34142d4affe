"""Classification of the images of a data set with a fine-tuned encoder.

Shapes: B images, C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimref.data.decode import none_readable
from mimref.data.labels import Indices
from mimref.data.sources import ImageSource
from mimref.distributed.collectives import gather_lists, total_over_ranks
from mimref.distributed.group import own_rank, world_size
from mimref.encoders.classifier import Classifier
from mimref.features.encode import Column, PassSettings, encode_columns
from mimref.progress import Progress


class LogitBatch(NamedTuple):
    """Logits of consecutive images in a data set."""

    end: int
    """Position in the data set after the last image of the batch."""
    indices: list[int]
    """Positions in the data set of the images that could be read."""
    logits_BC: Tensor
    """Their logits, float32 on the CPU."""
    bad: list[tuple[str, str]]
    """Path and reason of every image that could not be read."""


@torch.inference_mode()
def classify(
    classifier: Classifier, source: ImageSource, settings: PassSettings, start: int = 0, every: int = 1
) -> Iterator[LogitBatch]:
    """Yield the logits of all images from position `start` on, from one pass of the encoder in evaluation mode.

    every: classify every n-th batch only; other processes classify the others. Raises DataError if too many images are
    unreadable.
    """
    column = Column(classifier.encoder.depth, classifier.pool, classifier.final_norm)
    for batch in encode_columns(classifier.encoder, source, settings, [column], start, every):
        logits_BC = torch.empty(0, classifier.num_classes)
        if batch.columns:
            pooled_BD = torch.from_numpy(batch.columns[0]).to(settings.device)
            logits_BC = classifier.logits(pooled_BD).cpu()
        yield LogitBatch(batch.end, batch.indices, logits_BC, batch.bad)


@dataclass(frozen=True)
class Scores:
    """Accuracy of a classification."""

    top1: float
    """Top-1 accuracy in percent."""
    top5: float | None
    """Top-5 accuracy in percent; None for up to five classes."""
    images: int
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason of every image left out."""


def accuracy(
    classifier: Classifier,
    source: ImageSource,
    labels: Indices,
    settings: PassSettings,
    progress: Progress | None = None,
    among: Indices | None = None,
) -> Scores:
    """Return the accuracy on labelled images. The ranks share the images, and all of them get the result.

    labels: (N,) class numbers. among: the only classes that compete; the labels are then positions in `among`. Raises
    DataError if none of the images can be read.
    """
    ranks, hits, images, bad = world_size(), np.zeros(2, dtype=np.int64), 0, list[tuple[str, str]]()
    competing = classifier.num_classes if among is None else len(among)
    for batch in classify(classifier, source, settings, own_rank() * settings.batch_size, ranks):
        truth_B1 = torch.from_numpy(labels[batch.indices])[:, None]
        logits_BC = batch.logits_BC if among is None else batch.logits_BC[:, among]
        ranked_BK = logits_BC.topk(min(5, competing)).indices
        right_BK = ranked_BK == truth_B1
        hits += [int(right_BK[:, 0].sum()), int(right_BK.sum())]
        images += len(batch.indices)
        bad += batch.bad
        if progress is not None:
            progress(batch.end, len(source))
    images, bad = total_over_ranks(images), gather_lists(bad)
    if not images:
        raise none_readable(source.name, bad)
    top1, top5 = (100.0 * total_over_ranks(int(count)) / images for count in hits)
    return Scores(top1, top5 if competing > 5 else None, images, bad)
