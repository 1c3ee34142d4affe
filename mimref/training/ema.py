"""Exponential moving average of weights."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mimref.distributed.sharding import Sharded, like, local


class WeightAverage:
    """Average of a module's parameters: `average = decay * average + (1 - decay) * weights` per update.

    Frozen parameters are copied once; all others are updated in one fused operation. Every update copies BatchNorm's
    statistics.
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

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the averaged module."""
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state from `state_dict`."""
        self.module.load_state_dict(state)

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)
        for average, current in self._statistics:
            average.copy_(current)


class ShardedAverage:
    """Average of a sharded module: each rank averages its parts. Untrained parameters have no average of their own."""

    def __init__(self, sharded: Sharded, decay: float) -> None:
        self.sharded, self.decay = sharded, decay
        trained = [(name, weight) for name, weight in sharded.module.named_parameters() if weight.requires_grad]
        self._averages = {name: weight.detach().clone() for name, weight in trained}
        self._weights = [weight for _, weight in trained]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The averages and, for untrained parameters, the weights themselves, by name."""
        return self.sharded.weights | self._averages

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the averaged module would have."""
        return self.sharded.module.state_dict() | self._averages

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state from `state_dict`, or from a run without shards."""
        for name, average in self._averages.items():
            average.copy_(like(state[name], average))

    def update(self) -> None:
        """Update the averages with the current weights."""
        # FSDP may replace the memory of a weight, so its part is looked up each time.
        averages = list(map(local, self._averages.values()))
        torch._foreach_lerp_(averages, list(map(local, self._weights)), 1 - self.decay)


def _statistics(module: nn.Module) -> list[Tensor]:
    """Return BatchNorm's running statistics, which are already averages."""
    norms = (each for each in module.modules() if isinstance(each, nn.modules.batchnorm._NormBase))
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
