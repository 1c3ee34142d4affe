"""The before/after table's rows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mimref.config.base import DataConfig
from mimref.config.run import EvaluateConfig
from mimref.data.transforms import EvalTransform
from mimref.encoders.vit import Architecture, build_encoder
from mimref.errors import DataError
from mimref.evaluation.knn.protocol import knn
from mimref.evaluation.summary import Summary, compared
from mimref.features.encode import extract, raw_pixels
from tests.tiny import write_images, write_unlabelled

METRICS = ["knn_top1", "knn_top5", "lowshot_top1", "cluster_acc", "cluster_nmi"]


def summary(data: DataConfig, told: list[str] | None = None) -> Summary:
    return Summary(
        EvaluateConfig(splits=2, cluster_runs=2),
        data,
        EvalTransform(8, 1.0),
        seed=0,
        workers=0,
        device=torch.device("cpu"),
        precision=torch.float32,
        progress=lambda label, done, total: None if told is None else told.append(label),
    )


def test_rows_on_the_digits() -> None:
    told: list[str] = []
    made = summary(DataConfig(spec="digits", train_limit=200), told)
    torch.manual_seed(0)
    encoder = build_encoder(Architecture("custom", 8, width=16, depth=2, num_heads=2, patch_size=4))
    rows = made.raw_pixels() + made.encoder("base", encoder)
    assert [(row["model"], row["metric"]) for row in rows] == [
        (model, metric) for model in ("raw pixels", "base") for metric in METRICS
    ]
    for row in rows:
        assert 0 <= float(row["value"]) <= 100
        assert "split" not in row
        where = (row.get("blocks"), row.get("pool"))
        assert where == (("last", "cls") if row["model"] == "base" else (None, None))
    assert (rows[0]["k"], rows[0]["tau"]) == (10, 0.07)
    assert rows[2]["shots"] == 1 and "std" in rows[2]
    assert {"features of base", "low-shot of raw pixels", "k-means of base"} <= set(told)

    def accuracy(features: list[tuple[np.ndarray, np.ndarray]]) -> object:  # type: ignore[type-arg]
        (train_x, train_y), (test_x, test_y) = features
        return knn(train_x, train_y, test_x, test_y)[0]["value"]

    sources, transform = (made.train, made.test), EvalTransform(8, 1.0)
    pixels = [(found.x[:, 0], found.y) for found in (raw_pixels(source, transform) for source in sources)]
    last = [
        (found.x[:, 0], found.y)
        for found in (extract(encoder, source, transform, blocks=[2], device=torch.device("cpu")) for source in sources)
    ]
    assert rows[0]["value"] == accuracy(pixels)  # type: ignore[arg-type]
    assert rows[5]["value"] == accuracy(last)  # type: ignore[arg-type]
    assert compared(rows, "knn_top1", "base") == rows[5]["value"]
    assert np.isnan(compared(rows, "knn_top1", "refined"))


def test_few_training_images_lower_k(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path, per_class=3, split=split)
    rows = summary(DataConfig(spec=str(tmp_path))).raw_pixels()
    assert [row["metric"] for row in rows] == ["knn_top1", "lowshot_top1", "cluster_acc", "cluster_nmi"]
    assert rows[0]["k"] == 6


def test_data_that_cannot_be_scored(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no labels"):
        summary(DataConfig(spec=str(write_unlabelled(tmp_path / "plain"))))
    with pytest.raises(DataError, match="no val/ or test/"):
        summary(DataConfig(spec=str(write_images(tmp_path / "half", per_class=2, split="train"))))
    many = tmp_path / "many"
    for split in ("train", "val"):
        write_images(many, per_class=2, classes=("a", "b", "c"), split=split)
    with pytest.raises(DataError, match="class 2 has no training image"):
        summary(DataConfig(spec=str(many), train_limit=2))
