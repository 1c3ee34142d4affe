"""exhibits.json of training runs and evaluations: written with the results, and never at their expense."""

from pathlib import Path

import pytest

from mimref.config.base import DataConfig
from mimref.evaluation.blocks.config import BlocksConfig
from mimref.evaluation.blocks.protocol import evaluate_blocks
from mimref.evaluation.cluster.config import ClusterConfig
from mimref.evaluation.cluster.protocol import evaluate_cluster
from mimref.evaluation.compare import compare_encoders
from mimref.evaluation.config import CompareConfig
from mimref.evaluation.exhibits import numbering
from mimref.evaluation.exhibits.contents import Exhibits
from mimref.pretraining.run import pretrain
from mimref.refinement.run import refine
from tests.tiny import (
    EVALUATED,
    Killed,
    Watcher,
    assert_same_run,
    kill_at,
    pretrain_config,
    refine_config,
    write_labelled,
    write_unlabelled,
    write_weights,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_unlabelled(tmp_path_factory.mktemp("unlabelled"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "base.safetensors")


def read(folder: Path) -> Exhibits:
    found = Exhibits.read(folder)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def refined(weights: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("refined") / "run"
    refine(refine_config(weights, data, **EVALUATED), out)
    return out


def test_a_refinement_shows_base_and_refined(refined: Path) -> None:
    shown = read(refined)
    assert len(shown.images) == len(shown.map_images) == 16
    assert shown.maps.keys() == shown.confusions.keys() == shown.clusters.keys() == {"base", "refined"}
    assert {image.label for image in shown.images} == {"a", "b"}
    assert all("val" in image.path for image in shown.images)
    assert [len(shown.clusters[name]) for name in shown.clusters] == [2, 2]
    assert any("2 k-means runs" in note for note in shown.notes)


def test_exhibits_change_no_results(refined: Path, weights: Path, data: Path, tmp_path: Path) -> None:
    refine(refine_config(weights, data, **EVALUATED, evaluate__exhibits=False), tmp_path / "without")
    assert_same_run(tmp_path / "without", refined)
    assert not (tmp_path / "without" / "exhibits.json").exists()


def test_a_resumed_run_may_leave_them_out_or_add_them(weights: Path, data: Path, tmp_path: Path) -> None:
    off = refine_config(weights, data, **EVALUATED, evaluate__exhibits=False)
    with pytest.raises(Killed):
        refine(off, tmp_path, listener=kill_at("features of refined", 16))
    refine(refine_config(weights, data, **EVALUATED), tmp_path, resume=True)
    assert len(read(tmp_path).images) == 16
    refine(off, tmp_path, force=True)
    assert not (tmp_path / "exhibits.json").exists()


def test_a_refinement_without_labels_shows_training_images(weights: Path, unlabelled: Path, tmp_path: Path) -> None:
    refine(refine_config(weights, unlabelled, **EVALUATED), tmp_path)
    shown = read(tmp_path)
    assert len(shown.images) == 48 and shown.confusions == {}
    assert shown.maps.keys() == shown.clusters.keys() == {"base", "refined"}
    assert shown.clusters["base"][0].label is None


@pytest.mark.parametrize("labelled", [True, False])
def test_a_failure_costs_no_run(
    weights: Path, data: Path, unlabelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labelled: bool
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(numbering, "arrange", fail)
    told = Watcher()
    result = refine(refine_config(weights, data if labelled else unlabelled, **EVALUATED), tmp_path, listener=told)
    assert any(row["metric"] == "knn_top1" for row in result.rows) == labelled and result.rows
    assert (tmp_path / "results.json").exists() and not (tmp_path / "exhibits.json").exists()
    assert [warning for warning in told.warnings if "no room" in warning]


def test_a_pretraining_shows_pixels_and_encoder(data: Path, unlabelled: Path, tmp_path: Path) -> None:
    pretrain(pretrain_config(data, mae__epochs=1), tmp_path / "labelled")
    shown = read(tmp_path / "labelled")
    assert shown.maps.keys() == shown.confusions.keys() == {"raw pixels", "encoder"}
    assert len(shown.images) == 16
    pretrain(pretrain_config(unlabelled, mae__epochs=1), tmp_path / "unlabelled")
    shown = read(tmp_path / "unlabelled")
    assert shown.confusions == {} and len(shown.images) == 48
    pretrain(pretrain_config(data, mae__epochs=1, evaluate__exhibits=False), tmp_path / "without")
    assert not (tmp_path / "without" / "exhibits.json").exists()


def test_evaluations_show_images_when_asked(weights: Path, data: Path, unlabelled: Path, tmp_path: Path) -> None:
    other = write_weights(tmp_path / "other.safetensors", seed=1)
    common = {"data": DataConfig(spec=str(data)), "device": "cpu", "workers": 0}
    compare = CompareConfig(base=str(weights), refined=[str(other)], protocols=["knn", "cluster"], runs=2, **common)
    shown = compare_encoders(compare, exhibits=True).exhibits
    assert shown is not None and shown.maps.keys() == {"base.safetensors", "other.safetensors"}
    assert compare_encoders(compare).exhibits is None
    cluster = ClusterConfig(checkpoint=str(weights), runs=2, blocks="all", split="train", **common)
    shown = evaluate_cluster(cluster, exhibits=True)[0].exhibits
    assert shown is not None and shown.maps.keys() == {"base.safetensors"} and len(shown.images) == 48
    assert evaluate_cluster(cluster)[0].exhibits is None
    found = evaluate_blocks(BlocksConfig(checkpoints=[str(weights)], k=5, **common), exhibits=True)
    scores = [float(row["value"]) for row in found.rows if row["metric"] == "block_knn_top1"]
    blocks = sorted({1 + scores.index(max(scores)), 4})
    assert found.exhibits is not None
    assert list(found.exhibits.maps) == [f"base.safetensors, block {block}" for block in blocks]
    common["data"] = DataConfig(spec=str(unlabelled))
    found = evaluate_blocks(BlocksConfig(checkpoints=[str(weights)], **common), exhibits=True)
    assert found.exhibits is not None and list(found.exhibits.maps) == ["base.safetensors, block 4"]
