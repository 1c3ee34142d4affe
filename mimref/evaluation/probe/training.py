"""Training a grid of classifiers, with a state file from which an interrupted training continues."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mimref.distributed.group import world_size
from mimref.errors import ConfigError, OutputError
from mimref.evaluation.probe.ensemble import Batch, ProbeEnsemble, Schedule
from mimref.files import remove_halves
from mimref.progress import Progress, ProgressOnly
from mimref.training.checkpoint import read_state, write_state
from mimref.training.job import Job, train
from mimref.training.signals import stop_signal


class ProbeJob(Job[Batch]):
    """Trains an ensemble. Whoever uses the result removes the state file."""

    label = "linear probes"

    def __init__(
        self,
        ensemble: ProbeEnsemble,
        schedule: Schedule,
        steps_per_epoch: int,
        file: Path | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """identity: everything that the result depends on; a state with another one is refused."""
        self.ensemble, self.schedule, self.file, self.identity = ensemble, schedule, file, dict(identity or {})
        self.total, self.steps_per_epoch = schedule.total, steps_per_epoch
        # In a group, rank 0 trains while the others encode for it: a signal cannot stop all at the same step.
        self.saves_every_epoch = world_size() > 1

    def run(self, batches: Callable[[int], Iterator[Batch]], progress: Progress | None = None) -> None:
        """Train on all batches; with a state file, from where an earlier run stopped, with the same result bit for bit.

        batches: gives the batches from an update (0-based) on. progress: updates done, total.
        """
        self.load()
        if self.step == self.total:
            return
        listener = ProgressOnly(progress)
        if self.file is None or world_size() > 1:
            train(self, batches(self.step), listener)
            return
        with stop_signal() as stop:
            train(self, batches(self.step), listener, stop=stop)

    def update(self, batch: Batch) -> None:
        """Train on one batch; skip one with fewer images than statistics need (unreadable ones are left out)."""
        inputs, labels = batch
        if len(labels) >= self.ensemble.smallest_batch:
            self.ensemble.step(inputs, labels, *self.schedule(self.step))

    def save(self) -> None:
        """Write the state, if there is a file for it."""
        if self.file is not None:
            tensors = self.ensemble.state_dict()
            write_state(self.file, {"settings": self.identity, "step": self.step, "ensemble": tensors})

    def load(self) -> None:
        """Continue from the state file, if there is one.

        Raises ConfigError for a file of other settings or images, OutputError for a damaged one.
        """
        if self.file is None:
            return
        remove_halves(self.file.parent, self.file.name)
        if not self.file.exists():
            return
        damaged = OutputError(f"{self.file}: damaged state of a probe; remove the file to start from scratch")
        saved = read_state(self.file)
        try:
            assert saved is not None
            identity, step, tensors = dict(saved["settings"]), int(saved["step"]), dict(saved["ensemble"])
        except (AssertionError, TypeError, KeyError, ValueError) as error:
            raise damaged from error
        for key, value in self.identity.items():
            if identity.get(key) != value:
                raise ConfigError(
                    f"cannot continue the probe of {self.file} with another {key}: it was {identity.get(key)!r} and is "
                    f"now {value!r}; restore it, or remove the file to start from scratch"
                )
        try:
            self.ensemble.load_state_dict(tensors)
        except (ValueError, AttributeError) as error:
            raise damaged from error
        self.step = step
