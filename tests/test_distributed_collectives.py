"""Two processes equal one: statistics, loss, gradients, queue and weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mimref.data.loader import ViewBatch
from mimref.distributed.collectives import (
    averaged,
    gather_lists,
    gather_rows,
    gather_rows_with_gradient,
    gather_samples,
    max_over_ranks,
)
from mimref.distributed.group import own_rank, share, world_size
from mimref.encoders.parameters import encoder_groups
from mimref.refinement.config import HeadsConfig
from mimref.refinement.heads import Heads
from mimref.refinement.method import Method, monitored_values
from mimref.refinement.norms import NORMS, EnsembleBatchNorm, EnsembleRunningNorm, Norm, update_statistics
from mimref.training.optim import adamw, module_groups, set_learning_rate
from tests.ranks import run_ranks
from tests.steps import CPU, make_batch, make_step, weights

SAMPLES = {torch.float64: 6, torch.float32: 8}


# --- what ranks exchange


def tell() -> dict[str, Any]:
    rank = own_rank()
    part = torch.arange(3.0 + rank).view(1, -1) + 10 * rank
    x = part.clone().requires_grad_()
    # Every rank weights all rows in its own way.
    (gather_rows_with_gradient(x, [3, 4], dim=1) * (torch.arange(7.0) + 100 * rank)).sum().backward()
    return {
        "rows": gather_rows(part, [3, 4], dim=1),
        "gradient": x.grad,
        "agree": max_over_ranks(5 - 2 * rank),
        "lists": gather_lists([rank] * (rank + 1)),
        "samples": gather_samples(torch.arange(rank + 1) + 7 * rank, 4),
        "empty": gather_rows(torch.zeros(1, rank), [0, 1], dim=1).shape,
    }


ROWS = [8, 1, 2, 3, 7, 5, 6, 4, 0]


def small_cases() -> dict[str, Any]:
    """Run all that takes no time beyond starting the processes."""
    by_type = {str(dtype): normed(ROWS, dtype) for dtype in (torch.float64, torch.float32)}
    told = {norm: [collectives(norm, 1), collectives(norm, 5)] for norm in NORMS}
    sent = {direction: exchanged(direction) for direction in ("projection", "prediction")}
    return {"tell": tell(), "normed": by_type, "followed": followed(), "collectives": told, "exchanged": sent}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each of two ranks."""
    return run_ranks(small_cases, 2, tmp_path_factory.mktemp("small"))


def test_what_ranks_tell_each_other(small: list[dict[str, Any]]) -> None:
    first, second = (rank["tell"] for rank in small)
    for told in (first, second):
        assert told["rows"].tolist() == [[0, 1, 2, 10, 11, 12, 13]]
        assert told["agree"] == 5 and told["lists"] == [0, 1, 1] and told["empty"] == (1, 1)
        assert [part.tolist() for part in told["samples"]] == [[0], [7, 8]]
    assert first["gradient"].tolist() == [[100, 102, 104]]
    assert second["gradient"].tolist() == [[106, 108, 110, 112]]
    assert (world_size(), own_rank(), max_over_ranks(3), gather_lists([1])) == (1, 0, 3, [1])


@pytest.mark.parametrize("count", range(10))
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_shares_cover_everything_once(count: int, world: int) -> None:
    parts = [list(range(count))[share(count, rank, world)] for rank in range(world)]
    assert [item for part in parts for item in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def normed(rows: list[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return output, gradients and running statistics of a BatchNorm on this rank's rows of a fixed input."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 4, 9, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    # With a mean far from zero, sums of squares would lose precision.
    x = x + 1000
    mine = torch.tensor(rows) if world_size() == 1 else torch.tensor(rows).split([5, 4])[own_rank()]
    norm = EnsembleBatchNorm(3, 4).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 12))
    part = x[:, :, mine].requires_grad_()
    found = norm(part)
    (found * y[:, :, mine]).sum().backward()
    assert part.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    assert norm.running_mean is not None and norm.running_var is not None
    return found.detach(), part.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_statistics_span_the_ranks(dtype: torch.dtype, tolerance: float, small: list[dict[str, Any]]) -> None:
    alone = normed(ROWS, dtype)
    parts = [rank["normed"][str(dtype)] for rank in small]
    close = {"rtol": tolerance, "atol": tolerance}
    for index in (0, 1):  # rows
        torch.testing.assert_close(torch.cat([part[index] for part in parts], dim=2), alone[index], **close)
    for index in (2, 3):  # gradients of weight and bias, which add up
        torch.testing.assert_close(parts[0][index] + parts[1][index], alone[index], **close)
    for index in (4, 5):
        for part in parts:
            torch.testing.assert_close(part[index], alone[index], **close)


def followed() -> tuple[Tensor, ...]:
    """Return output, gradients and statistics of a running norm after updates on uneven or empty parts per rank."""
    generator = torch.Generator().manual_seed(1)
    norm = EnsembleRunningNorm(3, 4).double()
    for parts in ([5, 4], [9, 0], [1, 8], [4, 5], [3, 6], [2, 7], [8, 1]):
        x = 1000 + torch.randn(3, 4, 9, generator=generator, dtype=torch.float64)
        mine = (x if world_size() == 1 else x.split(parts, dim=2)[own_rank()]).clone().requires_grad_()
        found = norm(mine)
        (found * mine.detach()).sum().backward()
        update_statistics(norm)
    assert mine.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    return found.detach(), mine.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var


def test_running_statistics_span_the_ranks(small: list[dict[str, Any]]) -> None:
    alone = followed()
    parts = [rank["followed"] for rank in small]
    for index in (0, 1):  # rows
        torch.testing.assert_close(
            torch.cat([part[index] for part in parts], dim=2), alone[index], rtol=1e-9, atol=1e-9
        )
    for index in (2, 3):  # gradients of weight and bias, which add up
        torch.testing.assert_close(parts[0][index] + parts[1][index], alone[index], rtol=1e-9, atol=1e-9)
    for index in (4, 5):
        torch.testing.assert_close(parts[0][index], alone[index], rtol=1e-9, atol=1e-9)
        assert torch.equal(parts[0][index], parts[1][index])


@contextmanager
def counted_collectives() -> Iterator[list[tuple[str, int]]]:
    """Record the kind of every collective in the block, and the bytes that this rank contributes."""
    calls: list[tuple[str, int]] = []
    gather, reduce = dist.all_gather_into_tensor, dist.all_reduce

    def all_gather(gathered: Tensor, own: Tensor) -> None:
        calls.append(("gather", own.nbytes))
        gather(gathered, own)

    def all_reduce(own: Tensor) -> None:
        calls.append(("reduce", own.nbytes))
        reduce(own)

    dist.all_gather_into_tensor, dist.all_reduce = all_gather, all_reduce
    try:
        yield calls
    finally:
        dist.all_gather_into_tensor, dist.all_reduce = gather, reduce


def collectives(norm: Norm, number: int) -> dict[str, list[str]]:
    """Return the collectives in a forward pass, a backward pass and an update of `number` heads."""
    config = HeadsConfig(projector_hidden=8, predictor_hidden=8, output=4, norm=norm)
    heads = Heads(config, [16] * number)
    found: dict[str, list[tuple[str, int]]] = {}
    with counted_collectives() as calls:
        _, prediction = heads(torch.randn(number, 6, 16))
        found["forward"] = calls.copy()
        calls.clear()
        prediction.square().sum().backward()
        found["backward"] = calls.copy()
        calls.clear()
        update_statistics(heads)
        found["update"] = calls
    return {what: [kind for kind, _ in made] for what, made in found.items()}


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        # Five layers with one BatchNorm each.
        ("batch", {"forward": ["gather"] * 5, "backward": ["reduce"] * 5, "update": []}),
        ("layer", {"forward": [], "backward": [], "update": []}),
        ("running", {"forward": [], "backward": [], "update": ["gather"]}),
    ],
)
def test_collectives_do_not_grow_with_the_heads(
    norm: Norm, expected: dict[str, list[str]], small: list[dict[str, Any]]
) -> None:
    for rank in small:
        one, five = rank["collectives"][norm]
        assert one == five == expected


def exchanged(direction: str) -> list[tuple[str, int]]:
    """Return the collectives of a step, without those of norms."""
    step = make_step(direction=direction, norm="layer")
    step.most_images = 3
    batch = part_of(make_batch(range(6)), 0)
    with counted_collectives() as calls:
        step.forward_backward(batch, weights(3), top_k=3, train_encoder=False)
    return calls


def test_only_the_direction_of_the_release_gathers_every_view(small: list[dict[str, Any]]) -> None:
    """Eq. (1) needs the projections of two views and nothing in the backward pass."""
    view = 3 * 3 * 6 * 8  # heads, images of a rank, output width, bytes of a float64
    numbers, projections = ("gather", 3 * 8), ("gather", 2 * view)
    for rank in small:
        assert rank["exchanged"]["projection"] == [numbers, projections]
        predictions, gradients = ("gather", 4 * view), ("reduce", 2 * 4 * view)  # of both ranks' parts
        assert rank["exchanged"]["prediction"] == [numbers, projections, predictions, gradients]


# --- steps


def part_of(batch: ViewBatch, lost: int) -> ViewBatch:
    """Return this rank's images; `lost` images of the last rank could not be read."""
    images = len(batch.sample_B)
    rows = share(images, own_rank(), world_size())
    if own_rank() == world_size() - 1:
        rows = slice(rows.start, rows.stop - lost)
    return ViewBatch(batch.epoch, batch.sample_B[rows], [crops[rows] for crops in batch.crops], [])


def train(
    variant: dict[str, Any], micro_batch: int | None, steps: int, lost: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Train both modules with AdamW for a few updates; return all that is compared afterwards."""
    variant = dict(variant)
    train_encoder = variant.pop("train_encoder", True)
    blocks = variant.get("blocks", [4, 2, 3])
    step = make_step(**variant)
    if dtype == torch.float32:
        step.encoder.float()
        step.heads.float()
        step.queue.rows_HQO = step.queue.rows_HQO.float()
        step.photometric.__class__ = step.photometric.__class__.__bases__[0]
    samples = SAMPLES[dtype]
    # A new CLS token is almost zero, so its LayerNorm would amplify the rounding errors of single precision.
    step.encoder.vit.cls_token.data.copy_(torch.linspace(-1, 1, 32))
    if dtype == torch.float32:
        step.temperature_H.fill_(1.0)
    step.micro_batch, step.most_images = micro_batch, samples
    step.trained_heads = averaged(step.heads, CPU)
    groups = []
    if train_encoder:
        step.trained_encoder = averaged(step.pooled_blocks, CPU)
        groups = encoder_groups(step.encoder, weight_decay=0.05, layer_decay=0.9)
    optimizer = adamw(groups + module_groups(step.heads, weight_decay=1e-5), (0.9, 0.95))
    logs, gradients = [], []
    noise: dict[str, Tensor] = {}
    for number in range(steps):
        batch = make_batch(range(number, number + samples - (0 if world_size() > 1 else lost)))
        batch = part_of(make_batch(range(number, number + samples)), lost) if world_size() > 1 else batch
        # AdamW's first updates are the signs of gradients, which rounding may flip where gradients are small.
        set_learning_rate(optimizer, 1e-4 if dtype == torch.float64 else 1e-7)
        values = step.forward_backward(batch, weights(len(blocks)).to(dtype), top_k=3, train_encoder=train_encoder)
        logs.append(monitored_values(values, torch.arange(40) % 3))
        gradients.append(gradient_vector(step))
        for name, tiny in tiny_gradients(step, float(gradients[-1].norm())).items():
            noise[name] = noise.get(name, tiny) | tiny
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {
        "logs": logs,
        "gradients": gradients,
        "queue": step.queue.state_dict(),
        "encoder": step.encoder.state_dict(),
        "heads": step.heads.state_dict(),
        "noise": noise,
    }


def tiny_gradients(step: Method, total: float) -> dict[str, Tensor]:
    """Mark the elements of every weight whose gradient may be nothing but rounding error."""
    named = [pair for module in (step.encoder, step.heads) for pair in module.named_parameters()]
    return {name: p.grad.abs() < 1e-7 * total for name, p in named if p.grad is not None}


def gradient_vector(step: Method) -> Tensor:
    modules = (step.encoder, step.heads)
    return torch.cat([p.grad.flatten() for m in modules for p in m.parameters() if p.grad is not None])


VARIANTS: dict[str, dict[str, Any]] = {
    "three heads": {},
    "one head": {"blocks": [4]},
    "prediction": {"direction": "prediction"},
    "swapped negatives": {"swap_negatives": True, "pool": "mean"},
    "gram": {"dense": "gram"},
    "cka": {"dense": "cka"},
}


def compare(alone: dict[str, Any], found: dict[str, Any], tolerance: float) -> None:
    loose = max(tolerance, 1e-6)  # logs are in single precision
    for step, (expected, values) in enumerate(zip(alone["logs"], found["logs"], strict=True)):
        for key, value in expected.items():
            assert values[key] == pytest.approx(value, rel=loose, abs=loose), (step, key)
    for expected, gradient in zip(alone["gradients"], found["gradients"], strict=True):
        assert (gradient - expected).norm() / expected.norm() < tolerance
    for key, expected in alone["queue"].items():
        value = found["queue"][key]
        if isinstance(expected, Tensor) and expected.is_floating_point():
            torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected))
    # Where the true gradient is zero (keys' biases, a shift before a BatchNorm), AdamW turns rounding errors into
    # updates; running means follow such shifts.
    noise = alone["noise"]
    assert sum(int(tiny.sum()) for tiny in noise.values()) < 0.1 * len(alone["gradients"][0])
    for module in ("encoder", "heads"):
        for name, expected in alone[module].items():
            difference = found[module][name] - expected
            if "running" in name:
                assert difference.abs().max() < max(tolerance, 1e-5)
            else:
                kept = difference[~noise[name]] if name in noise else difference
                assert not kept.numel() or kept.abs().max() < 10 * tolerance, name


CASES: dict[str, tuple[Any, ...]] = {
    f"{name}, micro-batch {micro}": (
        variant,
        micro,
        20 if (name, micro) == ("three heads", None) else 4,
        0,
        torch.float64,
    )
    for name, variant in VARIANTS.items()
    for micro in (None, 2)
}
# One rank's part is smaller or empty, because images could not be read.
CASES |= {f"{lost} images lost": ({}, 2, 3, lost, torch.float64) for lost in (1, 3)}
CASES |= {"3 images lost, prediction": ({"direction": "prediction"}, None, 3, 3, torch.float64)}
# Running statistics have updates of their own: a few are enough, but there must be more of them than layers.
CASES |= {
    f"{norm} norm, {lost} images lost, micro-batch {micro}": ({"norm": norm}, micro, 8, lost, torch.float64)
    for norm in ("layer", "running")
    for lost, micro in ((0, None), (1, 2), (3, 2))
}
CASES |= {"stage 1": ({"train_encoder": False}, None, 20, 0, torch.float64)}
CASES |= {"stage 1, micro-batch 2": ({"train_encoder": False}, 2, 4, 1, torch.float64)}
CASES |= {"single precision": ({}, None, 5, 0, torch.float32)}
CASES |= {"single precision, micro-batch 2": ({}, 2, 5, 0, torch.float32)}
# Class tokens of a new encoder are almost equal, so BatchNorm amplifies their rounding errors in single precision.
CASES |= {"single precision, stage 1": ({"train_encoder": False, "pool": "mean"}, None, 5, 0, torch.float32)}


def train_all() -> dict[str, dict[str, Any]]:
    return {name: train(*case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """All cases on two ranks, which take seconds to start."""
    return run_ranks(train_all, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(case: str, both_ranks: list[dict[str, dict[str, Any]]]) -> None:
    alone = train(*CASES[case])
    tolerance = 1e-4 if case.startswith("single precision") else 1e-9
    first, second = (results[case] for results in both_ranks)
    compare(alone, first, tolerance)
    compare(alone, second, tolerance)
    for module in ("encoder", "heads"):
        assert all(torch.equal(first[module][name], second[module][name]) for name in first[module])
