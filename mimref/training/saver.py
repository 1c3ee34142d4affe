"""Writing the states of a sharded run in the background while training continues."""

import shutil
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mimref.distributed.group import TIMEOUT
from mimref.distributed.sharding import device_mesh, split
from mimref.errors import OutputError
from mimref.training.shards import staged, write_manifest, write_shards

_SLOWEST = timedelta(hours=2)
"""Longest time that a rank may take to write; the others wait for it in the background."""


class StateSaver:
    """Saves states that are divided among the ranks: each copies its part to the CPU and writes it in a thread.

    If one rank cannot write, all ranks raise the error the next time they save or wait.
    """

    def __init__(self, folder: Path, publish: Callable[[Path, int], None]) -> None:
        """folder: contains the states. publish: on rank 0, renames a complete folder to that of the state of a step.

        Call this on all ranks.
        """
        # Collectives from two threads must not share a group.
        self._group: Any = dist.new_group(backend="gloo", timeout=_SLOWEST)
        self._mesh = device_mesh(torch.device("cpu"))
        self._folder, self._publish = folder, publish
        # Otherwise the thread's copies would create a context on the first GPU for every process.
        self._gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the last state could not be written, as far as this rank knows yet."""
        return self._error is not None

    def save(self, state: Mapping[str, Any]) -> None:
        """Begin to save a state once the previous one is on disk. Call this on all ranks; raises like `wait`."""
        self.wait()
        rest, sharded = split(state)
        parts = staged(sharded, self._mesh)
        rest = _on_cpu(rest) if dist.get_rank() == 0 else {}
        self._thread = threading.Thread(target=self._run, args=(int(state["step"]), parts, rest), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last state is on disk. Raises OutputError, on all ranks, if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def settle(self) -> None:
        """Wait up to `TIMEOUT` for the last state; ignore its failure, as another error already ends the run."""
        if self._thread is not None:
            self._thread.join(TIMEOUT.total_seconds())

    def _run(self, step: int, parts: dict[str, Any], rest: Mapping[str, Any]) -> None:
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)
            self._write(step, parts, rest)
        except BaseException as error:
            self._error = error

    def _write(self, step: int, parts: dict[str, Any], rest: Mapping[str, Any]) -> None:
        first, temporary = dist.get_rank() == 0, self._folder / f".step{step:010}.shards.tmp"
        own: Any
        try:
            temporary.mkdir(exist_ok=True)
            own = write_shards(temporary, parts, rest, self._group)
        except Exception as error:
            own = error if isinstance(error, OutputError) else OutputError(f"cannot write {temporary}: {error}")
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, own, group=self._group)
        problem = next((each for each in found if isinstance(each, OutputError)), None)
        if first and problem is None:
            try:
                write_manifest(temporary, found)
                self._publish(temporary, step)
            except Exception as error:
                problem = error if isinstance(error, OutputError) else OutputError(f"cannot write {temporary}: {error}")
        verdict = [problem]
        dist.broadcast_object_list(verdict, group=self._group)
        if verdict[0] is not None:
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise verdict[0]


def _on_cpu(state: Any) -> Any:
    """Copy a state, so that training no longer changes it."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: _on_cpu(value) for key, value in state.items()}
    return list(map(_on_cpu, state)) if isinstance(state, list) else state
