"""Average ranks against the rank column of the paper's Table 8 and a plain loop."""

import math

import numpy as np
import pytest

from mimref.transfer.suite.ranks import average_ranks, summary_rows

# Table 8: Caltech101, CIFAR-100, DTD, Flowers102, Pets, Sun397, SVHN; rank.
TABLE_8 = {
    "MAE L/16": ([91.0, 79.6, 78.0, 91.6, 91.9, 76.0, 75.7], 10.0),
    "D2V2 L/16": ([90.7, 85.0, 76.4, 92.6, 86.7, 76.8, 77.5], 9.5),
    "DINO B/8": ([90.5, 86.6, 80.4, 97.8, 93.4, 77.4, 74.6], 6.8),
    "iBOT L/16": ([90.9, 89.2, 79.6, 97.3, 93.7, 77.7, 69.9], 6.4),
    "MUGS L/16": ([89.6, 89.4, 78.4, 97.8, 95.4, 77.2, 76.5], 6.6),
    "MAE-Refined L/16": ([91.1, 89.0, 80.4, 97.1, 96.0, 79.0, 71.1], 5.0),
    "D2V2-Refined L/16": ([88.7, 88.8, 75.6, 94.1, 94.7, 77.3, 59.1], 9.9),
    "MAE H/14": ([89.8, 81.1, 78.3, 91.5, 91.6, 76.3, 73.0], 10.8),
    "D2V2 H/14": ([90.5, 87.0, 80.0, 92.9, 86.2, 78.3, 77.8], 7.4),
    "MAE-Refined H/14": ([91.2, 90.0, 82.0, 98.0, 96.1, 79.5, 69.7], 3.6),
    "D2V2-Refined H/14": ([89.2, 90.5, 77.4, 95.3, 95.7, 78.4, 61.7], 7.4),
    "MAE 2B/14": ([91.5, 82.5, 79.5, 93.5, 92.8, 77.9, 78.5], 6.4),
    "MAE-Refined 2B/14": ([91.8, 90.8, 82.8, 98.2, 96.5, 80.3, 77.5], 1.4),
}


def test_the_ranks_of_table_8() -> None:
    values = {f"set {number}": {model: row[number] for model, (row, _) in TABLE_8.items()} for number in range(7)}
    rows = summary_rows(values, list(TABLE_8))
    ranks = {str(row["model"]): float(row["value"]) for row in rows if row["metric"] == "suite_rank"}
    averages = {str(row["model"]): float(row["value"]) for row in rows if row["metric"] == "suite_average"}
    assert ranks.keys() == TABLE_8.keys() and {row["entries"] for row in rows} == {7}
    for model, (row, rank) in TABLE_8.items():
        assert abs(ranks[model] - rank) <= 0.2, (model, ranks[model])
        assert averages[model] == pytest.approx(sum(row) / 7)


def test_ranks_are_those_of_a_plain_loop() -> None:
    values = np.random.default_rng(0).integers(0, 4, (6, 5)).astype(float)  # with many ties
    expected = []
    for model in range(5):
        ranks = []
        for row in values:
            larger = sum(other > row[model] for other in row)
            equal = sum(other == row[model] for other in row)
            ranks.append(larger + (equal + 1) / 2)
        expected.append(sum(ranks) / 6)
    assert average_ranks(values.tolist()) == pytest.approx(expected)


def test_summaries_are_over_what_all_models_have() -> None:
    values = {"a": {"x": 10.0, "y": 20.0}, "b": {"x": 99.0}, "c": {"x": 30.0, "y": math.nan}}
    found = {(row["model"], row["metric"]): (row["value"], row["entries"]) for row in summary_rows(values, ["x", "y"])}
    assert found["x", "suite_average"] == (20.0, 2) and math.isnan(float(found["y", "suite_average"][0]))
    assert found["x", "suite_rank"] == (1.5, 2) == found["y", "suite_rank"]  # a missing value ranks last
    assert [row["metric"] for row in summary_rows({"a": {"x": 1.0}}, ["x"])] == ["suite_average"]
    assert summary_rows({"a": {"x": 1.0}}, ["x", "y"]) == []
