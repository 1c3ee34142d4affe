"""`--encoder` and `--grid`: every command that reads a foreign file chooses its encoder the same way."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mimref.cli import run
from mimref.refinement.run import refine
from tests.checkpoints import WIDTH, prefixed, timm_vit
from tests.tiny import refine_config, write_labelled

CHEAP = ["--device", "cpu", "--workers", "0"]


@pytest.fixture
def two(tmp_path: Path) -> str:
    """A file with two encoders and a projector; each encoder is also in a file of its own."""
    state = dict(timm_vit().state_dict())
    student = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in state.items()}
    content = prefixed("student_backbone.", student) | prefixed("teacher_backbone.", state)
    torch.save({"state_dict": content | {"projector.0.weight": torch.zeros(2, 2)}}, tmp_path / "two.ckpt")
    torch.save({"model": student}, tmp_path / "student.pth")
    torch.save({"model": state}, tmp_path / "teacher.pth")
    return str(tmp_path / "two.ckpt")


def test_inspect(two: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", two]) == 0
    printed = capsys.readouterr().out
    assert "below state_dict.teacher_backbone" in printed and "state_dict.student_backbone" in printed
    assert run(["inspect", two, "--encoder", "student", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["prefix"] == "state_dict.student_backbone" and printed["others"] == ["state_dict.teacher_backbone"]
    assert set(printed["dropped"]) == {"other encoder", "projection head"} and printed["grid"] == [4, 4]
    assert printed["notices"][0] == "left out beside the encoder: projector (1 tensor)"


COMMANDS = [
    ["inspect", "FILE"],
    ["export", "FILE", "--to", "timm", "--out", "out.pth"],
    ["push", "FILE", "me/refined"],
    ["interpolate", "FILE", "FILE", "--data", "DATA"],
    ["knn", "FILE", "--data", "DATA"],
    ["lowshot", "FILE", "--data", "DATA"],
    ["cluster", "FILE", "--data", "DATA"],
    ["probe", "FILE", "--data", "DATA", "--cached"],
    ["analyze-blocks", "FILE", "--data", "DATA"],
    ["assess", "FILE", "--data", "DATA"],
    ["compare", "FILE", "quickstart", "--data", "DATA"],
    ["extract", "FILE", "--data", "DATA", "--out", "out.npz"],
    ["refine", "--weights", "FILE", "--data", "DATA", "--preset", "mae_b16", "--dry-run"],
    ["benchmark", "step", "--set", "encoder.weights=FILE", "--preset", "mae_b16"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]).removesuffix(" FILE"))
def test_every_command_refuses_an_unknown_encoder(
    command: list[str], two: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = str(write_labelled(tmp_path / "data"))
    line = [word.replace("FILE", two).replace("DATA", data) for word in command]
    assert run([*line, "--encoder", "adult"]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("mimref: error: ") and "adult" in line]
    assert captured.out == "" and len(errors) == 1 and "--encoder adult" in errors[0]
    assert "state_dict.student_backbone, state_dict.teacher_backbone" in captured.err


def test_features_are_those_of_the_chosen_encoder(two: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_labelled(tmp_path / "data")

    def features(file: str, *options: str) -> np.ndarray:
        out = tmp_path / "out.npz"
        line = ["extract", file, "--data", str(data), "--out", str(out), "--force", *CHEAP, *options]
        assert run(line) == 0
        return np.load(out)["x"]

    # All calls share one cache, in which each encoder of a file has its own entries.
    teacher, student = features(two), features(two, "--encoder", "student")
    told = capsys.readouterr().err
    assert "of several encoders state_dict.teacher_backbone is read" in told
    for x, name in ((teacher, "teacher"), (student, "student")):
        np.testing.assert_allclose(x, features(str(tmp_path / f"{name}.pth")), atol=1e-5)
        np.testing.assert_array_equal(x, features(two, "--encoder", name))
    assert np.abs(teacher - student).max() > 0.1


def test_the_chosen_encoder_is_refined_and_exported(two: str, tmp_path: Path) -> None:
    tiny = {"heads__blocks": "2-3", "heads_stage__epochs": 1, "encoder_stage__epochs": 1, "encoder_stage__lr": 1e-9}
    config = refine_config(Path(two), write_labelled(tmp_path / "data"), encoder__part="student", **tiny)
    refine(config, tmp_path / "run")
    chosen = torch.load(tmp_path / "student.pth")["model"]["blocks.0.mlp.fc1.weight"]
    weights = load_file(tmp_path / "run" / "encoder.safetensors")["blocks.0.mlp.fc1.weight"]
    torch.testing.assert_close(weights, chosen, rtol=0, atol=1e-4)
    assert 'part = "student"' in (tmp_path / "run" / "config.toml").read_text()
    out = tmp_path / "student_again.pth"
    assert run(["export", two, "--encoder", "student", "--to", "timm", "--out", str(out), "--num-heads", "2"]) == 0
    assert torch.equal(torch.load(out)["blocks.0.mlp.fc1.weight"], chosen)


def test_grids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = dict(timm_vit().state_dict()) | {"pos_embed": torch.randn(1, 33, WIDTH)}
    torch.save(state, tmp_path / "wide.pth")
    file = str(tmp_path / "wide.pth")
    assert run(["inspect", file]) == 0
    assert "of 4 x 8 patches" in capsys.readouterr().out
    assert run(["inspect", file, "--grid", "2,16", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["grid"] == [2, 16] and printed["architecture"]["image_size"] == 64
    out = str(tmp_path / "out.pth")
    assert run(["export", file, "--grid", "8,4", "--to", "timm", "--out", out]) == 0
    data = str(write_labelled(tmp_path / "data"))
    assert run(["knn", file, "--data", data, "--k", "1", "--set", "encoder.grid=[2,16]", *CHEAP]) == 0
    capsys.readouterr()
    for text in ("2", "0,4", "4,8,2", "a,b"):
        assert run(["inspect", file, "--grid", text]) == 2
        assert "--grid" in capsys.readouterr().err
    assert run(["knn", file, "--data", data, "--set", "encoder.grid=[3,3]"]) == 2
    assert "3 x 3" in capsys.readouterr().err
