"""Settings that do not fit the encoder, the images or each other: one line that says what to set, and exit code 2."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mimref.cli import run
from tests.tiny import REFINE, arguments, write_labelled, write_weights


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("input")
    weights, data = write_weights(folder / "base.safetensors"), write_labelled(folder / "data")
    return REFINE | {"encoder.weights": weights, "data.spec": data}


MISTAKES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"encoder.image_size": 20}, ("encoder.image_size 20", "patch size 8")),
    ({"views.global_size": 18}, ("views.global_size 18", "patch size 8")),
    ({"views.local_size": 9}, ("views.local_size 9", "patch size 8")),
    ({"views.local_size": 24}, ("views.local_size 24", "16 pixels")),
    ({"heads.blocks": "2,5"}, ("heads.blocks '2,5'",)),
    ({"heads.blocks": "last99"}, ("heads.blocks 'last99'",)),
    ({"heads.blocks": "4-3"}, ("heads.blocks '4-3'", "3-4")),
    ({"heads.blocks": "0-3"}, ('heads.blocks = "0-3"', "last8")),
    ({"heads.temperature": [0.1, 0.2, 0.3]}, ("heads.temperature", "3 values", "2 heads")),
    ({"heads.temperature": 0}, ("heads.temperature = 0", "greater than 0")),
    ({"heads.temperature": []}, ("heads.temperature = []",)),
    ({"heads.queue_size": 49}, ("heads.queue_size 49", "48 training images")),
    ({"encoder_stage.top_k": 25}, ("encoder_stage.top_k 25", "24", "heads.queue_size")),
    ({"heads_stage.top_k": 24}, ("top_k of 24", "heads.queue_size", "27")),
    ({"batch_size": 49}, ("batch_size 49", "48 training images", "--batch-size 48")),
    ({"data.train_limit": 1}, ("1 training image",)),
    ({"encoder_stage.freeze_blocks": 4}, ("encoder_stage.freeze_blocks 4", "block 4")),
    ({"heads_stage.epochs": 0, "encoder_stage.epochs": 0}, ("heads_stage.epochs", "encoder_stage.epochs")),
    ({"stage": "heads", "heads_stage.epochs": 0}, ("heads_stage.epochs",)),
    ({"encoder_stage.warmup_epochs": 4}, ("encoder_stage.warmup_epochs 4", "encoder_stage.epochs 3")),
    ({"stage": "encoder"}, ("stage = 'encoder'", "--heads-from")),
    ({"heads_from": "runs/a"}, ("stage = 'both'", "heads_from")),
    ({"stage": "encoder", "heads_from": "nowhere"}, ("nowhere", "--heads-from")),
    ({"loss.schedule": "one_hot", "heads.blocks": "4"}, ("loss.schedule 'one_hot'", "heads")),
    ({"loss.schedule": "onehot"}, ("loss.schedule", "'one_hot'")),
    ({"views.local_scale": [0.5, 0.2]}, ("views.local_scale = [0.5, 0.2]",)),
    ({"views.flip": 2}, ("views.flip = 2", "at most 1")),
    ({"heads.temprature": 1}, ("'heads.temprature'", "'heads.temperature'")),
    ({"encoder.weights": "nowhere.safetensors"}, ("nowhere.safetensors",)),
    ({"encoder.weights": "runs/pretrain-peak"}, ("runs/pretrain-peak", "mimref pretrain --preset peak")),
    ({"encoder.arch": "nonsense"}, ("unknown architecture 'nonsense'",)),
    ({"encoder.weights": "none", "encoder.source": "ijepa"}, ("vit_l16", "ijepa")),
    ({"data.spec": "none"}, ("--data",)),
    ({"device": "gpu"}, ('device = "gpu"', "'cuda'")),
    ({"workers": -1}, ("workers = -1", "at least 0")),
]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mimref: error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(("changes", "parts"), MISTAKES, ids=[" ".join(map(str, change)) for change, _ in MISTAKES])
def test_one_line_that_says_what_to_set(
    changes: dict[str, Any],
    parts: tuple[str, ...],
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments("refine", tmp_path / "out", settings | changes)) == 2
    line = one_line(capsys)
    assert all(part in line for part in parts), line
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(arguments("refine", tmp_path / "out", settings | {"device": "cuda"})) == 2
    line = one_line(capsys)
    assert "'cuda'" in line and "--device cpu" in line
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_name_their_tensors(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"cls_token": torch.zeros(1, 1, 192), "extra.weight": torch.zeros(2)}, tmp_path / "w.pt")
    sizes = {"encoder.arch": "vit_b16", "views.local_size": 96, "heads.blocks": 12}
    changes = sizes | {"encoder.weights": tmp_path / "w.pt"}
    assert run(arguments("refine", tmp_path / "out", settings | changes)) == 2
    message = one_line(capsys)
    assert "w.pt" in message and "vit_b16" in message and "pos_embed" in message
    (tmp_path / "w.pt").write_bytes(b"damaged")
    assert run(arguments("refine", tmp_path / "out", settings | changes)) == 2
    assert "w.pt" in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["out.txt", "out.txt/below"])
def test_an_output_folder_that_cannot_be(
    name: str, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.txt").write_text("mine")
    assert run(arguments("refine", tmp_path / name, settings)) == 2
    assert f"{name}: " in one_line(capsys)
    assert (tmp_path / "out.txt").read_text() == "mine"


def test_resume_without_a_run(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments("refine", tmp_path / "out", settings), "--resume"]) == 2
    assert "--resume" in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["refine", "pretrain", "finetune"])
def test_resume_without_settings(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "probe.pt").touch()  # of another command
    assert run([command, "--resume", "--out", str(tmp_path)]) == 2
    message = one_line(capsys)
    assert all(part in message for part in (str(tmp_path), "config.toml", "--out", "--force"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["probe.pt", "state"]
