"""Output folders of evaluations: what they may already contain, and what their results record."""

import os
from pathlib import Path

import pytest

from mimref.cli import run
from mimref.errors import OutputError
from mimref.results import check_folder
from mimref.training.folder import RunFolder
from tests.tiny import REFINE, arguments, results, write_images

CHEAP = ["--device", "cpu", "--workers", "0"]
PROBE = ["--cached", "--epochs", "1", "--batch-size", "16", "--cache", "off"]


def line(command: str, folder: Path, *more: str) -> list[str]:
    return [command, str(folder / "base.safetensors"), "--data", str(folder / "data"), *CHEAP, *more]


def refine(folder: Path, out: Path) -> list[str]:
    return arguments(
        "refine", out, REFINE | {"encoder.weights": folder / "base.safetensors", "data.spec": folder / "data"}
    )


@pytest.mark.parametrize("name", ["results.md", "report.html", "gallery.png", "comparison.png"])
def test_files_of_a_users_own_are_kept(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine")
    suite = tmp_path.parent / "suite.toml"
    suite.write_text('entries = [{name = "a", data = "digits", protocol = "knn", settings = {k = [1]}}]')
    for command in (line("knn", folder), ["doctor"], ["transfer", "quickstart", "--suite", str(suite)]):
        assert run([*command, "--out", str(tmp_path)]) == 2
        assert name in capsys.readouterr().err and (tmp_path / name).read_text() == "mine"
    (own := tmp_path / "finetune").mkdir()
    (own / "curve.png").touch()
    with pytest.raises(OutputError, match=r"curve\.png"):
        RunFolder(own).check(resume=False, force=False)


def test_force_leaves_nothing_of_the_replaced_results(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(line("cluster", folder, "--clusters", "3", "--runs", "2", "--out", str(out))) == 0
    assert (out / "assignments.csv").exists() and (out / "report.html").exists()
    (out / "notes.txt").write_text("mine")
    assert run(line("knn", folder, "--k", "3", "--out", str(out), "--force")) == 0
    assert sorted(each.name for each in out.iterdir()) == ["notes.txt", "results.csv", "results.json"]


def test_what_cannot_be_removed_is_told_after_the_scores(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.html" / "inside").mkdir(parents=True)
    assert run(line("knn", folder, "--k", "3", "--out", str(tmp_path), "--force")) == 2
    printed = capsys.readouterr()
    assert "k-NN top-1" in printed.out and "report.html: cannot be removed" in printed.err


def test_resume_and_force_exclude_each_other(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        refine(folder, tmp_path / "run"),
        [*line("probe", folder, *PROBE), "--out", str(tmp_path / "probe")],
    ):
        assert run(command) == 0
        capsys.readouterr()
        assert run([*command, "--resume", "--force"]) == 2
        assert "choose one" in capsys.readouterr().err


def test_results_do_not_go_into_an_unfinished_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    for more in ([], ["--force"]):
        capsys.readouterr()
        assert run(line("knn", folder, "--out", str(tmp_path), *more)) == 2
        error = capsys.readouterr().err
        assert str(tmp_path) in error and "--out" in error
    assert not (tmp_path / "results.json").exists()


def test_resume_leaves_other_results_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line("knn", folder, "--out", str(tmp_path), "--cache", "off")) == 0
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "step0000000004.pt").write_bytes(b"precious")
    assert run([*refine(folder, tmp_path), "--resume"]) == 2
    error = capsys.readouterr().err
    assert "knn" in error and "--out" in error
    assert (tmp_path / "state" / "step0000000004.pt").exists()


def test_resume_of_a_finished_probe_prints_its_results(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(line("probe", folder, *PROBE, "--out", str(tmp_path))) == 0
    table, before = capsys.readouterr().out, (tmp_path / "results.json").read_bytes()
    monkeypatch.setattr("mimref.evaluation.probe.protocol.evaluate_probe", None)
    assert run(line("probe", folder, *PROBE, "--out", str(tmp_path), "--resume")) == 0
    assert capsys.readouterr().out == table and (tmp_path / "results.json").read_bytes() == before
    monkeypatch.setenv("RANK", "1")
    assert run(line("probe", folder, *PROBE, "--out", str(tmp_path), "--resume")) == 0
    assert capsys.readouterr().out == ""


def test_the_images_are_those_of_the_encoder_that_is_named(folder: Path, tmp_path: Path) -> None:
    named = ["--set", f"checkpoint={folder / 'base.safetensors'}", *CHEAP, "--cache", "off"]
    assert run(["knn", *named, "--out", str(tmp_path / "named")]) == 0
    assert results(tmp_path / "named")["config"]["data"]["spec"] == str(folder / "data")
    few = ["--set", "data.train_limit=100", "--cache", "off", "--out", str(tmp_path / "default")]
    assert run(["knn", *CHEAP, *few]) == 0
    assert results(tmp_path / "default")["config"]["data"]["spec"] == "digits"


def test_names_that_no_folder_can_have(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line("knn", folder, "--out", "x" * 300)) == 2
    error = capsys.readouterr().err
    assert "x" * 300 in error and "--out" in error and error.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_found_before_any_work(folder: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="--out"):
        check_folder(tmp_path / "new" / "results", force=False)


def test_a_cache_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for command in ("list", "clear", "verify"):
        assert run(["cache", command, "--cache", str(tmp_path / "file")]) == 2
        error = capsys.readouterr().err
        assert f"--cache {tmp_path / 'file'}" in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["knn", "cluster"])
def test_scores_that_cannot_be_written_are_printed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    assert run(line(command, folder, "--quiet", "--cache", "off")) == 0
    expected = capsys.readouterr().out

    def full(*_: object, **__: object) -> None:
        raise OutputError("cannot write results.csv: No space left on device")

    monkeypatch.setattr("mimref.results.write_bytes", full)
    assert run(line(command, folder, "--quiet", "--cache", "off", "--out", str(tmp_path / "out"))) == 2
    captured = capsys.readouterr()
    assert captured.out == expected and "No space left" in captured.err


def test_as_many_clusters_as_images_are_refused_before_the_encoder_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        write_images(tmp_path, per_class=1, classes="abc", split=split)
    assert run(["cluster", "quickstart", "--data", str(tmp_path), *CHEAP, "--cache", "off"]) == 2
    error = capsys.readouterr().err
    assert "3 clusters" in error and "features of" not in error
