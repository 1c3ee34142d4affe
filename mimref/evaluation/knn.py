"""Weighted k-nearest-neighbour classification on frozen features (Appendix C.4).

One search finds max(k) neighbours of every test image and serves all k and temperatures. Training features are read in
blocks that are standardised once each; a running top-k merges the blocks. Memory is the test features, max(k)
neighbours per test image and one block of similarities, whatever the number of training images.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimref.devices import resolve_device
from mimref.errors import ConfigError, DataError
from mimref.evaluation.metrics import Row, accuracy, check_classes, check_features, class_indices, row_blocks, unit_rows

QUERY_CHUNK = 1024
TRAIN_CHUNK = 16384

Progress = Callable[[int, int], None]
Labels = NDArray[np.int64]
# float32; half-precision caches are read as they are.
Features = NDArray[np.floating]


class Neighbours(NamedTuple):
    """Nearest training images of every test image, nearest first; equal similarities in order of training index."""

    similarity: Tensor
    """(N, K) float32 cosine similarities, on the CPU."""
    train_index: Tensor
    """(N, K) int64 rows of the training features, on the CPU."""


def knn(
    train_x: Features,
    train_y: Labels,
    test_x: Features,
    test_y: Labels,
    *,
    k: Sequence[int] = (10,),
    tau: Sequence[float] = (0.07,),
    standardize: bool = True,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Row]:
    """Accuracy of weighted k-NN for every k and temperature, from one neighbour search (Appendix C.4).

    train_x (N, D), test_x (M, D); labels are any whole numbers. Features are standardised per feature with the training
    mean and standard deviation, then scaled to unit length; each of the k most cosine-similar training images votes
    for its class with weight exp(similarity / tau). Rows `knn_top1` and, from five classes on, `knn_top5` (the class
    has votes, and fewer than five classes have more), in percent, with `k` and `tau`.
    Raises ConfigError for k beyond the training set, DataError for features or labels that cannot be used.
    """
    check_features(train_x, "train", train_y)
    check_features(test_x, "test", test_y)
    classes = check_classes(train_y, "train")
    truth = class_indices(classes, test_y, "test")
    _check_votes(k, tau)
    neighbours = find_neighbours(train_x, test_x, k=max(k), standardize=standardize, device=device, progress=progress)
    ranks = label_ranks(neighbours, class_indices(classes, train_y, "train"), truth, len(classes), k=k, tau=tau)
    rows: list[Row] = []
    for (k_, tau_), rank in ranks.items():
        rows.append({"metric": "knn_top1", "value": accuracy(rank < 1), "k": k_, "tau": tau_})
        if len(classes) >= 5:
            rows.append({"metric": "knn_top5", "value": accuracy(rank < 5), "k": k_, "tau": tau_})
    return rows


def knn_accuracy(
    train_x: Features, train_y: Labels, test_x: Features, test_y: Labels, *, k: int = 10, tau: float = 0.07
) -> float:
    """Top-1 accuracy in percent of `knn` at one k and temperature, for monitoring."""
    return float(knn(train_x, train_y, test_x, test_y, k=(k,), tau=(tau,))[0]["value"])


def find_neighbours(
    train_x: Features,
    test_x: Features,
    *,
    k: int,
    standardize: bool = True,
    device: str = "cpu",
    query_chunk: int = QUERY_CHUNK,
    train_chunk: int = TRAIN_CHUNK,
    progress: Progress | None = None,
) -> Neighbours:
    """The k training rows of highest cosine similarity for every test row.

    train_x (N, D) may be memory-mapped: it is read twice, block by block. Rows of exactly equal similarity come in
    order of their index, so results depend on chunk sizes only where the matmul itself rounds differently.
    Raises ConfigError for k beyond N or a device that is not there, DataError for widths that differ.
    """
    if not 1 <= k <= len(train_x):
        raise ConfigError(f"k = {k} is outside 1 to {len(train_x)}, the number of training images; choose a smaller k")
    if train_x.shape[1] != test_x.shape[1]:
        raise DataError(f"train features are {train_x.shape[1]} wide, test features {test_x.shape[1]}; use one encoder")
    target = resolve_device(device)
    mean, std = mean_and_std(train_x) if standardize else (None, None)
    test = torch.from_numpy(unit_rows(test_x, mean, std))
    queries = [slice(start, start + query_chunk) for start in range(0, len(test), query_chunk)]
    keys = [slice(start, start + train_chunk) for start in range(0, len(train_x), train_chunk)]
    found: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0, dtype=torch.int64))] * len(queries)
    for step, rows in enumerate(keys):
        train = torch.from_numpy(unit_rows(train_x[rows], mean, std)).to(target)
        for number, query in enumerate(queries):
            similarity, index = _top_k(test[query].to(target) @ train.T, k)
            new = (similarity.cpu(), index.cpu() + rows.start)
            found[number] = _merge(found[number], new, k) if step else new
            if progress is not None:
                progress(step * len(queries) + number + 1, len(keys) * len(queries))
    return Neighbours(torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found]))


def label_ranks(
    neighbours: Neighbours,
    train_y: Labels,
    test_y: Labels,
    classes: int,
    *,
    k: Sequence[int],
    tau: Sequence[float],
) -> dict[tuple[int, float], NDArray[np.int64]]:
    """Rank of every test image's own class among the votes: 0 is a correct prediction, below 5 a top-5 hit.

    train_y (N,), test_y (M,): labels 0..classes-1. Returns (M,) ranks for every (k, tau), in the order asked for. A
    class without votes has rank `classes`; of classes with equal votes the lower label comes first.
    """
    _check_votes(k, tau)
    labels = torch.from_numpy(np.asarray(train_y, dtype=np.int64))
    truth = torch.from_numpy(np.asarray(test_y, dtype=np.int64))[:, None]
    ranks = {(k_, tau_): np.empty(len(test_y), dtype=np.int64) for k_ in k for tau_ in tau}
    for start in range(0, len(test_y), QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        neighbour_y = labels[neighbours.train_index[rows]]
        for tau_ in dict.fromkeys(tau):
            for k_, votes in neighbour_votes(neighbours.similarity[rows], neighbour_y, classes, k=k, tau=tau_):
                ranks[k_, tau_][rows] = _rank(votes, truth[rows]).numpy()
    return ranks


def neighbour_votes(
    similarity: Tensor, neighbour_y: Tensor, classes: int, *, k: Sequence[int], tau: float
) -> Iterator[tuple[int, Tensor]]:
    """Votes of every class, exp(similarity / tau) summed over the k nearest, for ascending k.

    similarity, neighbour_y (M, K): nearest first, labels 0..classes-1. Yields (k, votes (M, classes) float64); the
    tensor is updated in place from one k to the next. Votes are relative to the nearest neighbour's, which no
    comparison notices and which keeps small temperatures from overflowing.
    """
    weights = ((similarity.double() - similarity[:, :1].double()) / tau).exp()
    votes = torch.zeros(len(similarity), classes, dtype=torch.float64)
    counted = 0
    for k_ in sorted(set(k)):
        votes.scatter_add_(1, neighbour_y[:, counted:k_], weights[:, counted:k_])
        counted = k_
        yield k_, votes


def mean_and_std(x: Features) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation (D,) of every feature of x (N, D), in one float64 pass over blocks.

    Blocks are combined by Chan's formula (sums of squares would lose precision). A feature that varies by no more than
    float32 resolves gets the standard deviation 1, so that rounding is not blown up to a feature.
    """
    count = 0
    mean = np.zeros(x.shape[1])
    m2 = np.zeros(x.shape[1])
    for rows in row_blocks(x):
        block = x[rows].astype(np.float64)
        block_mean = block.mean(axis=0)
        delta = block_mean - mean
        total = count + len(block)
        m2 += np.square(block - block_mean).sum(axis=0) + np.square(delta) * (count * len(block) / total)
        mean += delta * (len(block) / total)
        count = total
    std = np.sqrt(m2 / count)
    return mean, np.where(std > np.finfo(np.float32).eps * np.abs(mean), std, 1.0)


def _top_k(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of every row of (M, N), largest first, equal ones by ascending column."""
    k = min(k, similarity.shape[1])
    value, index = similarity.topk(k, sorted=True)
    # topk picks any of the entries that tie with the k-th; rows where it had a choice are sorted in full.
    tied = (similarity >= value[:, -1:]).sum(1) > k
    if tied.any():
        full, order = similarity[tied].sort(dim=1, descending=True, stable=True)
        value[tied], index[tied] = full[:, :k], order[:, :k]
    index, order = index.sort(dim=1)
    value, order = value.gather(1, order).sort(dim=1, descending=True, stable=True)
    return value, index.gather(1, order)


def _merge(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best of two sorted lists of neighbours; the old list's indices are the lower ones and win ties."""
    value, order = torch.cat([old[0], new[0]], dim=1).sort(dim=1, descending=True, stable=True)
    index = torch.cat([old[1], new[1]], dim=1).gather(1, order)
    return value[:, :k].clone(), index[:, :k].clone()


def _rank(votes: Tensor, truth: Tensor) -> Tensor:
    """(M,) number of classes that come before the true one; the number of classes where that has no votes."""
    own = votes.gather(1, truth)
    lower_label = torch.arange(votes.shape[1]) < truth
    before = (votes > own) | ((votes == own) & lower_label)
    return torch.where(own[:, 0] > 0, before.sum(1), votes.shape[1])


def _check_votes(k: Sequence[int], tau: Sequence[float]) -> None:
    if not len(k) or min(k) < 1:
        raise ConfigError(f"k = {list(k)}: give one or more numbers of neighbours, each at least 1")
    if not len(tau) or min(tau) <= 0:
        raise ConfigError(f"tau = {list(tau)}: give one or more temperatures above 0")
