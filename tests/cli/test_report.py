"""`mimref report`, and the page that other commands write."""

import json
import os
from pathlib import Path

import pytest

from mimref.cli import run
from mimref.errors import OutputError
from mimref.evaluation.config import CompareConfig
from mimref.results import write_results
from tests.tiny import REFINE, arguments

COMPARE = ["--device", "cpu", "--workers", "0", "--cache", "off", "--protocols", "knn"]


def write_run(folder: Path, value: float = 81.25) -> Path:
    config = CompareConfig(base="base", refined=["refined"]).model_dump(mode="json")
    write_results(folder, "compare", config, 1.0, [{"model": "base", "metric": "knn_top1", "value": value}])
    return folder


def test_a_run_gets_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    for _ in range(2):  # the second report replaces the first without --force
        assert run(["report", str(folder)]) == 0
    assert str(folder / "report.html") in capsys.readouterr().err
    assert "81.2" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_newest_run_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seconds in (("old", 1), ("new", 2)):
        file = write_run(tmp_path / "runs" / name) / "results.json"
        os.utime(file, (seconds, seconds))
    assert run(["report", "--quiet"]) == 0
    assert [path.parent.name for path in tmp_path.glob("runs/*/report.html")] == ["new"]


def test_several_runs_are_overlaid_in_a_file(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, value) for name, value in (("one", 11.1), ("two", 22.2))]
    page = tmp_path / "both.html"
    line = ["report", *map(str, folders), "--out", str(page)]
    assert run(line) == 0 and run(line) == 2 and run([*line, "--force"]) == 0
    text = page.read_text(encoding="utf-8")
    assert "11.1" in text and "22.2" in text and not list(tmp_path.glob("*/report.html"))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("report", ["runs"]),
        ("report gone", ["gone"]),
        ("report one two", ["--out"]),
        ("report one --out x.pdf", ["--out x.pdf", ".html"]),
        ("report one damaged wrong gone", ["--out", "damaged/results.json", "wrong/results.json", "gone"]),
        ("report cut", ["cut/metrics.jsonl", "line 2"]),
        ("report empty", ["empty", "results.json"]),
    ],
)
def test_mistakes_are_one_line_each(
    line: str, named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two", "damaged", "wrong", "cut"):
        write_run(tmp_path / name)
    (tmp_path / "damaged" / "results.json").write_text('{"command": ')
    (tmp_path / "wrong" / "results.json").write_text(
        json.dumps({"command": "x", "config": {}, "elapsed_s": 1, "metrics": []})
    )
    (tmp_path / "cut" / "metrics.jsonl").write_text('{"epoch": 1}\n{"ep')
    (tmp_path / "empty").mkdir()
    assert run(line.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(each.startswith("mimref: error: ") for each in lines)
    for part in named:
        assert any(part in each for each in lines), part
    assert not list(tmp_path.glob("**/*.html"))


def test_an_evaluation_writes_a_report_unless_told_not_to(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["compare", *(str(folder / f"{name}.safetensors") for name in ("base", "refined")), *COMPARE]
    assert run([*line, "--out", str(tmp_path / "with")]) == 0
    page = (tmp_path / "with" / "report.html").read_text(encoding="utf-8")
    rows = json.loads((tmp_path / "with" / "results.json").read_text(encoding="utf-8"))["metrics"]
    assert all(f"{row['value']:.1f}" in page for row in rows)
    assert str(tmp_path / "with" / "report.html") in capsys.readouterr().err
    assert run([*line, "--out", str(tmp_path / "without"), "--no-report"]) == 0
    assert {path.name for path in (tmp_path / "without").iterdir()}.isdisjoint({"report.html", "exhibits.json"})
    assert (tmp_path / "without" / "results.json").is_file()
    assert run([*line, "--out", str(tmp_path / "with"), "--no-report", "--force"]) == 0
    assert not (tmp_path / "with" / "report.html").exists()  # it described the results that were replaced


def test_a_training_writes_a_report(folder: Path, tmp_path: Path) -> None:
    named = {"encoder.weights": folder / "base.safetensors", "data.spec": folder / "data"}
    assert run(arguments("refine", tmp_path / "run", REFINE | named)) == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "mimref refine" in page and "head loss" in page


def test_a_report_that_cannot_be_written_is_a_warning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OutputError("no room")

    monkeypatch.setattr("mimref.reports.html.page.write_report", fail)
    line = ["compare", *(str(folder / f"{name}.safetensors") for name in ("base", "refined")), *COMPARE]
    assert run([*line, "--out", str(tmp_path / "run")]) == 0
    error = capsys.readouterr().err
    assert "warning" in error and "report.html" in error and "no room" in error
    assert (tmp_path / "run" / "results.json").is_file()
