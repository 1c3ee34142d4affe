"""Retrieval of images of a query's class: mean average precision and recall.

Shapes: M queries, N images that are searched.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mimref.devices import resolve_device
from mimref.distributed.collectives import gather_rows
from mimref.distributed.group import own_rank, share_chunks
from mimref.errors import ConfigError
from mimref.evaluation.knn.top_k import largest, pack, unpack_columns
from mimref.evaluation.metrics import check_splits, mean_and_std, percent, unit_tensor, vary
from mimref.features.matrix import Labels, Matrix
from mimref.progress import Progress
from mimref.results import Row

# Similarities that are sorted at once, 8 MB as keys, and the fewest rows (queries) per matrix product.
SORTED_AT_ONCE = 1 << 20
LEAST_ROWS = 16


def retrieval(
    train_x: Matrix,
    train_y: Labels,
    test_x: Matrix,
    test_y: Labels,
    *,
    recall_at: Sequence[int] = (1, 5, 10),
    standardize: bool = True,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Row]:
    """Return mean average precision and recall@k, with every test image as a query among the training images.

    train_x (N, D), test_x (M, D): features as for `knn`; labels are any whole numbers. The R training images of a
    query's class are relevant to it. All training images are ranked by cosine similarity, equal ones by their index.
    Precision at rank i is the share of relevant images among the first i. Rows, in percent:

    - `retrieval_map`: precision at the rank of every relevant image, averaged over these images, then over queries.
    - `retrieval_map_at_r`: the same over ranks 1 to R only, where an irrelevant image counts as 0 (MAP@R; Musgrave,
      Belongie & Lim 2020, section 3.2).
    - `retrieval_recall` with `k`: share of queries with a relevant image among the first k (recall@k of Jegou, Douze &
      Schmid 2011, and of Oh Song et al. 2016).

    Training features are held in memory as float32, and every row of similarities is sorted. In a process group all
    ranks pass the same features and labels, and share the queries. All values are NaN if the training features do not
    vary. Raises ConfigError for a k above the number of training images, DataError for unusable features or labels.
    """
    classes, labels, truth = check_splits(train_x, train_y, test_x, test_y)
    check_recall(recall_at, len(labels))
    target = resolve_device(device)
    mean, std = mean_and_std(train_x) if standardize else (None, None)
    train_ND = unit_tensor(train_x, mean, std).to(target)
    train_y_N = torch.from_numpy(labels).to(target)
    relevant_C = torch.bincount(train_y_N, minlength=len(classes) + 1)  # none for `UNSEEN`
    step = max(LEAST_ROWS, SORTED_AT_ONCE // len(labels))
    runs = share_chunks(len(test_x), step)
    mine, parts = runs[own_rank()], []
    for start in range(mine.start, mine.stop, step):
        rows = slice(start, min(start + step, mine.stop))
        similarity_MN = unit_tensor(test_x[rows], mean, std).to(target) @ train_ND.T
        if target.type == "mps":
            # Not every version of MPS can sort 64-bit keys, nor compute in float64.
            similarity_MN, train_y_N, relevant_C = similarity_MN.cpu(), train_y_N.cpu(), relevant_C.cpu()
        own_M = torch.from_numpy(truth[rows]).to(similarity_MN.device)
        parts.append(_scores(similarity_MN, train_y_N, own_M, relevant_C[own_M]).cpu())
        if progress is not None:
            progress(rows.stop - mine.start, mine.stop - mine.start)
    own_3M = torch.cat(parts, dim=1) if parts else torch.empty(3, 0, dtype=torch.float64)
    scores = gather_rows(own_3M, [run.stop - run.start for run in runs], dim=1).numpy()
    return _rows(scores if vary(train_x) else np.full_like(scores, math.nan), recall_at)


def check_recall(recall_at: Sequence[int], images: int) -> None:
    """Raise ConfigError for a k below 1 or above the number of training images."""
    for k in recall_at:
        if not 1 <= k <= images:
            raise ConfigError(f"recall_at {k}: give numbers from 1 to {images}, the number of training images")


def _scores(similarity_MN: Tensor, train_y_N: Tensor, own_M: Tensor, relevant_M: Tensor) -> Tensor:
    """Return (3, M) float64: average precision, average precision up to rank R, rank of the first relevant image.

    own_M: class of every query. relevant_M: R of every query.
    """
    count = similarity_MN.shape[1]
    columns_N = torch.arange(count, device=similarity_MN.device)
    keys_MN = largest(pack(similarity_MN, columns_N.expand_as(similarity_MN)), count)
    hit_MN = train_y_N[unpack_columns(keys_MN)] == own_M[:, None]
    # All hits, row by row; each row has R of them.
    row, column = hit_MN.nonzero(as_tuple=True)
    start_M = relevant_M.cumsum(dim=0) - relevant_M
    nth = torch.arange(len(row), device=row.device) - start_M[row] + 1
    precision = nth.double() / (column + 1)
    at_r = torch.where(column < relevant_M[row], precision, 0.0)
    sums = [torch.zeros(len(own_M), dtype=torch.float64, device=row.device) for _ in range(2)]
    for total_M, values in zip(sums, (precision, at_r), strict=True):
        total_M.index_add_(0, row, values)
    first_M = (torch.cat([column, column.new_zeros(1)])[start_M] + 1).double()
    divisor_M = relevant_M.clamp_min(1)
    return torch.stack([*(total_M / divisor_M for total_M in sums), first_M.masked_fill(relevant_M == 0, torch.inf)])


def _rows(scores_3M: NDArray[np.float64], recall_at: Sequence[int]) -> list[Row]:
    average, at_r, first = scores_3M
    rows: list[Row] = [
        {"metric": "retrieval_map", "value": percent(average.mean())},
        {"metric": "retrieval_map_at_r", "value": percent(at_r.mean())},
    ]
    for k in dict.fromkeys(recall_at):
        found = np.where(np.isnan(first), np.nan, first <= k)
        rows.append({"metric": "retrieval_recall", "value": percent(found.mean()), "k": k})
    return rows
