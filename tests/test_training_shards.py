"""States that every rank of a sharded run writes in the background."""

import errno
import json
import os
import pickle
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.tensor import Shard, distribute_tensor

from mimref import files
from mimref.distributed.group import own_rank
from mimref.distributed.sharding import device_mesh, gathered, is_sharded, local
from mimref.errors import OutputError
from mimref.refinement.config import RefineConfig
from mimref.training import saver as saving
from mimref.training import shards
from mimref.training.folder import RunFolder
from mimref.training.saver import StateSaver
from tests.faults import Mortal, states
from tests.ranks import run_ranks
from tests.steps import CPU
from tests.tiny import Killed, Watcher

CONFIG = RefineConfig()


def weights_of(step: int) -> dict[str, Tensor]:
    """Return weights whose rows are not divisible by the ranks: some ranks have fewer, or none."""
    return {
        "five": torch.arange(20.0).view(5, 4) + step,
        "one": torch.full((1, 3), float(step), dtype=torch.float64),
        "half": torch.arange(6).to(torch.bfloat16) + step,
    }


def state(step: int) -> dict[str, Any]:
    mesh = device_mesh(CPU)
    sharded = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in weights_of(step).items()}
    moments = {place: {"step": torch.tensor(1.0), "exp_avg": tensor} for place, tensor in enumerate(sharded.values())}
    plain = {"step": step, "rows": [("a", 1.5)], "queue": {"rows": torch.arange(3.0) + step}}
    return {**plain, "encoder": sharded, "optimizer": {"state": moments, "param_groups": [{"lr": 0.5}]}}


def assert_state(found: dict[str, Any] | None, step: int) -> None:
    """Check a state that ranks or a single process have read."""
    assert found is not None and (found["step"], found["rows"]) == (step, [("a", 1.5)])
    assert torch.equal(found["queue"]["rows"], torch.arange(3.0) + step)
    assert found["optimizer"]["param_groups"] == [{"lr": 0.5}]
    for place, (name, expected) in enumerate(weights_of(step).items()):
        moments = found["optimizer"]["state"][place]
        for tensor in (found["encoder"][name], moments["exp_avg"]):
            assert tensor.dtype == expected.dtype and torch.equal(gathered(tensor), expected)
        assert moments["step"] == 1


def failing(error: Exception, where: Any, name: str) -> Callable[[], None]:
    """Let a function fail on this rank; return a function that undoes it."""
    before = getattr(where, name)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    setattr(where, name, fail)
    return lambda: setattr(where, name, before)


def save_and_fail(path: Path) -> dict[str, Any]:
    """Save states of steps 4, 8 and 13; in between, those of 9 to 12 fail, each on one rank alone."""
    folder = RunFolder(path)
    folder.prepare(CONFIG, resume=False, force=False)
    saver = StateSaver(path / "state", folder.publish)
    live = state(4)
    saver.save(live)
    local(live["encoder"]["five"]).zero_()  # training continues
    live["queue"]["rows"].zero_()
    saver.save(state(8))
    saver.wait()
    if own_rank() == 0:
        shutil.copytree(path, path.with_name("copied"))
    full, damaged = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("unexpected pos 64 vs 0")
    told, noticed = [], []
    for step, rank, error, where, name in (
        (9, 1, full, FileSystemWriter, "write_data"),
        (10, 0, full, shards, "write_state"),
        (11, 1, damaged, FileSystemWriter, "write_data"),
        (12, 0, full, saving, "write_manifest"),
    ):
        undo = failing(error, where, name) if own_rank() == rank else lambda: None
        saver.save(state(step))
        deadline = time.monotonic() + 30
        while not saver.failed and time.monotonic() < deadline:
            time.sleep(0.01)
        noticed.append(saver.failed)
        try:
            saver.wait()
        except OutputError as problem:
            told.append(str(problem))
        undo()
        assert_state(folder.load_state(mesh=device_mesh(CPU)), 8)
    before = states(path) if own_rank() == 0 else []
    torch.distributed.barrier()
    saver.save(state(13))
    saver.wait()
    found = folder.load_state(mesh=device_mesh(CPU))
    assert_state(found, 13)
    assert found is not None and is_sharded(found["encoder"]["five"])
    return {"told": told, "noticed": noticed, "states": before, "rows": len(local(found["encoder"]["five"]))}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A folder with the states of steps 4 and 8, and the results of two ranks that continued from there."""
    folder = tmp_path_factory.mktemp("states")
    return folder / "copied", run_ranks(save_and_fail, 2, folder / "ranks", folder / "run")


def test_what_one_rank_cannot_write_fails_on_all_and_leaves_the_states_before(
    written: tuple[Path, list[dict[str, Any]]],
) -> None:
    path, ranks = written
    assert [found["rows"] for found in ranks] == [3, 2]
    for found in ranks:
        assert found["noticed"] == [True] * 4
        assert found["told"] == ranks[0]["told"]
        for message in (found["told"][place] for place in (0, 1, 3)):
            assert message.startswith("cannot write ") and "No space left on device" in message
        assert "unexpected pos" in found["told"][2]
    assert ranks[0]["states"] == ["step0000000004", "step0000000008"]
    assert states(path.with_name("run")) == ["step0000000008", "step0000000013"]


def read_all(path: Path) -> list[int]:
    found = RunFolder(path).load_state(mesh=device_mesh(CPU))
    assert_state(found, 8)
    assert_state(RunFolder(path).load_state(), 8)  # as a run without shards reads it
    assert found is not None
    return [len(local(found["encoder"][name])) for name in ("five", "one")]


def test_any_number_of_processes_reads_a_state(written: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    path, _ = written
    assert_state(RunFolder(path).load_state(), 8)
    assert run_ranks(read_all, 4, tmp_path, path) == [[2, 1], [2, 0], [1, 0], [0, 0]]


NAMES = (".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "rest.pt")


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_shard_is_noticed_and_the_state_before_is_used(
    name: str, written: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    path, bits = tmp_path / "out", random.Random(0)
    for damage in ("cut", "flip", "empty", "missing"):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(written[0], path)
        assert sorted(file.name for file in (path / "state" / "step0000000008").iterdir()) == sorted(NAMES)
        for step in (8, 4):
            file = path / "state" / f"step{step:010}" / name
            content = bytearray(file.read_bytes())
            if damage == "flip":
                # JSON may be written in several ways; its digits may not.
                places = [at for at, byte in enumerate(content) if name != "manifest.json" or chr(byte).isdigit()]
                at = bits.choice(places)
                content[at] ^= 1
            file.write_bytes({"cut": content[:-9], "flip": content, "empty": b"", "missing": b""}[damage])
            if damage == "missing":
                file.unlink()
            if step == 8:
                heard = Watcher()
                assert_state(RunFolder(path).load_state(heard), 4)
                assert len(heard.warnings) == 1 and "0008: damaged state" in heard.warnings[0]
        with pytest.raises(OutputError, match="0008: damaged state, and so is the one before"):
            RunFolder(path).load_state()


def test_a_folder_that_processes_do_not_share_is_refused(
    written: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder = shutil.copytree(written[0] / "state" / "step0000000008", tmp_path / "new")
    own = {name: tuple(entry) for name, entry in json.loads((folder / "manifest.json").read_text()).items()}
    shards.write_manifest(folder, [own])
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(OutputError, match=r"lacks __1_0\.distcp, .* --out that all processes share"):
        shards.write_manifest(folder, [own])


def test_an_index_that_names_code_is_not_run(written: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run"),)

    shutil.copytree(written[0], tmp_path / "out")
    folder = tmp_path / "out" / "state" / "step0000000008"
    (folder / ".metadata").write_bytes(pickle.dumps(Bad()))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[".metadata"] = shards._checksum(folder / ".metadata")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(OutputError, match="cannot be read"):
        RunFolder(tmp_path / "out").load_state()
    assert not (tmp_path / "run").exists()


def test_a_kill_at_any_moment_of_publishing_leaves_a_good_state(
    written: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(name: str, step: int) -> Path:
        shutil.copytree(written[0], tmp_path / name)
        place = tmp_path / name / "state"
        newest = place / f".step{step:010}.shards.tmp"
        shutil.copytree(place / "step0000000008", newest)
        return newest

    def publish(newest: Path, step: int, kill_after: int | None) -> int:
        counted = Mortal(kill_after)
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", counted(os.replace))
            patch.setattr(Path, "rename", counted(Path.rename))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            RunFolder(newest.parents[1]).publish(newest, step)
        return counted.calls

    # A state of a step that was saved before replaces the earlier one.
    for step, expected in ((12, ["step0000000008", "step0000000012"]), (8, ["step0000000004", "step0000000008"])):
        whole = prepared(f"whole {step}", step)
        calls = publish(whole, step, None)
        assert calls >= 3 and states(whole.parents[1]) == expected
        for number in range(calls):
            newest = prepared(f"{step} {number}", step)
            with pytest.raises(Killed):
                publish(newest, step, number)
            out = newest.parents[1]
            found = RunFolder(out).load_state()
            assert found is not None and found["step"] in (4, 8)
            RunFolder(out).prepare(CONFIG, resume=True, force=False)
            assert not list(out.rglob("*.tmp"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB; skips where the tests may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(path: Path) -> list[str]:
    """Save growing states until the disk is full; return the errors."""
    folder, told = RunFolder(path), list[str]()
    folder.prepare(CONFIG, resume=False, force=False)
    saver = StateSaver(path / "state", folder.publish)
    for step, rows in ((4, 10_000), (8, 1_000_000)):
        large = distribute_tensor(torch.zeros(rows, 1), device_mesh(CPU), [Shard(0)])
        try:
            saver.save(state(step) | {"large": large})
            saver.wait()
        except OutputError as error:
            told.append(str(error))
    assert_state(folder.load_state(mesh=device_mesh(CPU)), 4)
    return told


@pytest.mark.slow
def test_a_disk_that_is_really_full(small_disk: Path, tmp_path: Path) -> None:
    for told in run_ranks(fill, 2, tmp_path / "ranks", small_disk / "out"):
        assert len(told) == 1 and "No space left on device; free some space" in told[0]
    assert states(small_disk / "out") == ["step0000000004"]
