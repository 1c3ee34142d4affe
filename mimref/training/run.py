"""A training command in its output folder, from the checks before the first update to results.json.

`refine` and `pretrain` call the same methods in order: `finished`, `locked`, `load_state`, `writing`, `train`,
`leave_group`, `finish`. In a process group every rank does so; only rank 0 writes.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mimref.config.recipe import Derived
from mimref.config.run import TrainingConfig
from mimref.data.decode import none_readable
from mimref.data.device_crops import decoding_device
from mimref.data.loader import Preparation, ViewBatch, device_batches, loader_workers, view_batches
from mimref.data.sources import ImageSource
from mimref.data.views import CropGroup
from mimref.devices import resolve_device
from mimref.distributed.collectives import barrier
from mimref.distributed.group import end_group, own_rank, world_size
from mimref.distributed.sharding import check_sharding, device_mesh, like
from mimref.encoders.checkpoints import Checkpoint
from mimref.errors import Checks
from mimref.progress import Listener, Silent
from mimref.results import Finished, Row, Tabular, read_results, write_results
from mimref.training.checkpoint import check_images, check_ranks
from mimref.training.folder import RunFolder, with_absolute_paths
from mimref.training.job import GradientJob, train
from mimref.training.log import MetricsLog, SkippedImages, open_log, readable
from mimref.training.optim import warmup_cosine, warmup_updates
from mimref.training.signals import StopSignal, stop_signal
from mimref.training.trackers import check_trackers

if TYPE_CHECKING:
    from mimref.training.saver import StateSaver


@dataclass(frozen=True)
class TrainingResult(Tabular):
    """The result of a training command."""

    out: Path
    rows: list[Row]
    elapsed_s: float
    """Training time."""
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    """Path and reason for each image that was skipped."""


class TrainingRun:
    """Resources shared by all jobs of a training command: folder, log, signals, skipped images."""

    log: MetricsLog
    stop: StopSignal

    def __init__(
        self,
        config: TrainingConfig,
        out: Path,
        listener: Listener | None,
        *,
        resume: bool = False,
        force: bool = False,
        shard: bool = False,
    ) -> None:
        """shard: divide the weights among the ranks; ignored in a single process."""
        self.config, self.folder = config, RunFolder(out)
        self.sharded = shard and world_size() > 1
        self.saver: StateSaver | None = None
        """Saves the states of a sharded run."""
        self.resume, self.force = resume, force
        self.listener = listener if listener and own_rank() == 0 else Silent()
        self.skipped = SkippedImages(config.data.max_bad, self.listener)
        self.told = False
        """Whether peculiar training images have been reported."""
        self.elapsed_s = 0.0
        """Training time."""
        self.derived: list[dict[str, Any]] = []
        """Settings that a recipe has derived, for the results."""

    def finished(self, checks: Checks) -> Finished | None:
        """Return the results if the run to resume has already finished, else None.

        Checks whether the run may start or resume in the folder, and whether trackers and sharding are available.
        """
        holds_result = partial(self.folder.holds_result, resume=self.resume, force=self.force)
        if checks.run("out", holds_result) and checks.passed:
            found = read_results(self.folder.path, self.config.command)
            self.folder.drop_state()  # left by a run that was killed just before it dropped its state
            return found
        if self.sharded:
            checks.run("shard", lambda: check_sharding(resolve_device(self.config.device)))
        checks.run("monitor.trackers", lambda: check_trackers(self.config.monitor.trackers))
        return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder, and catch signals."""
        with stop_signal() as self.stop, self.folder.locked(resume=self.resume, force=self.force):
            yield

    def load_state(self, source: ImageSource) -> dict[str, Any] | None:
        """Return the state to resume from, checked against other ranks and the training images; None for a new run."""
        mesh = device_mesh(resolve_device(self.config.device)) if self.sharded and self.resume else None
        state = self.folder.load_state(self.listener, mesh) if self.resume else None
        check_ranks(state, source)
        if state:
            check_images(state, source, self.listener)
        return state

    @contextmanager
    def writing(
        self,
        config: TrainingConfig,
        derived: Sequence[Derived],
        state: Mapping[str, Any] | None,
        checkpoint: Checkpoint | None = None,
    ) -> Iterator[None]:
        """Write config.toml with the resolved settings, and keep the log open while jobs train.

        derived: settings that a recipe has derived. A resumed run reads them and the preset from its saved files: the
        config.toml from which it continues names no preset. checkpoint: the weights that the run starts from; a resumed
        run needs the same.
        """
        origin = self.folder.origin() if self.resume else None
        self.config = with_absolute_paths(config)
        self.derived = [asdict(each) for each in derived]
        if origin is not None:
            self.config = self.config.model_copy(update={"preset": origin.preset})
            self.derived = origin.derived
        elif state is not None:
            self.derived = state.get("derived", [])  # missing in states of older versions
        self.folder.prepare(self.config, self.derived, checkpoint, resume=self.resume, force=self.force)
        if self.sharded:
            from mimref.training.saver import StateSaver  # imports much that other runs do not need

            self.saver = StateSaver(self.folder.path / "state", self.folder.publish)
        with closing(open_log(self.config, self.folder.path, state, self.listener)) as self.log:
            yield

    def train(self, job: "Stage", state: dict[str, Any] | None) -> None:
        """Train a job to its end, from a saved state if there is one. Raises Interrupted after saving on a signal."""
        if state:
            job.resume(state)
            state.clear()  # as large as the run itself
        job.start()
        try:
            train(job, job.batches(), self.listener, stop=self.stop, log_every=self.config.monitor.log_every)
        except Exception:
            if self.saver is not None:
                self.saver.settle()
            raise

    def leave_group(self) -> bool:
        """Wait for all ranks and leave the group; return True on rank 0, which evaluates and writes alone."""
        barrier()
        return end_group()

    def finish(self, rows: Sequence[Row]) -> None:
        """Report skipped images, write the results and remove the state."""
        self.skipped.report()
        settings, skipped = self.config.model_dump(mode="json"), self.skipped.items
        write_results(
            *(self.folder.path, self.config.command, settings, self.elapsed_s, rows),
            bad_images=skipped,
            derived=self.derived,
        )
        self.folder.drop_state()


class Stage(GradientJob):
    """A gradient job of a training run, with batches of the run's images, the run's log and its saved state."""

    name: str
    """Name in the log and in saved states."""
    first_epoch = 0
    """Number of the stage's first epoch. Later stages continue the count, so that their views are new."""
    preparation: Preparation | None = None
    """How images are prepared before and after crops are cut."""
    together = 1
    """Number of neighbouring images of a batch that are kept in one process."""

    def __init__(
        self,
        run: TrainingRun,
        label: str,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        warmup_epochs: float | None,
        epochs: int,
        source: ImageSource,
        crops: Sequence[CropGroup],
        device: torch.device,
    ) -> None:
        """groups: AdamW groups, each with `lr_scale`. lr: base learning rate, for a batch of 256 images."""
        optimizer, batch = run.config.optimizer, run.config.batch_size
        steps = len(source) // batch
        rate = warmup_cosine(
            peak=lr * batch / 256,
            warmup_updates=warmup_updates(warmup_epochs, epochs, steps),
            total_updates=epochs * steps,
            end=optimizer.end_lr,
        )
        super().__init__(label, groups, rate, optimizer, epochs=epochs, steps_per_epoch=steps, device=device)
        self.run, self.source, self.crops = run, source, crops
        self.elapsed_s = run.elapsed_s

    @property
    def all_images(self) -> ImageSource:
        """The training images of the run; a stage may use only some of them."""
        return self.source

    def batches(self) -> Iterator[ViewBatch]:
        """Return the stage's remaining batches, on the device."""
        if self.step == self.total:
            return iter(())
        config, (epoch, skip) = self.run.config, divmod(self.step, self.steps_per_epoch)
        batches = view_batches(
            self.source,
            self.crops,
            batch_size=config.batch_size,
            seed=config.seed,
            epochs=range(self.first_epoch + epoch, self.first_epoch + self.total // self.steps_per_epoch),
            skip=skip,
            workers=loader_workers(config.workers, self.source),
            pin_memory=self.device.type == "cuda",
            preparation=self.preparation,
            together=self.together,
            reduce_jpeg=self.preparation is None,
            decode_on=decoding_device(config.data, self.device),
        )
        return device_batches(batches, self.device)

    def skip(self, images: Sequence[tuple[str, str]]) -> None:
        self.run.skipped.add(images)

    def start(self) -> None:
        """Hook called once, before the first batch or after `resume`."""

    @abstractmethod
    def values(self) -> dict[str, object]:
        """Return what to log about the last update. Sync point, also between ranks."""

    def write_log(self) -> None:
        if self.updated:
            self.log(self.values())

    def log(self, values: Mapping[str, object]) -> None:
        """Write a log line for the stage's current step."""
        position = {"step": self.first_step + self.step, "epoch": round(self.step / self.steps_per_epoch, 4)}
        self.run.log.write({**position, "stage": self.name, **values})

    def check_due(self, epoch: int, every: int) -> bool:
        """Return whether to check the encoder after this epoch: every `every` epochs (0: never) and at the end."""
        return every > 0 and (epoch % every == 0 or self.step == self.total)

    def report(self, when: str, values: Mapping[str, float]) -> None:
        """Log a check of the encoder, and pass its main values to the listener."""
        self.log(values)
        self.run.listener.note(f"{when}: {readable(values)}")

    def state(self) -> dict[str, Any]:
        """Return what the stage needs to resume, apart from its position; sharded tensors stay divided."""
        return {"optimizer": self.optimizer.state_dict()}

    def save(self) -> None:
        """Write everything needed to resume to the run's folder, atomically. Called on all ranks; rank 0 writes.

        In a sharded run, every rank begins to write its part.
        """
        run = self.run
        run.elapsed_s = self.elapsed_s
        run.skipped.gather()
        # A whole epoch of unreadable images, on all ranks.
        if not self.images_read and len(run.skipped.items) >= self.steps_per_epoch * run.config.batch_size:
            raise none_readable(self.source.name, run.skipped.items)
        run.skipped.report(once=True)
        if not run.told:
            run.told = True
            self.source.share_traits()
            for notice in self.source.peculiarities("training images"):
                run.listener.warn(notice)
        if run.saver is not None:
            run.saver.save(self._whole_state())
        else:
            run.folder.save_state(self._whole_state)

    def _whole_state(self) -> dict[str, Any]:
        run = self.run
        return {
            "step": self.first_step + self.step,
            "stage": self.name,
            "stage_step": self.step,
            "elapsed_s": self.elapsed_s,
            "log_lines": run.log.lines,
            "skipped": run.skipped.state(),
            "derived": run.derived,
            "images": (len(self.all_images), self.all_images.fingerprint),
            **self.state(),
        }

    def finish_saving(self) -> None:
        if self.run.saver is not None:
            self.run.saver.wait()

    @property
    def save_failed(self) -> bool:
        return self.run.saver is not None and self.run.saver.failed

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a state saved by this stage."""
        self.run.told = True  # before the state was saved
        self.step = state["stage_step"]
        self.elapsed_s = self.run.elapsed_s = state["elapsed_s"]
        self.run.skipped.load_state(state["skipped"])
        live = {place: {"exp_avg": weight, "exp_avg_sq": weight} for place, weight in enumerate(self.trained)}
        saved = state["optimizer"]
        self.optimizer.load_state_dict({**saved, "state": like(saved["state"], live)})
