"""Exponential moving average of weights."""

import copy

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average of a module's parameters, `average = decay * average + (1 - decay) * weights` per update.

    Frozen parameters are copied once; all others take part in one fused update.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        pairs = zip(self.module.parameters(), module.parameters(), strict=True)
        self._pairs = [(average, weight) for average, weight in pairs if weight.requires_grad]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        averages: list[Tensor] = [average for average, _ in self._pairs]
        weights: list[Tensor] = [weight.detach() for _, weight in self._pairs]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)
