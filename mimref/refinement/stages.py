"""The two stages: heads on the frozen encoder, then encoder and heads together."""

from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor

from mimref.data.loader import ViewBatch
from mimref.devices import send
from mimref.distributed.collectives import averaged
from mimref.distributed.group import world_size
from mimref.distributed.sharding import Sharded, lean, like
from mimref.encoders.backbones import TimmBackbone, TokenEncoder
from mimref.encoders.parameters import encoder_groups
from mimref.encoders.vit import Encoder
from mimref.errors import ConfigError
from mimref.evaluation.monitor import CollapseWatch, KnnMonitor
from mimref.refinement.config import EncoderStageConfig, HeadsStageConfig
from mimref.refinement.dense import DenseTerm
from mimref.refinement.memory import check_exact, half, largest_micro_batch, release_memory
from mimref.refinement.method import Method, StepValues, compile_blocks, monitored_values
from mimref.refinement.plan import Plan, base_encoder
from mimref.refinement.schedule import StageName, head_weights
from mimref.refinement.sizes import state_bytes
from mimref.refinement.sweep import score_heads
from mimref.training.ema import ShardedAverage, WeightAverage
from mimref.training.optim import module_groups
from mimref.training.run import Stage, TrainingRun


class RefinementStage(Stage):
    """Base class of the two stages."""

    name: StageName
    smallest_batch = 2  # BatchNorm and the negatives need more than one image

    def __init__(
        self,
        run: TrainingRun,
        plan: Plan,
        method: Method,
        settings: HeadsStageConfig | EncoderStageConfig,
        groups: list[dict[str, Any]],
        label: str,
    ) -> None:
        super().__init__(
            run,
            label,
            groups,
            lr=settings.lr,
            warmup_epochs=settings.warmup_epochs,
            epochs=settings.epochs,
            source=plan.source,
            crops=plan.crops,
            device=method.device,
        )
        self.plan, self.method, self.settings = plan, method, settings
        labels = plan.source.labels
        self.labels = None if labels is None else torch.from_numpy(labels).to(method.device)
        self.nn_accuracy: list[float] = []
        """Last logged nearest-neighbour accuracy of each head, in percent."""
        self._values: StepValues

    def head_weights(self) -> list[float]:
        """Return each head's loss weight in the next update."""
        return [1.0] * len(self.plan.blocks)

    def forward_backward(self, batch: ViewBatch, images: int) -> Tensor:
        """See `GradientJob`. Raises ConfigError, naming a smaller micro-batch, when the device runs out of memory."""
        weight_H = send(torch.tensor(self.head_weights()), self.device)
        top_k, train_encoder = self.settings.top_k, self.name == "encoder"
        try:
            self._values = self.method.forward_backward(batch, weight_H, top_k=top_k, train_encoder=train_encoder)
            return self._values.loss
        except torch.OutOfMemoryError:
            pass  # the exception keeps the tensors alive: leave this block before trying a smaller micro-batch
        release_memory()
        check_exact(self.method.encoder, "out of memory")
        most = self.method.most_images
        tried = min(self.method.micro_batch or most, most)
        less = half(tried)
        # Other ranks are in the middle of a step and would not take part in the trials.
        alone = world_size() == 1
        fits = largest_micro_batch(self.method, self.plan, less, reserve=self.moments_to_come()) if alone else less
        raise ConfigError(
            f"out of memory with {tried} images per encoder pass; {fits} {'fit' if alone else 'may fit'}: continue "
            f"with --resume --micro-batch {fits}, which gives the same result"
        )

    def moments_to_come(self) -> int:
        """Return how many bytes AdamW's moments will take; 0 once they are allocated, at the first update."""
        if self.optimizer.state:
            return 0
        plan = self.plan
        return state_bytes(plan.config, plan.architecture, plan.blocks, self.name).moments

    def values(self) -> dict[str, object]:
        logged = monitored_values(self._values, self.labels)
        accuracy = logged.get("nn_accuracy")
        if isinstance(accuracy, list):
            self.nn_accuracy = accuracy
        return {"lr": self.rate(self.step - 1), **logged}

    def state(self) -> dict[str, Any]:
        heads, queue = self.method.heads.state_dict(), self.method.queue.state_dict()
        return {**super().state(), "heads": heads, "queue": queue, "nn_accuracy": self.nn_accuracy}

    def resume(self, state: dict[str, Any]) -> None:
        super().resume(state)
        self.nn_accuracy = state["nn_accuracy"]
        self.method.load_heads(state["heads"])
        self.method.queue.load_state_dict(state["queue"])
        if state["images"][1] != self.source.fingerprint:  # the indices are of other images
            self.method.queue.sample_Q.fill_(-1)


class HeadsStage(RefinementStage):
    """Stage 1: the heads learn on the frozen encoder, which stays bit-identical."""

    name: StageName = "heads"
    monitor: KnnMonitor

    def __init__(self, run: TrainingRun, plan: Plan, method: Method) -> None:
        settings = plan.config.heads_stage
        groups = module_groups(method.heads, weight_decay=settings.weight_decay)
        super().__init__(run, plan, method, settings, groups, "stage 1: heads")
        self.check_every = settings.knn_every_epochs

    def start(self) -> None:
        if self.check_every and self.monitor.test is None:
            self.run.listener.note(f"no k-NN of the heads: {self.source.name} has no labelled validation images")
            self.check_every = 0

    def end_epoch(self, epoch: int) -> None:
        """When a check is due, score the heads in the same way as for their final ranking."""
        if not self.check_due(epoch, self.check_every):
            return
        method = self.method
        scores = score_heads(method.plain_encoder(), method.plain_heads(), self.monitor, self.plan.columns)
        if all(map(isfinite, scores)):
            self.log({"head_knn_top1": scores})
            listed = ", ".join(f"{score:.4g}" for score in scores)
            self.run.listener.note(f"epoch {epoch}: k-NN top-1 of heads 1 to {len(scores)}: {listed}")


class EncoderStage(RefinementStage):
    """Stage 2: encoder and heads learn together; the result is the encoder's weight average."""

    name: StageName = "encoder"
    monitor: KnnMonitor

    def __init__(self, run: TrainingRun, plan: Plan, method: Method) -> None:
        settings = plan.config.encoder_stage
        self.first_step, self.first_epoch = plan.heads_steps, plan.config.heads_stage.epochs
        method.encoder.train()
        sharded = method.sharded_encoder
        if sharded is None:
            method.trained_encoder = averaged(method.pooled_blocks, method.device)
        method.dense = dense_term(plan, method)
        groups = encoder_groups(
            method.encoder, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay
        ) + module_groups(method.heads, weight_decay=settings.heads_weight_decay)
        super().__init__(run, plan, method, settings, groups, "stage 2: encoder and heads")
        self.average: WeightAverage | ShardedAverage
        if sharded is None:
            self.average = WeightAverage(method.encoder, settings.ema)
        else:
            self.average = ShardedAverage(sharded, settings.ema)
        self.collapse: CollapseWatch | None = None

    def result(self) -> TokenEncoder:
        """Return the averaged encoder, or a plain copy of it if it is sharded; call this on all ranks."""
        if isinstance(self.average, ShardedAverage):
            found = self.average.sharded.plain(self.average.weights, self.device, precision=self.method.precision)
        else:
            found = self.average.module
        assert isinstance(found, Encoder | TimmBackbone)
        return found

    def final_result(self) -> TokenEncoder:
        """Return the averaged encoder in full precision, for rank 0 only; gathered on the CPU if it is sharded."""
        if not isinstance(self.average, ShardedAverage):
            return self.result()
        return cast(TokenEncoder, self.average.sharded.plain_on_first(self.average.weights))

    def head_weights(self) -> list[float]:
        """Return each head's loss weight at the current step of the loss schedule."""
        schedule = self.plan.config.loss.schedule
        return head_weights(schedule, self.step / self.total, len(self.plan.blocks))

    def after_update(self) -> None:
        self.average.update()

    def start(self) -> None:
        """Check the base, with which later checks are compared; skipped if the saved state contains this check."""
        if self.plan.config.monitor.knn_every_epochs and self.collapse is None:
            # Monitoring may be switched on when a run is resumed: its encoder is no longer the base.
            base = self._base() if self.step else self.method.plain_encoder()
            self.collapse = CollapseWatch(self.monitor.check(base))
            self.report("start", self.collapse.start)

    def _base(self) -> TokenEncoder:
        if not self.run.sharded:
            return base_encoder(self.plan, self.device)
        return lean(base_encoder(self.plan, torch.device("cpu")), self.method.precision).to(self.device)

    def end_epoch(self, epoch: int) -> None:
        """When a check is due, check the features of the result and warn of a collapse."""
        if not self.check_due(epoch, self.plan.config.monitor.knn_every_epochs) or self.collapse is None:
            return
        values = self.monitor.check(self.result())
        self.report(f"epoch {epoch}", values)
        warning = self.collapse.warning(values)
        if warning:
            self.run.listener.warn(f"epoch {epoch}: {warning}")

    def state(self) -> dict[str, Any]:
        return {
            **super().state(),
            "encoder": self.method.encoder.state_dict(),
            "average": self.average.state_dict(),
            "collapse_start": self.collapse.start if self.collapse else None,
        }

    def resume(self, state: dict[str, Any]) -> None:
        super().resume(state)
        encoder = self.method.encoder
        encoder.load_state_dict(like(state["encoder"], encoder.state_dict()))
        self.average.load_state_dict(state["average"])
        if state["collapse_start"] is not None:
            self.collapse = CollapseWatch(state["collapse_start"])


def dense_term(plan: Plan, method: Method) -> DenseTerm | None:
    """Return the dense term that the settings ask for, with its own copy of the base, or None."""
    kind = plan.config.loss.dense
    if kind == "none":
        return None
    sharded = method.sharded_encoder is not None
    base = base_encoder(plan, torch.device("cpu"), share=True) if sharded else base_encoder(plan, method.device)
    base.requires_grad_(False)
    if sharded:
        Sharded(base, base.block_modules, method.device, method="blocks")
    if method.compiled:
        compile_blocks(base)
    return DenseTerm(base, max(plan.blocks), kind)
