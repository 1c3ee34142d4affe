"""Figures: files that are there, of a size to be read, the same for the same input, and no crash on odd values."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from mimref.errors import DataError, OutputError
from mimref.reports.figures import plot_blocks, plot_comparison, plot_embedding
from mimref.results import Row


def block_rows(model: str, depth: int = 8, *, reconstruction: bool = True) -> list[Row]:
    metrics = ["block_knn_top1", "block_knn_delta", "block_variance", "block_effective_rank"]
    if reconstruction:
        metrics += ["block_reconstruction", "block_reconstruction_delta"]
    return [
        {"model": model, "metric": metric, "value": 1.0 + math.sin(block + len(metric)), "block": block}
        for metric in metrics
        for block in range(2 if metric.endswith("delta") else 1, depth + 1)
    ]


def comparison_rows(models: int = 3) -> list[Row]:
    rows: list[Row] = []
    for number in range(models):
        model = f"model {number}"
        rows += [
            {"model": model, "metric": "knn_top1", "value": 90.0 + number, "k": 10},
            {"model": model, "metric": "lowshot_top1", "value": 60.0, "mean": 60.0, "std": 4.0, "shots": 1},
            {"model": model, "metric": "lowshot_top1", "value": 50.0, "shots": 1, "split": 0},
            {"model": model, "metric": "silhouette", "value": -3.0 + 5 * number},
            {"model": model, "metric": "davies_bouldin", "value": 2.0 - 0.3 * number},
        ]
    return rows


def points(count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.arange(count) % classes
    return rng.normal(size=(classes, 2))[y] * 5 + rng.normal(size=(count, 2)), y


def embedding(path: Path) -> None:
    plot_embedding(path, *points(100, 4), ["ant", "bee", "cat", "dog"], title="UMAP", caption="ACC 95.3  NMI 92.2")


FIGURES: dict[str, Callable[[Path], None]] = {
    "blocks": lambda path: plot_blocks(path, block_rows("a") + block_rows("b"), heads={"a": [6, 7, 8]}),
    "embedding": embedding,
    "comparison": lambda path: plot_comparison(path, comparison_rows(), "model 0"),
}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


@pytest.mark.parametrize("name", FIGURES)
def test_a_picture_comes_out(name: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / f"{name}.png"
    FIGURES[name](path)
    width, height = size(path)
    assert 600 <= width <= 2000 and 400 <= height <= 2500
    shades = np.unique(pixels(path).reshape(-1, 3), axis=0)
    assert len(shades) > 100
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_input_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    FIGURES[name](first)
    FIGURES[name](second)
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as image:
        assert "Software" not in image.info


@pytest.mark.parametrize("name", FIGURES)
def test_the_programs_own_matplotlib_is_left_alone(name: str, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    pyplot_was_there = "matplotlib.pyplot" in sys.modules
    FIGURES[name](tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_was_there


@pytest.mark.parametrize("name", FIGURES)
def test_a_place_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="choose another --out"):
        FIGURES[name](tmp_path / "file" / "a.png")


def test_panels_of_blocks(tmp_path: Path) -> None:
    heights = []
    cases = [
        [row for row in block_rows("a", reconstruction=False) if row["metric"] == "block_knn_top1"],
        block_rows("a", reconstruction=False),
        block_rows("a"),  # reconstruction loss, rank, deltas
        block_rows("a") + block_rows("b"),
    ]
    for rows in cases:
        plot_blocks(tmp_path / "a.png", rows)
        heights.append(size(tmp_path / "a.png")[1])
    assert heights[0] < heights[1] < heights[2] == heights[3]


def test_heads_are_marked(tmp_path: Path) -> None:
    plain, marked = tmp_path / "plain.png", tmp_path / "marked.png"
    plot_blocks(plain, block_rows("a"))
    plot_blocks(marked, block_rows("a"), heads={"a": [7, 8]})
    assert not np.array_equal(pixels(plain), pixels(marked))


def test_blocks_with_holes_and_many_models(tmp_path: Path) -> None:
    rows = [*block_rows("a"), {"model": "b", "metric": "block_knn_top1", "value": 50.0, "block": 3}]
    rows[2] = {**rows[2], "value": math.nan}
    rows[30] = {**rows[30], "value": math.inf}
    plot_blocks(tmp_path / "a.png", rows)
    every = [{**row, "value": math.nan} for row in block_rows("a")]
    plot_blocks(tmp_path / "b.png", every)
    many = [row for n in range(20) for row in block_rows(f"_checkpoint ${n}$ " + 30 * "x", 32, reconstruction=False)]
    plot_blocks(tmp_path / "c.png", many)
    one = [{key: value for key, value in row.items() if key != "model"} for row in block_rows("a", 1)]
    plot_blocks(tmp_path / "d.png", one)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("classes", [1, 2, 20, 21, 300])
def test_embeddings_of_many_classes(classes: int, tmp_path: Path) -> None:
    x, y = points(600, classes)
    plot_embedding(tmp_path / "a.png", x, y)
    assert len(np.unique(pixels(tmp_path / "a.png").reshape(-1, 3), axis=0)) > classes


def test_embedding_with_odd_values(tmp_path: Path) -> None:
    x, y = points(60, 3)
    x[0, 0], x[1, 1] = math.nan, math.inf
    # Labels with gaps, and names for some of them in scripts that the font may lack.
    plot_embedding(tmp_path / "a.png", x.astype(np.float32), y * 7, ["_$x", "b"], caption="$_{", title="\n $ $ 犬")
    plot_embedding(tmp_path / "b.png", np.full((4, 2), math.nan), np.arange(4))
    plot_embedding(tmp_path / "c.png", np.empty((0, 2)), np.empty(0, dtype=np.int64))
    with pytest.raises(DataError, match=r"points of shape \(60, 2\) with labels of shape \(59,\)"):
        plot_embedding(tmp_path / "d.png", x, y[1:])


def test_comparison_with_odd_values(tmp_path: Path) -> None:
    rows = comparison_rows()
    rows[0] = {**rows[0], "value": math.nan}
    del rows[3]
    plot_comparison(tmp_path / "a.png", rows, "model 0")
    plot_comparison(tmp_path / "b.png", comparison_rows(1), "not there")
    plot_comparison(tmp_path / "c.png", comparison_rows(12), "model 3")
    same: list[Row] = [{"model": "a", "metric": "knn_top1", "value": 0.0}]
    plot_comparison(tmp_path / "d.png", same, "a")
    assert len(list(tmp_path.iterdir())) == 4


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to draw"):
        plot_blocks(tmp_path / "a.png", [{"metric": "knn_top1", "value": 1.0}])
    with pytest.raises(DataError, match="nothing to draw"):
        plot_comparison(tmp_path / "a.png", [{"metric": "knn_top1", "value": 1.0}], "base")
    assert not list(tmp_path.iterdir())
