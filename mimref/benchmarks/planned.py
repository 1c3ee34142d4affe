"""Describe a planned pre-training or fine-tuning: sizes, steps, memory, and time on this machine."""

import tempfile
from pathlib import Path

from mimref.benchmarks.duration import image_seconds, readable, step_seconds
from mimref.pretraining.plan import Plan as PretrainingPlan
from mimref.pretraining.run import Pretraining
from mimref.training.run import TrainingRun
from mimref.transfer.finetune.plan import Plan as FineTuningPlan
from mimref.transfer.finetune.training import FineTuning

_STATE_BYTES = 16
"""Per trained weight: the weight, its gradient and AdamW's two moments in float32."""


def describe_pretraining(plan: PretrainingPlan) -> dict[str, str]:
    """Return what `mimref pretrain --dry-run` shows of a plan, label to text; times a few updates of the real run.

    Files are written to a temporary folder only. Raises DivergenceError when a loss is not finite.
    """
    config, architecture, images = plan.config, plan.architecture, len(plan.source)
    with tempfile.TemporaryDirectory() as folder:
        job = Pretraining(TrainingRun(config, Path(folder), None), plan)
        every = config.monitor.knn_every_epochs
        seen = job.monitor.images_per_check * -(-config.masking.epochs // every) if every else 0
        passes_s = seen * image_seconds(job.model.encoder, plan.source, job.monitor.settings, architecture.depth)
        encoder, decoder = (
            sum(weight.numel() for weight in part.parameters()) for part in (job.model.encoder, job.model.decoder)
        )
        step_s = step_seconds(job)
    steps, hidden = config.masking.epochs * plan.steps_per_epoch, job.model.num_patches - job.model.num_visible
    size, patch = architecture.image_size, architecture.patch_size
    sizes = f"depth {config.mae.decoder.depth}, width {config.mae.decoder.width}"
    return {
        "encoder": f"{architecture.name}, {architecture.depth} blocks of width {architecture.width}, {encoder:,} "
        f"parameters; images of {size} pixels in {job.model.num_patches} patches of {patch}, {hidden} of them hidden",
        "decoder": f"{sizes if config.objective == 'mae' else 'one linear layer'}, {decoder:,} parameters",
        "images": f"{images:,} of {plan.source.name}, batches of {config.batch_size}",
        "steps": f"{steps:,} in {config.masking.epochs} epochs",
        "memory": _state_memory(encoder + decoder),
        "time": f"about {readable(steps * step_s + passes_s)} on this machine: {readable(steps * step_s)} of training "
        f"({1e3 * step_s:,.0f} ms per step) and {readable(passes_s)} of checks",
    }


def describe_finetuning(plan: FineTuningPlan) -> dict[str, str]:
    """Return the same for `mimref finetune --dry-run`, for all splits together."""
    config, architecture, settings = plan.config, plan.architecture, plan.config.finetune
    with tempfile.TemporaryDirectory() as folder:
        job = FineTuning(TrainingRun(config, Path(folder), None), plan, 0, [[]])
        encoder = job.classifier.encoder
        image_s = image_seconds(encoder, plan.val, job.evaluation, architecture.depth)
        weights = sum(weight.numel() for weight in encoder.parameters())
        everything = sum(weight.numel() for weight in job.classifier.parameters())
        trained = sum(weight.numel() for weight in job.classifier.parameters() if weight.requires_grad)
        step_s = step_seconds(job)
    counts = [len(plan.images(split)) for split in range(len(plan.splits))]
    steps = sum(settings.epochs * (count // config.batch_size) for count in counts)
    validations = len(counts) * -(-settings.epochs // config.monitor.validate_every_epochs)
    passes_s = validations * len(plan.val) * image_s
    few = "" if len(counts) == 1 else f" of {len(plan.train):,}, in each of {len(counts)} splits"
    return {
        "encoder": f"{architecture.name}, {architecture.depth} blocks of width {architecture.width}, {weights:,} "
        f"parameters; images of {architecture.image_size} pixels",
        "weights": str(plan.checkpoint.path),
        "images": f"{counts[0]:,}{few} of {plan.train.name} in {len(plan.classes)} classes, batches of "
        f"{config.batch_size}; {len(plan.val):,} validation images",
        "steps": f"{steps:,} in {settings.epochs} epochs",
        "memory": _state_memory(trained, everything - trained, averaged=0 if settings.ema is None else everything),
        "time": f"about {readable(steps * step_s + passes_s)} on this machine: {readable(steps * step_s)} of training "
        f"({1e3 * step_s:,.0f} ms per step) and {readable(passes_s)} of validation",
    }


def _state_memory(trained: int, frozen: int = 0, averaged: int = 0) -> str:
    """Describe the memory for weights. averaged: number of weights of which an average is kept."""
    found = (_STATE_BYTES * trained + 4 * (frozen + averaged)) / 2**20
    size = f"{found / 1024:.2f} GiB" if found >= 1024 else f"{found:.1f} MiB"
    return f"{size} in float32 for weights and optimizer, without activations"
