"""Failures in the middle of a run: one line, exit code 2, and the last good state survives."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mimref import files
from mimref.cli import run
from mimref.refinement.method import Method, StepValues
from tests.tiny import REFINE, arguments, saved_step, write_labelled, write_weights


@pytest.fixture(scope="module")
def line_for(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("input")
    weights, data = write_weights(folder / "base.safetensors"), write_labelled(folder / "data")
    settings = REFINE | {"encoder.weights": weights, "data.spec": data, "monitor.knn_every_epochs": 0}
    return lambda out: arguments("refine", out, settings)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mimref: ")]
    assert len(errors) == 1 and errors[0].startswith("mimref: error: ")
    return errors[0]


def test_a_loss_that_is_not_finite(
    line_for: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = Method.forward, 0

    def broken(self: Method, *args: Any, **options: Any) -> StepValues:
        nonlocal calls
        calls += 1
        values = forward(self, *args, **options)
        return values._replace(loss=values.loss / 0) if calls == 10 else values

    monkeypatch.setattr(Method, "forward", broken)
    assert run(line_for(tmp_path)) == 2
    message = error_line(capsys)
    assert "loss" in message and "step 10" in message
    assert saved_step(tmp_path) == 8


def test_a_disk_that_fills_up_while_the_state_is_saved(
    line_for: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, calls = os.fsync, 0

    def fill(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        # One call per file, one for its folder: origin.json, config.toml, metrics.jsonl and the states of two epochs.
        if calls > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fill)
        assert run(line_for(tmp_path)) == 2
    message = error_line(capsys)
    assert "No space left on device" in message
    assert saved_step(tmp_path) == 8
    assert not list(tmp_path.rglob("*.tmp"))
    assert run(["refine", "--resume", "--out", str(tmp_path)]) == 0


def test_a_log_that_cannot_be_written(
    line_for: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if self.name == "metrics.jsonl" and mode == "a":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    assert run(line_for(tmp_path)) == 2
    message = error_line(capsys)
    assert "metrics.jsonl" in message and "No space left on device" in message


def test_a_damaged_state_or_log_or_config(line_for: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "step0000000008.pt").write_bytes(b"damaged")
    (tmp_path / "config.toml").touch()
    assert run([*line_for(tmp_path), "--resume"]) == 2
    message = error_line(capsys)
    assert "step0000000008.pt" in message and "--force" in message
    (tmp_path / "config.toml").write_text("seed = zero\n")
    assert run(["refine", "--resume", "--out", str(tmp_path)]) == 2
    assert "config.toml'" in error_line(capsys)
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe")
    assert run([*line_for(tmp_path), "--force", "--stage", "heads"]) == 0
