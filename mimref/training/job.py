"""The order in which a training run updates, logs, checks, saves and stops."""

import time
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from mimref.data.loader import ViewBatch
from mimref.data.workers import DeadWorkerError
from mimref.distributed.collectives import agree
from mimref.errors import DataError, DivergenceError
from mimref.progress import Listener
from mimref.training.signals import StopSignal


class FiniteLoss:
    """Remembers on the device the first step whose loss was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def watch(self, loss: Tensor, step: int) -> None:
        """Note the loss of a step; no sync."""
        newly_bad = ~torch.isfinite(loss.detach()) & (self._first_bad < 0)
        # torch.where would copy the Python number to the device, and wait for it.
        self._first_bad.masked_fill_(newly_bad, step)

    def check(self) -> None:
        """Raise DivergenceError naming the first bad step. Sync point: only on logging steps and before saving."""
        step = int(self._first_bad)
        if step >= 0:
            raise DivergenceError(
                f"the loss is not finite at step {step}; the last good state is kept. "
                "Start again with a lower learning rate, optimizer.clip_grad=1.0 or --precision fp32"
            )


# Epochs can take hours. Saving takes at most about 5% of the time.
SAVE_EVERY_S = 600.0
SAVE_COST = 20.0
# Said among ranks in place of a signal's number; no signal that is caught has this one.
_DUE = 1


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

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Holds everything that is trained."""

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

    The state is saved after every epoch, every ten minutes and when a signal has come, never after a loss or with
    weights that are not finite. Raises DivergenceError for those, Interrupted after saving when a signal has come,
    DataError when a loader process dies.
    """
    with stop.deferred():
        try:
            _train(job, batches, stop, listener, log_every)
        except DeadWorkerError as error:
            raise DataError(
                f"{error.death}; the last saved state is kept: --resume continues, with fewer --workers if memory ran "
                "out"
            ) from error
    if stop.number is not None:
        stop.ignore_more()
        del batches  # ends the loader processes
    stop.raise_if_received(f"saved at step {job.step} of {job.total} ({job.label}); --resume continues")


def _train(job: Job, batches: Iterable[ViewBatch], stop: StopSignal, listener: Listener, log_every: int) -> None:
    """The loop itself, until all is done or a signal has come."""
    started = time.monotonic() - job.elapsed_s
    due = time.monotonic() + SAVE_EVERY_S
    for batch in batches:
        job.update(batch)
        job.step += 1
        if job.step % log_every == 0 or job.step == job.total:
            job.guard.check()
            job.write_log()
        listener.progress(job.label, job.step, job.total)
        epoch_done = job.step % job.steps_per_epoch == 0
        # All ranks save and stop at the same step, whichever of them is told to.
        wish = agree(stop.number or (_DUE if time.monotonic() >= due else 0))
        if not (epoch_done or wish):
            continue
        if wish > _DUE:
            stop.number = wish
            listener.note("stopping: the state is saved first; a second signal stops at once")
        job.guard.check()
        check_weights(job)
        if epoch_done:
            job.end_epoch(job.step // job.steps_per_epoch)
        before = time.monotonic()
        job.elapsed_s = before - started
        job.save()
        due = time.monotonic() + max(SAVE_EVERY_S, SAVE_COST * (time.monotonic() - before))
        wish = agree(stop.number or 0)
        if wish:
            stop.number = wish
            return


def check_weights(job: Job) -> None:
    """Raise DivergenceError when the last update broke the weights, which no later loss has shown yet. Sync point."""
    weights = [weight.detach() for group in job.optimizer.param_groups for weight in group["params"]]
    if not torch.stack(torch._foreach_norm(weights)).isfinite().all():
        raise DivergenceError(
            f"the weights are not finite after step {job.step} of {job.label}; the last good state is kept. "
            "Start again with a lower learning rate, optimizer.clip_grad=1.0 or --precision fp32"
        )
