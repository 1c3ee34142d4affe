"""Draws against a SplitMix64 in plain integers."""

import pytest
import torch
from scipy.stats import kstest

from mimref.draws import Operation, permutation, uniform

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def plain_mix(word: int) -> int:
    """SplitMix64's finalizer."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def plain_uniform(seed: int, epoch: int, operation: int, sample: int, view: int, lane: int) -> float:
    word = 0
    for part in (seed, epoch, operation, sample, view):
        word = plain_mix(((word ^ part) + GOLDEN) & MASK)
    return (plain_mix((word + (lane + 1) * GOLDEN) & MASK) >> 40) / 2**24


def test_plain_generator_gives_the_published_splitmix64_sequence() -> None:
    # The sequence of seed 1234567, as listed for reference implementations of SplitMix64.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [plain_mix((1234567 + step * GOLDEN) & MASK) for step in range(1, 5)] == expected


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3), (2**40 + 5, 1999), (2**63 - 1, 1)])
def test_uniform_equals_plain_integers(seed: int, epoch: int) -> None:
    sample = torch.tensor([0, 1, 5, 1_281_166, 2**33 + 1])
    view = torch.tensor([0, 1, 11, 2, 0])
    for operation in (Operation.CROP_SHAPE, Operation.NEIGHBOUR):
        drawn = uniform(seed, epoch, operation, sample, view, count=9)
        expected = [
            [plain_uniform(seed, epoch, int(operation), s, v, lane) for lane in range(9)]
            for s, v in zip(sample.tolist(), view.tolist(), strict=True)
        ]
        assert drawn.dtype is torch.float32
        assert drawn.tolist() == expected


def test_a_draw_does_not_depend_on_its_batch() -> None:
    sample = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    together = uniform(1, 2, Operation.FLIP, sample, 3, count=4)
    for size in (1, 7, 100):
        parts = [uniform(1, 2, Operation.FLIP, part, 3, count=4) for part in sample.split(size)]
        assert torch.equal(torch.cat(parts), together)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    assert torch.equal(uniform(1, 2, Operation.FLIP, sample[order], 3, count=4), together[order])
    assert torch.equal(uniform(1, 2, Operation.FLIP, sample, torch.full_like(sample, 3), count=4), together)
    # More lanes do not change the first ones.
    assert torch.equal(uniform(1, 2, Operation.FLIP, sample, 3, count=9)[:, :4], together)


def test_streams_differ_by_each_of_their_words() -> None:
    sample = torch.arange(2000)
    streams = [uniform(0, 0, operation, sample) for operation in Operation]
    streams += [uniform(seed, 0, Operation.FLIP, sample) for seed in (1, 2)]
    streams += [uniform(0, epoch, Operation.FLIP, sample) for epoch in (1, 2)]
    streams += [uniform(0, 0, Operation.FLIP, sample, view) for view in (1, 2)]
    streams += [uniform(0, 0, Operation.FLIP, sample, count=2)[:, 1:]]
    correlation = torch.corrcoef(torch.cat(streams, dim=1).T.double())
    correlation.fill_diagonal_(0)
    # 2000 independent pairs correlate with a standard deviation of 1 / sqrt(2000) = 0.022.
    assert float(correlation.abs().max()) < 5 * 0.0224
    # Words must not be interchangeable: epoch 1 of view 0 is not epoch 0 of view 1.
    assert not torch.equal(uniform(0, 1, Operation.FLIP, sample), uniform(0, 0, Operation.FLIP, sample, 1))
    assert not torch.equal(uniform(1, 0, Operation.FLIP, sample), uniform(0, 1, Operation.FLIP, sample))


@pytest.mark.parametrize("across", ["samples", "views", "epochs", "lanes"])
def test_draws_are_uniform_and_uncorrelated_along_every_axis(across: str) -> None:
    number, zero = torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)
    if across == "samples":
        x = uniform(0, 0, Operation.JITTER, number)[:, 0]
    elif across == "views":
        x = uniform(0, 0, Operation.JITTER, zero, number)[:, 0]
    elif across == "epochs":
        x = torch.cat([uniform(0, epoch, Operation.JITTER, zero[:1])[0] for epoch in range(4000)])
    else:
        x = uniform(0, 0, Operation.JITTER, zero[:1], count=20_000)[0]
    x = x.double()
    error = 1 / len(x) ** 0.5
    assert float(x.min()) >= 0 and float(x.max()) < 1
    assert abs(float(x.mean()) - 1 / 2) < 4 * error * (1 / 12) ** 0.5
    assert abs(float(x.var()) - 1 / 12) < 4 * error * (1 / 180) ** 0.5
    assert abs(float(torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1])) < 4 * error
    assert kstest(x.numpy(), "uniform").pvalue > 0.01


def test_permutation_visits_every_sample_once_in_an_order_of_its_epoch() -> None:
    orders = [permutation(seed, epoch, 997) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in orders:
        assert order.dtype is torch.int64
        assert sorted(order.tolist()) == list(range(997))
    for first in range(len(orders)):
        for second in range(first):
            # A random pair of permutations agrees in one place on average.
            assert int((orders[first] == orders[second]).sum()) < 8
    assert torch.equal(permutation(1, 2, 997), orders[-1])


def test_permutation_sorts_by_48_random_bits() -> None:
    bits = [
        plain_uniform(3, 4, int(Operation.ORDER), sample, 0, 0) * 2**48
        + plain_uniform(3, 4, int(Operation.ORDER), sample, 0, 1) * 2**24
        for sample in range(200)
    ]
    assert permutation(3, 4, 200).tolist() == sorted(range(200), key=bits.__getitem__)
