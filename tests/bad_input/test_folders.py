"""Folders of images that training cannot use, or can use only in part: one line and exit code 2, or a warning."""

from pathlib import Path
from typing import Any

import pytest

from mimref.cli import run
from tests.tiny import PRETRAIN, REFINE, arguments, results, write_images, write_labelled, write_weights

SHORT = {"heads_stage.epochs": 1, "encoder_stage.epochs": 1, "monitor.knn_every_epochs": 0}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("base") / "base.safetensors")


def line(command: str, weights: Path, data: object, out: Path, **changes: Any) -> list[str]:
    settings = REFINE | SHORT | {"encoder.weights": weights} if command == "refine" else PRETRAIN | {"mae.epochs": 1}
    return arguments(command, out, settings | {"data.spec": data} | changes)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mimref: error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("command", ["refine", "pretrain"])
def test_missing_empty_and_foreign_folders(
    command: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "a.txt").write_text("text")
    (tmp_path / "file.png").write_text("")
    for name, message in (
        ("nowhere", "no such folder"),
        ("empty", "no images"),
        ("documents", "no images"),
        ("file.png", "not a folder"),
    ):
        assert run(line(command, weights, tmp_path / name, tmp_path / "out")) == 2
        error = one_line(capsys)
        assert str(tmp_path / name) in error and message in error
    assert run(line(command, weights, "digitz", tmp_path / "out")) == 2
    assert "'digits'" in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["refine", "pretrain"])
def test_too_few_images(command: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_images(tmp_path / "data", per_class=3)
    assert run(line(command, weights, data, tmp_path / "out")) == 2
    first, *others = capsys.readouterr().err.splitlines()
    assert "batch_size 12" in first and "--batch-size 6" in first
    assert ["heads.queue_size 24" in line for line in others] == [True] * (command == "refine")


@pytest.mark.parametrize("command", ["refine", "pretrain"])
def test_bad_files_are_skipped_counted_and_named_up_to_a_limit(
    command: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_labelled(tmp_path / "data")
    contents = {"empty.png": b"", "text.jpg": b"not an image"}
    intact = next((data / "train" / "a").glob("*.png")).read_bytes()
    contents["truncated.png"] = intact[: len(intact) // 2]
    for name, content in contents.items():
        (data / "train" / "b" / name).write_bytes(content)
    assert run(line(command, weights, data, tmp_path / "out", **{"batch_size": 17})) == 0
    captured = capsys.readouterr().err
    warning = next(line for line in captured.splitlines() if line.startswith("warning: 3 "))
    assert all(name in warning for name in contents)
    named = {Path(bad["path"]).name: bad["reason"] for bad in results(tmp_path / "out")["bad_images"]}
    assert named.keys() == contents.keys() and named["empty.png"] == "empty file"
    assert run(line(command, weights, data, tmp_path / "most", **{"batch_size": 17, "data.max_bad": 2})) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "data.max_bad=2" in message and str(data) in message


def test_a_whole_batch_of_bad_files_is_ignored(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", per_class=6, classes=("",))
    for index in range(22):
        (data / f"bad{index:02}.png").write_bytes(b"")
    changes = {"batch_size": 2, "heads.queue_size": 8}
    assert run(line("refine", weights, data, tmp_path / "out", **changes)) == 0
    assert "warning: 22 " in capsys.readouterr().err


def test_training_folders_without_validation_images_get_measures_without_labels(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", per_class=12, split="train")
    assert run(line("refine", weights, data, tmp_path / "out", **{"evaluate.enabled": True})) == 0
    captured = capsys.readouterr()
    assert "neighbour consistency" in captured.out and "k-NN" not in captured.out
    assert "val/" in captured.err


def test_validation_classes_that_training_lacks(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", per_class=12, split="train")
    write_images(data, per_class=2, classes=("a", "zebra"), split="val")
    # Training needs no validation images: a note explains why there is no k-NN.
    assert run(line("refine", weights, data, tmp_path / "out", **{"evaluate.enabled": True})) == 0
    assert "'zebra'" in capsys.readouterr().err
