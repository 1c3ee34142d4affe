"""`mimref reproduce`: suites of runs behind the tables of the paper."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mimref.cli.execution import figure, note, print_facts
from mimref.cli.options import Preset, Resume, Text
from mimref.cli.parser import option

if TYPE_CHECKING:
    from mimref.reproduce.config import AblationsConfig

PRESET = "peak_short"
"""A small base whose features peak in middle blocks, as the paper's do, and few updates."""


class AblationsOptions(Preset, Resume, panel="Training"):
    seeds: Text = option("Random seeds; default 0,1,2.", "N,N,...", "seeds")
    tables: Text = option("Parts of Table 1; default all.", "a,b,c,d,e,f", "tables")
    jobs: Text = option("Concurrent runs; default: one per free core, or one on a GPU.", "N", "jobs")
    dry_run: bool = option("Print every run with its estimated time; write nothing.")


def ablations(options: AblationsOptions) -> None:
    """Reproduce the ablations of Table 1 at a small scale.

    Refines one encoder with every setting of Table 1 (a) to (f), several runs at a time, and shows each result beside
    the paper's. A run that several tables share runs once. After an interruption, the same command continues; other
    tables or seeds add their runs, and earlier ones stay in the results. Settings given with --set apply to all runs.

    Examples:
      mimref reproduce ablations --preset quickstart --seeds 0 --tables a,e --dry-run
      mimref reproduce ablations --seeds 0,1,2 --out runs/ablations
    """
    from mimref.reproduce.config import AblationsConfig

    config = options.load(AblationsConfig, options.resumed("ablations.toml", options.preset) or PRESET)
    out = options.out or Path("runs") / "ablations"
    if options.dry_run:
        _print_suite(config, out, options)
        return

    from mimref.files import write_bytes
    from mimref.reports.ablations import ablations_page, print_ablations
    from mimref.reports.terminal import Terminal
    from mimref.reproduce.run import run_ablations

    with Terminal(options.quiet) as terminal:
        result = run_ablations(
            config, out, resume=options.resume, force=options.force, listener=terminal, checks=options.checks
        )
    command = f"mimref {shlex.join(sys.argv[1:])}"
    page = ablations_page(result, command)
    write_bytes(out / "ablations.md", page.encode())
    print_ablations(result.rows)
    with figure(out / "blocks-light.svg", options):
        from mimref.reports.curves import THEMES, plot_curves

        for theme in THEMES:
            plot_curves(out / f"blocks-{theme}.svg", result.rows, theme)
    note(f"page in {out / 'ablations.md'}, results in {out / 'results.json'}", options)
    for error in result.failed:
        typer.echo(f"mimref: error: {error}", err=True)
    if result.failed:
        raise typer.Exit(1)


def _print_suite(config: "AblationsConfig", out: Path, options: AblationsOptions) -> None:
    """Print what `--dry-run` shows: every run, with `finished` or its time estimated from a few measured steps."""
    from mimref.benchmarks.duration import measure_duration, readable
    from mimref.refinement.config import RefineConfig
    from mimref.refinement.plan import make_plan
    from mimref.reports.terminal import Terminal
    from mimref.reproduce.plan import check_earlier, make_suite
    from mimref.reproduce.run import jobs_of

    with Terminal(options.quiet) as terminal:
        suite = make_suite(config, out, terminal.progress, options.checks)
        options.checks.run("sets", lambda: check_earlier(suite))
        options.checks.finish()
        # Neither the schedule of the loss nor a seed changes how long a step takes.
        measured: dict[str, tuple[float, float]] = {}
        total_s, lines = 0.0, dict[str, str]()
        for done, run in enumerate(suite.refinements, start=1):
            assert isinstance(run.config, RefineConfig)
            alike = run.config.model_copy(
                update={"seed": 0, "loss": suite.plan.config.loss, "stage": "both", "heads_from": None}
            )
            key = alike.model_dump_json()
            if key not in measured:
                found = measure_duration(make_plan(alike))
                measured[key] = found.heads_s, found.encoder_s + found.passes_s
            heads_s, rest_s = measured[key]
            needed_s = rest_s if run.needs else heads_s + rest_s
            shared = f", stage 1 from {run.needs[0]}" if run.needs else ""
            lines[run.name] = "finished" if run.finished else f"about {readable(needed_s)}{shared}"
            total_s += 0.0 if run.finished else needed_s
            terminal.progress("steps", done, len(suite.refinements))
    jobs = jobs_of(config)
    print_facts(lines)
    print_facts(
        {
            "runs": f"{len(lines)}, {jobs} at the same time",
            "time": f"about {readable(total_s / jobs)} on this machine, not counting the tables' scores",
            "output": str(out),
        }
    )
