"""`mimref benchmark`: speed, measured on this machine."""

import time

import typer

from mimref.cli.options import DebugOption, DeviceOption, ForceOption, OutOption, QuietOption
from mimref.cli.output import check_out, tell


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

    from mimref.devices import resolve_device
    from mimref.evaluation.benchmark import benchmark_evaluations
    from mimref.terminal import Terminal, print_benchmark

    started = time.monotonic()
    target = str(resolve_device(device or "auto"))
    with Terminal(quiet) as terminal:
        rows = benchmark_evaluations(device=target, progress=lambda done, of: terminal.progress("timings", done, of))
    print_benchmark(rows)
    if target != "cpu":
        typer.echo(f"on {target}; k-means runs on the CPU")
    if out is not None:
        from mimref.results import write_results

        write_results(out, "benchmark eval", {"device": target}, time.monotonic() - started, rows)
        tell(f"results in {out}", quiet)
