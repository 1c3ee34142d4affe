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
        fine = torch.isfinite(loss.detach()) | (self._first_bad >= 0)
        self._first_bad = torch.where(fine, self._first_bad, step)

    def check(self) -> None:
        """Raise DivergenceError naming the first bad step. Sync point: only on logging steps and before saving."""
        step = int(self._first_bad)
        if step >= 0:
            raise DivergenceError(
                f"the loss is not finite at step {step}; the last good state is kept. "
                "Lower the learning rate, set optimizer.clip_grad=1.0 or use --precision fp32"
            )
