"""Linear segmentation on frozen patch tokens: heads trained on random crops, resumable like a probe."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from mimref.data.decode import BadImages
from mimref.data.loader import loader_workers
from mimref.data.masks.sources import Pairs
from mimref.features.encode import PassSettings
from mimref.progress import Progress, ProgressOnly
from mimref.training.checkpoint import damaged_state, matching_state, write_state
from mimref.training.job import Job
from mimref.training.job import train as run_job
from mimref.training.optim import learning_rate
from mimref.training.signals import stop_signal
from mimref.transfer.segment.config import SegmentConfig, TrainingConfig
from mimref.transfer.segment.heads import HeadsTrainer, SegmentationHeads, grid
from mimref.transfer.segment.photometric import distort
from mimref.transfer.segment.tokens import PatchTokens
from mimref.transfer.segment.transforms import CropBatch, crop_batches

END_RATE = 1e-6
_WARMUP_FROM = 1e-6
"""Factor of the learning rate at the start of mmsegmentation's warm-up."""


def schedule(update: int, total: int, settings: TrainingConfig) -> tuple[float, float]:
    """Return the learning rates of an update (0-based), as `scale` and `offset` of `HeadsTrainer.step`.

    cosine: the release's schedule, a linear warm-up (10% by default), then a cosine to 1e-6. linear: mmsegmentation's
    polynomial of power 1; its warm-up multiplies the decaying rate.
    """
    warmup = int(settings.warmup * total)
    if settings.schedule == "cosine":
        # The schedule is linear in its peak and end rates, so all heads share these two numbers.
        rate = partial(learning_rate, update, warmup_updates=warmup, total_updates=total)
        return rate(peak=1.0, end=0.0), rate(peak=0.0, end=END_RATE)
    scale = 1 - update / total
    if update < warmup:
        scale *= 1 - (1 - update / warmup) * (1 - _WARMUP_FROM)
    return scale, 0.0


class HeadsJob(Job[CropBatch]):
    """Trains all heads on random crops of the training images."""

    label = "segmentation heads"
    saves_every_epoch = False

    def __init__(
        self, config: SegmentConfig, pairs: Pairs, tokens: PatchTokens, reading: PassSettings, *, state: Path | None
    ) -> None:
        """state: the file from which interrupted training continues."""
        self.config, self.pairs, self.tokens, self.reading, self.file = config, pairs, tokens, reading, state
        settings = config.training
        self.batch = min(settings.batch_size, len(pairs))
        # The last, partial batch of an epoch is dropped.
        self.steps_per_epoch = len(pairs) // self.batch
        self.total = settings.updates or settings.epochs * self.steps_per_epoch
        self.lrs = list(settings.lr) if config.blocks is None else [settings.block_lr]
        scale = self.batch / 256 if settings.optimizer == "sgd" else 1.0
        self.heads = SegmentationHeads(
            tokens.widths, pairs.classes, len(self.lrs), affine=settings.affine, seed=config.seed, device=reading.device
        )
        self.trainer = HeadsTrainer(
            self.heads,
            settings.optimizer,
            [lr * scale for lr in self.lrs],
            weight_decay=settings.weight_decay,
            upsampling=settings.upsampling,
        )
        self.bad = BadImages(reading.max_bad)

    def run(self, fingerprint: str, progress: Progress | None) -> None:
        """Train, or continue where an earlier run stopped. fingerprint: that of the encoder's weights."""
        if self.file is not None:
            self.load(self.file, fingerprint)
        if self.step < self.total:
            with nullcontext() if self.file is None else stop_signal() as stop:
                run_job(self, self.batches(), ProgressOnly(progress), stop=stop)

    def batches(self) -> Iterator[CropBatch]:
        """Yield all batches from the current update on."""
        epoch, skip = divmod(self.step, self.steps_per_epoch)
        found = crop_batches(
            self.pairs,
            self.reading.transform.image_size,
            self.config.crops,
            batch_size=self.batch,
            seed=self.config.seed,
            epochs=range(epoch, -(-self.total // self.steps_per_epoch)),
            skip=skip,
            workers=loader_workers(self.reading.workers, self.pairs.images),
            pin_memory=self.reading.device.type == "cuda",
        )
        for _, batch in zip(range(self.total - self.step), found, strict=False):
            yield batch

    def update(self, batch: CropBatch) -> None:
        """Train on one batch, unless none of its images can be read."""
        self.bad.add_all(batch.bad)
        if len(batch.sample_B):
            inputs = self.tokens(self.images(batch))
            mask = batch.masks.to(self.reading.device, non_blocking=True)
            self.trainer.step(inputs, mask, *schedule(self.step, self.total, self.config.training))

    def images(self, batch: CropBatch) -> Tensor:
        """Return normalised crops on the device; their padding has the mean colour."""
        crops = batch.images.to(self.reading.device, non_blocking=True)
        if self.config.crops.distort_color:
            crops = 255 * distort(crops.float() / 255, self.config.seed, batch.epoch, batch.sample_B)
        images = self.reading.transform.normalize(crops)
        for image, (height, width) in zip(images, batch.sizes, strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return images

    def scores(self, images_n3SS: Tensor) -> Tensor:
        """Return the scores (K, n, C, h, w) of normalised images, with BatchNorm's running statistics."""
        self.heads.eval()
        found = [grid(each.transpose(1, 2).flatten(0, 1)) for each in self.heads(self.tokens(images_n3SS))]
        return torch.cat([each.unflatten(0, (self.heads.heads, -1)) for each in found])

    def identity(self, fingerprint: str) -> dict[str, object]:
        """Return everything on which the result depends."""
        read = self.reading.transform.to_dict() | self.pairs.images.decoding.changes()
        images = f"{self.pairs.fingerprint} {self.pairs.masks.coding}"
        about = f"{images} {fingerprint} {json.dumps(read, sort_keys=True)} {self.reading.precision}"
        return {
            "training": self.config.training.model_dump(mode="json"),
            "crops": self.config.crops.model_dump(mode="json"),
            "seed": self.config.seed,
            "inputs": [*map(str, self.tokens.inputs), str(self.tokens.final_norm)],
            "set of images or encoder": sha256(about.encode()).hexdigest()[:16],
        }

    def save(self) -> None:
        """Write the state, if a file was given."""
        if self.file is not None:
            state = {"heads": self.heads.state_dict(), "optimizer": self.trainer.optimizer.state_dict()}
            write_state(self.file, {"settings": self.settings, "step": self.step, "bad": self.bad.items, **state})

    def load(self, file: Path, fingerprint: str) -> None:
        """Continue from a state file, if it exists. Raises the same errors as `matching_state`."""
        self.settings = self.identity(fingerprint)
        try:
            if (saved := matching_state(file, self.settings, "segmentation")) is None:
                return
            step = int(saved["step"])
            self.heads.load_state_dict(saved["heads"])
            self.trainer.optimizer.load_state_dict(saved["optimizer"])
            self.bad.add_all(saved["bad"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise damaged_state(file, "segmentation") from error
        self.step = step
