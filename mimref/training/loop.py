"""The order in which a training run updates, logs, checks, saves and stops."""

import time
from collections.abc import Iterable
from typing import Protocol

from mimref.data.loader import ViewBatch
from mimref.training.guard import FiniteLoss
from mimref.training.runlog import Listener
from mimref.training.state import StopSignal


class Job(Protocol):
    """One training stage: its position, and what to do at each occasion."""

    label: str
    step: int
    """Updates of the stage that are done."""
    total: int
    """Updates of the whole stage."""
    steps_per_epoch: int
    elapsed_s: float
    guard: FiniteLoss

    def update(self, batch: ViewBatch) -> None:
        """Train on one batch, without a device sync."""

    def write_log(self) -> None:
        """Log the last update."""

    def end_epoch(self, epoch: int) -> None:
        """Monitor the encoder; `epoch` of the stage's epochs are done."""

    def save(self) -> None:
        """Write the state from which `--resume` continues."""


def train(job: Job, batches: Iterable[ViewBatch], stop: StopSignal, listener: Listener, *, log_every: int) -> None:
    """Go through a stage's remaining batches.

    The state is saved after every epoch and when a signal has come, never after a loss that is not finite. Raises
    DivergenceError for such a loss, Interrupted after saving when a signal has come.
    """
    started = time.monotonic() - job.elapsed_s
    for batch in batches:
        job.update(batch)
        job.step += 1
        job.elapsed_s = time.monotonic() - started
        if job.step % log_every == 0 or job.step == job.total:
            job.guard.check()
            job.write_log()
        listener.progress(job.label, job.step, job.total)
        epoch_done = job.step % job.steps_per_epoch == 0
        if epoch_done:
            job.guard.check()
            job.end_epoch(job.step // job.steps_per_epoch)
        if epoch_done or stop.number is not None:
            job.guard.check()
            job.save()
            stop.raise_if_received(f"saved at step {job.step} of {job.total} ({job.label}); --resume continues")
