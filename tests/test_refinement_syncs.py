"""No training step waits for the device: only logging steps read its values on the CPU.

Without a GPU nothing waits, so `tests/watch.py` has stand-ins. For each kind of step, one test watches it with values,
and another runs it on the meta device, where torch refuses to read them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch

from mimref.benchmarks.stage import ready_stage, synthetic_batch
from mimref.data.loader import ViewBatch, device_batches
from mimref.devices import send
from mimref.errors import Checks
from mimref.pretraining.config import PretrainConfig
from mimref.pretraining.plan import make_plan
from mimref.pretraining.run import Pretraining
from mimref.progress import Silent
from mimref.refinement.schedule import StageName
from mimref.refinement.stages import RefinementStage
from mimref.training.job import GradientJob
from mimref.training.run import TrainingRun
from mimref.transfer.finetune.plan import make_plan as make_finetuning_plan
from mimref.transfer.finetune.training import FineTuning
from tests.ranks import run_ranks
from tests.test_benchmarks_step import tiny
from tests.tiny import finetune_config, pretrain_config, simmim_config, write_labelled, write_unlabelled, write_weights
from tests.watch import META, Distant, distant, watched, watching

CHANGES: list[dict[str, Any]] = [
    {},
    {"micro_batch": 7, "activation_checkpointing": True, "encoder_stage.freeze_blocks": 2},
    {"optimizer.clip_grad": 1.0, "loss.direction": "prediction", "loss.swap_negatives": True},
    {"heads.pool": "mean", "loss.schedule": "staggered_decay"},
    {"heads.norm": "layer"},
    {"heads.norm": "running"},
    {"loss.dense": "gram"},
    {"loss.dense": "cka", "micro_batch": 7},
]
DRAWS = {"data/views.py", "draws.py"}
"""Augmentations are drawn on the CPU, so that choosing images needs no sync."""


def settings(changes: dict[str, Any]) -> Any:
    return tiny(**{key.replace(".", "__"): value for key, value in changes.items()})


def updates(job: GradientJob, batch: ViewBatch) -> None:
    for _ in range(2):  # the first one creates the optimizer's state
        job.update(batch)
        job.step += 1


@pytest.mark.parametrize("stage", ["heads", "encoder"])
@pytest.mark.parametrize("changes", CHANGES)
def test_steps_do_not_wait_for_the_device(
    stage: StageName, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ready_stage(settings(changes), stage) as (job, _):
        batch = synthetic_batch(job)
        with watched(job, monkeypatch) as watch:
            updates(job, batch)
            assert watch.syncs == []
            # The stand-in notices what a logging step reads.
            job.loss_guard.check()
            assert watch.syncs == ["aten::_local_scalar_dense"]
            job.values()
            assert {"aten::_local_scalar_dense", "tolist"} == set(watch.syncs)


def syncs_of_rank(stage: StageName, changes: dict[str, Any], *, reading: bool = False) -> list[str]:
    """Return what a step of one process in a group waits for besides the others. reading: wrongly read a weight."""
    with pytest.MonkeyPatch.context() as patch, ready_stage(settings(changes), stage) as (job, _):
        whole, rows = synthetic_batch(job), slice(0, 6)
        batch = ViewBatch(0, whole.sample_B[rows], [crops[rows] for crops in whole.crops], [])
        if reading:
            read = job.method.encoder.block_modules[-1]
            read.register_forward_pre_hook(lambda block, _: print(float(next(block.parameters()).sum())))
        with watched(job, patch) as watch:
            updates(job, batch)
        return watch.syncs


ALL_PARTS: dict[str, Any] = {"micro_batch": 4, "loss.dense": "gram", "heads.norm": "running"}


def syncs_of_all() -> list[list[str]]:
    return [syncs_of_rank("heads", {}), syncs_of_rank("encoder", {}), syncs_of_rank("encoder", ALL_PARTS)]


def test_steps_of_a_group_do_not_wait_for_the_device(tmp_path: Path) -> None:
    assert run_ranks(syncs_of_all, 2, tmp_path) == [[[]] * 3] * 2


def syncs_of_shards() -> list[list[str]]:
    every = ALL_PARTS | {"activation_checkpointing": True, "encoder_stage.freeze_blocks": 1, "optimizer.clip_grad": 1.0}
    changes: list[tuple[StageName, dict[str, Any]]] = [("heads", {}), ("encoder", {}), ("encoder", every)]
    found = [syncs_of_rank(stage, {"shard": True, **each}) for stage, each in changes]
    return [*found, syncs_of_rank("encoder", {"shard": True}, reading=True)]


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch shards on CUDA alone")
def test_sharded_steps_do_not_wait_for_the_device(tmp_path: Path) -> None:
    for *found, reading in run_ranks(syncs_of_shards, 2, tmp_path):
        assert found == [[], [], []]
        # The stand-in also notices reads of gathered weights.
        assert reading and set(reading) == {"aten::_local_scalar_dense"}


# --- the meta device


@contextmanager
def far_stage(changes: dict[str, Any], stage: StageName, monkeypatch: pytest.MonkeyPatch) -> Iterator[RefinementStage]:
    """Yield a stage on the meta device."""
    monkeypatch.setattr("mimref.refinement.run.resolve_device", lambda _: META)
    # `settled` reads values, but only once, when a run begins.
    monkeypatch.setattr("mimref.refinement.method.settled", lambda _: True)
    with ready_stage(settings(changes), stage) as (job, _):
        yield job


def on_meta(batch: ViewBatch) -> ViewBatch:
    """Move a batch as `device_batches` does: crops to the device, sample indices on the CPU."""
    batch.crops = [crops.to(META) for crops in batch.crops]
    return batch


def check(noted: Distant, *made: str) -> None:
    """Check that only `send` copies to the device and that, besides draws, only `made` makes tensors on the CPU."""
    assert set(noted.copied) == {"devices.py:send"}
    assert not noted.waited and not noted.mixed
    assert {name for name in noted.made if name.partition(":")[0] not in DRAWS} <= set(made)


@pytest.mark.parametrize("stage", ["heads", "encoder"])
@pytest.mark.parametrize("changes", CHANGES)
def test_steps_exchange_nothing_unseen_with_the_cpu(
    stage: StageName, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with far_stage(changes, stage, monkeypatch) as job:
        batch = on_meta(synthetic_batch(job))
        with distant() as noted:
            updates(job, batch)
            # Sample indices of micro-batches, the heads' weights in the loss and, in old torch, the random state.
            made = "refinement/method.py:_parts", "refinement/stages.py:forward_backward", "encoders/vit.py:blocks"
            check(noted, *made)
            with pytest.raises(RuntimeError, match=r"item\(\)"):
                job.loss_guard.check()


def test_fine_tuning_does_not_wait_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, weights = write_labelled(tmp_path / "data"), write_weights(tmp_path / "encoder.safetensors")
    plan = make_finetuning_plan(finetune_config(weights, data, micro_batch=5), Silent(), Checks())
    run = TrainingRun(plan.config, tmp_path, None)
    job = FineTuning(run, plan, 0, [[]])
    assert job.average is not None
    batch = next(job.batches())
    with watching([job.classifier, job.average.module], (job.photometric, job.loss_guard), monkeypatch) as watch:
        updates(job, batch)
        assert watch.syncs == []
        job.values()
        assert watch.syncs == ["aten::_local_scalar_dense"]
    monkeypatch.setattr("mimref.transfer.finetune.training.resolve_device", lambda _: META)
    far = FineTuning(run, plan, 0, [[]])
    batch = on_meta(batch)
    with distant() as noted:
        updates(far, batch)
    check(noted, "transfer/finetune/augment.py:partners", "transfer/finetune/training.py:forward_backward")


@pytest.mark.parametrize("make_config", [pretrain_config, simmim_config])
def test_pretraining_does_not_wait_for_the_device(
    tmp_path: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: PretrainConfig = make_config(write_unlabelled(tmp_path))
    plan = make_plan(config, Silent(), Checks())
    run = TrainingRun(plan.config, tmp_path, None)
    job = Pretraining(run, plan)
    batch = next(job.batches())
    with watching([job.model], (job.photometric, job.loss_guard), monkeypatch) as watch:
        updates(job, batch)
        assert watch.syncs == []
        job.loss_guard.check()
        assert watch.syncs == ["aten::_local_scalar_dense"]
    monkeypatch.setattr("mimref.pretraining.run.resolve_device", lambda _: META)
    far = Pretraining(run, plan)
    batch = on_meta(batch)
    with distant() as noted:
        updates(far, batch)
    check(noted)


# --- the stand-ins


def test_send_copies_from_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA may wait before it copies from other memory."""
    done: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: done.append("pinned") or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: done.append((args, kwargs)) or x)
    cuda = torch.device("cuda")
    send(torch.ones(2), cuda)
    assert done == ["pinned", ((cuda,), {"non_blocking": True})]


def test_the_meta_device_is_told_from_the_cpu() -> None:
    with distant() as noted:
        draws = torch.arange(4)
        assert int((draws > 1).nonzero()[0]) == 2
        assert set(noted.made) == {"?"} and not noted.copied
        values = draws.to(META, non_blocking=True)
        assert sum(noted.copied.values()) == 1 and not noted.waited
        assert values[draws].is_meta and list(noted.mixed) == ["aten::index in ?"]
        torch.tensor([1.0], device=META)
        draws.to(META)
        assert sum(noted.waited.values()) == 2 and not torch.arange(3, device=META).is_cpu
        send(draws, META)
        assert noted.copied["devices.py:send"] == 1
        lazily = (lambda: values.sum().item(), lambda: values[values > 1])
        for read in (*lazily, values.nonzero, values.cpu, values.tolist):
            with pytest.raises((RuntimeError, NotImplementedError)):  # torch's own, which depend on the operation
                read()


def test_the_watch_tells_the_device_from_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with ready_stage(tiny(), "heads") as (job, _), watched(job, monkeypatch) as watch:
        draws = torch.arange(4)
        assert draws.tolist() == [0, 1, 2, 3] and int((draws > 1).nonzero()[0]) == 2
        assert watch.syncs == []
        values = draws.to(torch.device("cpu"), non_blocking=True)
        doubled = values * 2
        assert watch.syncs == [] and doubled[draws > 1].shape == (2,)
        assert watch.syncs == ["aten::index"]
        doubled[values > 1] = values[2:]
        assert len(doubled.nonzero()) == 3 and bool(doubled.sum() > 0)
        assert watch.syncs[1:] == ["aten::index_put_", "aten::nonzero", "aten::_local_scalar_dense"]
        assert len(draws.to(torch.device("cpu"))) == 4 and watch.syncs[4:] == ["to"]


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["heads", "encoder"])
@pytest.mark.parametrize("micro_batch", ["none", 5])
def test_steps_do_not_wait_for_cuda(stage: StageName, micro_batch: str | int) -> None:
    config = tiny(device="cuda", micro_batch=micro_batch)
    with ready_stage(config, stage) as (job, _):
        batches = device_batches(repeat(synthetic_batch(job)), job.device)
        # The first steps allocate memory and choose algorithms.
        for _ in range(3):
            job.update(next(batches))
            job.step += 1
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                job.update(next(batches))
                job.step += 1
        finally:
            torch.cuda.set_sync_debug_mode("default")
