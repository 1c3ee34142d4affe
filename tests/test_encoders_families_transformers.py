"""Non-plain vision transformers as saved by transformers, against the hidden states of its own models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mimref.encoders.backbones import TimmBackbone
from mimref.encoders.checkpoints import choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.families import aimv2, beit, convnext, eva, hiera, swin
from mimref.encoders.families.family import Layout
from mimref.encoders.families.origins import written_tensors

transformers = pytest.importorskip("transformers")

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
HIERA = {
    "embed_dim": 16,
    "image_size": [64, 64],
    "depths": [1, 2, 1, 1],
    "num_heads": [1, 2, 4, 8],
    "decoder_hidden_size": 16,
    "decoder_num_heads": 2,
    "decoder_depth": 1,
}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}

# Name: model class, configuration class, its options, format, source, and layout to write.
CASES: dict[str, tuple[str, str, dict[str, Any], str, str | None, Layout]] = {
    "dinov3": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**VIT, "num_register_tokens": 2},
        "DINOv3",
        "dinov3",
        eva.DINOV3_HF,
    ),
    "dinov3_gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {
            **VIT,
            "num_register_tokens": 4,
            "use_gated_mlp": True,
            "hidden_act": "silu",
            "query_bias": False,
            "value_bias": False,
        },
        "DINOv3",
        "dinov3",
        eva.DINOV3_HF,
    ),
    "beit": (
        "BeitForMaskedImageModeling",
        "BeitConfig",
        {**VIT, "use_shared_relative_position_bias": True, "use_mask_token": True, "layer_norm_eps": 1e-6},
        "BEiT",
        None,
        beit.HF,
    ),
    "beit_fine_tuned": (
        "BeitForImageClassification",
        "BeitConfig",
        {**VIT, "use_relative_position_bias": True, "layer_norm_eps": 1e-6},
        "BEiT",
        None,
        beit.HF,
    ),
    "data2vec": (
        "Data2VecVisionModel",
        "Data2VecVisionConfig",
        {**VIT, "use_shared_relative_position_bias": True, "layer_norm_eps": 1e-6},
        "data2vec 1.0",
        "d2v1",
        beit.HF,
    ),
    "simmim": ("SwinForMaskedImageModeling", "SwinConfig", SWIN, "SimMIM Swin", "simmim", swin.HF),
    "swinv2": ("Swinv2ForMaskedImageModeling", "Swinv2Config", SWIN, "SimMIM Swin V2", "simmim", swin.HF),
    "hiera_mae": (
        "HieraForPreTraining",
        "HieraConfig",
        {**HIERA, "num_query_pool": 2},
        "Hiera",
        "mae",
        hiera.hf_layout((1, 2, 1, 1), pretrained=True),
    ),
    "hiera": (
        "HieraForImageClassification",
        "HieraConfig",
        HIERA,
        "Hiera",
        None,
        hiera.hf_layout((1, 2, 1, 1), pretrained=False),
    ),
    "convnextv2": ("ConvNextV2Model", "ConvNextV2Config", STAGES, "ConvNeXt V2", None, convnext.HF_V2),
    "dinov3_convnext": (
        "DINOv3ConvNextModel",
        "DINOv3ConvNextConfig",
        STAGES,
        "DINOv3 ConvNeXt",
        "dinov3",
        convnext.HF_DINOV3,
    ),
    "aimv2": ("Aimv2VisionModel", "Aimv2VisionConfig", VIT, "AIMv2", "aimv2", aimv2.HF),
}


def theirs(name: str, folder: Path, **more: Any) -> Any:
    """The transformers model with random values in every parameter, saved in a folder."""
    kind, config, options, *_ = CASES[name]
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1) * 0.5)
    model.save_pretrained(folder)
    return model


def stage_outputs(model: nn.Module, images: Tensor, modules: list[Any]) -> list[Tensor]:
    """Outputs of modules, as tokens (B, L, D) or maps (B, D, rows, columns)."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, given: found.append(given[0] if isinstance(given, tuple) else given))
        for module in modules
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return found


def hidden(name: str, model: Any, images: Tensor) -> list[Tensor]:
    """Tokens of every block or stage of transformers' model, before the patches of the next stage are merged."""
    inner = getattr(model, model.base_model_prefix, model) if "For" in type(model).__name__ else model
    if name in ("simmim", "swinv2"):
        return stage_outputs(inner, images, [layer.blocks[-1] for layer in inner.encoder.layers])
    if name == "hiera_mae":  # its own model masks patches
        inner = transformers.HieraModel(model.config).eval()
        inner.load_state_dict(model.hiera.state_dict(), strict=False)
    if name == "dinov3_convnext":
        found = stage_outputs(inner, images, list(inner.model.stages))
    else:
        output = inner(images, output_hidden_states=True)
        if name.startswith("hiera"):
            return [each.flatten(1, 2) for each in output.reshaped_hidden_states[1:]]
        found = list(output.hidden_states[1:])
    return [each.flatten(2).transpose(1, 2) if each.ndim == 4 else each for each in found]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_hidden_states_of_transformers(name: str, tmp_path: Path) -> None:
    _, _, _, format_, source, layout = CASES[name]
    model = theirs(name, tmp_path / "model")
    checkpoint = read_checkpoint(tmp_path / "model")
    found = checkpoint.recognised
    if found is None and "lacks the model" in checkpoint.problem:
        pytest.skip(f"timm {timm.__version__} lacks the family")
    assert found is not None, checkpoint.problem
    assert found.format.startswith(f"Hugging Face {format_}") and found.source == source
    encoder = encoder_from(checkpoint, choose_architecture(checkpoint)).eval()
    assert isinstance(encoder, TimmBackbone)
    size = encoder.architecture.image_size
    images = torch.randn(2, 3, size, size)
    wanted = hidden(name, model, images)
    ours = encoder.blocks(images, range(1, encoder.depth + 1))[-len(wanted) :]
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert_written_back(load_file(tmp_path / "model" / "model.safetensors"), found.tensors, found.dropped, layout)


def assert_written_back(
    file: dict[str, Tensor], tensors: dict[str, Tensor], dropped: dict[str, list[str]], layout: Layout
) -> None:
    """Every tensor of the file is written back bit for bit or belongs to a dropped group."""
    inner = ("beit.", "swin.", "swinv2.", "hiera.")
    names = {name: next((name[len(each) :] for each in inner if name.startswith(each)), name) for name in file}
    written = written_tensors(layout.naming, tensors)
    left = {name for group in dropped.values() for name in group}
    for name, tensor in file.items():
        assert name in left or torch.equal(written.pop(names[name]), tensor), name
    # What remains are norms that the file lacks.
    assert all("norm" in name for name in written)


@torch.no_grad()
def test_what_only_the_configuration_says(tmp_path: Path) -> None:
    theirs("swinv2", tmp_path)
    config = tmp_path / "config.json"
    saved = config.read_text(encoding="utf-8")
    config.write_text(saved.replace('"gelu"', '"relu"'), encoding="utf-8")
    assert "relu" in read_checkpoint(tmp_path).problem
    config.unlink()
    assert "config.json" in read_checkpoint(tmp_path).problem


@torch.no_grad()
def test_positions_in_the_coordinates_of_other_windows(tmp_path: Path) -> None:
    name = "swinv2"
    model = theirs(name, tmp_path / "model", pretrained_window_sizes=[3, 2])
    checkpoint = read_checkpoint(tmp_path / "model")
    encoder = encoder_from(checkpoint, choose_architecture(checkpoint)).eval()
    images = torch.randn(2, 3, 32, 32)
    for one, other in zip(encoder.blocks(images, [1, 2]), hidden(name, model, images), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    config = tmp_path / "model" / "config.json"
    saved = json.loads(config.read_text(encoding="utf-8"))
    for wrong in (3, [3], [3, -1], [3, "2"]):
        config.write_text(json.dumps(saved | {"pretrained_window_sizes": wrong}), encoding="utf-8")
        assert "pretrained_window_sizes" in read_checkpoint(tmp_path / "model").problem


def test_rotary_positions_of_another_base(tmp_path: Path) -> None:
    theirs("dinov3", tmp_path, rope_theta=50.0)
    assert "base 50" in read_checkpoint(tmp_path).problem


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    theirs("dinov3", tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    damages: list[Callable[[dict[str, Tensor]], object]] = [
        lambda file: file.pop("layer.1.norm2.weight"),
        lambda file: file.update({"layer.1.surprise": torch.zeros(3)}),
        lambda file: file.update({"layer.0.attention.q_proj.weight": torch.zeros(7, 32)}),
        lambda file: file.update({"embeddings.patch_embeddings.weight": torch.zeros(32)}),
    ]
    for damage, name in zip(damages, ("norm2", "surprise", "q_proj", "patch_embeddings"), strict=True):
        damaged = dict(file)
        damage(damaged)
        save_file(damaged, tmp_path / "model.safetensors")
        problem = read_checkpoint(tmp_path).problem
        assert name in problem and "\n" not in problem
