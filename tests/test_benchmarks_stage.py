"""Settings of a benchmark: those with which a refinement of the same encoder and images would run."""

from pathlib import Path

import pytest
import torch

from mimref.benchmarks.flops import model_flops
from mimref.benchmarks.peak import step_peak
from mimref.benchmarks.stage import fitted, ready_stage, resolve_encoder, synthetic_batch
from mimref.config.load import load_config
from mimref.errors import ConfigError
from mimref.refinement.config import RefineConfig
from mimref.refinement.plan import make_plan
from tests.test_benchmarks_step import tiny
from tests.tiny import refine_config, write_labelled, write_weights


def test_a_presets_settings_are_adapted_to_encoder_and_images() -> None:
    swin = {"encoder.arch": "swin_tiny_patch4_window7_224", "data.spec": "digits"}
    config = load_config(RefineConfig, "refine/mae_l16", swin)
    found, lines = fitted(config, read_data=True)
    assert (found.heads.blocks, found.heads.queue_size) == ("3-4", 512)
    assert any("heads.queue_size" in line and "1,437 training images" in line for line in lines)
    limited = config.model_copy(update={"data": config.data.model_copy(update={"train_limit": 2000})})
    found, lines = fitted(limited, read_data=True)
    assert found.data.train_limit is None and lines[0].startswith("data.train_limit 2000 -> none")
    # Without images, those of ImageNet decide.
    found, lines = fitted(config, read_data=False)
    assert (found.heads.blocks, found.heads.queue_size) == ("3-4", 65_536)
    assert len(lines) == 1 and lines[0].startswith("heads.blocks")


def test_a_recipe_derives_what_refine_would(tmp_path: Path) -> None:
    weights, data = write_weights(tmp_path / "weights.safetensors"), write_labelled(tmp_path / "data")
    config = load_config(RefineConfig, None, {"encoder.weights": str(weights), "data.spec": str(data), "device": "cpu"})
    found, _ = fitted(config, read_data=True)
    planned = make_plan(config.model_copy(update={"heads": found.heads})).config
    for name in ("batch_size", "views", "heads_stage", "encoder_stage", "precision"):
        assert getattr(found, name) == getattr(planned, name)
    # The blocks' curve would take the weights: two encoders of the same size cost the same.
    assert found.heads.blocks == "3-4"


def test_settings_that_the_weights_contradict_are_reported(tmp_path: Path) -> None:
    config = refine_config(write_weights(tmp_path / "w.safetensors"), tmp_path, encoder__arch="vit_b16")
    _, lines = fitted(config, read_data=False)
    assert "encoder.arch vit_b16 is ignored" in lines[0]


def test_published_weights_have_their_own_size() -> None:
    config = load_config(RefineConfig, "refine/mae_l16", {"encoder.weights": "mae_b16", "heads.blocks": "12"})
    architecture, blocks = resolve_encoder(config)
    assert (architecture.name, blocks) == ("vit_b16", [12])


def test_images_have_the_channels_of_the_settings() -> None:
    colour, bands = tiny(views__color=False), tiny(views__color=False, data__channels=6)
    flops, peaks = [], []
    for config, channels, kind in ((colour, 3, torch.uint8), (bands, 6, torch.float32)):
        with ready_stage(config, "encoder") as (job, _):
            batch = synthetic_batch(job)
            assert {(crops.shape[2], crops.dtype) for crops in batch.crops} == {(channels, kind)}
            job.update(batch)
            job.check()
        architecture, blocks = resolve_encoder(config)
        assert architecture.channels == channels
        flops.append(model_flops(config, architecture, blocks, "encoder"))
        peaks.append(step_peak(config, architecture, blocks, "encoder", images=12).bytes)
    assert flops[0] < flops[1] and peaks[0] < peaks[1]
    with pytest.raises(ConfigError, match="needs colour, but images have 6 channels"):
        resolve_encoder(tiny(views__color=True, data__channels=6))
