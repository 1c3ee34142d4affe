"""`mimref refine` without a preset, and with one that does not fit, from the command line."""

import tomllib
from pathlib import Path

import pytest

from mimref.cli import run

SHORT = ["--epochs", "1", "--heads-epochs", "1", "--set", "workers=0", "--set", "device=cpu"]


def line(folder: Path, data: str, *more: str) -> list[str]:
    return ["refine", "--weights", str(folder / "base.safetensors"), "--data", str(folder / data), *SHORT, *more]


def test_a_dry_run_prints_every_derived_value_with_its_rule(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(line(folder, "unlabelled", "--dry-run", "--set", "heads.temperature=0.4")) == 0
    captured = capsys.readouterr()
    facts = captured.out.partition("\n\nencoder ")[2]
    rows = [each.split(maxsplit=2) for each in facts.splitlines() if each.startswith("  ")]
    derived = {setting: (value, rule) for setting, value, rule in rows}
    assert derived["batch_size"][0] == "16" and "48 images" in derived["batch_size"][1]
    assert derived["heads.queue_size"][0] == "16" and derived["heads.blocks"][0] == '"3-4"'
    assert not {"heads.temperature", "encoder_stage.epochs", "heads_stage.epochs"} & set(derived)
    assert "output   runs/refine-recipe" in captured.out
    (time,) = (each for each in captured.out.splitlines() if each.startswith("time"))
    assert "stage 1" in time and "stage 2" in time and "per step" in time
    assert captured.err == "" and not list(tmp_path.iterdir())


def test_a_run_notes_what_it_derives_and_has_the_settings_of_the_dry_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line(folder, "unlabelled", "--out", str(tmp_path / "out"), "--dry-run")) == 0
    printed = tomllib.loads(capsys.readouterr().out.partition("\n\nencoder ")[0])
    assert run(line(folder, "unlabelled", "--out", str(tmp_path / "out"))) == 0
    assert "batch_size 16: a power of two, at most half of 48 images" in capsys.readouterr().err
    assert printed == tomllib.loads((tmp_path / "out" / "config.toml").read_text())
    assert run(line(folder, "unlabelled", "--out", str(tmp_path / "quiet"), "--quiet")) == 0
    assert "batch_size" not in capsys.readouterr().err


def test_a_preset_is_adapted_or_with_strict_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = ["--set", "heads.projector_hidden=16", "--set", "heads.predictor_hidden=16", "--set", "views.local_views=1"]
    assert (
        run(line(folder, "unlabelled", "--preset", "mae_b16", "--dry-run", "--set", "views.global_size=16", *fast)) == 0
    )
    text = capsys.readouterr().out
    for part in ("1024 -> 16", "65536 -> 16", "there are 48 training images", "96 -> 16", "20 -> 2"):
        assert part in text
    assert run(line(folder, "unlabelled", "--preset", "mae_b16", "--strict", "--out", str(tmp_path))) == 2
    error = capsys.readouterr().err
    assert "batch_size 1024" in error and "heads.queue_size 65536" in error
    assert run(line(folder, "unlabelled", "--preset", "mae_b16", "--batch-size", "100", "--out", str(tmp_path))) == 2
    error = capsys.readouterr().err
    assert "--batch-size 100" in error and "--batch-size 48 or less" in error and "queue_size" not in error
    assert not list(tmp_path.iterdir())


def test_images_of_ones_own_and_the_packaged_encoder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(folder / "data")
    for named in (["--data", data], ["--set", f"data.spec={data}"]):
        assert run(["refine", *named, "--dry-run", *SHORT]) == 0
        text, told = capsys.readouterr()
        assert "the packaged encoder of digits is refined" in told
        assert "8 blocks of width 96" in text and "views.flip" not in text and "  batch_size  " in text
