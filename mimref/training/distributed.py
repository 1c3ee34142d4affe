"""Several processes on one run, as torchrun starts them: who they are, and what they tell each other.

Shapes: R ranks; B images of all ranks, of which rank r holds a contiguous part of B_r.
"""

import inspect
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from mimref.errors import ConfigError, LostRankError

# How gloo and NCCL say that they wait in vain.
_SIGNS_OF_A_LOST_RANK = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
# A rank that waits longer for another takes it for dead. The slowest honest wait is for rank 0 to save or to evaluate.
TIMEOUT = timedelta(minutes=10)


@contextmanager
def process_group(device: str, *, advice: str = "run it again: what was computed and kept is used") -> Iterator[int]:
    """Join the process group that torchrun's environment describes; this process's rank, 0 when it is alone.

    On CUDA every process gets the GPU of its local rank. device: `auto`, `cpu`, `cuda` or `mps`. Raises ConfigError for
    more processes on this machine than it has GPUs, and LostRankError with the advice when another process is gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available():
        yield 0
        return
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda:
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise ConfigError(f"process {local + 1} on this machine has no GPU of its own: there are {count}")
        torch.cuda.set_device(local)
    # gloo carries what the hosts tell each other, so that it costs no wait for the GPU.
    store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
    # Processes that torchrun has started again must not find the addresses of those before them.
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]  # documented, but not exported for mypy
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        with lost_ranks_told(advice):
            yield dist.get_rank()
    finally:
        leave_process_group()


@contextmanager
def lost_ranks_told(advice: str) -> Iterator[None]:
    """Turn what collectives raise when another process is gone into a LostRankError."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if world_size() == 1 or not any(sign in text for sign in _SIGNS_OF_A_LOST_RANK):
            raise
        waited = "Timed out" in text or "timeout" in text.lower()
        what = f"has not answered for {_minutes(TIMEOUT)}" if waited else "has died"
        raise LostRankError(f"another process of this run {what}; its own message tells why; {advice}") from error


def _minutes(time: timedelta) -> str:
    seconds = time.total_seconds()
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds"


def restarted() -> bool:
    """Whether torchrun has started this process again, after one of the run's processes had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def this_launch() -> tuple[str, str, int] | None:
    """What tells a launch of torchrun from others: its id, and where it runs as which process; None without one."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run_id is None else (run_id, platform.node(), os.getppid())


def is_this_launch(run_id: str, node: str, process: int) -> bool:
    """Whether `this_launch` has told this before, maybe on a machine from which torchrun moved the first rank."""
    own = this_launch()
    # Without a name of its own every launch is called "none".
    return own is not None and run_id == own[0] and (process == own[2] if node == own[1] else run_id != "none")


def leave_process_group() -> None:
    """What follows is this process's own work."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """What runs inside is this process's own work, even in a process group."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def first_alone() -> bool:
    """End the work together: rank 0, for which this is true, goes on by itself."""
    rank = own_rank()
    leave_process_group()
    return rank == 0


def world_size() -> int:
    """Number of processes that work together, 1 without a process group."""
    joined = not _alone and dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if joined else 1


def own_rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def share(count: int, rank: int, world: int) -> slice:
    """The contiguous part of `count` things that a rank works on; parts differ by one at most."""
    return slice(count * rank // world, count * (rank + 1) // world)


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
