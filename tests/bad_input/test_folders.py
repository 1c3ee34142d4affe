"""Folders of images that training cannot use, or only in part: one line and exit code 2, or a warning."""

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
        ("nowhere", "no such folder or data set"),
        ("empty", "no images in "),
        ("documents", "no images in "),
        ("file.png", "is a file, not a folder"),
    ):
        assert run(line(command, weights, tmp_path / name, tmp_path / "out")) == 2
        assert message in one_line(capsys)
    assert run(line(command, weights, "digitz", tmp_path / "out")) == 2
    assert "did you mean 'digits'?" in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["refine", "pretrain"])
def test_too_few_images(command: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_images(tmp_path / "data", per_class=3)
    assert run(line(command, weights, data, tmp_path / "out")) == 2
    assert "--batch-size 6" in one_line(capsys)


@pytest.mark.parametrize("command", ["refine", "pretrain"])
def test_bad_files_are_skipped_counted_and_named_up_to_a_limit(
    command: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_labelled(tmp_path / "data")
    contents = {"empty.png": b"", "text.jpg": b"not an image"}
    whole = next((data / "train" / "a").glob("*.png")).read_bytes()
    contents["truncated.png"] = whole[: len(whole) // 2]
    for name, content in contents.items():
        (data / "train" / "b" / name).write_bytes(content)
    assert run(line(command, weights, data, tmp_path / "out", **{"batch_size": 17})) == 0
    captured = capsys.readouterr().err
    warning = next(line for line in captured.splitlines() if "unreadable" in line)
    assert warning.startswith("warning: 3 images are left out, unreadable: ")
    assert all(name in warning for name in contents)
    named = {Path(bad["path"]).name: bad["reason"] for bad in results(tmp_path / "out")["bad_images"]}
    assert named.keys() == contents.keys() and named["empty.png"] == "empty file"
    for most in (0, 2):
        out = tmp_path / f"most{most}"
        assert run(line(command, weights, data, out, **{"batch_size": 17, "data.max_bad": most})) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert f"could not be read, more than data.max_bad={most}: {data}" in message


def test_a_whole_batch_of_bad_files_is_passed_over(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", per_class=6, classes=("",))
    for index in range(22):
        (data / f"bad{index:02}.png").write_bytes(b"")
    changes = {"batch_size": 2, "heads.queue_size": 8}
    assert run(line("refine", weights, data, tmp_path / "out", **changes)) == 0
    assert "warning: 22 images are left out" in capsys.readouterr().err


def test_training_folders_without_validation_images_train_without_a_table(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", per_class=12, split="train")
    assert run(line("refine", weights, data, tmp_path / "out", **{"evaluate.enabled": True})) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no before/after table: " in captured.err and "has train/ but no val/ or test/" in captured.err


def test_validation_classes_that_training_lacks(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", per_class=12, split="train")
    write_images(data, per_class=2, classes=("a", "zebra"), split="val")
    # Training needs no validation images: the finding is told instead of the table.
    assert run(line("refine", weights, data, tmp_path / "out", **{"evaluate.enabled": True})) == 0
    assert "no before/after table: " in (errors := capsys.readouterr().err) and "'zebra'" in errors
