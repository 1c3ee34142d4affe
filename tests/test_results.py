"""results.csv and results.json."""

import csv
import json
import math
from pathlib import Path

import pytest

from mimref.errors import OutputError
from mimref.results import Row, read_results, write_results


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


def test_write_results_into_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_results(tmp_path / "out", "knn", {}, 0.0, rows())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_results(tmp_path, "refine", {}, 2.5, [*rows(), {"metric": "odd", "value": float("inf")}])
    read, elapsed_s = read_results(tmp_path, "refine")
    assert read[:-1] == rows() and math.isnan(float(read[-1]["value"])) and elapsed_s == 2.5


def test_results_of_another_command_are_refused(tmp_path: Path) -> None:
    write_results(tmp_path, "knn", {}, 2.5, rows())
    with pytest.raises(OutputError, match="holds results of knn, not of refine; give another --out"):
        read_results(tmp_path, "refine")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"metrics": 3}', '{"metrics": [1]}', '{"metrics": []}'])
def test_damaged_results_are_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(OutputError, match=r"results\.json cannot be read"):
        read_results(tmp_path, "refine")
