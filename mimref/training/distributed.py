"""Several processes on one job, as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from mimref.errors import ConfigError


@contextmanager
def process_group(device: str) -> Iterator[int]:
    """Join the process group that torchrun's environment describes; this process's rank, 0 when it is alone.

    On CUDA every process gets the GPU of its local rank. device: `auto`, `cpu`, `cuda` or `mps`. Raises ConfigError for
    more processes on this machine than it has GPUs.
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
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()
