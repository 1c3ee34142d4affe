"""Functions run by several processes at once, as torchrun would start them; a hung or failed one fails the test."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mimref.distributed.group import leave_process_group

TIMEOUT_S = 120
# Importing these takes seconds: one process does it, and all others are forked from it.
PRELOADED = ["tests.preloaded"]


def fork_server() -> ForkServerContext:
    """Return the context whose processes start with the package imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start_processes(function: Callable[..., None], arguments: list[tuple[Any, ...]]) -> list[ForkServerProcess]:
    """Start a process that calls `function(*args)` for each of `arguments`, with the package already imported.

    They get nothing of this process but its environment. `function` must be importable by its name.
    """
    context = fork_server()
    environment = dict(os.environ)
    processes = [context.Process(target=_call, args=(environment, function, args)) for args in arguments]
    for process in processes:
        process.start()
    return processes


def _call(environment: dict[str, str], function: Callable[..., None], args: tuple[Any, ...]) -> None:
    # A fork has the environment with which the first process was started.
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    # Loaders start by the default method, as under torchrun; otherwise they would be forked from the fork server, too.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    function(*args)


def run_ranks(function: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """Return what `function(*args)` returns on each of `world` ranks of a gloo group; `function` must be importable."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = start_processes(_rank, [(rank, world, str(folder), function, args) for rank in range(world)])
    deadline = time.monotonic() + TIMEOUT_S
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not errors, errors[0]
    assert not hung, f"ranks {hung} did not end within {TIMEOUT_S} s"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["TEST_RANK"] = str(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT_S / 2),
    )
    try:
        torch.save(function(*args), f"{folder}/{rank}.pt")
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise
    leave_process_group()
