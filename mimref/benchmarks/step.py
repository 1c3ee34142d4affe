"""Speed and memory of a refinement step.

A step is a real stage's `update`: augmentation on the device, encoder, heads, neighbours, loss, backward pass,
optimizer and weight average. Only reading images is left out. Weights are random, which does not change the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat

from mimref.benchmarks.flops import count_flops, model_flops
from mimref.benchmarks.measure import Facts, MatrixProducts, Ticks, device_setting, median_seconds
from mimref.benchmarks.stage import describe_encoder, largest_whole_batch, ready_stage, synthetic_batch
from mimref.data.loader import device_batches
from mimref.devices import resolve_device
from mimref.progress import Progress
from mimref.refinement.config import RefineConfig
from mimref.refinement.schedule import StageName
from mimref.results import Row

STAGE_NUMBER = {"heads": 1, "encoder": 2}
# Warm-up steps: the first allocates the optimizer's moments, and compilation takes a few more.
_WARM_UP, _WARM_UP_COMPILED = 2, 5
# On CUDA several steps run in a row, as the CPU prepares one while the device computes the one before.
_TURN_CUDA = 3


@dataclass(frozen=True)
class StepMeasurement:
    """Measurement of one stage's step."""

    stage: StageName
    setting: Row
    """Model, device, threads and precision."""
    batch: int
    """Images per step."""
    micro_batch: int
    """Images per pass of the encoder."""
    step_s: float
    """Median over the measured steps."""
    memory_bytes: int | None
    """Peak beyond what was in use before the weights were made; None where the system does not report it."""
    flops: int
    """FLOPs of the model in one step, forward and backward; recomputed operations count once."""
    flops_run: int | None
    """FLOPs counted on a real step, with views, queue, loss and recomputed operations; None when compiled."""
    matmul_flops: float
    """FLOPs per second of a large matrix product in the step's precision on the same device."""

    @property
    def images_per_second(self) -> float:
        return self.batch / self.step_s

    @property
    def utilisation(self) -> float:
        """Rate of the model's FLOPs in percent of a large matrix product's."""
        return 100 * self.flops / self.step_s / self.matmul_flops

    def row(self) -> Row:
        """Return a row of the results in ms per step, 10**9 FLOPs, MiB and percent."""
        row: Row = {"metric": "benchmark_step_ms", "value": 1e3 * self.step_s, "stage": self.stage, **self.setting}
        row |= {"batch": self.batch, "micro_batch": self.micro_batch}
        row |= {"images_per_second": self.images_per_second, "utilisation": self.utilisation}
        row |= {"gflop": self.flops / 1e9, "matmul_gflops": self.matmul_flops / 1e9}
        if self.flops_run is not None:
            row["gflop_run"] = self.flops_run / 1e9
        if self.memory_bytes is not None:
            row["memory_mib"] = self.memory_bytes / 2**20
        return row


def benchmark_step(config: RefineConfig, *, steps: int = 5, progress: Progress | None = None) -> list[Row]:
    """Measure a step of stage 2 in one pass of the encoder and in micro-batches, and one of stage 1.

    Micro-batches have `config.micro_batch` images, or a quarter of the batch if that is not a number. If the CUDA
    device cannot hold the batch in one pass, the two are compared at the largest size that fits, and the batch itself
    is measured in micro-batches only. steps: measured steps, after a few warm-up steps. Only the architecture of
    `config.encoder.weights` matters. Raises ConfigError for settings that do not fit the encoder or the memory.
    """
    whole = largest_whole_batch(config, resolve_device(config.device))
    micro = min(whole, config.micro_batch if isinstance(config.micro_batch, int) else -(-whole // 4))
    kinds: list[tuple[StageName, int, tuple[int | None, ...]]] = [("encoder", whole, (None, micro))]
    if whole < config.batch_size:
        kinds.append(("encoder", config.batch_size, (micro,)))
    kinds.append(("heads", config.batch_size, (None if whole == config.batch_size else micro,)))
    tick = Ticks(progress, len(kinds))
    measured: list[StepMeasurement] = []
    for stage, batch, micro_batches in kinds:
        measured += measure_step(config.model_copy(update={"batch_size": batch}), stage, micro_batches, steps=steps)
        tick()
    return [measurement.row() for measurement in measured] + _micro_batch_rows(measured[0], measured[1])


def measure_step(
    config: RefineConfig, stage: StageName, micro_batches: Sequence[int | None], *, steps: int = 5
) -> list[StepMeasurement]:
    """Measure one stage's steps of `config.batch_size` images for each micro-batch; None means one pass.

    The steps take turns with each other and with a large matrix product. Raises ConfigError for settings that do not
    fit the encoder, and when a step does not fit the device's memory.
    """
    device = resolve_device(config.device)
    with ready_stage(config.model_copy(update={"micro_batch": None}), stage) as (job, memory):
        batches = device_batches(repeat(synthetic_batch(job)), device)

        def step(micro: int | None) -> None:
            job.method.micro_batch = micro
            job.update(next(batches))
            job.step += 1

        used = []
        for micro in micro_batches:
            memory.restart()
            for _ in range(_WARM_UP_COMPILED if config.compile else _WARM_UP):
                step(micro)
            used.append(memory.growth())
        products = MatrixProducts(device, job.method.precision)
        products_s, *steps_s = median_seconds(
            [products, *(partial(step, micro) for micro in micro_batches)],
            device,
            turns=steps,
            warm_up=0,
            calls=_TURN_CUDA if device.type == "cuda" else 1,
        )
        flops = config.batch_size * model_flops(config, job.plan.architecture, job.plan.blocks, stage)
        setting: Row = {"model": describe_encoder(job.plan.architecture), "heads": len(job.plan.blocks)}
        setting |= {"views": 2 + config.views.local_views, **device_setting(device, job.method.precision)}
        return [
            StepMeasurement(
                stage=stage,
                setting=setting,
                batch=config.batch_size,
                micro_batch=min(micro or config.batch_size, config.batch_size),
                step_s=step_s,
                memory_bytes=bytes_used,
                flops=flops,
                flops_run=None if config.compile else count_flops(partial(step, micro)),
                matmul_flops=products.flops / products_s,
            )
            for micro, step_s, bytes_used in zip(micro_batches, steps_s, used, strict=True)
        ]


def step_facts(rows: list[Row]) -> Facts:
    """Describe what `benchmark_step` measured."""
    facts: Facts = []
    for row in rows:
        parts = f" in micro-batches of {row['micro_batch']}" if row["micro_batch"] != row["batch"] else ""
        images = f"{row['batch']} images{parts}"
        match row["metric"]:
            case "benchmark_step_ms":
                much = f"{row['value']:,.0f} ms, {row['images_per_second']:,.1f} images/s"
                much += f", {row['memory_mib']:,.0f} MiB" if "memory_mib" in row else ""
                much += f", {row['gflop']:,.0f} GFLOP, {row['utilisation']:.0f}% of the "
                much += f"{row['matmul_gflops']:,.0f} GFLOP/s of a large matrix product"
                facts.append((f"step of stage {STAGE_NUMBER[str(row['stage'])]}, {images}", much))
            case "benchmark_micro_batch_time":
                facts.append((images, f"{row['value']:.2f} x the time of one pass"))
            case "benchmark_micro_batch_memory":
                facts.append((images, f"{row['value']:.2f} x the memory of one pass"))
    return facts


def _micro_batch_rows(whole: StepMeasurement, parts: StepMeasurement) -> list[Row]:
    """Compare micro-batches with one pass: their cost in time and savings in memory."""
    sizes: Row = {"batch": whole.batch, "micro_batch": parts.micro_batch, **whole.setting}
    time: Row = {"value": parts.step_s / whole.step_s, "one_pass_s": whole.step_s, "micro_batches_s": parts.step_s}
    rows: list[Row] = [{"metric": "benchmark_micro_batch_time", **time, **sizes}]
    if whole.memory_bytes and parts.memory_bytes:
        memory: Row = {"value": parts.memory_bytes / whole.memory_bytes}
        memory |= {"one_pass_mib": whole.memory_bytes / 2**20, "micro_batches_mib": parts.memory_bytes / 2**20}
        rows.append({"metric": "benchmark_micro_batch_memory", **memory, **sizes})
    return rows
