"""Functions run by several processes at once, as torchrun would start them; a hung or failed one fails the test."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 120


def run_ranks(function: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """What `function(*args)` returns on each of `world` ranks of a gloo group; it must be importable by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, world, str(folder), function, args)) for rank in range(world)]
    for process in ranks:
        process.start()
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
    torch.set_num_threads(1)
    # torchrun's processes start their loaders as any process does; those of a spawned one would be spawned.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
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
    if dist.is_initialized():
        dist.destroy_process_group()
