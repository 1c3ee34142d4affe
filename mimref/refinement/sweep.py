"""Ranking the heads of a sweep on a frozen encoder (the paper's practitioner's guide, Appendix E).

All heads on a block read the same features, and losses at different temperatures are not comparable. Heads are
therefore compared by the k-NN accuracy of their projector's first layer and by the accuracy of their neighbour swap.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mimref.encoders.backbones import TokenEncoder
from mimref.evaluation.monitor import KnnMonitor
from mimref.features.encode import Column, Features
from mimref.refinement.heads import Heads
from mimref.results import Row

_ROWS_AT_ONCE = 4096


def rank_heads(
    encoder: TokenEncoder,
    heads: Heads,
    monitor: KnnMonitor,
    columns: Sequence[Column],
    temperature: Sequence[float],
    nn_accuracy: Sequence[float],
) -> list[Row]:
    """Return rows `head_knn_top1` and `head_nn_accuracy` with `head`, `block` and `temperature`, best head first.

    Without labels, return no rows. columns: the features that each head reads. temperature: one per head. nn_accuracy:
    percent per head, from the end of training; empty if it was not measured.
    """
    scores = score_heads(encoder, heads, monitor, columns)
    knn, swaps = list[Row](), list[Row]()
    for head, score in enumerate(scores):
        setting: Row = {"head": head + 1, "block": columns[head].block, "temperature": temperature[head]}
        knn.append({"metric": "head_knn_top1", "value": score, **setting})
        if nn_accuracy:
            swaps.append({"metric": "head_nn_accuracy", "value": nn_accuracy[head], **setting})
    best = sorted(range(len(knn)), key=lambda head: -np.nan_to_num(float(knn[head]["value"]), nan=-1.0))
    return [rows[head] for rows in (knn, swaps) if rows for head in best]


def score_heads(encoder: TokenEncoder, heads: Heads, monitor: KnnMonitor, columns: Sequence[Column]) -> list[float]:
    """Return the k-NN accuracy, in percent, of each head's first projector layer on its column of `columns`.

    The list is empty without labels; values are NaN where `KnnMonitor.knn_top1` returns NaN. Leaves the heads in
    training mode.
    """
    train, test = monitor.features(encoder, columns)
    if test is None:
        return []
    train_x, test_x = _hidden(heads, train, columns), _hidden(heads, test, columns)
    return [monitor.knn_top1(train_x[:, head], train.y, test_x[:, head], test.y) for head in range(len(columns))]


@torch.inference_mode()
def _hidden(heads: Heads, features: Features, columns: Sequence[Column]) -> NDArray[np.float32]:
    """Return each head's first projector layer on its column, (N, H, hidden), with running statistics if any."""
    device = next(heads.parameters()).device
    heads.eval()
    parts = []
    for start in range(0, len(features), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        of_head = [torch.from_numpy(np.asarray(features.columns[column][rows])).to(device) for column in columns]
        parts.append(heads.hidden(*heads.stacked(of_head)).transpose(0, 1).float().cpu().numpy())
    heads.train()
    return np.concatenate(parts)
