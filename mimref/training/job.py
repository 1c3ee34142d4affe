"""A resumable training job: the loop, and the update step of jobs trained by gradient descent.

`train` trains heads, encoders, masked autoencoders, probes and decoders alike. It fixes the order of updating, logging,
checking, saving and stopping.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mimref.config.run import OptimizerConfig
from mimref.data.loader import ViewBatch
from mimref.data.workers import DeadWorkerError
from mimref.distributed.collectives import max_over_ranks, total_over_ranks
from mimref.distributed.group import world_size
from mimref.distributed.sharding import all_finite, clip_gradients, is_sharded
from mimref.errors import DataError, DivergenceError, Interrupted
from mimref.progress import Listener
from mimref.training.optim import adamw, set_learning_rate
from mimref.training.signals import StopSignal

# Epochs can take hours, or less time than a save. Saving takes at most about 5% of the time.
SAVE_EVERY_S = 600.0
SAVE_COST = 20.0
# Exchanged between ranks in place of a signal's number when a save is due; no caught signal has this number.
_DUE = 1
_STOPPING = "stopping: saving the state first; a second signal stops at once"

Batch = TypeVar("Batch")


class Job(ABC, Generic[Batch]):
    """Something that is trained batch by batch, with hooks for every event of the loop; `train` runs it."""

    label: str
    """Name of the job in progress bars."""
    total: int
    """Number of updates in the whole job."""
    steps_per_epoch: int
    saves_every_epoch = True
    """Whether the state is saved after epochs as well, and not only every ten minutes."""
    step = 0
    """Updates done."""
    elapsed_s = 0.0

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Train on one batch, without a device sync."""

    def check(self) -> None:
        """Raise DivergenceError if the loss was not finite. Sync point."""

    def check_weights(self) -> None:
        """Raise DivergenceError if the last update broke the weights, which no loss has shown yet. Sync point."""

    def write_log(self) -> None:
        """Log the last update."""

    def end_epoch(self, epoch: int) -> None:
        """Monitor the trained model after `epoch` epochs of this job."""

    def save(self) -> None:
        """Write the state from which `--resume` continues, or begin to write it in the background."""

    def finish_saving(self) -> None:
        """Wait until the last state is on disk."""

    @property
    def save_failed(self) -> bool:
        """Whether the last state could not be written; another `save` then raises the error on all ranks."""
        return False


def train(
    job: Job[Batch],
    batches: Iterable[Batch],
    listener: Listener,
    *,
    stop: StopSignal | None = None,
    log_every: int | None = None,
) -> None:
    """Run a job's remaining batches.

    The state is saved after epochs and every ten minutes, as long as saving takes at most about 5% of the time; and at
    the end and on a signal; but never if the loss or the weights are not finite. A single process also saves when a
    loader process dies or hangs. stop: catches signals, and makes all ranks save and stop at the same step; without it,
    signals stop the work where they arrive, and no other rank is involved. Raises DivergenceError, DataError if a
    loader process dies or hangs, and Interrupted after saving on a signal.
    """
    if stop is None:
        _run(job, batches, listener, None, log_every)
        job.finish_saving()
        return
    with stop.deferred():
        try:
            _run(job, batches, listener, stop, log_every)
            job.finish_saving()
        except DeadWorkerError as error:
            raise DataError(
                f"{error.death}; the last saved state is intact: continue with --resume; {error.advice}"
            ) from error
    if stop.number is not None:
        stop.ignored = True
        del batches  # stops the loader processes
        raise Interrupted(stop.number, f"saved at step {job.step} of {job.total} ({job.label}); --resume continues")


def _run(
    job: Job[Batch], batches: Iterable[Batch], listener: Listener, stop: StopSignal | None, log_every: int | None
) -> None:
    """Run the loop until all updates are done or a signal arrives."""
    started = time.monotonic() - job.elapsed_s
    epoch_due = time.monotonic()
    due = epoch_due + SAVE_EVERY_S

    def save() -> None:
        job.elapsed_s = time.monotonic() - started
        job.save()

    coming = iter(batches)
    while (batch := _next_batch(job, coming, listener, stop, save)) is not None:
        job.update(batch)
        job.step += 1
        if log_every and (job.step % log_every == 0 or job.step == job.total):
            job.check()
            job.write_log()
        listener.progress(job.label, job.step, job.total)
        epoch_done = job.step % job.steps_per_epoch == 0
        late = time.monotonic() >= (epoch_due if epoch_done and job.saves_every_epoch else due)
        # The signal that any rank has received, `_DUE` when a save is due, else 0.
        request = _DUE if late or job.step == job.total or job.save_failed else 0
        if stop:
            request = max_over_ranks(stop.number or request)
        if not (request or epoch_done):
            continue
        if stop and request > _DUE:
            stop.number = request
            listener.note(_STOPPING)
        job.check()
        job.check_weights()
        if epoch_done:
            job.end_epoch(job.step // job.steps_per_epoch)
        if not request:
            continue
        before = time.monotonic()
        save()
        now = time.monotonic()
        epoch_due = now + SAVE_COST * (now - before)
        due = max(epoch_due, now + SAVE_EVERY_S)
        if stop and (request := max_over_ranks(stop.number or 0)):
            stop.number = request
            return


def _next_batch(
    job: Job[Batch], coming: Iterator[Batch], listener: Listener, stop: StopSignal | None, save: Callable[[], None]
) -> Batch | None:
    """Return the next batch; None at the end, or if a signal has ended the wait for it.

    The wait may be long, and it changes no state: a single process saves at once when a signal arrives or a loader
    process is lost. Several ranks agree after the next update instead.
    """
    if stop is None or world_size() > 1:
        return next(coming, None)
    try:
        with stop.waiting():
            return next(coming, None)
    except BaseException as error:  # a library may raise an error of its own when a signal interrupts it
        if stop.number is None and not isinstance(error, DeadWorkerError):
            raise
        if stop.number is not None:
            listener.note(_STOPPING)
        job.check()
        job.check_weights()
        save()
        if stop.number is None:
            raise
        return None


def _diverged(what: str) -> DivergenceError:
    return DivergenceError(
        f"{what}; the last good state is intact. "
        "Restart with a lower learning rate, optimizer.clip_grad=1.0 or --precision fp32"
    )


class GradientJob(Job[ViewBatch]):
    """A job that trains with AdamW on batches of views."""

    smallest_batch = 1
    """Smallest number of readable images in a batch, over all ranks; smaller batches are skipped."""
    first_step = 0
    """Number of updates in earlier jobs of the same run."""
    updated = False
    """Whether the last batch was used rather than skipped."""
    images_read = 0
    """Number of readable images so far, over all ranks."""

    def __init__(
        self,
        label: str,
        groups: list[dict[str, Any]],
        rate: Callable[[int], float],
        optimizer: OptimizerConfig,
        *,
        epochs: int,
        steps_per_epoch: int,
        device: torch.device,
    ) -> None:
        """groups: AdamW groups, each with `lr_scale`. rate: learning rate of an update (0-based)."""
        self.label, self.rate, self.clip_grad = label, rate, optimizer.clip_grad
        self.steps_per_epoch, self.total = steps_per_epoch, epochs * steps_per_epoch
        self.optimizer = adamw(groups, optimizer.betas)
        self.device, self.loss_guard = device, FiniteLoss(device)

    @property
    def trained(self) -> list[Tensor]:
        """All parameters that the optimizer updates."""
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    @abstractmethod
    def forward_backward(self, batch: ViewBatch, images: int) -> Tensor:
        """Compute the loss of a batch and add its gradients to the weights'. images: batch size over all ranks."""

    @abstractmethod
    def skip(self, images: Sequence[tuple[str, str]]) -> None:
        """Record unreadable images by path and reason. Raises DataError if there are too many."""

    def after_update(self) -> None:
        """Hook called after every optimizer step."""

    def update(self, batch: ViewBatch) -> None:
        """Run one optimizer step without a device sync; skip a batch with too few readable images."""
        self.skip(batch.bad)
        images = total_over_ranks(len(batch.sample_B))
        self.images_read += images
        self.updated = images >= self.smallest_batch
        if not self.updated:
            return
        set_learning_rate(self.optimizer, self.rate(self.step))
        loss = self.forward_backward(batch, images)
        self.loss_guard.watch(loss, self.first_step + self.step + 1)
        if self.clip_grad is not None:
            clip = clip_gradients if any(map(is_sharded, self.trained)) else torch.nn.utils.clip_grad_norm_
            clip(self.trained, self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_update()

    def check(self) -> None:
        self.loss_guard.check()

    def check_weights(self) -> None:
        if not all_finite(self.trained):
            raise _diverged(f"the weights are not finite after step {self.step} of {self.label}")


class FiniteLoss:
    """Record of the first step whose loss was not finite, kept on the device without a sync."""

    def __init__(self, device: torch.device) -> None:
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def watch(self, loss: Tensor, step: int) -> None:
        """Check the loss of a step on the device; no sync."""
        newly_bad = ~torch.isfinite(loss.detach()) & (self._first_bad < 0)
        # torch.where would copy the Python number to the device and wait for the copy.
        self._first_bad.masked_fill_(newly_bad, step)

    def check(self) -> None:
        """Raise DivergenceError naming the first bad step. Sync point: only on logging steps and before saving."""
        step = int(self._first_bad)
        if step >= 0:
            raise _diverged(f"the loss is not finite at step {step}")
