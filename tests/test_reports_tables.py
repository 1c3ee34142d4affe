"""Tables, progress and results files."""

import io
import re

import pytest
from rich.console import Console, RenderableType

from mimref.reports import tables as report
from mimref.reports.progress import show_progress
from mimref.reports.tables import best_table, comparison_table, metric_label, results_table
from mimref.results import Row


def rows() -> list[Row]:
    scores = {"raw pixels": (97.0, 62.0, 1.5), "base": (97.5, 77.0, 1.2), "refined": (97.2, 80.5, 1.1)}
    result: list[Row] = []
    for model, (knn, shot, dbs) in scores.items():
        result += [
            {"model": model, "metric": "knn_top1", "value": knn, "k": 10, "tau": 0.07},
            {
                "model": model,
                "metric": "lowshot_top1",
                "value": shot,
                "shots": 1,
                "mean": shot,
                "std": 2.0,
                "splits": 20,
            },
            {"model": model, "metric": "lowshot_top1", "value": shot, "shots": 1, "split": 0},
            {"model": model, "metric": "davies_bouldin", "value": dbs},
        ]
    return result


def printed(table: RenderableType, *, color: bool = False) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=color, color_system="standard" if color else None)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def line(text: str, label: str) -> str:
    return next(candidate for candidate in text.splitlines() if label in candidate)


def test_comparison_shows_every_model_and_the_difference() -> None:
    text = printed(comparison_table(rows()))
    assert [cell.strip() for cell in line(text, "raw pixels").split("┃")[2:-1]] == [
        "raw pixels",
        "base",
        "refined",
        "refined - base",
    ]
    assert [c.strip() for c in line(text, "k-NN").split("│")[1:-1]] == ["k-NN top-1", "97.0", "97.5", "97.2", "-0.3"]
    assert "80.5 ± 2.0" in line(text, "1-shot") and "+3.5" in line(text, "1-shot")
    assert "-0.100" in line(text, "Davies")
    assert text.count("shot") == 1


def test_best_is_bold_and_regressions_are_red() -> None:
    text = printed(comparison_table(rows()), color=True)
    # A style opens before the padding of its cell; for Davies-Bouldin lower is better.
    for style, shown in ((1, "97.5"), (31, "-0.3"), (1, "80.5"), (32, "+3.5"), (1, "1.100"), (32, "-0.100")):
        assert re.search(rf"\x1b\[{style}m *{re.escape(shown)}", text)
    assert not re.search(r"\x1b\[1m *97\.2", text)


def test_comparison_without_a_base_or_with_gaps() -> None:
    some = [row for row in rows() if row["model"] != "base"]
    assert "refined - base" not in printed(comparison_table(some))
    gap = [row for row in rows() if not (row["model"] == "base" and row["metric"] == "knn_top1")]
    cells = [cell.strip() for cell in line(printed(comparison_table(gap)), "k-NN").split("│")[1:-1]]
    assert cells == ["k-NN top-1", "97.0", "-", "97.2", "-"]


def test_labels_name_what_varies() -> None:
    sweep: list[Row] = [{"metric": "knn_top1", "value": 1.0, "k": k, "tau": 0.07} for k in (5, 10)]
    assert metric_label(sweep[0], sweep) == "k-NN top-1 (k = 5)"
    assert metric_label(sweep[0]) == "k-NN top-1"
    assert metric_label({"metric": "something_new", "value": 0.0}) == "something_new"


def test_results_table_has_a_column_per_setting_that_varies() -> None:
    text = printed(results_table(rows()))
    header = [cell.strip() for cell in text.splitlines()[1].split("┃")[1:-1]]
    assert header == ["", "model", "value"]
    assert "k 10, tau 0.07, splits 20, split 0" in text
    sweep: list[Row] = [{"model": "m", "metric": "knn_top1", "value": 1.0, "k": k, "pool": "cls"} for k in (1, 5)]
    lines = printed(results_table(sweep)).splitlines()
    assert lines[0].strip() == "m" and lines[-1].strip() == "pool cls"
    assert [cell.strip() for cell in lines[4].split("│")[1:-1]] == ["k-NN top-1", "1", "1.0"]
    # What stands in the label needs no column.
    shots: list[Row] = [{"metric": "lowshot_top1", "value": 9.0, "shots": n, "splits": 3} for n in (1, 2)]
    text = printed(results_table(shots))
    assert "1-shot top-1" in text and "2-shot top-1" in text and "shots" not in text and "splits 3" in text
    best: Row = {"metric": "cluster_acc", "value": 79.0, "mean": 71.5, "std": 5.0, "runs": 100}
    assert "79.0 (mean 71.5 ± 5.0)" in printed(results_table([best]))


def test_markup_in_names_is_text() -> None:
    odd: list[Row] = [{"model": "[red]a[/red]", "metric": "x[bold]", "value": 1.0}]
    assert "[red]a[/red]" in printed(comparison_table(odd)) and "x[bold]" in printed(results_table(odd))


def test_heads_are_ranked_in_one_line_each() -> None:
    ranked: list[Row] = [
        {"metric": metric, "value": value, "head": head, "block": 4, "temperature": head / 10}
        for metric, values in (("head_knn_top1", {2: 90.0, 1: 80.0}), ("head_nn_accuracy", {2: 60.0, 1: 70.0}))
        for head, value in values.items()
    ]
    lines = [line for line in printed(best_table(ranked)).splitlines() if "│" in line]
    assert [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines] == [
        ["2", "4", "0.2", "90.0", "60.0"],
        ["1", "4", "0.1", "80.0", "70.0"],
    ]


def test_the_best_table_suits_the_rows() -> None:
    assert "refined - base" in printed(best_table(rows()))
    assert "refined - base" not in printed(best_table(rows()[:1]))


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, _environ={"TERM": "xterm"})


def output(target: Console) -> str:
    return target.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_progress_in_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    target = console(terminal=False)
    with show_progress("lowshot", console=target) as display:
        for done in range(10, 41):
            now[0] += 1.0
            display.update(done, 40)
        display.log("path[0] done")
    assert output(target).splitlines() == [
        "lowshot: 19/40, 1.0/s, 0:00:21 left",
        "lowshot: 29/40, 1.0/s, 0:00:11 left",
        "lowshot: 39/40, 1.0/s, 0:00:01 left",
        "lowshot: 40/40, 1.0/s",
        "path[0] done",
    ]


def test_progress_bar_and_quiet() -> None:
    target = console(terminal=True)
    with show_progress("clusters", console=target) as display:
        display.update(3, 10)
        display.log("[bold] stays text")
        display.update(10, 10)
    assert "10/10" in output(target) and "[bold] stays text" in output(target)
    target = console(terminal=True)
    with show_progress("clusters", quiet=True, console=target) as display:
        display.update(1, 2)
        display.log("nothing")
    assert output(target) == ""
