"""The output folder of a run, its state on disk, and what signals do."""

import errno
import json
import os
import platform
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mimref.config.base import dump_config
from mimref.config.load import load_config
from mimref.encoders.checkpoints import Checkpoint
from mimref.errors import CheckpointError, ConfigError, Interrupted, OutputError
from mimref.refinement.config import RefineConfig
from mimref.training.folder import RunFolder, with_absolute_paths
from mimref.training.log import MetricsLog
from mimref.training.signals import StopSignal, stop_signal
from tests.faults import Mortal
from tests.tiny import Killed

CONFIG = RefineConfig()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def started(path: Path) -> RunFolder:
    """Return the folder of a run that has saved a state."""
    folder = RunFolder(path)
    folder.prepare(CONFIG, resume=False, force=False)
    folder.save_state(lambda: {"step": 3, "weights": torch.arange(4.0)})
    return folder


# --- who may write


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "a")
    folder.check(resume=False, force=False)
    assert not (tmp_path / "runs").exists()
    folder.prepare(CONFIG, resume=False, force=False)
    assert files(folder.path) == {"config.toml", "state", "state/origin.json"}
    assert folder.unfinished and not folder.finished
    loaded = load_config(RefineConfig, str(folder.path / "config.toml"))
    assert loaded.model_copy(update={"preset": None}) == CONFIG


@pytest.mark.parametrize(
    ("held", "resume", "message"),
    [
        ("results.json", False, "finished run.*--out.*--force"),
        ("state/step0000000003.pt", False, "unfinished run.*--resume.*--force"),
        ("metrics.jsonl", False, "unfinished run"),
        ("encoder.safetensors", False, "encoder.safetensors.*--out.*--force"),
        ("config.toml", False, "unfinished run"),
        ("notes.txt", True, "no run to resume.*--resume"),
        ("state/probe.pt", True, r"no settings to resume.*config\.toml.*--out.*--force"),
    ],
)
def test_occupied_folders_are_refused(held: str, resume: bool, message: str, tmp_path: Path) -> None:
    (tmp_path / held).parent.mkdir(exist_ok=True)
    (tmp_path / held).write_text("")
    with pytest.raises(OutputError, match=message):
        RunFolder(tmp_path).check(resume=resume, force=False)
    if not resume:
        RunFolder(tmp_path).check(resume=False, force=True)


def test_a_folder_with_other_files_is_free_and_a_missing_one_not_resumable(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    RunFolder(tmp_path).check(resume=False, force=False)
    with pytest.raises(OutputError, match="no run to resume"):
        RunFolder(tmp_path / "missing").check(resume=True, force=False)
    with pytest.raises(OutputError, match=r"--resume .*--force"):
        RunFolder(tmp_path).check(resume=True, force=True)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=r"file is a file.*--out"):
            RunFolder(path).check(resume=False, force=False)
    with pytest.raises(OutputError, match=r"below: cannot be written \(Not a directory\)"):
        RunFolder(tmp_path / "file" / "below").prepare(CONFIG, resume=False, force=False)
    with pytest.raises(OutputError, match="File name too long"):
        long = RunFolder(tmp_path / ("x" * 300))
        long.check(resume=False, force=False)
        long.prepare(CONFIG, resume=False, force=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        RunFolder(tmp_path / "out").prepare(CONFIG, resume=False, force=False)


def test_force_removes_our_files_alone(tmp_path: Path) -> None:
    folder = started(tmp_path)
    ours = ("results.json", "results.csv", "encoder.safetensors", "metrics.jsonl", "heads.pt", "exhibits.json")
    for name in (*ours, "notes.txt", "encoder_old.safetensors"):
        (tmp_path / name).write_text("old")
    folder.prepare(CONFIG, resume=False, force=True)
    assert files(tmp_path) == {"config.toml", "state", "state/origin.json", "notes.txt", "encoder_old.safetensors"}


def test_halves_of_files_are_removed(tmp_path: Path) -> None:
    folder = started(tmp_path)
    for name in ("state/.step0000000003.pt.0a1b.tmp", ".encoder.safetensors.0a1b.tmp", ".mine.tmp"):
        (tmp_path / name).write_text("half")
    folder.prepare(CONFIG, resume=True, force=False)
    assert files(tmp_path) == {"config.toml", "state", "state/origin.json", "state/step0000000003.pt", ".mine.tmp"}


# --- settings of a resumed run


def changed(**sections: Any) -> RefineConfig:
    table = CONFIG.model_dump()
    for section, values in sections.items():
        table[section] = table[section] | values if isinstance(values, dict) else values
    return RefineConfig.model_validate(table)


def test_resume_names_the_setting_that_changed(tmp_path: Path) -> None:
    folder = started(tmp_path)
    with pytest.raises(ConfigError) as caught:
        folder.prepare(changed(heads={"temperature": 0.3}), resume=True, force=False)
    for part in (str(tmp_path), "heads.temperature", "0.2", "0.3", "--out"):
        assert part in str(caught.value)
    free = changed(
        workers=3,
        preset="x",
        device="cpu",
        data={"max_bad": 7},
        evaluate={"splits": 9},
        monitor={"log_every": 1},
        heads_stage={"knn_every_epochs": 3},
    )
    folder.prepare(free, resume=True, force=False)
    assert load_config(RefineConfig, str(tmp_path / "config.toml")) == free


def test_resume_needs_the_weights_of_the_start(tmp_path: Path) -> None:
    folder, checkpoint = RunFolder(tmp_path), Checkpoint(Path("base.pt"), {"w": torch.zeros(3)})
    folder.prepare(CONFIG, checkpoint=checkpoint, resume=False, force=False)
    moved = Checkpoint(Path("moved.pt"), {"w": torch.zeros(3)})
    folder.prepare(CONFIG, checkpoint=moved, resume=True, force=False)
    other = Checkpoint(Path("base.pt"), {"w": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"cannot resume .*: base\.pt holds other weights .*--out"):
        folder.prepare(CONFIG, checkpoint=other, resume=True, force=False)
    # Older versions recorded none.
    origin = tmp_path / "state" / "origin.json"
    origin.write_text(json.dumps({"preset": None, "derived": []}))
    folder.prepare(CONFIG, checkpoint=other, resume=True, force=False)
    assert json.loads(origin.read_text())["weights"] == other.fingerprint


def test_a_run_killed_at_its_start_can_be_resumed_with_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    for kill_after in (0, 1):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "replace", Mortal(kill_after)(os.replace))
            folder.prepare(CONFIG, resume=False, force=False)
        assert folder.unfinished == (tmp_path / "config.toml").exists() == bool(kill_after)
        folder.check(resume=folder.unfinished, force=False)


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    folder = started(tmp_path)
    (tmp_path / "config.toml").write_text("seed = \n")
    with pytest.raises(ConfigError, match=r"config\.toml.* is not valid TOML"):
        folder.prepare(CONFIG, resume=True, force=False)


def test_with_absolute_paths_settings_have_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("images", "digits", "heads", "root"):
        (tmp_path / name).mkdir()
    (tmp_path / "w.pt").write_text("")
    overrides = {
        "data.spec": "images",
        "data.root": "root",
        "encoder.weights": "w.pt",
        "stage": "encoder",
        "heads_from": "heads",
    }
    config = with_absolute_paths(load_config(RefineConfig, None, overrides))
    assert (config.data.spec, config.data.root) == (str(tmp_path / "images"), str(tmp_path / "root"))
    assert (config.encoder.weights, config.heads_from) == (str(tmp_path / "w.pt"), str(tmp_path / "heads"))
    assert with_absolute_paths(config) == config
    # Words with a special meaning stay words, whatever files lie beside them.
    words = with_absolute_paths(
        load_config(RefineConfig, None, {"data.spec": "digits", "encoder.weights": "quickstart"})
    )
    assert (words.data.spec, words.encoder.weights) == ("digits", "quickstart")
    named = load_config(RefineConfig, None, {"data.spec": "torchvision:MNIST"})
    assert with_absolute_paths(named).data.spec == "torchvision:MNIST"


def test_unset_settings_survive_the_file() -> None:
    # TOML has no null: a setting that is unset in the file must have None as its default.
    assert not any(value in dump_config(CONFIG) for value in ("None", "= none", "null"))
    nulls = [key for key, value in flat(CONFIG.model_dump()).items() if value is None]
    assert nulls and all(flat(RefineConfig().model_dump())[key] is None for key in nulls)


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        name: each
        for key, value in table.items()
        for name, each in (flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}).items()
    }


# --- the state


def test_the_state_comes_back(tmp_path: Path) -> None:
    folder = started(tmp_path)
    state = folder.load_state()
    assert state is not None and state["step"] == 3 and torch.equal(state["weights"], torch.arange(4.0))
    folder.drop_state()
    assert folder.load_state() is None


@pytest.mark.parametrize("content", [b"", b"damaged", b"PK\x03\x04 cut off"])
def test_a_damaged_state_is_one_line(content: bytes, tmp_path: Path) -> None:
    folder = started(tmp_path)
    (tmp_path / "state" / "step0000000003.pt").write_bytes(content)
    with pytest.raises(OutputError, match=r"damaged state.*--force"):
        folder.load_state()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_state_that_cannot_be_written_leaves_the_previous_one(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = started(tmp_path)

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(OutputError, match=f"cannot write .*step0000000004.pt: {os.strerror(code)}"):
            folder.save_state(lambda: {"step": 4})
    assert (folder.load_state() or {})["step"] == 3
    assert files(tmp_path) == {"config.toml", "state", "state/origin.json", "state/step0000000003.pt"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB; skips where the tests may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no permission to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_line_and_leaves_the_previous_state(small_disk: Path) -> None:
    folder = started(small_disk / "out")
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        folder.save_state(lambda: {"step": 4, "weights": torch.zeros(1_000_000)})
    assert (folder.load_state() or {})["step"] == 3
    with pytest.raises(OutputError, match=r"metrics\.jsonl.*No space left on device"):
        log = MetricsLog(small_disk / "out" / "metrics.jsonl")
        for _ in range(100):
            log.write({"filler": "x" * 100_000})


def test_an_interruption_is_not_a_damaged_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = started(tmp_path)

    def stop(*_: Any, **__: Any) -> None:
        raise Interrupted(signal.SIGTERM, "stopped")

    monkeypatch.setattr(torch, "load", stop)
    with pytest.raises(Interrupted):
        folder.load_state()


# --- signals


def test_signals_are_deferred_while_asked_and_end_other_work_at_once() -> None:
    stop = StopSignal()
    with pytest.raises(Interrupted, match="stopped at once"):
        stop.receive(signal.SIGTERM)
    with stop.deferred():
        stop.receive(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        with pytest.raises(Interrupted) as caught:
            stop.receive(signal.SIGINT)
        assert caught.value.signum == signal.SIGINT


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), stop_signal() as stop, stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_runs_outside_the_main_thread_do_not_catch_signals() -> None:
    entered = []

    def work() -> None:
        with stop_signal() as stop:
            entered.append(stop.number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [None]


def test_only_the_same_launch_goes_on_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    folder.prepare(load_config(RefineConfig, None, {}), resume=False, force=False)
    assert not folder.continues_launch()  # torchrun has not started this process again
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert folder.continues_launch()
    here = os.getppid()
    for run_id, node, process, same in (
        ("none", platform.node(), here + 1, False),
        ("none", "another", here, False),
        ("job", "another", here + 1, True),
        ("other", "another", here, False),
        ("job", platform.node(), here + 1, False),
    ):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none" if run_id == "none" else "job")
        (tmp_path / "state" / "launch.json").write_text(json.dumps([run_id, node, process]))
        assert folder.continues_launch() is same, (run_id, node, process)
    for damaged in ("", "[]", "{", "3"):
        (tmp_path / "state" / "launch.json").write_text(damaged)
        assert not folder.continues_launch()
    shutil.rmtree(tmp_path / "state")
    assert not folder.continues_launch()
