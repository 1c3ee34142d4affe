"""`mimref robustness` from its command line to its files."""

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from mimref.cli import run
from tests.test_transfer_robustness import write_classifier, write_imagenet_c, write_noise
from tests.tiny import results


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, its clean images, and two corruptions of ImageNet-C."""
    folder = tmp_path_factory.mktemp("robustness")
    write_classifier(folder)
    write_noise(folder / "clean", 1000)
    write_imagenet_c(folder / "c", ("snow", "fog"))
    return folder


def line(made: Path, *more: str) -> list[str]:
    return ["robustness", str(made / "c.safetensors"), *more, "--device", "cpu", "--workers", "0"]


def test_table_files_and_figure(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    given = ["--imagenet-c", str(made / "c"), "--shifted", str(made / "clean"), "--out", str(out)]
    assert run(line(made, *given)) == 0
    printed = capsys.readouterr()
    assert "mean top-1" in printed.out and "incomplete" in printed.out and "mCE" not in printed.out
    assert "by severity" in printed.out
    assert "gaussian_noise" in printed.err
    saved = results(out)
    assert saved["command"] == "robustness" and saved["config"]["data"]["spec"] == str(made / "clean")
    table = pd.read_csv(out / "results.csv")
    assert len(table) == len(saved["metrics"]) == 1 + 1 + 1 + 2 + 10
    assert list(table["metric"][:3]) == ["clean_top1", "robust_mean_top1", "robust_top1"]
    assert table["value"].iloc[0] == table["value"].iloc[2]  # the same images
    with Image.open(out / "robustness.png") as image:
        assert image.width > 600
    assert run(line(made, *given)) == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], "CKPT"),
        (["CKPT"], "--imagenet-c"),
        (["CKPT", "--corrupt", "fogg"], "'fog'"),
        (["CKPT", "--corrupt", "15"], "--resolution"),
        (["CKPT", "--corrupt", "fog", "--severities", "0,6"], "--severities 0,6"),
        (["CKPT", "--imagenet-r", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line(given: list[str], wanted: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(made / "c.safetensors") if word == "CKPT" else word for word in given]
    assert run(["robustness", *words]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert error.startswith("mimref: error:") and wanted in error and error.count("\n") == 0
