"""Sharded runs: continued by another number of processes, killed, and out of disk space."""

import errno
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from mimref.data.views import Photometric
from mimref.distributed.group import lost_ranks_reported, own_rank
from mimref.errors import UserError
from mimref.refinement import run as running
from mimref.refinement.alignment import Queue
from mimref.refinement.run import refine
from mimref.training import job as loop
from tests.faults import states
from tests.kill_many import _identity, _lines
from tests.ranks import run_ranks, start_processes
from tests.test_refinement_ranks import SETTINGS, _rejoin, interrupted, log
from tests.test_training_shards import failing
from tests.tiny import (
    EVALUATED,
    Watcher,
    assert_same_run,
    header,
    refine_config,
    results,
    tensors,
    write_labelled,
    write_weights,
)

needs_fsdp = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch shards on CUDA alone")


def whole_runs(weights: Path, data: Path, folder: Path) -> None:
    """Run sharded on two ranks: whole batches, micro-batches, and the beginning of a run that others continue."""
    refine(refine_config(weights, data, **SETTINGS, **EVALUATED, shard=True), folder / "sharded")
    _rejoin(folder, "micro")
    changes = {**SETTINGS, "micro_batch": 4, "activation_checkpointing": True, "shard": True}
    refine(refine_config(weights, data, **changes), folder / "micro")
    _rejoin(folder, "beginning")
    interrupted(refine_config(weights, data, **SETTINGS, shard=True), folder / "handed on", 5, resume=False)


def end(weights: Path, data: Path, out: Path) -> None:
    refine(refine_config(weights, data, **SETTINGS, shard=True), out, resume=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by one process, by two with sharded weights, and by two, one and two in turn."""
    folder = tmp_path_factory.mktemp("runs")
    weights, data = write_weights(folder / "base.safetensors"), write_labelled(folder / "data")
    config = refine_config(weights, data, **SETTINGS, **EVALUATED)
    refine(config, folder / "alone")
    run_ranks(whole_runs, 2, folder / "group", weights, data, folder)
    # A single process cannot shard: it reads shards, and writes plain states.
    interrupted(refine_config(weights, data, **SETTINGS, shard=True), folder / "handed on", 14, resume=True)
    assert states(folder / "handed on") == ["step0000000012.pt", "step0000000014.pt"]
    run_ranks(end, 2, folder / "end", weights, data, folder / "handed on")
    return folder


@needs_fsdp
@pytest.mark.parametrize("name", ["sharded", "micro", "handed on"])
def test_sharded_runs_equal_one_process(runs: Path, name: str) -> None:
    expected, found = log(runs / "alone"), log(runs / name)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for wanted, line in zip(expected, found, strict=True):
        assert line.keys() == wanted.keys()
        for key in ("loss", "feature_variance"):
            if key in line:
                assert line[key] == pytest.approx(wanted[key], rel=1e-4), line["step"]
    alone, other = tensors(runs / "alone"), tensors(runs / name)
    assert list(alone) == list(other)
    for key, weight in alone.items():
        torch.testing.assert_close(other[key], weight, rtol=0, atol=1e-4)
    heads, wanted = (torch.load(runs / each / "heads.pt", weights_only=True) for each in (name, "alone"))
    assert heads.keys() == wanted.keys() and heads["base"] == wanted["base"]
    assert list(heads["heads"]) == list(wanted["heads"])
    for key, tensor in wanted["heads"].items():
        torch.testing.assert_close(heads["heads"][key], tensor, rtol=0, atol=1e-4)
    assert not (runs / name / "state").exists()


@needs_fsdp
def test_sharded_runs_are_judged_and_written_as_others(runs: Path) -> None:
    def shape(out: Path) -> list[Any]:
        return [{key: value for key, value in row.items() if key != "value"} for row in results(out)["metrics"]]

    assert shape(runs / "sharded") == shape(runs / "alone") and len(shape(runs / "alone")) > 6
    named = [header(runs / name) for name in ("sharded", "alone")]
    for each in named:
        each.pop("metrics")
    assert named[0] == named[1]


def fail_in_the_background(weights: Path, data: Path, out: Path) -> tuple[str, int]:
    """Return the error if the disk of rank 1 is full in the second epoch, and the number of updates until then."""
    steps, write_data = 0, FileSystemWriter.write_data

    class Counted(Watcher):
        def progress(self, label: str, done: int, total: int) -> None:
            nonlocal steps
            steps += 1

    progress = loop.FiniteLoss.watch

    def watch(self: Any, loss: Tensor, step: int) -> None:
        nonlocal steps
        steps += 1
        time.sleep(0.05)  # longer than a write takes
        progress(self, loss, step)
        if steps == 5 and own_rank() == 1:
            failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), FileSystemWriter, "write_data")

    loop.FiniteLoss.watch = watch  # type: ignore[method-assign]
    config = refine_config(weights, data, shard=True, heads_stage__epochs=9, monitor__knn_every_epochs=0)
    try:
        with lost_ranks_reported("go on"):
            refine(config, out)
    except UserError as error:
        torch.distributed.destroy_process_group()
        return str(error), steps
    finally:
        loop.FiniteLoss.watch = progress  # type: ignore[method-assign]
        FileSystemWriter.write_data = write_data  # type: ignore[method-assign]
    raise AssertionError("the run went on")


@needs_fsdp
def test_a_full_disk_ends_a_run_on_all_ranks_within_steps(runs: Path, tmp_path: Path) -> None:
    given = runs / "base.safetensors", runs / "data", tmp_path / "out"
    told = run_ranks(fail_in_the_background, 2, tmp_path / "group", *given)
    for message, steps in told:
        assert "No space left on device" in message and message == told[0][0]
        # Saved after 8 updates, noticed before the next save after 12.
        assert 8 < steps < 12
    assert states(tmp_path / "out") == ["step0000000004"]


# --- kills


KILLED = {
    **SETTINGS,
    "heads_stage__lr": 1e-3,
    "encoder_stage__lr": 1e-3,
    "heads_stage__epochs": 2,
    "encoder_stage__epochs": 18,
    "monitor__knn_every_epochs": 0,
    "heads_stage__knn_every_epochs": 0,
}


def compute_in_double() -> None:
    """Train in double precision, where no rounding error becomes the sign of an update."""
    encoder, heads, queue, call = running.base_encoder, running.Heads, running.Queue, Photometric.__call__

    def double_queue(*args: Any, **options: Any) -> Queue:
        made = queue(*args, **options)
        made.rows_HQO = made.rows_HQO.double()
        return made

    running.base_encoder = lambda *args, **options: encoder(*args, **options).double()
    running.Heads = lambda *args: heads(*args).double()  # type: ignore[assignment,misc]
    running.Queue = double_queue  # type: ignore[assignment,misc]
    Photometric.__call__ = lambda self, *args: call(self, *args).double()  # type: ignore[method-assign]


def rank_of_a_run(
    rank: int, world: int, store: str, weights: Path, data: Path, out: Path, resume: bool, double: bool
) -> None:
    os.environ["TEST_RANK"] = str(rank)
    if double:
        compute_in_double()
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    loop.SAVE_EVERY_S, loop.SAVE_COST = 0.2, 0.0  # so that many kills hit a state
    with lost_ranks_reported("go on"):
        refine(refine_config(weights, data, **KILLED, shard=True), out, resume=resume)


def run_killed_ranks(folder: Path, out: Path, counts: list[int], kills: int, *, double: bool) -> list[str]:
    """Run to the end, on each number of processes in turn, killing all of them or one; return what the kills hit."""
    draw, hits, given = random.Random(1), list[str](), (folder / "base.safetensors", folder / "data", out)
    for attempt in range(50):
        world, log_file = counts[attempt % len(counts)], out / "metrics.jsonl"
        begun = log_file.exists() or (out / "state").exists()
        before = _identity(log_file)
        store = str(out.with_name(f"{out.name} {attempt}.store"))
        ranks = start_processes(rank_of_a_run, [(rank, world, store, *given, begun, double) for rank in range(world)])

        def alive(ranks: list[Any] = ranks) -> bool:
            return all(rank.is_alive() for rank in ranks)

        kill = len(hits) < kills
        steps, saving, one = draw.randrange(1, 7), draw.random() < 0.5, draw.random() < 0.3
        while kill and alive() and _identity(log_file) == before:
            time.sleep(0.002)
        first = _lines(out)
        while kill and alive() and _lines(out) < first + steps:
            time.sleep(0.002)
        while kill and saving and alive() and not list((out / "state").glob(".step*.tmp")):
            time.sleep(0.0005)
        if kill and alive():
            for rank in ranks[draw.randrange(world) :][:1] if one else ranks:
                rank.kill()
            hits.append(
                f"{'one' if one else 'all'} of {world}, {'saving' if saving else 'training'}, {_lines(out)} lines"
            )
        for rank in ranks:
            rank.join(60 if kill else 300)  # the remaining ones notice that one is gone
        hung = [rank for rank in ranks if rank.is_alive()]
        for rank in hung:
            rank.kill()
        assert not hung, hits
        if all(rank.exitcode == 0 for rank in ranks):
            return [*hits, f"finished on {world}"]
        assert kill, [rank.exitcode for rank in ranks]
    raise AssertionError(hits)


@needs_fsdp
@pytest.mark.slow
@pytest.mark.parametrize("counts", [[2], [4, 2, 1, 2, 3]], ids=["equal counts", "changing counts"])
def test_killed_ten_times_and_resumed(counts: list[int], runs: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    changing = len(counts) > 1
    run_killed_ranks(runs, whole, [2], 0, double=changing)
    hits = run_killed_ranks(runs, killed, counts, 10, double=changing)
    print(*hits, sep="\n")
    assert len(hits) == 11
    if not changing:
        assert_same_run(killed, whole)
        return
    base, found, expected = (
        load_file(each) for each in (runs / "base.safetensors", *(o / "encoder.safetensors" for o in (killed, whole)))
    )
    moved, differ = (
        torch.stack([(tensor - other[name]).norm() for name, tensor in expected.items()]).norm()
        for other in (base, found)
    )
    print(f"differs by {differ / moved:.1e} of what the weights have moved")
    assert differ < 1e-6 * moved and not (killed / "state").exists()
