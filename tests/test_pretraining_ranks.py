"""Whole pre-training runs by two processes equal those by one, whichever starts and whichever continues them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimref.config.base import DataConfig
from mimref.data.open import open_source
from mimref.distributed.group import own_rank
from mimref.draws import permutation
from mimref.errors import DataError, Interrupted
from mimref.pretraining.config import PretrainConfig
from mimref.pretraining.run import Pretraining, pretrain
from tests.ranks import run_ranks
from tests.tiny import (
    PRETRAIN,
    arguments,
    pretrain_config,
    results,
    signal_at,
    simmim_config,
    tensors,
    write_images,
    write_labelled,
)

# A rate so small that AdamW's first updates, which are signs of gradients, cannot drive runs in float32 apart.
SETTINGS: dict[str, Any] = {"mae__lr": 1e-5, "mae__warmup_epochs": 0.0, "monitor__log_every": 1}
# Each of two ranks has one image of a batch; an unreadable one leaves a rank without images.
PAIRS: dict[str, Any] = SETTINGS | {"batch_size": 2, "mae__epochs": 1, "data__max_bad": 1}


def write_data(folder: Path) -> None:
    write_labelled(folder / "data")
    write_images(folder / "pairs", per_class=6, split="train")
    (folder / "pairs" / "train" / "b" / "002.png").write_bytes(b"no image")


def watched(folder: Path, name: str, config: PretrainConfig) -> list[list[Tensor]]:
    """Pre-train on the images `name`; return the gradients of every update."""
    found: list[list[Tensor]] = []
    update = Pretraining.update

    def keeping(self: Pretraining, batch: Any) -> None:
        if not found:

            def keep(*_: object) -> None:
                trained = [weight for group in self.optimizer.param_groups for weight in group["params"]]
                found.append([weight.grad.clone() for weight in trained])

            self.optimizer.register_step_pre_hook(keep)
            found.append([])
        update(self, batch)

    Pretraining.update = keeping  # type: ignore[method-assign]
    try:
        pretrain(config, folder / f"{name} {os.environ.get('TEST_RANKS', 'alone')}")
    finally:
        Pretraining.update = update  # type: ignore[method-assign]
    return found[1:]


def pretrain_pairs(folder: Path) -> list[list[Tensor]]:
    return watched(folder, "pairs", pretrain_config(folder / "pairs", **PAIRS))


def pretrain_whole(folder: Path) -> list[list[Tensor]]:
    return watched(folder, "data", pretrain_config(folder / "data", **SETTINGS))


def pretrain_simmim(folder: Path) -> list[list[Tensor]]:
    """Pre-train with mask tokens in the encoder, again with a rank without images."""
    settings = {key.replace("mae__", "simmim__"): value for key, value in PAIRS.items()}
    return watched(folder, "simmim", simmim_config(folder / "pairs", **settings))


def interrupted(folder: Path, step: int, *, resume: bool) -> None:
    """Pre-train until a signal after `step` updates; with several ranks, only rank 0 receives it."""
    with pytest.raises(Interrupted):
        pretrain(
            pretrain_config(folder / "data", **SETTINGS), folder / "handed on", resume=resume, listener=signal_at(step)
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and the runs on them."""
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "run"),
    [("data", pretrain_whole), ("pairs", pretrain_pairs), ("simmim", pretrain_simmim)],
    ids=["whole", "a rank without images", "mask tokens in the encoder"],
)
def test_two_ranks_equal_one(name: str, run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run(folder)
    monkeypatch.setenv("TEST_RANKS", "together")
    ranks = run_ranks(run, 2, folder / f"{name} group", folder)
    assert len(alone) == {"data": 12, "pairs": 6, "simmim": 6}[name]
    for together in ranks:
        for expected, found in zip(alone, together, strict=True):
            whole = torch.cat([gradient.flatten() for gradient in expected]).norm()
            for wanted, gradient in zip(expected, found, strict=True):
                assert (gradient - wanted).norm() < 1e-4 * whole
    assert_close_runs(folder / f"{name} together", folder / f"{name} alone")


def assert_close_runs(out: Path, other: Path) -> None:
    found, expected = (
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()] for each in (out, other)
    )
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        for key in wanted.keys() - {"stage"}:
            assert line[key] == pytest.approx(wanted[key], rel=1e-4), (key, wanted["step"])
    for key, weight in tensors(other).items():
        torch.testing.assert_close(tensors(out)[key], weight, rtol=0, atol=1e-5)
    assert results(out)["bad_images"] == results(other)["bad_images"] and not (out / "state").exists()


def interrupt_first_rank(folder: Path) -> None:
    if own_rank() == 0:
        interrupted(folder, 9, resume=True)
        return
    with pytest.raises(Interrupted):
        pretrain(pretrain_config(folder / "data", **SETTINGS), folder / "handed on", resume=True)


def test_a_run_handed_from_one_process_to_two_and_back(folder: Path) -> None:
    pretrain(pretrain_config(folder / "data", **SETTINGS), folder / "uninterrupted")
    interrupted(folder, 3, resume=False)
    run_ranks(interrupt_first_rank, 2, folder / "hands", folder)
    pretrain(pretrain_config(folder / "data", **SETTINGS), folder / "handed on", resume=True)
    assert_close_runs(folder / "handed on", folder / "uninterrupted")


def interrupt_second_step(folder: Path) -> None:
    watcher = signal_at(2) if own_rank() == 0 else None
    with pytest.raises(Interrupted):
        pretrain(pretrain_config(folder / "lost", **PAIRS), folder / "lost out", listener=watcher)


def test_images_that_other_ranks_could_not_read_are_kept(folder: Path) -> None:
    write_images(folder / "lost", per_class=6, split="train")
    source = open_source(DataConfig(spec=str(folder / "lost")), "train")
    # The second rank reads this image first, and no rank reads it afterwards.
    bad = Path(source.path(int(permutation(0, 0, len(source))[1])))
    bad.write_bytes(b"no image")
    run_ranks(interrupt_second_step, 2, folder / "lost group", folder)
    pretrain(pretrain_config(folder / "lost", **PAIRS), folder / "lost out", resume=True)
    assert [found["path"] for found in results(folder / "lost out")["bad_images"]] == [str(bad)]


def resume_apart(folder: Path) -> str:
    """Return the error if each rank has an output folder of its own and one of them has another saved step."""
    out = folder / f"apart {own_rank()}"
    with pytest.raises(DataError) as caught:
        pretrain(pretrain_config(folder / "data", **SETTINGS), out, resume=True)
    return str(caught.value)


def test_ranks_that_see_other_states_stop(folder: Path) -> None:
    for rank in range(2):
        with pytest.raises(Interrupted):
            out = folder / f"apart {rank}"
            pretrain(pretrain_config(folder / "data", **SETTINGS), out, listener=signal_at(1 + rank))
    for told in run_ranks(resume_apart, 2, folder / "apart group", folder):
        assert told.startswith("the processes see different saved states: of steps [1, 2]; --data and --out must be")


@pytest.mark.slow
def test_torchrun_runs_the_command_line(folder: Path, tmp_path: Path) -> None:
    line = arguments("pretrain", tmp_path / "out", PRETRAIN | {"data.spec": folder / "data"})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mimref"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *line], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("encoder in ") == 1  # only rank 0 prints
    assert {row["metric"] for row in results(tmp_path / "out")["metrics"]} >= {"knn_top1"}
