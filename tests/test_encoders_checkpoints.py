"""Reading and writing weights: our own files, MAE's layout, timm's state dicts."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone
from mimref.encoders.checkpoints import encoder_from, load_weights, read_checkpoint, save_encoder
from mimref.encoders.parameters import weights_hash
from mimref.encoders.positions import resize_positions
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.errors import CheckpointError
from tests.checkpoints import load_encoder

TINY = Architecture("custom", 16, width=32, depth=2, num_heads=4, patch_size=4)
POST_NORM = Architecture("custom", 16, width=32, depth=2, num_heads=4, patch_size=4, post_norm=True)
TEST_VIT = Architecture("test_vit", 64, 64, 6, 2, 16, fixed_positions=False, from_timm=True)


def make(architecture: Architecture, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    encoder = build_encoder(architecture).eval()
    for parameter in encoder.parameters():
        parameter.data.normal_(std=0.2)
    return encoder


def weights_of(encoder: object) -> dict[str, torch.Tensor]:
    assert isinstance(encoder, Encoder)
    return encoder.vit.state_dict()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("architecture", [TINY, POST_NORM, TEST_VIT])
def test_round_trip_is_exact(tmp_path: Path, architecture: Architecture) -> None:
    encoder = make(architecture)
    header = {"source": "mae", "data": {"spec": "digits"}, "metrics": [{"metric": "knn_top1", "value": 93.0}]}
    save_encoder(tmp_path / "encoder.safetensors", encoder, header)
    for path in (tmp_path, tmp_path / "encoder.safetensors", str(tmp_path)):
        loaded, read = load_encoder(path)
        assert same(weights_of(loaded), weights_of(encoder))
        assert read == {"architecture": architecture.to_dict(), **header}
        assert loaded.architecture == architecture
    assert weights_of(loaded).keys() == weights_of(encoder).keys()
    fixed = architecture.fixed_positions
    assert isinstance(loaded, Encoder) and loaded.vit.pos_embed is not None
    assert loaded.vit.pos_embed.requires_grad is not fixed


def test_the_header_is_json_under_one_key(tmp_path: Path) -> None:
    save_encoder(tmp_path / "a.safetensors", make(TINY), {"source": "mae"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    assert set(metadata) == {"mimref", "format"} and metadata["format"] == "pt"
    assert json.loads(metadata["mimref"]) == {"architecture": TINY.to_dict(), "source": "mae"}


def test_half_precision_files_load_as_fp32(tmp_path: Path) -> None:
    encoder = make(TINY)
    save_encoder(tmp_path / "half.safetensors", encoder, {}, dtype=torch.float16)
    loaded = weights_of(load_encoder(tmp_path / "half.safetensors")[0])
    for name, tensor in weights_of(encoder).items():
        assert loaded[name].dtype is torch.float32
        assert torch.equal(loaded[name], tensor.half().float())
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * sum(4 * t.numel() for t in loaded.values())


def test_no_temporary_file_stays(tmp_path: Path) -> None:
    save_encoder(tmp_path / "below" / "a.safetensors", make(TINY), {})
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(("wrapper", "zipped"), [(None, True), ("model", True), ("state_dict", False)])
def test_pickles_in_maes_layout(tmp_path: Path, wrapper: str | None, zipped: bool) -> None:
    encoder = make(TINY)
    state = {
        **weights_of(encoder),
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pos_embed": torch.zeros(1, 17, 8),
        "decoder_blocks.0.norm1.weight": torch.zeros(8),
        "head.weight": torch.zeros(10, 32),
    }
    content: dict[str, Any] = {wrapper: state, "epoch": 3} if wrapper else state
    # The file name does not matter.
    torch.save(content, tmp_path / "weights.bin", _use_new_zipfile_serialization=zipped)
    loaded, header = load_encoder(tmp_path / "weights.bin", TINY)
    assert same(weights_of(loaded), weights_of(encoder)) and header == {}
    with pytest.raises(CheckpointError, match=r"weights\.bin: .*width of 32.*--arch"):
        load_encoder(tmp_path / "weights.bin")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_positions_are_interpolated_once_to_another_resolution(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in weights_of(make(TINY)).items()}
    torch.save(state, tmp_path / "a.pth")
    larger = Architecture("custom", 28, width=32, depth=2, num_heads=4, patch_size=4)
    loaded = weights_of(load_encoder(tmp_path / "a.pth", larger)[0])
    positions = state["pos_embed"].float()
    expected = torch.cat([positions[:, :1], resize_positions(positions[:, 1:], (7, 7))], dim=1)
    assert torch.equal(loaded["pos_embed"], expected)
    assert all(torch.equal(loaded[name], state[name].float()) for name in state if name != "pos_embed")


@torch.no_grad()
def test_timm_loads_our_pre_norm_files(tmp_path: Path) -> None:
    encoder = make(Architecture("vit_tiny_patch16_224", 224, 192, 12, 3, 16))
    save_encoder(tmp_path / "encoder.safetensors", encoder, {"source": "mae"})
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(tmp_path / "encoder.safetensors")
    ).eval()
    assert same(model.state_dict(), weights_of(encoder))
    images = torch.randn(1, 3, 224, 224)
    tokens = encoder.blocks(images, [12], final_norm=True)[0]
    torch.testing.assert_close(model(images), tokens[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "suffix"), [("test_convnext", "pth"), ("test_efficientnet", "safetensors"), ("hiera_tiny_224", "pth")]
)
@torch.no_grad()
def test_backbones_load_timms_state_dicts(tmp_path: Path, name: str, suffix: str) -> None:
    torch.manual_seed(0)
    # With the classifier, as in timm's files.
    model: Any = timm.create_model(name, num_classes=10).eval()
    path = tmp_path / f"weights.{suffix}"
    save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(model.state_dict(), path)
    size = model.pretrained_cfg["input_size"][-1]
    backbone, header = load_encoder(path, BackboneArchitecture(name, size))
    assert isinstance(backbone, TimmBackbone) and header == {}
    backbone.eval()
    images = torch.randn(1, 3, size, size)
    expected = model.forward_intermediates(images, intermediates_only=True)[-1].mean(dim=(2, 3))
    actual = backbone.pool(backbone.blocks(images, [backbone.depth])[0], "cls")
    torch.testing.assert_close(actual, expected)


def test_tensors_that_the_model_needs_are_not_dropped(tmp_path: Path) -> None:
    # ConvNeXt's last norm is called head.norm and must be kept when the classifier is dropped.
    model: Any = timm.create_model("test_convnext", num_classes=10)
    torch.nn.init.normal_(model.head.norm.weight)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    backbone, _ = load_encoder(tmp_path / "a.pth", BackboneArchitecture("test_convnext", 160))
    assert isinstance(backbone, TimmBackbone)
    assert torch.equal(backbone.model.state_dict()["head.norm.weight"], model.head.norm.weight)


def test_plain_timm_vits_are_encoders(tmp_path: Path) -> None:
    model: Any = timm.create_model("test_vit", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    encoder = encoder_from(read_checkpoint(tmp_path / "a.pth"), TEST_VIT)
    assert isinstance(encoder, Encoder)
    assert torch.equal(weights_of(encoder)["blocks.5.mlp.fc2.weight"], model.blocks[5].mlp.fc2.weight)
    assert weights_of(encoder)["pos_embed"].shape == (1, 17, 64)


def test_hashes_of_weights() -> None:
    one, same_one, other = make(TINY), make(TINY), make(TINY, seed=1)
    assert weights_hash(one) == weights_hash(same_one) != weights_hash(other)
    with torch.no_grad():
        same_one.vit.get_parameter("blocks.1.mlp.fc2.bias")[3] += 1e-7
    assert weights_hash(one) != weights_hash(same_one)


def test_loading_leaves_the_files_tensors_alone(tmp_path: Path) -> None:
    save_encoder(tmp_path / "a.safetensors", make(TINY), {})
    checkpoint = read_checkpoint(tmp_path / "a.safetensors")
    first, second = build_encoder(TINY), build_encoder(TINY)
    load_weights(first, checkpoint)
    with torch.no_grad():
        first.vit.get_parameter("blocks.0.mlp.fc1.bias").add_(1)
    load_weights(second, checkpoint)
    assert same(weights_of(second), checkpoint.tensors)
