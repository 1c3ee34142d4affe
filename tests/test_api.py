"""The Python interface against the rooms behind it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mimref
from mimref.config.base import DataConfig
from mimref.data.open import open_source
from mimref.data.transforms import EvalTransform
from mimref.encoders.checkpoints import save_encoder
from mimref.encoders.vit import build_encoder
from mimref.errors import CheckpointError, ConfigError, DataError
from mimref.features.encode import PassSettings, columns_of, extract
from tests.checkpoints import load_encoder
from tests.tiny import ARCHITECTURE, write_labelled, write_unlabelled


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("api") / "encoder.safetensors"
    save_encoder(file, build_encoder(ARCHITECTURE), {"source": "mae"})
    return file


def test_load_gives_the_encoder_and_what_its_file_says(weights: Path) -> None:
    loaded = mimref.load(weights)
    assert loaded.header["source"] == "mae" and not loaded.model.training and loaded.transform.image_size == 16
    expected, _ = load_encoder(weights)
    images = torch.randn(2, 3, 16, 16)
    for found, wanted in zip(loaded.model.blocks(images, [2, 4]), expected.blocks(images, [2, 4]), strict=True):
        assert torch.equal(found, wanted)
    assert mimref.load("quickstart").model.depth == 8
    with pytest.raises(CheckpointError, match=r"nowhere\.pth"):
        mimref.load("nowhere.pth")


def test_an_arch_that_the_file_contradicts_is_refused(weights: Path) -> None:
    with pytest.raises(ConfigError, match=r"--arch vit_l16: .* custom; omit --arch"):
        mimref.load(weights, arch="vit_l16")


@pytest.mark.parametrize("blocks", [None, [3], [1, 4]])
def test_extract_equals_the_room(weights: Path, tmp_path: Path, blocks: list[int] | None) -> None:
    write_labelled(tmp_path)
    loaded = mimref.load(weights)
    found = mimref.extract(loaded, tmp_path, split="train", blocks=blocks, pool="mean", device="cpu", workers=0)
    source = open_source(DataConfig(spec=str(tmp_path)), "train")
    columns = columns_of(blocks or [4], "mean", False, 4)
    expected = extract(loaded.model, source, PassSettings(loaded.transform, torch.device("cpu")), columns)
    parts = [expected.columns[column][:] for column in columns]
    assert np.array_equal(found.x, np.stack(parts, axis=1) if blocks == [1, 4] else parts[0])
    assert found.y is not None and np.array_equal(found.y, source.labels)
    assert found.paths == [source.path(index) for index in range(48)]


def test_data_of_many_kinds(weights: Path, tmp_path: Path) -> None:
    loaded = mimref.load(weights)
    unlabelled = write_unlabelled(tmp_path / "images")
    source = open_source(DataConfig(spec=str(unlabelled)), "val")
    by_name, by_config, by_source = (
        mimref.extract(loaded, data, device="cpu", workers=0)
        for data in (str(unlabelled), DataConfig(spec=str(unlabelled)), source)
    )
    assert by_name.y is None and by_name.x.shape == (48, 32)
    assert np.array_equal(by_name.x, by_config.x) and np.array_equal(by_name.x, by_source.x)
    images = np.stack([source.read(index).numpy() for index in range(48)])
    np.testing.assert_allclose(mimref.extract(loaded, images, device="cpu").x, by_name.x, rtol=1e-5, atol=1e-5)
    gray = mimref.extract(loaded, images[:, 0], device="cpu")
    repeated = mimref.extract(loaded, np.repeat(images[:, :1], 3, axis=1), device="cpu")
    assert np.array_equal(gray.x, repeated.x)
    for odd in (images.astype(np.float32), images[:, :2], images[:0]):
        with pytest.raises(DataError, match="they must be uint8"):
            mimref.extract(loaded, odd, device="cpu")
    with pytest.raises(ConfigError, match="block 5 does not exist"):
        mimref.extract(loaded, images, blocks=[5], device="cpu")


def test_words_that_mean_nothing_are_refused(weights: Path, tmp_path: Path) -> None:
    data = write_unlabelled(tmp_path)
    loaded = mimref.load(weights)
    with pytest.raises(ConfigError, match="pool 'avg': choose from cls, mean, cls"):
        mimref.extract(loaded, data, pool="avg", device="cpu")
    with pytest.raises(ConfigError, match="precision 'fp16': choose from auto, fp32, bf16"):
        mimref.extract(loaded, data, precision="fp16", device="cpu")
    with pytest.raises(ConfigError, match="--resolution 30 is not divisible by the patch size 8"):
        mimref.load(weights, resolution=30)
    (tmp_path / "000.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"more than data\.max_bad=0"):
        mimref.extract(loaded, DataConfig(spec=str(data), max_bad=0), device="cpu", workers=0)


def test_settings_of_the_data_change_how_images_are_read(weights: Path, tmp_path: Path) -> None:
    data, loaded = str(write_unlabelled(tmp_path)), mimref.load(weights)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    given = DataConfig(spec=data, crop_fraction=1.0, resize="direct", mean=mean, std=std)
    found = mimref.extract(loaded, given, device="cpu", workers=0)
    changed = replace(loaded, transform=EvalTransform(loaded.transform.image_size, 1.0, mean, std, "direct"))
    assert np.array_equal(found.x, mimref.extract(changed, data, device="cpu", workers=0).x)
    assert not np.array_equal(found.x, mimref.extract(loaded, data, device="cpu", workers=0).x)
    wrong: dict[str, Any]
    for wrong, message in (
        ({"decode": "device"}, r"data\.decode device needs CUDA"),
        ({"channels": 5}, "images have 5 channels, but the encoder reads 3; load it with channels=5"),
    ):
        with pytest.raises(ConfigError, match=message):
            mimref.extract(loaded, DataConfig(spec=data, **wrong), device="cpu", workers=0)
    many = mimref.load(weights, channels=5, mean=[0.5] * 5, std=[0.5] * 5)
    for wrong, message in (
        ({"alpha": "white"}, r"data\.alpha white"),
        ({"mean": mean, "std": std}, r"data\.mean has 3 values for images of 5"),
    ):
        with pytest.raises(ConfigError, match=message):
            mimref.extract(many, DataConfig(spec=data, **wrong), device="cpu", workers=0)


def test_images_left_out_are_named_and_values_are_checked(weights: Path, tmp_path: Path) -> None:
    data, loaded = write_unlabelled(tmp_path), mimref.load(weights, mean=np.full(3, 0.5), std=np.full(3, 0.2))
    (tmp_path / "000.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="1 unreadable image skipped: .*000.png"):
        found = mimref.extract(loaded, data, split="train", device="cpu", workers=0)
    assert len(found.x) == len(found.paths) == len(list(tmp_path.iterdir())) - 1
    for wrong in (
        {"batch_size": 0},
        {"batch_size": 2.5},
        {"workers": -1},
        {"split": "foo"},
        {"blocks": "last"},
        {"blocks": 5},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            mimref.extract(loaded, data, **{"split": "train", "device": "cpu", **wrong})
    for unknown in (None, [np.zeros((8, 8, 3), np.uint8)]):
        with pytest.raises(ConfigError, match="data of type"):
            mimref.extract(loaded, unknown, device="cpu")


def test_evaluations_of_arrays() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = (rng.normal(size=(60, 8)) + 2 * np.eye(3, 8)[y]).astype(np.float32)
    rows = mimref.knn(x[:40], y[:40], x[40:], y[40:], k=[1, 5])
    assert [row["k"] for row in rows if row["metric"] == "knn_top1"] == [1, 5]
    assert mimref.lowshot(x[:40], y[:40], x[40:], y[40:], shots=[1], splits=2)[0]["metric"] == "lowshot_top1"
    assert mimref.cluster(x, y, metrics=["acc"], runs=2)[0]["metric"] == "cluster_acc"
    assert next(row["block"] for row in mimref.analyze_blocks([x, x], y, [x, x], y, k=3)) == 1


def test_all_public_names_are_there() -> None:
    for name in dir(mimref):
        assert getattr(mimref, name) is not None
