"""Ranking the heads of a sweep on a frozen encoder (the paper's practitioner's guide, Appendix E).

The block's own features are the same for all heads on it, and losses at different temperatures do not compare. So
heads are compared by the k-NN accuracy of their projector's first layer and by the accuracy of their neighbour swap.
"""

import numpy as np
import torch

from mimref.encoders.vit import Encoder
from mimref.evaluation.monitor import KnnMonitor
from mimref.features.encode import Features
from mimref.refinement.heads import Heads
from mimref.results import Row

_ROWS_AT_ONCE = 4096


def rank_heads(
    encoder: Encoder,
    heads: Heads,
    monitor: KnnMonitor,
    *,
    blocks: list[int],
    temperature: list[float],
    pool: str,
    nn_accuracy: list[float],
) -> list[Row]:
    """Rows `head_knn_top1` and `head_nn_accuracy` with `head`, `block` and `temperature`, best k-NN first.

    Empty without labels. nn_accuracy: percent per head, from the end of training.
    """
    wanted = sorted(set(blocks))
    train, test = monitor.features(encoder, wanted, pool=pool, final_norm=True)
    if test is None:
        return []
    columns = [wanted.index(block) for block in blocks]
    hidden = [_hidden(heads, features, columns) for features in (train, test)]
    scored = [
        (
            monitor.knn_top1(hidden[0], hidden[1], head),
            {"head": head + 1, "block": blocks[head], "temperature": temperature[head]},
        )
        for head in range(len(blocks))
    ]
    scored.sort(key=lambda pair: -pair[0])
    rows: list[Row] = [{"metric": "head_knn_top1", "value": score, **head} for score, head in scored]
    if nn_accuracy:
        rows += [
            {"metric": "head_nn_accuracy", "value": nn_accuracy[int(head["head"]) - 1], **head} for _, head in scored
        ]
    return rows


@torch.inference_mode()
def _hidden(heads: Heads, features: Features, columns: list[int]) -> Features:
    """First projector layer of every head on its block's features, with the running BatchNorm statistics."""
    device = next(heads.parameters()).device
    heads.eval()
    parts = []
    for start in range(0, len(features.x), _ROWS_AT_ONCE):
        chosen = torch.from_numpy(features.x[start : start + _ROWS_AT_ONCE, columns]).to(device)
        parts.append(heads.hidden(chosen.transpose(0, 1)).transpose(0, 1).float().cpu().numpy())
    heads.train()
    return Features(np.concatenate(parts), features.y, features.indices, features.bad)
