"""Derived settings: what a recipe may change, and what it must not."""

from typing import Any

import pytest

from mimref.config.base import dump_config
from mimref.config.load import load_config
from mimref.config.recipe import Recipe, is_adaptable, is_set
from mimref.errors import ConfigError
from mimref.refinement.config import HeadsConfig, RefineConfig


def load(preset: str | None = None, *sets: str, **overrides: Any) -> RefineConfig:
    return load_config(RefineConfig, preset, {key.replace("__", "."): value for key, value in overrides.items()}, sets)


def test_what_nothing_has_set_is_derived_with_its_rule() -> None:
    recipe = Recipe(load(None, "heads.temperature=0.4", batch_size=64))
    recipe.derive("batch_size", 32, "a rule")
    recipe.derive("heads.temperature", 0.3, "a rule")
    recipe.derive("heads.queue_size", 512, "a power of two, at most half of 1,437 images")
    recipe.derive("views.jitter", (0.4, 0.4, 0.0, 0.0), "gray images")
    config = recipe.finish()
    assert (config.batch_size, config.heads.temperature, config.heads.queue_size) == (64, 0.4, 512)
    assert list(map(str, recipe.derived)) == [
        "heads.queue_size 512: a power of two, at most half of 1,437 images",
        "views.jitter [0.4, 0.4, 0.0, 0.0]: gray images",
    ]
    assert is_set(config, "heads.queue_size") and not is_set(config, "heads.output")
    assert config.given == {"batch_size", "heads.temperature"}


def test_later_rules_read_what_was_derived_before() -> None:
    recipe = Recipe(load())
    recipe.derive("batch_size", 8, "")
    recipe.derive("heads.queue_size", 64 * recipe.config.batch_size, "")
    assert recipe.finish().heads.queue_size == 512


def test_sections_given_in_python_count_as_far_as_they_are_set() -> None:
    config = RefineConfig(heads=HeadsConfig(output=64))
    assert is_set(config, "heads.output") and not is_set(config, "heads.queue_size")


def test_nothing_is_derived_from_a_preset() -> None:
    recipe = Recipe(load("fashion_mnist"))
    recipe.derive("heads_stage.warmup_epochs", 1.0, "")
    assert recipe.finish() == load("fashion_mnist") and recipe.derived == []


def test_only_values_of_a_preset_are_adapted() -> None:
    config = load("mae_l16", "heads.output=64", "heads.queue_size=300", batch_size=512)
    recipe = Recipe(config)
    recipe.adapt("batch_size", 128, "")
    recipe.adapt("heads.queue_size", 64, "")
    recipe.adapt("heads_stage.top_k", 1, "as it is")
    recipe.adapt("encoder_stage.top_k", 5, "at most 5 of 8 rows")
    assert list(map(str, recipe.derived)) == ["encoder_stage.top_k 20 -> 5: at most 5 of 8 rows"]
    assert (config.batch_size, config.heads.queue_size, recipe.finish().encoder_stage.top_k) == (512, 300, 5)


@pytest.mark.parametrize("config", [load("mae_l16", strict="true"), load(), RefineConfig()])
def test_without_a_preset_or_with_strict_nothing_is_adapted(config: RefineConfig) -> None:
    assert not is_adaptable(config, "batch_size")


def test_values_that_do_not_fit_each_other_are_an_error() -> None:
    recipe = Recipe(load(micro_batch=64))
    recipe.derive("batch_size", 8, "")
    with pytest.raises(ConfigError, match="micro_batch 64 exceeds batch_size 8"):
        recipe.finish()


def test_equal_settings_are_equal_wherever_they_come_from(tmp_path: Any) -> None:
    config = load(batch_size=64)
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load(str(path)) == config.model_copy(update={"preset": str(path)})
    assert config == load(None, "batch_size=64") != load(batch_size=32)
