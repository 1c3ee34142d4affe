"""Random numbers as a function of their purpose, never of the process that draws them.

Every draw is a hash of (seed, epoch, operation, sample index, view), so augmentations and nearest-neighbour choices are
the same on every device and for any number of workers, ranks and micro-batches, and a resumed run needs no saved
generator state. The hash is SplitMix64's finalizer, applied once per word.
"""

import enum
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

# torch has no arithmetic on unsigned 64-bit integers, so the hash's constants are written as signed ones.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


class Operation(enum.IntEnum):
    """Purpose of a random number; each has its own stream."""

    ORDER = 1
    CROP_SHAPE = 2
    CROP_PLACE = 3
    FLIP = 4
    JITTER = 5
    GRAY = 6
    BLUR = 7
    SOLARIZE = 8
    NEIGHBOUR = 9
    MASK = 10
    DROP_PATH = 11
    RAND_AUGMENT = 12
    ERASE = 13
    MIX = 14
    CORRUPTION = 15
    MOSAIC = 31


def _shift_right(word: Tensor, bits: int) -> Tensor:
    # torch's shift of signed integers copies the sign bit; the mask clears the copies.
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _mix(word: Tensor) -> Tensor:
    word = (word ^ _shift_right(word, 30)) * _MIX_1
    word = (word ^ _shift_right(word, 27)) * _MIX_2
    return word ^ _shift_right(word, 31)


def uniform(
    seed: int, epoch: int, operation: Operation, sample_N: Tensor, view_N: Tensor | int = 0, *, count: int = 1
) -> Tensor:
    """Draw `count` independent uniform numbers in [0, 1) for every (sample, view) pair.

    sample_N, view_N: int64, on any device. Returns (N, count) float32 with 24 random bits each.
    """
    word_N = torch.zeros_like(sample_N)
    for part in (seed, epoch, int(operation), sample_N, view_N):
        word_N = _mix((word_N ^ part) + _GOLDEN)
    lane_C = torch.arange(1, count + 1, device=sample_N.device) * _GOLDEN
    bits_NC = _shift_right(_mix(word_N[:, None] + lane_C), 40)
    return bits_NC.to(torch.float32) * 2.0**-24


def seeds(seed: int, epoch: int, operation: Operation, sample_N: Tensor) -> list[int]:
    """Return a 32-bit number for every sample, to seed other generators."""
    # 24 bits each: two numbers make the 32 bits that NumPy takes.
    drawn = uniform(seed, epoch, operation, sample_N, count=2).double().tolist()
    return [int(high * 2**24) << 8 | int(low * 2**8) for high, low in drawn]


@contextmanager
def global_generators(number: int) -> Iterator[None]:
    """Inside the block, seed the generators of `random` and NumPy, which timm uses, with `number`."""
    states = random.getstate(), np.random.get_state()
    random.seed(number)
    np.random.seed(number)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def seeded(seed: int, epoch: int, operation: Operation, sample: int) -> Iterator[int]:
    """Run `global_generators` with a seed that depends only on the arguments; yields the seed."""
    (number,) = seeds(seed, epoch, operation, torch.tensor([sample]))
    with global_generators(number):
        yield number


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """Return the order in which an epoch visits `size` samples: (size,) int64."""
    # Two words make ties, which argsort would break by position, all but impossible.
    bits = uniform(seed, epoch, Operation.ORDER, torch.arange(size), count=2).to(torch.float64)
    return torch.argsort(bits[:, 0] + bits[:, 1] * 2.0**-24, stable=True)
