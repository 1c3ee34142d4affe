"""Encoders that are no plain vision transformers: recognised by content, with the features of timm's own code."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mimref.config.base import ReadingConfig
from mimref.encoders.backbones import TimmBackbone
from mimref.encoders.checkpoints import Checkpoint, choose_architecture, encoder_from, read_checkpoint
from tests.families import PUBLISHED, content, timm_features


# No weight shows the heads of the rotary families and of AIMv2.
READING = ReadingConfig(num_heads=4)


def assert_equal_features(checkpoint: Checkpoint, model: Any) -> None:
    architecture = choose_architecture(checkpoint)
    encoder = encoder_from(checkpoint, architecture).eval()
    assert isinstance(encoder, TimmBackbone)
    images = torch.randn(2, 3, architecture.image_size, architecture.image_size)
    ours = encoder.blocks(images, range(1, encoder.depth + 1))
    for one, other in zip(ours, timm_features(model, images), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def saved_size(model: Any) -> int | None:
    """Pixels of a model's images; None for one that takes any."""
    if hasattr(model, "tokens_spatial_shape"):
        return int(4 * model.tokens_spatial_shape[0])
    is_fixed = hasattr(model, "patch_embed") and not getattr(model, "rope_type", None) == "dinov3"
    return int(model.patch_embed.img_size[0]) if is_fixed else None


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_published_files_give_the_features_of_timms_model(name: str, tmp_path: Path) -> None:
    case = PUBLISHED[name]
    model = case.model()
    saved, _ = content(case, model)
    torch.save(saved, tmp_path / "file.pth")
    reading = READING if name.startswith(("dinov3", "eva02", "aimv2")) else ReadingConfig()
    checkpoint = read_checkpoint(tmp_path / "file.pth", reading)
    found = checkpoint.recognised
    assert found is not None, checkpoint.problem
    assert found.format.startswith(case.format) and found.source == case.source
    assert set(case.groups) <= set(found.dropped)
    assert found.architecture.image_size == (224 if "dinov3" in name or "convnext" in name else saved_size(model))
    assert_equal_features(checkpoint, model)
