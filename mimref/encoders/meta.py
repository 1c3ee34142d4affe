"""Building timm's models on the meta device."""

from collections.abc import Iterable
from contextlib import ContextDecorator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class RatesOnCpu(TorchFunctionMode, ContextDecorator):
    """Lets timm before 1.0.22 build models on the meta device.

    Its constructors read the rates of stochastic depth from a linspace, and values of meta tensors cannot be read.
    """

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Where timm names a device, the linspace becomes part of a tensor on it.
        if func is torch.linspace and "device" not in kwargs:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)
