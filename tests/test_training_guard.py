"""The finite-loss guard: which step it names, and that watching does not wait for the device."""

import math

import pytest
import torch

from mimref.errors import DivergenceError
from mimref.training.job import FiniteLoss


def test_a_finite_run_passes() -> None:
    guard = FiniteLoss(torch.device("cpu"))
    for step in range(1, 6):
        guard.watch(torch.tensor(1e30 * step), step)
        guard.check()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_step_is_named_even_after_better_and_worse_ones(bad: float) -> None:
    guard = FiniteLoss(torch.device("cpu"))
    losses = [0.5, 0.4, bad, 0.3, math.nan, 0.2]
    for step, loss in enumerate(losses, start=11):
        guard.watch(torch.tensor(loss, requires_grad=True), step)
    for _ in range(2):
        with pytest.raises(DivergenceError, match=r"not finite at step 13; .*clip_grad=1\.0.*fp32"):
            guard.check()


def test_a_bad_first_step_counts() -> None:
    guard = FiniteLoss(torch.device("cpu"))
    guard.watch(torch.tensor(math.nan), 0)
    guard.watch(torch.tensor(math.nan), 1)
    with pytest.raises(DivergenceError, match="at step 0;"):
        guard.check()


def test_watching_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = FiniteLoss(torch.device("cpu"))

    def refuse(*_: object) -> None:
        raise AssertionError("a sync")

    with monkeypatch.context() as patched:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            patched.setattr(torch.Tensor, name, refuse)
        with pytest.raises(AssertionError, match="a sync"):
            guard.check()
        guard.watch(torch.tensor(math.nan), 4)
    with pytest.raises(DivergenceError):
        guard.check()


def test_the_meta_device_has_no_values_to_read() -> None:
    # Any operation that needs a value fails on the meta device, however it reads the value.
    guard = FiniteLoss(torch.device("meta"))
    guard.watch(torch.empty((), device="meta"), 1)
