"""Whole runs of a tiny refinement: interrupted ones equal uninterrupted ones, and workers do not matter."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mimref.config.load import load_config
from mimref.errors import CheckpointError, ConfigError, DataError, Interrupted, OutputError
from mimref.refinement.config import RefineConfig
from mimref.refinement.run import refine
from mimref.training.run import TrainingResult
from tests.tiny import (
    EVALUATED,
    REFINE,
    Killed,
    Watcher,
    arguments,
    assert_same_run,
    header,
    kill_at,
    refine_config,
    results,
    saved_step,
    signal_at,
    tensors,
    write_labelled,
    write_unlabelled,
    write_weights,
)

# 8 steps of stage 1 and 12 of stage 2, 4 to an epoch.
STEPS = 20


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def config(weights: Path, data: Path) -> RefineConfig:
    return refine_config(weights, data, **EVALUATED)


@pytest.fixture(scope="module")
def whole(config: RefineConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    refine(config, out)
    return out


def interrupted(config: RefineConfig, out: Path, watchers: Iterable[Watcher]) -> TrainingResult:
    """Do a run that is stopped once by every watcher and resumed every time."""
    for attempt, watcher in enumerate(watchers):
        with pytest.raises((Interrupted, Killed)):
            refine(config, out, resume=attempt > 0, listener=watcher)
        assert not (out / "results.json").exists()
    return refine(config, out, resume=True)


# --- what a run leaves


def test_a_run_leaves_what_it_promises(whole: Path, config: RefineConfig) -> None:
    files = {"config.toml", "encoder.safetensors", "heads.pt", "metrics.jsonl", "exhibits.json"}
    files |= {"results.csv", "results.json"}
    assert {path.name for path in whole.iterdir()} == files
    found = results(whole)
    assert found["command"] == "refine" and found["elapsed_s"] > 0 and found["bad_images"] == []
    assert [row["model"] for row in found["metrics"] if row["metric"] == "knn_top1"] == [
        "raw pixels",
        "base",
        "refined",
    ]
    assert header(whole)["metrics"] == [row for row in found["metrics"] if row["model"] == "refined"]
    assert header(whole)["source"] == "mae refined"
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 8, 11, 14, 17, 20]
    assert [line["step"] for line in lines if "knn_top1" in line] == [8, 12, 16, 20]


def test_config_toml_reproduces_the_run_from_anywhere(
    whole: Path, weights: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(weights.parent)
    relative = refine_config(Path(weights.name), Path(os.path.relpath(data)), **EVALUATED)
    refine(relative, tmp_path / "a")
    assert (tmp_path / "a" / "config.toml").read_text() == (whole / "config.toml").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    refine(load_config(RefineConfig, str(tmp_path / "a" / "config.toml")), tmp_path / "b")
    assert_same_run(tmp_path / "b", whole)


def test_heads_are_scored_every_epoch_as_they_are_ranked_at_the_end(weights: Path, data: Path, tmp_path: Path) -> None:
    changes = {"stage": "heads", "heads__blocks": "4,3,4", "heads__temperature": [0.1, 0.2, 0.3]}
    plain, checked = (
        refine_config(weights, data, **changes, heads_stage__epochs=3, heads_stage__knn_every_epochs=every)
        for every in (0, 2)
    )
    watcher = Watcher()
    result, expected = refine(checked, tmp_path / "a", listener=watcher), refine(plain, tmp_path / "b").rows
    # Scoring does not change the training.
    assert result.rows == expected
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "head_knn_top1" in line]
    assert [(line["step"], line["epoch"], line["stage"]) for line in scored] == [(8, 2, "heads"), (12, 3, "heads")]
    ranked = {row["head"]: row["value"] for row in result.rows if row["metric"] == "head_knn_top1"}
    assert scored[-1]["head_knn_top1"] == [ranked[head] for head in (1, 2, 3)]
    shown = [note for note in watcher.notes if "of heads 1 to 3" in note]
    assert len(shown) == 2 and shown[0].startswith("epoch 2: ") and shown[1].startswith("epoch 3: ")
    assert shown[1].endswith(", ".join(f"{score:.4g}" for score in scored[-1]["head_knn_top1"]))
    interrupted(checked, tmp_path / "c", [signal_at(7), signal_at(8), signal_at(9)])
    assert (tmp_path / "c" / "metrics.jsonl").read_text() == (tmp_path / "a" / "metrics.jsonl").read_text()


def test_without_labels_no_head_is_scored(weights: Path, tmp_path: Path) -> None:
    images = write_unlabelled(tmp_path / "images")
    watcher = Watcher()
    config = refine_config(weights, images, stage="heads", heads_stage__knn_every_epochs=1)
    refine(config, tmp_path / "out", listener=watcher)
    assert sum("no k-NN of the heads" in note for note in watcher.notes) == 1
    assert "head_knn_top1" not in (tmp_path / "out" / "metrics.jsonl").read_text()


# --- interruption


def test_interrupted_and_resumed_at_many_steps_equals_uninterrupted(
    config: RefineConfig, whole: Path, tmp_path: Path
) -> None:
    # First step, mid-epoch, end of an epoch, both sides of the border between the stages, last step.
    interrupted(config, tmp_path, [signal_at(step) for step in (1, 3, 4, 8, 9, 10, 12, 15, STEPS)])
    assert_same_run(tmp_path, whole)
    assert not (tmp_path / "state").exists()
    assert results(tmp_path)["elapsed_s"] > 0


@pytest.mark.parametrize(
    "kills",
    [
        [("step", 2), ("step", 7), ("start", 0), ("step", 9), ("step", 18)],
        [("step", 9), ("features of base", 16), ("k-means of refined", 1)],
    ],
    ids=["training", "evaluation"],
)
def test_killed_without_saving_and_resumed_equals_uninterrupted(
    kills: list[tuple[str, int]], config: RefineConfig, whole: Path, tmp_path: Path
) -> None:
    interrupted(config, tmp_path, [kill_at(what, step) for what, step in kills])
    assert_same_run(tmp_path, whole)


def test_a_signal_during_the_evaluation_ends_at_once_and_resume_evaluates(
    config: RefineConfig, whole: Path, tmp_path: Path
) -> None:
    watcher = Watcher(lambda what, done: signal.raise_signal(signal.SIGINT) if what == "features of base" else None)
    with pytest.raises(Interrupted) as caught:
        refine(config, tmp_path, listener=watcher)
    assert caught.value.signum == signal.SIGINT
    again = Watcher()
    refine(config, tmp_path, resume=True, listener=again)
    assert again.step == 0  # no step is trained twice
    assert_same_run(tmp_path, whole)
    assert results(tmp_path)["elapsed_s"] > 0


def test_a_second_signal_does_not_wait(config: RefineConfig, tmp_path: Path) -> None:
    def twice(what: str, step: int) -> None:
        if (what, step) == ("step", 6):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped at once") as caught:
        refine(config, tmp_path, listener=Watcher(twice))
    assert caught.value.signum == signal.SIGINT
    assert saved_step(tmp_path) == 4
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_sigterm_to_a_process_saves_and_exits_143(weights: Path, data: Path, tmp_path: Path) -> None:
    changes = {"encoder_stage.epochs": 8, "workers": 1, "monitor.log_every": 1, "monitor.knn_every_epochs": 0}
    settings = REFINE | {"encoder.weights": weights, "data.spec": data} | changes
    line = [sys.executable, "-m", "mimref", *arguments("refine", tmp_path / "out", settings)]
    # A session of its own, so that the signal reaches the workers too, as that of a batch system does.
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        log = tmp_path / "out" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (log.is_file() and log.read_text().count("\n") > 10) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("mimref: saved at step ")
    config = load_config(RefineConfig, str(tmp_path / "out" / "config.toml"), {"workers": 0})
    refine(config, tmp_path / "out", resume=True)
    refine(config, tmp_path / "whole")
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_resuming_a_finished_run_returns_its_results(config: RefineConfig, whole: Path) -> None:
    watcher = Watcher()
    result = refine(config, whole, resume=True, listener=watcher)
    assert (watcher.step, watcher.notes) == (0, [])
    assert result.rows == results(whole)["metrics"] and result.elapsed_s == results(whole)["elapsed_s"]


def test_resume_needs_the_same_settings_but_not_the_same_workers(
    config: RefineConfig, whole: Path, weights: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        refine(config, tmp_path, listener=signal_at(6))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for changes, named in (
        ({"encoder_stage__lr": 2e-2}, r"another encoder_stage\.lr: it was 0\.01 and is now 0\.02"),
        ({"seed": 1}, "another seed: it was 0 and is now 1"),
        ({"encoder_stage__warmup_epochs": 1.0}, r"another encoder_stage\.warmup_epochs: it was 0\.6 and is now 1\.0"),
    ):
        with pytest.raises(ConfigError, match=named):
            refine(refine_config(weights, data, **EVALUATED, **changes), tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    refine(refine_config(weights, data, **EVALUATED, workers=1, data__max_bad=3), tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_a_run_goes_on_with_other_images_but_not_with_more(weights: Path, tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data")
    config = refine_config(weights, data)
    with pytest.raises(Interrupted):
        refine(config, tmp_path / "out", listener=signal_at(6))
    (data / "train" / "a" / "more.png").write_bytes((data / "train" / "a" / "000.png").read_bytes())
    with pytest.raises(DataError, match="cannot resume with 49 images, the run was started with 48"):
        refine(config, tmp_path / "out", resume=True)
    (data / "train" / "a" / "000.png").unlink()
    watcher = Watcher()
    refine(config, tmp_path / "out", resume=True, listener=watcher)
    assert any("image files have changed since the run was started" in warning for warning in watcher.warnings)


def test_a_run_does_not_go_on_from_other_weights(data: Path, tmp_path: Path) -> None:
    config = refine_config(write_weights(tmp_path / "base.safetensors"), data)
    with pytest.raises(Interrupted):
        refine(config, tmp_path / "out", listener=signal_at(1))
    write_weights(tmp_path / "base.safetensors", seed=1)
    with pytest.raises(CheckpointError, match=r"base\.safetensors holds other weights"):
        refine(config, tmp_path / "out", resume=True)


def test_a_run_that_is_not_resumed_is_not_touched(config: RefineConfig, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        refine(config, tmp_path, listener=signal_at(2))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds an unfinished run; --resume continues it"):
        refine(config, tmp_path)
    with pytest.raises(OutputError, match="holds a finished run"):
        refine(config, whole)
    refine(config, tmp_path, force=True)
    assert_same_run(tmp_path, whole)
    assert (tmp_path / "notes.txt").read_text() == "mine"


# --- determinism


def test_workers_do_not_change_the_weights_and_seeds_do(whole: Path, weights: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "workers"
    refine(refine_config(weights, data, workers=2), out)
    assert all(torch.equal(tensor, tensors(whole)[key]) for key, tensor in tensors(out).items())
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    refine(refine_config(weights, data, seed=1), tmp_path / "seed")
    assert any(not torch.equal(tensor, tensors(whole)[key]) for key, tensor in tensors(tmp_path / "seed").items())


def test_stage_1_leaves_the_encoder_bit_identical(weights: Path, data: Path, tmp_path: Path) -> None:
    refine(refine_config(weights, data, stage="heads"), tmp_path)
    base = load_file(weights)
    assert all(torch.equal(tensor, base[key]) for key, tensor in tensors(tmp_path).items())
    assert header(tmp_path)["source"] == "mae"


def test_a_collapse_without_labels_draws_a_warning(weights: Path, tmp_path: Path) -> None:
    data, warned = write_unlabelled(tmp_path / "data"), dict[float, list[str]]()
    for lr in (1e-2, 10.0):
        watcher = Watcher()
        refine(refine_config(weights, data, encoder_stage__lr=lr), tmp_path / f"{lr}", listener=watcher)
        warned[lr] = [line for line in watcher.warnings if "features collapse" in line]
        lines = [json.loads(line) for line in (tmp_path / f"{lr}/metrics.jsonl").read_text().splitlines()]
        variance = [line["feature_variance"] for line in lines if "feature_variance" in line]
        assert len(variance) == 4
    assert variance[-1] > variance[0]  # the scale of the features does not reveal it
    assert not warned[1e-2]
    assert len(warned[10.0]) >= 2 and all("correlation_rank fell from" in line for line in warned[10.0])
