"""`mimref reproduce ablations`: the refinements of Table 1, each in a process and a folder of its own.

`--out` holds the settings in `ablations.toml`; in runs/, the folders NAME-seedS of the refinements and blocks-NAME of
the k-NN curves over the blocks; and settings/ and logs/. A run with results is finished and is not run again.
"""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimref.config.base import dump_config
from mimref.config.load import load_config
from mimref.data.decode import skipped_line
from mimref.devices import resolve_device
from mimref.errors import Checks, ConfigError, OutputError
from mimref.files import check_writable, write_bytes
from mimref.locks import folder_lock
from mimref.progress import Listener, Silent
from mimref.reproduce.config import AblationsConfig
from mimref.reproduce.jobs import RunFailed, run_jobs
from mimref.reproduce.plan import Suite, check_earlier, free_cores, make_suite, runs_of
from mimref.reproduce.summary import skipped_images, summarise
from mimref.results import Row, Tabular, write_results
from mimref.training.folder import with_absolute_paths
from mimref.training.signals import stop_signal

COMMAND = "reproduce ablations"
"""Name of the command in results.json."""
SETTINGS = "ablations.toml"
_OUR_FILES = ("results.csv", "ablations.md", "blocks-light.svg", "blocks-dark.svg")
_OUR_FOLDERS = ("runs", "settings", "logs")


@dataclass(frozen=True)
class AblationsResult(Tabular):
    """Results of a suite."""

    rows: list[Row]
    """As `summarise` returns them."""
    elapsed_s: float
    """Seconds of training in all runs together."""
    failed: list[RunFailed]
    suite: Suite
    bad_images: list[tuple[str, str]]
    """Path and reason for every image that a run left out."""


def run_ablations(
    config: AblationsConfig,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    listener: Listener | None = None,
    checks: Checks | None = None,
) -> AblationsResult:
    """Run everything that the tables need and that has no results yet, and write the results of all runs.

    The same call continues an interrupted suite; with other tables or seeds, it adds their runs to the results. A run
    that fails is reported in `failed`, and the others still run. Raises subclasses of UserError before anything runs,
    with one error for all mistakes: for settings that no refinement can have, or that differ from those of earlier runs
    in `out`. resume: `out` must hold a suite. force: run everything again.
    """
    listener, checks = listener or Silent(), checks or Checks()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # no process group is joined here
        checks.add("jobs", ConfigError("a suite starts its runs itself; start it without torchrun"))
    checks.run("out", lambda: _check_folder(out, resume=resume, force=force))
    whole = config if force else checks.run("out", lambda: _with_earlier(config, out)) or config
    suite = make_suite(whole, out, listener.progress, checks)
    if not force:
        checks.run("sets", lambda: check_earlier(suite))
    checks.finish()
    with stop_signal(), folder_lock(out):
        if force and (out / SETTINGS).is_file():
            _clear(out)
        if whole != config:
            # Tables and seeds of earlier calls stay known, even if this call is interrupted.
            _collect(suite, whole, out, [])
        write_bytes(out / SETTINGS, dump_config(with_absolute_paths(config), defaults=False).encode())
        for notice in (*suite.plan.notices, *suite.plan.derived):
            listener.note(str(notice))
        wanted = runs_of(suite, config)
        unfinished = [run for run in wanted if not run.finished]
        listener.note(f"{len(wanted)} runs, of which {len(wanted) - len(unfinished)} are finished")
        failed = run_jobs(unfinished, jobs_of(config), listener)
        result = _collect(suite, whole, out, failed)
        if result.bad_images:
            listener.warn(skipped_line(result.bad_images))
    return result


def _collect(suite: Suite, whole: AblationsConfig, out: Path, failed: list[RunFailed]) -> AblationsResult:
    """Write the results of all finished runs, and return them. whole: settings with all tables and seeds."""
    rows, elapsed_s = summarise(suite)
    bad_images = skipped_images(suite)
    write_results(out, COMMAND, whole.model_dump(mode="json"), elapsed_s, rows, bad_images=bad_images)
    return AblationsResult(rows, elapsed_s, failed, suite, bad_images)


def jobs_of(config: AblationsConfig) -> int:
    """Return the number of concurrent runs."""
    if config.jobs is not None:
        return config.jobs
    return free_cores() if resolve_device(config.device).type == "cpu" else 1


def _with_earlier(config: AblationsConfig, out: Path) -> AblationsConfig:
    """Return the settings with the tables and seeds of earlier calls as well, whose results stay in the tables.

    Those of the last call are in its settings, those of all calls before in the results.
    """
    if not (out / SETTINGS).is_file():
        return config
    last, before = load_config(AblationsConfig, str(out / SETTINGS)), dict[str, Any]()
    with suppress(OSError, ValueError, KeyError, TypeError):
        before = dict(json.loads((out / "results.json").read_text(encoding="utf-8"))["config"])
    added = {
        name: sorted({*getattr(config, name), *getattr(last, name), *before.get(name, ())})
        for name in ("seeds", "tables")
    }
    return config.model_copy(update=added)


def _check_folder(out: Path, *, resume: bool, force: bool) -> None:
    """Raise OutputError for a folder that must not be used."""
    if resume and force:
        raise OutputError("--resume continues a suite and --force starts it over: choose one")
    check_writable(out)
    known = (out / SETTINGS).is_file()
    if resume and not known:
        raise OutputError(f"{out}: holds no suite to resume; name its folder with --out, or omit --resume to start one")
    ours = [out / name for name in ("results.json", "metrics.jsonl", *_OUR_FILES, *_OUR_FOLDERS)]
    if not known and (found := next(filter(os.path.lexists, ours), None)):
        raise OutputError(f"{out}: already holds {found.name}, and no suite; choose another --out")


def _clear(out: Path) -> None:
    """Remove an earlier suite and nothing else, its results first, so that its remains cannot pass for a finished one.

    Raises OutputError if something cannot be removed.
    """
    try:
        for name in ("results.json", *_OUR_FILES):
            (out / name).unlink(missing_ok=True)
        for settings in sorted((out / "settings").glob("*.toml")):
            if (run := out / "runs" / settings.stem).exists():
                shutil.rmtree(run)
            (out / "logs" / f"{settings.stem}.txt").unlink(missing_ok=True)
            settings.unlink()
        (out / SETTINGS).unlink()
    except OSError as error:
        raise OutputError(f"{error.filename}: cannot be removed ({error.strerror}); choose another --out") from error
