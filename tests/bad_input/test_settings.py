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


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"encoder.image_size": 20}, "encoder.image_size 20 is not divisible by the patch size 8 of custom; the nearest"),
    ({"views.global_size": 18}, "views.global_size 18 is not divisible by the patch size 8 of custom; the nearest"),
    ({"views.local_size": 9}, "views.local_size 9 is not divisible by the patch size 8 of custom; the nearest"),
    ({"views.local_size": 24}, "views.local_size 24"),
    ({"heads.blocks": "2,5"}, "heads.blocks '2,5'"),
    ({"heads.blocks": "last99"}, "heads.blocks 'last99'"),
    ({"heads.blocks": "4-3"}, "heads.blocks '4-3': a range runs upwards, 3-4"),
    ({"heads.blocks": "0-3"}, 'heads.blocks = "0-3": expected blocks such as 17-24, 20,22,24, last8 or auto'),
    ({"heads.blocks": "last0"}, 'heads.blocks = "last0": expected blocks such as'),
    ({"heads.blocks": "the last"}, 'heads.blocks = "the last": expected blocks such as'),
    ({"heads.temperature": [0.1, 0.2, 0.3]}, "heads.temperature has 3 values for 2 heads (heads.blocks)"),
    ({"heads.temperature": 0}, "heads.temperature = 0: expected a number more than 0"),
    ({"heads.temperature": []}, "heads.temperature = []: expected a list of at least 1"),
    ({"heads.queue_size": 49}, "heads.queue_size 49"),
    ({"heads.queue_size": 0}, "heads.queue_size = 0: expected a number more than 0"),
    ({"encoder_stage.top_k": 25}, "encoder_stage.top_k 25 is more than the 24 of heads.queue_size"),
    ({"heads_stage.top_k": 24}, "top_k 24 needs a heads.queue_size of at least 27, not 24"),
    ({"batch_size": 1}, "batch_size = 1: expected a number more than 1"),
    ({"batch_size": 49}, "--batch-size 48"),
    ({"data.train_limit": 1}, "there is only 1 training image; a batch needs two"),
    (
        {"encoder_stage.freeze_blocks": 4},
        "encoder_stage.freeze_blocks 4 leaves nothing to refine: the last head reads block 4",
    ),
    ({"heads_stage.epochs": 0, "encoder_stage.epochs": 0}, "nothing to train: heads_stage.epochs is 0 and"),
    ({"stage": "heads", "heads_stage.epochs": 0}, "nothing to train: "),
    ({"encoder_stage.warmup_epochs": 4}, "encoder_stage.warmup_epochs 4 is more than encoder_stage.epochs 3"),
    ({"stage": "encoder"}, "stage = 'encoder' needs heads_from (--heads-from DIR)"),
    ({"heads_from": "runs/a"}, "stage = 'both' trains heads of its own; heads_from goes with stage = 'encoder'"),
    ({"stage": "encoder", "heads_from": "nowhere"}, "nowhere: no such file; --heads-from needs the output folder of"),
    ({"loss.schedule": "one_hot", "heads.blocks": "4"}, "loss.schedule 'one_hot' needs at least two heads"),
    ({"loss.schedule": "onehot"}, "did you mean 'one_hot'?"),
    ({"views.local_scale": [0.5, 0.2]}, "views.local_scale = [0.5, 0.2]: expected a range whose first number is not"),
    ({"views.flip": 2}, "views.flip = 2: expected a number at most 1"),
    ({"heads.temprature": 1}, "Unknown setting 'heads.temprature'; did you mean 'heads.temperature'?"),
    ({"encoder.weights": "nowhere.safetensors"}, "nowhere.safetensors: no such file"),
    (
        {"encoder.weights": "none", "encoder.source": "ijepa"},
        "no published weights of vit_l16 from ijepa: vit_l16 exists",
    ),
    ({"data.spec": "none"}, "no images: pass --data (a folder, digits, fashion-mnist"),
    ({"device": "gpu"}, "device = \"gpu\": expected 'auto', 'cpu', 'cuda' or 'mps'"),
    ({"seed": -1}, "seed = -1: expected a number at least 0"),
    ({"workers": -1}, "workers = -1: expected a number at least 0"),
]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mimref: error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[" ".join(map(str, change)) for change, _ in MISTAKES])
def test_one_line_that_says_what_to_set(
    changes: dict[str, Any],
    message: str,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments("refine", tmp_path / "out", settings | changes)) == 2
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(arguments("refine", tmp_path / "out", settings | {"device": "cuda"})) == 2
    assert "device 'cuda' is not available on this machine; use --device cpu" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_name_their_tensors(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"cls_token": torch.zeros(1, 1, 192), "extra.weight": torch.zeros(2)}, tmp_path / "w.pt")
    sizes = {"encoder.arch": "vit_b16", "views.local_size": 96, "heads.blocks": 12}
    changes = sizes | {"encoder.weights": tmp_path / "w.pt"}
    assert run(arguments("refine", tmp_path / "out", settings | changes)) == 2
    message = one_line(capsys)
    assert "w.pt: does not fit vit_b16: pos_embed is missing; " in message and " more" in message
    (tmp_path / "w.pt").write_bytes(b"damaged")
    assert run(arguments("refine", tmp_path / "out", settings | changes)) == 2
    assert "w.pt: not a checkpoint, or a damaged one" in one_line(capsys)
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
    assert "out: holds no run to resume; leave out --resume to start one" in one_line(capsys)
    assert not (tmp_path / "out").exists()
