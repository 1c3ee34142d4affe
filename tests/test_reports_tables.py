"""Tables: values, differences, marks of the best value and labels."""

import io
import math
import re

import pytest
from rich.console import Console, RenderableType

from mimref.reports.metrics import metric_label, scores_line, suite_base
from mimref.reports.tables import best_table, compare_rows, comparison_table, markdown_table, results_table
from mimref.reports.terminal import print_comparison, print_rows
from mimref.results import Row


def rows() -> list[Row]:
    scores = {"raw pixels": (97.0, 62.0, 1.5), "base": (97.5, 77.0, 1.2), "refined": (97.2, 80.5, 1.1)}
    result: list[Row] = []
    for model, (knn, shot, dbs) in scores.items():
        mean: Row = {"value": shot, "shots": 1, "mean": shot, "std": 2.0, "splits": 20}
        result += [
            {"model": model, "metric": "knn_top1", "value": knn, "k": 10, "tau": 0.07},
            {"model": model, "metric": "lowshot_top1", **mean},
            {"model": model, "metric": "lowshot_top1", "value": shot, "shots": 1, "split": 0},
            {"model": model, "metric": "davies_bouldin", "value": dbs},
        ]
    return result


def printed(table: RenderableType, *, color: bool = False) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=color, color_system="standard" if color else None)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def cells(table: RenderableType) -> list[list[str]]:
    """Text of the cells of every line of a table, header first."""
    lines = [re.split("[┃│]", line)[1:-1] for line in printed(table).splitlines()]
    return [[cell.strip() for cell in line] for line in lines if line]


def test_comparison_shows_every_model_and_the_difference() -> None:
    assert cells(comparison_table(rows())) == [
        ["", "raw pixels", "base", "refined", "refined - base"],
        ["k-NN top-1", "97.0", "97.5", "97.2", "-0.3"],
        ["1-shot top-1", "62.0 ± 2.0", "77.0 ± 2.0", "80.5 ± 2.0", "+3.5"],
        ["Davies-Bouldin", "1.500", "1.200", "1.100", "-0.100"],
    ]


def test_best_is_bold_and_regressions_are_red() -> None:
    text = printed(comparison_table(rows()), color=True)
    # A style starts before the padding of its cell; for Davies-Bouldin, lower is better.
    for style, shown in ((1, "97.5"), (31, "-0.3"), (1, "80.5"), (32, "+3.5"), (1, "1.100"), (32, "-0.100")):
        assert re.search(rf"\x1b\[{style}m *{re.escape(shown)}", text)
    assert not re.search(r"\x1b\[1m *97\.2", text)


def test_differences_from_any_base() -> None:
    models, lines = compare_rows(rows(), "raw pixels")
    assert models == ["raw pixels", "base", "refined"]
    assert [tuple(cell) for cell in lines["Davies-Bouldin"]] == [
        ("1.500", False, "", None),
        ("1.200", False, "-0.300", True),
        ("1.100", True, "-0.400", True),
    ]
    tied = [
        row | {"value": 97.501} if row["metric"] == "knn_top1" and row["model"] != "base" else row for row in rows()
    ]
    # Values that look equal are treated as equal.
    assert [(cell.is_best, cell.is_gain) for cell in compare_rows(tied, "base")[1]["k-NN top-1"]] == [(True, None)] * 3
    assert markdown_table(rows(), "base").splitlines()[2:] == [
        "| k-NN top-1 | 97.0 (-0.5) | **97.5** | 97.2 (-0.3) |",
        "| 1-shot top-1 | 62.0 ± 2.0 (-15.0) | 77.0 ± 2.0 | **80.5 ± 2.0** (+3.5) |",
        "| Davies-Bouldin | 1.500 (+0.300) | 1.200 | **1.100** (-0.100) |",
    ]


def test_comparison_without_a_base_or_with_gaps() -> None:
    some = [row for row in rows() if row["model"] != "base"]
    assert cells(comparison_table(some))[0] == ["", "raw pixels", "refined"]
    gap = [row for row in rows() if not (row["model"] == "base" and row["metric"] == "knn_top1")]
    assert cells(comparison_table(gap))[1] == ["k-NN top-1", "97.0", "-", "97.2", "-"]
    assert "| k-NN top-1 | 97.0 (-) | - | **97.2** (-) |" in markdown_table(gap, "base")


def test_labels_name_what_varies() -> None:
    sweep: list[Row] = [{"metric": "knn_top1", "value": 1.0, "k": k, "tau": 0.07} for k in (5, 10)]
    assert metric_label(sweep[0], sweep) == "k-NN top-1 (k = 5)"
    assert metric_label(sweep[0]) == "k-NN top-1"
    assert metric_label({"metric": "something_new", "value": 0.0}) == "something_new"


def test_what_follows_from_the_encoder_does_not_part_rows() -> None:
    pair: list[Row] = [
        {"model": model, "metric": "knn_top1", "value": value, "pool": pool, "k": 10}
        for model, value, pool in (("base", 50.0, "cls"), ("swin", 60.0, "mean"))
    ]
    models, lines = compare_rows(pair, "base")
    assert models == ["base", "swin"]
    assert [tuple(cell) for cell in lines.pop("k-NN top-1")] == [
        ("50.0", False, "", None),
        ("60.0", True, "+10.0", True),
    ]
    assert not lines
    both = [*pair, pair[1] | {"pool": "cls", "value": 55.0}]
    assert "k-NN top-1 (pool = mean)" in compare_rows(both, "base")[1]
    epochs: list[Row] = [
        {"model": str(epoch), "metric": "finetune_top1", "value": 1.0, "selected": "best epoch", "epoch": epoch}
        for epoch in (3, 4)
    ]
    assert list(compare_rows(epochs, "3")[1]) == ["fine-tuned top-1"]


def test_alpha_req_is_best_at_one() -> None:
    measured: list[Row] = [
        {"model": model, "metric": "alpha_req", "value": value}
        for model, value in (("a", 1.9), ("b", 1.02), ("c", 0.7), ("d", 2.0))
    ]
    (cells_of,) = compare_rows(measured, "a")[1].values()
    assert [cell.is_best for cell in cells_of] == [False, True, False, False]
    assert [cell.is_gain for cell in cells_of] == [None, True, True, False]


def test_results_table_has_a_column_per_setting_that_varies() -> None:
    assert cells(results_table(rows()))[0] == ["", "model", "value"]
    assert "k 10, tau 0.07, splits 20, split 0" in printed(results_table(rows()))
    sweep: list[Row] = [{"model": "m", "metric": "knn_top1", "value": 1.0, "k": k, "pool": "cls"} for k in (1, 5)]
    assert cells(results_table(sweep)) == [["", "k", "value"], ["k-NN top-1", "1", "1.0"], ["k-NN top-1", "5", "1.0"]]
    lines = printed(results_table(sweep)).splitlines()
    assert lines[0].strip() == "m" and lines[-1].strip() == "pool cls"
    # A setting in the label needs no column.
    shots: list[Row] = [{"metric": "lowshot_top1", "value": 9.0, "shots": n, "splits": 3} for n in (1, 2)]
    assert cells(results_table(shots)) == [["", "value"], ["1-shot top-1", "9.0"], ["2-shot top-1", "9.0"]]


def test_the_spread_of_a_clusterings_runs() -> None:
    best: Row = {"metric": "cluster_acc", "value": 79.0, "mean": 71.5, "std": 5.0, "runs": 100}
    assert cells(results_table([best]))[1] == ["k-means ACC", "79.0 (mean 71.5 ± 5.0)"]
    assert scores_line([best, {"metric": "silhouette", "value": 3.25}]) == "ACC 79.0   silhouette 3.2"


def test_what_the_spread_is_of(capsys: pytest.CaptureFixture[str]) -> None:
    best: Row = {"model": "a", "metric": "cluster_acc", "value": 79.0, "mean": 71.5, "std": 5.0, "runs": 100}
    draws: Row = {"model": "a", "metric": "lowshot_top1", "value": 9.0, "std": 1.0, "shots": 1, "splits": 20}
    both = "± standard deviation of 100 runs, 20 draws"
    for given, legend in (
        ([best, draws], both),
        ([{**draws, "std": 2.0, "splits": 3}], "± standard deviation of 3 draws"),
        # Side by side there is no spread over a clustering's runs.
        ([best, {**best, "model": "b"}], None),
        ([best, draws, {**draws, "model": "b"}], "± standard deviation of 20 draws"),
        ([{"model": "a", "metric": "knn_top1", "value": 1.0}], None),
        ([{"model": "a", "metric": "finetune_top1", "value": 1.0, "std": 0.5}], "± standard deviation"),
    ):
        print_rows(given)
        out = capsys.readouterr().out
        assert out.count("standard deviation") == bool(legend) and (not legend or legend in out.splitlines())
        assert ("±" in out) == bool(legend)


def test_wide_comparisons_become_long_and_lose_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    models = [f"runs/refine-mae_l16-seed{number}" for number in range(6)]
    many: list[Row] = [
        {"model": model, "metric": metric, "value": 50.0 + number, "shots": 1}
        for number, model in enumerate(models)
        for metric in ("knn_top1", "lowshot_top1")
    ]
    for show, end in (
        (lambda: print_rows(many), "│  53.0 │"),
        (lambda: print_comparison(many, models[1]), "│  53.0 │       +2.0 │"),
    ):
        show()
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80 and "…" not in text
        assert text.count("k-NN top-1") == text.count("1-shot top-1") == 1
        assert all(text.count(model) >= 2 for model in models)
        assert [line.endswith(end) for line in text.splitlines() if f" {models[3]} " in line] == [True, True]
    print_comparison(many[:4], models[0])
    assert capsys.readouterr().out.count("k-NN top-1") == 1
    print_rows([{**row, "model": name} for row, name in zip(many, "aabb", strict=False)])
    assert "│ a" not in capsys.readouterr().out  # there is room for a column per model


def test_statistics_are_compared_as_they_are_shown() -> None:
    given: list[Row] = [
        {"model": model, "metric": metric, "value": value}
        for metric, values in (("uniformity", (-3.412, -3.448)), ("hubness", (1.23, 1.17)), ("rankme", (12.34, 12.34)))
        for model, value in zip(("base", "refined"), values, strict=True)
    ]
    _, lines = compare_rows(given, "base")
    assert [(cells[0].is_best, cells[1].is_best, cells[1].difference) for cells in lines.values()] == [
        (False, True, "-0.036"), (False, True, "-0.06"), (True, True, "+0"),
    ]  # fmt: skip
    assert [cells[1].is_gain for cells in lines.values()] == [True, True, None]


def test_the_base_of_a_suite_is_its_first_encoder() -> None:
    rows: list[Row] = [
        {"model": "b", "metric": "knn_top1", "value": 1.0, "entry": "one"},
        {"model": "a", "metric": "knn_top1", "value": 2.0, "entry": "two"},
        {"model": "b", "metric": "knn_top1", "value": 3.0, "entry": "two"},
    ]
    averages: list[Row] = [{"model": name, "metric": "suite_average", "value": 2.0} for name in "ab"]
    assert suite_base([*rows, *averages]) == "a" and suite_base(rows) == "b"


def test_markup_in_names_is_text() -> None:
    odd: list[Row] = [{"model": "[red]a[/red]", "metric": "x[bold]", "value": 1.0}]
    assert "[red]a[/red]" in printed(comparison_table(odd)) and "x[bold]" in printed(results_table(odd))


def test_the_table_suits_the_rows() -> None:
    assert "refined - base" in printed(best_table(rows())) and "refined - base" not in printed(best_table(rows()[:1]))
    ranked: list[Row] = [
        {"metric": metric, "value": value, "head": head, "block": 4, "temperature": head / 10}
        for metric, values in (("head_knn_top1", {2: 90.0, 1: 80.0}), ("head_nn_accuracy", {2: 60.0, 1: 70.0}))
        for head, value in values.items()
    ]
    assert cells(best_table(ranked))[1:] == [["2", "4", "0.2", "90.0", "60.0"], ["1", "4", "0.1", "80.0", "70.0"]]
    speed: Row = {"metric": "benchmark_knn_sweep_ratio", "value": 1.234, "one_s": 1.0, "ten_s": 1.234, "images": 9}
    assert cells(best_table([speed]))[1] == ["knn sweep ratio", "1.23", "one 1, ten 1.23", "images 9"]
    views: Row = {"metric": "benchmark_views", "pipeline": "ours", "value": 50.0, "ms": 20.0, "ratio": 9.96}
    assert cells(best_table([views]))[1] == ["ours", "50.0", "20.0", "10.0", ""]
    crops = views | {"metric": "benchmark_extraction", "ratio_timm": 3.0}
    assert cells(best_table([views, crops]))[-1] == ["ours", "50.0", "20.0", "10.0", "3.0"]
    classes: list[Row] = [{"metric": "knn_top1", "value": 50.0 * n, "class": f"c{n}"} for n in (2, 1)]
    total: Row = {"metric": "knn_top1", "value": 75.0}
    assert cells(best_table([total, *classes]))[-2:] == [["k-NN top-1", "c1", "50.0"], ["k-NN top-1", "c2", "100.0"]]


def test_undefined_values_are_neither_numbers_nor_best() -> None:
    given = rows()
    for row in given:
        if row["model"] == "refined":
            row["value"] = math.nan
    assert cells(comparison_table(given)) == [
        ["", "raw pixels", "base", "refined", "refined - base"],
        ["k-NN top-1", "97.0", "97.5", "undefined", "-"],
        ["1-shot top-1", "62.0 ± 2.0", "77.0 ± 2.0", "undefined", "-"],
        ["Davies-Bouldin", "1.500", "1.200", "undefined", "-"],
    ]
    _, lines = compare_rows(given, "base")
    assert [[cell.is_best for cell in line] for line in lines.values()] == [[False, True, False]] * 3
    _, lines = compare_rows(given, "refined")
    assert all(cell.difference in ("", "-") for line in lines.values() for cell in line)
    assert "nan" not in printed(results_table(given)) + markdown_table(given, "base")
    assert scores_line(given[-1:]) == "Davies-Bouldin undefined"
