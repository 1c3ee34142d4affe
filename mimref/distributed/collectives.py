"""What ranks exchange: sums, gathers with and without gradient, averaged gradients.

Shapes: R ranks; B images of all ranks, of which rank r holds a contiguous part of B_r.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimref.distributed.group import (
    world_size,
)


def averaged(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The module, starting from rank 0's weights, with gradients that are averaged over the ranks.

    Buffers are left to the module. What is frozen must be frozen already, and what is not must get a gradient.
    """
    # The option was renamed; heads synchronise their statistics by themselves.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    gpu = [torch.cuda.current_device()] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=gpu, gradient_as_bucket_view=True, **options)


def agree(number: int) -> int:
    """The largest of the numbers that the ranks say; on the host."""
    if world_size() == 1:
        return number
    told = torch.tensor(number)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return int(told)


def total(number: int) -> int:
    """The sum of the numbers that the ranks say; on the host."""
    if world_size() == 1:
        return number
    told = torch.tensor(number)
    dist.all_reduce(told)
    return int(told)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of equally shaped tensors of all ranks, without gradient."""
    x = x.detach()
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def gather_samples(sample_B: Tensor, most: int) -> list[Tensor]:
    """Sample indices of every rank, [(B_r,)] on the CPU; on the host. most: the most that any rank can have."""
    if world_size() == 1:
        return [sample_B]
    padded = torch.full((most,), -1, dtype=torch.int64)
    padded[: len(sample_B)] = sample_B
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return [part[part >= 0] for part in parts]


def gather_lists(items: Sequence[Any]) -> list[Any]:
    """The items of all ranks, in order of rank; on the host."""
    if world_size() == 1:
        return list(items)
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def gather_rows(x: Tensor, counts: Sequence[int], *, dim: int) -> Tensor:
    """Parts of all ranks joined along `dim`, of which rank r has counts[r]; without gradient."""
    if len(counts) == 1:
        return x.detach()
    return _join(_all_gather(_pad(x.detach(), max(counts), dim)), counts, dim)


def gather_rows_with_gradient(x: Tensor, counts: Sequence[int], *, dim: int) -> Tensor:
    """The same; each rank's part gets the gradients that all ranks have for it."""
    if len(counts) == 1:
        return x
    gathered: Tensor = _GatherWithGradient.apply(_pad(x, max(counts), dim))
    return _join(list(gathered.unbind(0)), counts, dim)


def gather_stack(x: Tensor) -> Tensor:
    """Equally shaped tensors of all ranks, (R, ...), with gradient."""
    stacked: Tensor = _GatherWithGradient.apply(x)
    return stacked


def _pad(x: Tensor, size: int, dim: int) -> Tensor:
    missing = size - x.shape[dim]
    if not missing:
        return x.contiguous()
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim=dim)


def _join(parts: Sequence[Tensor], counts: Sequence[int], dim: int) -> Tensor:
    return torch.cat([part.narrow(dim, 0, count) for part, count in zip(parts, counts, strict=True)], dim=dim)


def _all_gather(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return parts


class _GatherWithGradient(torch.autograd.Function):
    """All ranks' tensors as (R, ...); backward sums what every rank has to say about this rank's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.stack(_all_gather(x.contiguous()))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank()]
