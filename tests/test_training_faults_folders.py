"""What a run survives: another run in its folder, folders that cannot be written, and full disks."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from mimref import files
from mimref import locks as lock
from mimref.cli import run
from mimref.errors import OutputError
from mimref.refinement.run import refine
from mimref.training.folder import RunFolder
from tests.faults import TinyRun, error_line, make_tiny_run, states
from tests.tiny import Killed, assert_same_run, refine_config, saved_step


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.1)


# --- two runs in one folder

HOLDER = """
import os, sys, time
from pathlib import Path
from mimref.locks import folder_lock
with folder_lock(Path(sys.argv[1])):
    if os.fork() == 0:
        time.sleep(float(sys.argv[2]))  # as a loader process, which notices a while after the run has been killed
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds `tmp_path`, and has a child."""
    line = [sys.executable, "-c", HOLDER, str(tmp_path), "3"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.stdout.close()  # its child may hold the other end for another second or two
    process.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("option", ["", "--resume", "--force"])
def test_two_runs_in_one_folder(
    option: str,
    holder: subprocess.Popen[str],
    tiny: TinyRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = [*tiny.line(tmp_path), *([option] if option else [])]
    if option:
        (tmp_path / "state").mkdir()
        shutil.copy(tiny.whole / "config.toml", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run(line) == 2
    message = error_line(capsys)
    assert all(part in message for part in (f"{tmp_path}: another process", "--out", f"{tmp_path}/.lock"))
    assert sorted(tmp_path.rglob("*")) == before
    holder.kill()
    holder.wait()
    monkeypatch.setattr(lock, "PATIENCE_S", 8.0)
    assert run(line) == 0
    assert not (tmp_path / ".lock").exists()


def test_a_run_that_another_process_has_finished_meanwhile(tiny: TinyRun) -> None:
    before = {file: file.read_bytes() for file in tiny.whole.iterdir()}
    with (
        pytest.raises(OutputError, match="just finished this run; --resume"),
        RunFolder(tiny.whole).locked(resume=True, force=False),
    ):
        pass
    with pytest.raises(OutputError, match="finished run"), RunFolder(tiny.whole).locked(resume=False, force=False):
        pass
    assert {file: file.read_bytes() for file in tiny.whole.iterdir()} == before


def test_a_run_killed_with_its_results_written_leaves_no_state(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: RunFolder) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "drop_state", killed)
        refine(tiny.config, tmp_path)
    assert len(states(tmp_path)) == 2
    refine(tiny.config, tmp_path, resume=True)
    assert not (tmp_path / "state").exists()


def test_a_run_refused_for_its_settings_leaves_no_folder(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"heads\.blocks"):
        refine(refine_config(tiny.weights, tiny.data, heads__blocks="9"), tmp_path / "runs" / "a")
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written_is_one_line_and_a_finished_run_there_is_shown(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(FileLock, "acquire", read_only)
    assert refine(tiny.config, tiny.whole, resume=True).elapsed_s > 0
    with pytest.raises(OutputError, match=r"out: cannot be written \(Read-only file system\).*--out"):
        refine(tiny.config, tmp_path / "out")


# --- disk full


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_is_full_while_saving_keeps_the_earlier_states(
    name: str, tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
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
        assert run(tiny.line(tmp_path)) == 2
    file = tmp_path / "state" / "step0000000016.pt"
    assert f"{file}: No space left on device" in error_line(capsys)
    assert states(tmp_path) == ["step0000000008.pt", "step0000000012.pt"]
    assert run([*tiny.line(tmp_path), "--resume"]) == 0
    assert_same_run(tmp_path, tiny.whole)


def test_a_disk_that_is_full_in_the_middle_of_a_log_line(
    tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
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
        assert run(tiny.line(tmp_path)) == 2
    assert "metrics.jsonl: cannot be written (No space left on device)" in error_line(capsys)
    assert saved_step(tmp_path) == 12
    assert run([*tiny.line(tmp_path), "--resume"]) == 0
    assert_same_run(tmp_path, tiny.whole)


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
def test_a_real_disk_that_is_full(tiny: TinyRun, tmp_path: Path) -> None:
    out = tmp_path / "disk" / "out"
    out.parent.mkdir()
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh", out.parent, out]
    line = [*namespace, sys.executable, "-m", "mimref", *tiny.line(out)]
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
