"""Benchmarks of refinement steps: gradients, time, memory, compilation, and the heads alone.

Every function measures on a device and yields the lines named in its arguments; all arguments except the device are
bound where the parts are listed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor, nn

from mimref.benchmarks.heads import HeadSizes, benchmark_heads
from mimref.benchmarks.stage import ready_stage, synthetic_batch
from mimref.benchmarks.step import StepMeasurement, measure_step
from mimref.benchmarks.suite.lines import Found
from mimref.config.load import load_config
from mimref.data.loader import ViewBatch, device_batches
from mimref.data.views import Photometric
from mimref.devices import resolve_device
from mimref.errors import ConfigError
from mimref.refinement.config import RefineConfig
from mimref.refinement.method import Method
from mimref.refinement.stages import RefinementStage

WAYS = ("one pass", "micro-batches", "activation checkpointing")


def refinement(preset: str, device: str, batch: int, **changes: object) -> RefineConfig:
    """Return a preset's settings with another batch size; changes are named like `heads__queue_size`."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(RefineConfig, f"refine/{preset}", {"device": device, "batch_size": batch, **named})


# --- gradients


class _DoubleViews(Photometric):
    """Views in float64."""

    def __call__(self, crops: Tensor, epoch: int, sample_B: Tensor, views: Sequence[int]) -> Tensor:
        return super().__call__(crops, epoch, sample_B, views).double()


def gradients(device: str, *, line: str, preset: str, batch: int, micro: int, precision: str) -> Iterator[Found]:
    """Measure the relative difference between gradients of micro-batches and of one pass, over all weights together.

    precision: fp64, fp32 or bf16. TF32 is off.
    """
    if precision == "fp64" and device == "mps":
        yield Found(line, None, "MPS has no float64")
        return
    autocast = "bf16" if precision == "bf16" else "fp32"
    # A long queue of random rows has near ties, which rounding would decide.
    config = refinement(preset, device, batch, precision=autocast, heads__queue_size=1024)
    torch.manual_seed(0)
    with _without_tf32(), ready_stage(config, "encoder") as (job, _):
        method = job.method
        if precision == "fp64":
            _make_double(method, job)
        (crops,) = device_batches(iter([synthetic_batch(job)]), method.device)
        queue = deepcopy(method.queue.state_dict())
        whole, parts = (_gradient(method, crops, queue, size) for size in (None, micro))
        difference = float((parts - whole).norm() / whole.norm())
    yield Found(line, difference, f"micro-batches of {micro} of {batch} images", {"preset": preset, "batch": batch})


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Turn TF32 off for convolutions, which use it by default; matrix products do not."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _make_double(method: Method, job: RefinementStage) -> None:
    transform = job.plan.transform
    method.encoder.double()
    method.heads.double()
    method.queue.rows_HQO = method.queue.rows_HQO.double()
    views, seed = method.photometric.config, method.photometric.seed
    method.photometric = _DoubleViews(views, seed, method.device, mean=transform.mean, std=transform.std)


def _gradient(method: Method, batch: ViewBatch, queue: dict[str, object], micro: int | None) -> Tensor:
    """Return the gradient of encoder and heads as one vector in float64."""
    modules: list[nn.Module] = [method.encoder, method.heads]
    for module in modules:
        module.zero_grad(set_to_none=True)
    method.micro_batch = micro
    method.queue.load_state_dict(queue)
    weight_H = torch.ones(method.heads.num_heads, device=method.device, dtype=method.queue.rows_HQO.dtype)
    method.forward_backward(batch, weight_H, top_k=1, train_encoder=True)
    gradients = [weight.grad for module in modules for weight in module.parameters() if weight.grad is not None]
    return torch.cat([gradient.flatten().double() for gradient in gradients])


# --- steps


def step_lines(encoder: str, batch: int) -> list[str]:
    """Return the names of the lines that `steps` yields."""
    return [f"step of {encoder}, {batch} images, {way}" for way in WAYS]


def steps(device: str, *, encoder: str, preset: str, batch: int, micro: int) -> Iterator[Found]:
    """Time a step of stage 2 in ms: in one pass, in micro-batches, and in one pass with activation checkpointing.

    A way that does not fit the memory counts as not measured and does not affect the others.
    """
    lines, config = step_lines(encoder, batch), refinement(preset, device, batch)
    measured: list[StepMeasurement | str] = []
    try:
        measured += measure_step(config, "encoder", (None, micro), steps=1)
    except ConfigError as error:
        measured.append(_does_not_fit(error))
    if len(measured) == 1:
        measured += _step(config, micro)
    yield from map(_step_found, lines, measured)
    recomputing = config.model_copy(update={"activation_checkpointing": True})
    yield from map(_step_found, lines[2:], _step(recomputing, None))


def _step(config: RefineConfig, micro: int | None) -> list[StepMeasurement | str]:
    """Measure a step, or return why it does not fit."""
    try:
        return [*measure_step(config, "encoder", (micro,), steps=1)]
    except ConfigError as error:
        return [_does_not_fit(error)]


def _does_not_fit(error: ConfigError) -> str:
    """Return the reason in words if memory ran out; otherwise raise the error."""
    if "out of memory" not in str(error):
        raise error
    return f"does not fit: {error}"


def _step_found(line: str, found: StepMeasurement | str) -> Found:
    if isinstance(found, str):
        return Found(line, None, found.partition(";")[0])
    memory = "" if found.memory_bytes is None else f", {found.memory_bytes / 2**30:,.2f} GiB"
    rate = f"{found.images_per_second:,.1f} images/s"
    peak = f"{found.utilisation:.0f}% of the {found.matmul_flops / 1e12:,.2f} TFLOP/s of a matrix product"
    row = {key: value for key, value in found.row().items() if key not in ("metric", "value")}
    return Found(line, 1e3 * found.step_s, f"{rate}{memory}, {peak}", row)


def compiled(device: str, *, line: str, preset: str, batch: int) -> Iterator[Found]:
    """Measure how many times as fast a compiled step is. Raises ConfigError if torch.compile does not work."""
    config = refinement(preset, device, batch)
    (plain,) = measure_step(config, "encoder", (None,), steps=2)
    with ready_stage(config.model_copy(update={"compile": True}), "encoder") as (job, _):
        works = job.method.compiled
    if not works:
        raise ConfigError("torch.compile does not work here; `mimref doctor` may say why")
    (fast,) = measure_step(config.model_copy(update={"compile": True}), "encoder", (None,), steps=2)
    note = f"{1e3 * plain.step_s:,.1f} ms plain, {1e3 * fast.step_s:,.1f} ms compiled"
    yield Found(line, plain.step_s / fast.step_s, note, {**plain.setting, "batch": batch})


# --- memory


def peak_memory(device: str, *, line: str, preset: str, batch: int, micro: int) -> Iterator[Found]:
    """Measure the peak of two updates of stage 2 in micro-batches, in 10**9 bytes, including weights and moments."""
    config = refinement(preset, device, batch)
    with ready_stage(config.model_copy(update={"micro_batch": None}), "encoder") as (job, memory):
        job.method.micro_batch = micro
        batches = device_batches(repeat(synthetic_batch(job)), resolve_device(device))
        for _ in range(2):  # the first allocates the optimizer's moments
            job.update(next(batches))
            job.step += 1
        used = memory.growth()
    if used is None:
        yield Found(line, None, "this system does not report it")
        return
    reserved = f", {torch.cuda.max_memory_reserved() / 1e9:.1f} GB reserved" if device == "cuda" else ""
    yield Found(line, used / 1e9, f"micro-batches of {micro}{reserved}", {"preset": preset, "batch": batch})


def memory_ratio(device: str, *, line: str, preset: str, batch: int, micro: int) -> Iterator[Found]:
    """Measure the peak memory of a step in micro-batches, relative to that of one pass."""
    whole, parts = measure_step(refinement(preset, device, batch), "encoder", (None, micro), steps=1)
    if not whole.memory_bytes or not parts.memory_bytes:
        yield Found(line, None, "this system does not report it")
        return
    note = f"{parts.memory_bytes / 2**20:,.0f} of {whole.memory_bytes / 2**20:,.0f} MiB, micro-batches of {micro}"
    yield Found(line, parts.memory_bytes / whole.memory_bytes, note, {**whole.setting, "batch": batch})


# --- heads


def heads(device: str, *, line: str, images: int, repeats: int) -> Iterator[Found]:
    """Measure how many times as fast twelve heads are in one module as in twelve, with the paper's norms."""
    sizes = replace(HeadSizes.for_device(resolve_device(device)), images=(images,), repeats=repeats)
    (row,) = [each for each in benchmark_heads(sizes, device=device) if each["norm"] == "batch"]
    together_s, separate_s = float(row["together_s"]), float(row["separate_s"])
    note = f"{1e3 * together_s:,.1f} ms together, {1e3 * separate_s:,.1f} ms as separate modules"
    setting = {key: value for key, value in row.items() if key not in ("metric", "value")}
    yield Found(line, float(row["value"]), note, setting)
