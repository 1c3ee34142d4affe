"""`mimref inspect`: what it prints about a weights file, and its JSON."""

import json
from pathlib import Path

import pytest
import timm
import torch

from mimref.cli import run
from mimref.encoders.inspection import TensorOrigin, by_block
from tests.checkpoints import MAE_DECODER, data2vec, mae_vit, timm_vit


def test_foreign_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": data2vec()}, tmp_path / "a.pt")
    assert run(["inspect", str(tmp_path / "a.pt")]) == 0
    printed = capsys.readouterr().out
    for words in (
        "data2vec 2.0",
        "3 blocks of width 128, 2 heads",
        "post-norm",
        "dropped, decoder",
        "blocks.0-2.norm1",
    ):
        assert words in printed
    torch.save({"model": dict(mae_vit().state_dict()) | MAE_DECODER}, tmp_path / "b.pt")
    assert run(["inspect", str(tmp_path / "b.pt"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["architecture"]["depth"] == 3 and printed["architecture"]["post_norm"] is False
    assert set(printed["dropped"]) == {"mask token", "decoder"}
    assert printed["tensors"][0] == {
        "name": "cls_token", "origin": ["model.cls_token"], "shape": [1, 1, 128], "dtype": "float32",
    }  # fmt: skip
    assert len(printed["tensors"]) + sum(map(len, printed["dropped"].values())) == len(mae_vit().state_dict()) + len(
        MAE_DECODER
    )


def test_heads_that_no_weight_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(timm_vit(embed_dim=48, num_heads=3).state_dict(), tmp_path / "a.pth")
    assert run(["inspect", str(tmp_path / "a.pth")]) == 2
    assert "inspect, export, push: --num-heads N" in capsys.readouterr().err
    assert run(["inspect", str(tmp_path / "a.pth"), "--num-heads", "3"]) == 0
    assert "width 48, 3 heads" in capsys.readouterr().out


def test_own_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "quickstart", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["format"], printed["source"], printed["header"]["preset"]) == (
        "mimref",
        "mae",
        "pretrain/quickstart",
    )


def test_other_files_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"transformer.wte.weight": torch.zeros(3, 2)}, tmp_path / "gpt.pt")
    assert run(["inspect", str(tmp_path / "gpt.pt")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "gpt.pt: " in captured.err and "pass --arch" in captured.err


def test_files_whose_model_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "list_models", lambda *_, **__: ["test_convnext"])  # building all takes seconds
    model = timm.create_model("test_convnext", num_classes=10).half()
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    line = ["inspect", str(tmp_path / "a.pth"), "--json"]
    assert run(line) == 2
    assert "--arch test_convnext" in capsys.readouterr().err
    assert run([*line, "--arch", "test_convnext"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["architecture"]["name"] == "test_convnext" and found["format"] == "read as test_convnext"
    own = {each["name"]: each for each in found["tensors"]}
    stem = own["stem.0.weight"]
    assert (stem["origin"], stem["dtype"]) == (["state_dict.module.stem.0.weight"], "float16")
    (others,) = found["dropped"].values()
    assert others == [f"state_dict.{name}" for name in state if name.startswith("module.head.fc")]
    assert found["parameters"] == sum(x.numel() for name, x in model.named_parameters() if "head.fc" not in name)
    assert run([*line, "--arch", "vit_b16"]) == 2
    assert run(["inspect", "quickstart", "--arch", "vit_b16"]) == 2
    assert "omit --arch" in capsys.readouterr().err


def test_blocks_that_differ_in_number_share_a_line() -> None:
    def norm(block: int, width: int) -> TensorOrigin:
        return TensorOrigin(f"blocks.{block}.norm1.bias", [f"h.{block}.ln.b"], [width], "float32")

    lines = by_block(
        [TensorOrigin("norm.bias", ["ln.b"], [4], "float16"), *(norm(n, 4) for n in (0, 1, 2, 4)), norm(3, 5)]
    )
    assert lines == [
        ("norm.bias", "ln.b", "(4,) float16"),
        ("blocks.0,1,2,4.norm1.bias", "h.*.ln.b", "(4,) float32"),
        ("blocks.3.norm1.bias", "h.*.ln.b", "(5,) float32"),
    ]
