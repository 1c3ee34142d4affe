"""Classification of the images of a data set with a fine-tuned encoder.

Shapes: B images, C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mimref.data.decode import BadImages, none_readable
from mimref.data.labels import Indices
from mimref.data.sources import ImageSource
from mimref.distributed.collectives import gather_lists, total_over_ranks
from mimref.distributed.group import own_rank, world_size
from mimref.encoders.classifier import Classifier
from mimref.features.encode import Batch, Column, PassSettings, encode_columns
from mimref.progress import Progress


@torch.inference_mode()
def classify(
    classifier: Classifier, source: ImageSource, settings: PassSettings, start: int = 0, every: int = 1
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches of all images from position `start` on, each with its logits (B, C), float32 on the CPU.

    One pass of the encoder in evaluation mode.

    every: classify every n-th batch only; other processes classify the others. Raises DataError if too many images are
    unreadable.
    """
    column = Column(classifier.encoder.depth, classifier.pool, classifier.final_norm)
    for batch in encode_columns(classifier.encoder, source, settings, [column], start, every):
        logits_BC = torch.empty(0, classifier.num_classes)
        if batch.columns:
            pooled_BD = torch.from_numpy(batch.columns[0]).to(settings.device)
            logits_BC = classifier.logits(pooled_BD).cpu()
        yield batch, logits_BC


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
    """Return the accuracy on labelled images. The ranks share the images, and all of them get result and traits.

    labels: (N,) class numbers. among: the only classes that compete; the labels are then positions in `among`. Raises
    DataError if too many images, or all of them, are unreadable.
    """
    ranks, hits, images, bad = world_size(), np.zeros(2, dtype=np.int64), 0, list[tuple[str, str]]()
    competing = classifier.num_classes if among is None else len(among)
    for batch, logits_BC in classify(classifier, source, settings, own_rank() * settings.batch_size, ranks):
        truth_B1 = torch.from_numpy(labels[batch.indices])[:, None]
        ranked_BK = (logits_BC if among is None else logits_BC[:, among]).topk(min(5, competing)).indices
        right_BK = ranked_BK == truth_B1
        hits += [int(right_BK[:, 0].sum()), int(right_BK.sum())]
        images += len(batch.indices)
        bad += batch.bad
        if progress is not None:
            progress(batch.end, len(source))
    images, bad = total_over_ranks(images), gather_lists(bad)
    source.share_traits()
    if not images:
        raise none_readable(source.name, bad)
    BadImages(settings.max_bad).add_all(bad)  # each rank has counted only its own
    top1, top5 = (100.0 * total_over_ranks(int(count)) / images for count in hits)
    return Scores(top1, top5 if competing > 5 else None, images, bad)
