"""Attentive probes trained together, against plain loops and against modules trained one by one by LARS."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mimref.config.load import load_config
from mimref.evaluation.probe.attentive import AttentiveEnsemble, TokenShape, attend, attentive_schedule
from mimref.evaluation.probe.config import ATTENTIVE_LEARNING_RATES, LEARNING_RATES, ProbeConfig, ProbeTrainingConfig
from mimref.evaluation.probe.ensemble import Batch, Norm
from mimref.evaluation.probe.grid import ProbeGrid, ProbeInput, score

NORMS: tuple[Norm, ...] = ("none", "batch")
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def loops(query_QD: Tensor, value_QED: Tensor, x_LD: Tensor) -> list[float]:
    """Efficient probing of one image, by definition: every token is projected, then weighted."""
    queries, share, width = value_QED.shape
    out: list[float] = []
    for q in range(queries):
        scores = [sum(float(query_QD[q, d] * token[d]) for d in range(width)) / math.sqrt(width) for token in x_LD]
        weights = [math.exp(each - max(scores)) for each in scores]
        for e in range(share):
            values = [sum(float(value_QED[q, e, d] * token[d]) for d in range(width)) for token in x_LD]
            out.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    return out


def test_pooling_and_its_gradients_against_plain_loops() -> None:
    torch.manual_seed(0)
    ensemble = AttentiveEnsemble([TokenShape(5, (6,))], [3], 4, [1.0], norm="none", dtype=torch.float64)
    (pools,) = ensemble.pools
    with torch.no_grad():
        pools.query_RQD.mul_(50)
    x_BLD = torch.randn(2, 5, 6, dtype=torch.float64)
    query_QD, value_QED = pools.query_RQD.detach()[0], pools.value_RQED.detach()[0]
    weights = [pools.query_RQD, pools.value_RQED, pools.weight_RCD, pools.bias_RC]

    def total() -> float:
        """A weighted sum of the sines of all logits, so that every output has a gradient."""
        found = 0.0
        for image in x_BLD:
            pooled = loops(query_QD, value_QED, image)
            for c in range(4):
                logit = float(pools.bias_RC[0, c]) + sum(
                    float(w) * y for w, y in zip(pools.weight_RCD[0, c], pooled, strict=True)
                )
                found += (c + 1) * math.sin(logit)
        return found

    logits_RBC = pools(attend(pools.query_RQD.flatten(0, 1), x_BLD))
    ours = (logits_RBC.sin() * torch.arange(1, 5)).sum()
    assert ours.item() == pytest.approx(total(), abs=1e-12)
    gradients = torch.autograd.grad(ours, weights)
    rng = np.random.default_rng(0)
    for weight, gradient in zip(weights, gradients, strict=True):
        for place in rng.choice(weight.numel(), min(6, weight.numel()), replace=False):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    weight.view(-1)[place] += step
                    values.append(total())
                    weight.view(-1)[place] -= step
            assert float(gradient.flatten()[place]) == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-7)


class Alone(nn.Module):
    """One probe as in the authors' modules: a value projection of all tokens, its channels split among the queries."""

    def __init__(self, query: Tensor, value: Tensor, weight: Tensor, bias: Tensor, norm: Norm) -> None:
        super().__init__()
        self.query, self.value = nn.Parameter(query[None].clone()), nn.Parameter(value.flatten(0, 1).clone())
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        width = weight.shape[1]
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6).double() if norm == "batch" else nn.Identity()

    def forward(self, x_BLD: Tensor) -> Tensor:
        count, (images, tokens, width) = self.query.shape[1], x_BLD.shape
        value_BQLE = (x_BLD @ self.value.T).reshape(images, tokens, count, width // count).transpose(1, 2)
        attention_BQL = ((self.query * width**-0.5) @ x_BLD.mT).softmax(dim=-1)
        pooled_BD = (attention_BQL[:, :, None] @ value_BQLE).reshape(images, width)
        return nn.functional.linear(self.norm(pooled_BD), self.weight, self.bias)


def lars(parameters: list[nn.Parameter], momenta: dict[nn.Parameter, Tensor], lr: float) -> None:
    """MAE's optimizer without weight decay."""
    for p in parameters:
        assert p.grad is not None
        change = p.grad
        if p.ndim > 1:
            change = change * (0.001 * p.norm() / change.norm())
        momenta[p] = 0.9 * momenta.get(p, torch.zeros_like(p)) + change
        p.data -= lr * momenta[p]
        p.grad = None


@pytest.mark.parametrize("norm", NORMS)
def test_equals_modules_trained_alone(norm: Norm) -> None:
    torch.manual_seed(0)
    shapes, queries, lrs = (
        [TokenShape(4, (12,)), TokenShape(5, (12,)), TokenShape(4, (12, 6, 6))],
        [1, 3, 6],
        [3.0, 30.0],
    )
    classes, total = 5, 20
    batches = [
        ([torch.randn(size, s.size, dtype=torch.float64) * 2 + 1 for s in shapes], torch.randint(classes, (size,)))
        for size in [16] * (total - 1) + [7]
    ]
    ensemble = AttentiveEnsemble(shapes, queries, classes, lrs, norm=norm, dtype=torch.float64)
    assert len(ensemble) == 18
    alone = [
        Alone(*(weight[r].detach() for weight in pools.trained), norm) for pools in ensemble.pools for r in range(2)
    ]
    for update, (inputs, labels) in enumerate(batches):
        ensemble.step(inputs, labels, *attentive_schedule(update, total))
    found = ensemble.logits(batches[0][0])
    for k, module in enumerate(alone):
        shape, lr = shapes[k // 6], lrs[k % 2]
        momenta: dict[nn.Parameter, Tensor] = {}
        for update, (inputs, labels) in enumerate(batches):
            nn.functional.cross_entropy(module(tokens(inputs[k // 6], shape)), labels).backward()
            lars(list(module.parameters()), momenta, lr * schedule(update, total))
        pools = ensemble.pools[k // 2]
        torch.testing.assert_close(pools.query_RQD[k % 2], module.query[0], **EXACT)
        torch.testing.assert_close(pools.value_RQED[k % 2].flatten(0, 1), module.value, **EXACT)
        torch.testing.assert_close(pools.weight_RCD[k % 2], module.weight, **EXACT)
        torch.testing.assert_close(pools.bias_RC[k % 2], module.bias, **EXACT)
        with torch.no_grad():
            expected = module.eval()(tokens(batches[0][0][k // 6], shape))
        torch.testing.assert_close(found[k].T, expected, **EXACT)


def tokens(rows: Tensor, shape: TokenShape) -> Tensor:
    """Tokens of every image, read block by block and concatenated."""
    images = []
    for row in rows:
        blocks, start = [], 0
        for width in shape.widths:
            blocks.append(torch.stack([row[start + t * width : start + (t + 1) * width] for t in range(shape.tokens)]))
            start += shape.tokens * width
        images.append(torch.cat(blocks, dim=1))
    return torch.stack(images)


def schedule(update: int, total: int) -> float:
    """Warm-up for 10 of 90 epochs, then a cosine to 0."""
    warmup = round(total * 10 / 90)
    if update < warmup:
        return (update + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (update - warmup) / (total - warmup))) / 2


def test_schedule() -> None:
    for total in (20, 900):
        assert [attentive_schedule(update, total) for update in range(total)] == [
            (pytest.approx(schedule(update, total)), 0.0) for update in range(total)
        ]
    assert attentive_schedule(100, 900)[0] == 1.0


def test_weights_start_as_the_authors_have_them() -> None:
    def built(seed: int) -> AttentiveEnsemble:
        return AttentiveEnsemble([TokenShape(4, (256,))], [8], 40, [0.1, 0.2], seed=seed)

    (pools,) = built(0).pools
    assert float(pools.query_RQD.std()) == pytest.approx(0.02, rel=0.05)
    for weight in pools.trained[1:]:
        assert float(weight.abs().max()) == pytest.approx(1 / 16, rel=0.05)
    assert not torch.equal(pools.query_RQD[0], pools.query_RQD[1])
    (again,), (other,) = built(0).pools, built(1).pools
    assert torch.equal(again.value_RQED, pools.value_RQED) and not torch.equal(other.value_RQED, pools.value_RQED)


def test_a_diverged_probe_leaves_the_others_alone() -> None:
    torch.manual_seed(0)
    shapes = [TokenShape(3, (6,)), TokenShape(2, (4,))]
    batches: list[Batch] = [([torch.randn(8, 18), torch.randn(8, 8)], torch.randint(3, (8,))) for _ in range(30)]
    tame, wild = (AttentiveEnsemble(shapes, [2], 3, (1.0, rate, 2.0)) for rate in (1.5, 3e38))
    for ensemble in (tame, wild):
        for inputs, labels in batches:
            ensemble.step(inputs, labels, 1.0)
    assert wild.finite().tolist() == [True, False, True] * 2
    for ours, theirs in zip(wild.pools, tame.pools, strict=True):
        for mine, other in zip(ours.trained, theirs.trained, strict=True):
            torch.testing.assert_close(mine[::2], other[::2], rtol=1e-5, atol=1e-7)
    scores = score(wild, batches, "test")
    assert scores[1] == scores[4] == 0 and scores[0] > 0


def test_tokens_of_an_encoder_under_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.randn(8, 12)
    ensemble = AttentiveEnsemble([TokenShape(3, (4,))], [2], 2, [1.0])
    start = ensemble.pools[0].value_RQED.clone()
    ensemble.step([x], torch.arange(8) % 2, 1.0)
    assert not torch.equal(ensemble.pools[0].value_RQED, start)


def test_small_batches_change_nothing() -> None:
    batches: list[Batch] = [
        ([torch.ones(count, 8)] if count else [], torch.zeros(count, dtype=torch.int64)) for count in (0, 1, 1)
    ]
    settings = ProbeTrainingConfig.model_validate(
        {"kind": "attentive", "lr": [0.1], "epochs": 1, "batch_size": 2, "queries": [2]}
    )
    y = np.arange(6) % 2
    key = ProbeInput("last", "patch")
    grid = ProbeGrid(settings, 0, y, {key: np.ones((6, 8))}, y, torch.device("cpu"), shapes=[TokenShape(2, (4,))])
    assert isinstance(grid.ensemble, AttentiveEnsemble)
    start = grid.ensemble.pools[0].value_RQED.clone()

    def given(first: int) -> Iterator[Batch]:
        return iter(batches)

    grid.train(given, str, None)
    assert torch.equal(grid.ensemble.pools[0].value_RQED, start) and grid.step == 3


def test_scoring_holds_a_bounded_number_of_values() -> None:
    """The limit counts what all probes pool from an image, not only its tokens."""
    key, y = ProbeInput("last", "patch"), np.arange(6) % 2
    settings = ProbeTrainingConfig.model_validate(
        {"kind": "attentive", "queries": [2, 4], "lr": [0.1, 0.2, 0.3], "batch_size": 4}
    )
    grid = ProbeGrid(settings, 0, y, {key: np.ones((6, 32))}, y, torch.device("cpu"), shapes=[TokenShape(8, (4,))])
    # Each of 18 queries has 8 weights and pools 4 values, which are counted again for their projection.
    assert grid.ensemble.elements == 32 + 18 * (8 + 2 * 4) and grid.score_rows == (1 << 25) // grid.ensemble.elements


def test_settings() -> None:
    ours, linear = ProbeTrainingConfig.model_validate({"kind": "attentive"}), ProbeTrainingConfig()
    assert (tuple(ours.lr), ours.epochs, ours.norm, ours.blocks) == (ATTENTIVE_LEARNING_RATES, 90, "batch", "last")
    assert (tuple(linear.lr), linear.epochs, linear.norm, linear.blocks) == (LEARNING_RATES, 50, "none", "both")
    assert ProbeTrainingConfig.model_validate({"kind": "attentive", "epochs": 3}).epochs == 3
    # Settings are the same when written and read back.
    assert ProbeTrainingConfig.model_validate(ours.model_dump()) == ours
    assert ProbeTrainingConfig.model_validate(linear.model_dump()) == linear
    for change in ({"queries": [4]}, {"tokens": "both"}, {"tokens_gb": 1.0}):
        (name,) = change
        with pytest.raises(ValueError, match=f"probe.{name} requires probe.kind = 'attentive'"):
            ProbeTrainingConfig.model_validate(change)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
def test_cuda_equals_cpu_without_a_sync(norm: Norm) -> None:
    torch.manual_seed(0)
    batches: list[Batch] = [([torch.randn(64, 96)], torch.randint(5, (64,))) for _ in range(5)]
    here, there = (
        AttentiveEnsemble([TokenShape(4, (24,))], [4, 8], 5, (0.5, 1.0), norm=norm, device=device)
        for device in ("cpu", "cuda")
    )
    moved = [([x.cuda() for x in inputs], labels.cuda()) for inputs, labels in batches]
    there.step(*moved[0], 0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for inputs, labels in moved[1:]:
            there.step(inputs, labels, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for inputs, labels in batches:
        here.step(inputs, labels, 0.5)
    torch.testing.assert_close(there.logits(moved[0][0]).cpu(), here.logits(batches[0][0]), rtol=1e-3, atol=1e-3)


def test_the_attentive_presets_follow_the_authors_code() -> None:
    """billpsomas/efficient-probing: README.md (epochs, batch, optimizer), search_linprobe.py, probe_heads.py."""
    paper, quick = (load_config(ProbeConfig, f"probe/{name}") for name in ("attentive", "attentive_quickstart"))
    assert paper.probe == ProbeTrainingConfig(
        kind="attentive",
        lr=[0.1, 0.2, 0.5, 0.7, 1.0, 1.2, 1.5],
        epochs=90,
        batch_size=4096,
        norm="batch",
        blocks="last",
        queries=[32],
        tokens="patch",
    )
    assert not paper.final_norm and not paper.cached and quick.cached and quick.probe.kind == "attentive"
