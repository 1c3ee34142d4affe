"""Pre-train an encoder on the user's images by masked image modelling."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimref.data.loader import ViewBatch
from mimref.data.views import CropGroup, Photometric
from mimref.devices import autocast, choose_attention, keep_freed_memory, resolve_device, resolve_precision, send
from mimref.distributed.collectives import averaged, sum_over_ranks
from mimref.distributed.group import world_size
from mimref.draws import Operation, uniform
from mimref.encoders.checkpoints import save_encoder
from mimref.encoders.parameters import encoder_groups
from mimref.encoders.vit import Encoder, build_encoder
from mimref.errors import Checks
from mimref.evaluation.exhibits.collect import Exhibition, encoder_model
from mimref.evaluation.monitor import KnnMonitor
from mimref.features.encode import PIXELS, raw_pixels
from mimref.features.header import data_record, eval_transform
from mimref.pretraining.config import PretrainConfig
from mimref.pretraining.mae import MaskedAutoencoder
from mimref.pretraining.plan import Plan, make_plan
from mimref.pretraining.simmim import SimMIM
from mimref.progress import Listener
from mimref.results import Row
from mimref.training.optim import module_groups
from mimref.training.run import Stage, TrainingResult, TrainingRun


class Pretraining(Stage):
    """The pre-training of an encoder together with the modules that its objective adds."""

    name = "pretrain"

    def __init__(self, run: TrainingRun, plan: Plan) -> None:
        config, architecture, source = plan.config, plan.architecture, plan.source
        device = resolve_device(config.device)
        self.config, self.precision = config, resolve_precision(config.precision, device)
        if device.type == "cpu":
            keep_freed_memory()
        for notice in source.notices:
            run.listener.warn(notice)
        self.transform = eval_transform(architecture, config.data, {})
        torch.manual_seed(config.seed)
        encoder = build_encoder(architecture)
        settings = config.masking
        self.model = build_model(encoder, config).to(device)
        choose_attention(self.model, device, self.precision)
        self.trained_model = averaged(self.model, device)
        super().__init__(
            run,
            "pre-training",
            encoder_groups(encoder, weight_decay=settings.weight_decay, layer_decay=1.0)
            + module_groups(self.model.decoder, weight_decay=settings.weight_decay),
            lr=settings.lr,
            warmup_epochs=settings.warmup_epochs,
            epochs=settings.epochs,
            source=source,
            crops=[CropGroup(1, architecture.image_size, settings.crop_scale, config.views.aspect_ratio)],
            device=device,
        )
        # MAE and SimMIM augment by crops and flips only.
        plain = config.views.model_copy(update={"color": False, "blur": False})
        self.photometric = Photometric(plain, config.seed, device, mean=self.transform.mean, std=self.transform.std)
        note = run.listener.note
        self.monitor = KnnMonitor(config, source, self.transform, device, self.precision, note=note, views=plain)
        self.rows: list[Row] = []

    def forward_backward(self, batch: ViewBatch, images: int) -> Tensor:
        """Compute this rank's share of the loss, times the number of ranks since they average gradients."""
        views = self.photometric(batch.crops[0], batch.epoch, batch.sample_B, [0])[0]
        sample_B = send(batch.sample_B, self.device)
        noise = uniform(self.config.seed, batch.epoch, Operation.MASK, sample_B, count=self.model.num_patches)
        if not len(sample_B):
            # Not all kernels accept an empty batch: encode a black image, whose loss has weight zero.
            views, noise = (each.new_zeros(1, *each.shape[1:]) for each in (views, noise))
        with autocast(self.device, self.precision):
            loss: Tensor = self.trained_model(views, noise)
        # Gradients are averaged over ranks: weight each rank by its share of the batch.
        loss = loss * (len(batch.sample_B) * world_size() / images)
        loss.backward()
        self._loss = loss.detach()
        return self._loss

    def values(self) -> dict[str, object]:
        return {"loss": float(sum_over_ranks(self._loss)) / world_size(), "lr": self.rate(self.step - 1)}

    def end_epoch(self, epoch: int) -> None:
        if self.check_due(epoch, self.config.monitor.knn_every_epochs):
            values = self.monitor.check(self.model.encoder)
            self.report(f"epoch {epoch}", values)
            self.rows = [{"metric": name, "value": value} for name, value in values.items()]

    def state(self) -> dict[str, Any]:
        return {**super().state(), "model": self.model.state_dict(), "rows": self.rows}

    def resume(self, state: dict[str, Any]) -> None:
        super().resume(state)
        self.model.load_state_dict(state["model"])
        self.rows = state["rows"]


def build_model(encoder: Encoder, config: PretrainConfig) -> MaskedAutoencoder | SimMIM:
    """Return the encoder with the modules that the objective adds, with newly initialised weights."""
    if config.objective == "simmim":
        return SimMIM(encoder, config.simmim.mask_ratio, config.simmim.mask_size)
    return MaskedAutoencoder(encoder, config.mae.decoder, config.mae.mask_ratio)


def pretrain(
    config: PretrainConfig,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    listener: Listener | None = None,
    checks: Checks | None = None,
) -> TrainingResult:
    """Train an encoder by masked image modelling; write `encoder.safetensors` with header, log and results to `out`.

    Needs no labels; if there are any, only the k-NN check uses them. resume: continue the unfinished run in `out`, or
    return the results of a finished one. force: replace the files of an earlier run in `out`. checks: mistakes found
    earlier. Raises UserError subclasses for settings, images or folders that do not fit, a single error for all
    mistakes; Interrupted after saving on a signal.
    In a process group every rank calls this with the same arguments; only rank 0 writes.
    """
    run = TrainingRun(config, out, listener, resume=resume, force=force)
    checks = checks or Checks()
    if (found := run.finished(checks)) is not None:
        return TrainingResult(out, *found)
    plan = make_plan(config, run.listener, checks)
    config = run.config = plan.config
    for derived in plan.derived:
        run.listener.note(str(derived))
    with run.locked():
        job = Pretraining(run, plan)
        state = run.load_state(job.source)
        with run.writing(config, plan.derived, state):
            run.train(job, state)
        if run.leave_group():
            _write_encoder(job, config, out)
            _exhibit(job, config, out)
            run.finish(job.rows)
    return TrainingResult(out, job.rows, run.elapsed_s, run.skipped.items)


def _exhibit(job: Pretraining, config: PretrainConfig, out: Path) -> None:
    """Save exhibits of the k-NN check's images, by pixels and by the encoder; without labels, of training images."""
    if not (config.evaluate.enabled and config.evaluate.exhibits):
        return
    monitor, listener, encoder = job.monitor, job.run.listener, job.model.encoder
    settings, votes = monitor.settings, monitor.test is not None
    source, what = (monitor.test, "validation images") if monitor.test else (job.source, "training images")
    exhibition = Exhibition.of_some(source, settings, config.seed, listener, what)
    models = [
        ("raw pixels", PIXELS, lambda images: raw_pixels(images, settings)),
        encoder_model("encoder", encoder, settings),
    ]
    exhibition.add_passes(
        models, monitor.train if votes else None, k=config.evaluate.knn_k, tau=config.evaluate.knn_tau
    )
    exhibition.save(out)


def _write_encoder(job: Pretraining, config: PretrainConfig, out: Path) -> None:
    header = {
        "source": config.objective,
        "preset": job.run.config.preset,
        "data": data_record(config.data),
        "transform": job.transform.to_dict(),
        "metrics": job.rows,
    }
    dtype = torch.float16 if config.masking.save_dtype == "fp16" else torch.float32
    save_encoder(out / "encoder.safetensors", job.model.encoder, header, dtype=dtype)
