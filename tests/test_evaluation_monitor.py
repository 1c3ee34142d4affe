"""The check during training: its statistics against numpy, its subsets, and when it warns."""

import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mimref.config.base import DataConfig
from mimref.config.run import EvaluateConfig, MonitorConfig, RunConfig
from mimref.data.open import open_source
from mimref.data.sources import ArraySource, ImageSource, Split, fixed_subset
from mimref.data.transforms import EvalTransform
from mimref.distributed.group import own_rank
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.errors import DataError
from mimref.evaluation import monitor as evaluation_monitor
from mimref.evaluation.assess.measures import MEASURES, crop_measures
from mimref.evaluation.blocks.statistics import feature_statistics
from mimref.evaluation.knn.protocol import knn_accuracy
from mimref.evaluation.monitor import CollapseWatch, KnnMonitor
from mimref.features.encode import Column, PassSettings, extract
from tests.tiny import write_images, write_labelled, write_unlabelled

CPU = torch.device("cpu")
TRANSFORM = EvalTransform(16)
UNLABELLED = {"feature_variance", *MEASURES}


def encoder() -> Encoder:
    torch.manual_seed(0)
    built = build_encoder(Architecture("custom", 16, width=32, depth=2, num_heads=2, patch_size=8))
    for parameter in built.parameters():
        parameter.data.normal_(std=0.2)
    return built


def monitor(
    spec: Path | str,
    *,
    knn_samples: int = 10_000,
    view_samples: int = 1000,
    k: int = 10,
    tau: float = 0.07,
    note: Callable[[str], None] = pytest.fail,
    **data: Any,
) -> KnnMonitor:
    config = RunConfig(
        data=DataConfig(spec=str(spec), **data),
        monitor=MonitorConfig(knn_samples=knn_samples, view_samples=view_samples),
        evaluate=EvaluateConfig(knn_k=k, knn_tau=tau),
        workers=0,
    )
    return KnnMonitor(config, open_source(config.data, "train"), TRANSFORM, CPU, torch.float32, note=note)


def test_labelled_folders(tmp_path: Path) -> None:
    watched = monitor(write_labelled(tmp_path), k=5)
    model = encoder()
    values = watched.check(model)
    last, settings = Column(2, "cls"), PassSettings(TRANSFORM, CPU)
    train, test = (extract(model, source, settings, [last]) for source in (watched.train, watched.test) if source)
    assert (len(train), len(test)) == (48, 16)
    assert train.y is not None and test.y is not None
    x = train.columns[last][:]
    expected = knn_accuracy(x, train.y, test.columns[last], test.y, k=5)
    assert watched.train.rows.tolist() == list(range(48))
    assert values == {
        "feature_variance": pytest.approx(x.var(axis=0, dtype=np.float64).mean(), rel=1e-9),
        **crop_measures(x),
        **watched.view_measures(model, [[last]], 48)[0],
        "knn_top1": expected,
    }
    assert values["effective_rank"] == feature_statistics(x).effective_rank


def test_unlabelled_and_split_less_folders(tmp_path: Path) -> None:
    for folder in (write_unlabelled(tmp_path / "plain"), write_images(tmp_path / "classes", per_class=6)):
        watched = monitor(folder)
        assert watched.test is None
        assert set(watched.check(encoder())) == UNLABELLED
    only_train = write_images(tmp_path / "half", per_class=6, split="train")
    assert set(monitor(only_train).check(encoder())) == UNLABELLED
    plain = monitor(only_train, view_samples=0).check(encoder())
    assert set(plain) == UNLABELLED - {"lidar", "neighbour_consistency", "view_retrieval"}


def test_the_training_images_are_those_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(spec=str(write_labelled(tmp_path)), train_limit=10)
    train, splits = open_source(data, "train"), []

    def opened(data: DataConfig, split: Split, **options: Any) -> ImageSource:
        splits.append(split)
        return open_source(data, split, **options)

    monkeypatch.setattr(evaluation_monitor, "open_source", opened)
    watched = KnnMonitor(RunConfig(data=data), train, TRANSFORM, CPU, torch.float32, note=pytest.fail)
    assert watched.train.source is train and splits == ["val"]


def test_damaged_validation_images_are_reported(tmp_path: Path) -> None:
    notes: list[str] = []
    root = write_labelled(tmp_path / "other classes")
    (root / "val/b").rename(root / "val/c")
    table = tmp_path / "half.csv"
    rows = [f"{split}/{name}/000.png,{label},{split}" for split in ("train", "val") for name, label in ("aa", "bb")]
    table.write_text("path,label,split\n" + "\n".join(rows) + "\nval/a/001.png,,val\n")
    for name in ("train/a/000.png", "val/a/000.png", "a", "c"):  # tables that list missing files are refused
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    unlabelled = tmp_path / "unlabelled.csv"
    unlabelled.write_text("path,label,split\na,x,train\nb,y,train\nc,,val\n")
    for spec in (root, f"list:{table}", f"list:{unlabelled}"):
        assert monitor(spec, note=notes.append).test is None
    beginning = "no k-NN on the validation images: "
    assert notes == [
        f"{beginning}--data {root}: class 'c' of val/ is not in train/; both need the same class folders",
        f"{beginning}--data list:{table}: row 5 has no label, although others of its split have; fill it in or drop "
        "the row",
        f"{beginning}the validation images have no labels",
    ]


def test_no_note_without_a_validation_split(tmp_path: Path) -> None:
    table = tmp_path / "train.csv"
    (tmp_path / "a").touch()
    table.write_text("path,label,split\na,x,train\nb,y,train\n")
    flat = tmp_path / "flat.csv"
    flat.write_text("path,label\na,x\nb,y\n")
    halves = write_images(tmp_path / "half", per_class=6, split="train")
    plain = write_images(tmp_path / "classes", per_class=6)
    (tmp_path / "shards/train").mkdir(parents=True)
    (tmp_path / "label").write_text("x")
    with tarfile.open(tmp_path / "shards/train/0.tar", "w") as shard:
        shard.add(plain / "a/000.png", "0.png")
        shard.add(tmp_path / "label", "0.cls")
    for spec in (f"list:{table}", f"list:{flat}", f"wds:{tmp_path}/shards", halves, plain):
        assert monitor(spec).test is None  # a note would fail the test
        assert monitor(spec, train_limit=1).test is None


def noise(count: int, labels: np.ndarray[Any, Any] | None) -> ArraySource:
    images = np.arange(count, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    return ArraySource("noise", images, labels, None, "train", np.arange(count))


def test_subsets_meet_every_class() -> None:
    # Labels repeat every ten images, as in scikit-learn's digits: every tenth image would be of the same class.
    subset = fixed_subset(noise(100, np.arange(100) % 10), 20)
    assert subset.labels is not None
    assert np.bincount(subset.labels).tolist() == [2] * 10 and len(subset) == 20
    assert [int(subset.read(at)[0, 0, 0]) for at in range(20)] == subset.rows.tolist()
    # Labels sorted by class, with a rare class.
    rare = fixed_subset(noise(100, np.array([0] * 90 + [1] * 9 + [2])), 12)
    assert rare.labels is not None and np.bincount(rare.labels).tolist() == [6, 5, 1]
    whole = fixed_subset(noise(100, None), 1000)
    assert whole.rows.tolist() == list(range(100)) and whole.labels is None
    assert fixed_subset(noise(100, None), 30).rows.tolist() == list(range(0, 100, 4))


def test_more_classes_than_the_subset_holds(tmp_path: Path) -> None:
    names = [f"class{number:02}" for number in range(12)]
    for split in ("train", "val"):
        write_images(tmp_path, per_class=2, classes=names, split=split)
    # 6 classes in memory, 2 images to classify.
    assert "knn_top1" in monitor(tmp_path, knn_samples=6, k=3).check(encoder())
    # With a single class in memory, the score would be meaningless.
    assert "knn_top1" not in monitor(tmp_path, knn_samples=1).check(encoder())


def test_neighbours_vote_with_the_temperature_of_the_settings(tmp_path: Path) -> None:
    x, y = np.array([[1, 0], [0.9, 0.4], [0.9, -0.4]], np.float32), np.array([0, 1, 1])
    for tau, expected in ((0.01, 100), (10.0, 0)):  # the nearest neighbour decides, or the majority
        watched = monitor(write_labelled(tmp_path / f"{tau}"), k=3, tau=tau)
        assert watched.knn_top1(x, y, x[:1], y[:1]) == expected


def test_unknown_classes_are_left_out(tmp_path: Path) -> None:
    watched = monitor(write_labelled(tmp_path))
    x = np.eye(4, dtype=np.float32)
    train = x[:2], np.array([0, 1])
    assert watched.knn_top1(*train, x[[0, 1, 2]], np.array([0, 1, 7])) == 100
    assert math.isnan(watched.knn_top1(*train, x[:1], np.array([7])))


def test_features_that_are_not_finite(tmp_path: Path) -> None:
    broken = encoder()
    torch.nn.init.constant_(broken.vit.get_parameter("blocks.0.mlp.fc2.bias"), math.nan)
    with pytest.raises(DataError, match=r"features of image 0 .* are not finite"):
        monitor(write_unlabelled(tmp_path)).check(broken)


START = {"knn_top1": 90.0, "correlation_rank": 14.0, "neighbour_consistency": 9.0, "feature_variance": 3.0}


@pytest.mark.parametrize(
    ("now", "named"),
    [
        ({}, []),
        ({"knn_top1": 72.1, "correlation_rank": 7.1, "neighbour_consistency": 4.6}, []),
        ({"knn_top1": 71.9}, ["knn_top1 fell from 90 to 71.9"]),
        ({"correlation_rank": 6.9}, ["correlation_rank fell from 14 to 6.9"]),
        ({"neighbour_consistency": 4.4}, ["neighbour_consistency fell from 9 to 4.4"]),
        (
            {"knn_top1": 10.0, "correlation_rank": 1.0},
            ["knn_top1 fell from 90 to 10 and correlation_rank fell from 14 to 1"],
        ),
        # The scale of features is arbitrary: a healthy run may shrink them, and a collapse may enlarge them.
        ({"feature_variance": 0.01}, []),
        ({"feature_variance": 300.0, "correlation_rank": 1.8}, ["correlation_rank fell from 14 to 1.8"]),
    ],
)
def test_collapse_warnings(now: dict[str, float], named: list[str]) -> None:
    warning = CollapseWatch(START).warning({**START, **now})
    if not named:
        assert warning is None
        return
    assert warning is not None and "\n" not in warning
    assert all(part in warning for part in named)
    assert "lower encoder_stage.lr" in warning


def test_runs_without_labels_are_watched() -> None:
    unlabelled = {name: value for name, value in START.items() if name != "knn_top1"}
    watch = CollapseWatch(unlabelled)
    assert watch.warning(unlabelled) is None
    assert watch.warning({**unlabelled, "correlation_rank": 2.0}) is not None
    # A state saved before the measures existed.
    assert CollapseWatch({"feature_variance": 1.0}).warning(unlabelled) is None


def check_on_rank(folder: Path) -> tuple[dict[str, float], list[str]]:
    """Check results and notes of a rank whose machine has its own validation images; see test_evaluation_ranks."""
    notes: list[str] = []
    return monitor(f"{folder}/{own_rank()}", k=5, note=notes.append).check(encoder()), notes
