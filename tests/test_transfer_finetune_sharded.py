"""Fine-tunings with sharded weights equal those by DDP and by one process, in double precision."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimref.data.views import Photometric
from mimref.distributed.group import own_rank
from mimref.distributed.sharding import gathered
from mimref.errors import Interrupted
from mimref.transfer.finetune import training
from mimref.transfer.finetune.run import finetune
from mimref.transfer.finetune.training import FineTuning
from tests.faults import states, write_damaged
from tests.ranks import run_ranks
from tests.test_refinement_ranks import _rejoin
from tests.test_training_sharded import needs_fsdp
from tests.tiny import finetune_config, header, results, signal_at, tensors, write_labelled, write_weights

pytestmark = needs_fsdp
SETTINGS: dict[str, Any] = {"finetune__lr": 1e-3, "monitor__log_every": 1, "data__max_bad": 9}
FAST: dict[str, dict[str, Any]] = {
    # The ranks have 6 and 5 of 11 images, in micro-batches of 4; some of the images cannot be read.
    "odd": {"batch_size": 11, "micro_batch": 4, "data": "damaged", "finetune__epochs": 2}
}
SLOW: dict[str, dict[str, Any]] = {
    "whole": {"batch_size": 12, "data": "data", "finetune__epochs": 5},
    "recomputed": {"batch_size": 12, "data": "data", "finetune__epochs": 5, "activation_checkpointing": True},
    "micro": {"batch_size": 12, "micro_batch": 1, "data": "data", "finetune__epochs": 5},
    "frozen": {"batch_size": 12, "data": "data", "finetune__epochs": 5, "finetune__freeze_blocks": 2},
    "mean": {"batch_size": 12, "data": "data", "finetune__epochs": 5, "finetune__pool": "mean"},
    "weights": {"batch_size": 12, "data": "data", "finetune__epochs": 5, "finetune__ema": "none"},
    # Pairs of images stay together, so some ranks have none.
    "pairs": {"batch_size": 4, "micro_batch": 1, "data": "data", "finetune__epochs": 2},
    "a pair": {"batch_size": 2, "micro_batch": 1, "data": "data", "finetune__epochs": 1},
    "clipped": {"batch_size": 12, "data": "data", "finetune__epochs": 5, "optimizer__clip_grad": 0.1},
    "shots": {"shots": 12, "splits": 2, "batch_size": 6, "data": "data", "finetune__epochs": 2},
}


def watched(folder: Path, name: str, changes: dict[str, Any], how: str) -> list[list[Tensor]]:
    """Fine-tune in double precision and return the gradients of every update."""
    found: list[list[Tensor]] = []
    settings = SETTINGS | changes | {"shard": how == "shard"}
    data = folder / settings.pop("data")
    update, build, call, result = FineTuning.update, training._build, Photometric.__call__, FineTuning.result

    def keeping(self: FineTuning, batch: Any) -> None:
        def keep(*_: object) -> None:
            found.append([gathered(weight.grad).clone() for weight in self.trained if weight.grad is not None])

        handle = self.optimizer.register_step_pre_hook(keep)
        update(self, batch)
        handle.remove()

    FineTuning.update = keeping  # type: ignore[method-assign]
    training._build = lambda *args, **options: build(*args, **options).double()
    Photometric.__call__ = lambda self, *args: [  # type: ignore[method-assign]
        views.double() for views in call(self, *args)
    ]
    FineTuning.result = lambda self: deepcopy(result(self)).float()  # type: ignore[method-assign]
    try:
        finetune(finetune_config(folder / "encoder.safetensors", data, **settings), folder / f"{name} {how}")
    finally:
        FineTuning.update = update  # type: ignore[method-assign]
        training._build, FineTuning.result = build, result  # type: ignore[method-assign]
        Photometric.__call__ = call  # type: ignore[method-assign]
    return found


def watched_both(folder: Path, cases: dict[str, dict[str, Any]], world: int) -> dict[str, list[list[list[Tensor]]]]:
    found = {}
    for name, changes in cases.items():
        found[name] = []
        for how in ("shard", "ddp"):
            if not torch.distributed.is_initialized():
                _rejoin(folder, f"{name} {how} {world}", world)
            found[name].append(watched(folder, name, changes, how))
    return found


def assert_equal_runs(folder: Path, cases: dict[str, dict[str, Any]], world: int) -> None:
    ranks = run_ranks(watched_both, world, folder / f"group of {world}", folder, cases, world)
    for name, changes in cases.items():
        alone = watched(folder, name, changes, "alone")
        for shard, ddp in (found[name] for found in ranks):
            for found in (shard, ddp):
                assert len(found) == len(alone) > 1
                for expected, gradients in zip(alone, found, strict=True):
                    whole = torch.cat([gradient.flatten() for gradient in expected]).norm()
                    for wanted, gradient in zip(expected, gradients, strict=True):
                        assert (gradient - wanted).norm() < 1e-9 * whole
        outs = [folder / f"{name} {how}" for how in ("shard", "ddp", "alone")]
        rows = [results(out)["metrics"] for out in outs]
        assert rows[0] == [{key: pytest.approx(value) for key, value in row.items()} for row in rows[2]]
        if (outs[0] / "encoder.safetensors").exists():
            (found, expected), headers = map(tensors, (outs[0], outs[2])), list(map(header, outs))
            assert list(found) == list(expected) and headers[0].keys() == headers[2].keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_labelled(folder / "data")
    write_damaged(folder / "damaged")
    write_weights(folder / "encoder.safetensors")
    return folder


def test_sharded_equals_ddp_and_one_process(folder: Path) -> None:
    assert_equal_runs(folder, FAST, 2)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", FAST | SLOW)
def test_every_variant_equals_ddp_and_one_process(name: str, world: int, folder: Path, tmp_path: Path) -> None:
    if (FAST | SLOW)[name].get("batch_size", world) < world:
        pytest.skip("a batch has fewer images than there are processes")
    for each in folder.iterdir():
        if each.name in ("data", "damaged", "encoder.safetensors"):
            (tmp_path / each.name).symlink_to(each)
    assert_equal_runs(tmp_path, {name: (FAST | SLOW)[name]}, world)


def in_bfloat16(folder: Path) -> None:
    config = finetune_config(folder / "encoder.safetensors", folder / "data", **SETTINGS, shard=True, precision="bf16")
    result = FineTuning.result

    def checking(self: FineTuning) -> Any:
        found = result(self)
        assert found.head.weight.dtype is torch.float32 and found.fc_norm is not None
        assert found.encoder.vit.blocks[0].attn.qkv.weight.dtype is torch.bfloat16
        return found

    FineTuning.result = checking  # type: ignore[method-assign]
    finetune(config, folder / "bfloat16")
    FineTuning.result = result  # type: ignore[method-assign]


def test_validation_in_bfloat16_has_logits_of_full_precision(folder: Path) -> None:
    run_ranks(in_bfloat16, 2, folder / "bfloat16 group", folder)
    config = finetune_config(folder / "encoder.safetensors", folder / "data", **SETTINGS, precision="bf16")
    finetune(config, folder / "bfloat16 alone")
    found, expected = (
        {(row["metric"], row["selected"]): row["value"] for row in results(folder / name)["metrics"]}
        for name in ("bfloat16", "bfloat16 alone")
    )
    assert found.keys() == expected.keys() and found == pytest.approx(expected, abs=10)


def first_signals(folder: Path) -> None:
    with pytest.raises(Interrupted):
        config = finetune_config(folder / "encoder.safetensors", folder / "data", **SETTINGS, shard=True)
        finetune(config, folder / "handed on", listener=signal_at(3, what="fine-tuning") if own_rank() == 0 else None)


def end(folder: Path) -> None:
    config = finetune_config(folder / "encoder.safetensors", folder / "data", **SETTINGS, shard=True)
    finetune(config, folder / "handed on", resume=True)


def test_a_run_handed_from_two_processes_to_one_and_back(folder: Path) -> None:
    config = finetune_config(folder / "encoder.safetensors", folder / "data", **SETTINGS)
    finetune(config, folder / "uninterrupted")
    run_ranks(first_signals, 2, folder / "hands", folder)
    assert states(folder / "handed on") == ["step0000000003"]
    with pytest.raises(Interrupted):
        finetune(config, folder / "handed on", resume=True, listener=signal_at(6, what="fine-tuning"))
    assert states(folder / "handed on") == ["step0000000004.pt", "step0000000006.pt"]
    run_ranks(end, 2, folder / "hands again", folder)
    found, expected = tensors(folder / "handed on"), tensors(folder / "uninterrupted")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=3e-3)
    assert found.keys() == expected.keys()
