"""What a run survives: signals, kills and loader processes that die; and the memory of a long run."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mimref import locks as lock
from mimref.cli import run
from mimref.data import workers
from mimref.data.decode import Decoded
from mimref.data.sources import FileSource
from mimref.errors import Interrupted
from mimref.refinement.run import refine
from tests.faults import TinyRun, error_line, make_tiny_run, states
from tests.kill_many import Killer, differences, run_killed
from tests.tiny import Watcher, assert_same_run, refine_config, saved_step, signal_at


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.1)


# --- a second signal


@pytest.mark.parametrize(
    ("how", "number", "code"),
    [
        ("before", signal.SIGINT, 130),
        ("before", signal.SIGTERM, 143),
        ("within", signal.SIGTERM, 143),
        ("as an error of its own", signal.SIGINT, 130),
        ("after", signal.SIGTERM, 143),
    ],
)
def test_a_second_signal_while_saving_stops_at_once(
    how: str,
    number: int,
    code: int,
    tiny: TinyRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save, saves = torch.save, 0

    def interrupted(content: Any, stream: Any) -> None:
        nonlocal saves
        saves += 1
        if saves < 3:
            save(content, stream)
            return
        # The third epoch's state: a first signal, and another one while it is written.
        signal.raise_signal(number)
        if how == "within":
            stream.write(b"half of it")
        elif how == "as an error of its own":
            try:
                signal.raise_signal(number)
            except Interrupted as error:
                raise RuntimeError("[enforce fail at inmessagecontainer.cc:664] . unexpected pos 64 vs 0") from error
        elif how == "after":
            save(content, stream)
        signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        # heads.pt is written by torch.save as well, after the second state.
        patch.setattr("mimref.refinement.run.save_heads", lambda *_: None)
        assert run(tiny.line(tmp_path)) == code
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1] == "mimref: stopped at once; --resume continues from the last saved state"
    assert "Traceback" not in errors
    assert states(tmp_path) == ["step0000000004.pt", "step0000000008.pt"]
    assert not (tmp_path / ".lock").exists()
    assert run(["refine", "--resume", "--out", str(tmp_path)]) == 0
    assert_same_run(tmp_path, tiny.whole)


def test_the_first_signal_says_what_a_second_does(tiny: TinyRun, tmp_path: Path) -> None:
    watcher = signal_at(6)
    with pytest.raises(Interrupted, match="saved at step 6"):
        refine(tiny.config, tmp_path, listener=watcher)
    assert "second signal" in watcher.notes[-1]


# --- a loader process that dies


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "Killed"), (signal.SIGSEGV, "Segmentation fault")])
def test_a_dead_loader_process_is_reported_with_its_image(
    number: int,
    name: str,
    tiny: TinyRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, reads = FileSource.read_reduced, 0

    def deadly(self: FileSource, index: int, reduce: Any) -> Decoded:
        nonlocal reads
        if multiprocessing.parent_process() is not None:
            reads += self.files[index] == "b/003.png"
            if reads == 2:  # in the second epoch
                faulthandler.disable()  # otherwise a segmentation fault fills the terminal
                os.kill(os.getpid(), number)
                time.sleep(10)
        return read(self, index, reduce)

    line = [*tiny.line(tmp_path), "--set", "workers=1"]
    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "read_reduced", deadly)
        assert run(line) == 2
    message = error_line(capsys)
    assert all(part in message for part in (f"({name})", f"{tiny.data}/train/b/003.png", "--resume", "--workers"))
    assert run([*line, "--resume"]) == 0
    assert_same_run(tmp_path, tiny.whole)


def test_a_dead_loader_process_of_the_check_after_an_epoch(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = FileSource.read_reduced

    def deadly(self: FileSource, index: int, reduce: Any) -> Any:
        # After the check at the start of stage 2.
        if multiprocessing.parent_process() is not None and "knn_top1" in (tmp_path / "metrics.jsonl").read_text():
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(10)
        return read(self, index, reduce)

    monkeypatch.setattr(FileSource, "read_reduced", deadly)
    assert run(tiny.line(tmp_path, workers=1, monitor__knn_every_epochs=1)) == 2
    told = error_line(capsys)
    assert told.startswith(f"mimref: error: a loader process died (Killed) at {tiny.data}/train/")
    assert "--resume" in told and "--workers" in told
    assert saved_step(tmp_path) == 8


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize(("number", "count"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_ends_the_wait_for_a_batch(
    step: int,
    number: int,
    count: int,
    tiny: TinyRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It arrives while a loader process, or this one, reads an image that would take another minute."""
    read, reads, main = FileSource.read_reduced, 0, os.getpid()

    def slow(self: FileSource, index: int, reduce: Any) -> Decoded:
        nonlocal reads
        reads += 1
        # Batches have 12 images. The main process has finished everything before this batch, or is about to.
        if reads == 12 * step + 5:
            time.sleep(0.5 if count else 0)
            os.kill(main, number)
            time.sleep(60)
        return read(self, index, reduce)

    started = time.monotonic()
    line = [*tiny.line(tmp_path), "--set", f"workers={count}"]
    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "read_reduced", slow)
        assert run(line) == 128 + number
    assert time.monotonic() - started < 30
    told = error_line(capsys)
    assert "Traceback" not in told and "saved at step" in told
    assert saved_step(tmp_path) == step
    assert run([*line, "--resume"]) == 0
    assert_same_run(tmp_path, tiny.whole)


def test_a_hanging_loader_process_costs_no_work(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = FileSource.read_reduced, 0

    def stuck(self: FileSource, index: int, reduce: Any) -> Decoded:
        nonlocal reads
        reads += 1
        if multiprocessing.parent_process() is not None and reads == 12 * 6 + 5:
            os.kill(os.getpid(), signal.SIGSTOP)
        return read(self, index, reduce)

    line = [*tiny.line(tmp_path), "--set", "workers=1"]
    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "read_reduced", stuck)
        patch.setattr(workers, "CHECK_S", 0.05)
        assert run(line) == 2
    told = error_line(capsys)
    assert all(part in told for part in ("(SIGSTOP)", f"{tiny.data}/train/", "--resume"))
    assert saved_step(tmp_path) == 6
    assert run([*line, "--resume"]) == 0
    assert_same_run(tmp_path, tiny.whole)


# --- whole processes


@pytest.mark.slow
def test_killed_three_times_and_resumed_equals_uninterrupted(tiny: TinyRun, tmp_path: Path) -> None:
    longer: dict[str, Any] = {"encoder_stage__epochs": 30, "workers": 1}
    line = tiny.line(tmp_path / "killed", **longer)
    killer = Killer(tmp_path / "killed", 1, start_s=5.0, training_s=1.0, phases=("start", "training", "saving"))
    assert run_killed(line, killer, 3) == 3
    assert run(tiny.line(tmp_path / "whole", **longer)) == 0
    assert differences(tmp_path / "killed", tmp_path / "whole") == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_two_signals_to_a_process(number: int, code: int, tiny: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = [sys.executable, "-m", "mimref", *tiny.line(out, encoder_stage__epochs=60, workers=2)]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not list((out / "state").glob("step*.pt")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # To the whole group, as a terminal or a batch system sends it.
        os.killpg(process.pid, number)
        time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    # The second signal may come after the last handler is gone; a shell sees the same code.
    assert process.returncode in (code, -number), errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(("mimref: stopped at once; ", "mimref: saved at step "))
    assert run(["refine", "--resume", "--out", str(out), "--set", "workers=0"]) == 0
    assert run(tiny.line(tmp_path / "whole", encoder_stage__epochs=60, workers=0)) == 0
    assert_same_run(out, tmp_path / "whole")


def anonymous_mb() -> float:
    """Return the memory of this process that belongs to no file, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no RssAnon in /proc/self/status")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_long_run_does_not_grow(tiny: TinyRun, tmp_path: Path) -> None:
    # 48 images in batches of 4 are 12 steps to an epoch, 2,016 in all.
    changes = {"batch_size": 4, "heads_stage__epochs": 1, "encoder_stage__epochs": 167, "encoder_stage__lr": 1e-4}
    changes |= {"monitor__log_every": 10, "monitor__knn_every_epochs": 10}
    used: dict[int, float] = {}

    class Watch(Watcher):
        def progress(self, label: str, done: int, total: int) -> None:
            if label.startswith("stage 2") and done % 100 == 0:
                used[done] = anonymous_mb()

    refine(refine_config(tiny.weights, tiny.data, **changes), tmp_path, listener=Watch())
    assert max(used) == 2000
    assert used[2000] - used[300] < 4.0, used
