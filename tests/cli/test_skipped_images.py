"""Every command that leaves images out names each of them, on the terminal and once in its results."""

from pathlib import Path

import pytest

from mimref.cli import run
from tests.cli.evaluations import CHEAP
from tests.tiny import FINETUNE, REFINE, arguments, results, write_images, write_labelled

SUITE = """
[[entries]]
name = "neighbours"
data = "{data}"
protocol = "knn"
settings = {{k = [3]}}

[[entries]]
name = "tuned"
data = "{data}"
protocol = "finetune"
settings = {{"finetune.epochs" = 1, batch_size = 8}}
"""
FEW = ["--set", "probe.epochs=1", "--set", "probe.batch_size=16"]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled images with an unreadable one in each split."""
    data = write_labelled(tmp_path_factory.mktemp("damaged") / "data")
    for image in broken(data):
        Path(image).write_bytes(b"nothing")
    return data


def broken(data: Path, *splits: str) -> list[str]:
    return [str(data / split / "a" / "003.png") for split in splits or ("train", "val")]


def check(words: list[str], out: Path, expected: list[str], told: pytest.CaptureFixture[str]) -> None:
    assert run([*words, "--set", "data.max_bad=2"]) == 0, told.readouterr().err
    error = told.readouterr().err
    assert [path for path in expected if f"{path} (not an image)" not in error] == [], error
    assert sorted(each["path"] for each in results(out)["bad_images"]) == expected


@pytest.mark.parametrize(
    ("words", "splits"),
    [
        (["knn"], ["train", "val"]),
        (["lowshot", "--shots", "2", "--splits", "1"], ["train", "val"]),
        (["cluster", "--runs", "1"], ["val"]),
        (["probe", "--cached", *FEW], ["train", "val"]),
        (["probe", *FEW], ["train", "val"]),
        (["probe", "--kind", "attentive", *FEW], ["train", "val"]),
        (["analyze-blocks"], ["train", "val"]),
        (["assess"], ["train"]),
        (["compare", "{refined}", "--protocols", "knn"], ["train", "val"]),
        (["interpolate", "{refined}", "--alpha", "0,1"], ["train", "val"]),
        (["interpolate", "{refined}", "--alpha", "0,1", "--choose", "knn"], ["train", "val"]),
        (["interpolate", "{refined}", "--alpha", "0,1", "--choose", "assess"], ["train", "val"]),
    ],
)
def test_evaluations(
    words: list[str], splits: list[str], folder: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *more = (word.format(refined=folder / "refined.safetensors") for word in words)
    line = [first, str(folder / "base.safetensors"), *more, "--data", str(damaged), "--out", str(tmp_path / "out")]
    check([*line, *CHEAP], tmp_path / "out", broken(damaged, *splits), capsys)


def test_a_reconstruction_reads_training_images_that_nothing_else_reads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        data = write_images(tmp_path / "data", per_class=16, classes=("",), split=split)
    image = data / "train" / "003.png"
    image.write_bytes(b"nothing")
    line = ["analyze-blocks", str(folder / "base.safetensors"), "--reconstruction", *CHEAP, "--data", str(data)]
    settings = {"epochs": 1, "warmup_epochs": 0, "batch_size": 8, "decoder.width": 16, "decoder.num_heads": 2}
    few = [part for key, value in settings.items() for part in ("--set", f"reconstruction.{key}={value}")]
    check([*line, *few, "--out", str(tmp_path / "out")], tmp_path / "out", [str(image)], capsys)


@pytest.mark.parametrize("command", ["refine", "finetune"])
def test_training_also_when_it_is_finished(
    command: str, folder: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"encoder.weights": str(folder / "base.safetensors"), "data.spec": str(damaged)}
    few = {"heads_stage.epochs": 1, "encoder_stage.epochs": 1, "evaluate.enabled": True, "evaluate.exhibits": False}
    settings = REFINE | few if command == "refine" else FINETUNE | {"finetune.epochs": 1, "finetune.warmup_epochs": 0.0}
    line = [*arguments(command, tmp_path / "out", settings | common), "--no-report"]
    check(line, tmp_path / "out", broken(damaged), capsys)
    check([*line, "--resume"], tmp_path / "out", broken(damaged), capsys)


def test_a_suite_also_of_what_was_finished_before(
    folder: Path, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "suite.toml").write_text(SUITE.format(data=damaged))
    out = tmp_path / "out"
    line = ["transfer", str(folder / "base.safetensors"), "--suite", str(tmp_path / "suite.toml"), "--out", str(out)]
    line += ["--workers", "0", "--no-report"]
    check(line, out, broken(damaged), capsys)
    tuned = results(out / "tuned" / "base.safetensors")
    assert sorted(each["path"] for each in tuned["bad_images"]) == broken(damaged)
    check([*line, "--resume"], out, broken(damaged), capsys)
