"""The suite for a GPU's first hour: thresholds, and processes whose faults cost only their own lines."""

import math
import multiprocessing
import multiprocessing.context
import os
import signal
import time
from functools import partial
from multiprocessing.connection import Pipe
from pathlib import Path

import pytest

from mimref.benchmarks.suite import run
from mimref.benchmarks.suite.lines import Finding, Found, Line, Part, Threshold
from mimref.benchmarks.suite.run import run_part
from tests import suite_tasks as tasks
from tests.ranks import fork_server, start_processes

AT_MOST, AT_LEAST = Threshold("at most", 2.0, "a reason"), Threshold("at least", 2.0, "a reason")


@pytest.fixture(autouse=True)
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork processes from the one that other tests use as well."""
    monkeypatch.setattr(run, "_context", lambda _: fork_server())


def found_of(part: Part, *, seconds: float = 60.0, logs: Path | None = None) -> dict[str, Finding]:
    found = list(run_part(part, "cpu", time.monotonic() + seconds, logs))
    names = [line.name for task in part.tasks for line in task.lines]
    assert [finding.line.name for finding in found] == names
    return {finding.line.name: finding for finding in found}


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended but has not been waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: object, what: str) -> None:
    assert callable(condition)
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends, what
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("value", "threshold", "verdict"),
    [
        (2.0, AT_MOST, "met"),
        (2.1, AT_MOST, "missed"),
        (math.nan, AT_MOST, "missed"),
        (2.0, AT_LEAST, "met"),
        (1.9, AT_LEAST, "missed"),
        (math.nan, AT_LEAST, "missed"),
        (1.0, None, "no threshold"),
        (None, AT_MOST, "not measured"),
    ],
)
def test_a_value_is_compared_with_its_bar(value: float | None, threshold: Threshold | None, verdict: str) -> None:
    finding = Finding("part", Line("line", "GB", threshold), Found("line", value, "a note", {"batch": 3}))
    assert (finding.verdict, finding.misses) == (verdict, verdict == "missed")
    row = finding.row()
    assert (row["part"], row["line"], row["unit"], row["verdict"]) == ("part", "line", "GB", verdict)
    assert (row["note"], row["batch"]) == ("a note", 3)
    assert row["threshold"] == (f"{threshold.kind} 2" if threshold else "no threshold")
    assert row["value"] == value or math.isnan(float(row["value"]))


def test_nothing_found_is_a_fault_even_without_a_bar() -> None:
    finding = Finding("part", Line("line", "GB"), fault="crashed")
    assert (finding.verdict, finding.misses, finding.note) == ("failed", True, "crashed")


def test_every_kind_of_fault_costs_its_own_lines(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    found = found_of(
        tasks.part(
            tasks.good("a", threshold=AT_MOST),
            tasks.good("slow", 3.0, threshold=AT_MOST),
            tasks.task("raising", partial(tasks.raising, line="raising")),
            tasks.task("refusing", tasks.refusing),
            tasks.task("memory", tasks.out_of_memory),
            tasks.task("silent", tasks.silent),
            tasks.good("b"),
            tasks.task("before", partial(tasks.crashing, first="before", number=signal.SIGSEGV), "crashing", "after"),
            tasks.good("c"),
            tasks.task("killed", partial(tasks.crashing, first="none", number=signal.SIGKILL)),
            tasks.task("exiting", tasks.exiting),
            tasks.task("hanging", partial(tasks.hanging, pids=str(pids)), limit_s=1.0),
            tasks.task("lacking", partial(tasks.lacking, line="lacking"), threshold=AT_MOST),
            tasks.good("d"),
        )
    )
    verdicts = {name: finding.verdict for name, finding in found.items()}
    assert {name for name, verdict in verdicts.items() if verdict == "no threshold"} == {"b", "before", "c", "d"}
    assert (verdicts["a"], verdicts["slow"], verdicts["lacking"]) == ("met", "missed", "not measured")
    faults = {name: finding.fault for name, finding in found.items() if finding.verdict == "failed"}
    assert faults.pop("raising") == "ValueError: no raising"
    assert faults.pop("refusing") == "out of memory with 1 image; 0 fit"
    assert faults.pop("memory").startswith("OutOfMemoryError: CUDA out of memory")
    assert faults.pop("silent") == "nothing was measured"
    assert "signal 11" in faults.pop("crashing") and "signal 11" in faults.pop("after")
    assert "signal 9" in (killed := faults.pop("killed")) and "memory" in killed
    assert "exit code 3" in faults.pop("exiting")
    assert faults.pop("hanging") == "not finished within 1 s"
    assert not faults
    # No process of the task that hung is left.
    assert not any(is_alive(int(pid)) for pid in pids.read_text().split())


def test_what_a_crashed_process_has_started_is_ended(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    crashing = partial(tasks.hanging, pids=str(pids), then=signal.SIGSEGV)
    found = found_of(tasks.part(tasks.task("crashing", crashing), tasks.good("a")))
    assert "signal 11" in found["crashing"].fault and found["a"].value == 1
    wait_for(lambda: not any(is_alive(int(pid)) for pid in pids.read_text().split()), "a process is left")


def test_time_that_is_used_up_is_said(tmp_path: Path) -> None:
    hanging = tasks.task("hanging", partial(tasks.hanging, pids=str(tmp_path / "pids")))
    started = time.monotonic()
    found = found_of(tasks.part(hanging, tasks.good("late"), tasks.good("later")), seconds=1.5)
    assert time.monotonic() - started < 20
    assert "not finished within" in found["hanging"].fault
    assert {found[name].fault for name in ("late", "later")} == {"not begun: all the time was used up"}


def test_what_a_part_prints_is_in_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    raising = tasks.task("raising", partial(tasks.raising, line="raising"))
    found_of(tasks.part(tasks.task("a", partial(tasks.printing, line="a")), raising, name="A part / 1"), logs=tmp_path)
    log = (tmp_path / "A-part-1.log").read_text()
    for words in ("--- a\n", "said in Python", "said in C", "--- raising", "Traceback", "ValueError: no raising"):
        assert words in log
    assert capfd.readouterr() == ("", "")


def suite_of_one(pids: str) -> None:
    """Run a suite whose only task hangs."""
    run._context = lambda _: fork_server()  # type: ignore[assignment,return-value]
    hanging = tasks.task("hanging", partial(tasks.hanging, pids=pids))
    list(run_part(tasks.part(hanging), "cpu", time.monotonic() + 60))


def test_nothing_outlives_a_suite_that_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    (suite,) = start_processes(suite_of_one, [(str(pids),)])
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2, "the task has not begun")
    left = [int(pid) for pid in pids.read_text().split()]
    assert suite.pid is not None and all(map(is_alive, left))
    os.kill(suite.pid, signal.SIGKILL)
    suite.join()
    wait_for(lambda: not any(map(is_alive, left)), "a process of the suite is left")


def test_a_process_that_does_not_start_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    child = run._Child.__new__(run._Child)
    child._pipe, other = Pipe()
    (child._process,) = start_processes(time.sleep, [(600,)])
    child._started = False
    monkeypatch.setattr(run, "_START_S", 0.2)
    assert "did not start" in child.wait_for_start()
    child._process.kill()
    assert "signal 9" in child.wait_for_start()
    child.end()
    other.close()


@pytest.mark.slow
def test_processes_that_a_gpu_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA cannot be used in a fork: for CUDA, every process starts from scratch."""
    monkeypatch.undo()
    assert isinstance(run._context("cuda"), multiprocessing.context.SpawnContext)
    monkeypatch.setattr(run, "_context", lambda _: multiprocessing.get_context("spawn"))
    crash = tasks.task("first", partial(tasks.crashing, first="first", number=signal.SIGSEGV), "crash")
    found = found_of(tasks.part(tasks.good("a"), crash, tasks.good("b")), seconds=120)
    assert {name: finding.value for name, finding in found.items()} == {"a": 1, "first": 1, "crash": None, "b": 1}
