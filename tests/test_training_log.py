"""The log of a run, the trackers that receive its numbers, and the images left out."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from mimref.config.run import MonitorConfig
from mimref.errors import ConfigError, DataError
from mimref.progress import Silent
from mimref.refinement.config import RefineConfig
from mimref.training import trackers
from mimref.training.log import MetricsLog, SkippedImages, open_log
from mimref.training.trackers import check_trackers
from tests.tiny import Watcher


def test_the_log_is_cut_to_the_lines_of_the_state(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(3):
        log.write({"step": step})
    path.write_bytes(path.read_bytes() + b'{"step": 3, "los\xff')  # a crash in the middle of a line
    again = MetricsLog(path, keep_lines=2)
    again.write({"step": 9})
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 9}\n' and again.lines == 3
    assert MetricsLog(path).lines == 0 and path.read_text() == ""


class Numbers:
    """A tracker that keeps what it receives."""

    def __init__(self) -> None:
        self.received: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.received.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True


def test_trackers_receive_the_numbers_of_the_log(tmp_path: Path) -> None:
    tracker = Numbers()
    log = MetricsLog(tmp_path / "metrics.jsonl", trackers={"one": tracker})
    log.write({"step": 3, "stage": "heads", "lr": 0.1, "head_loss": [1.0, 2.0]})
    log.close()
    assert tracker.received == [(3, {"heads/lr": 0.1, "heads/head_loss/head_1": 1.0, "heads/head_loss/head_2": 2.0})]
    assert tracker.closed


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers([])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"monitor\.trackers 'wandb' is not installed: pip install 'mimref\[wandb\]'"):
        check_trackers(["wandb"])


def test_tensorboard_keeps_what_the_log_says(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = RefineConfig(monitor=MonitorConfig(trackers=["tensorboard"]))
    for state, steps in ((None, (1, 2, 3)), ({"log_lines": 2, "step": 2}, (3, 4))):
        log = open_log(config, tmp_path, state, Silent())
        for step in steps:
            log.write({"step": step, "stage": "heads", "lr": step / 8})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("heads/lr")] == [(n, n / 8) for n in (1, 2, 3, 4)]


def test_weights_and_biases_keeps_the_last_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = open_log(RefineConfig(monitor=MonitorConfig(trackers=["wandb"])), tmp_path, None, Silent())
    for step in (1, 2):
        log.write({"step": step, "stage": "heads", "lr": step / 8})
    log.close()
    (written,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"heads/lr" in written.read_bytes()


class Warnings:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def progress(self, label: str, done: int, total: int) -> None: ...

    def note(self, message: str) -> None: ...

    def warn(self, message: str) -> None:
        self.lines.append(message)


def test_skipped_images_are_told_when_they_are_known_and_when_there_are_more() -> None:
    heard = Warnings()
    skipped = SkippedImages(10, heard)
    skipped.report(once=True)
    skipped.add([("b.png", "truncated")])
    skipped.report(once=True)
    skipped.add([("a.png", "empty file"), ("b.png", "truncated")])
    skipped.report(once=True)
    skipped.add_evaluated([("d.png", "not an image"), ("c.png", "not an image")])
    resumed, strict = SkippedImages(2, Silent()), SkippedImages(1, Silent())
    resumed.load_state(skipped.state())
    assert resumed.items == skipped.items
    resumed.gather()  # evaluated images do not count against the limit
    with pytest.raises(DataError):
        strict.load_state(skipped.state())
    older = SkippedImages(9, Silent())
    older.load_state(skipped.items)
    assert older.items == skipped.items
    skipped.report()
    skipped.report()
    first, last = heard.lines
    assert first.startswith("1 ") and "b.png (truncated)" in first
    assert last.startswith("4 ") and "a.png (empty file), b.png (truncated), c.png (not an image), ..." in last


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Numbers):
        def log(self, values: Mapping[str, float], step: int) -> None:
            if step == 2:
                raise ConnectionError("network is unreachable\nand more")
            super().log(values, step)

    watcher, kept, failing = Watcher(), Numbers(), Failing()
    log = MetricsLog(tmp_path / "metrics.jsonl", trackers={"wandb": failing, "kept": kept}, listener=watcher)
    for step in (1, 2, 3):
        log.write({"step": step, "stage": "heads", "lr": 0.1})
    log.close()
    assert watcher.warnings == ["no more metrics for wandb: ConnectionError: network is unreachable"]
    assert [step for step, _ in kept.received] == [1, 2, 3] and [step for step, _ in failing.received] == [1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3

    def open_failing(*_: object, **__: object) -> None:
        raise RuntimeError("no key")

    monkeypatch.setattr("mimref.training.log.open_tracker", open_failing)
    log = open_log(RefineConfig(monitor=MonitorConfig(trackers=["wandb"])), tmp_path, None, watcher)
    log.write({"step": 1})
    assert watcher.warnings[1:] == ["no metrics for wandb: RuntimeError: no key"]
