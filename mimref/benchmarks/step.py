"""How fast a refinement step is and what it needs, on synthetic images in memory.

A step is a real run's `Stage.update`: augmentation on the device, encoder, heads, neighbours, loss, backward pass,
optimizer and weight average. Only reading images is left out. Weights are random, which changes no time.
"""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

from mimref.benchmarks.flops import count_flops, model_flops
from mimref.benchmarks.measure import MatrixProducts, PeakMemory, seconds_of
from mimref.data.loader import ViewBatch, device_batches
from mimref.data.sources import ArraySource
from mimref.data.transforms import EvalTransform
from mimref.data.views import multi_crop
from mimref.devices import resolve_device
from mimref.encoders.checkpoints import Checkpoint, read_checkpoint
from mimref.encoders.published import find_published
from mimref.encoders.vit import Architecture, build_encoder
from mimref.errors import ConfigError
from mimref.progress import Progress, Silent
from mimref.refinement.config import RefineConfig
from mimref.refinement.heads import head_blocks
from mimref.refinement.memory import largest_micro_batch, release_memory
from mimref.refinement.plan import Plan, architecture_to_train, check_sizes, temperatures
from mimref.refinement.run import build_method
from mimref.refinement.schedule import StageName
from mimref.refinement.stages import EncoderStage, HeadsStage, RefinementStage
from mimref.results import Row
from mimref.training.run import TrainingRun

IMAGENET_IMAGES = 1_281_167
STAGE_NUMBER: dict[StageName, int] = {"heads": 1, "encoder": 2}
# Steps before those that count: the first allocates the optimizer's moments, and compiling takes some more.
_WARM_UP, _WARM_UP_COMPILED = 2, 5
# On CUDA several steps follow each other, as the CPU prepares one while the device computes the one before.
_TURN_CUDA = 3


@dataclass(frozen=True)
class StepMeasurement:
    """One stage's step as it was measured."""

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
    """Peak beyond what was in use before the weights were made; None where the system does not tell."""
    flops: int
    """Of the model in one step, forward and backward; what is computed twice counts once."""
    flops_run: int | None
    """As counted on a real step, with views, queue, loss and whatever is computed twice; None when compiled."""
    matmul_flops: float
    """Per second, of a large matrix product in the step's precision on the same device."""

    @property
    def images_per_second(self) -> float:
        return self.batch / self.step_s

    @property
    def utilisation(self) -> float:
        """Percent of a large matrix product's rate that the model's FLOPs are computed at."""
        return 100 * self.flops / self.step_s / self.matmul_flops

    def row(self) -> Row:
        """A row of the results: ms per step, 10**9 FLOPs, MiB, percent."""
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

    Micro-batches are of `config.micro_batch` images, or of a quarter of the batch where that is no number. A batch that
    no CUDA device holds in one pass is compared at the largest size that fits, and measured in micro-batches alone.
    steps: measured ones, after a few that do not count. Of `config.encoder.weights` only the architecture matters.
    Raises ConfigError for settings that fit no encoder, or nothing that fits the memory.
    """
    device = resolve_device(config.device)
    whole = largest_whole_batch(config, device)
    micro = min(whole, config.micro_batch if isinstance(config.micro_batch, int) else -(-whole // 4))
    kinds: list[tuple[StageName, int, tuple[int | None, ...]]] = [("encoder", whole, (None, micro))]
    if whole < config.batch_size:
        kinds.append(("encoder", config.batch_size, (micro,)))
    kinds.append(("heads", config.batch_size, (None if whole == config.batch_size else micro,)))
    measured: list[StepMeasurement] = []
    for number, (stage, batch, parts) in enumerate(kinds, start=1):
        measured += measure_step(config.model_copy(update={"batch_size": batch}), stage, parts, steps=steps)
        if progress is not None:
            progress(number, len(kinds))
    return [measurement.row() for measurement in measured] + _micro_batch_rows(measured[0], measured[1])


def measure_step(
    config: RefineConfig, stage: StageName, micro_batches: Sequence[int | None], *, steps: int = 5
) -> list[StepMeasurement]:
    """Measure one stage's steps of `config.batch_size` images, encoded in parts of each of these sizes.

    The ways take turns with each other and with a large matrix product, so that whatever else the machine does slows
    down all of them. None is one pass. Raises ConfigError for settings that fit no encoder, and when a step does not
    fit the device's memory.
    """
    device = resolve_device(config.device)
    turn = _TURN_CUDA if device.type == "cuda" else 1
    with ready_stage(config.model_copy(update={"micro_batch": None}), stage) as (job, memory):
        batches = device_batches(repeat(synthetic_batch(job)), device)

        def step() -> None:
            job.update(next(batches))
            job.step += 1

        def counted(micro: int | None) -> int:
            job.method.micro_batch = micro
            return count_flops(step)

        used = []
        for micro in micro_batches:
            job.method.micro_batch = micro
            memory.restart()
            for _ in range(_WARM_UP_COMPILED if config.compile else _WARM_UP):
                step()
            used.append(memory.growth())
        products = MatrixProducts(device, job.method.precision)
        seconds: list[list[float]] = [[] for _ in micro_batches]
        for _ in range(steps):
            products.measure()
            for micro, own in zip(micro_batches, seconds, strict=True):
                job.method.micro_batch = micro
                own += seconds_of(step, turn, device)
        flops = config.batch_size * model_flops(config, job.plan.architecture, job.plan.blocks, stage)
        return [
            StepMeasurement(
                stage=stage,
                setting=_setting(job),
                batch=config.batch_size,
                micro_batch=min(micro or config.batch_size, config.batch_size),
                step_s=statistics.median(own),
                memory_bytes=bytes_used,
                flops=flops,
                flops_run=None if config.compile else counted(micro),
                matmul_flops=products.flops_per_second,
            )
            for micro, own, bytes_used in zip(micro_batches, seconds, used, strict=True)
        ]


@contextmanager
def ready_stage(config: RefineConfig, stage: StageName) -> Iterator[tuple[RefinementStage, PeakMemory]]:
    """A stage of a real run with random weights, and the memory it takes; nothing of it stays.

    Raises ConfigError for settings that fit no encoder.
    """
    architecture, blocks = resolve_encoder(config)
    device = resolve_device(config.device)
    release_memory()
    memory = PeakMemory(device)
    with torch.device(device):
        weights = dict(build_encoder(architecture).vit.state_dict())
    plan = Plan(
        _both_stages(config),
        Checkpoint(Path("random weights"), weights),
        architecture,
        EvalTransform(architecture.image_size),
        _image_list(IMAGENET_IMAGES),
        [],
        blocks,
        temperatures(config.heads.temperature, len(blocks)),
    )
    made = HeadsStage if stage == "heads" else EncoderStage
    with tempfile.TemporaryDirectory() as folder:
        yield made(TrainingRun(plan.config, Path(folder)), plan, build_method(plan, Silent())), memory


def resolve_encoder(config: RefineConfig) -> tuple[Architecture, list[int]]:
    """Architecture of the encoder and block of every head, without reading published weights.

    Raises ConfigError when settings do not fit the encoder, CheckpointError for weights that do not tell theirs.
    """
    weights = config.encoder.weights
    if weights is None or find_published(weights) is not None:
        architecture = Architecture.from_config(config.encoder)
    else:
        checkpoint = read_checkpoint(weights, num_heads=config.encoder.num_heads)
        architecture = architecture_to_train(config.encoder, checkpoint)
    check_sizes(config, architecture)
    if config.heads.blocks == "auto":
        raise ConfigError("heads.blocks = 'auto' asks the images, of which a benchmark has none; name the blocks")
    blocks = head_blocks(config.heads.blocks, architecture.depth)
    temperatures(config.heads.temperature, len(blocks))
    return architecture, blocks


def describe_encoder(architecture: Architecture) -> str:
    """Name and size, for results."""
    return f"{architecture.name} {architecture.depth}x{architecture.width}/{architecture.patch_size}"


def step_facts(rows: list[Row]) -> list[tuple[str, str]]:
    """What `benchmark_step` measured, a line each: what, and how much."""
    facts = []
    for row in rows:
        value, batch, micro = float(row["value"]), int(row["batch"]), int(row["micro_batch"])
        if row["metric"] == "benchmark_step_ms":
            parts = f" in micro-batches of {micro}" if micro < batch else ""
            memory = f", {float(row['memory_mib']):,.0f} MiB" if "memory_mib" in row else ""
            facts.append(
                (
                    f"step of stage {STAGE_NUMBER['heads' if row['stage'] == 'heads' else 'encoder']}, "
                    f"{batch} images{parts}",
                    f"{value:,.0f} ms, {float(row['images_per_second']):,.1f} images/s{memory}, "
                    f"{float(row['gflop']):,.0f} GFLOP, {float(row['utilisation']):.0f}% of the "
                    f"{float(row['matmul_gflops']):,.0f} GFLOP/s of a large matrix product",
                )
            )
        elif row["metric"] == "benchmark_micro_batch_time":
            facts.append((f"{batch} images in micro-batches of {micro}", f"{value:.2f} x the time of one pass"))
        elif row["metric"] == "benchmark_micro_batch_memory":
            facts.append((f"{batch} images in micro-batches of {micro}", f"{value:.2f} x the memory of one pass"))
    return facts


def _micro_batch_rows(full: StepMeasurement, parts: StepMeasurement) -> list[Row]:
    """What micro-batches cost in time and save in memory."""
    sizes: Row = {"batch": full.batch, "micro_batch": parts.micro_batch, **full.setting}
    time: Row = {"value": parts.step_s / full.step_s, "one_pass_s": full.step_s, "micro_batches_s": parts.step_s}
    rows: list[Row] = [{"metric": "benchmark_micro_batch_time", **time, **sizes}]
    if full.memory_bytes and parts.memory_bytes:
        memory: Row = {"value": parts.memory_bytes / full.memory_bytes}
        memory |= {"one_pass_mib": full.memory_bytes / 2**20, "micro_batches_mib": parts.memory_bytes / 2**20}
        rows.append({"metric": "benchmark_micro_batch_memory", **memory, **sizes})
    return rows


def largest_whole_batch(config: RefineConfig, device: torch.device) -> int:
    """Images that stage 2 encodes in one pass: the whole batch, or on CUDA a half, a quarter, ..., whatever fits."""
    if device.type != "cuda":
        return config.batch_size
    with ready_stage(config.model_copy(update={"micro_batch": None}), "encoder") as (job, _):
        return largest_micro_batch(job.method, job.plan, config.batch_size, reserve=job.moments_to_come())


def _both_stages(config: RefineConfig) -> RefineConfig:
    """The settings for a run of both stages."""
    heads, encoder = config.heads_stage, config.encoder_stage
    return config.model_copy(
        update={
            "stage": "both",
            "heads_from": None,
            # A stage without epochs would have no schedule for its rates.
            "heads_stage": heads.model_copy(update={"epochs": max(1, heads.epochs)}),
            "encoder_stage": encoder.model_copy(update={"epochs": max(1, encoder.epochs)}),
        }
    )


def _image_list(images: int) -> ArraySource:
    """Only its length matters."""
    pixels = np.broadcast_to(np.zeros(1, np.uint8), (images, 1, 1))
    return ArraySource("synthetic", pixels, None, None, "train", np.broadcast_to(np.zeros(1, np.int64), (images,)))


def synthetic_batch(job: RefinementStage) -> ViewBatch:
    """Random pixels, in pinned memory where a GPU reads them."""
    groups = multi_crop(job.plan.config.views, job.plan.architecture.image_size)
    generator = torch.Generator().manual_seed(0)
    crops = [
        torch.randint(
            256,
            (job.plan.config.batch_size, group.count, 3, group.size, group.size),
            dtype=torch.uint8,
            generator=generator,
        )
        for group in groups
    ]
    batch = ViewBatch(0, torch.arange(job.plan.config.batch_size), crops, [])
    return batch.pin_memory() if job.device.type == "cuda" else batch


def _setting(job: RefinementStage) -> Row:
    device = job.device
    setting: Row = {
        "model": describe_encoder(job.plan.architecture),
        "heads": len(job.plan.blocks),
        "views": 2 + job.plan.config.views.local_views,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": "bf16" if job.method.precision is torch.bfloat16 else "fp32",
    }
    return setting | ({"threads": torch.get_num_threads()} if device.type == "cpu" else {})
