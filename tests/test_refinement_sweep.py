"""Ranking the heads of a sweep: what is compared, in which order, and what is left as it was."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mimref.refinement.sweep as sweep
from mimref.encoders.vit import Encoder
from mimref.evaluation.monitor import KnnMonitor
from mimref.features.encode import Column, Features, columns_of
from mimref.refinement.config import HeadsConfig
from mimref.refinement.heads import Heads
from mimref.refinement.norms import Norm

BLOCKS = [4, 2, 4]
TEMPERATURE = [0.1, 0.2, 0.3]
DIM = 8


def features(rows: int, seed: int) -> Features:
    """Return random features of blocks 2 and 4."""
    rng = np.random.default_rng(seed)
    columns = {Column(block, "mean", block == 4): rng.normal(size=(rows, DIM)).astype(np.float32) for block in (2, 4)}
    return Features(columns, np.arange(rows), rng.integers(0, 3, rows))


class FakeMonitor:
    """Returns given features, records what it is asked to score, and answers with given scores."""

    def __init__(self, scores: list[float], *, labelled: bool = True) -> None:
        self.train, self.test = features(11, seed=0), features(7, seed=1) if labelled else None
        self.scores = scores
        self.asked: list[Column] = []
        self.scored: list[tuple[Any, ...]] = []

    def features(self, encoder: object, columns: list[Column]) -> tuple[Features, Features | None]:
        self.asked = columns
        return self.train, self.test

    def knn_top1(self, *arrays: Any) -> float:
        self.scored.append(arrays)
        return self.scores[len(self.scored) - 1]


def make_heads(norm: Norm = "batch") -> Heads:
    torch.manual_seed(0)
    heads = Heads(HeadsConfig(projector_hidden=6, predictor_hidden=4, output=4, norm=norm), [DIM] * len(BLOCKS))
    first = heads.projector[0].norm
    with torch.no_grad():
        first.running_mean.normal_()
        first.running_var.uniform_(0.5, 2.0)
    return heads


def rank(monitor: FakeMonitor, heads: Heads, nn_accuracy: list[float]) -> list[dict[str, Any]]:
    return sweep.rank_heads(
        cast(Encoder, None),
        heads,
        cast(KnnMonitor, monitor),
        columns_of(BLOCKS, "mean", True, 4),
        TEMPERATURE,
        nn_accuracy,
    )


def test_heads_are_ranked_by_knn() -> None:
    monitor = FakeMonitor([50.0, 90.0, 70.0])
    rows = rank(monitor, make_heads(), [11.0, 22.0, 33.0])
    assert monitor.asked == [Column(4, "mean", True), Column(2, "mean"), Column(4, "mean", True)]
    heads = [
        {"head": 2, "block": 2, "temperature": 0.2},
        {"head": 3, "block": 4, "temperature": 0.3},
        {"head": 1, "block": 4, "temperature": 0.1},
    ]
    expected = [
        {"metric": "head_knn_top1", "value": value, **head}
        for value, head in zip((90.0, 70.0, 50.0), heads, strict=True)
    ]
    expected += [
        {"metric": "head_nn_accuracy", "value": value, **head}
        for value, head in zip((22.0, 33.0, 11.0), heads, strict=True)
    ]
    assert rows == expected


def test_without_a_measured_nn_accuracy_there_is_only_knn() -> None:
    rows = rank(FakeMonitor([1.0, 2.0, 3.0]), make_heads(), [])
    assert [row["metric"] for row in rows] == ["head_knn_top1"] * 3


def test_without_labels_there_is_nothing_to_rank() -> None:
    assert rank(FakeMonitor([], labelled=False), make_heads(), []) == []


@pytest.mark.parametrize("norm", ["batch", "running"])
@pytest.mark.parametrize("rows_at_once", [3, 4096])
def test_each_head_is_scored_on_its_own_hidden_layer(
    norm: Norm, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_ROWS_AT_ONCE", rows_at_once)
    heads, monitor = make_heads(norm), FakeMonitor([1.0, 2.0, 3.0])
    before = {name: value.clone() for name, value in heads.state_dict().items()}
    rank(monitor, heads, [])
    layer = heads.projector[0]
    for head, (train_x, train_y, test_x, test_y) in enumerate(monitor.scored):
        for hidden, y, given in ((train_x, train_y, monitor.train), (test_x, test_y, monitor.test)):
            assert given is not None and np.array_equal(y, cast(Any, given.y))
            # A separate layer with the running statistics, not those of these rows.
            own = slice(head * 6, (head + 1) * 6)
            plain = nn.BatchNorm1d(6).eval()
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(plain, name).data.copy_(getattr(layer.norm, name)[own])
            block: Tensor = torch.from_numpy(list(given.columns.values())[[1, 0, 1][head]])
            expected = F.gelu(plain(block @ layer.linear.weight[head].T))
            np.testing.assert_allclose(hidden, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    # Training can continue: the running statistics have not moved, and new batches will move them.
    assert heads.training
    assert all(torch.equal(value, before[name]) for name, value in heads.state_dict().items())
