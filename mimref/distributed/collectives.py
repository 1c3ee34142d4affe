"""Communication between ranks: sums, gathers with and without gradient, averaged gradients.

Shapes: R ranks; B images of all ranks, of which rank r holds a contiguous part of B_r.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mimref.distributed.group import world_size


def averaged(module: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a module to start from rank 0's weights and average gradients over ranks; a single process gets it as is.

    Buffers are not synchronised. Freeze parameters first; every other parameter must get a gradient.
    """
    if world_size() == 1:
        return module
    # torch has renamed the option. Heads synchronise their own statistics.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    gpu = [torch.cuda.current_device()] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=gpu, gradient_as_bucket_view=True, **options)


def max_over_ranks(number: int) -> int:
    """Return the largest of all ranks' numbers, on the host."""
    return _reduce(number, dist.ReduceOp.MAX)


def total_over_ranks(number: int) -> int:
    """Return the sum of all ranks' numbers, on the host."""
    return _reduce(number, dist.ReduceOp.SUM)


def barrier() -> None:
    """Wait for all ranks, on the host."""
    max_over_ranks(0)


def _reduce(number: int, operation: dist.ReduceOp.RedOpType) -> int:
    if world_size() == 1:
        return number
    reduced = torch.tensor(number)
    dist.all_reduce(reduced, op=operation)
    return int(reduced)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of all ranks' equally shaped tensors, without gradient."""
    x = x.detach()
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def gather_samples(sample_B: Tensor, most: int) -> list[Tensor]:
    """Return the sample indices of every rank, [(B_r,)], on the host. most: the largest B_r that a rank can have."""
    if world_size() == 1:
        return [sample_B]
    padded = torch.full((most,), -1, dtype=torch.int64)
    padded[: len(sample_B)] = sample_B
    gathered = padded.new_empty(world_size() * most)
    dist.all_gather_into_tensor(gathered, padded)
    return [part[part >= 0] for part in gathered.view(world_size(), most)]


def gather_lists(items: Sequence[Any]) -> list[Any]:
    """Return all ranks' items in order of rank, on the host."""
    if world_size() == 1:
        return list(items)
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def gather_rows(x: Tensor, counts: Sequence[int], *, dim: int) -> Tensor:
    """Concatenate all ranks' parts along `dim`, counts[r] rows from rank r, without gradient."""
    return gather_rows_with_gradient(x.detach(), counts, dim=dim)


def gather_rows_with_gradient(x: Tensor, counts: Sequence[int], *, dim: int) -> Tensor:
    """Like `gather_rows`, but each rank's part gets the sum of its gradients on all ranks."""
    if len(counts) == 1:
        return x
    missing = max(counts) - x.shape[dim]
    padded = F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing]) if missing else x
    parts = zip(gather_stack(padded), counts, strict=True)
    return torch.cat([part.narrow(dim, 0, count) for part, count in parts], dim=dim)


def gather_stack(x: Tensor) -> Tensor:
    """Stack all ranks' equally shaped tensors, (R, ...), with gradient."""
    if world_size() == 1:
        return x[None]
    stacked: Tensor = _GatherWithGradient.apply(x)
    return stacked


class _GatherWithGradient(torch.autograd.Function):
    """All-gather; its backward pass sums all ranks' gradients of this rank's tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered = x.new_empty(dist.get_world_size(), *x.shape)
        dist.all_gather_into_tensor(gathered.view(-1), x.reshape(-1))
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank()]
