"""`mimref refine` and `mimref pretrain` from the command line to the files, on a tiny encoder."""

import json
import re
import signal
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mimref.cli import run
from mimref.config.base import dump_config
from mimref.config.load import load_config
from mimref.refinement.config import RefineConfig
from mimref.reports import terminal
from mimref.training.folder import RunFolder
from tests.tiny import PRETRAIN, REFINE, arguments, assert_same_run, results


@pytest.fixture(scope="module")
def settings(folder: Path) -> dict[str, Any]:
    """Settings of a short run, for `--set`."""
    named = {"encoder.weights": folder / "base.safetensors", "data.spec": folder / "data", "evaluate.enabled": True}
    return REFINE | named | {"evaluate.cluster_runs": 2, "evaluate.splits": 2, "monitor.knn_every_epochs": 3}


def stop_at_step(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send the signal `number` after `step` updates of stage 2."""

    def progress(self: terminal.Terminal, label: str, done: int, total: int) -> None:
        if (label, done) == ("stage 2: encoder and heads", step):
            signal.raise_signal(number)

    monkeypatch.setattr(terminal.Terminal, "progress", progress)


def test_a_run_prints_a_table_and_leaves_its_files(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(arguments("refine", out, settings)) == 0
    captured = capsys.readouterr()
    for name in ("raw pixels", "base", "refined", "k-NN top-1", "1-shot top-1", "k-means ACC", "k-means NMI"):
        assert name in captured.out
    assert "stage 1: heads: 8/8" in captured.err and "epoch 3: k-NN top-1 " in captured.err
    written = f"encoder in {out / 'encoder.safetensors'}, results in {out / 'results.json'}\n"
    assert captured.err.endswith(f"{written}report in {out / 'report.html'}\n")
    # Run again: refused. Resumed: printed again. Quietly: only the table.
    assert run(arguments("refine", out, settings)) == 2
    assert "--force" in capsys.readouterr().err
    assert run(["refine", "--resume", "--out", str(out), "--quiet"]) == 0
    again = capsys.readouterr()
    assert (again.out, again.err) == (captured.out, "")
    assert run(["refine", "--resume", "--out", str(out)]) == 0
    assert f"{out} is finished" in capsys.readouterr().err
    # The folder's own settings, run quietly into another folder, give the same run.
    line = ["refine", "--preset", str(out / "config.toml"), "--out", str(tmp_path / "again"), "--quiet"]
    assert run(line) == 0
    quiet = capsys.readouterr()
    assert (quiet.out, quiet.err) == (captured.out, "")
    assert_same_run(tmp_path / "again", out)


def test_signals_save_and_resume_needs_no_more_options(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = arguments("refine", tmp_path, settings | {"evaluate.enabled": False})
    with monkeypatch.context() as patch:
        stop_at_step(patch, 6, signal.SIGTERM)
        assert run(line) == 143
    message = capsys.readouterr().err.splitlines()[-1]
    assert "step 6 of 12" in message and "--resume" in message
    assert run(line) == 2
    error = capsys.readouterr().err
    assert "--resume" in error and "--force" in error
    assert run([*line, "--resume", "--force"]) == 2
    assert run(["refine", "--resume", "--out", str(tmp_path), "--set", "heads.temperature=0.1"]) == 2
    error = capsys.readouterr().err
    assert "heads.temperature" in error and "0.3" in error and "0.1" in error
    with monkeypatch.context() as patch:
        stop_at_step(patch, 8, signal.SIGINT)
        assert run(["refine", "--resume", "--out", str(tmp_path)]) == 130
    assert run(["refine", "--resume", "--out", str(tmp_path)]) == 0
    assert "12/12" in capsys.readouterr().err
    assert not (tmp_path / "state").exists() and (tmp_path / "results.json").is_file()


def test_a_process_that_torchrun_restarts_reads_the_settings_of_its_run(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = load_config(RefineConfig, None, {"batch_size": 24, "data.spec": str(settings["data.spec"])})
    (tmp_path / "config.toml").write_text(dump_config(begun))
    trained: list[tuple[int, bool]] = []

    def refine(config: RefineConfig, out: Path, *, resume: bool, **_: object) -> None:
        trained.append((config.batch_size, resume))

    monkeypatch.setattr("mimref.refinement.run.refine", refine)
    for again in (False, True):
        monkeypatch.setattr(RunFolder, "continues_launch", lambda _, again=again: again)
        assert run(arguments("refine", tmp_path, settings)) == 0
    assert trained == [(12, False), (24, True)]


def test_a_dry_run_writes_nothing(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments("refine", tmp_path / "out", settings), "--dry-run"]) == 0
    captured = capsys.readouterr()
    printed, _, rest = captured.out.partition("\n\nencoder ")
    assert tomllib.loads(printed)["heads"]["blocks"] == settings["heads.blocks"]
    facts = dict(line.split(maxsplit=1) for line in f"encoder {rest}".splitlines() if line[0] != " ")
    assert captured.err == "" and not (tmp_path / "out").exists()
    assert facts["encoder"].startswith("custom, 4 blocks of width 32, pre-norm, ")
    assert facts["heads"].startswith("2 at blocks 3, 4, ")
    assert facts["steps"] == "8 (heads), then 12 (encoder and heads)"
    assert facts["images"].startswith("48 of ") and facts["output"] == str(tmp_path / "out")


def test_a_dry_run_opens_one_image_and_checks_the_weights(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(1, 30):
        (tmp_path / f"{index}.png").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    assert run([*arguments("refine", tmp_path / "out", settings | {"data.spec": tmp_path}), "--dry-run"]) == 0
    assert "30 of " in capsys.readouterr().out
    foreign = {"encoder.weights": write_foreign(tmp_path / "foreign.pt"), "encoder.arch": "vit_b16", "batch_size": 2}
    changed = settings | foreign | {"heads.blocks": "12", "views.local_size": 96}
    assert run([*arguments("refine", tmp_path / "out", changed), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "foreign.pt" in error and "cls_token" in error


def write_foreign(path: Path) -> Path:
    import torch

    torch.save({"model": {"something.weight": torch.zeros(2)}}, path)
    return path


def test_a_temperature_sweep_prints_a_ranking(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = settings | {"heads.blocks": "4,4,4", "heads.temperature": [0.1, 0.2, 0.3]}
    assert run([*arguments("refine", tmp_path, sweep), "--stage", "heads", "--quiet"]) == 0
    header, *lines = [re.findall(r"[\w.-]+", line) for line in capsys.readouterr().out.splitlines()][1:]
    assert header[:4] == ["head", "block", "temperature", "k-NN"]
    heads = {tuple(cells[:3]) for cells in lines if cells}
    assert heads == {("1", "4", "0.1"), ("2", "4", "0.2"), ("3", "4", "0.3")}


def test_unlabelled_images_have_measures_without_labels_and_a_note(
    settings: dict[str, Any], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"data.spec": folder / "unlabelled", "encoder_stage.epochs": 1, "heads_stage.epochs": 1}
    assert run(arguments("refine", tmp_path / "out", settings | short)) == 0
    captured = capsys.readouterr()
    assert "neighbour consistency" in captured.out and "k-NN" not in captured.out
    assert "the train images have no labels" in captured.err
    assert run(["refine", "--resume", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == captured.out


def test_pretrain_prints_and_resumes(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"data.spec": settings["data.spec"], "mae.epochs": 2}
    assert run(arguments("pretrain", tmp_path, PRETRAIN | changes)) == 0
    captured = capsys.readouterr()
    assert "k-NN top-1" in captured.out and "pre-training: 8/8" in captured.err
    assert run(["pretrain", "--resume", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == captured.out
    assert json.loads((tmp_path / "results.json").read_text())["config"]["mae"]["epochs"] == 2


def test_debug_shows_where_a_mistake_was_found(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = arguments("refine", tmp_path / "out", settings | {"heads.blocks": "9"})
    assert run(line) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert run([*line, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_heads_where_the_base_is_best(
    settings: dict[str, Any], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "auto"
    short = settings | {"heads.blocks": "auto", "evaluate.enabled": False, "stage": "heads", "heads_stage.epochs": 1}
    assert run(arguments("refine", out, short)) == 0
    assert "k-NN of every block: 4/4" in capsys.readouterr().err
    # The choice is recorded, so that a resumed or repeated run does not measure again.
    chosen = results(out)["config"]["heads"]["blocks"]
    weights, data = settings["encoder.weights"], settings["data.spec"]
    assert run(["analyze-blocks", str(weights), "--data", str(data), "--quiet"]) == 0
    assert f"recommended heads: --heads {chosen}" in capsys.readouterr().out


def test_heads_without_labels(
    settings: dict[str, Any], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = settings | {"heads.blocks": "auto", "evaluate.enabled": False, "stage": "heads", "heads_stage.epochs": 1}
    for name, samples in (("default", 1000), ("zero", 0)):
        unlabelled = short | {"data.spec": folder / "unlabelled", "monitor.view_samples": samples}
        assert run(arguments("refine", tmp_path / name, unlabelled)) == 0
        chosen = results(tmp_path / name)["config"]["heads"]["blocks"]
        assert chosen.endswith("4")
        error = capsys.readouterr().err
        assert (
            f"warning: heads on blocks {chosen}: by the neighbour consistency of every block, without labels" in error
        )
