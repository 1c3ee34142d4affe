"""A user's own images: the bare commands on 17 colour images of mixed sizes."""

import json
from pathlib import Path

import pytest

from mimref.cli import run
from tests.own_images import write

SHORT = ["--epochs", "2", "--set", "workers=0", "--device", "cpu"]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    write(folder / "labelled", 17, labelled=True)
    write(folder / "flat", 17)
    return folder


def summary(text: str) -> str:
    """Return what a dry run prints after the settings in TOML."""
    return "encoder " + text.partition("\n\nencoder ")[2]


def rows_of(text: str) -> dict[str, tuple[str, str]]:
    """Return value and rule of every derived setting that a dry run prints."""
    rows = [each.split(maxsplit=2) for each in summary(text).splitlines() if each.startswith("  ")]
    return {setting: (value, rule) for setting, value, rule in rows}


def test_the_same_arguments_write_the_same_images(own: Path, tmp_path: Path) -> None:
    write(tmp_path / "again", 17, labelled=True)
    write(tmp_path / "more", 18)
    files = sorted(path for path in (own / "labelled").rglob("*") if path.is_file())
    assert len(files) == 17 and {path.suffix for path in files} == {".jpg", ".png"}
    assert {path.parent.name for path in files} == {"striped", "star", "ring"}
    for path in files:
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(own / "labelled")).read_bytes()
    assert len(list((tmp_path / "more").iterdir())) == 18


@pytest.mark.parametrize(("data", "images"), [("flat", "17"), ("labelled", "14")])
def test_a_dry_run_of_pretrain_writes_nothing(
    data: str,
    images: str,
    own: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["pretrain", "--data", str(own / data), "--dry-run", *SHORT, "--set", "encoder.depth=1"]) == 0
    captured = capsys.readouterr()
    derived = rows_of(captured.out)
    assert derived["batch_size"][0] == "4" and f"{images} images" in derived["batch_size"][1]
    assert derived["encoder.width"][0] == "96" and not {"encoder.depth", "mae.epochs"} & set(derived)
    facts = dict(line.split(maxsplit=1) for line in summary(captured.out).splitlines() if not line.startswith(" "))
    assert facts["steps"] == f"{2 * (int(images) // 4)} in 2 epochs" and facts["output"] == "runs/pretrain-recipe"
    assert "per step" in facts["time"] and captured.err == "" and not list(tmp_path.iterdir())


def test_seventeen_images_are_pretrained_and_fine_tuned(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = str(tmp_path / "base"), str(own / "labelled")
    assert run(["pretrain", "--data", data, "--out", base, *SHORT, "--set", "encoder.depth=2"]) == 0
    assert "mae.lr 0.011: " in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert run(["finetune", base, "--data", data, "--dry-run", *SHORT]) == 0
    captured = capsys.readouterr()
    assert rows_of(captured.out)["augment.rand_augment"][0] == "none" and "6 in 2 epochs" in captured.out
    assert captured.err == "" and [path.name for path in tmp_path.iterdir()] == ["base"]
    assert run(["finetune", base, "--data", data, "--out", "tuned", *SHORT]) == 0
    assert "batch_size 4: a power of two that fits 14 labelled images" in capsys.readouterr().err
    assert run(["finetune", base, "--data", data, "--out", "tuned", "--resume"]) == 0


def test_a_preset_is_adapted_or_with_strict_refused(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, options, change in (
        (["pretrain"], ["--preset", "fashion_mnist"], "128 -> 4"),
        (["finetune", "quickstart"], ["--preset", "imagenet_l16"], "1024 -> 4"),
    ):
        line = [*command, "--data", str(own / "labelled"), *options, *SHORT]
        assert run([*line, "--dry-run"]) == 0
        assert rows_of(capsys.readouterr().out.replace(" -> ", "->"))["batch_size"][0] == change.replace(" ", "")
        assert run([*line, "--strict", "--out", str(tmp_path / "out")]) == 2
        assert "14 " in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("data", ["flat", "labelled"])
def test_the_bare_commands_from_images_to_a_refined_encoder(data: str, own: Path, tmp_path: Path) -> None:
    base, images = str(tmp_path / "base"), str(own / data)
    assert run(["pretrain", "--data", images, "--out", base]) == 0
    assert run(["refine", "--weights", base, "--data", images, "--out", str(tmp_path / "refined")]) == 0
    assert run(["refine", "--data", images, "--out", str(tmp_path / "packaged")]) == 0
    found = json.loads((tmp_path / "base" / "results.json").read_text())
    assert found["config"]["mae"]["epochs"] == 400 and found["config"]["encoder"]["image_size"] == 64
    assert all((tmp_path / name / "encoder.safetensors").is_file() for name in ("refined", "packaged"))
    if data == "labelled":
        assert run(["finetune", base, "--data", images, "--out", str(tmp_path / "tuned")]) == 0
