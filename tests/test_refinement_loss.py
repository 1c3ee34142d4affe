"""Nearest Neighbor Alignment against Eq. (1) written as plain loops, in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mimref.refinement.alignment import nna_loss

TEMPERATURES = [0.07, 0.2, 1.0]
IMAGES, WIDTH = 4, 5


def inputs(heads: int, views: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw unit predictions (H, V, B, O), projections and neighbours (H, 2, B, O), and temperatures (H,)."""
    generator = torch.Generator().manual_seed(seed)

    def unit(count: int) -> Tensor:
        rows = torch.randn(heads, count, IMAGES, WIDTH, generator=generator, dtype=torch.float64)
        return F.normalize(rows, dim=-1)

    return unit(views), unit(2), unit(2), torch.tensor(TEMPERATURES[:heads], dtype=torch.float64)


def dot(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(a, b, strict=True):
        total = total + x * y
    return total


def loop_loss(
    p: Tensor, negative: Tensor, nn_z: Tensor, temperature: Tensor, direction: str
) -> tuple[list[Tensor], list[float], list[float]]:
    """Return each head's loss and the positive's mean probability in global and local pairs, one anchor at a time."""
    losses, global_means, local_means = [], [], []
    for h in range(len(p)):
        tau = float(temperature[h])
        terms, of_global, of_local = [], [], []
        for g in (0, 1):
            for v in range(p.shape[1]):
                if v == g:
                    continue
                for i in range(IMAGES):
                    positive = torch.exp(dot(p[h, v, i], nn_z[h, g, i]) / tau)
                    negatives = torch.zeros((), dtype=torch.float64)
                    for j in range(IMAGES):
                        if j == i:
                            continue
                        anchor, other = (i, j) if direction == "projection" else (j, i)
                        negatives = negatives + torch.exp(dot(p[h, v, anchor], negative[h, g, other]) / tau)
                    probability = positive / (positive + negatives)
                    terms.append(-torch.log(probability))
                    (of_global if v < 2 else of_local).append(float(probability.detach()))
        assert len(terms) == 2 * (p.shape[1] - 1) * IMAGES
        losses.append(sum(terms, torch.zeros((), dtype=torch.float64)) / len(terms))
        global_means.append(sum(of_global) / len(of_global))
        local_means.append(sum(of_local) / len(of_local) if of_local else math.nan)
    return losses, global_means, local_means


@pytest.mark.parametrize("swap_negatives", [False, True])
@pytest.mark.parametrize("direction", ["projection", "prediction"])
@pytest.mark.parametrize(("heads", "views"), [(1, 2), (3, 2), (1, 3), (3, 5)])
def test_loss_and_gradient_equal_plain_loops(heads: int, views: int, direction: str, swap_negatives: bool) -> None:
    p, z, neighbour, temperature = inputs(heads, views)
    weight = torch.tensor([1.0, 0.3, 2.0], dtype=torch.float64)[:heads]
    ours, theirs = p.clone().requires_grad_(), p.clone().requires_grad_()

    negative = neighbour if swap_negatives else z
    result = nna_loss(ours, negative, neighbour, temperature, direction=direction)
    losses, of_global, of_local = loop_loss(theirs, negative, neighbour, temperature, direction)
    torch.testing.assert_close(result.loss_H, torch.stack(losses), rtol=1e-12, atol=1e-12)
    assert result.global_H.tolist() == pytest.approx(of_global, rel=1e-12)
    assert result.local_H.tolist() == pytest.approx(of_local, rel=1e-12, nan_ok=True)

    (weight * result.loss_H).sum().backward()
    sum(w * loss for w, loss in zip(weight, losses, strict=True)).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("swap_negatives", [False, True])
@pytest.mark.parametrize("direction", ["projection", "prediction"])
def test_gradient_equals_finite_differences_and_stops_at_candidates(direction: str, swap_negatives: bool) -> None:
    p, z, neighbour, temperature = inputs(heads=2, views=3)
    for tensor in (p, z, neighbour):
        tensor.requires_grad_()

    def loss(prediction: Tensor) -> Tensor:
        negative = neighbour if swap_negatives else z
        alignment = nna_loss(prediction, negative, neighbour, temperature, direction=direction)
        assert not alignment.global_H.requires_grad and not alignment.local_H.requires_grad
        return alignment.loss_H

    assert torch.autograd.gradcheck(loss, (p,))
    loss(p).sum().backward()
    assert p.grad is not None and bool((p.grad != 0).all())
    assert z.grad is None and neighbour.grad is None


def test_a_global_view_is_not_aligned_with_itself() -> None:
    # Moving the prediction of view 1 changes its pair with view 0 alone: with two views, exactly half of the terms.
    p, z, neighbour, temperature = inputs(heads=1, views=2)
    moved_p = p.clone()
    moved_p[:, 1] = p[:, 1].roll(1, dims=1)
    moved_neighbour, moved_z = neighbour.clone(), z.clone()
    moved_neighbour[:, 1], moved_z[:, 1] = neighbour[:, 1].roll(1, dims=1), z[:, 1].roll(1, dims=1)
    base = nna_loss(p, z, neighbour, temperature).loss_H
    one, other = (
        nna_loss(moved_p, z, neighbour, temperature).loss_H,
        nna_loss(p, moved_z, moved_neighbour, temperature).loss_H,
    )
    both = nna_loss(moved_p, moved_z, moved_neighbour, temperature).loss_H
    assert not torch.isclose(one, base).any() and not torch.isclose(other, base).any()
    # View 1 as anchor and view 1 as target never meet, so that the two changes add up.
    torch.testing.assert_close(both - base, (one - base) + (other - base), rtol=1e-10, atol=1e-12)


def test_every_local_view_counts_alike() -> None:
    p, z, neighbour, temperature = inputs(heads=2, views=5)
    expected = nna_loss(p, z, neighbour, temperature)
    shuffled = nna_loss(p[:, [0, 1, 4, 2, 3]], z, neighbour, temperature)
    swapped = nna_loss(p[:, [1, 0, 2, 3, 4]], z[:, [1, 0]], neighbour[:, [1, 0]], temperature)
    for result in (shuffled, swapped):
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_heads_do_not_touch_each_other() -> None:
    p, z, neighbour, temperature = inputs(heads=3, views=3)
    together = nna_loss(p, z, neighbour, temperature)
    for head in range(3):
        part = slice(head, head + 1)
        alone = nna_loss(p[part], z[part], neighbour[part], temperature[part])
        for ours, theirs in zip(alone, together, strict=True):
            torch.testing.assert_close(ours, theirs[part], rtol=1e-12, atol=1e-12)


def test_a_sharp_temperature_stays_finite_in_float32() -> None:
    p, z, neighbour, _ = (tensor.float() for tensor in inputs(heads=2, views=4))
    loss = nna_loss(p.requires_grad_(), z, neighbour, torch.tensor([1e-3, 1e-2])).loss_H
    loss.sum().backward()
    assert bool(loss.isfinite().all()) and p.grad is not None and bool(p.grad.isfinite().all())
