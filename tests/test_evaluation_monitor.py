"""The check during training: its statistics against numpy, its subsets, and when it warns."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mimref.config import DataConfig, EvaluateConfig, MonitorConfig, RunConfig
from mimref.data.sources import ArraySource
from mimref.data.transforms import EvalTransform
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.errors import DataError
from mimref.evaluation.blocks import feature_statistics
from mimref.evaluation.knn import knn_accuracy
from mimref.evaluation.monitor import CollapseWatch, KnnMonitor, _subset
from mimref.features.extract import Features, extract
from tests.tiny import write_images, write_labelled, write_unlabelled

CPU = torch.device("cpu")
TRANSFORM = EvalTransform(16)


def encoder() -> Encoder:
    torch.manual_seed(0)
    built = build_encoder(Architecture("custom", 16, width=32, depth=2, num_heads=2, patch_size=8))
    for parameter in built.parameters():
        parameter.data.normal_(std=0.2)
    return built


def monitor(spec: Path | str, *, knn_samples: int = 10_000, k: int = 10, **data: Any) -> KnnMonitor:
    config = RunConfig(
        data=DataConfig(spec=str(spec), **data),
        monitor=MonitorConfig(knn_samples=knn_samples),
        evaluate=EvaluateConfig(knn_k=k),
        workers=0,
    )
    return KnnMonitor(config, TRANSFORM, CPU, torch.float32)


def test_labelled_folders(tmp_path: Path) -> None:
    watched = monitor(write_labelled(tmp_path), k=5)
    model = encoder()
    values = watched.check(model)
    train, test = (
        extract(model, source, TRANSFORM, blocks=[2], device=CPU) for source in (watched.train, watched.test) if source
    )
    assert (len(train.x), len(test.x)) == (48, 16)
    assert train.y is not None and test.y is not None
    expected = knn_accuracy(train.x[:, 0], train.y, test.x[:, 0], test.y, k=5)
    assert values == {
        "feature_variance": pytest.approx(train.x[:, 0].var(axis=0, dtype=np.float64).mean(), rel=1e-9),
        "effective_rank": feature_statistics(train.x[:, 0]).effective_rank,
        "knn_top1": expected,
    }


def test_unlabelled_and_split_less_folders(tmp_path: Path) -> None:
    for folder in (write_unlabelled(tmp_path / "plain"), write_images(tmp_path / "classes", per_class=6)):
        watched = monitor(folder)
        assert watched.test is None
        assert set(watched.check(encoder())) == {"feature_variance", "effective_rank"}
    only_train = write_images(tmp_path / "half", per_class=6, split="train")
    assert set(monitor(only_train).check(encoder())) == {"feature_variance", "effective_rank"}


def noise(count: int, labels: np.ndarray[Any, Any] | None) -> ArraySource:
    images = np.arange(count, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    return ArraySource("noise", images, labels, None, "train", np.arange(count))


def test_subsets_meet_every_class() -> None:
    # In turns of ten, as scikit-learn's digits come: every tenth image would be of one class.
    subset = _subset(noise(100, np.arange(100) % 10), 20)
    assert subset.labels is not None
    assert np.bincount(subset.labels).tolist() == [2] * 10 and len(subset) == 20
    assert [int(subset.read(at)[0, 0, 0]) for at in range(20)] == subset.rows.tolist()
    # Sorted by class, with a rare one.
    rare = _subset(noise(100, np.array([0] * 90 + [1] * 9 + [2])), 12)
    assert rare.labels is not None and np.bincount(rare.labels).tolist() == [6, 5, 1]
    whole = _subset(noise(100, None), 1000)
    assert whole.rows.tolist() == list(range(100)) and whole.labels is None
    assert _subset(noise(100, None), 30).rows.tolist() == list(range(0, 100, 4))


def test_more_classes_than_the_subset_holds(tmp_path: Path) -> None:
    names = [f"class{number:02}" for number in range(12)]
    for split in ("train", "val"):
        write_images(tmp_path, per_class=2, classes=names, split=split)
    # 6 classes in memory, 2 images to classify.
    assert "knn_top1" in monitor(tmp_path, knn_samples=6, k=3).check(encoder())
    # A single class in memory tells nothing.
    assert "knn_top1" not in monitor(tmp_path, knn_samples=1).check(encoder())


def test_unknown_classes_are_left_out(tmp_path: Path) -> None:
    watched = monitor(write_labelled(tmp_path))
    x = np.eye(4, dtype=np.float32)[:, None]
    train = Features(x[:2], np.array([0, 1]), np.arange(2))
    test = Features(x[[0, 1, 2]], np.array([0, 1, 7]), np.arange(3))
    assert watched.knn_top1(train, test, 0) == 100
    assert math.isnan(watched.knn_top1(train, Features(x[:1], np.array([7]), np.arange(1)), 0))
    with pytest.raises(DataError, match="labels are needed"):
        watched.knn_top1(train, Features(x, None, np.arange(4)), 0)


def test_features_that_are_not_finite(tmp_path: Path) -> None:
    broken = encoder()
    torch.nn.init.constant_(broken.vit.get_parameter("blocks.0.mlp.fc2.bias"), math.nan)
    with pytest.raises(DataError, match=r"features of image 0 .* are not finite"):
        monitor(write_unlabelled(tmp_path)).check(broken)


@pytest.mark.parametrize(
    ("now", "named"),
    [
        ({"knn_top1": 90.0, "feature_variance": 1.0}, []),
        ({"knn_top1": 72.1, "feature_variance": 0.11}, []),
        ({"knn_top1": 71.9, "feature_variance": 1.0}, ["knn_top1 fell from 90 to 71.9"]),
        ({"knn_top1": 90.0, "feature_variance": 0.09}, ["feature_variance fell from 1 to 0.09"]),
        (
            {"knn_top1": 10.0, "feature_variance": 0.0},
            ["knn_top1 fell from 90 to 10 and feature_variance fell from 1 to 0"],
        ),
        ({"feature_variance": 0.0}, ["feature_variance fell from 1 to 0"]),
    ],
)
def test_collapse_warnings(now: dict[str, float], named: list[str]) -> None:
    warning = CollapseWatch({"knn_top1": 90.0, "feature_variance": 1.0, "effective_rank": 9.0}).warning(now)
    if not named:
        assert warning is None
        return
    assert warning is not None and "\n" not in warning
    assert all(part in warning for part in named)
    assert "lower encoder_stage.lr" in warning


def test_unlabelled_runs_watch_the_variance() -> None:
    watch = CollapseWatch({"feature_variance": 1.0})
    assert watch.warning({"feature_variance": 0.5}) is None
    assert watch.warning({"feature_variance": 0.01}) is not None
