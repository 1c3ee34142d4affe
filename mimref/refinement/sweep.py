"""Ranking the heads of a sweep on a frozen encoder (the paper's practitioner's guide, Appendix E).

The block's own features are the same for all heads on it, and losses at different temperatures do not compare. So
heads are compared by the k-NN accuracy of their projector's first layer and by the accuracy of their neighbour swap.
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
    """Rows `head_knn_top1` and `head_nn_accuracy` with `head`, `block` and `temperature`, best first.

    Empty without labels. columns, temperature: what every head reads, and its temperature. nn_accuracy: percent per
    head, from the end of training; empty when it was not measured.
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
    """k-NN accuracy in percent of every head's first projector layer on its column of `columns`.

    Empty without labels; NaN as from `KnnMonitor.knn_top1`. The heads end in training mode.
    """
    train, test = monitor.features(encoder, columns)
    if test is None:
        return []
    train_x, test_x = _hidden(heads, train, columns), _hidden(heads, test, columns)
    return [monitor.knn_top1(train_x[:, head], train.y, test_x[:, head], test.y) for head in range(len(columns))]


@torch.inference_mode()
def _hidden(heads: Heads, features: Features, columns: Sequence[Column]) -> NDArray[np.float32]:
    """First projector layer (N, H, hidden) of every head on its column, with running statistics where there are any."""
    device = next(heads.parameters()).device
    heads.eval()
    parts = []
    for start in range(0, len(features), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        of_head = [torch.from_numpy(np.asarray(features.columns[column][rows])).to(device) for column in columns]
        parts.append(heads.hidden(*heads.stacked(of_head)).transpose(0, 1).float().cpu().numpy())
    heads.train()
    return np.concatenate(parts)
