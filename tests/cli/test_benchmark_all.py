"""`mimref benchmark all`: its page, files and exit code."""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from mimref.benchmarks.suite import run as suite
from mimref.benchmarks.suite.lines import Finding, Line, Part, Threshold
from mimref.cli import run
from mimref.results import read_results
from tests import suite_tasks as tasks
from tests.ranks import fork_server

BAR = Threshold("at most", 24, "the cards of users")


@pytest.fixture(autouse=True)
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "_context", lambda _: fork_server())
    monkeypatch.setattr(suite, "gpu_lines", lambda _: [("steps", Line("step of a ViT-L", "ms"))])


def use(monkeypatch: pytest.MonkeyPatch, parts: Sequence[Part]) -> None:
    monkeypatch.setattr(suite, "parts_for", lambda _: parts)


GOOD = tasks.part(tasks.good("memory", 20.0, BAR), tasks.good("rate", 12_345.6))


def test_the_page_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use(monkeypatch, [GOOD])
    assert run(["benchmark", "all", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    page = (tmp_path / "out" / "results.md").read_text()
    assert "| memory | 20 s | met | at most 24 s | with care |" in page
    assert "| rate | 12,346 s | no threshold |  | with care |" in page
    assert "| step of a ViT-L |  | not measured |  | needs CUDA |" in page
    assert "met: 1, missed: 0, failed: 0, no threshold: 1, not measured: 1" in page
    assert "- memory, at most 24 s: the cards of users" in page
    assert "Missed" not in page and "not finished" not in page
    for words in ("- device: device cpu", "- torch: ", "load ", " s in all"):
        assert words in page
    rows, *_ = read_results(tmp_path / "out", "benchmark all")
    assert [(row["line"], row["verdict"]) for row in rows] == [
        ("memory", "met"), ("rate", "no threshold"), ("step of a ViT-L", "not measured")
    ]  # fmt: skip
    assert (tmp_path / "out" / "results.csv").read_text().count("\n") == 4
    assert (tmp_path / "out" / "logs" / "a-part.log").is_file()
    captured = capsys.readouterr()
    assert "memory" in captured.out and "error" not in captured.err


def test_what_misses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    crash = tasks.task("crash", partial(tasks.crashing, first="none", number=signal.SIGSEGV))
    raising = tasks.task("raising", partial(tasks.raising, line="raising"))
    hang = tasks.task("hang", partial(tasks.hanging, pids=str(tmp_path / "pids")), limit_s=0.5)
    use(monkeypatch, [tasks.part(crash, tasks.good("memory", 25.0, BAR)), GOOD, tasks.part(raising, hang, name="b")])
    assert run(["benchmark", "all", "--out", str(tmp_path / "out"), "--quiet"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(":")[2].strip() for line in errors] == ["crash", "memory", "raising", "hang"]
    assert "signal 11" in errors[0] and "25 s, threshold at most 24 s" in errors[1] and "no raising" in errors[2]
    page = (tmp_path / "out" / "results.md").read_text()
    missed = page[page.index("Missed:") :]
    assert all(f"- {name}: " in missed for name in ("crash", "memory", "raising", "hang"))
    # The folder is finished nevertheless: nothing has to be measured again.
    rows, *_ = read_results(tmp_path / "out", "benchmark all")
    assert [row["verdict"] for row in rows] == [
        "failed",
        "missed",
        "met",
        "no threshold",
        "failed",
        "failed",
        "not measured",
    ]


def test_logs_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, [GOOD])
    (tmp_path / "logs").write_text("a file")
    assert run(["benchmark", "all", "--out", str(tmp_path), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "logs: File exists; choose another --out" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_measured_before_a_stop_is_on_the_page(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = tasks.task("stop", partial(tasks.stopping, parent=os.getpid(), number=number))
    use(monkeypatch, [GOOD, tasks.part(stop, tasks.good("afterwards"))])
    out = tmp_path / "out"
    assert run(["benchmark", "all", "--out", str(out)]) == 128 + number
    assert "stopped after 2 of 4 measurements" in capsys.readouterr().err
    page = (out / "results.md").read_text()
    assert "| memory | 20 s | met |" in page and "not finished" in page and "afterwards" not in page
    assert not (out / "results.json").exists()
    # The same command can be run again.
    use(monkeypatch, [GOOD])
    assert run(["benchmark", "all", "--out", str(out)]) == 0
    assert "not finished" not in (out / "results.md").read_text()


def test_results_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, [])
    (tmp_path / "results.json").write_text("{}")
    assert run(["benchmark", "all", "--out", str(tmp_path)]) == 2
    assert "--force" in capsys.readouterr().err


def test_earlier_results_survive_a_device_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, [GOOD])
    arguments = ["benchmark", "all", "--out", str(tmp_path), "--quiet", "--device"]
    assert run([*arguments, "cpu"]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert run([*arguments, "cuda:99", "--force"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cuda:99" in error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_all_parts_measure_the_device_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    def run_part(part: Part, device: str, *_: object) -> Iterator[Finding]:
        found.append(device)
        return iter(())

    use(monkeypatch, [GOOD])
    monkeypatch.setattr(suite, "resolve_device", torch.device)
    monkeypatch.setattr(suite, "run_part", run_part)
    suite.run_suite("cuda:1")
    assert found == ["cuda:1"]


@pytest.mark.slow
def test_the_small_form_on_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything runs; no test checks how long it takes."""
    monkeypatch.undo()
    assert run(["benchmark", "all", "--out", str(tmp_path), "--device", "cpu"]) in (0, 1)
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["elapsed_s"] < suite.TOTAL_S["cpu"] + 60
    assert [row["line"] for row in document["metrics"] if row["verdict"] == "failed"] == []
    exact = {row["line"]: row["verdict"] for row in document["metrics"] if "gradients" in row["line"]}
    assert exact["difference of gradients, fp64"] == "met"
