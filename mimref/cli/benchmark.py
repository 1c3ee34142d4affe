"""`mimref benchmark`: speed and cost, measured on this machine."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mimref.cli.options import (
    ArchOption,
    BatchSizeOption,
    DataOption,
    DebugOption,
    DeviceOption,
    ForceOption,
    MicroBatchOption,
    OutOption,
    PrecisionOption,
    PresetOption,
    QuietOption,
    SetOption,
    SourceOption,
)
from mimref.cli.output import check_out, tell

if TYPE_CHECKING:
    from mimref.refinement.config import RefineConfig
    from mimref.results import Row

Facts = Sequence[tuple[str, str]]


def benchmark_eval(
    out: OutOption = None,
    force: ForceOption = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Time the evaluations on synthetic features.

    A sweep of ten k against one, k-means runs in all processes against one, and the classifiers of a linear probe
    together against one by one.
    """
    check_out(out, force)

    from mimref.benchmarks.evaluations import benchmark_evaluations
    from mimref.devices import resolve_device
    from mimref.reports.terminal import Terminal, print_rows

    started = time.monotonic()
    target = str(resolve_device(device or "auto"))
    with Terminal(quiet) as terminal:
        rows = benchmark_evaluations(device=target, progress=lambda done, of: terminal.progress("timings", done, of))
    print_rows(rows)
    if target != "cpu":
        typer.echo(f"on {target}; k-means runs on the CPU")
    _write("benchmark eval", out, {"device": target}, started, rows, quiet)


def benchmark_views(
    out: OutOption = None,
    force: ForceOption = False,
    device: DeviceOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Time how fast images become views.

    Two global and ten local views of 500 x 375 JPEGs on one CPU thread, against torchvision's pipelines.
    """
    check_out(out, force)

    from mimref.benchmarks.views import benchmark_views as measure
    from mimref.devices import resolve_device
    from mimref.reports.terminal import Terminal, print_rows

    started = time.monotonic()
    target = str(resolve_device(device or "auto"))
    with Terminal(quiet) as terminal:
        rows = measure(device=target, progress=lambda done, of: terminal.progress("timings", done, of))
    print_rows(rows)
    _write("benchmark views", out, {"device": target}, started, rows, quiet)


def benchmark_step(
    preset: PresetOption = None,
    sets: SetOption = None,
    arch: ArchOption = None,
    source: SourceOption = None,
    batch_size: BatchSizeOption = None,
    micro_batch: MicroBatchOption = None,
    out: OutOption = None,
    force: ForceOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Time a training step on synthetic images.

    Time, memory, FLOPs and utilisation, in one pass of the encoder and in micro-batches; and the heads against a list
    of single ones. Without options: the quickstart's small encoder.
    """
    config = _config(preset, sets, arch, source, batch_size, micro_batch, None, device, precision)
    check_out(out, force)

    from mimref.benchmarks.heads import benchmark_heads, heads_facts
    from mimref.benchmarks.step import benchmark_step as measure
    from mimref.benchmarks.step import step_facts
    from mimref.reports.terminal import Terminal

    started = time.monotonic()
    with Terminal(quiet) as terminal:
        steps = measure(config, progress=lambda done, of: terminal.progress("steps", done, of))
        heads = benchmark_heads(
            device=config.device,
            precision=config.precision,
            progress=lambda done, of: terminal.progress("heads", done, of),
        )
    facts = [*_where(steps), *step_facts(steps), *heads_facts(heads)]
    _print(facts)
    _write("benchmark step", out, config.model_dump(mode="json"), started, [*steps, *heads], quiet, facts)


def benchmark_cost(
    preset: PresetOption = None,
    sets: SetOption = None,
    data: DataOption = None,
    arch: ArchOption = None,
    source: SourceOption = None,
    batch_size: BatchSizeOption = None,
    micro_batch: MicroBatchOption = None,
    out: OutOption = None,
    force: ForceOption = False,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Tell what a preset costs: hours, memory, largest batch.

    A few measured steps extrapolated to all epochs; ImageNet's images where --data names none.
    """
    config = _config(preset, sets, arch, source, batch_size, micro_batch, data, device, precision)
    check_out(out, force)

    from mimref.benchmarks.cost import benchmark_cost as measure
    from mimref.benchmarks.cost import cost_facts
    from mimref.reports.terminal import Terminal

    started = time.monotonic()
    with Terminal(quiet) as terminal:
        cost = measure(config, progress=lambda done, of: terminal.progress("steps", done, of))
    facts = [*_where(cost.rows), *cost_facts(cost)]
    _print(facts)
    _write("benchmark cost", out, config.model_dump(mode="json"), started, cost.rows, quiet, facts)


def _config(
    preset: str | None,
    sets: list[str] | None,
    arch: str | None,
    source: str | None,
    batch_size: str | None,
    micro_batch: str | None,
    data: str | None,
    device: str | None,
    precision: str | None,
) -> "RefineConfig":
    from mimref.config.load import load_config
    from mimref.config.presets import choose_refine_preset
    from mimref.refinement.config import RefineConfig

    overrides: dict[str, Any] = {"encoder.arch": arch, "encoder.source": source, "batch_size": batch_size}
    overrides |= {"micro_batch": micro_batch, "data.spec": data, "device": device, "precision": precision}
    return load_config(RefineConfig, choose_refine_preset(preset, arch, source, None), overrides, sets or ())


def _print(facts: Facts) -> None:
    for what, much in facts:
        typer.echo(f"{what}: {much}")


def _where(rows: Sequence["Row"]) -> Facts:
    """What the measurements were made with."""
    keys = ("model", "heads", "views", "device", "precision", "threads")
    row = next((row for row in rows if "model" in row), {})
    return [("measured on", ", ".join(f"{key} {row[key]}" for key in keys if key in row))] if row else []


def _write(
    command: str,
    out: Path | None,
    config: dict[str, Any],
    started: float,
    rows: Sequence["Row"],
    quiet: bool,
    facts: Facts = (),
) -> None:
    """results.csv, results.json and, for facts, a Markdown block."""
    if out is None:
        return
    from mimref.results import write_results

    write_results(out, command, config, time.monotonic() - started, rows)
    if facts:
        from mimref.benchmarks.cost import markdown
        from mimref.files import write_bytes

        write_bytes(out / "results.md", markdown(facts, f"mimref {command}").encode())
    tell(f"results in {out}", quiet)
