"""Encoders that are not plain vision transformers on the command line, without `--arch`."""

import json
from pathlib import Path

import pytest
import torch

from mimref.cli import run
from tests.families import FAMILIES, write_backbone
from tests.family_files import PUBLISHED, content


@pytest.fixture
def beit(tmp_path: Path) -> Path:
    case = PUBLISHED["beit"]
    torch.save(content(case, case.model())[0], tmp_path / "beit.pth")
    return tmp_path / "beit.pth"


def test_inspect(beit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(beit)]) == 0
    printed = capsys.readouterr().out
    for words in (
        "BEiT",
        "beit_base_patch16_224",
        "2 blocks",
        "embed_dim=32",
        "dropped, mask token",
        "dropped, computed",
    ):
        assert words in printed
    assert run(["inspect", str(beit), "--json"]) == 0
    printed_json = json.loads(capsys.readouterr().out)
    assert printed_json["source"] == "beit" and printed_json["architecture"]["image_size"] == 32
    origins = {tensor["name"]: tensor["origin"] for tensor in printed_json["tensors"]}
    assert origins["blocks.0.attn.q_bias"] == ["model.blocks.0.attn.q_bias"]


def test_knn_and_export(beit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--set", "data.train_limit=40", "--device", "cpu", "--quiet", "--workers", "0"]
    assert run(["knn", str(beit), "--data", "digits", "--blocks", "all", *limits]) == 0
    out = tmp_path / "back.pth"
    assert run(["export", str(beit), "--to", "publisher", "--out", str(out), "--quiet"]) == 0
    written, saved = (torch.load(file, weights_only=True)["model"] for file in (out, beit))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in written.items())
    capsys.readouterr()
    assert run(["export", "quickstart", "--to", "publisher", "--out", str(tmp_path / "q.pth"), "--quiet"]) == 2
    assert "--to publisher" in capsys.readouterr().err


def test_publishers_layouts_are_of_colour_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = write_backbone(tmp_path / "gray.safetensors", FAMILIES["gray"])
    assert run(["export", str(weights), "--to", "publisher", "--out", str(tmp_path / "out.pth"), "--quiet"]) == 2
    assert "3 channels, this encoder of 1; use --to timm" in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()


def test_capi_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("registers", "patch_embed.weight", "encoder.blocks.0.residual1.fn.q_proj.weight")
    torch.save({f"backbone.{name}": torch.zeros(1, 16, 32) for name in names}, tmp_path / "capi.pth")
    assert run(["inspect", str(tmp_path / "capi.pth")]) == 2
    printed = capsys.readouterr().err
    assert "CAPI" in printed and printed.count("\n") == 1
