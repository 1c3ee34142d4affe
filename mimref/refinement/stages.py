"""The two stages of a refinement as training jobs."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mimref.data.loader import ViewBatch, device_batches, loader_workers, view_batches
from mimref.data.views import multi_crop
from mimref.distributed.collectives import gather_lists, total
from mimref.distributed.group import world_size
from mimref.encoders.parameters import encoder_groups
from mimref.errors import ConfigError
from mimref.evaluation.monitor import CollapseWatch
from mimref.refinement.config import EncoderStageConfig, HeadsStageConfig
from mimref.refinement.memory import half, release_memory
from mimref.refinement.method import StepValues, monitored_values
from mimref.refinement.schedule import StageName, loss_weights
from mimref.refinement.shared import Refinement
from mimref.training.checkpoint import images_of
from mimref.training.ema import WeightAverage
from mimref.training.folder import RunFolder
from mimref.training.job import FiniteLoss
from mimref.training.log import MetricsLog, readable
from mimref.training.optim import adamw, learning_rate, module_groups, set_learning_rate, warmup_updates


class Stage:
    """What the stages have in common; a `Job` of `mimref.training.job`."""

    name: StageName
    label: str
    settings: HeadsStageConfig | EncoderStageConfig
    optimizer: torch.optim.AdamW
    before: int
    """Updates of earlier stages."""
    first_epoch: int
    """Number of the stage's first epoch; stage 2 goes on counting, so that its views are new ones."""

    def __init__(self, run: Refinement, folder: RunFolder, log: MetricsLog) -> None:
        self.run, self.folder, self.log = run, folder, log
        self.config, self.plan = run.config, run.plan
        self.steps_per_epoch = run.plan.steps_per_epoch
        self.guard = FiniteLoss(run.device)
        self.total = self.settings.epochs * self.steps_per_epoch
        self.warmup = warmup_updates(self.settings.warmup_epochs, self.settings.epochs, self.steps_per_epoch)
        self.step, self.elapsed_s = 0, run.elapsed_s
        self.rate = 0.0
        self._values: StepValues | None = None

    def batches(self) -> Iterator[ViewBatch]:
        """The stage's remaining batches."""
        if self.step == self.total:
            return iter(())
        config, epoch = self.config, self.step // self.steps_per_epoch
        batches = view_batches(
            self.plan.source,
            multi_crop(config.views, self.plan.architecture.image_size),
            batch_size=config.batch_size,
            seed=config.seed,
            epochs=range(self.first_epoch + epoch, self.first_epoch + self.settings.epochs),
            skip=self.step % self.steps_per_epoch,
            workers=loader_workers(config.workers, self.plan.source),
            pin_memory=self.run.device.type == "cuda",
            reduce_jpeg=True,
        )
        return device_batches(batches, self.run.device)

    def set_rate(self) -> None:
        """Learning rate of the coming update."""
        self.rate = learning_rate(
            self.step,
            peak=self.settings.lr * self.config.batch_size / 256,
            warmup_updates=self.warmup,
            total_updates=self.total,
            end=self.config.optimizer.end_lr,
        )
        set_learning_rate(self.optimizer, self.rate)

    def loss_weights(self) -> list[float]:
        """Weight of every head in the coming update."""
        return [1.0] * len(self.plan.blocks)

    def update(self, batch: ViewBatch) -> None:
        """See `Job`."""
        self._values = None
        self.run.skipped.add(batch.bad)
        # BatchNorm and the negatives need more than one image.
        if total(len(batch.sample_B)) >= 2:
            self.learn(batch)

    def learn(self, batch: ViewBatch) -> None:
        """One optimizer step."""
        self.set_rate()
        weight_H = torch.tensor(self.loss_weights()).to(self.run.device, non_blocking=True)
        values = self._forward_backward(batch, weight_H)
        self.guard.watch(values.loss, self.before + self.step + 1)
        if self.config.optimizer.clip_grad is not None:
            trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, self.config.optimizer.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._values = values

    def _forward_backward(self, batch: ViewBatch, weight_H: Tensor) -> StepValues:
        """Raises ConfigError with what would fit, when the device's memory does not hold the step."""
        try:
            return self.run.stepper.forward_backward(
                batch, weight_H, top_k=self.settings.top_k, train_encoder=self.name == "encoder"
            )
        except torch.OutOfMemoryError:
            pass  # the exception holds on to the tensors: leave it before trying less
        release_memory()
        stepper = self.run.stepper
        tried = min(stepper.micro_batch or stepper.most_images, stepper.most_images)
        less = half(tried)
        # Other ranks are in the middle of a step, and would not take part in trying less.
        alone = world_size() == 1
        fits = self.run.largest_micro_batch(less, reserve=self.moments_to_come()) if alone else less
        raise ConfigError(
            f"out of memory with {tried} images per encoder pass; {fits} {'fit' if alone else 'may fit'}: --resume "
            f"with --micro-batch {fits} goes on, with the same result"
        )

    def moments_to_come(self) -> int:
        """Numbers that the optimizer will hold from the first update on."""
        if self.optimizer.state:
            return 0
        return 2 * sum(int(weight.numel()) for group in self.optimizer.param_groups for weight in group["params"])

    def position(self) -> dict[str, object]:
        """Beginning of a log line."""
        return {
            "step": self.before + self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "stage": self.name,
        }

    def write_log(self) -> None:
        """See `Job`."""
        if self._values is None:
            return
        logged = monitored_values(self._values, self.run.labels)
        accuracy = logged.get("nn_accuracy")
        if isinstance(accuracy, list):
            self.run.nn_accuracy = accuracy
        self.log.write({**self.position(), "lr": self.rate, **logged})

    def end_epoch(self, epoch: int) -> None:
        """See `Job`."""

    def save(self) -> None:
        """See `Job`."""
        self.run.elapsed_s = self.elapsed_s
        self.run.skipped.add(gather_lists(self.run.skipped.items))
        self.run.skipped.tell_early()
        self.folder.save_state(lambda: {**self.shared_state(), "stage": self.name, "stage_step": self.step})

    def shared_state(self) -> dict[str, Any]:
        """Everything both stages have to save."""
        return {
            "step": self.before + self.step,
            "elapsed_s": self.elapsed_s,
            "log_lines": self.log.lines,
            "skipped": self.run.skipped.items,
            "images": images_of(self.plan.source),
            "nn_accuracy": self.run.nn_accuracy,
            "heads": self.run.heads.state_dict(),
            "queue": self.run.queue.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a state that this stage has saved."""
        self.step = state["stage_step"]
        self.elapsed_s = self.run.elapsed_s = state["elapsed_s"]
        self.run.skipped.add(state["skipped"])
        self.run.nn_accuracy = state["nn_accuracy"]
        self.run.heads.load_state_dict(state["heads"])
        self.run.queue.load_state_dict(state["queue"])
        self.optimizer.load_state_dict(state["optimizer"])


class HeadsStage(Stage):
    """Stage 1: the heads learn on the frozen encoder, which stays as it is to the last bit."""

    name: StageName = "heads"
    label = "stage 1: heads"

    def __init__(self, run: Refinement, folder: RunFolder, log: MetricsLog) -> None:
        self.settings = run.config.heads_stage
        self.before = self.first_epoch = 0
        super().__init__(run, folder, log)
        self.optimizer = adamw(
            module_groups(run.heads, weight_decay=self.settings.weight_decay), run.config.optimizer.betas
        )


class EncoderStage(Stage):
    """Stage 2: encoder and heads learn together; the result is the encoder's weight average."""

    name: StageName = "encoder"
    label = "stage 2: encoder and heads"

    def __init__(self, run: Refinement, folder: RunFolder, log: MetricsLog) -> None:
        config = run.config.encoder_stage
        self.settings = self._config = config
        self.before, self.first_epoch = run.plan.heads_steps, run.config.heads_stage.epochs
        super().__init__(run, folder, log)
        run.encoder.train()
        run.stepper.distribute_encoder()
        groups = encoder_groups(run.encoder, weight_decay=config.weight_decay, layer_decay=config.layer_decay)
        groups += module_groups(run.heads, weight_decay=config.heads_weight_decay)
        self.optimizer = adamw(groups, run.config.optimizer.betas)
        self.average = run.average = WeightAverage(run.encoder, config.ema)
        self.collapse: CollapseWatch | None = None
        self._warn_of_slow_average()

    def _warn_of_slow_average(self) -> None:
        if 1 / (1 - self._config.ema) > self.total / 5:
            kept = 100 * self._config.ema**self.total
            self.run.listener.warn(
                f"encoder_stage.ema {self._config.ema} is slow for {self.total} updates: the result keeps "
                f"{kept:.0f}% of the base's weights; {max(0.0, 1 - 5 / self.total):.4g} or less suits this run"
            )

    def loss_weights(self) -> list[float]:
        """Weight of every head by the loss schedule."""
        return loss_weights(self.config.loss.schedule, self.step / self.total, len(self.plan.blocks))

    def learn(self, batch: ViewBatch) -> None:
        """One optimizer step, followed by the weight average."""
        super().learn(batch)
        self.average.update()

    def start_watch(self) -> None:
        """Measure the base encoder, with which later checks are compared."""
        if self.config.monitor.knn_every_epochs and self.collapse is None:
            # Monitoring may be turned on for a resumed run, whose encoder has moved on.
            base = self.run.base_encoder() if self.step else self.run.encoder
            self.collapse = CollapseWatch(self.run.monitor.check(base))
            self.tell("start", self.collapse.start)

    def tell(self, when: str, values: dict[str, float]) -> None:
        """Log and show the monitor's values."""
        self.log.write({**self.position(), **values})
        self.run.listener.note(f"{when}: {readable(values)}")

    def end_epoch(self, epoch: int) -> None:
        """See `Job`."""
        every = self.config.monitor.knn_every_epochs
        if not every or self.collapse is None or (epoch % every and self.step < self.total):
            return
        values = self.run.monitor.check(self.run.result_encoder())
        self.tell(f"epoch {epoch}", values)
        warning = self.collapse.warning(values)
        if warning:
            self.run.listener.warn(f"epoch {epoch}: {warning}")

    def shared_state(self) -> dict[str, Any]:
        """Everything that stage 2 has to save."""
        return {
            **super().shared_state(),
            "encoder": self.run.encoder.state_dict(),
            "average": self.average.module.state_dict(),
            "collapse_start": self.collapse.start if self.collapse else None,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a state that this stage has saved."""
        super().resume(state)
        self.run.encoder.load_state_dict(state["encoder"])
        self.average.module.load_state_dict(state["average"])
        if state["collapse_start"] is not None:
            self.collapse = CollapseWatch(state["collapse_start"])
