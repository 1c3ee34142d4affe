"""Runs in processes of their own, some at the same time."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mimref.config.base import dump_config
from mimref.data.decode import skipped_line
from mimref.errors import UserError
from mimref.files import write_bytes
from mimref.progress import Listener
from mimref.reproduce.plan import Run
from mimref.results import main_rows, read_results

_LOOK_S = 0.2
# A run saves its state before it ends; it is killed if that takes longer.
_SAVING_S = 30.0
_LAST_BYTES = 4096


class RunFailed(UserError):
    """A run without results; the message gives its name, the reason and its log."""


def run_jobs(runs: Sequence[Run], jobs: int, listener: Listener) -> list[RunFailed]:
    """Run all runs in order, `jobs` at a time. Returns the failures; only the runs that need a failed one are left out.

    If this process ends, for whatever reason, so do its runs, after saving what can be saved.
    """
    waiting, started = list(runs), list[tuple[Run, "subprocess.Popen[bytes]"]]()
    failed: dict[str, RunFailed] = {}
    done = -1
    try:
        while waiting or started:
            for run, process in [each for each in started if each[1].poll() is not None]:
                started.remove((run, process))
                if process.returncode or not run.finished:
                    failed[run.name] = RunFailed(f"run {run.name}: {_reason(run, process.returncode)}; see {run.log}")
                    listener.note(f"{failed[run.name]}; the others run")
                else:
                    listener.note(_told(run))
            for run in _hopeless(waiting, [run for run, _ in started]):
                assert run.needs is not None
                waiting.remove(run)
                why = "which has failed" if run.needs[0] in failed else f"whose {run.needs[1].name} is missing"
                failed[run.name] = RunFailed(f"run {run.name}: needs run {run.needs[0]}, {why}")
            while len(started) < jobs and (ready := next(filter(_ready, waiting), None)):
                waiting.remove(ready)
                started.append((ready, _start(ready)))
                listener.note(f"{ready.name}: started")
            if done < (done := len(runs) - len(waiting) - len(started)):
                listener.progress("runs", done, len(runs))
            time.sleep(_LOOK_S if started else 0)
    finally:
        _end([process for _, process in started])
    return list(failed.values())


def command(run: Run) -> list[str]:
    """Return the command line of a run's process."""
    return [sys.executable, "-m", "mimref.reproduce.worker", run.config.command, str(run.settings), str(run.folder)]


def environment() -> Mapping[str, str]:
    """Return a run's environment: one thread unless the user sets more, so that results do not depend on `jobs`."""
    return {"OMP_NUM_THREADS": "1", **os.environ}


def _ready(run: Run) -> bool:
    return run.needs is None or run.needs[1].exists()


def _hopeless(waiting: Sequence[Run], started: Sequence[Run]) -> list[Run]:
    """Return the waiting runs that need a missing file of a run that is neither waiting nor running."""
    to_come = {run.name for run in (*waiting, *started)}
    return [run for run in waiting if run.needs and run.needs[0] not in to_come and not run.needs[1].exists()]


def _start(run: Run) -> subprocess.Popen[bytes]:
    write_bytes(run.settings, dump_config(run.config).encode())
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "ab") as log:
        # The pipe closes when this process ends, for whatever reason, which stops the run.
        return subprocess.Popen(command(run), stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment())


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SAVING_S)
        process.kill()
        process.wait()


def _told(run: Run) -> str:
    """Describe the result of a finished run in one line."""
    result = read_results(run.folder, run.config.command)
    refined = ("refined", "knn_top1")
    knn = [float(row["value"]) for row in main_rows(result.rows) if (row.get("model"), row["metric"]) == refined]
    found = f"k-NN {knn[0]:.1f}, " if knn else ""
    skipped = f"; {skipped_line(result.bad_images)}" if result.bad_images else ""
    return f"{run.name}: finished, {found}{result.elapsed_s:,.0f} s{skipped}"


def _reason(run: Run, code: int) -> str:
    """Return the last line of a run's log, or how its process ended."""
    if code < 0:
        return f"its process was ended by signal {-code}"
    lines = _last_lines(run.log)
    return lines[-1].partition("error: ")[2] or lines[-1] if lines else f"its process ended with exit code {code}"


def _last_lines(log: Path) -> list[str]:
    with suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - _LAST_BYTES))
        return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return []
