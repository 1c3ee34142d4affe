"""Exponential moving average of weights."""

import copy

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average of a module's parameters, `average = decay * average + (1 - decay) * weights` per update.

    Frozen parameters are copied once; all others are updated by one fused operation. BatchNorm's statistics are copied.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        pairs = zip(self.module.parameters(), module.parameters(), strict=True)
        trained = [(average, weight) for average, weight in pairs if weight.requires_grad]
        self._averages: list[Tensor] = [average for average, _ in trained]
        # Detached views of the weights: they follow the optimizer, which writes in place.
        self._weights: list[Tensor] = [weight.detach() for _, weight in trained]
        statistics = zip(_statistics(self.module), _statistics(module), strict=True)
        self._statistics: list[tuple[Tensor, Tensor]] = list(statistics)

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)
        for average, current in self._statistics:
            average.copy_(current)


def _statistics(module: nn.Module) -> list[Tensor]:
    """BatchNorm's running ones, which are averages already."""
    norms = (each for each in module.modules() if isinstance(each, nn.modules.batchnorm._NormBase))
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
