"""Stops a run whose loss is no longer finite, without a device sync per step."""

import torch
from torch import Tensor

from mimref.errors import DivergenceError


class FiniteLoss:
    """Remembers on the device the first step whose loss was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def watch(self, loss: Tensor, step: int) -> None:
        """Note the loss of a step; no sync."""
        newly_bad = ~torch.isfinite(loss.detach()) & (self._first_bad < 0)
        # torch.where would copy the Python number to the device, and wait for it.
        self._first_bad.masked_fill_(newly_bad, step)

    def check(self) -> None:
        """Raise DivergenceError naming the first bad step. Sync point: only on logging steps and before saving."""
        step = int(self._first_bad)
        if step >= 0:
            raise DivergenceError(
                f"the loss is not finite at step {step}; the last good state is kept. "
                "Start again with a lower learning rate, optimizer.clip_grad=1.0 or --precision fp32"
            )
