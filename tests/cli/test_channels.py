"""Images with other than three channels on the command line: pre-training, refinement, evaluation, extraction."""

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mimref
from mimref.cli import run
from mimref.embedder import Embedder
from tests.tiny import FINETUNE, PRETRAIN, REFINE, arguments, header, tensors, write_labelled, write_weights

QUICK = {"mae.epochs": 1, "mae.warmup_epochs": 0, "monitor.view_samples": 8}
SHORT = {
    "heads.blocks": "1-2",
    "heads_stage.epochs": 1,
    "heads_stage.warmup_epochs": 0,
    "encoder_stage.epochs": 1,
    "encoder_stage.warmup_epochs": 0,
    "monitor.view_samples": 8,
    "evaluate.enabled": True,
    "evaluate.cluster_runs": 1,
    "evaluate.splits": 1,
}


def write_images(folder: Path, channels: int, suffix: str) -> Path:
    """Write 24 training and 12 validation images of 16 x 16 pixels: 12-bit values in 16-bit TIFF or `.npy` of bytes."""
    tifffile = pytest.importorskip("tifffile")
    rng = np.random.default_rng(channels)
    for split, count in (("train", 12), ("val", 6)):
        for number in range(2):
            place = folder / split / f"c{number}"
            place.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels: NDArray[Any] = rng.integers(0, 128, (16, 16, channels)) + 100 * number
                if suffix == "npy":
                    np.save(place / f"{index:02}.npy", pixels.astype(np.uint8))
                else:
                    pixels = (16 * pixels).astype(np.uint16)
                    pixels = pixels[:, :, 0] if channels == 1 else pixels
                    planes = None if channels == 1 else "contig"
                    tifffile.imwrite(place / f"{index:02}.tif", pixels, photometric="minisblack", planarconfig=planes)
    return folder


@pytest.mark.parametrize(("channels", "suffix"), [(1, "tif"), (2, "npy"), (4, "tif"), (13, "npy")])
def test_from_images_to_features(
    channels: int, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", channels, suffix)
    base, refined = tmp_path / "base", tmp_path / "refined"
    common = ["--data", str(data), "--channels", str(channels), "--no-report"]
    assert run([*arguments("pretrain", base, PRETRAIN | QUICK), *common]) == 0, capsys.readouterr().err
    read = [np.load(path) if suffix == "npy" else _tiff(path) for path in sorted((data / "train").glob("*/*"))]
    white = 255 if suffix == "npy" else 65535
    pixels = np.stack([each.reshape(16, 16, channels) for each in read]).astype(np.float64) / white
    transform = header(base)["transform"]
    np.testing.assert_allclose(transform["mean"], pixels.mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(transform["std"], pixels.std(axis=(0, 1, 2)), rtol=1e-5)
    assert header(base)["architecture"].get("channels", 3) == channels
    settings = tomllib.loads((base / "config.toml").read_text())["data"]
    assert settings["channels"] == channels and settings["mean"] == transform["mean"]
    # Data and channels come from the header.
    line = [*_refine(refined, base, REFINE | SHORT), "--no-report"]
    assert run(line) == 0, capsys.readouterr().err
    assert header(refined)["data"]["channels"] == channels and header(refined)["transform"]["mean"] == transform["mean"]
    metrics = json.loads((refined / "results.json").read_text())["metrics"]
    assert {"raw pixels", "base", "refined"} == {row["model"] for row in metrics}
    assert run(["knn", str(refined), "--device", "cpu", "--k", "3"]) == 0, capsys.readouterr().err
    features = tmp_path / "x.npz"
    assert run(["extract", str(refined), "--device", "cpu", "--out", str(features)]) == 0, capsys.readouterr().err
    found = np.load(features)
    assert found["x"].shape == (12, 32)
    if channels == 4:
        _check_python(refined, data, found["x"])


def _check_python(refined: Path, data: Path, features: NDArray[Any]) -> None:
    """Check that the Python API and the Embedder give the same features, for a folder and for arrays."""
    encoder = mimref.load(refined)
    assert encoder.channels == 4 and len(encoder.transform.mean) == 4
    arrays = np.stack([_tiff(path) for path in sorted((data / "val").glob("*/*"))]).transpose(0, 3, 1, 2)
    for images in (data, arrays):
        np.testing.assert_allclose(mimref.extract(encoder, images, device="cpu").x, features, atol=1e-5)
    embedder = Embedder(refined, device="cpu")
    np.testing.assert_allclose(embedder.transform(list(arrays.transpose(0, 2, 3, 1))), features, atol=1e-5)
    assert len(embedder.get_feature_names_out()) == 32


def _refine(out: Path, weights: Path, settings: dict[str, Any]) -> list[str]:
    """Return the command line of a refinement without a preset."""
    line = arguments("refine", out, settings)
    return [*(part for part in line if part not in ("--preset", "quickstart")), "--weights", str(weights)]


def _tiff(path: Path) -> NDArray[Any]:
    import tifffile

    return np.asarray(tifffile.imread(path))


def test_weights_of_colour_are_adapted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_images(tmp_path / "data", 4, "npy")
    weights = write_weights(tmp_path / "base.safetensors")
    changes = REFINE | SHORT | {"evaluate.enabled": False, "encoder.channel_init": "sum"}
    line = _refine(tmp_path / "out", weights, changes)
    assert run([*line, "--data", str(data), "--channels", "4", "--no-report"]) == 0
    told = capsys.readouterr().err
    assert "4 channels" in told and "encoder.channel_init sum" in told and "data.mean" in told
    assert tensors(tmp_path / "out")["patch_embed.proj.weight"].shape[1] == 4
    common = ["knn", str(weights), "--data", str(data), "--channels", "4", "--device", "cpu", "--k", "3", "--quiet"]
    tables = []
    for rule in ("sum", "sum", "random"):
        assert run([*common, "--set", f"encoder.channel_init={rule}", "--force", "--out", str(tmp_path / "knn")]) == 0
        tables.append((tmp_path / "knn" / "results.csv").read_text())
    assert tables[0] == tables[1]


def test_one_split_is_normalised_like_both(tmp_path: Path) -> None:
    data, weights = write_images(tmp_path / "data", 4, "npy"), write_weights(tmp_path / "base.safetensors")
    for number, path in enumerate(sorted((data / "val").glob("*/*"))):
        np.save(path, np.load(path) // 2 + number)
    common = ["--data", str(data), "--channels", "4", "--device", "cpu", "--quiet"]
    files = []
    for split in ("train", "val"):
        files.append(tmp_path / f"{split}.npz")
        assert run(["extract", str(weights), *common, "--split", split, "--out", str(files[-1])]) == 0
    every = tmp_path / "all.npz"
    assert run(["extract", str(weights), *common, "--split", "all", "--cache", "off", "--out", str(every)]) == 0
    np.testing.assert_array_equal(np.concatenate([np.load(file)["x"] for file in files]), np.load(every)["x"])


def test_finetuning_on_four_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_images(tmp_path / "data", 4, "npy")
    weights = write_weights(tmp_path / "base.safetensors")
    settings = FINETUNE | {"encoder.weights": weights, "finetune.epochs": 1, "finetune.warmup_epochs": 0}
    common = ["--data", str(data), "--channels", "4", "--no-report"]
    assert run([*arguments("finetune", tmp_path / "out", settings), *common]) == 2
    assert "augment.rand_augment=none" in capsys.readouterr().err
    settings["augment.rand_augment"] = "none"
    assert run([*arguments("finetune", tmp_path / "out", settings), *common]) == 0, capsys.readouterr().err
    assert run(["predict", str(tmp_path / "out"), str(data), "--device", "cpu", "--out", str(tmp_path / "p.csv")]) == 0
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 13


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_images(tmp_path / "data", 4, "npy")
    weights = write_weights(tmp_path / "base.safetensors")

    def refused(*line: str) -> str:
        assert run([*line, "--device", "cpu"]) == 2
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert told.startswith("mimref: error: ")
        return told

    pretrain = arguments("pretrain", tmp_path / "out", PRETRAIN | QUICK)
    told = refused(*pretrain, "--data", str(data), "--channels", "3")
    assert "00.npy has 4 channels, not 3" in told
    np.save(data / "train" / "c0" / "11.npy", np.zeros((16, 16, 3), np.uint8))
    told = refused(*pretrain, "--data", str(data), "--channels", "4")
    assert "11.npy has 3 channels, not 4" in told
    assert not (tmp_path / "out").exists()
    np.save(data / "train" / "c0" / "11.npy", np.zeros((16, 16, 4), np.uint8))
    line = _refine(tmp_path / "out", weights, REFINE | {"views.gray_probability": 0.2})
    told = refused(*line, "--data", str(data), "--channels", "4")
    assert "views.gray_probability" in told and "4 channels" in told
    colour = write_labelled(tmp_path / "colour")
    assert "has 3 channels, not 4" in refused("knn", str(weights), "--data", str(colour), "--channels", "4")
    assert "--channels" in refused("knn", str(weights), "--data", "digits", "--channels", "many")
    assert "data.channels" in refused("segment", "quickstart", "--data", "digits", "--set", "data.channels=3")
