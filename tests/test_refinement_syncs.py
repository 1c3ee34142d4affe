"""No training step waits for the device: reading a value of it on the CPU is left to logging steps.

Without a GPU nothing waits, so a stand-in watches: weights, queue and all that `Tensor.to(device)` returns count as on
the device, and so does what is computed from them. The draws of augmentations, which are made on the CPU on purpose,
become the device's only where the code sends them there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimref.benchmarks.stage import ready_stage, synthetic_batch
from mimref.data.loader import device_batches
from mimref.errors import Checks
from mimref.pretraining.plan import make_plan
from mimref.pretraining.run import Pretraining
from mimref.progress import Silent
from mimref.refinement.schedule import StageName
from mimref.refinement.stages import EncoderStage, RefinementStage
from mimref.training.run import TrainingRun
from tests.test_benchmarks_step import tiny
from tests.tiny import pretrain_config, write_unlabelled

# Operations whose result, or its shape, the CPU has to know.
WAITING = {
    "aten::_local_scalar_dense",  # item(), float(), bool(), int()
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# These read a CPU tensor without an operation that a dispatch mode would see.
READING = ("tolist", "numpy", "cpu")


class Watch(TorchDispatchMode):
    """Notes every operation that would wait for the device."""

    def __init__(self, on_device: list[Tensor]) -> None:
        super().__init__()
        # Storages are kept, so that no later one has the same address.
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.syncs: list[str] = []
        for tensor in on_device:
            self.mark(tensor)

    def mark(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage

    def holds(self, tensor: object) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self.storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        result = func(*args, **(kwargs or {}))
        if any(self.holds(leaf) for leaf in leaves):
            name = func._schema.name
            masks = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8)]
            # Of the tensors given, those from the second on are the indices.
            by_mask = name in INDEXING and any(leaf is not args[0] for leaf in masks)
            if name in WAITING or by_mask:
                self.syncs.append(name)
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.mark(leaf)
        return result


@contextmanager
def watched(job: RefinementStage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    run = job.method
    modules = [run.encoder, run.heads] + ([job.average.module] if isinstance(job, EncoderStage) else [])
    with watching(modules, (run.queue, run, run.photometric, job.loss_guard), monkeypatch) as watch:
        yield watch


@contextmanager
def watching(modules: list[nn.Module], parts: Sequence[object], monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """What waits for a device that holds these modules, and the tensors of these objects."""
    there = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    for part in parts:
        there += [value for value in vars(part).values() if isinstance(value, Tensor)]
    watch = Watch(there)
    move = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        moved = move(self, *args, **kwargs)
        if any(isinstance(argument, torch.device) for argument in (*args, *kwargs.values())):
            if not watch.holds(self):
                # A copy that nothing says may go on beside the CPU's work is waited for.
                watch.syncs += [] if kwargs.get("non_blocking") else ["to"]
                moved = self.clone() if moved is self else moved
            watch.mark(moved)
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "to", to)
        for name in READING:
            patch.setattr(Tensor, name, noted(watch, name))
        with watch:
            yield watch


def noted(watch: Watch, name: str) -> Any:
    read = getattr(Tensor, name)

    def reads(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if watch.holds(self):
            watch.syncs.append(name)
        return read(self, *args, **kwargs)

    return reads


@pytest.mark.parametrize("stage", ["heads", "encoder"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch": 5},
        {"optimizer.clip_grad": 1.0},
        {"heads.pool": "mean"},
        {"heads.norm": "layer"},
        {"heads.norm": "running"},
        {"loss.dense": "gram"},
        {"loss.dense": "cka", "micro_batch": 5},
    ],
)
def test_steps_do_not_wait_for_the_device(
    stage: StageName, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(**{key.replace(".", "__"): value for key, value in changes.items()})
    with ready_stage(config, stage) as (job, _):
        batch = synthetic_batch(job)
        with watched(job, monkeypatch) as watch:
            for _ in range(3):
                job.update(batch)
                job.step += 1
            assert watch.syncs == []
            # The stand-in notices what a logging step reads.
            job.loss_guard.check()
            assert watch.syncs == ["aten::_local_scalar_dense"]
            job.values()
            assert {"aten::_local_scalar_dense", "tolist"} == set(watch.syncs)


def test_pretraining_does_not_wait_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pretrain_config(write_unlabelled(tmp_path))
    plan = make_plan(config, Silent(), Checks())
    job = Pretraining(TrainingRun(plan.config, tmp_path, None), plan)
    batch = next(job.batches())
    with watching([job.model], (job.photometric, job.loss_guard), monkeypatch) as watch:
        for _ in range(3):
            job.update(batch)
            job.step += 1
        assert watch.syncs == []
        job.loss_guard.check()
        assert watch.syncs == ["aten::_local_scalar_dense"]


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
        # The first steps allocate, and choose algorithms.
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
