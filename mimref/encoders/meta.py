"""Building timm's models on the meta device."""

from collections.abc import Iterable
from contextlib import ContextDecorator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class RatesOnCpu(TorchFunctionMode, ContextDecorator):
    """Context manager and decorator that lets timm before 1.0.22 build models on the meta device.

    Its constructors read the stochastic-depth rates from a `linspace`, and the values of meta tensors cannot be read.
    """

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Where timm names a device itself, the linspace becomes part of a tensor on that device.
        if func is torch.linspace and "device" not in kwargs:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)
