"""Pre-train a masked autoencoder on the user's images."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimref.data.loader import ViewBatch, check_batch_size, device_batches, loader_workers, view_batches
from mimref.data.open import ACCEPTED, open_source
from mimref.data.photometric import Photometric
from mimref.data.views import CropGroup
from mimref.devices import autocast, keep_freed_memory, resolve_device, resolve_precision
from mimref.distributed.collectives import agree, averaged, gather_lists, sum_over_ranks, total
from mimref.distributed.group import end_group, own_rank, world_size
from mimref.draws import Operation, uniform
from mimref.encoders.checkpoints import save_encoder
from mimref.encoders.parameters import encoder_groups
from mimref.encoders.vit import Architecture, build_encoder
from mimref.errors import ConfigError
from mimref.evaluation.monitor import KnnMonitor
from mimref.features.header import data_record, eval_transform
from mimref.pretraining.config import PretrainConfig
from mimref.pretraining.mae import MaskedAutoencoder
from mimref.progress import Listener, Silent
from mimref.results import Row, Tabular, read_results, write_results
from mimref.training.checkpoint import check_images, check_ranks, images_of
from mimref.training.folder import RunFolder, reloadable
from mimref.training.job import FiniteLoss, train
from mimref.training.log import MetricsLog, SkippedImages, open_log, readable
from mimref.training.optim import adamw, learning_rate, module_groups, set_learning_rate
from mimref.training.signals import stop_signal
from mimref.training.trackers import check_trackers


@dataclass(frozen=True)
class PretrainResult(Tabular):
    """What a pre-training run produced."""

    out: Path
    rows: list[Row]
    """The monitor's values at the end."""
    elapsed_s: float


class Pretraining:
    """One run's objects; a `Job` of `mimref.training.job`."""

    label = "pre-training"

    def __init__(self, config: PretrainConfig, folder: RunFolder, listener: Listener) -> None:
        self.config, self.folder, self.listener = config, folder, listener
        self.device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        architecture = _architecture(config)
        self.source = open_source(config.data, "train", progress=listener.progress)
        self.steps_per_epoch = len(self.source) // config.batch_size
        check_batch_size(config.batch_size, len(self.source))
        self.transform = eval_transform(architecture, config.data, {})
        torch.manual_seed(config.seed)
        encoder = build_encoder(architecture)
        self.model = MaskedAutoencoder(encoder, config.mae.decoder, config.mae.mask_ratio).to(self.device)
        self.trained: nn.Module = averaged(self.model, self.device) if world_size() > 1 else self.model
        groups = encoder_groups(encoder, weight_decay=config.mae.weight_decay, layer_decay=1.0)
        groups += module_groups(self.model.decoder, weight_decay=config.mae.weight_decay)
        self.optimizer = adamw(groups, config.optimizer.betas)
        # MAE augments by crop and flip alone.
        plain = config.views.model_copy(update={"color": False, "blur": False})
        self.photometric = Photometric(
            plain, config.seed, self.device, mean=self.transform.mean, std=self.transform.std
        )
        self.monitor = KnnMonitor(config, self.source, self.transform, self.device, self.precision, note=listener.note)
        self.guard = FiniteLoss(self.device)
        self.skipped = SkippedImages(config.data.max_bad, listener)
        self.step, self.elapsed_s = 0, 0.0
        self.total = config.mae.epochs * self.steps_per_epoch
        self.rows: list[Row] = []
        self.log: MetricsLog | None = None
        self._loss: Tensor | None = None

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed_s, self.rows = state["step"], state["elapsed_s"], state["rows"]
        self.skipped.add(state["skipped"])

    def save(self) -> None:
        """See `Job`."""
        self.skipped.add(gather_lists(self.skipped.items))
        self.skipped.tell_early()
        self.folder.save_state(self._state)

    def _state(self) -> dict[str, Any]:
        assert self.log is not None
        return {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "rows": self.rows,
            "log_lines": self.log.lines,
            "skipped": self.skipped.items,
            "images": images_of(self.source),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def batches(self) -> Iterator[ViewBatch]:
        """The remaining batches: one random crop per image."""
        if self.step == self.total:
            return iter(())
        config = self.config
        group = CropGroup(1, self.transform.image_size, config.mae.crop_scale, config.views.aspect_ratio)
        batches = view_batches(
            self.source,
            [group],
            batch_size=config.batch_size,
            seed=config.seed,
            epochs=range(self.step // self.steps_per_epoch, config.mae.epochs),
            skip=self.step % self.steps_per_epoch,
            workers=loader_workers(config.workers, self.source),
            pin_memory=self.device.type == "cuda",
            reduce_jpeg=True,
        )
        return device_batches(batches, self.device)

    def rate(self) -> float:
        """Learning rate of the next update."""
        config = self.config.mae
        return learning_rate(
            self.step,
            peak=config.lr * self.config.batch_size / 256,
            warmup_updates=round(config.warmup_epochs * self.steps_per_epoch),
            total_updates=self.total,
            end=self.config.optimizer.end_lr,
        )

    def update(self, batch: ViewBatch) -> None:
        """See `Job`."""
        self._loss = None
        self.skipped.add(batch.bad)
        images_of_all = total(len(batch.sample_B))
        if not images_of_all:
            return
        set_learning_rate(self.optimizer, self.rate())
        images = self.photometric(batch.crops[0], batch.epoch, batch.sample_B, [0])[0]
        seed, patches = self.config.seed, self.model.num_patches
        sample_B = batch.sample_B.to(self.device, non_blocking=True)
        noise = uniform(seed, batch.epoch, Operation.MASK, sample_B, count=patches)
        with autocast(self.device, self.precision):
            loss = self.trained(images, noise)
        # Ranks' gradients are averaged: each counts by its part of the batch.
        loss = loss * (len(batch.sample_B) * world_size() / images_of_all)
        self.guard.watch(loss, self.step + 1)
        loss.backward()
        if self.config.optimizer.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._loss = loss.detach()

    def write_log(self) -> None:
        """See `Job`."""
        if self.log and self._loss is not None:
            rate = self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["lr_scale"]
            loss = float(sum_over_ranks(self._loss)) / world_size()
            self.log.write({**self._position(), "loss": loss, "lr": rate})

    def _position(self) -> dict[str, object]:
        return {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 4), "stage": "pretrain"}

    def end_epoch(self, epoch: int) -> None:
        """See `Job`."""
        every = self.config.monitor.knn_every_epochs
        if not every or (epoch % every and self.step < self.total):
            return
        values = self.monitor.check(self.model.encoder)
        if self.log:
            self.log.write({**self._position(), **values})
        self.listener.note(f"epoch {epoch}: {readable(values)}")
        self.rows = [{"metric": name, "value": value} for name, value in values.items()]


def pretrain(
    config: PretrainConfig, out: Path, *, resume: bool = False, force: bool = False, listener: Listener | None = None
) -> PretrainResult:
    """Train a masked autoencoder and write `encoder.safetensors` with its header, log and results into `out`.

    Works on unlabelled images; labels, where there are any, only serve the k-NN check. resume: continue the unfinished
    run in `out`; of a finished one, return its results. force: replace what a run has left in `out`. Raises UserError
    subclasses for settings, images or folders that do not fit, Interrupted after saving when a signal arrives.
    In a process group every rank calls this with the same arguments and rank 0 alone writes.
    """
    listener = listener if listener and own_rank() == 0 else Silent()
    folder = RunFolder(out)
    if folder.holds_result(resume=resume, force=force):
        found = read_results(out, config.command)
        folder.drop_state()  # of a run killed just before it did so itself
        return PretrainResult(out, *found)
    check_trackers(config.monitor.trackers)
    with stop_signal() as stop, folder.locked(resume=resume, force=force):
        run = Pretraining(config, folder, listener)
        state = folder.load_state(listener) if resume else None
        check_ranks(state, run.source)
        if state:
            check_images(state, run.source, listener)
            run.resume(state)
        config = reloadable(config)
        folder.prepare(config, resume=resume, force=force)
        with closing(open_log(config, out, state)) as run.log:
            del state  # as large as the run itself
            train(run, run.batches(), stop, listener, log_every=config.monitor.log_every)
        agree(0)
        if end_group():
            _write(run, config, out)
            folder.drop_state()
    return PretrainResult(out, run.rows, run.elapsed_s)


def _architecture(config: PretrainConfig) -> Architecture:
    """The encoder to be trained. Raises ConfigError for one that a masked autoencoder is not made of."""
    if config.data.spec is None:
        raise ConfigError(f"no images: pass --data ({ACCEPTED})")
    if config.encoder.weights is not None:
        raise ConfigError(f"pretrain starts from random weights; leave out encoder.weights {config.encoder.weights!r}")
    architecture = Architecture.from_config(config.encoder)
    if architecture.post_norm or architecture.from_timm:
        raise ConfigError(f"pretrain builds MAE's own encoders; encoder.arch {architecture.name!r} is not one")
    architecture.check_size(architecture.image_size, "encoder.image_size")
    if architecture.image_size == architecture.patch_size:
        raise ConfigError(
            f"encoder.image_size {architecture.image_size} is one patch; masking needs at least two patches a side"
        )
    return architecture


def _write(run: Pretraining, config: PretrainConfig, out: Path) -> None:
    header = {
        "source": "mae",
        "preset": config.preset,
        "data": data_record(config.data),
        "transform": run.transform.to_dict(),
        "metrics": run.rows,
    }
    dtype = torch.float16 if config.mae.save_dtype == "fp16" else torch.float32
    save_encoder(out / "encoder.safetensors", run.model.encoder, header, dtype=dtype)
    run.skipped.tell_all()
    document, skipped = config.model_dump(mode="json"), run.skipped.items
    write_results(out, config.command, document, run.elapsed_s, run.rows, bad_images=skipped)
