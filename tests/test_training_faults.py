"""What a run survives: damaged states, kills while saving, a second run in its folder, signals, full disks."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import get_worker_info

from mimref import files
from mimref.cli import run
from mimref.config import RefineConfig
from mimref.data import workers
from mimref.data.decode import Decoded
from mimref.data.sources import FileSource
from mimref.data.workers import WorkerWatch
from mimref.errors import Interrupted, OutputError
from mimref.pretraining.run import pretrain
from mimref.recipes import load_config
from mimref.refinement.run import refine
from mimref.training import lock, loop
from mimref.training.state import RunFolder
from tests.kill_many import Killer, differences, run_killed
from tests.tiny import (
    REFINE,
    Killed,
    Watcher,
    arguments,
    assert_same_run,
    kill_at,
    pretrain_config,
    refine_config,
    saved_step,
    signal_at,
    write_labelled,
    write_weights,
)

CONFIG = RefineConfig()
QUIET = {"monitor.knn_every_epochs": 0}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def line_for(weights: Path, data: Path) -> Callable[[Path], list[str]]:
    """The command line of a run of 8 steps of stage 1 and 12 of stage 2, 4 to an epoch."""
    settings = REFINE | QUIET | {"encoder.weights": weights, "data.spec": data}
    return lambda out: arguments("refine", out, settings)


@pytest.fixture(scope="module")
def whole(line_for: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, uninterrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert run(line_for(out)) == 0
    return out


@pytest.fixture(scope="module")
def config(whole: Path) -> RefineConfig:
    """Its settings."""
    return load_config(RefineConfig, str(whole / "config.toml"))


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.1)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


# --- damaged states


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.arange(20.0) + step, "rows": [("a", 1.5)]}


def saved(path: Path, *steps: int) -> RunFolder:
    """A folder in which a run has saved at these steps."""
    folder = RunFolder(path)
    folder.prepare(CONFIG, resume=False, force=False)
    for step in steps:
        folder.save_state(state(step))
    return folder


def states(path: Path) -> list[str]:
    return sorted(file.name for file in (path / "state").iterdir())


def cut(file: Path, share: float) -> None:
    os.truncate(file, int(share * file.stat().st_size))


def flip(file: Path, at: int, bit: int = 0) -> None:
    """Change one bit of the file's byte `at`; from the end if negative."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def weights_at(file: Path) -> int:
    """Where the weights of a state lie in its file."""
    return file.read_bytes().index(torch.arange(20.0).add(8).numpy().tobytes())


def test_the_newest_two_states_stay(tmp_path: Path) -> None:
    folder = saved(tmp_path, 3)
    assert states(tmp_path) == ["step0000000003.pt"]
    for step in (5, 8, 12):
        folder.save_state(state(step))
    assert states(tmp_path) == ["step0000000008.pt", "step0000000012.pt"]
    folder.drop_state()
    assert not (tmp_path / "state").exists() and folder.load_state() is None


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": lambda file: cut(file, 0.0),
    "half": lambda file: cut(file, 0.5),
    "all but the end": lambda file: cut(file, 0.99),
    "a bit of the weights": lambda file: flip(file, weights_at(file) + 9),
    "a bit of the directory": lambda file: flip(file, -30),
    "other content": lambda file: file.write_text("not a state"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_noticed_and_the_one_before_is_used(damage: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, 4, 8)
    newest = tmp_path / "state" / "step0000000008.pt"
    DAMAGES[damage](newest)
    heard = Watcher()
    loaded = folder.load_state(heard)
    assert loaded is not None and torch.equal(loaded["weights"], state(4)["weights"])
    assert heard.warnings == [f"{newest}: damaged state; going on from the one before, of step 4"]
    cut(tmp_path / "state" / "step0000000004.pt", 0.7)
    with pytest.raises(OutputError) as caught:
        folder.load_state()
    assert str(caught.value) == f"{newest}: damaged state, and so is the one before; --force starts the run anew"


def test_a_changed_bit_anywhere_is_noticed_or_without_effect(tmp_path: Path) -> None:
    folder = saved(tmp_path, 8)
    file = tmp_path / "state" / "step0000000008.pt"
    content, bits = file.read_bytes(), random.Random(0)
    noticed = 0
    for at in range(0, len(content), 5):
        file.write_bytes(content)
        flip(file, at, bits.randrange(8))
        try:
            loaded = folder.load_state()
        except OutputError:
            noticed += 1
            continue
        assert loaded is not None and loaded["step"] == 8 and loaded["rows"] == [("a", 1.5)]
        assert torch.equal(loaded["weights"], state(8)["weights"])
    assert noticed > len(content) / 10


def test_a_state_that_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, 4, 8)

    def no_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore")

    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(OutputError, match=r"0008.pt: cannot be read \(DefaultCPUAllocator: can't allocate memory\)"):
        folder.load_state()
    (tmp_path / "state" / "step0000000009.pt").mkdir()
    with pytest.raises(OutputError, match=r"0009.pt: cannot be read \(Is a directory\)"):
        folder.load_state()


@pytest.mark.parametrize("stop", [9, 11])  # either side: the state before is one of stage 1, of stage 2
def test_a_run_goes_on_from_the_state_before(stop: int, config: RefineConfig, whole: Path, tmp_path: Path) -> None:
    for attempt in (False, True):
        with pytest.raises(Interrupted):
            refine(config, tmp_path, resume=attempt, listener=signal_at(stop + attempt))
    newest = tmp_path / "state" / f"step{stop + 1:010}.pt"
    flip(newest, newest.stat().st_size // 2)
    again = Watcher()
    refine(config, tmp_path, resume=True, listener=again)
    assert [line for line in again.warnings if "damaged" in line] == [
        f"{newest}: damaged state; going on from the one before, of step {stop}"
    ]
    assert_same_run(tmp_path, whole)
    assert not (tmp_path / "state").exists()


# --- killed while saving


def calls_of_saving(path: Path, monkeypatch: pytest.MonkeyPatch, kill_after: int | None) -> int:
    """Save a state and die before call number `kill_after` to the file system; the number of calls."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            if calls == kill_after:
                raise Killed
            calls += 1
            return function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(files.os, name, counted(getattr(os, name)))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(torch, "save", counted(torch.save))
        RunFolder(path).save_state(state(12))
    return calls


@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_at_any_moment_of_saving_leaves_a_good_state(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(name: str) -> Path:
        # The newest is damaged and the run goes on from step 4; or it goes on from step 8.
        saved(tmp_path / name, 4, 14 if damaged else 8)
        if damaged:
            cut(tmp_path / name / "state" / "step0000000014.pt", 0.5)
        return tmp_path / name

    calls = calls_of_saving(prepared("counted"), monkeypatch, None)
    assert calls >= 5
    assert states(tmp_path / "counted") == [f"step{step:010}.pt" for step in ((4, 12) if damaged else (8, 12))]
    found = []
    for number in range(calls):
        path = prepared(str(number))
        with pytest.raises(Killed):
            calls_of_saving(path, monkeypatch, number)
        found.append(saved_step(path))
        RunFolder(path).prepare(CONFIG, resume=True, force=False)
        assert not list(path.rglob("*.tmp"))
    old = 4 if damaged else 8
    assert set(found) == {old, 12} and found == sorted(found)


def test_states_are_saved_by_the_clock_too(
    config: RefineConfig, whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(loop, "SAVE_COST", 0.0)
    for attempt, step in enumerate((3, 7, 11, 18)):
        with pytest.raises(Killed):
            refine(config, tmp_path / "out", resume=attempt > 0, listener=kill_at("step", step))
        assert saved_step(tmp_path / "out") == step - 1
    refine(config, tmp_path / "out", resume=True)
    assert_same_run(tmp_path / "out", whole)
    pretraining = pretrain_config(data)
    with pytest.raises(Killed):
        pretrain(pretraining, tmp_path / "mae", listener=kill_at("step", 6))
    assert saved_step(tmp_path / "mae") == 5
    pretrain(pretraining, tmp_path / "mae", resume=True)
    pretrain(pretraining, tmp_path / "mae-whole")
    assert_same_run(tmp_path / "mae", tmp_path / "mae-whole")


# --- two runs in one folder

HOLDER = """
import os, sys, time
from pathlib import Path
from mimref.training.lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    if os.fork() == 0:
        time.sleep(float(sys.argv[2]))  # as a loader process, which notices a while after the run has been killed
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process at work in `tmp_path`, which has a child."""
    line = [sys.executable, "-c", HOLDER, str(tmp_path), "3"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("option", ["", "--resume", "--force"])
def test_two_runs_in_one_folder(
    option: str,
    holder: subprocess.Popen[str],
    line_for: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = [*line_for(tmp_path), *([option] if option else [])]
    if option:
        (tmp_path / "state").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert run(line) == 2
    assert error_line(capsys) == (
        f"mimref: error: {tmp_path}: another process is at work in this folder; wait for it, or give another --out "
        f"(if there is none, remove {tmp_path}/.lock)"
    )
    assert sorted(tmp_path.rglob("*")) == before
    holder.kill()
    holder.wait()
    monkeypatch.setattr(lock, "PATIENCE_S", 8.0)
    assert run(line) == 0
    assert not (tmp_path / ".lock").exists()


def test_a_run_that_another_process_has_finished_meanwhile(whole: Path) -> None:
    before = {file: file.read_bytes() for file in whole.iterdir()}
    with (
        pytest.raises(OutputError, match="another process has just finished this run; --resume shows its results"),
        RunFolder(whole).locked(resume=True, force=False),
    ):
        pass
    with pytest.raises(OutputError, match="finished run"), RunFolder(whole).locked(resume=False, force=False):
        pass
    assert {file: file.read_bytes() for file in whole.iterdir()} == before


def test_a_run_killed_with_its_results_written_leaves_no_state(
    config: RefineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: RunFolder) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "drop_state", killed)
        refine(config, tmp_path)
    assert len(states(tmp_path)) == 2
    refine(config, tmp_path, resume=True)
    assert not (tmp_path / "state").exists()


def test_a_run_refused_for_its_settings_leaves_no_folder(weights: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"heads\.blocks"):
        refine(refine_config(weights, data, heads__blocks="9"), tmp_path / "runs" / "a")
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written_is_one_line_and_a_finished_run_there_is_shown(
    config: RefineConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(lock.FileLock, "acquire", read_only)
    assert refine(config, whole, resume=True).elapsed_s > 0
    with pytest.raises(OutputError, match=r"out: cannot be written \(Read-only file system\); give another --out"):
        refine(config, tmp_path / "out")


# --- a second signal


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("how", ["before", "within", "as an error of its own", "after"])
def test_a_second_signal_while_saving_stops_at_once(
    number: int,
    code: int,
    how: str,
    line_for: Any,
    whole: Path,
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
        # The third epoch's state: Ctrl-C, and once more while it is written.
        signal.raise_signal(number)
        if how == "within":
            stream.write(b"half of it")
        elif how == "as an error of its own":
            try:
                signal.raise_signal(number)
            except Interrupted as error:
                raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0") from error
        elif how == "after":
            save(content, stream)
        signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        # heads.pt is written by torch.save as well, after the second state.
        patch.setattr("mimref.refinement.stages.Refinement.save_heads", lambda *_: None)
        assert run(line_for(tmp_path)) == code
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1] == "mimref: stopped at once; --resume continues from the last saved state"
    assert "Traceback" not in errors
    assert states(tmp_path) == ["step0000000004.pt", "step0000000008.pt"]
    assert not (tmp_path / ".lock").exists()
    assert run(["refine", "--resume", "--out", str(tmp_path)]) == 0
    assert_same_run(tmp_path, whole)


def test_the_first_signal_says_what_a_second_does(config: RefineConfig, tmp_path: Path) -> None:
    watcher = signal_at(6)
    with pytest.raises(Interrupted, match="saved at step 6"):
        refine(config, tmp_path, listener=watcher)
    assert watcher.notes[-1] == "stopping: the state is saved first; a second signal stops at once"


# --- disk full


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_is_full_while_saving_keeps_the_earlier_states(
    name: str,
    line_for: Any,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_state, saves = RunFolder.save_state, 0

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fourth(self: RunFolder, content: dict[str, Any]) -> None:
        nonlocal saves
        saves += 1
        with monkeypatch.context() as patch:
            if saves == 4:
                patch.setattr(files.os, name, full)
            save_state(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_state", fourth)
        assert run(line_for(tmp_path)) == 2
    file = tmp_path / "state" / "step0000000016.pt"
    assert error_line(capsys) == (
        f"mimref: error: cannot write {file}: No space left on device; free some space and run again"
    )
    assert states(tmp_path) == ["step0000000008.pt", "step0000000012.pt"]
    assert run([*line_for(tmp_path), "--resume"]) == 0
    assert_same_run(tmp_path, whole)


def test_a_disk_that_is_full_in_the_middle_of_a_log_line(
    line_for: Any, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, lines = Path.open, 0

    def full(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        nonlocal lines
        if self.name == "metrics.jsonl" and mode == "a":
            lines += 1
            if lines == 5:
                with opened(self, "a") as stream:
                    stream.write('{"step": 14, "lo')
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(self, mode, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        assert run(line_for(tmp_path)) == 2
    assert "metrics.jsonl: cannot be written (No space left on device)" in error_line(capsys)
    assert saved_step(tmp_path) == 12
    assert run([*line_for(tmp_path), "--resume"]) == 0
    assert_same_run(tmp_path, whole)


FULL_DISK = """
mount -t tmpfs -o size=600k tmpfs "$1" || exit 77
shift
out=$1
shift
"$@"
echo "exit $?"
ls "$out/state"
mount -o remount,size=50m "$(dirname "$out")"
"$@" --resume
echo "exit $?"
ls "$out"
"""


@pytest.mark.slow
def test_a_real_disk_that_is_full(line_for: Any, tmp_path: Path) -> None:
    out = tmp_path / "disk" / "out"
    out.parent.mkdir()
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh", out.parent, out]
    line = [*namespace, sys.executable, "-m", "mimref", *line_for(out)]
    try:
        done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=300)
    except OSError:
        pytest.skip("no unshare to mount a file system with")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no permission to mount a file system")
    first, _, rest = done.stdout.partition("exit 2\n")
    assert first == "", done.stdout + done.stderr
    assert "No space left on device; free some space and run again" in done.stderr
    assert rest.startswith("step") and ".tmp" not in rest
    assert "exit 0\n" in rest and "encoder.safetensors" in rest and "state" not in rest.partition("exit 0")[2]


# --- a loader process that dies


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "Killed"), (signal.SIGSEGV, "Segmentation fault")])
def test_a_dead_loader_process_is_reported_with_its_image(
    number: int,
    name: str,
    line_for: Any,
    data: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, reads = FileSource.read_reduced, 0

    def deadly(self: FileSource, index: int, reduce: Any) -> Decoded:
        nonlocal reads
        if get_worker_info() is not None:
            reads += self.files[index] == "b/003.png"
            if reads == 2:  # in the second epoch
                os.kill(os.getpid(), number)
                time.sleep(10)
        return read(self, index, reduce)

    line = [*line_for(tmp_path), "--set", "workers=1"]
    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "read_reduced", deadly)
        assert run(line) == 2
    assert error_line(capsys) == (
        f"mimref: error: a loader process died ({name}) at {data}/train/b/003.png, or just after it; the last saved "
        "state is kept: --resume continues, with fewer --workers if memory ran out"
    )
    assert run([*line, "--resume"]) == 0
    assert_same_run(tmp_path, whole)


def test_other_errors_are_no_dead_workers() -> None:
    with WorkerWatch() as watch:
        assert watch.death_behind(RuntimeError("shape mismatch")) is None
        assert watch.death_behind(OSError(errno.EIO, "Input/output error")) is None


def test_a_death_that_was_not_watched_is_told_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "DYING_S", 0.0)
    error = RuntimeError("DataLoader worker (pid(s) 1, 2) exited unexpectedly")
    assert WorkerWatch().death_behind(error) == f"a loader process died ({error})"
    assert WorkerWatch().death_behind(ConnectionResetError(errno.ECONNRESET, "Connection reset")) is None


# --- whole processes


@pytest.mark.slow
def test_killed_three_times_and_resumed_equals_uninterrupted(
    weights: Path, data: Path, tmp_path: Path, config: RefineConfig
) -> None:
    longer = REFINE | QUIET | {"encoder.weights": weights, "data.spec": data, "encoder_stage.epochs": 30, "workers": 1}
    line = arguments("refine", tmp_path / "killed", longer)
    killer = Killer(tmp_path / "killed", 1, start_s=5.0, training_s=1.0, phases=("start", "training", "saving"))
    assert run_killed(line, killer, 3) == 3
    assert run(arguments("refine", tmp_path / "whole", longer)) == 0
    assert differences(tmp_path / "killed", tmp_path / "whole") == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_two_signals_to_a_process(number: int, code: int, weights: Path, data: Path, tmp_path: Path) -> None:
    longer = REFINE | QUIET | {"encoder.weights": weights, "data.spec": data, "encoder_stage.epochs": 60, "workers": 2}
    out = tmp_path / "out"
    line = [sys.executable, "-m", "mimref", *arguments("refine", out, longer)]
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
    # The second may come after the last handler is gone; for a shell the code is the same.
    assert process.returncode in (code, -number), errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(("mimref: stopped at once; ", "mimref: saved at step "))
    assert run(["refine", "--resume", "--out", str(out), "--set", "workers=0"]) == 0
    assert run(arguments("refine", tmp_path / "whole", longer | {"workers": 0})) == 0
    assert_same_run(out, tmp_path / "whole")


def anonymous_mb() -> float:
    """Memory of this process that belongs to no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no RssAnon in /proc/self/status")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_long_run_does_not_grow(weights: Path, data: Path, tmp_path: Path) -> None:
    # 48 images in batches of 4 are 12 steps to an epoch, 2,016 in all.
    changes = {"batch_size": 4, "heads_stage__epochs": 1, "encoder_stage__epochs": 167, "encoder_stage__lr": 1e-4}
    changes |= {"monitor__log_every": 10, "monitor__knn_every_epochs": 10}
    used: dict[int, float] = {}

    class Watch(Watcher):
        def progress(self, label: str, done: int, total: int) -> None:
            if label.startswith("stage 2") and done % 100 == 0:
                used[done] = anonymous_mb()

    refine(refine_config(weights, data, **changes), tmp_path, listener=Watch())
    assert max(used) == 2000
    assert used[2000] - used[300] < 4.0, used
