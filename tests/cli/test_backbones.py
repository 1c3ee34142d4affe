"""A timm backbone from end to end: refined, evaluated, inspected, exported, and refused where a plain ViT is needed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import mimref
from mimref.cli import run
from mimref.encoders.backbones import TimmBackbone
from tests.families import FAMILIES, write_backbone
from tests.tiny import REFINE, arguments, results

DIGITS: dict[str, Any] = REFINE | {
    "data.spec": "digits",
    "data.train_limit": 64,
    "heads.blocks": "2-3",
    "encoder_stage.epochs": 2,
    "views.local_size": 16,
}


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a refinement on digits; its base is next to it."""
    folder = tmp_path_factory.mktemp("backbone")
    base = write_backbone(folder / "base.safetensors", FAMILIES["swin"])
    assert run(arguments("refine", folder / "run", DIGITS | {"encoder.weights": str(base)})) == 0
    return folder / "run"


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert run([*args]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.slow
def test_every_evaluation_reads_the_result(refined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--set", "data.train_limit=64", "--device", "cpu", "--cache", "off"]
    base = str(refined.parent / "base.safetensors")
    digits = ["--data", "digits"]
    assert run(["analyze-blocks", base, str(refined), "--out", str(tmp_path / "blocks"), *digits, *common]) == 0
    assert run(["assess", str(refined), "--out", str(tmp_path / "assess"), *digits, *common]) == 0
    probe = ["probe", str(refined), "--cached", "--set", "probe.epochs=1", "--out", str(tmp_path / "probe")]
    assert run([*probe, *digits, *common]) == 0


def test_knn_and_averages(refined: Path, tmp_path: Path) -> None:
    common = ["--set", "data.train_limit=64", "--device", "cpu", "--cache", "off"]
    assert run(["knn", str(refined), "--blocks", "all", "--out", str(tmp_path / "knn"), *common]) == 0
    blocks = {row["blocks"] for row in results(tmp_path / "knn")["metrics"]}
    assert blocks == {"1", "2", "3"}
    base = str(refined.parent / "base.safetensors")
    assert run(["interpolate", base, str(refined), "--alpha", "0.5", "--out", str(tmp_path / "half")]) == 0
    half = mimref.load(tmp_path / "half" / "alpha-0.5.safetensors")
    assert isinstance(half.model, TimmBackbone)
    images = np.zeros((2, 32, 32), np.uint8)
    assert mimref.extract(half, images, blocks=[2], pool="mean", device="cpu").x.shape == (2, 32)


def test_timm_reads_the_export(refined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.safetensors", "b.pth"):
        assert run(["export", str(refined), "--to", "timm", "--out", str(tmp_path / name)]) == 0
        lines = capsys.readouterr().out.splitlines()
        (line,) = (each.split("read with", 1)[1] for each in lines if "timm.create_model" in each)
        model = eval(line.strip(), {"timm": timm})
        found = mimref.load(refined)
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            wanted = found.model.blocks(x, [3], final_norm=True)[0]
            torch.testing.assert_close(model.eval().forward_features(x).flatten(1, 2), wanted, rtol=1e-5, atol=1e-5)


def test_inspect(refined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(refined)]) == 0
    printed = capsys.readouterr().out
    assert "swin_tiny_patch4_window7_224" in printed and "16, 32, 64" in printed and "multiples of 8 pixels" in printed
    assert run(["inspect", str(refined), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"]["name"] == "swin_tiny_patch4_window7_224"


def test_a_folder_with_a_card(refined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "folder"
    assert run(["export", str(refined), "--to", "hf", "--out", str(out)]) == 0
    assert f"timm.create_model('local-dir:{out}', pretrained=True)" in "".join(capsys.readouterr().out.split("\n"))
    card = (out / "README.md").read_text()
    assert "library_name: timm" in card and "swin_tiny_patch4_window7_224" in card
    assert run(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"]["name"] == "swin_tiny_patch4_window7_224"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["export", "--to", "onnx", "--out", "a.onnx"], "--to onnx"),
        (["export", "--to", "release", "--out", "a.pth"], "--to release"),
        (["export", "--to", "hf", "--layout", "transformers", "--out", "folder"], "--layout timm"),
        (["finetune", "--data", "digits"], "plain vision transformer"),
        (["segment"], "plain vision transformer"),
        (["knn", "--resolution", "20", "--data", "digits"], "nearest is 24"),
    ],
)
def test_what_needs_a_plain_vit(
    args: list[str],
    named: str,
    refined: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named in refusal(capsys, args[0], str(refined), *args[1:])


def test_weights_without_a_header_need_arch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "list_models", lambda *_, **__: ["test_convnext"])  # building all takes seconds
    model = timm.create_model("test_convnext", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    command = ["refine", "--weights", str(tmp_path / "a.pth"), "--data", "digits", "--device", "cpu", "--dry-run"]
    command += ["--set", "data.train_limit=64", "--heads", "3-4", "--batch-size", "4"]
    command += ["--set", "views.global_size=64", "--set", "views.local_views=0"]
    assert "--arch" in refusal(capsys, *command)
    assert run([*command, "--arch", "test_convnext"]) == 0
    printed = capsys.readouterr().out
    assert "test_convnext, 4 blocks of width" in printed
    assert "nearest is 160" in refusal(capsys, *command, "--arch", "test_convnext", "--set", "views.global_size=170")


def test_a_model_without_intermediate_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("test_convnext", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    monkeypatch.delattr(type(model), "forward_intermediates")
    from mimref.encoders import backbones

    backbones._shapes.cache_clear()
    command = ["refine", "--weights", str(tmp_path / "a.pth"), "--data", "digits", "--arch", "test_convnext"]
    command += ["--device", "cpu", "--set", "heads.queue_size=64"]
    assert "test_convnext cannot be used: timm" in refusal(capsys, *command)
