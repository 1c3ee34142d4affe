"""k-NN classification of frozen features (Appendix C.4): the neighbour search, the votes, and `mimref knn`."""

import math
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimref.data.sources import ImageSource, Split
from mimref.devices import resolve_device
from mimref.distributed.collectives import gather_rows
from mimref.distributed.group import own_rank, share_chunks
from mimref.errors import Checks, ConfigError
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.retrieval import check_recall, retrieval
from mimref.evaluation.knn.top_k import merge_top_k, unpack
from mimref.evaluation.metrics import (
    check_labels,
    check_splits,
    labelled_pair,
    mean_and_std,
    name_classes,
    percent,
    progress_label,
    unit_tensor,
    vary,
)
from mimref.features.inputs import column_groups, prepare_groups
from mimref.features.matrix import Labels, Matrix
from mimref.features.opening import open_inputs
from mimref.progress import Listener, Progress, Silent
from mimref.results import EvaluationResult, Row, named

# Test and training rows whose similarities are computed at once.
QUERY_CHUNK = 1024
TRAIN_CHUNK = 16384
# Pairs of neighbours whose classes are compared at once: 32 MB.
PREDICTED_PAIRS = 1 << 22


def evaluate_knn(
    config: KnnConfig,
    *,
    listener: Listener | None = None,
    checks: Checks | None = None,
    sources: dict[Split, ImageSource] | None = None,
) -> EvaluationResult:
    """Return the k-NN accuracy of the chosen blocks at every k and temperature, from one encoder pass per split.

    Rows are those of `knn` and, with `config.retrieval`, of `retrieval`, with `model`, `blocks` and `pool`. In a
    process group all ranks share the search. checks: mistakes found before. sources: the images, if already open.
    Raises UserError subclasses, before the encoder runs, for a checkpoint, images, blocks or a k that do not fit: one
    error for all mistakes.
    """
    started, listener, checks = time.monotonic(), listener or Silent(), checks or Checks()
    opened = open_inputs(config, listener, checks, sources=sources)
    groups = column_groups(config, opened.inputs, checks)
    if (train_y := check_labels(opened, checks)) is not None:
        checks.run("k", lambda: check_neighbours(max(config.k), train_y))
        if config.retrieval:
            checks.run("recall_at", lambda: check_recall(config.recall_at, len(train_y)))
    inputs = opened.checked(checks)
    prepare_groups(groups, inputs)
    rows: list[Row] = []
    for where, columns in groups:
        pair = labelled_pair(inputs.features("train"), inputs.features("val"), columns)
        found = knn(
            *pair,
            k=config.k,
            tau=config.tau,
            standardize=config.standardize,
            per_class=config.per_class,
            class_names=opened.class_names("train"),
            device=config.device,
            progress=partial(listener.progress, progress_label("nearest neighbours", where)),
        )
        if config.retrieval:
            found += retrieval(
                *pair,
                recall_at=config.recall_at,
                standardize=config.standardize,
                device=config.device,
                progress=partial(listener.progress, progress_label("retrieval", where)),
            )
        rows += named(found, inputs.name, where)
    return EvaluationResult(rows, time.monotonic() - started, inputs.bad, inputs.data)


def check_neighbours(k: int, y: Labels) -> None:
    """Raise ConfigError, before the encoder runs, for more neighbours than training images."""
    if k > len(y):
        raise ConfigError(f"k {k} is more than the {len(y)} training images; choose a smaller k")


class Neighbours(NamedTuple):
    """Nearest training images of M test images, nearest first; equal similarities in order of training index."""

    similarity: Tensor
    """(M, K) float32 cosine similarities, on the CPU."""
    train_index: Tensor
    """(M, K) int64 rows of the training features, on the CPU."""


def knn(
    train_x: Matrix,
    train_y: Labels,
    test_x: Matrix,
    test_y: Labels,
    *,
    k: Sequence[int] = (10,),
    tau: Sequence[float] = (0.07,),
    standardize: bool = True,
    per_class: bool = False,
    class_names: Sequence[str] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Row]:
    """Return the accuracy of weighted k-NN for every k and temperature, from one neighbour search (Appendix C.4).

    train_x (N, D), test_x (M, D); labels are any whole numbers. Features are standardised with the training mean and
    standard deviation, then scaled to unit length. Each of the k most cosine-similar training images votes for its
    class with weight exp(similarity / tau). Rows: `knn_top1` and, for five or more classes, `knn_top5` (the true class
    has votes, and fewer than five classes have more), in percent, with `k` and `tau`. per_class: for every setting,
    also one `knn_top1` per test class (its recall), with `class` (its name in `class_names`, indexed by label, else its
    label) and `images`; `main_rows` leaves these out. If the training features do not vary, there are no nearest images
    and all values are NaN. In a process group all ranks pass the same features and labels, see `find_neighbours`.
    Raises ConfigError for a k above the number of training images, DataError for unusable features or labels.
    """
    classes, labels, truth = check_splits(train_x, train_y, test_x, test_y)
    if not len(k) or min(k) < 1 or max(k) > len(labels):
        raise ConfigError(f"k = {list(k)}: give at least one, from 1 to {len(labels)}, the number of training images")
    if not len(tau) or min(tau) <= 0:
        raise ConfigError(f"tau = {list(tau)}: give one or more temperatures above 0")
    neighbours = find_neighbours(train_x, test_x, k=max(k), standardize=standardize, device=device, progress=progress)
    # `UNSEEN` is a class without votes.
    ranks = label_ranks(neighbours, labels, truth, max(len(classes), int(truth.max()) + 1), k=k, tau=tau)
    rows: list[Row] = []
    for (k_, tau_), rank in ranks.items():
        rows.append({"metric": "knn_top1", "value": percent(np.mean(rank < 1)), "k": k_, "tau": tau_})
        if len(classes) >= 5:
            rows.append({"metric": "knn_top5", "value": percent(np.mean(rank < 5)), "k": k_, "tau": tau_})
    if per_class:
        shown = name_classes(classes, class_names)
        for (k_, tau_), rank in ranks.items():
            rows += _class_rows(shown, truth, rank, {"k": k_, "tau": tau_})
    return rows if vary(train_x) else [{**row, "value": math.nan} for row in rows]


def knn_accuracy(
    train_x: Matrix, train_y: Labels, test_x: Matrix, test_y: Labels, *, k: int, tau: float = 0.07, device: str = "cpu"
) -> float:
    """Return the top-1 accuracy of `knn` in percent at one k and temperature."""
    return float(knn(train_x, train_y, test_x, test_y, k=(k,), tau=(tau,), device=device)[0]["value"])


def _class_rows(classes: Sequence[str | int], truth: Labels, rank: Labels, setting: Row) -> list[Row]:
    """Return the recall of every class with test images. classes: their names; truth, rank (M,): see `label_ranks`."""
    images = np.bincount(truth, minlength=len(classes))[: len(classes)]
    hits = np.bincount(truth[rank < 1], minlength=len(classes))
    return [
        {"metric": "knn_top1", "value": percent(hits[c] / images[c]), **setting, "class": shown, "images": int(n)}
        for c, (shown, n) in enumerate(zip(classes, images, strict=True))
        if n
    ]


def find_neighbours(
    train_x: Matrix,
    test_x: Matrix,
    *,
    k: int,
    standardize: bool = True,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Neighbours:
    """Find the k training rows of highest cosine similarity for every test row.

    train_x (N, D) may be memory-mapped; it is read in blocks, twice with `standardize`. Rows of equal similarity are in
    order of their index, so results depend on chunk sizes only where the matmul itself rounds differently.

    In a process group this is a collective operation: every rank must call it with the same arguments. Each rank reads
    all training rows and takes a contiguous run of whole chunks of test rows. Every rank knows every run, so no sizes
    are exchanged: the runs are padded to the longest, gathered by all ranks, and cut back. Whole chunks make the result
    exact: all matrix products have the shapes, and so the rounding, of a single process with as many threads.

    progress: counts this rank's share of the work. Raises ConfigError for an unavailable device.
    """
    target = resolve_device(device)
    runs = share_chunks(len(test_x), QUERY_CHUNK)
    mine = runs[own_rank()]
    mean, std = mean_and_std(train_x) if standardize else (None, None)
    queries = [
        unit_tensor(test_x[start : min(start + QUERY_CHUNK, mine.stop)], mean, std)
        for start in range(mine.start, mine.stop, QUERY_CHUNK)
    ]
    keys = [slice(start, start + TRAIN_CHUNK) for start in range(0, len(train_x), TRAIN_CHUNK)]
    found: list[Tensor | None] = [None] * len(queries)
    # One buffer for all similarities: new memory for each chunk would cost about a third of the product itself.
    buffer = torch.empty(max(map(len, queries), default=0) * min(TRAIN_CHUNK, len(train_x)), device=target)
    for step, rows in enumerate(keys if queries else []):
        train = unit_tensor(train_x[rows], mean, std).to(target)
        for number, query in enumerate(queries):
            query_x = query.to(target)
            similarity = buffer[: len(query_x) * len(train)].view(len(query_x), len(train))
            torch.matmul(query_x, train.T, out=similarity)
            if target.type == "mps":
                # Not every version of MPS can sort 64-bit keys.
                similarity = similarity.cpu()
            found[number] = merge_top_k(found[number], similarity, rows.start, k)
            if progress is not None:
                progress(step * len(queries) + number + 1, len(keys) * len(queries))
    packed = [chunk.cpu() for chunk in found if chunk is not None]
    own = torch.cat(packed) if packed else torch.empty(0, k, dtype=torch.int64)
    return Neighbours(*unpack(gather_rows(own, [run.stop - run.start for run in runs], dim=0)))


def label_ranks(
    neighbours: Neighbours, train_y: Labels, test_y: Labels, classes: int, *, k: Sequence[int], tau: Sequence[float]
) -> dict[tuple[int, float], Labels]:
    """Return the rank of each test image's own class among the votes: 0 is a correct prediction, below 5 a top-5 hit.

    neighbours: as many per image as the largest k. train_y (N,), test_y (M,): labels 0..classes-1. Returns ranks (M,)
    for every (k, tau), in the order given. A class without votes has rank `classes`. Of classes with equal votes, the
    one with the lower label comes first.
    """
    labels, truth = torch.from_numpy(train_y), torch.from_numpy(test_y)[:, None]
    ranks = {(k_, tau_): np.empty(len(test_y), dtype=np.int64) for k_ in k for tau_ in tau}
    for start in range(0, len(test_y), QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        similarity, neighbour_y = neighbours.similarity[rows].double(), labels[neighbours.train_index[rows]]
        own, width = truth[rows], classes
        if classes > neighbour_y.shape[1]:
            neighbour_y, own, width = _seen_classes(neighbour_y, own)
        for tau_ in tau:
            # Relative to the nearest neighbour's: votes compare the same, and small temperatures do not overflow.
            weights = ((similarity - similarity[:, :1]) / tau_).exp()
            votes = weights.new_zeros(len(weights), width)
            for counted, k_ in pairwise([0, *sorted(set(k))]):
                votes.scatter_add_(1, neighbour_y[:, counted:k_], weights[:, counted:k_])
                ranks[k_, tau_][rows] = _rank(votes, own, classes).numpy()
    return ranks


def predict_labels(neighbours: Neighbours, train_y: Labels, *, tau: float) -> Labels:
    """Return the label with the most votes for every test image (M,), the lowest of equal ones. All neighbours vote.

    neighbours (M, K). train_y (N,): labels, any whole numbers. Needs memory for K votes per neighbour.
    """
    labels, found = torch.from_numpy(train_y), np.empty(len(neighbours.train_index), dtype=np.int64)
    step = max(1, PREDICTED_PAIRS // max(1, neighbours.train_index.shape[1]) ** 2)
    for start in range(0, len(found), step):
        rows = slice(start, start + step)
        similarity, label_MK = neighbours.similarity[rows].double(), labels[neighbours.train_index[rows]]
        weights = ((similarity - similarity[:, :1]) / tau).exp()
        # Every neighbour gets the votes of its class.
        votes = torch.where(label_MK[:, :, None] == label_MK[:, None, :], weights[:, None, :], 0.0).sum(dim=2)
        most = votes == votes.amax(dim=1, keepdim=True)
        found[rows] = torch.where(most, label_MK, torch.iinfo(torch.int64).max).amin(dim=1).numpy()
    return found


def _seen_classes(neighbour_y: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, int]:
    """Number the classes among each test image's neighbours from 0, in the order of their labels.

    There are at most K, so votes cost the same with 1000 classes as with 100. neighbour_y (M, K), truth (M, 1):
    labels. Returns both renumbered, and the number of classes. A true class that is not among the neighbours' gets the
    last number, for which no neighbour votes.
    """
    ordered, order = neighbour_y.sort(dim=1)
    first = torch.zeros_like(ordered)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    number = first.cumsum(dim=1)
    at = torch.searchsorted(ordered, truth).clamp_max(ordered.shape[1] - 1)
    present = ordered.gather(1, at) == truth
    seen = torch.empty_like(number).scatter_(1, order, number)
    width = int(number.max()) + 2
    return seen, torch.where(present, number.gather(1, at), width - 1), width


def _rank(votes: Tensor, truth: Tensor, none: int) -> Tensor:
    """Return the number of classes ranked before the true one, (M,); `none` where the true class has no votes."""
    own = votes.gather(1, truth)
    lower_label = torch.arange(votes.shape[1]) < truth
    before = (votes > own) | ((votes == own) & lower_label)
    return torch.where(own[:, 0] > 0, before.count_nonzero(1), none)
