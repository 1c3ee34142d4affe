"""What a planned pre-training is: sizes, steps, memory, and the time that it takes on this machine."""

import tempfile
from pathlib import Path

from mimref.benchmarks.duration import image_seconds, readable, step_seconds
from mimref.pretraining.plan import Plan
from mimref.pretraining.run import Pretraining
from mimref.training.run import TrainingRun

_STATE_BYTES = 16
"""Of every weight: itself, its gradient and AdamW's two moments in float32."""


def describe_pretraining(plan: Plan) -> dict[str, str]:
    """What `mimref pretrain --dry-run` shows of a plan, label to text; times a few updates of the real run.

    Files are written into a temporary folder alone. Raises DivergenceError when a loss is not finite.
    """
    config, architecture, images = plan.config, plan.architecture, len(plan.source)
    with tempfile.TemporaryDirectory() as folder:
        job = Pretraining(TrainingRun(config, Path(folder), None), plan)
        every = config.monitor.knn_every_epochs
        checked = len(job.monitor.train) + (len(job.monitor.test) if job.monitor.test else 0)
        seen = checked * -(-config.mae.epochs // every) if every else 0
        passes_s = seen * image_seconds(job.model.encoder, plan.source, job.monitor.settings, architecture.depth)
        encoder, decoder = (
            sum(weight.numel() for weight in part.parameters()) for part in (job.model.encoder, job.model.decoder)
        )
        step_s = step_seconds(job)
    steps, hidden = config.mae.epochs * plan.steps_per_epoch, job.model.num_patches - job.model.num_visible
    size, patch = architecture.image_size, architecture.patch_size
    return {
        "encoder": f"{architecture.name}, {architecture.depth} blocks of width {architecture.width}, {encoder:,} "
        f"parameters; images of {size} pixels in {job.model.num_patches} patches of {patch}, {hidden} of them hidden",
        "decoder": f"depth {config.mae.decoder.depth}, width {config.mae.decoder.width}, {decoder:,} parameters",
        "images": f"{images:,} of {plan.source.name}, batches of {config.batch_size}",
        "steps": f"{steps:,} in {config.mae.epochs} epochs",
        "memory": f"{_STATE_BYTES * (encoder + decoder) / 2**20:,.1f} MiB in float32 for weights and optimizer, "
        "without activations",
        "time": f"about {readable(steps * step_s + passes_s)} on this machine: {readable(steps * step_s)} of training "
        f"({1e3 * step_s:,.0f} ms per step) and {readable(passes_s)} of checks",
    }
