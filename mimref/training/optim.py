"""AdamW, and the one place where a learning rate is computed."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn


def learning_rate(update: int, *, peak: float, warmup_updates: int, total_updates: int, end: float) -> float:
    """Return the learning rate of an update (0-based): linear warm-up, then cosine decay.

    During warm-up, update u uses `peak * (u + 1) / (warmup_updates + 1)`. Afterwards a cosine falls from `peak` towards
    `end`, which the last update nearly reaches.
    """
    if update < warmup_updates:
        return peak * (update + 1) / (warmup_updates + 1)
    position = (update - warmup_updates) / max(1, total_updates - warmup_updates)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, position)))


def warmup_cosine(*, peak: float, warmup_updates: int, total_updates: int, end: float) -> Callable[[int], float]:
    """Return `learning_rate` as a function of the update."""
    return partial(learning_rate, peak=peak, warmup_updates=warmup_updates, total_updates=total_updates, end=end)


def warmup_length(warmup_epochs: float | None, epochs: int) -> float:
    """Return the epochs of warm-up: unless set, the paper's 4 (Table 10), or a fifth of the epochs if that is less."""
    return min(4.0, epochs / 5) if warmup_epochs is None else warmup_epochs


def warmup_updates(warmup_epochs: float | None, epochs: int, updates_per_epoch: int) -> int:
    """Return the number of warm-up updates, see `warmup_length`."""
    return round(warmup_length(warmup_epochs, epochs) * updates_per_epoch)


def module_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW groups of heads or a decoder, at the full rate; vectors and `no_decay_names` are not decayed."""
    decayed: dict[str, Any] = {"params": [], "names": [], "lr_scale": 1.0, "weight_decay": weight_decay}
    plain: dict[str, Any] = {"params": [], "names": [], "lr_scale": 1.0, "weight_decay": 0.0}
    undecayed: frozenset[str] = getattr(module, "no_decay_names", frozenset())
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            group = plain if parameter.ndim <= 1 or name in undecayed else decayed
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in (decayed, plain) if group["params"]]


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """Return AdamW, fused on CUDA and `foreach` elsewhere; learning rates are set before every update."""
    # Fused updates are also faster on the CPU, but round differently: published numbers were measured without them.
    fused = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=fused or None, foreach=None if fused else True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group to `rate` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
