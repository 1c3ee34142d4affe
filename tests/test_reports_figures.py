"""Figures: contents of the axes, files of a readable size, the same bytes for the same input, unusual values."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from PIL import Image

from mimref.errors import OutputError
from mimref.reports import figures
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


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures, collected instead of saved: saving takes most of the time."""
    found: list[Figure] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: found.append(figure))
    return found


NOWHERE = Path("figure.png")


def values(ax: Axes) -> list[float]:
    return [float(value) for value in ax.lines[0].get_ydata()]  # type: ignore[union-attr, arg-type]


def widths(ax: Axes) -> list[float]:
    return [float(bar.get_width()) for bar in ax.patches]  # type: ignore[attr-defined]


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def whiskers(ax: Axes) -> list[list[float]]:
    bars = [container.lines[2][0] for container in ax.containers if isinstance(container, ErrorbarContainer)]
    return [bar.get_segments()[0][:, 0].tolist() for bar in bars]


FIGURES: dict[str, Callable[[Path], None]] = {
    "blocks": lambda path: plot_blocks(path, block_rows("a", 4, reconstruction=False), heads={"a": [3, 4]}),
    "embedding": lambda path: plot_embedding(path, *points(40, 3), ["_$x", "bee", "犬"], title="\n $ $", caption="$_{"),
    "comparison": lambda path: plot_comparison(path, comparison_rows(2), "model 0"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_files(name: str, tmp_path: Path) -> None:
    before, had_pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    first, second = tmp_path / "deep" / "a.png", tmp_path / "deep" / "b.png"
    FIGURES[name](first)
    FIGURES[name](second)
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as image:
        assert image.format == "PNG" and "Software" not in image.info
        assert 600 <= image.width <= 2000 and 350 <= image.height <= 2500
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 100
    assert sorted(file.name for file in first.parent.iterdir()) == ["a.png", "b.png"]
    # The program's own matplotlib settings do not change, and pyplot is not imported.
    assert dict(matplotlib.rcParams) == before and ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="--out"):
        FIGURES["comparison"](tmp_path / "file" / "a.png")


def test_curves_and_deltas_of_blocks(drawn: list[Figure]) -> None:
    knn: list[Row] = [
        {"model": "a", "metric": "block_knn_top1", "value": v, "block": n} for n, v in ((3, 30.0), (1, 10.0), (2, 52.3))
    ]
    plot_blocks(NOWHERE, knn, heads={})
    (ax,) = drawn[0].axes
    assert values(ax) == [10.0, 52.3, 30.0] and texts(ax) == ["52.3"]
    plot_blocks(NOWHERE, block_rows("a", reconstruction=False), heads={})
    plot_blocks(NOWHERE, block_rows("a") + block_rows("b"), heads={"b": [7, 8]})
    assert [len(figure.axes) for figure in drawn] == [1, 2, 5]
    curves, (first, second) = drawn[2].axes[:3], drawn[2].axes[3:]
    assert [len(ax.lines) for ax in curves] == [2, 2, 2]
    assert values(curves[1]) == [row["value"] for row in block_rows("a") if row["metric"] == "block_reconstruction"]
    assert (first.get_title("left"), second.get_title("left")) == ("a", "b")
    deltas = [row["value"] for row in block_rows("a") if str(row["metric"]).endswith("delta")]
    assert [bar.get_height() for bar in first.patches] == deltas  # type: ignore[attr-defined]
    # Filled points mark recommended heads.
    unmarked, marked = (collection.get_facecolor() for collection in curves[0].collections)  # type: ignore[attr-defined]
    assert {to_hex(color) for color in unmarked} == {"#ffffff"}
    assert [n for n, color in enumerate(marked, start=1) if to_hex(color) != "#ffffff"] == [7, 8]


def test_blocks_with_holes_and_many_models(drawn: list[Figure]) -> None:
    rows = [*block_rows("a"), {"model": "b", "metric": "block_knn_top1", "value": 50.0, "block": 3}]
    rows[2], rows[30] = {**rows[2], "value": math.nan}, {**rows[30], "value": math.inf}
    plot_blocks(NOWHERE, rows, heads={})
    assert math.isnan(values(drawn[0].axes[0])[2]) and texts(drawn[0].axes[0])[-1] == "50.0"
    plot_blocks(NOWHERE, [{**row, "value": math.nan} for row in block_rows("a")], heads={})
    assert texts(drawn[1].axes[0]) == []
    names = [f"_checkpoint ${n}$ " + 30 * "x" for n in range(9)]
    plot_blocks(NOWHERE, [row for name in names for row in block_rows(name, 2, reconstruction=False)], heads={})
    shown = [text.get_text() for text in drawn[2].legends[0].get_texts()]
    assert len(set(shown)) == 9 and all(len(text) <= 36 and r"\$" in text for text in shown)


@pytest.mark.parametrize("classes", [1, 20, 21, 100])
def test_embeddings_of_many_classes(classes: int, drawn: list[Figure]) -> None:
    x, y = points(600, classes)
    x[0, 0], x[1, 1] = math.nan, math.inf
    plot_embedding(NOWHERE, x, 7 * y, ["zero"], caption="ACC 9")
    (ax,) = drawn[0].axes
    clouds = ax.collections
    assert sum(len(cloud.get_offsets()) for cloud in clouds) == np.isfinite(x).all(axis=1).sum()  # type: ignore[arg-type]
    styles = {(to_hex(cloud.get_facecolor()[0]), len(cloud.get_paths()[0])) for cloud in clouds}  # type: ignore[index]
    assert len(styles) == classes
    legend = ax.get_legend()
    if classes <= 20:
        assert legend is not None and ax.get_xlabel() == "ACC 9"
        assert [text.get_text() for text in legend.get_texts()] == ["zero", *(str(7 * n) for n in range(1, classes))]
    else:
        assert legend is None and f"{classes} classes" in ax.get_xlabel()


def test_embeddings_of_nothing(drawn: list[Figure]) -> None:
    plot_embedding(NOWHERE, np.full((4, 2), math.nan), np.arange(4))
    plot_embedding(NOWHERE, np.empty((0, 2)), np.empty(0, dtype=np.int64))


def test_bars_whiskers_and_differences(drawn: list[Figure]) -> None:
    rows = comparison_rows()
    rows.append({"model": "model 0", "metric": "cluster_acc", "value": 79.0, "mean": 71.5, "std": 5.0, "runs": 100})
    plot_comparison(NOWHERE, rows, "model 0")
    knn, shots, silhouette, davies, cluster = drawn[0].axes
    assert widths(knn) == [90.0, 91.0, 92.0] and texts(knn) == ["90.0", "91.0  (+1.0)", "92.0  (+2.0)"]
    assert widths(silhouette) == [-3.0, 2.0, 7.0]
    assert texts(davies) == ["2.00", "1.70  (-0.30)", "1.40  (-0.60)"] and "lower is better" in davies.get_title("left")
    assert whiskers(shots) == [[56.0, 64.0]] * 3
    # The spread of clustering runs is not centred on the best run, which the bar shows.
    assert widths(cluster) == [79.0, 0.0, 0.0] and texts(cluster)[1:] == ["-", "-"]
    assert whiskers(cluster) == []


def test_bars_without_a_base_and_of_many_models(drawn: list[Figure]) -> None:
    rows = comparison_rows()
    rows[0] = {**rows[0], "value": math.nan}
    plot_comparison(NOWHERE, rows, "model 0")
    assert texts(drawn[0].axes[0]) == ["-", "91.0", "92.0"]
    plot_comparison(NOWHERE, comparison_rows(12), "another")
    colors = [to_hex(bar.get_facecolor()) for bar in drawn[1].axes[0].patches]
    assert len(set(colors)) == 8 and figures.BASE.lower() not in colors
    plot_comparison(NOWHERE, [{"model": "a", "metric": "knn_top1", "value": 0.0}], "a")
