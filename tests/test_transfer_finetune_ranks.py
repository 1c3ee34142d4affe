"""Complete fine-tunings by two processes equal those by one, with mixed images and stochastic depth."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mimref.distributed.group import own_rank
from mimref.errors import Interrupted
from mimref.progress import Silent
from mimref.transfer.finetune import classify
from mimref.transfer.finetune.config import PredictConfig
from mimref.transfer.finetune.predict import predict
from mimref.transfer.finetune.run import finetune
from mimref.transfer.finetune.training import FineTuning
from tests.faults import write_damaged
from tests.ranks import run_ranks
from tests.test_pretraining_ranks import assert_close_runs
from tests.tiny import Watcher, finetune_config, results, signal_at, write_images, write_labelled, write_weights

# At a rate this small, AdamW's first updates, which are signs of gradients, cannot make fp32 runs diverge.
SETTINGS: dict[str, Any] = {"finetune__lr": 1e-5, "finetune__epochs": 2, "monitor__log_every": 1, "data__max_bad": 9}
RUNS: dict[str, dict[str, Any]] = {
    # The ranks have 6 and 5 of 11 images, in micro-batches of 4; some of the images cannot be read.
    "odd": {"batch_size": 11, "micro_batch": 4, "data": "damaged"},
    # Pairs of images stay together: with a single pair, the first rank has no image.
    "pairs": {"batch_size": 2, "finetune__epochs": 1, "data": "pairs"},
    "plain": {"batch_size": 3, "augment__mixup": 0.0, "augment__cutmix": 0.0, "finetune__epochs": 1, "data": "pairs"},
    "shots": {"shots": 6, "splits": 2, "finetune__epochs": 1, "finetune__ema": "none", "data": "data"},
}


def together() -> str:
    return "together" if "TEST_RANK" in os.environ else "alone"


def watched(folder: Path, name: str) -> list[list[Tensor]]:
    """Fine-tune and return the gradients of every update."""
    found: list[list[Tensor]] = []
    changes = SETTINGS | RUNS[name]
    data = folder / changes.pop("data")
    update = FineTuning.update

    def keeping(self: FineTuning, batch: Any) -> None:
        def keep(*_: object) -> None:
            found.append([weight.grad.clone() for weight in self.trained if weight.grad is not None])

        handle = self.optimizer.register_step_pre_hook(keep)
        update(self, batch)
        handle.remove()

    FineTuning.update = keeping  # type: ignore[method-assign]
    try:
        finetune(finetune_config(folder / "encoder.safetensors", data, **changes), folder / f"{name} {together()}")
    finally:
        FineTuning.update = update  # type: ignore[method-assign]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_labelled(folder / "data")
    write_damaged(folder / "damaged")
    for split in ("train", "val"):
        write_images(folder / "pairs", per_class=6, split=split)
    write_weights(folder / "encoder.safetensors")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one(name: str, folder: Path) -> None:
    alone = watched(folder, name)
    ranks = run_ranks(watched, 2, folder / f"{name} group", folder, name)
    assert len(alone) == {"odd": 8, "pairs": 6, "plain": 4, "shots": 2}[name]
    for found in ranks:
        for expected, gradients in zip(alone, found, strict=True):
            whole = torch.cat([gradient.flatten() for gradient in expected]).norm()
            for wanted, gradient in zip(expected, gradients, strict=True):
                assert (gradient - wanted).norm() < 1e-4 * whole
    outs = [folder / f"{name} {who}" for who in ("together", "alone")]
    if name != "shots":
        assert_close_runs(*outs)
    for row, wanted in zip(*(results(out)["metrics"] for out in outs), strict=True):
        assert row == {key: pytest.approx(value) for key, value in wanted.items()}


def first_signals(folder: Path) -> None:
    with pytest.raises(Interrupted):
        config = finetune_config(folder / "encoder.safetensors", folder / "data", **SETTINGS)
        finetune(config, folder / "handed on", listener=signal_at(3, what="fine-tuning") if own_rank() == 0 else None)


def test_a_run_handed_from_two_processes_to_one(folder: Path) -> None:
    config = finetune_config(folder / "encoder.safetensors", folder / "data", **SETTINGS)
    finetune(config, folder / "uninterrupted")
    run_ranks(first_signals, 2, folder / "hands", folder)
    finetune(config, folder / "handed on", resume=True)
    assert_close_runs(folder / "handed on", folder / "uninterrupted")


def classified(folder: Path) -> list[int]:
    """Validation images that this process classifies."""
    seen: list[int] = []
    original: Callable[..., Any] = classify.classify

    def watching(*args: Any, **options: Any) -> Any:
        for batch, logits_BC in original(*args, **options):
            seen.extend(batch.indices)
            yield batch, logits_BC

    classify.classify = watching
    try:
        changes = SETTINGS | {"finetune__epochs": 1}
        config = finetune_config(folder / "encoder.safetensors", folder / "data", **changes)
        finetune(config, folder / f"shared {together()}", listener=Watcher())
    finally:
        classify.classify = original
    return seen


def test_ranks_share_the_validation_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert classified(folder) == list(range(16))
    first, second = run_ranks(classified_in_small_batches, 2, folder / "shared", folder)
    assert sorted(first + second) == list(range(16)) and len(first) == 9 and len(second) == 7


def classified_in_small_batches(folder: Path) -> list[int]:
    init = classify.PassSettings.__init__

    def small(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options | {"batch_size": 3})

    classify.PassSettings.__init__ = small  # type: ignore[method-assign]
    try:
        return classified(folder)
    finally:
        classify.PassSettings.__init__ = init  # type: ignore[method-assign]


def predicted(folder: Path) -> int | None:
    config = PredictConfig.model_validate(
        {"checkpoint": str(folder / "one"), "data": {"spec": str(folder / "data")}, "device": "cpu", "workers": 0}
    )
    return predict(config, out=folder / f"labels {together()}.csv", listener=Silent())


def test_one_rank_predicts(folder: Path) -> None:
    changes = SETTINGS | {"finetune__epochs": 1}
    finetune(finetune_config(folder / "encoder.safetensors", folder / "data", **changes), folder / "one")
    assert predicted(folder) == 16
    assert sorted(run_ranks(predicted, 2, folder / "predict group", folder), key=str) == [16, None]
    alone, both = ((folder / f"labels {who}.csv").read_text() for who in ("alone", "together"))
    assert alone == both and alone.count("\n") == 17
    assert np.isfinite([float(line.rpartition(",")[2]) for line in alone.splitlines()[1:]]).all()
