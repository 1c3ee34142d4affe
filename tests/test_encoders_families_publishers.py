"""Encoders that are not plain vision transformers: recognised by content, with the features of timm's own code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mimref.config.base import ReadingConfig
from mimref.encoders.backbones import TimmBackbone
from mimref.encoders.checkpoints import Checkpoint, choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.export import read_encoder
from mimref.encoders.export_publisher import export_publisher
from mimref.encoders.families.publishing import container_of
from mimref.encoders.fitting import filter_names
from mimref.encoders.inspection import inspect_file
from tests.family_files import PUBLISHED, State, content, convnext_file, dinov3_file, random_model, timm_features


def reading_of(name: str) -> ReadingConfig:
    """Settings with the number of heads, which no weight shows for the rotary families and AIMv2."""
    return ReadingConfig(num_heads=4 if name.startswith(("dinov3", "eva02", "aimv2")) else None)


def assert_equal_features(checkpoint: Checkpoint, model: Any) -> None:
    architecture = choose_architecture(checkpoint)
    encoder = encoder_from(checkpoint, architecture).eval()
    assert isinstance(encoder, TimmBackbone)
    images = torch.randn(2, 3, architecture.image_size, architecture.image_size)
    ours = encoder.blocks(images, range(1, encoder.depth + 1))
    for one, other in zip(ours, timm_features(model, images), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def saved_size(model: Any) -> int | None:
    """A model's image size in pixels; None if it takes any size."""
    if hasattr(model, "tokens_spatial_shape"):
        return int(4 * model.tokens_spatial_shape[0])
    return int(model.patch_embed.img_size[0]) if hasattr(model, "patch_embed") else None


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_published_files_give_the_features_of_timms_model(name: str, tmp_path: Path) -> None:
    case = PUBLISHED[name]
    model = case.model()
    saved, _ = content(case, model)
    torch.save(saved, tmp_path / "file.pth")
    checkpoint = read_checkpoint(tmp_path / "file.pth", reading_of(name))
    found = checkpoint.recognised
    assert found is not None, checkpoint.problem
    assert found.format.startswith(case.format) and found.source == case.source
    assert set(case.groups) <= set(found.dropped)
    assert found.architecture.image_size == (224 if "dinov3" in name or "convnext" in name else saved_size(model))
    assert_equal_features(checkpoint, model)


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_publishers_files_are_written_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    case = PUBLISHED[name]
    model = case.model()
    saved, encoder_tensors = content(case, model)
    torch.save(saved, tmp_path / "file.pth")
    encoder, facts, checkpoint = read_encoder(tmp_path / "file.pth", reading_of(name))
    assert checkpoint.recognised is not None and isinstance(encoder, TimmBackbone)
    # Swin's own code computes the masks of shifted windows.
    encoder_tensors = {key: tensor for key, tensor in encoder_tensors.items() if not key.endswith("attn_mask")}
    if "sparse" in name:
        # FCMAE's published files have dense kernels, and so has the written file.
        encoder_tensors = {key: tensor for key, tensor in convnext_file(model).items() if not key.startswith("norm.")}
    for out in (tmp_path / "back.pth", tmp_path / "back.safetensors"):
        assert export_publisher(encoder, out, facts).difference == 0
    written = torch.load(tmp_path / "back.pth", weights_only=True)
    key = container_of(encoder.architecture)
    written = written[key] if key else written
    assert key in (None, case.container) or case.container == "module"
    assert written.keys() == encoder_tensors.keys()
    for tensor_name, tensor in encoder_tensors.items():
        if ".freqs_" in tensor_name:  # the sum of two roundings
            torch.testing.assert_close(written[tensor_name], tensor, rtol=0, atol=1e-6)
        else:
            assert torch.equal(written[tensor_name], tensor), tensor_name
            assert written[tensor_name].dtype == tensor.dtype
    assert load_file(tmp_path / "back.safetensors").keys() == encoder_tensors.keys()


@torch.no_grad()
def test_key_biases_of_dinov3_are_refused_unless_masked(tmp_path: Path) -> None:
    case = PUBLISHED["dinov3"]
    file = case.file(case.model())
    file["blocks.1.attn.qkv.bias"][32:64] = 0.5
    torch.save(file, tmp_path / "file.pth")
    assert read_checkpoint(tmp_path / "file.pth", reading_of("dinov3")).recognised
    damages: list[State] = [{}, {"blocks.1.attn.qkv.bias_mask": torch.ones(96)}]
    for mask in damages:
        bare = {name: tensor for name, tensor in file.items() if not name.endswith("bias_mask")}
        torch.save(bare | mask, tmp_path / "file.pth")
        assert "key biases" in read_checkpoint(tmp_path / "file.pth", reading_of("dinov3")).problem


@torch.no_grad()
def test_dinov3_without_storage_tokens(tmp_path: Path) -> None:
    sizes = {"embed_dim": 32, "depth": 3, "num_heads": 4, "patch_size": 8, "num_reg_tokens": 0}
    model = random_model("vit_small_patch16_dinov3_qkvb", **sizes)
    torch.save(dinov3_file(model), tmp_path / "file.pth")
    assert_equal_features(read_checkpoint(tmp_path / "file.pth", reading_of("dinov3")), model)


TIMMS_OWN = (
    "dinov3",
    "eva02_packed",
    "eva02",
    "beit",
    "beit_fine_tuned",
    "simmim",
    "swinv2",
    "hiera",
    "aimv2",
    "convnextv2",
)


@pytest.mark.parametrize("name", TIMMS_OWN)
def test_names_are_those_of_timms_filter_of_published_files(name: str, tmp_path: Path) -> None:
    case = PUBLISHED[name]
    model = case.model()
    _, encoder_tensors = content(case, model)
    torch.save(encoder_tensors, tmp_path / "file.pth")
    found = read_checkpoint(tmp_path / "file.pth", reading_of(name)).recognised
    assert found is not None
    filtered = filter_names(found.architecture.name, encoder_tensors, model)
    assert filtered is not None
    for key in model.state_dict():
        assert torch.equal(found.tensors[key], filtered[key]), key


@pytest.mark.parametrize("name", ["hiera_mae", "beit", "swinv2", "dinov3"])
def test_the_models_own_name_keeps_its_sizes(name: str, tmp_path: Path) -> None:
    case = PUBLISHED[name]
    torch.save(case.file(case.model()), tmp_path / "file.pth")
    checkpoint = read_checkpoint(tmp_path / "file.pth", reading_of(name))
    assert checkpoint.architecture is not None
    assert choose_architecture(checkpoint, checkpoint.architecture.name) == checkpoint.architecture


def test_settings_without_an_effect_are_told(tmp_path: Path) -> None:
    case = PUBLISHED["dinov3"]
    torch.save(case.file(case.model()), tmp_path / "file.pth")
    unused: list[dict[str, Any]] = [{}, {"interpolation": "mae"}, {"grid": (2, 8)}]
    for settings in unused:
        reading = reading_of("dinov3").model_copy(update=settings)
        checkpoint = read_checkpoint(tmp_path / "file.pth", reading)
        assert checkpoint.architecture is not None
        notices = [line for line in checkpoint.notices(checkpoint.architecture) if "has no effect" in line]
        assert len(notices) == len(settings) and all(f"encoder.{name}" in notices[0] for name in settings)
    (notice,) = [line for line in inspect_file(tmp_path / "file.pth", reading).notices if "has no effect" in line]
    assert notice.startswith("encoder.grid")


def test_the_normalisation_of_a_family_is_marked_as_assumed(tmp_path: Path) -> None:
    case = PUBLISHED["beit"]
    torch.save(case.file(case.model()), tmp_path / "file.pth")
    assert read_checkpoint(tmp_path / "file.pth").header["transform"]["assumed"]


@torch.no_grad()
def test_of_two_families_one_is_chosen(tmp_path: Path) -> None:
    models = {name: PUBLISHED[name].model() for name in ("beit", "hiera")}
    tensors = {
        f"{part}.{key}": tensor
        for part, name in (("a", "beit"), ("b", "hiera"))
        for key, tensor in PUBLISHED[name].file(models[name]).items()
    }
    torch.save(tensors, tmp_path / "file.pth")
    for part, name in (("a", "beit"), ("b", "hiera")):
        checkpoint = read_checkpoint(tmp_path / "file.pth", ReadingConfig(part=part))
        assert_equal_features(checkpoint, models[name])
    assert "contains several encoders (a, b)" in read_checkpoint(tmp_path / "file.pth").problem
