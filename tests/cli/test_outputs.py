"""Output folders of evaluations: what they may hold already, and what their results say."""

import os
from pathlib import Path

import pytest

from mimref.cli import run
from mimref.errors import OutputError
from mimref.results import check_folder
from tests.tiny import REFINE, arguments, results, write_labelled, write_weights

CHEAP = ["--device", "cpu", "--workers", "0"]
PROBE = ["--cached", "--epochs", "1", "--batch-size", "16", "--cache", "off"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder and images."""
    made = tmp_path_factory.mktemp("outputs")
    write_weights(made / "base.safetensors")
    write_labelled(made / "data")
    return made


def line(command: str, folder: Path, *more: str) -> list[str]:
    return [command, str(folder / "base.safetensors"), "--data", str(folder / "data"), *CHEAP, *more]


def refine(folder: Path, out: Path) -> list[str]:
    return arguments(
        "refine", out, REFINE | {"encoder.weights": folder / "base.safetensors", "data.spec": folder / "data"}
    )


def test_results_do_not_go_into_an_unfinished_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*refine(folder, tmp_path), "--set", "heads_stage.lr=1e30"]) == 2  # diverges
    assert (tmp_path / "state").is_dir()
    for more in ([], ["--force"]):
        capsys.readouterr()
        assert run(line("knn", folder, "--out", str(tmp_path), *more)) == 2
        assert "holds an unfinished run" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_resume_leaves_other_results_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line("knn", folder, "--out", str(tmp_path), "--cache", "off")) == 0
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "step0000000004.pt").write_bytes(b"precious")
    assert run([*refine(folder, tmp_path), "--resume"]) == 2
    assert "holds results of knn, not of refine" in capsys.readouterr().err
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
    from mimref.encoders.checkpoints import load_encoder, save_encoder
    from mimref.encoders.vit import Encoder

    encoder, header = load_encoder(folder / "base.safetensors")
    assert isinstance(encoder, Encoder)
    save_encoder(tmp_path / "a.safetensors", encoder, header | {"data": {"spec": str(folder / "data")}})
    named = ["--set", f"checkpoint={tmp_path / 'a.safetensors'}", *CHEAP, "--cache", "off"]
    for command in ("knn", "lowshot", "cluster"):
        out = tmp_path / command
        assert run([command, *named, "--out", str(out)]) == 0
        assert results(out)["config"]["data"]["spec"] == str(folder / "data")
    assert run(["knn", *CHEAP, "--cache", "off", "--out", str(tmp_path / "default")]) == 0
    assert results(tmp_path / "default")["config"]["data"]["spec"] == "digits"


def test_names_that_no_folder_can_have(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line("knn", folder, "--out", "x" * 300)) == 2
    assert f"{'x' * 300}: File name too long" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_found_before_any_work(folder: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        check_folder(tmp_path / "new" / "results", force=False)


def test_a_cache_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for command in ("list", "clear", "verify"):
        assert run(["cache", command, "--cache", str(tmp_path / "file")]) == 2
        assert capsys.readouterr().err == f"mimref: error: --cache {tmp_path / 'file'}: is a file; give a folder\n"
