"""results.csv and results.json."""

import csv
import io
import json
import math
from pathlib import Path

import pytest

from mimref.errors import OutputError
from mimref.results import EvaluationResult, Row, frame, read_results, write_results


def rows() -> list[Row]:
    return [
        {"model": "base", "metric": "knn_top1", "value": 97.0, "k": 10, "tau": 0.07},
        {"model": "base", "metric": "lowshot_top1", "value": 62.0, "shots": 1, "mean": 62.0, "std": 2.0, "splits": 20},
    ]


def test_write_results(tmp_path: Path) -> None:
    data = [*rows(), {"model": "base", "metric": "odd", "value": float("nan")}]
    write_results(
        tmp_path / "out",
        "knn",
        {"data": {"spec": "digits"}, "path": Path("a")},
        1.23456,
        data,
        bad_images=[("a.png", "empty file")],
    )
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(document) == ["command", "version", "config", "elapsed_s", "metrics", "bad_images", "versions"]
    assert document["metrics"][:-1] == rows() and document["metrics"][-1]["value"] is None
    assert document["config"] == {"data": {"spec": "digits"}, "path": "a"}
    assert document["elapsed_s"] == 1.235
    assert document["bad_images"] == [{"path": "a.png", "reason": "empty file"}]
    assert document["versions"]["torch"] and document["versions"]["python"].startswith("3.")
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0])[:3] == ["model", "metric", "value"]
    assert len(table) == len(data)
    assert table[0]["value"] == "97.0" and table[0]["k"] == "10" and table[0]["shots"] == ""
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["results.csv", "results.json"]


def test_bytes_of_a_csv(tmp_path: Path) -> None:
    """As Python's csv module writes them: shortest floats, whole numbers whole, missing cells empty, NaN as nan."""
    data: list[Row] = [
        {"metric": "a,b", "value": 0.1, "k": 10, "size": 1, "class": "cat"},
        {"metric": 'quo"te', "value": math.nan, "size": 0.5},
        {"metric": "c", "value": 1e-05, "k": 1, "model": "base"},
        {"metric": "d", "value": 97.0, "k": 20, "tau": 12345678901234567.0},
    ]
    write_results(tmp_path, "knn", {}, 0.0, data)
    assert (tmp_path / "results.csv").read_bytes() == (
        b"model,metric,value,k,size,class,tau\n"
        b',"a,b",0.1,10,1,cat,\n'
        b',"quo""te",nan,,0.5,,\n'
        b"base,c,1e-05,1,,,\n"
        b",d,97.0,20,,,1.2345678901234568e+16\n"
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(frame(data).columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(data)
    assert (tmp_path / "results.csv").read_text() == text.getvalue()
    write_results(tmp_path, "interpolate", {}, 0.0, [])
    assert (tmp_path / "results.csv").read_bytes() == b"\n"


def test_frames() -> None:
    table = EvaluationResult(rows(), 1.0).frame
    assert list(table.columns)[:3] == ["model", "metric", "value"] and len(table) == 2
    assert {key: str(table[key].dtype) for key in ("model", "value", "k", "tau")} == {
        "model": "string",
        "value": "Float64",
        "k": "Int64",
        "tau": "Float64",
    }
    assert table["k"][0] == 10 and table["k"].isna().tolist() == [False, True]


def test_write_results_into_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_results(tmp_path / "out", "knn", {}, 0.0, rows())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    bad = [("a.png", "empty file")]
    write_results(tmp_path, "refine", {}, 2.5, [*rows(), {"metric": "odd", "value": float("inf")}], bad_images=bad)
    read, elapsed_s, bad_images = read_results(tmp_path, "refine")
    assert bad_images == bad
    assert read[:-1] == rows() and math.isnan(float(read[-1]["value"])) and elapsed_s == 2.5


def test_results_of_another_command_are_refused(tmp_path: Path) -> None:
    write_results(tmp_path, "knn", {}, 2.5, rows())
    with pytest.raises(OutputError, match="holds results of knn, not of refine"):
        read_results(tmp_path, "refine")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"metrics": 3}', '{"metrics": [1]}', '{"metrics": []}'])
def test_damaged_results_are_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(OutputError, match=r"results\.json cannot be read"):
        read_results(tmp_path, "refine")
