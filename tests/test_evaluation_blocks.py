"""Scores of blocks against k-NN called alone, plain loops and numpy; head positions against the paper's."""

import io
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from mimref.errors import ConfigError, DataError
from mimref.evaluation.blocks.statistics import (
    analyze_blocks,
    blocks_text,
    feature_statistics,
    normalised_deltas,
    recommend_heads,
)
from mimref.evaluation.knn.protocol import knn_accuracy
from mimref.features.matrix import SideBySide
from mimref.refinement.heads import head_blocks
from mimref.reports.charts import block_chart
from mimref.results import Row

FloatArray = NDArray[np.float32]


def features(
    depth: int = 5, width: int = 6
) -> tuple[list[FloatArray], NDArray[np.int64], list[FloatArray], NDArray[np.int64]]:
    """Features whose classes move apart from block to block, up to the last block but one."""
    rng = np.random.default_rng(0)
    train_y, test_y = rng.permutation(np.arange(60) % 3), rng.permutation(np.arange(30) % 3)
    centres = rng.normal(size=(3, width))
    distance = [0.3 * min(block, depth - 2) for block in range(depth)]

    def block(y: NDArray[np.int64], far: float) -> FloatArray:
        return (far * centres[y] + rng.normal(size=(len(y), width)) + 2).astype(np.float32)

    return [block(train_y, far) for far in distance], train_y, [block(test_y, far) for far in distance], test_y


def values(rows: list[Row], metric: str) -> dict[int, float]:
    return {int(row["block"]): float(row["value"]) for row in rows if row["metric"] == metric}


def test_every_block_is_that_of_knn_alone() -> None:
    train, train_y, test, test_y = features()
    rows = analyze_blocks(train, train_y, test, test_y, k=7, tau=0.1)
    expected = {
        number + 1: knn_accuracy(train[number], train_y, test[number], test_y, k=7, tau=0.1) for number in range(5)
    }
    assert len(set(expected.values())) > 2
    assert values(rows, "block_knn_top1") == expected
    assert [row for row in rows if row["metric"] == "block_knn_top1"][1] == {
        "metric": "block_knn_top1", "value": expected[2], "block": 2, "k": 7, "tau": 0.1
    }  # fmt: skip


def test_statistics_of_every_block_equal_plain_loops() -> None:
    train, train_y, test, test_y = features()
    rows = analyze_blocks(train, train_y, test, test_y)
    for number, x in enumerate(test):
        means, variances = [], []
        for feature in range(x.shape[1]):
            column = [float(value) for value in x[:, feature]]
            mean = sum(column) / len(column)
            means.append(mean)
            variances.append(sum((value - mean) ** 2 for value in column) / len(column))
        assert values(rows, "block_mean")[number + 1] == pytest.approx(sum(means) / len(means), rel=1e-9)
        assert values(rows, "block_variance")[number + 1] == pytest.approx(sum(variances) / len(variances), rel=1e-9)


def test_deltas_of_the_blocks() -> None:
    train, train_y, test, test_y = features()
    rows = analyze_blocks(train, train_y, test, test_y)
    accuracy = list(values(rows, "block_knn_top1").values())
    deltas = [accuracy[number + 1] - accuracy[number] for number in range(4)]
    found = values(rows, "block_knn_delta")
    assert list(found) == [2, 3, 4, 5]
    np.testing.assert_allclose(list(found.values()), [delta / max(deltas) for delta in deltas], rtol=1e-12)
    assert max(found.values()) == 1


def test_some_blocks_of_many() -> None:
    train, train_y, test, test_y = features()
    every = analyze_blocks(train, train_y, test, test_y)
    some = analyze_blocks(train[1::2], train_y, test[1::2], test_y, blocks=[2, 4])
    for metric in ("block_knn_top1", "block_mean", "block_effective_rank"):
        assert values(some, metric) == {block: values(every, metric)[block] for block in (2, 4)}
    assert list(values(some, "block_knn_delta")) == [4]


def test_without_labels_there_are_statistics_alone() -> None:
    _, _, test, _ = features()
    rows = analyze_blocks([], None, test, None)
    assert {row["metric"] for row in rows} == {"block_mean", "block_variance", "block_effective_rank"}
    assert len(rows) == 3 * 5


def test_progress_counts_blocks() -> None:
    train, train_y, test, test_y = features(3)
    seen: list[tuple[int, int]] = []
    analyze_blocks(train, train_y, test, test_y, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_rows_side_by_side_and_half_precision() -> None:
    train, train_y, test, test_y = features()
    joined = [SideBySide([x[:, :2], x[:, 2:]]) for x in train], [SideBySide([x[:, :2], x[:, 2:]]) for x in test]
    whole = analyze_blocks(train, train_y, test, test_y)
    for found, row in zip(analyze_blocks(joined[0], train_y, joined[1], test_y), whole, strict=True):
        assert found == row
    halves = analyze_blocks([], None, [x.astype(np.float16) for x in test], None)
    assert values(halves, "block_variance")[1] == pytest.approx(values(whole, "block_variance")[1], rel=1e-2)


def test_inputs_that_do_not_fit() -> None:
    train, train_y, test, test_y = features(3)
    with pytest.raises(ConfigError, match="2 blocks are named, but features of 3"):
        analyze_blocks(train, train_y, test, test_y, blocks=[1, 2])
    with pytest.raises(ConfigError, match="ascending"):
        analyze_blocks(train, train_y, test, test_y, blocks=[1, 3, 2])
    with pytest.raises(ConfigError, match="no block"):
        analyze_blocks([], None, [], None)
    with pytest.raises(ConfigError, match=r"k = \[61\].* 1 to 60"):
        analyze_blocks(train, train_y, test, test_y, k=61)
    test[1][4, 2] = np.nan
    with pytest.raises(DataError, match="block 2, validation: features of image 4"):
        analyze_blocks(train, train_y, test, test_y)


def test_statistics_equal_numpys() -> None:
    x = np.random.default_rng(0).normal(size=(50, 6)) @ np.random.default_rng(1).normal(size=(6, 6)) + 5
    found = feature_statistics(x)
    eigenvalues = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2 / 50
    share = eigenvalues / eigenvalues.sum()
    assert found.mean == pytest.approx(x.mean(), rel=1e-12)
    assert found.variance == pytest.approx(x.var(axis=0).mean(), rel=1e-9)
    assert found.effective_rank == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-9)


def test_statistics_do_not_depend_on_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) + 100
    whole = feature_statistics(x)
    monkeypatch.setattr("mimref.evaluation.metrics.BLOCK_ELEMENTS", 42)
    np.testing.assert_allclose(feature_statistics(x), whole, rtol=1e-10)


def test_statistics_at_their_corners() -> None:
    line = np.arange(10.0)[:, None] * np.array([1.0, 2.0, 3.0])
    assert feature_statistics(line).effective_rank == pytest.approx(1)
    assert feature_statistics(np.ones((10, 3))) == (1.0, 0.0, 1.0)
    assert feature_statistics(np.ones((1, 3))) == (1.0, 0.0, 1.0)
    full = feature_statistics(np.concatenate([np.eye(3), -np.eye(3)]))
    assert full.effective_rank == pytest.approx(3)


@pytest.mark.parametrize("falling", [False, True])
def test_deltas_equal_a_plain_loop(falling: bool) -> None:
    curve = [float(value) for value in np.random.default_rng(0).normal(size=12)]
    deltas = []
    for number in range(1, 12):
        deltas.append(curve[number - 1] - curve[number] if falling else curve[number] - curve[number - 1])
    expected = [delta / max(deltas) for delta in deltas]
    np.testing.assert_allclose(normalised_deltas(curve, falling_is_better=falling), expected, rtol=1e-12)


def test_deltas_where_nothing_improves() -> None:
    assert normalised_deltas([5, 4, 2]) == [-0.5, -1]
    assert normalised_deltas([5, 5, 4]) == [0, -1]
    assert normalised_deltas([5, 4, 2], falling_is_better=True) == [0.5, 1]
    assert normalised_deltas([3, 3, 3]) == [0, 0]
    assert normalised_deltas([3]) == []
    assert normalised_deltas([]) == []


def curve(depth: int, peak: int) -> list[float]:
    """Scores that rise to a peak block and then fall, as in masked image models."""
    return [60 - 40 * ((block - peak) / depth) ** 2 for block in range(1, depth + 1)]


@pytest.mark.parametrize(
    ("depth", "peak", "expected"),
    [
        (24, 18, "17-24"),  # the paper's ViT-L and 2B
        (24, 17, "17-24"),
        (24, 24, "17-24"),
        (32, 21, "21-32"),  # the paper's ViT-H
        (32, 22, "21-32"),
        (32, 28, "21-32"),
        (12, 10, "9-12"),
        (8, 8, "5-8"),
        # The best block comes before the last third, and is included.
        (24, 14, "14-24"),
        (32, 18, "18-32"),
        (12, 7, "7-12"),
        # A best block in the first half is ignored.
        (24, 3, "13-24"),
        (24, 12, "13-24"),
        (6, 5, "4-6"),
        (4, 4, "3-4"),
        (3, 1, "2-3"),
        (2, 2, "2"),
        (1, 1, "1"),
    ],
)
def test_recommended_heads(depth: int, peak: int, expected: str) -> None:
    found = recommend_heads(curve(depth, peak))
    assert blocks_text(found) == expected
    assert head_blocks(blocks_text(found), depth) == found


def test_recommended_heads_at_their_corners() -> None:
    tied = curve(24, 18)
    tied[13] = max(tied)
    assert recommend_heads(tied)[0] == 14
    holes = curve(24, 18)
    holes[17] = math.nan
    assert blocks_text(recommend_heads(holes)) == "17-24"
    for nothing in ([], [math.nan] * 4):
        with pytest.raises(DataError, match="--heads"):
            recommend_heads(nothing)


@pytest.mark.parametrize(
    ("blocks", "text"),
    [([17, 18, 19], "17-19"), ([20, 22, 24], "20,22,24"), ([17, 18, 20], "17-18,20"), ([8, 8], "8,8"), ([3], "3")],
)
def test_blocks_as_text(blocks: list[int], text: str) -> None:
    assert blocks_text(blocks) == text
    assert head_blocks(text, 24) == blocks


def shown(rows: list[Row], *, heads: list[int], encoding: str = "utf-8") -> list[str]:
    """Lines of the chart as printed to a terminal with this encoding."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(width=100, file=stream).print(block_chart(rows, heads=heads, title="model"))
    stream.seek(0)
    return stream.read().splitlines()


def test_chart() -> None:
    rows: list[Row] = [
        {"metric": "block_knn_top1", "value": value, "block": n + 1} for n, value in enumerate([50, 75, 70])
    ]
    rows += [{"metric": "block_variance", "value": 0.000471, "block": n + 1} for n in range(3)]
    lines = shown(rows, heads=[2, 3])
    by_block = {line.split()[1]: line for line in lines if line.startswith("│")}
    assert [by_block[block].count("█") for block in "123"] == [1, 16, 13]
    assert ["*" in by_block[block] for block in "123"] == [False, True, True]
    assert "75.0" in by_block["2"] and "0.000471" in by_block["2"]


def test_chart_for_ascii_terminals() -> None:
    rows: list[Row] = [{"metric": "block_effective_rank", "value": 3.0, "block": 1}]
    assert "\n".join(shown(rows, heads=[], encoding="ascii")).isascii()
    assert any(line.count("#") == 16 for line in shown(rows, heads=[], encoding="ascii"))


def test_chart_of_a_loss() -> None:
    rows: list[Row] = [
        {"metric": "block_reconstruction", "value": value, "block": n + 1}
        for n, value in enumerate([0.5, 0.25, math.nan])
    ]
    by_block = {line.split()[1]: line for line in shown(rows, heads=[]) if line.startswith("│")}
    assert [by_block[block].count("█") for block in "123"] == [1, 16, 0]
    assert "0.250" in by_block["2"] and " - " in by_block["3"]


def test_deltas_beside_a_value_that_is_undefined() -> None:
    deltas = normalised_deltas([math.nan, 10.0, 30.0, 20.0])
    assert math.isnan(deltas[0]) and deltas[1:] == [1.0, -0.5]


def test_blocks_that_do_not_vary_have_no_accuracy() -> None:
    rng, y = np.random.default_rng(0), np.arange(20) % 2
    x = rng.normal(size=(20, 4)).astype(np.float32) + 5 * y[:, None]
    flat = np.ones_like(x)
    rows = analyze_blocks([flat, x], y, [flat, x], y, k=1)
    by_block = {row["block"]: float(row["value"]) for row in rows if row["metric"] == "block_knn_top1"}
    assert math.isnan(by_block[1]) and by_block[2] == 100.0
    assert recommend_heads(list(by_block.values())) == [2]
