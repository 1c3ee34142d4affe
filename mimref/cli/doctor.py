"""`mimref doctor`: what this machine has and lacks."""

import json
import time
from dataclasses import asdict
from functools import partial

import typer

from mimref import __version__
from mimref.cli.execution import note
from mimref.cli.options import Output
from mimref.cli.parser import option


class DoctorOptions(Output, panel="Output"):
    as_json: bool = option("Print everything as JSON.", flag="--json")


def doctor(options: DoctorOptions) -> None:
    """Check this machine: versions, devices, disks, speed.

    Takes seconds, and suggests what to do about each problem. The exit code is 1 if a problem would stop or cripple a
    run.

    Examples:
      mimref doctor
      mimref doctor --out runs/doctor
    """
    options.check_out()
    options.checks.finish()

    from mimref.doctor.diagnosis import diagnose
    from mimref.reports.doctor import doctor_page, print_checks
    from mimref.reports.terminal import Terminal

    started = time.monotonic()
    with Terminal(options.quiet or options.as_json) as terminal:
        checks = diagnose(partial(terminal.progress, "checks"))
    elapsed_s = time.monotonic() - started
    if options.as_json:
        typer.echo(json.dumps({"version": __version__, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print_checks(checks)
    if options.out is not None:
        from mimref.files import write_bytes
        from mimref.results import remove_earlier, write_results

        remove_earlier(options.out)
        write_results(options.out, "doctor", {}, elapsed_s, [check.row() for check in checks])
        write_bytes(options.out / "results.md", doctor_page(checks).encode())
        note(f"results in {options.out}", options)
    if any(check.verdict == "problem" for check in checks):
        raise typer.Exit(1)
