"""Cost of a refinement: a measured step extrapolated to all epochs (Appendix C.1), and memory by arithmetic.

FLOPs and memory depend on shapes alone, so they can be computed for any preset on any machine. Time can be measured
only for what the machine can run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from mimref.benchmarks.flops import model_flops
from mimref.benchmarks.measure import Facts, MatrixProducts, Ticks, median_seconds
from mimref.benchmarks.memory import predict_peak
from mimref.benchmarks.stage import describe_encoder, largest_whole_batch, resolve_encoder, training_images
from mimref.benchmarks.step import STAGE_NUMBER, StepMeasurement, measure_step
from mimref.config.recipe import Recipe
from mimref.data.loader import check_batch_size
from mimref.devices import adapt_precision, resolve_device
from mimref.errors import ConfigError
from mimref.progress import Progress
from mimref.refinement.config import RefineConfig
from mimref.refinement.schedule import StageName
from mimref.refinement.sizes import state_bytes
from mimref.results import Row

# If the preset's batch would take a CPU longer than `_CPU_SECONDS`, smaller ones are measured, down to this size.
_CPU_SMALLEST_BATCH = 8
_CPU_SECONDS = 20.0
# A step on a CPU reaches roughly this share of a matrix product's rate. Used only to decide what to measure.
_CPU_SHARE = 0.3
_PREFIXES = (("E", 1.0), ("P", 1e3), ("T", 1e6), ("G", 1e9))
# On CUDA, the largest batch is extrapolated from the memory of two small ones.
_SMALL_BATCHES = (8, 16)


@dataclass(frozen=True)
class Cost:
    """Cost of a preset: rows for tables and files, and notes on what could not be measured."""

    rows: list[Row]
    notes: list[str]


def benchmark_cost(config: RefineConfig, *, steps: int = 3, progress: Progress | None = None) -> Cost:
    """Measure a few steps of both stages on this machine and extrapolate them to all of `config`.

    The images are those of `config.data`, or ImageNet's 1,281,167 if it names none. A CPU measures what it can in a
    minute: batches are smaller, and large encoders are not timed at all. CUDA measures the preset's batch, in
    micro-batches if one pass does not fit, and also finds the largest batch that fits in one pass.
    A preset's bfloat16 is replaced where it is slower, but not in the predictions, which are for CUDA.
    Raises ConfigError or DataError for settings that do not fit the encoder or the images.
    """
    flops = stage_flops(config)
    images = len(training_images(config))
    check_batch_size(config.batch_size, images)
    device, recipe = resolve_device(config.device), Recipe(config)
    adapt_precision(recipe)
    timed = recipe.config
    notes = [f"precision {each.before}: {each.value} is measured instead, {each.rule}" for each in recipe.derived]
    measured: list[StepMeasurement] = []
    try:
        batch = config.batch_size if device.type == "cuda" else _affordable_batch(config, flops, steps, device, notes)
        micro = config.micro_batch if isinstance(config.micro_batch, int) else None
        if batch and micro is None:
            micro = largest_whole_batch(timed, device)
        work = [(stage, batch, micro) for stage in flops if batch]
        if device.type == "cuda":
            work += [("encoder", size, None) for size in _SMALL_BATCHES]
        tick = Ticks(progress, len(work))
        for stage, size, micro in work:
            measured += measure_step(timed.model_copy(update={"batch_size": size}), stage, (micro,), steps=steps)
            tick()
    except (ConfigError, torch.OutOfMemoryError) as error:
        # `stage_flops` has checked that the settings fit the encoder, so the remaining cause is memory.
        notes.append(f"time and peak memory: {str(error).splitlines()[0]}")
        measured = []
    rows = estimate_cost(config, flops, measured[: len(flops)], images=images)
    for stage in flops:
        try:
            rows.append(predicted_row(config, stage))
        except ConfigError as error:  # the encoder does not support micro-batches or recomputing
            notes.append(f"predicted peak memory: {error}")
    if len(measured) > len(flops):
        capacity = torch.cuda.get_device_properties(device).total_memory
        small, large = measured[len(flops) :]
        if (large.memory_bytes or 0) > (small.memory_bytes or 0):
            rows.append(largest_batch_row(small, large, capacity=capacity))
        else:  # gradients, not activations, set the peak of small batches
            notes.append("largest batch: the memory of small batches does not grow with their size")
    return Cost(rows, notes)


def stage_flops(config: RefineConfig) -> dict[StageName, int]:
    """Count the model's FLOPs per image in a step of each stage that the run trains.

    Raises ConfigError for settings that do not fit the encoder.
    """
    architecture, blocks = resolve_encoder(config)
    trained = [stage for stage, epochs in config.epochs.items() if epochs]
    return {stage: model_flops(config, architecture, blocks, stage) for stage in trained}


def _affordable_batch(
    config: RefineConfig, flops: Mapping[StageName, int], steps: int, device: torch.device, notes: list[str]
) -> int:
    """Return the batch size for measuring all stages, at most the preset's; 0 if none would finish in time."""
    # The warm-up steps and the one whose FLOPs are counted take time, too.
    image_s = (steps + 3) * sum(flops.values()) / _matmul_flops(device) / _CPU_SHARE
    batch = config.batch_size
    while batch > _CPU_SMALLEST_BATCH and batch * image_s > _CPU_SECONDS:
        batch //= 2
    if batch * image_s > _CPU_SECONDS:
        encoder = describe_encoder(resolve_encoder(config)[0])
        notes.append(
            f"time and peak memory: {encoder} is too large for this machine's {device.type}, "
            "and there is no CUDA device; a small model can be measured here (--preset quickstart)"
        )
        return 0
    if batch < config.batch_size:
        notes.append(f"batches of {config.batch_size}: batches of {batch} are measured instead on this {device.type}")
    return batch


def _matmul_flops(device: torch.device) -> float:
    """Measure the FLOPs per second of a large matrix product."""
    products = MatrixProducts(device, torch.float32)
    return products.flops / median_seconds([products], device, turns=1, warm_up=0)[0]


def estimate_cost(
    config: RefineConfig, flops: Mapping[StageName, int], measured: Sequence[StepMeasurement] = (), *, images: int
) -> list[Row]:
    """Return FLOPs and state memory of the trained stages, and hours and peak memory of those that were measured.

    flops: see `stage_flops`. images: size of the training set. Hours follow from images per second, so a measurement
    may use a batch other than the preset's.
    """
    architecture, blocks = resolve_encoder(config)
    rows: list[Row] = []
    hours: dict[StageName, float] = {}
    for stage, image_flops in flops.items():
        epochs = config.epochs[stage]
        steps = epochs * (images // config.batch_size)
        seen = steps * config.batch_size
        base: Row = {"stage": stage, "model": describe_encoder(architecture), "epochs": epochs, "images": images}
        base |= {"batch": config.batch_size, "steps": steps}
        rows.append({"metric": "cost_exaflop", "value": seen * image_flops / 1e18, **base})
        state = state_bytes(config, architecture, blocks, stage)
        parts: Row = {f"{name}_gib": size / 2**30 for name, size in asdict(state).items()}
        rows.append({"metric": "cost_state_gib", "value": state.total / 2**30, **base, **parts})
        for measurement in (found for found in measured if found.stage == stage):
            how: Row = {"measured_batch": measurement.batch, "micro_batch": measurement.micro_batch}
            how |= {"images_per_second": measurement.images_per_second, "utilisation": measurement.utilisation}
            how |= {key: measurement.setting[key] for key in ("device", "threads") if key in measurement.setting}
            hours[stage] = seen / measurement.images_per_second / 3600
            rows.append({"metric": "cost_hours", "value": hours[stage], **base, **how})
            if measurement.memory_bytes is not None:
                rows.append({"metric": "cost_peak_gib", "value": measurement.memory_bytes / 2**30, **base, **how})
    if len(hours) == 2:
        rows.append({"metric": "cost_hours", "value": sum(hours.values()), "stage": "both", "images": images})
    return rows


def predicted_row(config: RefineConfig, stage: StageName) -> Row:
    """Predict the peak memory of a stage's step in one process on CUDA; needs no GPU (see `predict_peak`)."""
    peak = predict_peak(config, stage)
    micro = config.micro_batch if isinstance(config.micro_batch, int) else config.batch_size
    row: Row = {"metric": "cost_predicted_gib", "value": peak.total / 2**30, "stage": stage}
    row |= {"batch": config.batch_size, "micro_batch": micro, "recompute": config.activation_checkpointing}
    return row | {"state_gib": peak.state / 2**30, "step_gib": peak.step / 2**30}


def largest_batch_row(small: StepMeasurement, large: StepMeasurement, *, capacity: int) -> Row:
    """Extrapolate the largest batch of one pass that fits `capacity` bytes from two measured batches, linearly."""
    assert small.memory_bytes is not None and large.memory_bytes is not None
    per_image = (large.memory_bytes - small.memory_bytes) / (large.batch - small.batch)
    fixed = small.memory_bytes - per_image * small.batch
    images = max(0, int((capacity - fixed) / per_image))
    row: Row = {"metric": "cost_largest_batch", "value": images, "stage": large.stage, **large.setting}
    row |= {"per_image_mib": per_image / 2**20, "device_gib": capacity / 2**30}
    return row | {"measured_batch": small.batch, "measured_batch_2": large.batch}


def cost_facts(cost: Cost) -> Facts:
    """Describe the cost in words, and list what could not be measured."""
    return [_fact(row) for row in cost.rows] + [("not measured", note) for note in cost.notes]


def _fact(row: Row) -> tuple[str, str]:
    value = float(row["value"])
    stage = "both stages" if row["stage"] == "both" else f"stage {STAGE_NUMBER[str(row['stage'])]}"
    measured = f"batches of {row.get('measured_batch')}"
    if row.get("micro_batch") != row.get("measured_batch"):
        measured += f" in micro-batches of {row.get('micro_batch')}"
    match row["metric"]:
        case "cost_exaflop":
            work = f"{row['epochs']} epochs of {row['images']:,} images, {row['steps']:,} steps of {row['batch']}"
            return f"{stage}, work", f"{work}: {_scaled(value)}FLOP in encoder and heads"
        case "cost_state_gib":
            parts = ((name.removesuffix("_gib"), float(size)) for name, size in row.items() if name.endswith("_gib"))
            sizes = ", ".join(f"{name} {_gib(size)}" for name, size in parts if size)
            return f"{stage}, memory without activations", f"{_gib(value)}: {sizes}"
        case "cost_hours":
            how = ""
            if "images_per_second" in row:
                how = f" on {row['device']}, at {row['images_per_second']:,.1f} images/s measured on {measured}"
            return f"{stage}, time", f"{value:,.2f} device-hours{how}"
        case "cost_peak_gib":
            return f"{stage}, peak memory", f"{_gib(value)} with {measured}"
        case "cost_predicted_gib":
            how = f"batches of {row['batch']}"
            how += f" in micro-batches of {row['micro_batch']}" * (row["micro_batch"] != row["batch"])
            how += ", recomputing activations" * bool(row["recompute"])
            return f"{stage}, predicted peak on one GPU", f"{_gib(value)} with {how}"
    largest = f"{value:.0f} images in {_gib(float(row['device_gib']))}"
    return "largest batch in one pass", f"{largest}, {row['per_image_mib']:,.0f} MiB each"


def markdown(facts: Sequence[tuple[str, str]], command: str) -> str:
    """Return a Markdown table of the facts, with the command that printed it."""
    lines = [f"`{command}`", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {much} |" for what, much in facts)]) + "\n"


def _gib(value: float) -> str:
    return f"{value:,.1f} GiB" if value >= 1 else f"{1024 * value:,.1f} MiB"


def _scaled(exaflop: float) -> str:
    """Format with the unit prefix that leaves at least one digit before the decimal point."""
    prefix, factor = next((each for each in _PREFIXES if exaflop * each[1] >= 1), _PREFIXES[-1])
    return f"{exaflop * factor:,.1f} {prefix}"
