"""`mimref export`: what it prints, what it refuses, and that refusals leave nothing behind."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from mimref.cli import run
from mimref.encoders.checkpoints import read_checkpoint
from mimref.encoders.export import Export
from mimref.encoders.vit import Architecture, Encoder
from tests.tiny import write_weights

# Width 192 is a published one, from which the number of attention heads of a file without a header is inferred.
TINY = Architecture("custom", 16, width=192, depth=2, num_heads=3, patch_size=8)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny encoder in the current folder's parent; the current folder is empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return str(write_weights(tmp_path / "encoder.safetensors", architecture=TINY))


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Return the one-line error of an export that fails and leaves no file behind."""
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert run(["export", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
    return captured.err.removeprefix("mimref: error: ").strip()


def test_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = Architecture("custom", 224, width=192, depth=12, num_heads=3, patch_size=16)
    weights = write_weights(tmp_path / "encoder.safetensors", architecture=sizes)
    assert run(["export", str(weights), "--to", "timm", "--out", "t.safetensors"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "writing t.safetensors, reading it again and comparing outputs\n"
    call = "timm.create_model('vit_tiny_patch16_224', checkpoint_path='t.safetensors', num_classes=0)"
    file, name, read_with, difference = captured.out.splitlines()
    assert file.split() == ["file", "t.safetensors"]
    assert name.split() == ["timm", "name", "vit_tiny_patch16_224"]
    assert read_with.removeprefix("read with").strip() == call
    assert float(difference.removeprefix("largest difference")) < 1e-4
    assert eval(call, {"timm": timm}).embed_dim == 192
    assert read_checkpoint("t.safetensors").source == "mae"


def test_release(weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", weights, "--to", "release", "--out", "new/r.th", "--resolution", "32", "--quiet"]
    assert run(command) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "torch.load('new/r.th')['state_dict']" in captured.out
    assert "timm name" not in captured.out
    content = torch.load("new/r.th", weights_only=True)
    assert content["state_dict"]["pos_embed.embed"].shape == (1, 4, 4, 192)
    assert content["mimref"] == {"source": "mae"}


def test_onnx(weights: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph itself is tested in `test_encoders_export.py`."""
    asked: list[list[int]] = []

    def fake(encoder: Encoder, out: Path, facts: object, blocks: list[int], **options: object) -> Export:
        asked.append(blocks)
        return Export(out, 0.0, "onnxruntime.InferenceSession('o.onnx')")

    monkeypatch.setattr("mimref.encoders.export_onnx.export_onnx", fake)
    for more in ([], ["--blocks", "all"], ["--blocks", "1"]):
        assert run(["export", weights, "--to", "onnx", "--out", "o.onnx", *more]) == 0
    assert asked == [[2], [1, 2], [1]] and "onnxruntime.InferenceSession('o.onnx')" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["transformers", "timm"])
def test_hf(layout: str, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder itself is tested in `test_sharing_export.py`."""
    pytest.importorskip("transformers")
    assert run(["export", weights, "--to", "hf", "--layout", layout, "--out", "new/m", "--quiet"]) == 0
    captured = capsys.readouterr()
    names = {"transformers": "ViTModel", "timm": "vit_base_patch16_224"}
    reads = {
        "transformers": "transformers.AutoModel.from_pretrained('new/m')",
        "timm": "timm.create_model('local-dir:new/m', pretrained=True)",
    }
    assert captured.err == "" and names[layout] in captured.out and reads[layout] in captured.out
    assert f"as read by mimref and {layout}" in captured.out
    assert "# m\n" in Path("new/m/README.md").read_text()
    assert run(["inspect", "new/m"]) == 0
    assert run(["export", weights, "--to", "hf", "--layout", layout, "--out", "new/m", "--force", "--quiet"]) == 0


def test_mimref_evaluates_the_folder(weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", weights, "--to", "hf", "--layout", "timm", "--out", "m", "--quiet"]) == 0
    capsys.readouterr()
    scores = []
    for model in (weights, "m"):
        assert run(["knn", model, "--data", "digits", "--quiet"]) == 0
        scores.append([line for line in capsys.readouterr().out.splitlines() if "k-NN" in line])
    assert scores[0] == scores[1] != []


def test_a_file_that_exists_stays_without_force(weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.pth").write_text("old")
    line = refusal(capsys, weights, "--to", "timm", "--out", "t.pth")
    assert line.startswith("--out t.pth: ") and "--force" in line
    assert run(["export", weights, "--to", "timm", "--out", "t.pth", "--force"]) == 0
    captured = capsys.readouterr()
    assert "none of these sizes" in captured.out
    assert ".pth" in captured.err and ".safetensors" in captured.err
    assert torch.load("t.pth", weights_only=True)["cls_token"].shape == (1, 1, 192)


MISTAKES = {
    "--to timm --out t.onnx": ("--out t.onnx", ".safetensors"),
    "--to onnx --out t": ("--out t:", ".onnx"),
    "--to timm --out t.pth --blocks all": ("--blocks all", "--to onnx"),
    "--to timm --out t.pth --resolution 20": ("--resolution 20", "8"),
    "--to timm --out t.pth --resolution 0": ("'--resolution'",),
    "--to onnx --out t.onnx --blocks 3": ("block 3", "1 to 2"),
    "--to onnx --out t.onnx --blocks x": ("--blocks 'x'",),
    "--to jax --out t.onnx": ("'--to'", "'jax'"),
    "--to timm --out t.pth --layout timm": ("--layout timm", "--to hf"),
    "--to hf --out . --layout jax": ("'--layout'", "'jax'"),
    "--to hf --out ..": ("encoder.safetensors", "choose another folder"),
    "--to timm": ("'--out'",),
    "--out t.pth": ("'--to'",),
}


@pytest.mark.parametrize("options", MISTAKES)
def test_options_that_do_not_fit(weights: str, capsys: pytest.CaptureFixture[str], options: str) -> None:
    line = refusal(capsys, weights, *options.split())
    assert all(part in line for part in MISTAKES[options]), line


def test_encoders_that_do_not_fit(weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_weights(Path(weights), architecture=replace(TINY, post_norm=True))
    assert "--to release" in refusal(capsys, weights, "--to", "timm", "--out", "a.pth")
    assert "--to release" in refusal(capsys, weights, "--to", "hf", "--out", "a")
    assert "nothing.pth" in refusal(capsys, "nothing.pth", "--to", "timm", "--out", "a.pth")
    torch.save({"transformer.wte.weight": torch.zeros(3, 2)}, "gpt.pt")
    assert "gpt.pt" in refusal(capsys, "gpt.pt", "--to", "timm", "--out", "a.pth")
