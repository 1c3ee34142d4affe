"""`mimref doctor`: what it prints and writes, and its exit code."""

import json
from pathlib import Path

import pytest

from mimref.cli import run
from mimref.doctor.checks import Check

FOUND = [
    Check("torch", "2.9.0"),
    Check("cores", "2 of 8", "advice", "set OMP_NUM_THREADS=2"),
    Check("disk of this folder", "0.5 GiB free | full", "problem", "free some space"),
]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    checks = list(FOUND)
    monkeypatch.setattr("mimref.doctor.diagnosis.diagnose", lambda progress: checks)
    return checks


def test_a_problem_is_exit_code_1(found: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 1
    printed = capsys.readouterr().out
    for word in ("torch", "2.9.0", "OMP_NUM_THREADS=2", "0.5 GiB", "problem: 1, advice: 1, ok: 1"):
        assert word in printed
    del found[2]
    assert run(["doctor", "--quiet"]) == 0
    assert "problem: 0, advice: 1, ok: 1" in capsys.readouterr().out


def test_json(found: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 1
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert captured.err == "" and "version" in printed
    assert printed["checks"][1] == {
        "name": "cores", "value": "2 of 8", "verdict": "advice", "todo": "set OMP_NUM_THREADS=2"
    }  # fmt: skip


def test_results_are_written(found: list[Check], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(["doctor", "--out", str(out)]) == 1
    document = json.loads((out / "results.json").read_text())
    assert document["command"] == "doctor"
    assert [row["verdict"] for row in document["metrics"]] == ["ok", "advice", "problem"]
    assert (out / "results.csv").read_text().splitlines()[1] == "doctor,2.9.0,torch,ok,"
    page = (out / "results.md").read_text()
    # An unescaped bar would end the cell.
    assert "| disk of this folder | 0.5 GiB free \\| full | problem | free some space |" in page
    assert run(["doctor", "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert run(["doctor", "--out", str(out), "--force"]) == 1


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json", "--debug"]) in (0, 1)
    names = [check["name"] for check in json.loads(capsys.readouterr().out)["checks"]]
    assert len(names) == len(set(names)) > 20
