"""The process group that torchrun starts: ranks, launches, and what happens when a process dies."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

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
        with lost_ranks_reported(advice):
            yield dist.get_rank()
    finally:
        leave_process_group()


@contextmanager
def lost_ranks_reported(advice: str) -> Iterator[None]:
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


def end_group() -> bool:
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
