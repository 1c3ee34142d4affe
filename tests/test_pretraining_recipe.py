"""The rules for a pre-training's settings: their values, and what they leave alone."""

from pathlib import Path
from typing import Any

import pytest

from mimref.config.base import dump_config
from mimref.config.load import load_config
from mimref.data.sample import Appearance
from mimref.devices import Machine
from mimref.errors import Checks, ConfigError, UserError
from mimref.pretraining.config import MAEConfig, PretrainConfig, SimMIMConfig
from mimref.pretraining.plan import make_plan
from mimref.pretraining.recipe import fit, fitting_batch, patch_size
from mimref.pretraining.run import pretrain
from mimref.progress import Silent
from tests.tiny import Watcher, assert_same_run, write_unlabelled

CPU, H200 = Machine(False), Machine(True, 139 * 2**30)
MANY_GPUS = Machine(True, 139 * 2**30, processes=8)


def load(preset: str | None = None, **given: Any) -> PretrainConfig:
    return load_config(PretrainConfig, preset, {key.replace("__", "."): value for key, value in given.items()})


def fitted(images: int, side: int, machine: Machine, preset: str | None = None, **given: Any) -> PretrainConfig:
    return fit(load(preset, **given), images, Appearance(64, 64, side), machine)[0]


# Images, their side, machine -> image and patch size, width, depth, batch, epochs, warm-up, least crop.
CASES = {
    (17, 75, CPU): (64, 8, 96, 8, 4, 400, 20.0, 0.4),
    (900, 75, CPU): (64, 8, 96, 8, 64, 278, 14.0, 0.4),
    (1437, 8, CPU): (16, 4, 96, 8, 128, 400, 20.0, 0.6),
    (7000, 75, CPU): (64, 8, 96, 8, 128, 36, 1.8, 0.4),
    (10_000, 28, CPU): (28, 4, 96, 8, 128, 33, 1.6, 0.6),
    (1_281_167, 375, CPU): (64, 8, 96, 8, 128, 10, 0.5, 0.2),
    (7000, 75, H200): (72, 8, 192, 12, 128, 1600, 80.0, 0.6),
    (50_000, 32, H200): (32, 4, 384, 12, 128, 1600, 80.0, 0.6),
    (200_000, 400, H200): (224, 16, 384, 12, 512, 800, 40.0, 0.2),
    (14_000_000, 400, H200): (224, 16, 768, 12, 1024, 73, 3.6, 0.2),
}


@pytest.mark.parametrize("case", CASES)
def test_settings_by_number_and_size_of_images_and_machine(case: tuple[int, int, Machine]) -> None:
    config = fitted(*case)
    encoder, mae = config.encoder, config.mae
    size, patch, width, depth, batch, epochs, warmup, crop = CASES[case]
    sizes = (768, 12, 16) if encoder.arch == "vit_b16" else (encoder.width, encoder.depth, encoder.patch_size)
    assert (encoder.image_size, *sizes) == (size, width, depth, patch)
    assert (config.batch_size, mae.epochs, mae.warmup_epochs, mae.crop_scale) == (batch, epochs, warmup, (crop, 1.0))


def test_a_million_photographs_on_enough_gpus_get_maes_settings() -> None:
    found, paper = fitted(1_281_167, 375, MANY_GPUS), load("mae_b16")
    assert found.encoder.arch == "vit_b16" and found.mae.decoder == paper.mae.decoder
    for section, names in {
        "encoder": ("arch", "image_size"),
        "mae": ("mask_ratio", "crop_scale", "epochs", "warmup_epochs", "lr", "weight_decay"),
        "views": ("flip",),
    }.items():
        for name in names:
            assert getattr(getattr(found, section), name) == getattr(getattr(paper, section), name)
    assert found.batch_size == paper.batch_size == 4096 and found.data.crop_fraction is None


@pytest.mark.parametrize(("preset", "images", "side"), [("quickstart", 1437, 8), ("fashion_mnist", 10_000, 28)])
def test_the_measured_presets_are_met_but_for_their_length(preset: str, images: int, side: int) -> None:
    measured = load(preset)
    found = fitted(images, side, CPU, data__spec=measured.data.spec)
    assert found.mae.lr == pytest.approx(measured.mae.lr, rel=0.06)
    for section in ("encoder", "views"):
        names = getattr(measured, section).model_fields_set - {"source"}
        assert all(
            getattr(getattr(found, section), name) == getattr(getattr(measured, section), name) for name in names
        )
    assert found.mae.decoder == measured.mae.decoder and found.mae.crop_scale == measured.mae.crop_scale
    assert found.batch_size == measured.batch_size and found.data.crop_fraction == measured.data.crop_fraction
    assert found.mae.epochs < measured.mae.epochs


def test_simmim_keeps_its_masks_and_crops_and_gets_its_own_rate_and_length() -> None:
    found, simmim = fitted(10_000, 28, CPU, objective="simmim"), SimMIMConfig()
    # 5e-5 x sqrt(2048 / 128) x 768 / 96; 5 million patches are 10 epochs of 10,000 images of 49 patches.
    assert (found.simmim.lr, found.simmim.epochs, found.simmim.warmup_epochs) == (1.6e-3, 10, 0.5)
    assert found.simmim.mask_ratio == simmim.mask_ratio == 0.6 and found.simmim.crop_scale == (0.67, 1.0)
    assert found.mae == MAEConfig() and found.encoder == fitted(10_000, 28, CPU).encoder
    photographs = fitted(1_281_167, 375, MANY_GPUS, objective="simmim", batch_size=2048)
    assert photographs.simmim == simmim.model_copy(update={"warmup_epochs": 40.0})
    derived = fit(load(objective="simmim"), 10_000, Appearance(64, 64, 28), CPU)[1]
    assert not [each.setting for each in derived if each.setting.startswith("mae.")]


def test_mask_tokens_take_memory_too() -> None:
    # 34 bytes for each of 196 x 768 x 12 numbers are 61 MB per image.
    assert 34 * 196 * 768 * 12 * 1024 < 139 * 2**30 / 2 < 34 * 196 * 768 * 12 * 2048
    assert fitted(1_281_167, 375, H200, objective="simmim").batch_size == 1024


def test_the_memory_of_a_gpu_bounds_the_batch_and_the_rate_follows() -> None:
    # 34 bytes for each of 49 x 768 x 12 and 196 x 512 x 8 numbers are 42.7 MB per image.
    assert fitting_batch(139 * 2**30, 196, 49, (768, 12), (512, 8)) == 1024
    assert 34 * (49 * 768 * 12 + 196 * 512 * 8) * 1024 < 139 * 2**30 / 2 < 34 * (49 * 768 * 12 + 196 * 512 * 8) * 2048
    config = fitted(1_281_167, 375, H200)
    assert (config.batch_size, config.mae.lr) == (1024, 3e-4)


def test_patches_are_the_first_that_give_the_grid() -> None:
    sizes = (16, 40, 41, 64, 80, 81, 224)
    assert [patch_size(side, 8) for side in sizes] == [4, 4, 8, 8, 8, 16, 16]


@pytest.mark.parametrize(("width", "heads"), [(32, 1), (96, 3), (100, 2), (128, 2), (192, 3), (260, 5)])
def test_heads_divide_any_width(width: int, heads: int) -> None:
    assert fitted(7000, 75, CPU, encoder__width=width).encoder.num_heads == heads


def test_what_the_user_sets_stays_and_leads() -> None:
    config = fitted(7000, 75, CPU, batch_size=32, mae__epochs=10, encoder__width=64, encoder__image_size=32)
    encoder = config.encoder
    assert (encoder.arch, encoder.width, encoder.num_heads, encoder.image_size, encoder.patch_size) == (
        ("custom", 64, 1, 32, 4)
    )
    assert (config.batch_size, config.mae.epochs, config.mae.warmup_epochs) == (32, 10, 0.5)
    # 1.5e-4 x sqrt(4096 / 32) x (768 / 64)^0.4.
    assert config.mae.lr == 0.0046


def test_a_preset_too_large_for_the_images_is_adapted_value_by_value() -> None:
    config, derived = fit(load("mae_b16"), 5600, Appearance(64, 64, 75), H200)
    assert [(each.setting, each.before, each.value) for each in derived] == [
        ("batch_size", 4096, 128),
        ("mae.lr", 1.5e-4, 8.5e-4),
    ]
    assert config.mae.epochs == 800 and config.encoder.arch == "vit_b16"
    assert fit(load("mae_b16", mae__epochs=20), 1_281_167, Appearance(64, 64, 375), H200)[1][0].value == 1.0
    for preset in (load("quickstart"), load("mae_b16", strict=True), load("mae_b16", batch_size=4096)):
        assert fit(preset, 1437, Appearance(64, 0, 8), CPU)[1] == []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_unlabelled(tmp_path_factory.mktemp("images"))


def test_strict_refuses_and_a_choice_of_the_user_is_refused(data: Path) -> None:
    for given, message in (
        ({"strict": True}, "batch_size 4096 is larger than the 48 training images"),
        ({"batch_size": 64}, "batch_size 64 is larger"),
        ({"batch_size": 16, "mae.warmup_epochs": 4, "mae.epochs": 2}, "mae.warmup_epochs 4 exceeds mae.epochs 2"),
    ):
        with pytest.raises(UserError, match=message):
            make_plan(load("mae_b16", data__spec=str(data), device="cpu", **given), Silent(), Checks())


def test_mistakes_of_the_user_are_not_joined_by_those_of_defaults(data: Path) -> None:
    with pytest.raises(ConfigError, match="weights") as caught:
        make_plan(load(data__spec=str(data), encoder__weights="quickstart", mae__epochs=2), Silent(), Checks())
    assert "batch_size" not in str(caught.value) and "warmup" not in str(caught.value)


def test_config_toml_repeats_a_derived_run_exactly(data: Path, tmp_path: Path) -> None:
    given = {
        "mae__epochs": 2,
        "encoder__depth": 1,
        "encoder__width": 32,
        "batch_size": 24,
        "device": "cpu",
        "workers": 0,
    }
    watcher = Watcher()
    pretrain(load(data__spec=str(data), **given), tmp_path / "first", listener=watcher)
    assert any(note.startswith("mae.lr ") for note in watcher.notes)
    again = load(str(tmp_path / "first" / "config.toml"))
    watcher = Watcher()
    pretrain(again, tmp_path / "second", listener=watcher)
    assert not any("->" in note or note.startswith("mae.") for note in watcher.notes)
    assert_same_run(tmp_path / "first", tmp_path / "second")
    assert dump_config(again.model_copy(update={"preset": None})) == (tmp_path / "first" / "config.toml").read_text()
