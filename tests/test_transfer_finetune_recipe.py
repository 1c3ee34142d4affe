"""Rules for fine-tuning settings: published values in their regimes, and values in between."""

from pathlib import Path
from typing import Any

import pytest

from mimref.config.load import load_config
from mimref.data.sample import Appearance
from mimref.devices import Machine
from mimref.encoders.vit import PAPER_SIZES, Architecture
from mimref.errors import Checks, UserError
from mimref.progress import Silent
from mimref.transfer.finetune.config import FinetuneConfig
from mimref.transfer.finetune.plan import make_plan
from mimref.transfer.finetune.recipe import Labelled, fit, fit_choice, validate_every
from mimref.transfer.finetune.run import finetune
from tests.tiny import Watcher, assert_same_run, write_labelled, write_weights

CPU, GPU = Machine(False), Machine(True, 139 * 2**30)
SMALL = Architecture("custom", 28, 96, 8, 3, 4)
PHOTOGRAPHS = Appearance(64, 64, 375)


def paper(name: str) -> Architecture:
    width, depth, heads, patch = PAPER_SIZES[name]
    return Architecture(name, 224, width, depth, heads, patch)


def load(preset: str | None = None, **given: Any) -> FinetuneConfig:
    return load_config(FinetuneConfig, preset, {key.replace("__", "."): value for key, value in given.items()})


# Training images, classes, validation images, and what the recipe leaves to the preset.
REGIMES = {
    ("imagenet_l16", "vit_l16"): (1_281_167, 1000, 50_000, set()),
    ("imagenet_b16", "vit_b16"): (1_281_167, 1000, 50_000, set()),
    ("imagenet_h14", "vit_h14"): (1_281_167, 1000, 50_000, set()),
    ("inat18_l16", "vit_l16"): (437_513, 8142, 24_426, set()),
    ("imagenet_10pct", "vit_l16"): (128_116, 1000, 50_000, set()),
    ("imagenet_1pct", "vit_l16"): (12_811, 1000, 50_000, set()),
    ("inat18_5shot", "vit_l16"): (40_710, 8142, 24_426, {"augment.resize"}),
    ("inat18_10shot", "vit_h14"): (81_420, 8142, 24_426, {"augment.resize"}),
    ("vtab1k", "vit_l16"): (1000, 47, 1880, {"augment"}),
}


@pytest.mark.parametrize("regime", REGIMES)
def test_published_settings_in_their_regime(regime: tuple[str, str]) -> None:
    images, classes, validation, left = REGIMES[regime]
    given = load(regime[0])
    found, _ = fit(load(), Labelled(images, classes, validation), PHOTOGRAPHS, paper(regime[1]), GPU)
    assert found.batch_size == given.batch_size and found.finetune == given.finetune
    if "augment" not in left:
        assert found.augment == given.augment.model_copy(update={"resize": found.augment.resize})


def test_the_measured_presets_are_met_closely() -> None:
    digits, _ = fit(load(data__spec="digits"), Labelled(1437, 10, 360), Appearance(64, 0, 8), SMALL, CPU)
    fashion, _ = fit(load(), Labelled(10_000, 10, 10_000), Appearance(64, 0, 28), SMALL, CPU)
    for found, preset, factor in ((digits, "quickstart", 2), (fashion, "fashion_mnist", 2)):
        given = load(preset)
        assert given.finetune.lr / factor <= found.finetune.lr <= given.finetune.lr * factor + 1e-3
        assert found.augment.model_copy(update={"smoothing": 0.1}) == given.augment
    assert (fashion.batch_size, fashion.finetune.epochs, fashion.monitor.validate_every_epochs) == (128, 10, 2)
    assert (digits.batch_size, digits.finetune.epochs, digits.monitor.validate_every_epochs) == (64, 50, 1)


# (images, classes): batch size, epochs, warm-up epochs and peak learning rate x 10^5 on a CPU.
FEW = {
    (2, 2): (2, 200, 5.0, 20),
    (17, 3): (4, 50, 5.0, 28),
    (900, 10): (32, 50, 5.0, 81),
    (7000, 10): (128, 14, 1.4, 160),
}


@pytest.mark.parametrize("count", FEW)
def test_few_images(count: tuple[int, int]) -> None:
    config, _ = fit(load(), Labelled(*count, 5), Appearance(64, 64, 75), SMALL, CPU)
    peak = config.finetune.lr * config.batch_size / 256 * 1e5
    assert (config.batch_size, config.finetune.epochs, config.finetune.warmup_epochs, round(peak)) == FEW[count]
    augment = config.augment
    assert (augment.rand_augment, augment.erase, augment.mixup, augment.cutmix) == (None, 0, 0, 0)


def test_micro_batches_on_a_gpu_and_no_randaugment_of_gray_images() -> None:
    config, _ = fit(load(), Labelled(1_281_167, 1000, 9), Appearance(64, 0, 375), paper("vit_l16"), GPU)
    # 34 bytes for each of 197 x 1024 x 24 values are 165 MB per image; half of the memory holds 453 images.
    assert config.micro_batch == 256 and config.augment.rand_augment is None and config.augment.mixup == 0.8


def test_validation_takes_a_tenth_of_the_time() -> None:
    cases = ((1000, 300, 50), (1000, 301, 50), (1000, 900, 50), (10, 9000, 50), (10, 9000, 4))
    assert [validate_every(Labelled(a, 2, b), epochs) for a, b, epochs in cases] == [1, 2, 3, 10, 1]


def test_a_preset_that_does_not_fit_is_adapted_value_by_value() -> None:
    labelled = Labelled(720, 10, 180)
    config, derived = fit(load("imagenet_l16", finetune__epochs=3), labelled, PHOTOGRAPHS, paper("vit_l16"), GPU)
    assert [(each.setting, each.before, each.value) for each in derived] == [
        ("batch_size", 1024, 32),
        ("finetune.lr", 1e-3, 5.7e-3),
        ("finetune.warmup_epochs", 5.0, 0.3),
    ]
    assert config.augment.mixup == 0.8
    _, derived = fit_choice(load("imagenet_5shot", finetune__freeze_blocks=6), 4, least=3)
    assert list(map(str, derived)) == ["all_if_fewer false -> true: the smallest class has 3 images"]
    _, derived = fit_choice(load("imagenet_1shot_mae_2b14"), 4, least=3)
    assert [each.setting for each in derived] == ["finetune.freeze_blocks"]
    assert fit(load("imagenet_l16", strict=True), labelled, PHOTOGRAPHS, paper("vit_l16"), GPU)[1] == []


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("finetune")
    return str(write_weights(folder / "weights.safetensors")), str(write_labelled(folder / "images"))


def test_strict_refuses(paths: tuple[str, str]) -> None:
    given = {"encoder__weights": paths[0], "data__spec": paths[1], "device": "cpu"}
    with pytest.raises(UserError, match="batch_size 1024 is larger than the 48 training images"):
        make_plan(load("imagenet_l16", **given, strict=True), Silent(), Checks())
    watcher = Watcher()
    assert make_plan(load("imagenet_l16", **given), watcher, Checks()).config.batch_size == 4
    assert any(note.startswith("batch_size 1024 -> 4: ") for note in watcher.notes)


def test_config_toml_repeats_a_derived_run_exactly(paths: tuple[str, str], tmp_path: Path) -> None:
    given = {"encoder__weights": paths[0], "data__spec": paths[1], "device": "cpu", "workers": 0, "finetune__epochs": 2}
    finetune(load(**given), tmp_path / "first")
    watcher = Watcher()
    finetune(load(str(tmp_path / "first" / "config.toml")), tmp_path / "second", listener=watcher)
    assert not any("->" in note or note.startswith("finetune.") for note in watcher.notes)
    assert_same_run(tmp_path / "first", tmp_path / "second")
