"""`mimref benchmark`: speed and cost, measured on this machine."""

import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from mimref.cli.execution import note
from mimref.cli.options import Batch, Data, Device, MicroBatch, Output, Preset, TrainedEncoder
from mimref.cli.parser import option

if TYPE_CHECKING:
    from mimref.benchmarks.suite.lines import Finding
    from mimref.refinement.config import RefineConfig
    from mimref.results import Row


class BenchmarkOptions(Device, Output):
    pass


class _Measured(TrainedEncoder, Batch, Preset, Output):
    def load_refine(self, *, read_data: bool = False) -> "RefineConfig":
        """Load the settings of the refinement to measure, fitted to its encoder and its images; see `fitted`."""
        from mimref.refinement.config import RefineConfig

        config = self.load(RefineConfig, choose=self.refine_preset)
        self.check_out()
        self.checks.finish()

        from mimref.benchmarks.stage import fitted

        config, lines = fitted(config, read_data=read_data)
        for line in lines:
            note(line, self)
        return config


class StepOptions(_Measured, MicroBatch):
    pass


class CostOptions(StepOptions, Data):
    pass


class MemoryOptions(_Measured, panel="Run"):
    gpus: str | None = option("Numbers of GPUs; default 1,8,64.", "N,N,...")
    memory: str | None = option("Memory per GPU in GB; default 40,80.", "N,N,...")


def evaluations(options: BenchmarkOptions) -> None:
    """Time the evaluations on synthetic features.

    Compares a sweep over ten values of k with a single value, k-means in all processes with k-means in one, and the
    classifiers of a linear probe trained together with the same ones trained one by one.

    Examples:
      mimref benchmark eval
    """
    options.check_out()
    options.checks.finish()

    from mimref.benchmarks.evaluations import benchmark_evaluations

    device = _print_timings("benchmark eval", options, benchmark_evaluations)
    if device != "cpu":
        typer.echo(f"on {device}; k-means runs on the CPU")


def views(options: BenchmarkOptions) -> None:
    """Time how fast images become views and evaluation crops.

    Times two global and ten local views of 500 x 375 JPEGs on one CPU thread, and compares with the pipelines of
    torchvision and, if installed, Kornia and NVIDIA DALI. Evaluation crops are compared with torchvision's and timm's.

    Examples:
      mimref benchmark views --out runs/views
    """
    options.check_out()
    options.checks.finish()

    from mimref.benchmarks.extraction import benchmark_extraction
    from mimref.benchmarks.views import benchmark_views

    notes: list[str] = []

    def measure(**settings: Any) -> "Sequence[Row]":
        return [*benchmark_views(**settings, note=notes.append), *benchmark_extraction(**settings)]

    _print_timings("benchmark views", options, measure)
    for line in notes:
        note(line, options)


def _print_timings(command: str, options: BenchmarkOptions, measure: "Callable[..., Sequence[Row]]") -> str:
    """Measure, print a table and write it with `--out`; return the device."""
    from mimref.devices import resolve_device
    from mimref.reports.terminal import Terminal, print_rows

    started, device = time.monotonic(), str(resolve_device(options.device or "auto"))
    with Terminal(options.quiet) as terminal:
        rows = measure(device=device, progress=partial(terminal.progress, "timings"))
    print_rows(rows)
    _write(command, options, {"device": device}, started, rows)
    return device


def step(options: StepOptions) -> None:
    """Time a training step on synthetic images.

    Measures time, memory, FLOPs and utilisation in one pass of the encoder and in micro-batches, and compares the heads
    as one module with separate heads. Without options, measures the quickstart's small encoder.

    Examples:
      mimref benchmark step
      mimref benchmark step --preset mae_l16 --micro-batch 64
    """
    config = options.load_refine()

    from mimref.benchmarks.heads import benchmark_heads, heads_facts
    from mimref.benchmarks.step import benchmark_step, step_facts
    from mimref.config.recipe import Recipe
    from mimref.devices import adapt_precision
    from mimref.reports.terminal import Terminal

    adapt_precision(recipe := Recipe(config))
    config = recipe.config
    for derived in recipe.derived:
        note(str(derived), options)
    started = time.monotonic()
    with Terminal(options.quiet) as terminal:
        steps = benchmark_step(config, progress=partial(terminal.progress, "steps"))
        progress = partial(terminal.progress, "heads")
        heads = benchmark_heads(device=config.device, precision=config.precision, progress=progress)
    facts = [*step_facts(steps), *heads_facts(heads)]
    _write("benchmark step", options, config.model_dump(mode="json"), started, [*steps, *heads], facts)


def cost(options: CostOptions) -> None:
    """Estimate the cost of a preset: hours, memory, largest batch.

    Extrapolates a few measured steps to all epochs over the images of --data or of the preset; if neither names any,
    over those of ImageNet.

    Examples:
      mimref benchmark cost --preset mae_l16
      mimref benchmark cost --arch vit_b16 --data /data/my_images
    """
    config = options.load_refine(read_data=True)

    from mimref.benchmarks.cost import benchmark_cost, cost_facts
    from mimref.reports.terminal import Terminal

    started = time.monotonic()
    with Terminal(options.quiet) as terminal:
        found = benchmark_cost(config, progress=partial(terminal.progress, "steps"))
    _write("benchmark cost", options, config.model_dump(mode="json"), started, found.rows, cost_facts(found))


def everything(options: BenchmarkOptions) -> None:
    """Measure everything that this machine can run, and compare it with thresholds.

    Takes at most 8 minutes on a GPU and about 2 on a CPU, which runs a smaller version. Each part runs in its own
    process, so a part that fails loses only its own lines. With --out, also writes a Markdown page that grows as parts
    finish. If a value misses its threshold, an error names it and the exit code is 1.

    Examples:
      mimref benchmark all --out runs/benchmark
    """
    from mimref.benchmarks.suite.run import machine_facts, run_suite
    from mimref.files import write_bytes
    from mimref.reports.benchmarks import UNFINISHED, missed_lines, print_findings, suite_page
    from mimref.reports.terminal import Terminal
    from mimref.results import check_folder, remove_earlier, write_results

    started, device, out = time.monotonic(), options.device or "auto", options.out
    if out is not None:
        options.checks.run("out", lambda: check_folder(out, options.force, unfinished=UNFINISHED))
    facts = options.checks.run("device", lambda: machine_facts(device))
    options.checks.finish()
    assert facts is not None  # otherwise it has raised
    if out is not None:
        remove_earlier(out)
    command = f"mimref {shlex.join(sys.argv[1:])}"

    def save(findings: "Sequence[Finding]", finished: bool) -> None:
        if out is not None:
            page = suite_page(findings, facts, time.monotonic() - started, command, finished=finished)
            write_bytes(out / "results.md", page.encode())

    with Terminal(options.quiet) as terminal:
        logs = None if out is None else out / "logs"
        findings = run_suite(device, logs=logs, listener=terminal, save=save)
    print_findings(findings)
    if out is not None:
        write_results(out, "benchmark all", facts, time.monotonic() - started, [finding.row() for finding in findings])
        note(f"results in {out}", options)
    for line in missed_lines(findings):
        typer.echo(f"mimref: error: {line}", err=True)
    if missed_lines(findings):
        raise typer.Exit(1)


def memory(options: MemoryOptions) -> None:
    """Predict which way of training fits into GPU memory.

    Predicts the peak memory of one encoder pass, micro-batches, recomputed activations and sharded weights, on any
    machine, from shapes alone. Takes a minute for a large encoder. Without options, predicts for the quickstart's small
    encoder.

    Examples:
      mimref benchmark memory --preset mae_2b14
      mimref benchmark memory --arch vit_7b_patch16_dinov3 --gpus 8 --memory 80
    """
    gpus = options.checks.run("gpus", lambda: _sizes(options.gpus or "1,8,64", "--gpus"))
    cards = options.checks.run("memory", lambda: _sizes(options.memory or "40,80", "--memory"))
    config = options.load_refine()
    assert gpus is not None and cards is not None  # otherwise it has raised

    from mimref.benchmarks.memory import memory_facts, memory_page, plan_memory
    from mimref.files import write_bytes
    from mimref.reports.terminal import Terminal
    from mimref.results import remove_earlier, write_results

    started, missing = time.monotonic(), list[str]()
    with Terminal(options.quiet) as terminal:
        progress = partial(terminal.progress, "simulated steps")
        rows = plan_memory(config, gpus, cards, progress=progress, note=missing.append)
    reasons = [("not predicted", reason) for reason in dict.fromkeys(missing)]
    for what, much in [*memory_facts(rows), *reasons]:
        typer.echo(f"{what}: {much}")
    if options.out is not None:
        settings = config.model_dump(mode="json")
        remove_earlier(options.out)
        write_results(options.out, "benchmark memory", settings, time.monotonic() - started, rows)
        page = memory_page(rows) + "".join(f"\nNot predicted: {reason}\n" for _, reason in reasons)
        write_bytes(options.out / "results.md", page.encode())
        note(f"results in {options.out}", options)


def _sizes(text: str, flag: str) -> list[int]:
    """Parse numbers such as `1,8,64`, without duplicates and in ascending order."""
    from mimref.errors import ConfigError

    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text):
        raise ConfigError(f"{flag} {text}: expected whole numbers such as 1,8,64")
    return sorted(set(map(int, text.split(","))))


def _write(
    command: str,
    options: Output,
    settings: Mapping[str, object],
    started: float,
    rows: "Sequence[Row]",
    facts: Sequence[tuple[str, str]] = (),
) -> None:
    """Print the facts, if any, and what they were measured with; with `--out`, write the results and the facts."""
    if setup := next((row for row in rows if facts and "model" in row), None):
        keys = ("model", "heads", "views", "device", "precision", "threads")
        facts = [("measured on", ", ".join(f"{key} {setup[key]}" for key in keys if key in setup)), *facts]
    for what, much in facts:
        typer.echo(f"{what}: {much}")
    if options.out is None:
        return
    from mimref.results import remove_earlier, write_results

    remove_earlier(options.out)
    write_results(options.out, command, settings, time.monotonic() - started, rows)
    if facts:
        from mimref.benchmarks.cost import markdown
        from mimref.files import write_bytes

        write_bytes(options.out / "results.md", markdown(facts, f"mimref {command}").encode())
    note(f"results in {options.out}", options)
