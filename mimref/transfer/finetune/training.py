"""One training run of an encoder and its classifier on labels.

Shapes: B images of a batch, N images of the split, C classes, P residual branches with stochastic depth.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimref.config.run import ViewsConfig
from mimref.data.loader import Preparation, ViewBatch
from mimref.data.sources import ImageSource
from mimref.data.views import CropGroup, Photometric
from mimref.devices import autocast, choose_attention, keep_freed_memory, resolve_device, resolve_precision, send
from mimref.distributed.collectives import averaged, max_over_ranks, sum_over_ranks
from mimref.distributed.group import world_size
from mimref.distributed.sharding import Sharded, like
from mimref.draws import Operation, uniform
from mimref.encoders.classifier import Classifier, set_stochastic_depth
from mimref.encoders.parameters import encoder_groups, freeze_untrained
from mimref.errors import DataError
from mimref.features.encode import PassSettings
from mimref.training.ema import ShardedAverage, WeightAverage
from mimref.training.optim import module_groups
from mimref.training.run import Stage, TrainingRun
from mimref.transfer.finetune.augment import Erasing, RandAugment, mix
from mimref.transfer.finetune.classify import Scores, accuracy
from mimref.transfer.finetune.plan import Plan

Epoch = dict[str, float]
"""Number of an epoch (`epoch`), and the accuracy on the validation images after it (`top1` and `top5`)."""


class FineTuning(Stage):
    """Training of a classifier on the images of one split."""

    name = "finetune"

    def __init__(self, run: TrainingRun, plan: Plan, split: int, history: list[list[Epoch]]) -> None:
        """history: the epochs of every split so far; this training appends to those of its own split."""
        config, device = plan.config, resolve_device(plan.config.device)
        self.plan, self.split, self.history = plan, split, history
        self.config, self.precision = config, resolve_precision(config.precision, device)
        if device.type == "cpu":
            keep_freed_memory()
        settings, augment = config.finetune, config.augment
        self.classifier = _build(plan, torch.device("cpu") if run.sharded else device, share=run.sharded)
        choose_attention(self.classifier, device, self.precision)
        self.depths = set_stochastic_depth(self.classifier.encoder, settings.drop_path)
        self.sharded: Sharded | None = None
        self.trained_model: nn.Module = self.classifier
        if run.sharded:
            self.sharded = Sharded(self.classifier, self.classifier.encoder.block_modules, device)
        else:
            self.trained_model = averaged(self.classifier, device)
        self.average: WeightAverage | ShardedAverage | None = None
        if settings.ema is not None and self.sharded is not None:
            self.average = ShardedAverage(self.sharded, settings.ema)
        elif settings.ema is not None:
            self.average = WeightAverage(self.classifier, settings.ema)
        self.label_N = torch.from_numpy(plan.labels_of(split))
        head = nn.ModuleDict({"fc_norm": self.classifier.fc_norm, "head": self.classifier.head})
        decay, size = settings.weight_decay, plan.transform.image_size
        splits = len(plan.splits)
        super().__init__(
            run,
            "fine-tuning" if splits == 1 else f"fine-tuning, split {split + 1} of {splits}",
            encoder_groups(self.classifier.encoder, weight_decay=decay, layer_decay=settings.layer_decay)
            + module_groups(head, weight_decay=decay),
            lr=settings.lr,
            warmup_epochs=settings.warmup_epochs,
            epochs=settings.epochs,
            source=plan.images(split),
            crops=[CropGroup(1, size, augment.crop_scale, augment.aspect_ratio)],
            device=device,
        )
        # Epochs count on from split to split, so that each split has its own random views.
        self.first_epoch = split * settings.epochs
        self.first_step = sum(len(plan.images(each)) // config.batch_size for each in range(split)) * settings.epochs
        mean, std = plan.transform.mean, plan.transform.std
        change = RandAugment(augment.rand_augment, config.seed, mean) if augment.rand_augment else None
        self.preparation = Preparation(augment.resize, change)
        self.together = 2 if augment.mixup or augment.cutmix else 1
        plain = ViewsConfig(flip=augment.flip, color=False, blur=False)
        self.photometric = Photometric(plain, config.seed, device, mean=mean, std=std)
        self.erasing = Erasing(augment.erase, config.seed, device)
        workers, max_bad = config.workers, config.data.max_bad
        self.evaluation = PassSettings(plan.transform, device, self.precision, workers=workers, max_bad=max_bad)

    @property
    def all_images(self) -> ImageSource:
        """See `Stage`."""
        return self.plan.train

    def result(self) -> Classifier:
        """Return the classifier to evaluate, with the averaged weights if an average is kept.

        If the classifier is sharded, this is an unsharded copy: call it on all ranks.
        """
        if self.sharded is not None:
            weights = self._weights(self.sharded)
            # `classify` computes logits without autocast.
            found = self.sharded.plain(weights, self.device, precision=self.precision, uncast="head")
        else:
            found = self.average.module if isinstance(self.average, WeightAverage) else self.classifier
        assert isinstance(found, Classifier)
        return found

    def final_result(self) -> Classifier:
        """Return the same for rank 0 to write, in full precision; call it on all ranks."""
        if self.sharded is None:
            return self.result()
        return cast(Classifier, self.sharded.plain_on_first(self._weights(self.sharded)))

    def _weights(self, sharded: Sharded) -> dict[str, Tensor]:
        return self.average.weights if isinstance(self.average, ShardedAverage) else sharded.weights

    def forward_backward(self, batch: ViewBatch, images: int) -> Tensor:
        """Return this rank's share of the loss, times the number of ranks, because the ranks average gradients."""
        augment, seed, epoch, sample_B = self.config.augment, self.config.seed, batch.epoch, batch.sample_B
        pixels = self.photometric(batch.crops[0], epoch, sample_B, [0])[0]
        self.erasing(pixels, epoch, sample_B)
        mixed = mix(pixels, batch.places, augment, seed, epoch, self.step)
        label_B = send(self.label_N[sample_B], self.device)
        partner_B = label_B[mixed.partner_B]
        drop_PB = uniform(seed, epoch, Operation.DROP_PATH, send(sample_B, self.device), count=len(self.depths)).T
        self._loss = torch.zeros((), device=self.device)
        for rows, is_last in self._parts(len(sample_B)):
            part, uniform_PB = mixed.images[rows], drop_PB[:, rows]
            if not (images_here := len(part)):
                # Not every kernel and model accepts an empty batch: classify a black image and drop its logits.
                part, uniform_PB = part.new_zeros(1, *part.shape[1:]), drop_PB.new_zeros(len(drop_PB), 1)
            for depth, uniform_B in zip(self.depths, uniform_PB, strict=True):
                depth.uniform_B = uniform_B
            with self._synchronised(is_last):
                with autocast(self.device, self.precision):
                    logits_BC = self.trained_model(part)
                if not images_here:
                    logits_BC = logits_BC[:0]
                loss = mixed.loss(logits_BC, label_B[rows], partner_B[rows], augment.smoothing)
                loss = loss * (world_size() / images)
                loss.backward()
            self._loss += loss.detach()
        return self._loss

    def _parts(self, images: int) -> Iterator[tuple[slice, bool]]:
        """Yield the micro-batches, and whether each is the last. A rank without images gets an empty one, as DDP needs.

        With sharded weights every pass needs all ranks: all get as many micro-batches as the rank with the most images.
        """
        most = max(images, 1)
        size = self.config.micro_batch or most
        if self.sharded is not None and self.config.micro_batch:
            most = max(most, max_over_ranks(images))
        for start in range(0, most, size):
            yield slice(min(start, images), min(start + size, images)), start + size >= most

    def _synchronised(self, is_last: bool) -> AbstractContextManager[None]:
        """Make ranks average the gradients once per batch; with sharded weights, after every pass, see `Method`."""
        if is_last or not isinstance(self.trained_model, DistributedDataParallel):
            return nullcontext()
        waiting: AbstractContextManager[None] = self.trained_model.no_sync()
        return waiting

    def after_update(self) -> None:
        if self.average is not None:
            self.average.update()

    def values(self) -> dict[str, object]:
        loss = float(sum_over_ranks(self._loss)) / world_size()
        return {"loss": loss, "lr": self.rate(self.step - 1)}

    def end_epoch(self, epoch: int) -> None:
        """Classify the validation images, if a validation is due after this epoch."""
        if not self.check_due(epoch, self.config.monitor.validate_every_epochs):
            return
        scores = self.validate()
        values = {"val_top1": scores.top1} | ({} if scores.top5 is None else {"val_top5": scores.top5})
        self.history[self.split].append({"epoch": epoch} | {name[4:]: value for name, value in values.items()})
        self.report(f"{self.label}, epoch {epoch}", values)

    def validate(self) -> Scores:
        """Return the accuracy on the validation images. Raises DataError if none of them can be read."""
        scores = accuracy(self.result(), self.plan.val, self.plan.val_labels, self.evaluation)
        self.run.skipped.add_evaluated(scores.bad)
        return scores

    def log(self, values: Any) -> None:
        """See `Stage`; adds the split's number if there are several."""
        super().log({"split": self.split + 1, **values} if len(self.plan.splits) > 1 else values)

    def state(self) -> dict[str, Any]:
        averaged_state = {} if self.average is None else {"average": self.average.state_dict()}
        found = {"split": self.split, "history": self.history, "model": self.classifier.state_dict()}
        return {**super().state(), **found, **averaged_state, "split_images": len(self.label_N)}

    def resume(self, state: dict[str, Any]) -> None:
        """See `Stage`. Raises DataError if a split file lists a different number of images than before."""
        if len(self.label_N) != state["split_images"]:
            raise DataError(
                f"cannot resume {self.label} with {len(self.label_N)} images, it was started with "
                f"{state['split_images']}; restore the split file, or start over in another --out"
            )
        super().resume(state)
        self.history[:] = state["history"]
        self.classifier.load_state_dict(like(state["model"], self.classifier.state_dict()))
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def _build(plan: Plan, device: torch.device, *, share: bool) -> Classifier:
    """Build the classifier to train, with all untrained parameters frozen. share: see `Plan.encoder`."""
    settings = plan.config.finetune
    encoder = plan.encoder(device, share=share)
    torch.manual_seed(plan.config.seed)
    classifier = Classifier(encoder, len(plan.classes), settings.pool).to(device)
    freeze_untrained(encoder, first=settings.freeze_blocks, last=encoder.depth)
    if not classifier.final_norm:
        encoder.vit.norm.requires_grad_(False)
    if not settings.train_positions and encoder.vit.pos_embed is not None:
        encoder.vit.pos_embed.requires_grad_(False)
    encoder.checkpointing = plan.config.activation_checkpointing
    return classifier.train()
