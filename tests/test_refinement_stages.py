"""What stages hand over, which images a run leaves out, and how it stops when training breaks."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mimref.data.transforms import EvalTransform
from mimref.encoders.checkpoints import save_encoder
from mimref.encoders.vit import build_encoder
from mimref.errors import CheckpointError, ConfigError, DataError, DivergenceError, Interrupted
from mimref.evaluation.assess.measures import MEASURES
from mimref.progress import Silent
from mimref.refinement.config import RefineConfig
from mimref.refinement.method import Method, StepValues
from mimref.refinement.plan import make_plan
from mimref.refinement.run import build_method, refine
from mimref.refinement.stages import RefinementStage
from mimref.results import Row
from tests.tiny import (
    ARCHITECTURE,
    EVALUATED,
    Watcher,
    assert_same_run,
    header,
    refine_config,
    results,
    saved_step,
    signal_at,
    tensors,
    write_images,
    write_labelled,
    write_unlabelled,
    write_weights,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_unlabelled(tmp_path_factory.mktemp("unlabelled"))


@pytest.fixture(scope="module")
def config(weights: Path, data: Path) -> RefineConfig:
    return refine_config(weights, data, **EVALUATED)


@pytest.fixture(scope="module")
def whole(config: RefineConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    refine(config, out)
    return out


# --- handing over stage 1


@pytest.fixture(scope="module")
def stage_1(weights: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stage_1")
    refine(refine_config(weights, data, stage="heads"), out)
    return out


def test_heads_from_equals_a_run_with_both_stages(
    stage_1: Path, whole: Path, weights: Path, data: Path, tmp_path: Path
) -> None:
    config = refine_config(weights, data, stage="encoder", heads_from=str(stage_1))
    refine(config, tmp_path / "a")
    assert all(torch.equal(tensor, tensors(whole)[key]) for key, tensor in tensors(tmp_path / "a").items())
    # Another stage 2 on the same heads; and heads.pt is no longer needed once the run has a state of its own.
    refine(
        refine_config(weights, data, stage="encoder", heads_from=str(stage_1), encoder_stage__lr=1e-3), tmp_path / "b"
    )
    copied = tmp_path / "copy"
    copied.mkdir()
    (copied / "heads.pt").write_bytes((stage_1 / "heads.pt").read_bytes())
    config = refine_config(weights, data, stage="encoder", heads_from=str(copied))
    with pytest.raises(Interrupted):
        refine(config, tmp_path / "c", listener=signal_at(8 + 6))
    (copied / "heads.pt").unlink()
    refine(config, tmp_path / "c", resume=True)
    assert_same_run(tmp_path / "c", tmp_path / "a")


def test_heads_that_do_not_fit_are_refused(stage_1: Path, weights: Path, data: Path, tmp_path: Path) -> None:
    def attempt(base: Path = weights, folder: Path = stage_1, **changes: Any) -> None:
        refine(refine_config(base, data, stage="encoder", heads_from=str(folder), **changes), tmp_path / "out")

    other = write_weights(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(CheckpointError, match=r"trained on another encoder than .*other\.safetensors"):
        attempt(base=other)
    with pytest.raises(ConfigError, match=r"blocks 3,4.*heads\.blocks=3,4"):
        attempt(heads__blocks="2-4")
    with pytest.raises(ConfigError, match=r"its queue holds 24 rows; set heads\.queue_size=24"):
        attempt(heads__queue_size=32)
    with pytest.raises(ConfigError, match=r"widths .*heads\.output 12"):
        attempt(heads__output=12)
    with pytest.raises(ConfigError, match=r"read 'cls' tokens; set heads\.pool=cls"):
        attempt(heads__pool="mean")
    with pytest.raises(ConfigError, match=r"batch norm.* heads\.norm=batch"):
        attempt(heads__norm="layer")
    with pytest.raises(CheckpointError, match=r"nowhere: no such file; --heads-from needs"):
        attempt(folder=tmp_path / "nowhere")
    (tmp_path / "heads.pt").write_bytes(b"not heads")
    with pytest.raises(CheckpointError, match="cannot be read"):
        attempt(folder=tmp_path)
    torch.save([1, 2], tmp_path / "heads.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        attempt(folder=tmp_path)
    assert not (tmp_path / "out").exists()


def test_heads_from_other_images_forget_whose_rows_the_queue_holds(
    stage_1: Path, weights: Path, tmp_path: Path
) -> None:
    fewer = write_images(tmp_path / "data", per_class=13)
    watcher = Watcher()
    config = refine_config(weights, fewer, stage="encoder", heads_from=str(stage_1))
    refine(config, tmp_path / "out", listener=watcher)
    assert any("its queue was filled from other images" in warning for warning in watcher.warnings)


def test_a_run_resumed_with_other_images_forgets_whose_rows_the_queue_holds(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, resume, found = write_labelled(tmp_path / "data"), RefinementStage.resume, list[bool]()

    def watched(stage: RefinementStage, state: dict[str, Any]) -> None:
        resume(stage, state)
        found.append(bool((stage.method.queue.sample_Q < 0).all()))

    monkeypatch.setattr(RefinementStage, "resume", watched)
    config = refine_config(weights, data)
    for step in (4, 5, 6):
        if step == 6:
            (data / "train" / "a" / "000.png").rename(data / "train" / "a" / "new.png")
        with pytest.raises(Interrupted):
            refine(config, tmp_path / "out", resume=step > 4, listener=signal_at(step))
    assert found == [False, True]


def test_a_sweep_of_temperatures_is_one_run_with_a_ranking(weights: Path, data: Path, tmp_path: Path) -> None:
    sweep = {"stage": "heads", "heads__blocks": "4,4,4", "heads__temperature": [0.1, 0.2, 0.3]}
    result = refine(refine_config(weights, data, **sweep), tmp_path)
    rows = [row for row in result.rows if row["metric"] == "head_knn_top1"]
    assert {row["head"]: row["temperature"] for row in rows} == {1: 0.1, 2: 0.2, 3: 0.3}
    assert [row["value"] for row in rows] == sorted((float(row["value"]) for row in rows), reverse=True)
    assert {row["head"] for row in result.rows if row["metric"] == "head_nn_accuracy"} == {1, 2, 3}
    assert results(tmp_path)["metrics"] == result.rows


# --- images


def test_unlabelled_images_work_throughout(weights: Path, unlabelled: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    result = refine(refine_config(weights, unlabelled, **EVALUATED), tmp_path / "both", listener=watcher)
    assert any(note.startswith("measures without labels in place of ") for note in watcher.notes)
    assert results(tmp_path / "both")["metrics"] == result.rows and (tmp_path / "both" / "results.csv").is_file()
    by_model: dict[str, dict[str, Any]] = {"base": {}, "refined": {}}
    for row in result.rows:
        by_model[str(row["model"])][str(row["metric"])] = row["value"]
    assert set(by_model["base"]) == set(by_model["refined"]) == set(MEASURES) - {"alpha_req"}
    checks = [json.loads(line) for line in (tmp_path / "both" / "metrics.jsonl").read_text().splitlines()]
    checks = [check for check in checks if "neighbour_consistency" in check]
    for model, check in zip(by_model, (checks[0], checks[-1]), strict=True):
        assert {name: check[name] for name in by_model[model]} == pytest.approx(by_model[model], rel=1e-5)
    watcher = Watcher()
    refine(refine_config(weights, unlabelled, stage="heads"), tmp_path / "heads", listener=watcher)
    assert any(note.startswith("no ranking of the heads: ") for note in watcher.notes)


def test_bad_images_are_told_once_and_listed_also_after_a_resume(weights: Path, tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data")
    bad = [data / "train" / "a" / f"{name}.png" for name in ("x1", "x2", "x3")] + [data / "val" / "b" / "x4.png"]
    for path in bad:
        path.write_bytes(b"")
    config = refine_config(weights, data, **EVALUATED)
    first, second = Watcher(lambda what, n: signal.raise_signal(signal.SIGTERM) if n == 14 else None), Watcher()
    with pytest.raises(Interrupted):
        refine(config, tmp_path / "out", listener=first)
    refine(config, tmp_path / "out", resume=True, listener=second)
    told = [warning for warning in first.warnings if "unreadable" in warning]
    assert len(told) == 1 and told[0].startswith("3 ") and f"{bad[0]} (empty file), {bad[1]}" in told[0]
    assert [w for w in second.warnings if "unreadable" in w][-1].startswith("4 ")
    assert results(tmp_path / "out")["bad_images"] == [{"path": str(p), "reason": "empty file"} for p in bad]
    with pytest.raises(DataError, match=r"more than data\.max_bad=1"):
        refine(refine_config(weights, data, data__max_bad=1), tmp_path / "few")


def test_an_evaluation_that_fails_does_not_lose_the_training(
    weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = Watcher()

    def before_after(*_: object, **__: object) -> None:
        raise DataError("they are gone")

    monkeypatch.setattr("mimref.refinement.run.before_after", before_after)
    result = refine(refine_config(weights, data, **EVALUATED), tmp_path, listener=watcher)
    assert result.rows == [] and tensors(tmp_path)
    assert "no results table: they are gone" in watcher.warnings


def test_a_run_says_that_k_nn_fell(weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher, images = Watcher(), list[int]()

    def lost(rows: list[Row], count: int) -> str:
        images.append(count)
        return f"k-NN of {len(rows)} rows fell"

    monkeypatch.setattr("mimref.refinement.run.lost_accuracy", lost)
    result = refine(refine_config(weights, data, **EVALUATED), tmp_path, listener=watcher)
    assert f"k-NN of {len(result.rows)} rows fell" in watcher.warnings and images == [16]


def test_a_protocol_that_the_images_do_not_allow_is_left_out(weights: Path, data: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    config = refine_config(weights, data, **EVALUATED | {"evaluate__shots": 1000})
    metrics = {str(row["metric"]) for row in refine(config, tmp_path, listener=watcher).rows}
    assert {"knn_top1", "cluster_acc"} <= metrics and "lowshot_top1" not in metrics
    (told,) = (note for note in watcher.notes if "before/after table" in note)
    assert "no low-shot accuracy" in told and "1000 shots" in told


def test_without_cyanure_only_the_low_shot_results_are_missing(
    weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cyanure.estimators", None)
    watcher = Watcher()
    result = refine(refine_config(weights, data, **EVALUATED), tmp_path, listener=watcher)
    metrics = {str(row["metric"]) for row in result.rows}
    assert {"knn_top1", "cluster_acc"} <= metrics and "lowshot_top1" not in metrics
    assert any("low-shot" in warning and "cyanure" in warning for warning in watcher.warnings)


@pytest.mark.parametrize(("decay", "told"), [(0.999, "keeps 99% of the base's weights; use 0.5 or less"), (0.7, "")])
def test_an_average_that_keeps_the_base_draws_a_warning(
    decay: float, told: str, weights: Path, data: Path, tmp_path: Path
) -> None:
    """After 12 updates, 0.7**12 leaves 1% of the base, as little as in runs that work; the paper's runs leave 2.3%."""
    watcher = Watcher()
    refine(refine_config(weights, data, encoder_stage__ema=decay), tmp_path, listener=watcher)
    about = [warning for warning in watcher.warnings if "encoder_stage.ema" in warning]
    assert [told in warning for warning in about] == ([True] if told else [])


# --- sizes


def test_weights_know_their_architecture_and_settings_their_image_size(
    weights: Path, data: Path, tmp_path: Path
) -> None:
    # With a preset of another architecture, the weights' own applies, image size included, and a warning says so.
    watcher = Watcher()
    config = refine_config(weights, data, encoder__arch="vit_b16", encoder__image_size=224, stage="heads")
    refine(config, tmp_path / "a", listener=watcher)
    assert any("encoder.arch vit_b16" in warning for warning in watcher.warnings)
    assert header(tmp_path / "a")["architecture"] == ARCHITECTURE.to_dict()
    encoder = results(tmp_path / "a")["config"]["encoder"]
    assert (encoder["arch"], encoder["image_size"], encoder["width"], encoder["depth"]) == ("custom", 16, 32, 4)
    # An image size alone is intended: positions are interpolated.
    watcher = Watcher()
    refine(refine_config(weights, data, encoder__image_size=24, stage="heads"), tmp_path / "b", listener=watcher)
    assert header(tmp_path / "b")["architecture"]["image_size"] == 24 and watcher.warnings == []
    assert tensors(tmp_path / "b")["pos_embed"].shape == (1, 10, 32)


# --- divergence


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    config: RefineConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = Method.forward, 0

    def broken(self: Method, *args: Any, **options: Any) -> StepValues:
        nonlocal calls
        calls += 1
        values = forward(self, *args, **options)
        return values._replace(loss=values.loss * float("nan")) if calls == 6 else values

    with monkeypatch.context() as patch:
        patch.setattr(Method, "forward", broken)
        with pytest.raises(DivergenceError, match="not finite at step 6"):
            refine(config, tmp_path)
    assert saved_step(tmp_path) == 4
    refine(config, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_weights_that_break_in_an_epochs_last_step_are_not_saved(
    config: RefineConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = Method.forward, 0

    def broken(self: Method, *args: Any, **options: Any) -> StepValues:
        nonlocal calls
        calls += 1
        values = forward(self, *args, **options)
        if calls == 12:  # the loss is fine, its gradient is not
            values.loss.register_hook(lambda gradient: gradient * float("nan"))
        return values

    with monkeypatch.context() as patch:
        patch.setattr(Method, "forward", broken)
        with pytest.raises(DivergenceError, match="weights are not finite after step 4 of stage 2"):
            refine(config, tmp_path)
    refine(config, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_views_are_normalised_as_the_weights_header_says(data: Path, tmp_path: Path) -> None:
    transform = EvalTransform(16, 1.0, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    path = tmp_path / "base.safetensors"
    save_encoder(path, build_encoder(ARCHITECTURE), {"transform": transform.to_dict()})
    plan = make_plan(refine_config(path, data, views__color=False, views__blur=False))
    crops = torch.full((2, 1, 3, 16, 16), 51, dtype=torch.uint8)
    view = build_method(plan, Silent()).photometric(crops, 0, torch.arange(2), [0])[0]
    torch.testing.assert_close(view, transform.normalize(crops[:, 0]), rtol=0, atol=1e-6)
