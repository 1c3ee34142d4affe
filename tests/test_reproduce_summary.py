"""Means over seeds beside the paper's numbers: compared with plain loops, and the wording of verdicts."""

import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mimref.refinement.config import RefineConfig
from mimref.reproduce.plan import Run, Suite
from mimref.reproduce.summary import Spread, summarise, verdict
from mimref.reproduce.table1 import Line
from mimref.results import write_results

SEEDS = [0, 1, 2]
DEFAULT = {0: 76.0, 1: 77.0, 2: 76.6}
CHANGED = {0: 75.0, 1: 76.5, 2: 75.2}
SHOT = {0: 40.0, 1: 42.0, 2: 44.0}


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """A default and one other setting with three seeds, and the curves of the base and of two seeds."""

    def run(name: str, command: str, rows: list[dict[str, Any]], seed: int = 0) -> Run:
        config = cast(Any, SimpleNamespace(command=command, seed=seed))
        made = Run(name, config, tmp_path)
        write_results(made.folder, command, {}, 10.0, rows)
        return made

    refinements = []
    for name, values in (("default", DEFAULT), ("a-2-heads", CHANGED)):
        for seed, value in values.items():
            rows = [
                {"model": "raw pixels", "metric": "knn_top1", "value": 83.0},
                {"model": "base", "metric": "knn_top1", "value": 70.0},
                {"model": "refined", "metric": "knn_top1", "value": value, "blocks": "last"},
                {"model": "refined", "metric": "lowshot_top1", "value": SHOT[seed], "mean": SHOT[seed], "shots": 1},
                {"model": "refined", "metric": "lowshot_top1", "value": 0.0, "split": 1, "shots": 1},
            ]
            refinements.append(run(f"{name}-seed{seed}", "refine", rows, seed))
    refinements.append(Run("e-swapped-seed0", RefineConfig(), tmp_path))  # not finished
    blocks = [{"model": "x", "metric": "block_knn_top1", "value": 60.0 + block, "block": block} for block in (1, 2)]
    curves = [run(name, "analyze-blocks", blocks) for name in ("blocks-base", "blocks-default-seed0")]
    blocks[1]["value"] = 70.0
    curves.append(run("blocks-default-seed1", "analyze-blocks", blocks))
    lines = [
        Line("a", "2", "2", "a-2-heads", {"knn_top1": 80.2}, {"heads.blocks": "3-4"}),
        Line("a", "8", "8", "default", {"knn_top1": 81.0}),
        Line("b", "20, 24", "3, 4", "b-blocks-3-4", {"knn_top1": 80.9}),
        Line("e", "swapped", "swapped", "e-swapped", {"knn_top1": 80.9}, {"loss.swap_negatives": True}),
        Line("f", "x", "y", "f-plain", {"knn_top1": 80.5}, missing="the default has neither"),
    ]
    names = ["a-2-heads", "default", "default", "e-swapped", "default"]
    return Suite(cast(Any, None), lines, names, SEEDS, refinements, curves)


def test_rows_equal_plain_loops(suite: Suite) -> None:
    rows, elapsed_s = summarise(suite)
    assert elapsed_s == 60.0
    changed, default, same, missing, never = (row for row in rows if "table" in row)
    assert changed["value"] == statistics.fmean(CHANGED.values())
    pairs = [CHANGED[seed] - DEFAULT[seed] for seed in SEEDS]
    assert (changed["least"], changed["most"], changed["seeds"]) == (75.0, 76.5, 3)
    assert changed["difference"] == pytest.approx(statistics.fmean(pairs), abs=1e-12)
    assert (changed["difference_least"], changed["difference_most"]) == (min(pairs), max(pairs))
    assert (changed["paper"], changed["paper_difference"]) == (80.2, -0.8)
    assert str(changed["verdict"]).startswith("agrees: worse with all 3 seeds")
    assert default["value"] == pytest.approx(statistics.fmean(DEFAULT.values())) and "verdict" not in default
    assert same["value"] == default["value"] and "same settings" in str(same["verdict"])
    assert math.isnan(float(missing["value"])) and missing["verdict"] == "no results"
    assert math.isnan(float(never["value"])) and never["verdict"] == "the default has neither"


def test_without_the_default_nothing_is_compared(suite: Suite) -> None:
    """The default has failed with one seed, with several, or with all."""
    for seed in SEEDS:
        next(run for run in suite.refinements if run.name == f"default-seed{seed}").folder.joinpath(
            "results.json"
        ).unlink()
        changed = next(row for row in summarise(suite)[0] if "table" in row)
        assert changed["value"] == statistics.fmean(CHANGED.values())
        pairs = [CHANGED[other] - DEFAULT[other] for other in SEEDS if other > seed]
        if pairs:
            assert changed["difference"] == pytest.approx(statistics.fmean(pairs), abs=1e-12)
    assert "difference" not in changed and changed["verdict"] == "no results of the default with the same seed"


def test_before_and_after_and_curves(suite: Suite) -> None:
    rows, _ = summarise(suite)
    found = {(row["model"], row["metric"]): row["value"] for row in rows if not {"table", "block"} & row.keys()}
    assert found["raw pixels", "knn_top1"] == 83.0 and found["base", "knn_top1"] == 70.0
    assert found["refined", "lowshot_top1"] == 42.0  # not the rows of single draws
    curves = [row for row in rows if row["metric"] == "block_knn_top1"]
    assert [(row["model"], row["block"], row["value"], row["seeds"]) for row in curves] == [
        ("base", 1, 61.0, 1),
        ("base", 2, 62.0, 1),
        ("refined", 1, 61.0, 2),
        ("refined", 2, 66.0, 2),
    ]
    assert (curves[-1]["least"], curves[-1]["most"]) == (62.0, 70.0)


@pytest.mark.parametrize(
    ("values", "paper", "begins"),
    [
        ([-0.5, -0.3, -0.9], -0.8, "agrees: worse"),
        ([0.5, 0.3], 0.1, "agrees: better"),
        ([-0.5, -0.3], 0.1, "disagrees: worse"),
        ([0.5, 0.3], 0.0, "disagrees: better"),
        ([0.5, -0.3], 0.0, "agrees: no difference"),
        ([0.5, -0.3], -0.8, "undecided: from -0.3 to +0.5"),
        ([-0.02, -0.5], -0.8, "undecided"),
        ([0.04, 0.5], 0.1, "undecided"),  # 0.04 is no difference in a table with one decimal
        ([-0.5], -0.8, "one seed: the same sign"),
        ([0.5], -0.8, "one seed: not the sign"),
        ([0.04], 0.0, "one seed: the same sign"),
    ],
)
def test_verdicts(values: list[float], paper: float, begins: str) -> None:
    assert verdict(Spread.of(values), paper).startswith(begins)
