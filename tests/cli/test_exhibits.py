"""exhibits.json in the folders of evaluations."""

from pathlib import Path

import pytest

from mimref.cli import run
from mimref.evaluation.exhibits import collect
from mimref.evaluation.exhibits.contents import Exhibits
from tests.cli.evaluations import CHEAP


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("cluster", ["--runs", "2", "--classes", "a,b"]),
        ("compare", ["--protocols", "knn"]),
        ("analyze-blocks", ["--k", "3"]),
    ],
)
def test_evaluations_write_them_only_into_a_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, more: list[str]
) -> None:
    names = ("base", "refined") if command == "compare" else ("base",)
    line = [command, *(str(folder / f"{name}.safetensors") for name in names), *more, *CHEAP]
    assert run([*line, "--out", str(tmp_path / "out")]) == 0
    shown = Exhibits.read(tmp_path / "out")
    assert shown is not None and len(shown.images) == 16
    made = (tmp_path / "out" / "exhibits.json").stat().st_mtime_ns
    assert made <= (tmp_path / "out" / "results.json").stat().st_mtime_ns
    # Results of another command remove the exhibits.
    knn = ["knn", str(folder / "base.safetensors"), "--k", "3", *CHEAP, "--out", str(tmp_path / "out"), "--force"]
    assert run(knn) == 0
    assert not (tmp_path / "out" / "exhibits.json").exists()

    def refuse(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(collect, "number_images", refuse)
    assert run(line) == 0


def test_a_failure_is_a_warning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(collect, "number_images", fail)
    line = ["cluster", str(folder / "base.safetensors"), "--runs", "2", *CHEAP, "--out", str(tmp_path)]
    assert run(line) == 0
    assert "no room" in capsys.readouterr().err
    assert (tmp_path / "results.json").exists() and not (tmp_path / "exhibits.json").exists()


def test_features_from_files_have_no_images(folder: Path, tmp_path: Path) -> None:
    base = str(folder / "base.safetensors")
    files = [str(tmp_path / "train.npz"), str(tmp_path / "val.npz")]
    for split, file in zip(("train", "val"), files, strict=True):
        assert run(["extract", base, "--split", split, "--out", file, *CHEAP]) == 0
    assert run(["cluster", "--features", *files, "--runs", "2", "--out", str(tmp_path / "out")]) == 0
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["report.html", "results.csv", "results.json"]
