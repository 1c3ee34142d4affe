"""Duration of a planned refinement on this machine, estimated from a few real steps of both stages on its images."""

import tempfile
import time
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path

import numpy as np

from mimref.data.loader import loader_workers
from mimref.data.sources import ImageSource, Subset
from mimref.encoders.backbones import TokenEncoder
from mimref.evaluation.monitor import KnnMonitor
from mimref.features.encode import Column, PassSettings, extract
from mimref.progress import Silent
from mimref.refinement.method import Method
from mimref.refinement.plan import Plan
from mimref.refinement.run import build_method
from mimref.refinement.stages import EncoderStage, HeadsStage
from mimref.training.run import Stage, TrainingRun

# Timed per stage after a first step, which starts the loader and allocates the optimizer's moments.
_STEPS = 10
_SECONDS = 2.0
_FEW_IMAGES, _MORE_IMAGES = 64, 192


@dataclass(frozen=True)
class Duration:
    """Duration of a run in seconds, by part."""

    heads_step_s: float
    encoder_step_s: float
    heads_s: float
    """All steps of stage 1."""
    encoder_s: float
    """All steps of stage 2."""
    passes_s: float
    """Encoder passes for checks during stage 2 and for the table; the scores computed from them are not included."""

    @property
    def total_s(self) -> float:
        return self.heads_s + self.encoder_s + self.passes_s


def measure_duration(plan: Plan) -> Duration:
    """Time a few updates of each planned stage, including reading images, and an encoder pass over a few images.

    Takes a few seconds. Files are written to a temporary folder only. Raises DivergenceError when a loss is not
    finite, and ConfigError when a step does not fit the memory.
    """
    heads_step_s = encoder_step_s = 0.0
    with tempfile.TemporaryDirectory() as folder:
        run = TrainingRun(plan.config, Path(folder), None)
        method = build_method(plan, Silent())
        passes_s = _passes_seconds(plan, method)
        if plan.heads_steps:
            heads_step_s = step_seconds(HeadsStage(run, plan, method))
        if plan.encoder_steps:
            encoder_step_s = step_seconds(EncoderStage(run, plan, method))
    heads_s, encoder_s = heads_step_s * plan.heads_steps, encoder_step_s * plan.encoder_steps
    return Duration(heads_step_s, encoder_step_s, heads_s, encoder_s, passes_s)


def step_seconds(job: Stage) -> float:
    """Return the mean seconds of an update, including reading images, from a few updates after the first.

    After the first update, loader processes have batches ready, so that a few more updates would never wait for them.
    Reading is therefore timed separately: each process has read a batch when the first batch arrives.
    """
    config, started, counted = job.run.config, time.perf_counter(), 0
    workers = loader_workers(config.workers, job.source)
    batches = job.batches()
    first = next(batches)
    now = time.perf_counter()
    # Images that a GPU decodes are not read by several processes.
    read_s, started = (now - started) / (1 if config.data.decode == "device" else max(1, workers)), now
    for batch in chain([first], repeat(first, job.total - 1) if workers else batches):
        job.update(batch)
        job.step += 1
        if job.step == 1:
            job.check()
            first_s = time.perf_counter() - started
            started = time.perf_counter()
            continue
        counted += 1
        if counted == _STEPS or time.perf_counter() - started > _SECONDS:
            break
    job.check()  # waits for the device
    update_s = (time.perf_counter() - started) / counted if counted else first_s
    if not workers and counted:
        return update_s  # batches were read between the updates
    # Loader processes work at the same time as a GPU, but on the same cores as updates on a CPU.
    return max(update_s, read_s) if workers and job.device.type != "cpu" else update_s + read_s


def _passes_seconds(plan: Plan, method: Method) -> float:
    config, images = plan.config, len(plan.source)
    monitor = KnnMonitor(config, plan.source, plan.transform, method.device, method.precision, note=lambda _: None)
    every = config.monitor.knn_every_epochs if plan.encoder_steps else 0
    seen = monitor.images_per_check * (1 + -(-config.encoder_stage.epochs // every)) if every else 0
    if config.evaluate.enabled and monitor.val and plan.encoder_steps:
        seen += 2 * (images + len(monitor.val))

    return image_seconds(method.encoder, plan.source, monitor.settings, method.encoder.depth) * seen


def image_seconds(encoder: TokenEncoder, source: ImageSource, settings: PassSettings, block: int) -> float:
    """Estimate the seconds per image of an encoder pass up to a block, from a few images."""
    # GPUs need larger batches, and are fast enough for the images of these.
    few, more = (count * (1 if settings.device.type == "cpu" else 8) for count in (_FEW_IMAGES, _MORE_IMAGES))
    if workers := loader_workers(settings.workers, source):
        # A batch is read by one process: all processes should take part in both passes.
        settings = replace(settings, batch_size=max(1, few // workers))

    def seconds(count: int) -> float:
        started = time.perf_counter()
        rows = np.arange(min(count, len(source)))
        extract(encoder, Subset(source, rows), settings, [Column(block, "cls")])
        return time.perf_counter() - started

    few_s, more_s = seconds(few), seconds(more)
    # The difference excludes what does not grow with the images, such as starting loader processes.
    apart = min(more, len(source)) - min(few, len(source))
    return (more_s - few_s) / apart if apart and more_s > few_s else more_s / min(more, len(source))


def describe_duration(found: Duration) -> str:
    """Describe a duration in one readable line."""
    steps = [
        f"stage {number} {readable(total_s)} ({1e3 * step_s:,.0f} ms per step)"
        for number, total_s, step_s in (
            (1, found.heads_s, found.heads_step_s),
            (2, found.encoder_s, found.encoder_step_s),
        )
        if step_s
    ]
    parts = [*steps, f"checks and features of the table {readable(found.passes_s)}"]
    return f"about {readable(found.total_s)} on this machine: {', '.join(parts)}"


def readable(seconds: float) -> str:
    """Format seconds as `45 s`, `14 min`, `3.5 h` or `2.1 days`."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{0 if unit < 3600 else 1}f} {name}"
    return f"{seconds / 86_400:.1f} days"
