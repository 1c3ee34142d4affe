"""Encoders against timm's own features; the post-norm encoder and both position formulas against plain code."""

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from mimref.config.run import EncoderConfig
from mimref.encoders.positions import resize_positions, sincos_positions
from mimref.encoders.tokens import pool_tokens
from mimref.encoders.vit import Architecture, build_encoder, is_plain_vit
from mimref.errors import ConfigError

TINY = Architecture("custom", 16, width=32, depth=3, num_heads=4, patch_size=4)


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Set values that make every parameter matter: timm initialises norms to one, biases and LayerScale near zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        spread = 0.3 if parameter.ndim < 2 else 0.5 / math.sqrt(parameter[0].numel())
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * spread + (parameter.ndim == 1))


def timm_tokens(model: Any, images: Tensor, *, norm: bool = False) -> list[Tensor]:
    found = model.forward_intermediates(
        images, return_prefix_tokens=True, norm=norm, output_fmt="NLC", intermediates_only=True
    )
    return [torch.cat(pair[::-1], dim=1) if isinstance(pair, tuple) else pair for pair in found]


# Name, and the image size that it is built for.
TIMM_MODELS = {
    "test_vit": 64,
    "test_vit2": 64,  # no CLS, a register, LayerScale, norm after pooling
    "test_vit3": 64,  # attention pooling
    "test_vit4": 64,  # RMSNorm
    "deit3_small_patch16_224": 32,  # no position for the CLS token, LayerScale
    "vit_small_patch14_reg4_dinov2": 42,
    "vit_pwee_patch16_reg1_gap_256": 48,  # attention and MLP in parallel
}


@pytest.mark.parametrize("name", TIMM_MODELS)
@torch.no_grad()
def test_every_block_equals_timms_own(name: str) -> None:
    size = TIMM_MODELS[name]
    model: Any = timm.create_model(name, num_classes=0, img_size=size).eval()
    randomize(model)
    encoder = build_encoder(Architecture.from_config(EncoderConfig(arch=name, image_size=size))).eval()
    encoder.vit.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, size, size)
    expected = timm_tokens(model, images)
    tokens = encoder.blocks(images, range(1, encoder.depth + 1))
    assert len(tokens) == len(expected) == encoder.depth
    for own, other in zip(tokens, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    normed = encoder.blocks(images, [encoder.depth, 1], final_norm=True)
    torch.testing.assert_close(normed[0], timm_tokens(model, images, norm=True)[-1], rtol=1e-5, atol=1e-5)
    assert torch.equal(normed[1], tokens[0])
    every = encoder.blocks(images, range(1, encoder.depth + 1), final_norm=[True] * encoder.depth)
    for own, other in zip(every, timm_tokens(model, images, norm=True), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_own_pre_norm_equals_timms_vit() -> None:
    encoder = build_encoder(TINY).eval()
    model: Any = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, num_classes=0, embed_dim=32, depth=3, num_heads=4
    ).eval()
    randomize(encoder.vit)
    model.load_state_dict(encoder.vit.state_dict())
    images = torch.randn(2, 3, 16, 16)
    for own, other in zip(encoder.blocks(images, [1, 2, 3]), timm_tokens(model, images), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    normed = encoder.blocks(images, [3], final_norm=True)[0]
    torch.testing.assert_close(normed, model.forward_features(images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_post_norm_equals_data2vecs_formula() -> None:
    architecture = Architecture("custom", 12, width=24, depth=3, num_heads=3, patch_size=4, post_norm=True)
    encoder = build_encoder(architecture).double().eval()
    positions = encoder.vit.pos_embed.clone()  # type: ignore[union-attr]
    randomize(encoder.vit)
    encoder.vit.pos_embed.copy_(positions)  # type: ignore[union-attr]
    w = encoder.vit.state_dict()
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)

    def norm(x: Tensor, name: str) -> Tensor:
        variance = x.var(dim=-1, unbiased=False, keepdim=True)
        return (x - x.mean(dim=-1, keepdim=True)) / (variance + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def attention(x: Tensor, name: str) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = linear(x, f"{name}.qkv").view(batch, length, 3, 3, 8).permute(2, 0, 3, 1, 4)
        shares = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(dim=-1)
        return linear((shares @ v).transpose(1, 2).reshape(batch, length, 24), f"{name}.proj")

    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 9, 48)
    x = patches @ w["patch_embed.proj.weight"].view(24, 48).T + w["patch_embed.proj.bias"]
    x = x + positions[:, 1:]
    x = norm(torch.cat([w["cls_token"].expand(2, 1, 24) + positions[:, :1], x], dim=1), "norm_pre")
    expected = []
    for block in ("blocks.0", "blocks.1", "blocks.2"):
        x = norm(x + attention(x, f"{block}.attn"), f"{block}.norm1")
        hidden = linear(x, f"{block}.mlp.fc1")
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        x = norm(x + linear(hidden, f"{block}.mlp.fc2"), f"{block}.norm2")
        expected.append(x)
    for final_norm in (False, True):
        for own, other in zip(encoder.blocks(images, [1, 2, 3], final_norm=final_norm), expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)
    assert not any(name.startswith("norm.") for name in w)
    assert float(positions[0, 0].abs().max()) == 0


def test_sincos_positions_equal_maes_formula() -> None:
    width, side = 16, 3
    omega = [1 / 10000 ** (d / (width / 4)) for d in range(width // 4)]
    rows = []
    for h in range(side):
        for w in range(side):
            # MAE: "here w goes first".
            rows.append([f(at * o) for at in (w, h) for f in (math.sin, math.cos) for o in omega])
    expected = np.concatenate([np.zeros((1, width)), np.array(rows)]).astype(np.float32)
    assert np.array_equal(sincos_positions(width, side)[0].numpy(), expected)
    assert sincos_positions(width, side, num_prefix=0).shape == (1, 9, width)
    with pytest.raises(ConfigError, match=r"width 18 is not divisible by 4"):
        sincos_positions(18, 2)


def test_positions_are_interpolated_bicubically_without_antialiasing() -> None:
    positions = torch.randn(1, 16, 8)
    assert resize_positions(positions, (4, 4)) is positions
    for grid in ((2, 2), (7, 7), (3, 5)):
        image = positions.view(1, 4, 4, 8).permute(0, 3, 1, 2)
        expected = F.interpolate(image, size=grid, mode="bicubic", align_corners=False, antialias=False)
        resized = resize_positions(positions, grid)
        assert torch.equal(resized, expected.permute(0, 2, 3, 1).reshape(1, -1, 8))
    assert not torch.equal(
        resize_positions(positions, (2, 2)),
        F.interpolate(image, size=(2, 2), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, -1, 8),
    )


@torch.no_grad()
def test_other_resolutions_use_resized_positions_and_leave_the_cls_tokens_alone() -> None:
    encoder = build_encoder(TINY).eval()
    randomize(encoder.vit)
    small = build_encoder(Architecture("custom", 8, width=32, depth=3, num_heads=4, patch_size=4)).eval()
    weights = encoder.vit.state_dict()
    weights["pos_embed"] = torch.cat(
        [weights["pos_embed"][:, :1], resize_positions(weights["pos_embed"][:, 1:], (2, 2))], dim=1
    )
    small.vit.load_state_dict(weights)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(encoder.blocks(images, [3])[0], small.blocks(images, [3])[0])


def test_only_the_blocks_needed_run() -> None:
    encoder = build_encoder(TINY).eval()
    ran: list[int] = []
    for number, block in enumerate(encoder.vit.blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    images = torch.randn(1, 3, 16, 16)
    first, second, again = encoder.blocks(images, [2, 1, 2])
    assert ran == [1, 2]
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.parametrize(
    ("indices", "message"), [([0], "block 0"), ([4], "block 4"), ([1, -1], "block -1"), ([], "no")]
)
def test_blocks_outside_are_refused(indices: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{message}.*the encoder has blocks 1 to 3$"):
        build_encoder(TINY).blocks(torch.randn(1, 3, 16, 16), indices)


def test_pooling() -> None:
    tokens = torch.randn(2, 7, 3)
    assert torch.equal(pool_tokens(tokens, "cls", 3, True), tokens[:, 0])
    assert torch.equal(pool_tokens(tokens, "mean", 3, True), tokens[:, 3:].mean(1))
    assert torch.equal(pool_tokens(tokens, "cls+mean", 3, True), torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], 1))
    # Without a CLS token, the mean stands in for it, and registers are ignored.
    assert torch.equal(pool_tokens(tokens, "cls", 2, False), tokens[:, 2:].mean(1))
    assert torch.equal(pool_tokens(tokens, "mean", 0, False), tokens.mean(1))
    assert torch.equal(pool_tokens(tokens, "cls+mean", 0, False), tokens.mean(1).repeat(1, 2))
    encoder = build_encoder(Architecture.from_config(EncoderConfig(arch="test_vit2", image_size=32)))
    assert (encoder.num_prefix_tokens, encoder.has_cls_token) == (1, False)


@pytest.mark.parametrize(
    ("name", "sizes", "millions"),
    [
        ("vit_b16", (768, 12, 12, 16), 85.8),
        ("vit_l16", (1024, 24, 16, 16), 303.3),
        ("vit_h14", (1280, 32, 16, 14), 630.8),
        ("vit_2b14", (2560, 24, 32, 14), 1890.0),
    ],
)
@pytest.mark.parametrize("source", ["mae", "d2v2"])
def test_the_papers_sizes(name: str, source: str, sizes: tuple[int, ...], millions: float) -> None:
    architecture = Architecture.from_config(EncoderConfig(arch=name, source=source))
    with torch.device("meta"):
        encoder = build_encoder(architecture)
    assert (encoder.embed_dim, encoder.depth, architecture.num_heads, encoder.patch_size) == sizes
    assert architecture.post_norm == (source == "d2v2")
    count = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=2 if millions > 1000 else 0.1)
    assert not encoder.vit.pos_embed.requires_grad  # type: ignore[union-attr]


def test_architectures_travel_as_tables() -> None:
    for architecture in (TINY, Architecture.from_config(EncoderConfig(arch="test_vit", image_size=64))):
        assert Architecture.from_dict(architecture.to_dict()) == architecture


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widht": 3}, "unknown key 'widht'"),
        ({"width": "32"}, "width = '32'"),
        ({"depth": 0}, "depth = 0"),
        ({"depth": True}, "depth = True"),
        ({"post_norm": 1}, "post_norm = 1"),
        ({"num_heads": 3}, "width 32 for 3 attention heads"),
    ],
)
def test_tables_with_wrong_entries(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Architecture.from_dict(TINY.to_dict() | changes)


def test_tables_that_lack_something() -> None:
    with pytest.raises(ConfigError, match="is not a table"):
        Architecture.from_dict([1])
    table = TINY.to_dict()
    del table["patch_size"]
    with pytest.raises(ConfigError, match="lacks 'patch_size'"):
        Architecture.from_dict(table)


@pytest.mark.parametrize(("size", "nearest"), [(225, 224), (231, 224), (232, 240), (233, 240), (5, 16)])
def test_sizes_that_patches_do_not_divide(size: int, nearest: int) -> None:
    architecture = Architecture("vit_b16", size, 768, 12, 12, 16)
    expected = rf"^views\.local_size {size} .* 16 .*{nearest}$"
    with pytest.raises(ConfigError, match=expected):
        architecture.check_size(size, "views.local_size")
    with pytest.raises(ConfigError, match=r"^encoder\.image_size"):
        build_encoder(architecture)
    architecture.check_size(nearest, "views.local_size")


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match=r"unknown architecture 'vit_l61'; did you mean 'vit_l16'\?"):
        Architecture.from_config(EncoderConfig(arch="vit_l61"))
    with pytest.raises(ConfigError, match=r"did you mean 'vit_base_patch16_224'\?"):
        Architecture.from_config(EncoderConfig(arch="vit_bass_patch16_224"))
    with pytest.raises(ConfigError, match=r"timm's weights of vit_tiny_patch16_224 are augreg_in21k"):
        Architecture.from_config(EncoderConfig(arch="vit_tiny_patch16_224.mea"))
    with pytest.raises(ConfigError, match="unknown architecture 'hf-hub:a/b'"):
        Architecture.from_config(EncoderConfig(arch="hf-hub:a/b"))


@pytest.mark.parametrize("name", ["convnextv2_atto", "deit_tiny_distilled_patch16_224", "vit_tiny_r_s16_p8_224"])
def test_other_timm_models_are_not_refined(name: str) -> None:
    assert not is_plain_vit(name)
    with pytest.raises(ConfigError, match=name):
        Architecture.from_config(EncoderConfig(arch=name))
