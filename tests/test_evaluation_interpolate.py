"""Weight averages between a base and a refined encoder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import mimref
from mimref.cli import run
from mimref.config.base import DataConfig
from mimref.data.open import open_source
from mimref.data.sources import ImageSource, Split
from mimref.encoders.checkpoints import read_checkpoint
from mimref.encoders.vit import Architecture
from mimref.features import opening
from tests.tiny import ARCHITECTURE, write_labelled, write_weights


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("ends")
    return write_weights(folder / "base.safetensors"), write_weights(folder / "refined.safetensors", seed=1)


def test_averages_equal_a_plain_loop_and_have_a_knn(
    ends: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_labelled(tmp_path / "data")
    line = ["interpolate", *map(str, ends), "--alpha", "0,0.3,1", "--data", str(images), "--out", str(tmp_path / "out")]
    opened: list[str] = []

    def counting(data: DataConfig, split: Split, **options: Any) -> ImageSource:
        opened.append(split)
        return open_source(data, split, **options)

    monkeypatch.setattr(opening, "open_source", counting)
    assert run([*line, "--device", "cpu", "--workers", "0", "--quiet"]) == 0
    assert opened == ["train", "val"]
    base, refined = (read_checkpoint(path).tensors for path in ends)
    for alpha in (0.0, 0.3, 1.0):
        made = read_checkpoint(tmp_path / "out" / f"alpha-{alpha:g}.safetensors")
        assert made.header["interpolated"]["alpha"] == alpha and made.architecture == ARCHITECTURE
        for name, tensor in made.tensors.items():
            expected = (1 - alpha) * base[name].double() + alpha * refined[name].double()
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=0 if alpha in (0, 1) else 1e-6)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert [(row["metric"], row["alpha"]) for row in rows] == [("knn_top1", 0.0), ("knn_top1", 0.3), ("knn_top1", 1.0)]
    assert 0 <= rows[1]["value"] <= 100
    left_out = images / "train" / "a" / "000.png"
    left_out.write_bytes(b"no image")
    assert run([*line, "--device", "cpu", "--workers", "0", "--quiet", "--force"]) == 0
    (bad,) = json.loads((tmp_path / "out" / "results.json").read_text())["bad_images"]
    assert bad["path"] == str(left_out)


def test_what_is_assumed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=0)  # has two heads
    torch.save(vit.state_dict(), tmp_path / "foreign.pth")
    foreign = str(tmp_path / "foreign.pth")
    for command in (["interpolate", foreign, foreign], ["export", foreign, "--to", "timm"]):
        out = tmp_path / f"{command[0]}.safetensors"
        assert run([*command, "--out", str(out)]) == 0
        assert "1 attention heads are assumed" in capsys.readouterr().err
    heads = ["--num-heads", "2"]
    assert run(["export", foreign, "--to", "timm", "--out", str(tmp_path / "two.safetensors"), *heads]) == 0
    assert "heads are assumed" not in capsys.readouterr().err
    made = read_checkpoint(tmp_path / "two.safetensors").architecture
    assert made is not None and made.num_heads == 2
    with pytest.warns(UserWarning, match="1 attention heads are assumed"):
        mimref.load(foreign)
    assert mimref.load(foreign, num_heads=2).model.blocks(torch.zeros(1, 3, 160, 160), [1])


def test_without_data_only_weights_are_written(
    ends: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["interpolate", *map(str, ends), "--out", str(tmp_path / "out")]
    assert run(line) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith(f"5 encoders in {tmp_path / 'out'}\n")
    assert len(list((tmp_path / "out").glob("alpha-*.safetensors"))) == 5
    assert run(line) == 2
    assert "holds results" in capsys.readouterr().err
    assert run([*line, "--force"]) == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (replace(ARCHITECTURE, depth=3), "depth 3 and 4"),
        (replace(ARCHITECTURE, num_heads=1), "num_heads 1 and"),
        (replace(ARCHITECTURE, image_size=32), "image_size 32 and 16"),
    ],
)
def test_encoders_of_different_kinds(
    changes: Architecture, told: str, ends: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_weights(tmp_path / "other.safetensors", architecture=changes)
    assert run(["interpolate", str(other), str(ends[1]), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "are encoders of different kinds" in message and told in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", ["0,x", "1.5", "-0.1", ""])
def test_shares_that_are_none(
    alpha: str, ends: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["interpolate", *map(str, ends), f"--alpha={alpha}", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "alpha" in message and message.count("\n") == 1
