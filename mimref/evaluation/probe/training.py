"""Training a grid of classifiers, with a state file that an interrupted training continues from."""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mimref.errors import ConfigError, OutputError
from mimref.evaluation.probe.ensemble import Batch, ProbeEnsemble, Schedule
from mimref.files import atomic_write, is_whole, remove_halves
from mimref.progress import Progress

# A state can be gigabytes: it is saved this seldom, and takes at most about 5% of the time.
SAVE_EVERY_S = 10.0
SAVE_COST = 20.0


class ProbeTraining:
    """One training of an ensemble. Whoever uses its results removes the state file."""

    def __init__(
        self,
        ensemble: ProbeEnsemble,
        schedule: Schedule,
        per_epoch: int,
        file: Path | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """identity: everything that the result depends on; a state of another one is refused."""
        self.ensemble, self.schedule, self.file, self.identity = ensemble, schedule, file, dict(identity or {})
        self.steps_per_epoch, self.step = per_epoch, 0

    def run(self, batches: Callable[[int], Iterator[Batch]], progress: Progress | None = None) -> None:
        """Train on all batches; with a state file, from where an earlier run stopped, with the same result bit for bit.

        batches: gives the batches from an update on (0-based), `schedule.total` in all. progress: updates done, total.
        """
        self.load()
        due = time.monotonic() + SAVE_EVERY_S
        for batch in batches(self.step) if self.step < self.schedule.total else ():
            self.update(batch)
            self.step += 1
            started = time.monotonic()
            if self.step == self.schedule.total or started >= due:
                self.save()
                due = time.monotonic() + max(SAVE_EVERY_S, SAVE_COST * (time.monotonic() - started))
            if progress is not None:
                progress(self.step, self.schedule.total)

    def update(self, batch: Batch) -> None:
        """Train on one batch. One with fewer images than statistics need (unreadable ones are left out) is skipped."""
        inputs, labels = batch
        if len(labels) >= self.ensemble.smallest_batch:
            self.ensemble.step(inputs, labels, *self.schedule(self.step))

    def save(self) -> None:
        """Write the state atomically. Raises OutputError when it cannot be written."""
        if self.file is not None:
            with atomic_write(self.file) as file:
                state = {"settings": self.identity, "step": self.step, "ensemble": self.ensemble.state_dict()}
                torch.save(state, file)

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
        try:
            with open(self.file, "rb") as file:
                if not is_whole(file):
                    raise ValueError("a checksum differs")
            saved = torch.load(self.file, map_location="cpu", weights_only=True)
            identity, step, tensors = dict(saved["settings"]), int(saved["step"]), dict(saved["ensemble"])
        except Exception as error:  # whatever a damaged file makes torch raise
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
