"""Runs in processes: order, dependencies, failures, and that none survives the suite's process. No run imports torch:
the processes are stand-ins, except in the slow test."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimref.config.load import load_config
from mimref.refinement.config import RefineConfig
from mimref.reproduce import jobs
from mimref.reproduce.jobs import run_jobs
from mimref.reproduce.plan import Run
from tests.tiny import Watcher

# Writes its results after 0.6 s; a name with `bad` fails, one with `heads` writes its heads at once.
STAND_IN = """
import json, os, pathlib, sys, time
name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
print(name, os.environ["OMP_NUM_THREADS"], flush=True)
if "bad" in name:
    sys.exit("12:00:00 error: the loss is not finite")
folder.mkdir(parents=True)
if "heads" in name:
    (folder / "heads.pt").touch()
time.sleep(0.6)
document = {"command": "refine", "elapsed_s": 1.0, "metrics": [], "started": time.time() - 0.6, "ended": time.time()}
(folder / "results.json").write_text(json.dumps(document))
"""


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "command", lambda run: [sys.executable, "-S", "-c", STAND_IN, run.name, str(run.folder)])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def runs(out: Path, *names: str, needs: dict[str, tuple[str, str]] | None = None) -> list[Run]:
    found = {name: Run(name, RefineConfig(), out) for name in names}
    return [
        Run(name, run.config, out, (of, found[of].folder / file)) if (of := (needs or {}).get(name, ("", ""))[0])
        and (file := (needs or {})[name][1]) else run
        for name, run in found.items()
    ]  # fmt: skip


def times(run: Run) -> tuple[float, float]:
    document = json.loads((run.folder / "results.json").read_text())
    return document["started"], document["ended"]


def test_as_many_as_jobs_run_at_the_same_time(tmp_path: Path) -> None:
    made = runs(tmp_path, "a", "b", "c")
    assert run_jobs(made, 2, Watcher()) == []  # type: ignore[arg-type]
    (a, b, c) = map(times, made)
    assert a[0] < b[1] and b[0] < a[1]
    assert c[0] > min(a[1], b[1]) - 0.1
    assert made[0].log.read_text() == "a 1\n"
    assert load_config(RefineConfig, str(made[0].settings)) == RefineConfig(preset=str(made[0].settings))


def test_a_run_waits_for_the_file_that_it_needs(tmp_path: Path) -> None:
    needs = {"second": ("heads", "heads.pt"), "third": ("heads", "results.json")}
    heads, second, third = runs(tmp_path, "heads", "second", "third", needs=needs)
    assert run_jobs([third, second, heads], 3, Watcher()) == []  # type: ignore[arg-type]
    assert times(second)[0] < times(heads)[1] < times(third)[0] + 0.1


def test_a_failed_run_is_named_and_others_continue(tmp_path: Path) -> None:
    needs = {"needy": ("bad", "heads.pt"), "needier": ("needy", "results.json")}
    watcher = Watcher()
    failed = run_jobs(runs(tmp_path, "bad", "needy", "needier", "good", needs=needs), 1, watcher)  # type: ignore[arg-type]
    assert (tmp_path / "runs" / "good" / "results.json").is_file()
    texts = list(map(str, failed))
    assert len(texts) == 3 and texts[0].startswith("run bad: the loss is not finite; see ")
    assert "needs run bad, which has failed" in texts[1] and "needs run needy, which has failed" in texts[2]
    assert any("run bad" in note for note in watcher.notes)


def test_a_missing_file_of_a_finished_run(tmp_path: Path) -> None:
    (run,) = runs(tmp_path, "x")
    lost = Run("y", run.config, tmp_path, ("gone", tmp_path / "heads.pt"))
    (failed,) = run_jobs([lost], 1, Watcher())  # type: ignore[arg-type]
    assert "run y: needs run gone, whose heads.pt is missing" in str(failed)


def test_the_users_threads_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jobs.environment()["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert jobs.environment()["OMP_NUM_THREADS"] == "3"


def test_runs_end_when_the_suite_is_interrupted(tmp_path: Path) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = jobs._start

    def interrupted(run: Run) -> "subprocess.Popen[bytes]":
        if started:
            raise KeyboardInterrupt
        started.append(start(run))
        return started[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "_start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_jobs(runs(tmp_path, "a", "b"), 2, Watcher())  # type: ignore[arg-type]
    assert started[0].returncode == -signal.SIGTERM


def test_a_process_stops_when_the_suites_process_is_killed(tmp_path: Path) -> None:
    # The worker's own thread, without the worker's imports of torch.
    source = (Path(jobs.__file__).parent / "worker.py").read_text()
    function = source[source.index("def _stop_when_left") : source.index("\n\ndef main")]
    child = f"import os, signal, threading, time\n{function}\n"
    child += (
        "threading.Thread(target=_stop_when_left, daemon=True).start()\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    )
    parent = (
        f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}], stdin=subprocess.PIPE)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent + "time.sleep(60)"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(pid)


def running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie, which nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return os.path.exists(f"/proc/{pid}")
