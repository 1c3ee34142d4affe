"""Rows of the before/after table."""

from pathlib import Path

import pytest
import torch

from mimref.config.base import DataConfig
from mimref.config.run import EvaluateConfig, RunConfig
from mimref.data.transforms import EvalTransform
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.errors import DataError
from mimref.evaluation.compare import before_after, labelled_splits, lost_accuracy
from mimref.evaluation.knn.protocol import knn
from mimref.features.encode import PIXELS, Column, PassSettings, extract, raw_pixels
from mimref.results import Row
from tests.tiny import write_images, write_unlabelled

METRICS = ["knn_top1", "knn_top5", "lowshot_top1", "cluster_acc", "cluster_nmi"]
SETTINGS = PassSettings(EvalTransform(8, 1.0), torch.device("cpu"))


def table(data: DataConfig, encoders: dict[str, Encoder] | None = None, told: list[str] | None = None) -> list[Row]:
    config = RunConfig(evaluate=EvaluateConfig(splits=2, cluster_runs=2), data=data, device="cpu")
    labels = [] if told is None else told
    images, models = labelled_splits(data), (encoders or {}).items()
    return before_after(config, images, models, SETTINGS, lambda label, done, total: labels.append(label))[0]


def test_rows_on_the_digits() -> None:
    told: list[str] = []
    torch.manual_seed(0)
    encoder = build_encoder(Architecture("custom", 8, width=16, depth=2, num_heads=2, patch_size=4))
    data = DataConfig(spec="digits", train_limit=200)
    rows = table(data, {"base": encoder}, told)
    assert [(row["model"], row["metric"]) for row in rows] == [
        (model, metric) for model in ("raw pixels", "base") for metric in METRICS
    ]
    for row in rows:
        assert 0 <= float(row["value"]) <= 100
        assert "split" not in row
        where = (row.get("blocks"), row.get("pool"))
        assert where == (("last", "cls") if row["model"] == "base" else (None, None))
    assert list(rows[5]) == ["model", "metric", "value", "k", "tau", "blocks", "pool"]
    assert (rows[0]["k"], rows[0]["tau"]) == (10, 0.07)
    assert rows[2]["shots"] == 1 and "std" in rows[2]
    assert {"features of base", "low-shot of raw pixels", "k-means of base"} <= set(told)
    last = Column(2, "cls")
    pixels = [raw_pixels(source, SETTINGS) for source in labelled_splits(data)]
    encoded = [extract(encoder, source, SETTINGS, [last]) for source in labelled_splits(data)]
    for row, (train, test), column in ((rows[0], pixels, PIXELS), (rows[5], encoded, last)):
        assert train.y is not None and test.y is not None
        assert row["value"] == knn(train.columns[column], train.y, test.columns[column], test.y)[0]["value"]


def test_few_training_images_lower_k(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path, per_class=3, split=split)
    rows = table(DataConfig(spec=str(tmp_path)))
    assert [row["metric"] for row in rows] == ["knn_top1", "lowshot_top1", "cluster_acc", "cluster_nmi"]
    assert rows[0]["k"] == 6


def test_data_that_cannot_be_scored(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no labels"):
        labelled_splits(DataConfig(spec=str(write_unlabelled(tmp_path / "plain"))))
    with pytest.raises(DataError, match="no val/ or test/"):
        labelled_splits(DataConfig(spec=str(write_images(tmp_path / "half", per_class=2, split="train"))))
    many = tmp_path / "many"
    for split in ("train", "val"):
        write_images(many, per_class=2, classes=("a", "b", "c"), split=split)
    with pytest.raises(DataError, match="class c has no training image"):
        labelled_splits(DataConfig(spec=str(many), train_limit=2))


@pytest.mark.parametrize(
    ("base", "refined", "images", "warns"),
    [
        # Twice the standard error, sqrt(0.67 * 0.33 / 180), is 7.0 points.
        (67.2, 56.1, 180, True),
        (67.2, 61.1, 180, False),
        (67.2, 66.0, 10_000, True),
        (67.2, 70.0, 10_000, False),
        (100.0, 95.0, 20, False),
        (100.0, 0.0, 3, False),
    ],
)
def test_a_fall_that_chance_does_not_explain(base: float, refined: float, images: int, warns: bool) -> None:
    rows: list[Row] = [
        {"model": model, "metric": "knn_top1", "value": value}
        for model, value in (("raw pixels", 99.0), ("base", base), ("refined", refined))
    ]
    found = lost_accuracy(rows, images)
    assert (found is not None) == warns
    assert found is None or f"k-NN fell from {base:.1f} to {refined:.1f}" in found
    assert lost_accuracy(rows[:2], images) is None
