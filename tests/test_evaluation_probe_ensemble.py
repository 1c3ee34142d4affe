"""Classifiers trained together, against classifiers trained one by one with autograd."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from mimref.errors import DataError
from mimref.evaluation.probe.config import LEARNING_RATES, ProbeTrainingConfig
from mimref.evaluation.probe.ensemble import Batch, Norm, ProbeEnsemble, schedule
from mimref.evaluation.probe.grid import ProbeGrid, ProbeInput, score

NORMS: tuple[Norm, ...] = ("none", "batch")
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def cosine(update: int, total: int, lr: float, norm: Norm) -> float:
    """The learning rate, by definition."""
    if norm == "none":
        return lr * (1 + math.cos(math.pi * update / total)) / 2
    warmup = int(0.1 * total)
    if update < warmup:
        return lr * (update + 1) / (warmup + 1)
    return 1e-6 + (lr - 1e-6) * (1 + math.cos(math.pi * (update - warmup) / (total - warmup))) / 2


@pytest.mark.parametrize("norm", NORMS)
def test_equals_52_modules_trained_alone(norm: Norm) -> None:
    torch.manual_seed(0)
    widths, classes, total, lrs = [6, 12, 9, 20], 5, 20, [4 * lr for lr in LEARNING_RATES]
    batches = [
        ([torch.randn(size, width, dtype=torch.float64) * 3 + 1 for width in widths], torch.randint(classes, (size,)))
        for size in [16] * (total - 1) + [7]
    ]
    ensemble = ProbeEnsemble(widths, classes, lrs, norm=norm, dtype=torch.float64)
    start = [weight.clone().view(13, classes, -1) for weight in ensemble.weights]
    for update, (inputs, labels) in enumerate(batches):
        ensemble.step(inputs, labels, *schedule(update, total, norm))
    assert len(ensemble) == 52 and sum(weight.shape[0] for weight in ensemble.weights) == 52 * classes
    found = ensemble.logits(batches[0][0])
    for i, width in enumerate(widths):
        for r, lr in enumerate(lrs):
            bn = nn.BatchNorm1d(width, affine=False).double() if norm == "batch" else nn.Identity()
            linear = nn.Linear(width, classes).double()
            linear.weight.data.copy_(start[i][r])
            linear.bias.data.zero_()
            optimizer = torch.optim.SGD(linear.parameters(), lr=lr, momentum=0.9)
            for update, (inputs, labels) in enumerate(batches):
                optimizer.param_groups[0]["lr"] = cosine(update, total, lr, norm)
                optimizer.zero_grad()
                nn.functional.cross_entropy(linear(bn(inputs[i])), labels).backward()
                optimizer.step()
            torch.testing.assert_close(ensemble.weights[i].view(13, classes, -1)[r], linear.weight.data, **EXACT)
            torch.testing.assert_close(ensemble.bias_KC[13 * i + r], linear.bias.data, **EXACT)
            with torch.no_grad():
                expected = linear(bn.eval()(batches[0][0][i]))
            torch.testing.assert_close(found[13 * i + r].T, expected, **EXACT)
            if isinstance(bn, nn.BatchNorm1d):
                state = ensemble.state_dict()
                torch.testing.assert_close(state[f"norms.{i}.running_mean"], bn.running_mean, **EXACT)
                torch.testing.assert_close(state[f"norms.{i}.running_var"], bn.running_var, **EXACT)


def test_schedules() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    # DINOv2's own scheduler.
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=0)
    for update in range(50):
        scale, offset = schedule(update, 50, "none")
        assert offset == 0 and 0.3 * scale == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()
    rates = [0.3 * scale + offset for scale, offset in (schedule(update, 50, "batch") for update in range(51))]
    assert rates[:6] == pytest.approx([0.3 * share / 6 for share in range(1, 7)])
    assert rates[5] == max(rates) and rates[50] == pytest.approx(1e-6)
    # The length of the warm-up is truncated: 5 of 58 updates, where rounding would give 6.
    rates = [sum(schedule(update, 58, "batch")) for update in range(58)]
    assert rates[:6] == pytest.approx([*(share / 6 for share in range(1, 6)), 1.0])


def test_weights_start_as_dinov2_has_them() -> None:
    ensemble = ProbeEnsemble([64, 256], 20, LEARNING_RATES)
    weights = torch.cat([weight.flatten() for weight in ensemble.weights])
    assert float(weights.std()) == pytest.approx(0.01, rel=0.02) and abs(float(weights.mean())) < 1e-4
    assert not ensemble.bias_KC.any()
    first = ensemble.weights[0].view(13, -1)
    assert len(first.unique(dim=0)) == 13
    again, other = (ProbeEnsemble([64, 256], 20, LEARNING_RATES, seed=seed) for seed in (0, 1))
    assert torch.equal(again.weights[1], ensemble.weights[1]) and not torch.equal(other.weights[1], ensemble.weights[1])


def test_small_batches_change_nothing() -> None:
    batches: list[Batch] = [
        ([torch.ones(count, 4)] if count else [], torch.zeros(count, dtype=torch.int64)) for count in (0, 1, 1)
    ]
    settings = ProbeTrainingConfig(lr=[0.1], epochs=1, batch_size=2, norm="batch")
    y = np.arange(6) % 2
    grid = ProbeGrid(settings, 0, y, {ProbeInput("last", "cls"): np.ones((6, 4))}, y, torch.device("cpu"))
    start = grid.ensemble.weights[0].clone()
    told: list[tuple[int, int]] = []
    grid.train(lambda first: iter(batches), str, lambda *at: told.append(at))
    assert torch.equal(grid.ensemble.weights[0], start) and told == [(1, 3), (2, 3), (3, 3)]


def test_a_diverged_classifier_leaves_the_others_alone() -> None:
    torch.manual_seed(0)
    batches: list[Batch] = [([torch.randn(8, 6) * 10, torch.randn(8, 4)], torch.randint(3, (8,))) for _ in range(30)]
    tame, wild = (ProbeEnsemble([6, 4], 3, (0.1, rate, 0.2)) for rate in (0.15, 3e38))
    for ensemble in (tame, wild):
        for inputs, labels in batches:
            ensemble.step(inputs, labels, 1.0)
    assert wild.finite().tolist() == [True, False, True] * 2
    for ours, theirs in zip(wild.weights, tame.weights, strict=True):
        assert torch.equal(ours.view(3, -1)[::2], theirs.view(3, -1)[::2])
    scores = score(wild, batches, "test")
    assert scores[1] == scores[4] == 0 and np.array_equal(
        scores[[0, 2, 3, 5]], score(tame, batches, "test")[[0, 2, 3, 5]]
    )


def test_states_that_do_not_fit() -> None:
    ensemble = ProbeEnsemble([4], 2, (0.1,))
    with pytest.raises(RuntimeError, match="size mismatch"):
        ensemble.load_state_dict(ProbeEnsemble([5], 2, (0.1,)).state_dict())


def test_nothing_to_score() -> None:
    def none() -> Iterator[Batch]:
        return iter(())

    with pytest.raises(DataError, match=r"^held: no readable image$"):
        score(ProbeEnsemble([4], 2, (0.1,)), none(), "held")


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
def test_cuda_equals_cpu_without_a_sync(norm: Norm) -> None:
    torch.manual_seed(0)
    batches: list[Batch] = [([torch.randn(64, 24), torch.randn(64, 96)], torch.randint(5, (64,))) for _ in range(10)]
    here, there = (ProbeEnsemble([24, 96], 5, LEARNING_RATES, norm=norm, device=device) for device in ("cpu", "cuda"))
    moved = [([x.cuda() for x in inputs], labels.cuda()) for inputs, labels in batches]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for inputs, labels in moved:
            there.step(inputs, labels, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for inputs, labels in batches:
        here.step(inputs, labels, 0.5)
    for ours, theirs in zip(here.weights, there.weights, strict=True):
        torch.testing.assert_close(ours, theirs.cpu(), rtol=1e-4, atol=1e-5)
