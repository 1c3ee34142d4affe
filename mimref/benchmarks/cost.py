"""What a refinement will cost: one measured step extrapolated to all epochs (Appendix C.1), and memory by arithmetic.

What depends on shapes alone (FLOPs, memory of weights, gradients, moments, average and queue) is said of any preset on
any machine; time only of what the machine can run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mimref.benchmarks.flops import model_flops
from mimref.benchmarks.measure import MatrixProducts, device_bytes
from mimref.benchmarks.step import (
    IMAGENET_IMAGES,
    STAGE_NUMBER,
    StepMeasurement,
    describe_encoder,
    largest_whole_batch,
    measure_step,
    resolve_encoder,
)
from mimref.data.open import open_source
from mimref.devices import resolve_device
from mimref.encoders.vit import Architecture
from mimref.errors import ConfigError
from mimref.progress import Progress
from mimref.refinement.config import RefineConfig
from mimref.refinement.memory import StateBytes, state_bytes
from mimref.refinement.schedule import StageName
from mimref.results import Row

# A CPU measures smaller batches, down to this, when whole ones would take longer than the seconds below.
_CPU_SMALLEST_BATCH = 8
_CPU_SECONDS = 20.0
# Share of a matrix product's rate that a step on a CPU reaches at least, roughly; only to decide what to measure.
_CPU_SHARE = 0.3
_SMALL_BATCHES = (8, 16)


@dataclass(frozen=True)
class Cost:
    """A preset's cost: rows for tables and files, and what could not be measured, in words."""

    rows: list[Row]
    notes: list[str]


def benchmark_cost(
    config: RefineConfig, *, steps: int = 3, images: int | None = None, progress: Progress | None = None
) -> Cost:
    """Measure a few steps of both stages on this machine and extrapolate them to the whole of `config`.

    images: in the training set; None counts those of `config.data`, or takes ImageNet's 1,281,167 where it names none.
    A CPU measures what it can in a minute: smaller batches, and of large encoders no time at all. CUDA measures the
    batch as it is, in micro-batches where one pass does not fit, and two small ones that tell the largest that would.
    Raises ConfigError or DataError for settings that fit no encoder and no images.
    """
    architecture, blocks = resolve_encoder(config)
    if images is None:
        images = IMAGENET_IMAGES if config.data.spec is None else len(open_source(config.data, "train"))
    device = resolve_device(config.device)
    notes: list[str] = []
    stages = [stage for stage, epochs in _epochs(config).items() if epochs]
    try:
        if device.type == "cuda":
            # Both stages as they will be, then two small batches in one pass, whose memory tells the largest.
            micro = _micro_batch(config, device)
            work = [(stage, config.batch_size, micro) for stage in stages]
            work += [("encoder", size, None) for size in _SMALL_BATCHES]
        else:
            batch = _affordable_batch(config, architecture, blocks, steps, device, notes)
            work = [(stage, batch, _micro_batch(config, device)) for stage in stages] if batch else []
        measured = []
        for number, (stage, batch, micro) in enumerate(work, start=1):
            changed = config.model_copy(update={"batch_size": batch})
            measured += measure_step(changed, stage, (micro,), steps=steps)
            if progress is not None:
                progress(number, len(work))
    except (ConfigError, torch.OutOfMemoryError) as error:
        # The settings fit the encoder, as was asked before: what is left is memory.
        notes.append(f"time and peak memory: {str(error).splitlines()[0]}")
        measured = []
    rows = estimate_cost(config, measured[: len(stages)], images=images)
    if len(measured) > len(stages):
        rows += largest_batch_rows(*measured[len(stages) :], capacity=device_bytes(device))
    return Cost(rows, notes)


def _micro_batch(config: RefineConfig, device: torch.device) -> int | None:
    """Images per pass of the encoder; where the settings name no number, as many as fit."""
    if isinstance(config.micro_batch, int):
        return config.micro_batch
    fits = largest_whole_batch(config, device)
    return None if fits == config.batch_size else fits


def estimate_cost(config: RefineConfig, measured: Sequence[StepMeasurement] = (), *, images: int) -> list[Row]:
    """FLOPs and state memory of both stages, and hours and peak memory of those that were measured.

    images: in the training set. A measurement of another batch than the preset's counts by its images per second.
    """
    architecture, blocks = resolve_encoder(config)
    rows: list[Row] = []
    steps_per_epoch = images // config.batch_size
    hours = 0.0
    epochs_of = {stage: epochs for stage, epochs in _epochs(config).items() if epochs}
    for stage, epochs in epochs_of.items():
        seen = epochs * steps_per_epoch * config.batch_size
        base: Row = {"stage": stage, "model": describe_encoder(architecture), "epochs": epochs, "images": images}
        base |= {"batch": config.batch_size, "steps": epochs * steps_per_epoch}
        flops = seen * model_flops(config, architecture, blocks, stage)
        rows.append({"metric": "cost_exaflop", "value": flops / 1e18, **base})
        state = state_bytes(config, architecture, blocks, stage)
        parts: Row = {f"{name}_gib": getattr(state, name) / 2**30 for name in StateBytes.__dataclass_fields__}
        rows.append({"metric": "cost_state_gib", "value": state.total / 2**30, **base, **parts})
        for measurement in measured:
            if measurement.stage != stage:
                continue
            how: Row = {"measured_batch": measurement.batch, "micro_batch": measurement.micro_batch}
            how |= {"images_per_second": measurement.images_per_second, "utilisation": measurement.utilisation}
            how |= {key: measurement.setting[key] for key in ("device", "threads") if key in measurement.setting}
            stage_hours = seen / measurement.images_per_second / 3600
            hours += stage_hours
            rows.append({"metric": "cost_hours", "value": stage_hours, **base, **how})
            if measurement.memory_bytes is not None:
                peak = measurement.memory_bytes / 2**30
                rows.append({"metric": "cost_peak_gib", "value": peak, **base, **how})
    if len(epochs_of) > 1 and {measurement.stage for measurement in measured} >= epochs_of.keys():
        rows.append({"metric": "cost_hours", "value": hours, "stage": "both", "images": images})
    return rows


def largest_batch_rows(small: StepMeasurement, large: StepMeasurement, *, capacity: int) -> list[Row]:
    """The largest batch of one pass that fits `capacity` bytes, by the straight line through two measured batches."""
    assert small.memory_bytes is not None and large.memory_bytes is not None
    images = largest_batch((small.batch, small.memory_bytes), (large.batch, large.memory_bytes), capacity)
    per_image = (large.memory_bytes - small.memory_bytes) / (large.batch - small.batch)
    row: Row = {"metric": "cost_largest_batch", "value": images, "stage": large.stage, **large.setting}
    row |= {"per_image_mib": per_image / 2**20, "device_gib": capacity / 2**30}
    return [row | {"measured_batch": small.batch, "measured_batch_2": large.batch}]


def largest_batch(small: tuple[int, int], large: tuple[int, int], capacity: int) -> int:
    """Images that fit `capacity` bytes when memory grows by a straight line through two (images, bytes); 0: none."""
    per_image = (large[1] - small[1]) / (large[0] - small[0])
    fixed = small[1] - per_image * small[0]
    return max(0, int((capacity - fixed) / per_image))


def cost_facts(cost: Cost) -> list[tuple[str, str]]:
    """The cost in words, a line each: what, and how much."""
    facts = []
    for row in cost.rows:
        value, stage = float(row["value"]), _stage_name(row)
        match row["metric"]:
            case "cost_exaflop":
                told = f"{row['epochs']} epochs of {int(row['images']):,} images, {int(row['steps']):,} steps of "
                facts.append((f"{stage}, work", f"{told}{row['batch']}: {_scaled(value)}FLOP in encoder and heads"))
            case "cost_state_gib":
                names = ("weights", "gradients", "moments", "average", "queue")
                parts = ", ".join(f"{name} {_gib(float(row[f'{name}_gib']))}" for name in names if row[f"{name}_gib"])
                facts.append((f"{stage}, memory without activations", f"{_gib(value)}: {parts}"))
            case "cost_hours":
                how = ""
                if "images_per_second" in row:
                    how = f" on {row['device']}, at {float(row['images_per_second']):,.1f} images/s measured on "
                    how += f"batches of {row['measured_batch']}{_in_parts(row)}"
                facts.append((f"{stage}, time", f"{value:,.2f} device-hours{how}"))
            case "cost_peak_gib":
                facts.append(
                    (f"{stage}, peak memory", f"{_gib(value)} with batches of {row['measured_batch']}{_in_parts(row)}")
                )
            case "cost_largest_batch":
                told = f"{value:.0f} images in {_gib(float(row['device_gib']))}, "
                facts.append(("largest batch in one pass", f"{told}{float(row['per_image_mib']):,.0f} MiB each"))
    return facts + [("not measured", note) for note in cost.notes]


def markdown(facts: Sequence[tuple[str, str]], command: str) -> str:
    """A table in Markdown with the command that printed it."""
    lines = [f"`{command}`", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {much} |" for what, much in facts)]) + "\n"


def _epochs(config: RefineConfig) -> dict[StageName, int]:
    """Epochs that each stage of the run will train."""
    heads = 0 if config.stage == "encoder" or config.heads_from is not None else config.heads_stage.epochs
    return {"heads": heads, "encoder": 0 if config.stage == "heads" else config.encoder_stage.epochs}


def _affordable_batch(
    config: RefineConfig,
    architecture: Architecture,
    blocks: list[int],
    steps: int,
    device: torch.device,
    notes: list[str],
) -> int:
    """The batch that both stages are measured with, of at most the preset's size; 0 where none would end in time."""
    products = MatrixProducts(device, torch.float32)
    products.measure()
    flops = sum(model_flops(config, architecture, blocks, stage) for stage, epochs in _epochs(config).items() if epochs)
    # The steps that do not count and the one whose FLOPs are counted take their time, too.
    image_s = (steps + 3) * flops / products.flops_per_second / _CPU_SHARE
    batch = config.batch_size
    while batch > _CPU_SMALLEST_BATCH and batch * image_s > _CPU_SECONDS:
        batch //= 2
    if batch * image_s > _CPU_SECONDS:
        notes.append(
            f"time and peak memory: {describe_encoder(architecture)} is too large for this machine's {device.type}, "
            f"and there is no CUDA device; a small model can be measured here (--preset quickstart)"
        )
        return 0
    if batch < config.batch_size:
        notes.append(f"batches of {config.batch_size}: those of {batch} stand for them on this {device.type}")
    return batch


def _stage_name(row: Row) -> str:
    stage = row["stage"]
    return "both stages" if stage == "both" else f"stage {STAGE_NUMBER['heads' if stage == 'heads' else 'encoder']}"


def _in_parts(row: Row) -> str:
    return f" in micro-batches of {row['micro_batch']}" if row["micro_batch"] != row["measured_batch"] else ""


def _gib(value: float) -> str:
    return f"{value:,.1f} GiB" if value >= 1 else f"{1024 * value:,.1f} MiB"


def _scaled(exaflop: float) -> str:
    """With the prefix that leaves at least one digit before the point."""
    for prefix, factor in (("E", 1.0), ("P", 1e3), ("T", 1e6)):
        if exaflop * factor >= 1:
            return f"{exaflop * factor:,.1f} {prefix}"
    return f"{exaflop * 1e9:,.1f} G"
