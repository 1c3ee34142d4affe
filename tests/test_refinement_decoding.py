"""Whole runs whose images are decoded on a device: here the CPU, which users cannot choose for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mimref.evaluation.monitor
import mimref.features.inputs
import mimref.features.opening
import mimref.training.run
from mimref.config.base import DataConfig
from mimref.data.loader import ViewBatch, view_batches
from mimref.errors import ConfigError, UserError
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.protocol import evaluate_knn
from mimref.features.header import resolve_data
from mimref.features.inputs import EncoderInputs
from mimref.pretraining.run import pretrain
from mimref.progress import Silent
from mimref.refinement.run import refine
from tests.tiny import (
    EVALUATED,
    Watcher,
    finetune_config,
    header,
    pretrain_config,
    refine_config,
    results,
    tensors,
    write_weights,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of scikit-learn's two photographs, one class each; one training image is unreadable, one is a PNG."""
    from sklearn.datasets import load_sample_images

    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name, pixels in zip("ab", load_sample_images().images, strict=True):
        for split, count in (("train", 24), ("val", 8)):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count):
                top, left = rng.integers(0, 390), rng.integers(0, 600)
                image = Image.fromarray(pixels[top : top + 30, left : left + 34])
                image.save(place / f"{number:02}.jpg", quality=90)
    broken = folder / "train" / "a" / "05.jpg"
    broken.write_bytes(broken.read_bytes()[:-50])
    Image.open(folder / "train" / "b" / "03.jpg").save(folder / "train" / "b" / "03.png")
    (folder / "train" / "b" / "03.jpg").unlink()
    return folder


def decode_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """Let `data.decode` = `device` mean torchvision's decoder on the CPU."""

    def chosen(settings: DataConfig, device: torch.device) -> torch.device | None:
        return device if settings.decode == "device" else None

    for module in (mimref.training.run, mimref.evaluation.monitor, mimref.features.opening, mimref.features.inputs):
        patch.setattr(module, "decoding_device", chosen)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[ViewBatch]:
    """All training batches of a test's runs."""
    found: list[ViewBatch] = []

    def noting(*given: Any, **settings: Any) -> Iterator[ViewBatch]:
        for batch in view_batches(*given, **settings):
            found.append(batch)
            yield batch

    monkeypatch.setattr(mimref.training.run, "view_batches", noting)
    return found


def test_a_refinement_sees_the_same_views_within_rounding(
    weights: Path, data: Path, batches: list[ViewBatch], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decode_on_the_cpu(monkeypatch)
    refine(refine_config(weights, data, **EVALUATED), tmp_path / "cpu")
    count, listener = len(batches), Watcher()
    config = refine_config(weights, data, data__decode="device", **EVALUATED)
    refine(config, tmp_path / "device", listener=listener)
    assert len(batches) == 2 * count == 40
    for one, two in zip(batches[:count], batches[count:], strict=True):
        assert torch.equal(one.sample_B, two.sample_B) and one.bad == two.bad
        for left, right in zip(one.crops, two.crops, strict=True):
            apart = (left.int() - right.int()).abs()
            assert apart.max() <= 2 and apart.double().mean() < 0.02
    (line,) = [line for line in listener.warnings if "data.decode" in line]
    assert line.startswith("1 of 47 training images were decoded by the CPU") and "03.png" in line
    usual, found = results(tmp_path / "cpu"), results(tmp_path / "device")
    assert usual["bad_images"] == found["bad_images"] and len(found["bad_images"]) == 1
    assert [row["metric"] for row in usual["metrics"]] == [row["metric"] for row in found["metrics"]]
    # The same training up to rounding, which may change a neighbour.
    base, one, two = load_file(weights), tensors(tmp_path / "cpu"), tensors(tmp_path / "device")
    moved, apart_by = (sum(float((one[key] - each[key]).square().sum()) for key in one) for each in (base, two))
    assert apart_by < 0.2 * moved
    recorded = [header(tmp_path / decode)["data"].get("decode") for decode in ("cpu", "device")]
    assert recorded == [None, "device"]


def test_pretraining_decodes_on_the_device(
    data: Path, batches: list[ViewBatch], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decode_on_the_cpu(monkeypatch)
    for decode in ("cpu", "device"):
        pretrain(pretrain_config(data, data__decode=decode, mae__epochs=1, evaluate__enabled=False), tmp_path / decode)
    for one, two in zip(batches[:4], batches[4:], strict=True):
        assert (one.crops[0].int() - two.crops[0].int()).abs().max() <= 2


def test_features_have_a_key_of_their_own_and_old_ones_keep_theirs(
    weights: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decode_on_the_cpu(monkeypatch)

    def settings(decode: str, spec: str = str(data)) -> KnnConfig:
        cache = {"folder": str(tmp_path / "cache")}
        return KnnConfig.model_validate(
            {
                **{"checkpoint": str(weights), "device": "cpu", "workers": 0, "cache": cache},
                "data": {"spec": spec, "decode": decode},
            }
        )

    def spec(decode: str, images: str = str(data)) -> dict[str, Any]:
        inputs = EncoderInputs(settings(decode, images), str(weights), Silent())
        return inputs.spec(inputs.source("val"))

    usual = spec("auto")
    assert "decode" not in usual and usual == spec("cpu") and spec("device") == usual | {"decode": "device"}
    assert spec("device", "digits") == spec("cpu", "digits")  # nothing to decode
    rows = [evaluate_knn(settings(decode)).rows for decode in ("cpu", "device", "device")]
    assert rows[1] == rows[2] and len(list((tmp_path / "cache").glob("*/entry.json"))) == 4
    assert rows[0][0]["value"] == rows[1][0]["value"]


def test_a_header_does_not_choose_where_images_are_decoded() -> None:
    recorded = {"data": {"spec": "digits", "decode": "device"}}
    assert resolve_data(DataConfig(), recorded).decode == "auto"


def test_the_device_is_refused_without_cuda(weights: Path, data: Path, tmp_path: Path) -> None:
    config = refine_config(weights, data, data__decode="device")
    with pytest.raises(ConfigError, match=r"data\.decode device needs CUDA, and the device is cpu; set .*cpu"):
        refine(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    knn = {"checkpoint": str(weights), "device": "cpu", "data": {"spec": str(data), "decode": "device"}}
    with pytest.raises(UserError, match=r"data\.decode device needs CUDA"):
        evaluate_knn(KnnConfig.model_validate(knn))


def test_commands_that_decode_in_loader_processes_refuse_it(weights: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.decode device: finetune decodes images in its loader processes"):
        finetune_config(weights, data, data__decode="device")
