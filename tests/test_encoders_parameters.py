"""Encoder parameters: groups listed name by name, and what freezing leaves trainable."""

from typing import Any

import pytest
import torch

from mimref.config.run import EncoderConfig
from mimref.encoders.parameters import encoder_groups, freeze_untrained
from mimref.encoders.vit import Architecture, Encoder, build_encoder

# A block's parameters: matrices have weight decay, vectors have none.
MATRICES = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
VECTORS = (
    *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
    *("attn.qkv.bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias"),
)
TINY = Architecture("custom", image_size=8, width=8, depth=3, num_heads=2, patch_size=4)

Expected = dict[str, tuple[float, float]]


def on_meta(**encoder: Any) -> Encoder:
    with torch.device("meta"):
        return build_encoder(Architecture.from_config(EncoderConfig(**encoder)))


def found_in(groups: list[dict[str, Any]]) -> Expected:
    """Learning-rate scale and weight decay by name; every parameter must be in exactly one group."""
    names = [name for group in groups for name in group["names"]]
    assert len(names) == len(set(names)) == len({id(p) for group in groups for p in group["params"]})
    assert all(len(group["names"]) == len(group["params"]) for group in groups)
    return {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}


def block_parameters(depth: int, *, extra_vectors: tuple[str, ...] = ()) -> Expected:
    """Expected values for blocks with a layer decay of 0.65, applied once to the last block."""
    expected: Expected = {}
    for number in range(1, depth + 1):
        scale = 0.65 ** (depth + 1 - number)
        expected |= {f"blocks.{number - 1}.{name}": (scale, 0.05) for name in MATRICES}
        expected |= {f"blocks.{number - 1}.{name}": (scale, 0.0) for name in (*VECTORS, *extra_vectors)}
    return expected


def assert_same(found: Expected, expected: Expected) -> None:
    assert found.keys() == expected.keys()
    for name, (scale, decay) in expected.items():
        assert found[name] == (pytest.approx(scale, rel=1e-12), decay), name


def test_groups_of_vit_l() -> None:
    encoder = on_meta(arch="vit_l16")
    groups = encoder_groups(encoder, weight_decay=0.05, layer_decay=0.65)
    expected = block_parameters(24)
    expected |= {"cls_token": (0.65**25, 0.0)}
    expected |= {"patch_embed.proj.weight": (0.65**25, 0.05), "patch_embed.proj.bias": (0.65**25, 0.0)}
    expected |= {"norm.weight": (1.0, 0.0), "norm.bias": (1.0, 0.0)}
    # pos_embed is not among them: sin-cos positions are fixed.
    assert len(expected) == 24 * 12 + 5
    assert_same(found_in(groups), expected)
    assert expected["blocks.0.mlp.fc1.weight"][0] == pytest.approx(0.65**24)
    assert expected["blocks.23.mlp.fc1.weight"][0] == pytest.approx(0.65)
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales == pytest.approx([0.65**power for power in range(25, -1, -1)])
    assert len(groups) == 2 * 25 + 1


def test_groups_of_post_norm_vit_l() -> None:
    groups = encoder_groups(on_meta(arch="vit_l16", source="d2v2"), weight_decay=0.05, layer_decay=0.65)
    expected = block_parameters(24)
    expected |= {name: (0.65**25, 0.0) for name in ("cls_token", "norm_pre.weight", "norm_pre.bias")}
    expected |= {"patch_embed.proj.weight": (0.65**25, 0.05), "patch_embed.proj.bias": (0.65**25, 0.0)}
    assert_same(found_in(groups), expected)


def test_groups_of_a_timm_model_with_registers_and_layer_scale() -> None:
    encoder = on_meta(arch="vit_small_patch14_reg4_dinov2", image_size=56)
    groups = encoder_groups(encoder, weight_decay=0.05, layer_decay=0.65)
    expected = block_parameters(12, extra_vectors=("ls1.gamma", "ls2.gamma"))
    # Learned positions: trained, not decayed.
    expected |= {name: (0.65**13, 0.0) for name in ("cls_token", "reg_token", "pos_embed", "patch_embed.proj.bias")}
    expected |= {"patch_embed.proj.weight": (0.65**13, 0.05), "norm.weight": (1.0, 0.0), "norm.bias": (1.0, 0.0)}
    assert_same(found_in(groups), expected)


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_freezing_blocks_freezes_what_feeds_them(frozen: int) -> None:
    encoder = build_encoder(TINY)
    freeze_untrained(encoder, first=frozen, last=3)
    expected = block_parameters(3)
    expected |= {"norm.weight": (1.0, 0.0), "norm.bias": (1.0, 0.0), "cls_token": (0.65**4, 0.0)}
    expected |= {"patch_embed.proj.weight": (0.65**4, 0.05), "patch_embed.proj.bias": (0.65**4, 0.0)}
    gone = [f"blocks.{number}." for number in range(frozen)]
    if frozen:
        gone += ["cls_token", "patch_embed."]
    trained = {name: value for name, value in expected.items() if not name.startswith(tuple(gone))}
    assert_same(found_in(encoder_groups(encoder, weight_decay=0.05, layer_decay=0.65)), trained)
    trainable = {name for name, parameter in encoder.vit.named_parameters() if parameter.requires_grad}
    assert trainable == trained.keys()


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3"])
@pytest.mark.parametrize("last", [3, 6])
def test_trainable_parameters_are_those_with_a_gradient(name: str, last: int) -> None:
    encoder = build_encoder(Architecture.from_config(EncoderConfig(arch=name, image_size=32)))
    freeze_untrained(encoder, first=1, last=last)
    encoder.blocks(torch.randn(2, 3, 32, 32), [last], final_norm=True)[0].square().sum().backward()
    for parameter_name, parameter in encoder.vit.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), parameter_name
