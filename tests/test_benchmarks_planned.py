"""What a dry run of pretrain and finetune prints: counts by hand, and times for given seconds per step and image."""

from pathlib import Path

import pytest

from mimref.benchmarks import planned
from mimref.benchmarks.planned import describe_finetuning, describe_pretraining
from mimref.errors import Checks
from mimref.pretraining.plan import make_plan as pretraining_plan
from mimref.progress import Silent
from mimref.transfer.finetune.plan import make_plan as finetuning_plan
from tests.tiny import finetune_config, pretrain_config, simmim_config, write_labelled, write_weights


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training and 16 validation images."""
    return write_labelled(tmp_path_factory.mktemp("images"))


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "step_seconds", lambda job: 2.0)
    monkeypatch.setattr(planned, "image_seconds", lambda *_: 0.5)


def test_pretraining(data: Path, known_times: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "image_seconds", lambda *_: 0.1)
    config = pretrain_config(data, monitor__knn_every_epochs=2)
    facts = describe_pretraining(pretraining_plan(config, Silent(), Checks()))
    # Patches 3 x 16 x 32 + 32, CLS 32, positions 17 x 32, two blocks of 12 x 32^2 + 13 x 32, norm 64.
    encoder = 48 * 32 + 32 + 32 + 17 * 32 + 2 * (12 * 32**2 + 13 * 32) + 64
    assert facts["encoder"] == (
        f"custom, 2 blocks of width 32, {encoder:,} parameters; "
        "images of 16 pixels in 16 patches of 4, 12 of them hidden"
    )
    assert facts["images"] == f"48 of {data}, batches of 12" and facts["steps"] == "12 in 3 epochs"
    # 12 steps of 2 s; checks of 48 + 16 images, and of two views of 48, after epochs 2 and 3.
    assert facts["time"] == ("about 56 s on this machine: 24 s of training (2,000 ms per step) and 32 s of checks")


def test_pretraining_with_mask_tokens_in_the_encoder(data: Path, known_times: None) -> None:
    facts = describe_pretraining(pretraining_plan(simmim_config(data), Silent(), Checks()))
    # The mask token, and a layer from 32 channels to 48 pixel values.
    assert facts["decoder"] == f"one linear layer, {32 + 32 * 48 + 48:,} parameters"
    assert facts["encoder"].endswith("16 patches of 4, 10 of them hidden") and facts["steps"] == "12 in 3 epochs"


def test_finetuning_in_splits(data: Path, known_times: None, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "weights.safetensors")
    config = finetune_config(weights, data, shots=6, splits=2, monitor__validate_every_epochs=2)
    facts = describe_finetuning(finetuning_plan(config, Silent(), Checks()))
    classes = len(list((data / "train").iterdir()))
    count = 6 * classes
    assert facts["images"].startswith(f"{count} of 48, in each of 2 splits of {data} in {classes} classes")
    steps, passes_s = 2 * 3 * (count // 12), 2 * 2 * 16 * 0.5
    assert facts["steps"] == f"{steps} in 3 epochs"
    assert f"{2 * steps} s of training" in facts["time"] and f"{passes_s:.0f} s of validation" in facts["time"]
    assert facts["weights"] == str(weights)
