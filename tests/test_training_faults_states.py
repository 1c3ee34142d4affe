"""What a run survives: damaged states, and kills while a state is saved."""

import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mimref import files
from mimref import locks as lock
from mimref.errors import Interrupted, OutputError
from mimref.pretraining.run import pretrain
from mimref.refinement.config import RefineConfig
from mimref.refinement.run import refine
from mimref.training import job as loop
from mimref.training.folder import RunFolder
from tests.faults import Mortal, TinyRun, make_tiny_run, states
from tests.tiny import Killed, Watcher, assert_same_run, kill_at, pretrain_config, saved_step, signal_at

CONFIG = RefineConfig()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.1)


# --- damaged states


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.arange(20.0) + step, "rows": [("a", 1.5)]}


def saved(path: Path, *steps: int) -> RunFolder:
    """Return a folder in which a run has saved states at these steps."""
    folder = RunFolder(path)
    folder.prepare(CONFIG, resume=False, force=False)
    for step in steps:
        folder.save_state(partial(state, step))
    return folder


def cut(file: Path, share: float) -> None:
    os.truncate(file, int(share * file.stat().st_size))


def flip(file: Path, at: int, bit: int = 0) -> None:
    """Change one bit of byte `at` of the file; a negative `at` counts from the end."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def weights_at(file: Path) -> int:
    """Return the offset at which the weights of a state of step 8 begin in its file."""
    return file.read_bytes().index(torch.arange(20.0).add(8).numpy().tobytes())


def test_the_newest_two_states_stay(tmp_path: Path) -> None:
    folder = saved(tmp_path, 3)
    assert states(tmp_path) == ["step0000000003.pt"]
    for step in (5, 8, 12):
        folder.save_state(partial(state, step))
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
    assert len(heard.warnings) == 1 and str(newest) in heard.warnings[0] and "step 4" in heard.warnings[0]
    cut(tmp_path / "state" / "step0000000004.pt", 0.7)
    with pytest.raises(OutputError) as caught:
        folder.load_state()
    assert str(caught.value).startswith(f"{newest}: damaged state, and so is the one before")


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


@pytest.mark.parametrize("stop", [9, 11])  # the damaged state lies within an epoch, or at its end
def test_a_run_goes_on_from_the_state_before(stop: int, tiny: TinyRun, tmp_path: Path) -> None:
    for attempt in (False, True):
        with pytest.raises(Interrupted):
            refine(tiny.config, tmp_path, resume=attempt, listener=signal_at(stop + attempt))
    newest = tmp_path / "state" / f"step{stop + 1:010}.pt"
    flip(newest, newest.stat().st_size // 2)
    again = Watcher()
    refine(tiny.config, tmp_path, resume=True, listener=again)
    (warning,) = [line for line in again.warnings if "damaged" in line]
    assert str(newest) in warning and f"step {stop}" in warning
    assert_same_run(tmp_path, tiny.whole)
    assert not (tmp_path / "state").exists()


# --- killed while saving


def calls_of_saving(path: Path, monkeypatch: pytest.MonkeyPatch, kill_after: int | None) -> int:
    """Save a state and die after `kill_after` calls to the file system; return the number of calls."""
    counted = Mortal(kill_after)
    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(files.os, name, counted(getattr(os, name)))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(torch, "save", counted(torch.save))
        RunFolder(path).save_state(lambda: state(12))
    return counted.calls


@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_at_any_moment_of_saving_leaves_a_good_state(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(name: str) -> Path:
        # Either the newest state is damaged and the run continues from step 4, or it continues from step 8.
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


def test_states_are_saved_by_the_clock_too(tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(loop, "SAVE_COST", 0.0)
    for attempt, step in enumerate((3, 7, 11, 18)):
        with pytest.raises(Killed):
            refine(tiny.config, tmp_path / "out", resume=attempt > 0, listener=kill_at("step", step))
        assert saved_step(tmp_path / "out") == step - 1
    refine(tiny.config, tmp_path / "out", resume=True)
    assert_same_run(tmp_path / "out", tiny.whole)
    pretraining = pretrain_config(tiny.data)
    with pytest.raises(Killed):
        pretrain(pretraining, tmp_path / "mae", listener=kill_at("step", 6))
    assert saved_step(tmp_path / "mae") == 5
    pretrain(pretraining, tmp_path / "mae", resume=True)
    pretrain(pretraining, tmp_path / "mae-whole")
    assert_same_run(tmp_path / "mae", tmp_path / "mae-whole")
