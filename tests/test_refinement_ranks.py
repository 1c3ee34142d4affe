"""Whole refinements by two processes equal those by one, whichever starts and whichever continues them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mimref.distributed.group import lost_ranks_reported, own_rank
from mimref.errors import Interrupted, UserError
from mimref.refinement.run import refine
from tests.ranks import run_ranks
from tests.tiny import arguments, refine_config, results, tensors, write_labelled, write_weights

# Rates so small that AdamW's first updates, which are signs of gradients, cannot drive runs in float32 apart.
SETTINGS: dict[str, Any] = {
    "heads_stage__lr": 1e-6,
    "encoder_stage__lr": 1e-6,
    "monitor__log_every": 1,
    "heads_stage__warmup_epochs": 0.0,
    "encoder_stage__warmup_epochs": 0.0,
    "heads_stage__knn_every_epochs": 1,
}

RUNNING: dict[str, Any] = {"heads__norm": "running", "micro_batch": 4}


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def refine_all(weights: Path, data: Path, folder: Path) -> None:
    """Run on two ranks: whole batches, micro-batches, a running norm, and the start of a run that others continue."""
    refine(refine_config(weights, data, **SETTINGS), folder / "ranks")
    _rejoin(folder, "micro")
    refine(refine_config(weights, data, **SETTINGS, micro_batch=4), folder / "micro")
    _rejoin(folder, "running")
    refine(refine_config(weights, data, **SETTINGS, **RUNNING), folder / "running")
    _rejoin(folder, "beginning")
    interrupted(refine_config(weights, data, **SETTINGS), folder / "handed on", 5, resume=False)


def end(weights: Path, data: Path, out: Path) -> None:
    refine(refine_config(weights, data, **SETTINGS), out, resume=True)


def _rejoin(folder: Path, name: str, world: int = 2) -> None:
    """Join another process group, since a run leaves its own at the end."""
    import torch.distributed as dist

    rank = int(os.environ["TEST_RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}.store", rank=rank, world_size=world)


def interrupted(config: Any, out: Path, step: int, *, resume: bool) -> None:
    """Refine until a signal after `step` updates in total; in a process group, only the last rank receives it."""
    from mimref.training import run as stages

    write_log = stages.Stage.write_log

    def stop(self: Any) -> None:
        write_log(self)
        if self.first_step + self.step == step and os.environ.get("TEST_RANK", "1") == "1":
            signal.raise_signal(signal.SIGTERM)

    stages.Stage.write_log = stop  # type: ignore[method-assign]
    try:
        refine(config, out, resume=resume)
    except Interrupted:
        return
    finally:
        stages.Stage.write_log = write_log  # type: ignore[method-assign]
    raise AssertionError("the run was not interrupted")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs by one process, by two, and by two, one and two in turn."""
    folder = tmp_path_factory.mktemp("runs")
    weights, data = write_weights(folder / "base.safetensors"), write_labelled(folder / "data")
    config = refine_config(weights, data, **SETTINGS)
    refine(config, folder / "alone")
    refine(refine_config(weights, data, **SETTINGS, **RUNNING), folder / "running alone")
    run_ranks(refine_all, 2, folder / "group", weights, data, folder)
    interrupted(config, folder / "handed on", 14, resume=True)
    shutil.copytree(folder / "handed on", folder / "before the end")
    run_ranks(end, 2, folder / "end", weights, data, folder / "handed on")
    return folder


@pytest.mark.parametrize("name", ["ranks", "micro", "handed on", "running"])
def test_the_same_run(runs: Path, name: str) -> None:
    by_one = runs / ("running alone" if name == "running" else "alone")
    expected, found = log(by_one), log(runs / name)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for wanted, line in zip(expected, found, strict=True):
        assert line.keys() == wanted.keys()
        if "head_knn_top1" in line:
            # One of the 16 validation images may flip.
            assert line["head_knn_top1"] == pytest.approx(wanted["head_knn_top1"], abs=9), line["step"]
        if "loss" in line:
            assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-4), line["step"]
            assert line["head_loss"] == pytest.approx(wanted["head_loss"], rel=1e-4)
            assert line["nn_accuracy"] == pytest.approx(wanted["nn_accuracy"], abs=9)  # a neighbour may flip
    alone, other = tensors(by_one), tensors(runs / name)
    for key, weight in alone.items():
        torch.testing.assert_close(other[key], weight, rtol=0, atol=1e-4)
    assert results(runs / name)["bad_images"] == [] and not (runs / name / "state").exists()


@pytest.mark.slow
def test_four_ranks_end_what_two_have_begun(runs: Path) -> None:
    shutil.copytree(runs / "before the end", runs / "four")
    run_ranks(end, 4, runs / "group of four", runs / "base.safetensors", runs / "data", runs / "four")
    test_the_same_run(runs, "four")


def run_out_of_memory(weights: Path, data: Path, out: Path) -> str:
    """Return the error if rank 0 runs out of memory in its third step."""
    from mimref.refinement.method import Method

    forward_backward, steps = Method.forward_backward, 0

    def full(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3 and own_rank() == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward_backward(self, *args, **options)

    Method.forward_backward = full  # type: ignore[method-assign]
    try:
        with lost_ranks_reported("go on"):
            refine(refine_config(weights, data), out)
    except UserError as error:
        torch.distributed.destroy_process_group()
        return str(error)
    raise AssertionError("the run went on")


def test_a_rank_out_of_memory_says_so_at_once(runs: Path, tmp_path: Path) -> None:
    files = runs / "base.safetensors", runs / "data"
    first, second = run_ranks(run_out_of_memory, 2, tmp_path / "group", *files, tmp_path / "out")
    assert "6 images" in first and "--resume --micro-batch 3" in first
    assert "another process of this run has died" in second


@pytest.mark.slow
def test_torchrun_runs_the_command_line(runs: Path, tmp_path: Path) -> None:
    settings = {"encoder.weights": runs / "base.safetensors", "data.spec": runs / "data"}
    from tests.tiny import REFINE

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mimref"]
    line = arguments("refine", tmp_path / "out", REFINE | settings | {"evaluate.enabled": True, "evaluate.splits": 1})
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *line], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    # Only rank 0 prints.
    assert done.stdout.count("k-NN top-1") == 1 and done.stderr.count("encoder in ") == 1
    assert {row["model"] for row in results(tmp_path / "out")["metrics"]} == {"raw pixels", "base", "refined"}
    again = subprocess.run([*torchrun, *line], capture_output=True, text=True, timeout=300, env=environment)
    assert again.returncode != 0 and "holds a finished run" in again.stderr
