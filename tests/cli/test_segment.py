"""`mimref segment` end to end: protocols, files, figures, resuming, and mistakes."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from mimref.cli import run
from mimref.data.masks.open import ACCEPTED
from mimref.errors import ConfigError, Interrupted
from mimref.transfer.segment.config import SegmentConfig, TrainingConfig
from mimref.transfer.segment.linear import HeadsJob
from tests.pairs import write_pairs
from tests.tiny import turn

QUICK = ["--device", "cpu", "--workers", "0", "--updates", "6", "--set", "knn.memory=48", "--k", "5"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data")


def line(folder: Path, data: Path | str, *more: str) -> list[str]:
    return ["segment", str(folder / "base.safetensors"), "--data", str(data), *QUICK, *more]


def rows_of(out: Path) -> list[dict[str, str]]:
    with open(out / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_paper(folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line(folder, pairs, "--out", str(tmp_path / "out"))) == 0
    printed = capsys.readouterr()
    for words in ("mean IoU", "micro IoU", "pixel accuracy", "best one chosen on test", "per class"):
        assert words in printed.out, words
    assert "4 blocks are too few" in printed.err and "blocks 1, 2, 3, 4" in printed.err
    rows = rows_of(tmp_path / "out")
    heads = [row for row in rows if row["metric"] == "segment_miou" and row["classifier"]]
    best = rows[0]
    assert best["metric"] == "segment_miou" and best["select"] == "test" and not best["classifier"]
    assert len(heads) == 18 and float(best["value"]) == max(float(row["value"]) for row in heads)
    of_class = [float(row["value"]) for row in rows if row["metric"] == "segment_iou"]
    assert sum(of_class) / len(of_class) == pytest.approx(float(best["value"]))
    document = json.loads((tmp_path / "out/results.json").read_text())
    assert document["command"] == "segment" and document["config"]["data"]["spec"] == str(pairs)
    with Image.open(tmp_path / "out/segments.png") as image:
        assert image.width > 500
    assert not (tmp_path / "out/state/segment.pt").exists()
    # A second run gives the same numbers, which --resume prints at once.
    assert run(line(folder, pairs, "--out", str(tmp_path / "again"))) == 0
    assert rows_of(tmp_path / "again") == rows
    capsys.readouterr()
    assert run(line(folder, pairs, "--out", str(tmp_path / "out"), "--resume")) == 0
    assert "mean IoU" in capsys.readouterr().out
    assert run(line(folder, pairs, "--out", str(tmp_path / "out"))) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["paper", "dinov2", "knn"])
def test_every_block(
    protocol: str, folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--protocol", protocol, "--resolution", "16", "--blocks", "0,all", "--out", str(tmp_path / "out")]
    assert run(line(folder, pairs, *more)) == 0
    assert "mIoU" in capsys.readouterr().out
    rows = rows_of(tmp_path / "out")
    curve = {row["block"]: row["value"] for row in rows if row["metric"] == "block_segment_miou"}
    assert list(curve) == list("01234") and (tmp_path / "out/blocks.png").exists()
    # A single block gives the same result.
    assert run(line(folder, pairs, *more[:5], "3", "--out", str(tmp_path / "third"))) == 0
    (own,) = (row["value"] for row in rows_of(tmp_path / "third") if row["metric"] == "block_segment_miou")
    assert float(own) == pytest.approx(float(curve["3"]), abs=0.3)


@pytest.mark.parametrize("more", [["--protocol", "dinov2"], ["--protocol", "knn"], ["--test", "full"]])
def test_other_protocols(more: list[str], folder: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line(folder, pairs, *more, "--resolution", "8", "--upsampling", "nearest", "--quiet")) == 0
    printed = capsys.readouterr().out
    assert "mean IoU" in printed and "resolution 8" in printed


@pytest.mark.parametrize("protocol", ["paper", "knn"])
def test_peculiar_images_are_reported(
    protocol: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "data")
    turn(data / "train" / "images" / "train03.png")
    turn(data / "val" / "images" / "val01.png")
    assert run(line(folder, data, "--protocol", protocol, "--resolution", "8")) == 0
    lines = [each for each in capsys.readouterr().err.splitlines() if "EXIF orientation" in each]
    assert len(lines) == 2
    assert "1 of 12 training images" in lines[0] and "1 of 4 validation images" in lines[1]


def test_interrupted_training_is_resumed(
    folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run(line(folder, pairs, "--out", str(whole))) == 0
    update = HeadsJob.update

    def stop(job: HeadsJob, batch: object) -> None:
        update(job, batch)  # type: ignore[arg-type]
        if job.step == 2:
            job.step += 1
            job.save()
            raise Interrupted(2, "stopped")

    monkeypatch.setattr(HeadsJob, "update", stop)
    assert run(line(folder, pairs, "--out", str(out))) == 130
    monkeypatch.undo()
    assert run(line(folder, pairs, "--out", str(out))) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(line(folder, pairs, "--out", str(out), "--resume")) == 0
    assert rows_of(out) == rows_of(whole)


def test_mistakes_are_listed_together(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_pairs(tmp_path / "data")
    Image.new("L", (8, 9)).save(data / "train/masks/train03.png")
    Image.new("L", (20, 16), 200).save(data / "val/masks/val01.png")
    assert run(line(folder, data, "--blocks", "9", "--resolution", "13")) == 2
    lines = [each for each in capsys.readouterr().err.splitlines() if each.startswith("mimref: error: ")]
    assert len(lines) == 3
    assert any("--resolution 13" in each and "16" in each for each in lines)
    assert any("train03.png" in each and "8 x 9" in each for each in lines)
    assert any("val01.png" in each and "200" in each for each in lines)
    assert run(line(folder, data, "--blocks", "9")) == 2
    assert "--blocks 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--protocol", "papr"], ["--protocol papr", "did you mean 'paper'"]),
        (["--resume"], ["--resume", "--out DIR"]),
        (["--protocol", "knn", "--k", "500"], ["500", "48 patches"]),
        (["--set", "training.updates=none", "--epochs", "0"], ["--epochs 0"]),
        (["--test", "slide", "--resolution", "16", "--set", "stride=17"], ["stride 17", "windows of 16 pixels"]),
    ],
)
def test_one_line_per_mistake(
    more: list[str], words: list[str], folder: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line(folder, pairs, *more)) == 2
    (last,) = (each for each in capsys.readouterr().err.splitlines() if "error" in each)
    assert all(word in last for word in words), last


def test_epochs_replace_updates(folder: Path, pairs: Path, tmp_path: Path) -> None:
    short = [each for each in line(folder, pairs) if each not in ("--updates", "6")]
    for protocol in ("paper", "dinov2"):
        out = tmp_path / protocol
        more = ["--protocol", protocol, "--resolution", "16", "--epochs", "2", "--batch-size", "5", "--out", str(out)]
        assert run([*short, *more]) == 0
        # An epoch of 12 images has two batches of 5.
        assert {row["updates"] for row in rows_of(out)} == {"4"}


def test_epochs_and_rates_wherever_they_are_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SegmentConfig] = []

    def record(config: SegmentConfig, **_: object) -> None:
        seen.append(config)
        raise ConfigError("enough")

    def training(*words: str) -> TrainingConfig:
        assert run(["segment", *words]) == 2
        return seen[-1].training

    monkeypatch.setattr("mimref.transfer.segment.run.evaluate_segment", record)
    (tmp_path / "own.toml").write_text("training.epochs = 3")
    dinov2 = ["--protocol", "dinov2"]
    for words in (["--preset", str(tmp_path / "own.toml"), *dinov2], [*dinov2, "--set", "training.epochs=3"]):
        found = training(*words)
        assert (found.epochs, found.updates) == (3, None)
    assert training("--set", "training.epochs=3", "--updates", "7").updates == 7
    assert training("quickstart", *dinov2).updates == 40_000
    for name in ("quickstart", "segment/quickstart"):
        assert training("--preset", name, *dinov2).lr == [0.001]


def test_one_process_alone(
    folder: Path, pairs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mimref.transfer.segment.run.world_size", lambda: 2)
    assert run(line(folder, pairs)) == 2
    assert "torchrun" in capsys.readouterr().err


def test_images_without_masks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line(folder, folder / "data")) == 2
    assert "images/ and masks/" in capsys.readouterr().err
    assert run(["segment", str(folder / "base.safetensors"), *QUICK]) == 2
    assert "--data" in capsys.readouterr().err


def test_mosaics(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--set", "mosaics.train=20", "--set", "mosaics.val=4", "--quiet"]
    assert run(["segment", *QUICK, *few]) == 0
    printed = capsys.readouterr().out
    assert "resolution 32" in printed and "ground" in printed


def test_help_names_the_data_that_segment_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["segment", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "images/ and masks/" in printed and "torchvision:" not in printed
    for kind in ("ADE20K", "Pascal VOC", "hf:FOLDER", "hf:NAME", "digits", "fashion-mnist"):
        assert kind in printed and kind in ACCEPTED
