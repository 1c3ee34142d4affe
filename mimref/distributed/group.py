"""The process group that torchrun starts: ranks, launches, and lost processes."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from mimref.errors import ConfigError, LostRankError

# Found in the messages of gloo and NCCL when another process is gone.
_SIGNS_OF_A_LOST_RANK = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
# Found in NCCL's messages when another process is at fault; without any of them, NCCL has failed in this process.
_SIGNS_OF_ANOTHER = ("remote", "abort", "timed out", "timeout", "closed", "reset by peer")
# After this long without an answer, a rank counts as dead. The longest normal wait is for rank 0 to save or evaluate.
TIMEOUT = timedelta(minutes=10)


@contextmanager
def process_group(device: str, *, advice: str = "run again: cached features are reused") -> Iterator[int]:
    """Join the process group that torchrun's environment describes; yield this process's rank, 0 without torchrun.

    On CUDA every process uses the GPU of its local rank. device: `auto`, `cpu`, `cuda` or `mps`. Raises ConfigError
    if a machine has more processes than GPUs or NCCL fails, LostRankError with `advice` if another process is gone
    or cannot be reached.
    """
    global _abandoned
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available():
        yield 0
        return
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda:
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise ConfigError(f"process {local + 1} on this machine has no GPU; start at most {gpus} processes")
        torch.cuda.set_device(local)
    _join("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        with lost_ranks_reported(advice):
            yield dist.get_rank()
    except BaseException:
        _abandoned = cuda and dist.is_initialized()
        raise
    finally:
        leave_process_group()


def _join(backend: str) -> None:
    try:
        store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
        # Restarted processes must not find the addresses of the ones they replace.
        attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]  # documented, but not exported for mypy
        # CPU tensors are exchanged by gloo, so that they never wait for the GPU.
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        place = ":".join(os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).partition("\n")[0]
        raise LostRankError(f"the processes of this run do not find each other at {place} ({reason})") from error


_abandoned = False


def abandoned() -> bool:
    """Return whether this process has failed in a group on GPUs and must exit at once.

    Even when Python exits, NCCL leaves a group only together with the other processes, which may wait for this one.
    """
    return _abandoned


@contextmanager
def lost_ranks_reported(advice: str) -> Iterator[None]:
    """Raise LostRankError if a collective fails because another process is gone, ConfigError if NCCL itself fails."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if world_size() == 1 or not any(sign in text for sign in _SIGNS_OF_A_LOST_RANK):
            raise
        if "creating shared memory segment" in text:
            free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
            raise ConfigError(
                f"NCCL needs more shared memory than the {free / 1e6:.0f} MB that are free in /dev/shm; start the "
                "container with a larger --shm-size, or set NCCL_SHM_DISABLE=1"
            ) from error
        if "NCCL" in text and not any(sign in text.lower() for sign in _SIGNS_OF_ANOTHER):
            reason = text.rpartition("Last error:")[2].strip().partition("\n")[0]
            raise ConfigError(f"NCCL failed: {reason}; for details, set NCCL_DEBUG=INFO") from error
        waited = "Timed out" in text or "timeout" in text.lower()
        what = f"has not answered for {TIMEOUT.total_seconds() / 60:g} minutes" if waited else "has died"
        raise LostRankError(f"another process of this run {what}; see its own message; {advice}") from error


def this_launch() -> tuple[str, str, int] | None:
    """Return what identifies this launch of torchrun: its id, machine and process id; None without torchrun."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run_id is None else (run_id, platform.node(), os.getppid())


def restarted(run_id: str, node: str, process: int) -> bool:
    """Return whether torchrun has restarted this process in the launch that `this_launch` returned earlier.

    Since then, torchrun may have moved rank 0 to another machine.
    """
    own = this_launch()
    if own is None or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    # torchrun's default id is "none".
    return run_id == own[0] and (process == own[2] if node == own[1] else run_id != "none")


_left: list[object] = []
"""Groups that this process has left, kept alive until it exits.

With torch 2.6, dropping the last reference to a group joins gloo's threads while holding Python's lock. One of these
threads may still be waiting for that lock, to free the tensors of the last collective.
"""


def leave_process_group() -> None:
    """Leave the group; from then on, this process works alone."""
    if dist.is_available() and dist.is_initialized():
        _left.append(dist.group.WORLD)
        if not _abandoned:
            dist.destroy_process_group()


_outside = False


@contextmanager
def without_group() -> Iterator[None]:
    """Work alone inside the block, without collectives, even in a process group."""
    global _outside
    before, _outside = _outside, True
    try:
        yield
    finally:
        _outside = before


def end_group() -> bool:
    """Leave the group and return whether this is rank 0, which continues alone."""
    first = own_rank() == 0
    leave_process_group()
    return first


def world_size() -> int:
    """Return the number of processes in the group, 1 without one."""
    joined = not _outside and dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if joined else 1


def own_rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def share(count: int, rank: int, world: int) -> slice:
    """Return the contiguous part of `count` items that a rank works on; parts differ in size by at most one."""
    return slice(count * rank // world, count * (rank + 1) // world)


def share_chunks(count: int, chunk: int) -> list[slice]:
    """Return each rank's part of `count` items, in order of rank; parts are whole chunks, except at the end."""
    chunks, ranks = -(-count // chunk), world_size()
    parts = [share(chunks, rank, ranks) for rank in range(ranks)]
    return [slice(min(count, part.start * chunk), min(count, part.stop * chunk)) for part in parts]
