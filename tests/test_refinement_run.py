"""Whole runs of a tiny refinement: interrupted ones equal uninterrupted ones, and workers do not matter."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mimref.config import RefineConfig
from mimref.errors import CheckpointError, ConfigError, DivergenceError, Interrupted, OutputError
from mimref.recipes import load_config
from mimref.refinement.run import RefineResult, refine
from mimref.refinement.step import RefinementStep, StepValues
from tests.tiny import REFINE, arguments, refine_config, write_images, write_labelled, write_unlabelled, write_weights

# 8 steps of stage 1 and 12 of stage 2, 4 to an epoch.
STEPS = 20


class Killed(Exception):
    """Stands for SIGKILL: nothing is saved, nothing is tidied up."""


class Watcher:
    """A listener that keeps what it hears and acts when training or evaluation has come somewhere."""

    def __init__(self, at: Callable[[str, int], None] = lambda label, step: None) -> None:
        self.at, self.step = at, 0
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def progress(self, label: str, done: int, total: int) -> None:
        if label.startswith("stage"):
            self.step = done + (8 if label.startswith("stage 2") else 0)
            self.at("step", self.step)
        else:
            self.at(label, done)

    def note(self, message: str) -> None:
        self.notes.append(message)
        self.at(message.partition(":")[0], 0)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def signal_at(step: int, number: int = signal.SIGTERM) -> Watcher:
    return Watcher(lambda what, done: signal.raise_signal(number) if (what, done) == ("step", step) else None)


def kill_at(what: str, step: int) -> Watcher:
    def at(label: str, done: int) -> None:
        if (label, done) == (what, step):
            raise Killed

    return Watcher(at)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_unlabelled(tmp_path_factory.mktemp("unlabelled"))


EVALUATED: dict[str, Any] = {"evaluate__enabled": True, "evaluate__cluster_runs": 2, "evaluate__splits": 1}


@pytest.fixture(scope="module")
def config(weights: Path, data: Path) -> RefineConfig:
    return refine_config(weights, data, **EVALUATED)


@pytest.fixture(scope="module")
def whole(config: RefineConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    refine(config, out)
    return out


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "encoder.safetensors")


def assert_same_run(out: Path, other: Path) -> None:
    """The same weights and the same log, bit for bit, and the same results."""
    found, expected = tensors(out), tensors(other)
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert (out / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    assert results(out)["metrics"] == results(other)["metrics"]


def results(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "results.json").read_text())
    return loaded


def header(out: Path) -> dict[str, Any]:
    with safe_open(out / "encoder.safetensors", framework="pt") as opened:
        loaded: dict[str, Any] = json.loads(opened.metadata()["mimref"])
    return loaded


def interrupted(config: RefineConfig, out: Path, watchers: Iterable[Watcher]) -> RefineResult:
    """A run that stops as often as there are watchers, and is resumed every time."""
    for attempt, watcher in enumerate(watchers):
        with pytest.raises((Interrupted, Killed)):
            refine(config, out, resume=attempt > 0, listener=watcher)
        assert not (out / "results.json").exists()
    return refine(config, out, resume=True)


# --- what a run leaves


def test_a_run_leaves_what_it_promises(whole: Path, config: RefineConfig) -> None:
    files = {"config.toml", "encoder.safetensors", "heads.pt", "metrics.jsonl", "results.csv", "results.json"}
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
    ("what", "step"),
    [
        ("step", 2),
        ("step", 7),
        ("start", 0),
        ("step", 9),
        ("step", 18),
        ("features of base", 16),
        ("k-means of refined", 1),
    ],
)
def test_killed_without_saving_and_resumed_equals_uninterrupted(
    what: str, step: int, config: RefineConfig, whole: Path, tmp_path: Path
) -> None:
    interrupted(config, tmp_path, [kill_at(what, step)])
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
    assert torch.load(tmp_path / "state" / "state.pt", weights_only=True)["step"] == 4
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
        ({"encoder_stage__warmup_epochs": 1.0}, r"another encoder_stage\.warmup_epochs: it was unset and is now 1\.0"),
    ):
        with pytest.raises(ConfigError, match=named):
            refine(refine_config(weights, data, **EVALUATED, **changes), tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    refine(refine_config(weights, data, **EVALUATED, workers=1, data__max_bad=3), tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


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
    for workers in (1, 2):
        out = tmp_path / str(workers)
        refine(refine_config(weights, data, workers=workers), out)
        assert all(torch.equal(tensor, tensors(whole)[key]) for key, tensor in tensors(out).items())
        assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    refine(refine_config(weights, data, seed=1), tmp_path / "seed")
    assert any(not torch.equal(tensor, tensors(whole)[key]) for key, tensor in tensors(tmp_path / "seed").items())


def test_stage_1_leaves_the_encoder_bit_identical(weights: Path, data: Path, tmp_path: Path) -> None:
    refine(refine_config(weights, data, stage="heads"), tmp_path)
    base = load_file(weights)
    assert all(torch.equal(tensor, base[key]) for key, tensor in tensors(tmp_path).items())
    assert header(tmp_path)["source"] == "mae"


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
    # Another stage 2 on the same heads; and heads.pt is not needed any more once the run has a state of its own.
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
    with pytest.raises(ConfigError, match=r"read the blocks 3,4; set heads\.blocks=3,4"):
        attempt(heads__blocks="2-4")
    with pytest.raises(ConfigError, match=r"its queue holds 24 rows; set heads\.queue_size=24"):
        attempt(heads__queue_size=32)
    with pytest.raises(ConfigError, match=r"other widths than .*heads\.output 12"):
        attempt(heads__output=12)
    with pytest.raises(ConfigError, match=r"read 'cls' tokens; set heads\.pool=cls"):
        attempt(heads__pool="mean")
    with pytest.raises(CheckpointError, match=r"nowhere: no such file; --heads-from needs"):
        attempt(folder=tmp_path / "nowhere")
    (tmp_path / "heads.pt").write_bytes(b"not heads")
    with pytest.raises(CheckpointError, match="not readable as the heads of a run"):
        attempt(folder=tmp_path)
    torch.save([1, 2], tmp_path / "heads.pt")
    with pytest.raises(CheckpointError, match="not readable as the heads of a run"):
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
    assert result.rows == [] and results(tmp_path / "both")["metrics"] == []
    assert any(note.startswith("no before/after table: ") and "no labels" in note for note in watcher.notes)
    assert (tmp_path / "both" / "results.csv").is_file()
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
    assert len(told) == 1 and told[0].startswith(f"3 images are left out, unreadable: {bad[0]} (empty file), {bad[1]}")
    assert [w for w in second.warnings if "unreadable" in w][-1].startswith("4 images are left out, unreadable: ")
    assert results(tmp_path / "out")["bad_images"] == [{"path": str(p), "reason": "empty file"} for p in bad]
    with pytest.raises(Exception, match=r"more than data\.max_bad=1"):
        refine(refine_config(weights, data, data__max_bad=1), tmp_path / "few")


def test_an_evaluation_that_fails_does_not_lose_the_training(weights: Path, data: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    config = refine_config(weights, data, **EVALUATED | {"evaluate__shots": 1000})
    result = refine(config, tmp_path, listener=watcher)
    assert result.rows == [] and tensors(tmp_path)
    assert any(warning.startswith("no results table: ") for warning in watcher.warnings)


# --- divergence


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    config: RefineConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = RefinementStep.forward, 0

    def broken(self: RefinementStep, *args: Any, **options: Any) -> StepValues:
        nonlocal calls
        calls += 1
        values = forward(self, *args, **options)
        return values._replace(loss=values.loss * float("nan")) if calls == 6 else values

    with monkeypatch.context() as patch:
        patch.setattr(RefinementStep, "forward", broken)
        with pytest.raises(DivergenceError, match="not finite at step 6; the last good state is kept"):
            refine(config, tmp_path)
    assert torch.load(tmp_path / "state" / "state.pt", weights_only=True)["step"] == 4
    refine(config, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)


def test_weights_that_break_in_an_epochs_last_step_are_not_saved(
    config: RefineConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = RefinementStep.forward, 0

    def broken(self: RefinementStep, *args: Any, **options: Any) -> StepValues:
        nonlocal calls
        calls += 1
        values = forward(self, *args, **options)
        if calls == 12:  # the loss is fine, its gradient is not
            values.loss.register_hook(lambda gradient: gradient * float("nan"))
        return values

    with monkeypatch.context() as patch:
        patch.setattr(RefinementStep, "forward", broken)
        with pytest.raises(DivergenceError, match="weights are not finite after step 4 of stage 2"):
            refine(config, tmp_path)
    refine(config, tmp_path, resume=True)
    assert_same_run(tmp_path, whole)
